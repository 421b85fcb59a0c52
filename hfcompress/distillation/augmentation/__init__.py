"""Data augmentation, as in TinyBERT."""
