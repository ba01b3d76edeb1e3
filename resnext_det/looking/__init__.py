"""What one looks at: detections on pictures and videos, training images, curves of runs."""
