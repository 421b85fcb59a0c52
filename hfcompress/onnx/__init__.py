"""ONNX graphs: a model exported, fused, and stored in fewer bits."""
