"""Runs the quantize stages of a recipe: `accelerate launch scripts/quantize.py RECIPE [--set KEY=VALUE]`."""

import sys

from hfcompress.cli import main

if __name__ == "__main__":
    sys.argv[1:1] = ["run", "--only", "quantize"]
    main()
