"""Detections in, COCO's figures out, and where a detector errs."""
