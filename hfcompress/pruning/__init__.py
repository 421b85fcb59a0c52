"""Pruning of heads, FFN neurons, blocks, layers, dimensions and single weights."""
