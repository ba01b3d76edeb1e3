"""ResNeXt-50 32x4d."""

from .base_rpn_c4 import dataloader, lr_multiplier, model, optimizer, train

model.backbone.depth = 50
