"""Publish a finished run: its model, tokenizer, card and pictures, in one commit.

python examples/publish.py RUN USER/NAME
Log in first: `hf auth login`.
"""

import sys
from pathlib import Path

import hfcompress as hfc


def main(run: str, repo: str) -> None:
    card = (Path(run) / "final" / "README.md").read_text(encoding="utf-8")
    print(card.split("## ")[0])  # read it before the world does
    print(hfc.push(run, repo, private=True))


if __name__ == "__main__":
    main(*sys.argv[1:])
