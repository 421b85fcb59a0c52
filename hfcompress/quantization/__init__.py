"""Quantization, after or during training, by one of several backends."""
