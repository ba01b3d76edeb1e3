"""ResNeXt-50 32x4d."""

from .base_resnext_fpn import dataloader, lr_multiplier, model, optimizer, train

model.backbone.bottom_up.depth = 50
