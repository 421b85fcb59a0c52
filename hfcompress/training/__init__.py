"""The one training path, on transformers' Trainer."""
