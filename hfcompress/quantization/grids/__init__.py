"""Scales and codes that PyTorch and ONNX Runtime share."""
