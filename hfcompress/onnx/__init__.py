"""ONNX graphs: export, fusion, reading and writing."""
