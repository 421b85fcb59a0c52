"""Runs the prune stages of a recipe: `accelerate launch scripts/prune.py RECIPE [--set KEY=VALUE]`."""

from entry import start

if __name__ == "__main__":
    start("run", "--only", "prune")
