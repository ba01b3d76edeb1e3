"""ResNet-50, the template 1x64d."""

from .base_rpn_c4 import dataloader, lr_multiplier, model, optimizer, train

model.backbone.update(depth=50, template="1x64d")
