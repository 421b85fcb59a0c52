"""Converts pruned checkpoints of other tools to models that load again."""
