"""Checkpoints of trainings on disk: written whole, read as data, found again."""
