"""From detections to COCO's figures, and to where a detector errs."""
