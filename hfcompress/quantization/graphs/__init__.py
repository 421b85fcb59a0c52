"""ONNX graphs with quantized weights."""
