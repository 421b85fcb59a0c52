"""Model directories, and what is done inside a model: observing, gating, cutting, building a student."""
