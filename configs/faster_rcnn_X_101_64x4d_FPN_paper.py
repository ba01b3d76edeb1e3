"""ResNeXt-101 64x4d."""

from .base_resnext_fpn import dataloader, lr_multiplier, model, optimizer, train

model.backbone.bottom_up.update(depth=101, template="64x4d")
