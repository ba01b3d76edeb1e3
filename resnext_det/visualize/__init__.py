"""Detections drawn on pictures and videos, training images, and curves of runs."""
