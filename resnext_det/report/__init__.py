"""Turns a run's folder into one HTML page for people."""
