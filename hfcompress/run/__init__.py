"""Runs recipes, compares models, and pushes results."""
