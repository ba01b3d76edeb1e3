"""MODEL_ZOO.md, written from data."""
