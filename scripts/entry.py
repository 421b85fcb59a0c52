"""Starts the command line for the scripts that `accelerate launch` runs."""

from __future__ import annotations

import sys
from pathlib import Path


def start(*words: str) -> None:
    """Runs the command line with `words` before the given arguments."""
    # evaluate.py in this folder would hide the library of that name.
    here = Path(__file__).resolve().parent
    sys.path[:] = [entry for entry in sys.path if Path(entry).resolve() != here]
    from hfcompress.cli import main

    sys.argv[1:1] = words
    main()
