"""Pretrained weights: the catalog, downloads, conversion to Detectron2, and loading."""
