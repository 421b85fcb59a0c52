"""Measures the quality, size, latency, memory and energy of models, each in a process of its own."""
