"""Errors, components, documents, shapes, the console: no torch here."""
