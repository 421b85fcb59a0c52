"""Measures models side by side: `python scripts/evaluate.py MODEL... --task RECIPE`."""

import sys

from hfcompress.cli import main

if __name__ == "__main__":
    sys.argv[1:1] = ["evaluate"]
    main()
