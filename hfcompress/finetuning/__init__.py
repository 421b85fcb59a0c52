"""Fine-tuning: makes the source model that the other stages compress."""
