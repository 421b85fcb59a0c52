"""Runs all stages of a recipe: `accelerate launch scripts/run.py RECIPE [--set KEY=VALUE]`."""

from entry import start

if __name__ == "__main__":
    start("run")
