"""ResNet-50 is the template 1x64d: the baseline of the paper's Table 8."""

from .base_resnext_fpn import dataloader, lr_multiplier, model, optimizer, train

model.backbone.bottom_up.template = "1x64d"
