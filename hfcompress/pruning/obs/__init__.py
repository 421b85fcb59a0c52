"""Optimal Brain Surgeon."""
