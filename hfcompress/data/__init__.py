"""Tasks, metrics, and where models and data come from."""
