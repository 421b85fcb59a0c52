"""Errors, files, locks, logging, strict models: nothing here knows a model."""
