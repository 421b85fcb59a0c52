"""Masks on units and on single weights while a model trains."""
