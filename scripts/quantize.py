"""Runs the quantize stages of a recipe: `accelerate launch scripts/quantize.py RECIPE [--set KEY=VALUE]`."""

from entry import start

if __name__ == "__main__":
    start("run", "--only", "quantize")
