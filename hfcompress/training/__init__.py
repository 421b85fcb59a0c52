"""Training, by transformers' Trainer."""
