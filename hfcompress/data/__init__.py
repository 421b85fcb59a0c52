"""Tasks and metrics, and where models and data come from."""
