"""The steps of a recipe, and the one training path."""
