"""Model directories, architectures and shapes, and changes to the modules of a model."""
