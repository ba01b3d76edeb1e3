"""ResNet-101, the template 1x64d."""

from .base_fast_rcnn_c4 import dataloader, lr_multiplier, model, optimizer, train

model.backbone.update(depth=101, template="1x64d")
