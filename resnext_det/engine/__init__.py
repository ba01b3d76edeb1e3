"""Training: the trainer, what happens around an iteration, and pretraining in miniature."""
