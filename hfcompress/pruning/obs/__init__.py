"""Optimal Brain Surgeon: the output Hessian, and the solver for one linear layer."""
