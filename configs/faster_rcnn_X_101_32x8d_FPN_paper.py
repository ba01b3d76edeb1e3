"""ResNeXt-101 32x8d: not a template of the paper; the one that Detectron2 publishes as X-101."""

from .base_resnext_fpn import dataloader, lr_multiplier, model, optimizer, train

model.backbone.bottom_up.update(depth=101, template="32x8d")
