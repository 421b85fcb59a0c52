"""Fine-tuning: trains the source model, which the other stages compress."""
