"""From a trained detector to an artifact that `resnext_det.runtime` runs without Detectron2."""
