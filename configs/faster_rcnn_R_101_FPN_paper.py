"""ResNet-101, the template 1x64d."""

from .base_resnext_fpn import dataloader, lr_multiplier, model, optimizer, train

model.backbone.bottom_up.update(depth=101, template="1x64d")
