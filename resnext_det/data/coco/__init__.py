"""COCO's own splits: what they hold, and minival out of the files there are."""
