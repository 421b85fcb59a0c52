"""Quantizes the linear layers and embedding tables of ONNX graphs."""
