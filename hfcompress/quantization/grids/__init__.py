"""Quantization grids: scales and codes that are the same in PyTorch and ONNX Runtime."""
