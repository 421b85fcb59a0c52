"""Runs a recipe, compares models, pushes results."""
