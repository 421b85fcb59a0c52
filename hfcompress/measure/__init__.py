"""Quality, size, latency, memory and energy of a model in a process of its own."""
