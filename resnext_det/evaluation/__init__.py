"""From detections to figures, and from figures to a page that people read."""
