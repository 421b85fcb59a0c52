"""Runs the distill stages of a recipe: `accelerate launch scripts/distill.py RECIPE [--set KEY=VALUE]`."""

from entry import start

if __name__ == "__main__":
    start("run", "--only", "distill")
