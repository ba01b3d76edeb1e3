"""Detections drawn on images and videos, training images, and training curves."""
