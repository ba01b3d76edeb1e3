"""Data sets: minival, the toy data, and checks before a training begins."""
