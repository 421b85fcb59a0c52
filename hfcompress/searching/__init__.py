"""Finds the chain of stages that makes a model fastest, or smallest, within a limit on the loss of quality."""
