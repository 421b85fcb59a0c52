"""Measures models side by side: `python scripts/evaluate.py MODEL... --task RECIPE`."""

from entry import start

if __name__ == "__main__":
    start("evaluate")
