"""Masks that learn while a model trains."""
