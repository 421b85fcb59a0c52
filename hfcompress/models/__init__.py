"""Model directories, architectures and shapes, and what is done inside a model."""
