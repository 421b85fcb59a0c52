"""What the scripts for `accelerate launch` share."""

from __future__ import annotations

import sys
from pathlib import Path


def start(*words: str) -> None:
    """The command line, with `words` put before the arguments that were given."""
    # evaluate.py, which stands in this folder, would hide the library of that name.
    here = Path(__file__).resolve().parent
    sys.path[:] = [entry for entry in sys.path if Path(entry).resolve() != here]
    from hfcompress.cli import main

    sys.argv[1:1] = words
    main()
