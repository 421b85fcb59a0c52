"""Quantization: after training or while training, by one of several backends."""
