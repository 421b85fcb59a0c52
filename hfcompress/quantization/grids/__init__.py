"""Quantization grids: the scales and codes that PyTorch and ONNX Runtime share."""
