"""Pruning: cuts attention heads, FFN neurons, blocks, layers and hidden dimensions, and sets weights to zero."""
