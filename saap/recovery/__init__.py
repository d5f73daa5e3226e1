"""Recovery: a short tuning run that heals a pruned model and leaves it quantised, after ``saap.recover``."""
