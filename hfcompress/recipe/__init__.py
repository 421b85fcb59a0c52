"""Recipes: schema, loader, checks and plan."""
