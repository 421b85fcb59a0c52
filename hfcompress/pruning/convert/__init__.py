"""Checkpoints of other tools, made into models that this package can work with."""
