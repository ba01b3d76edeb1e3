"""From what a run left behind to one HTML page that people read."""
