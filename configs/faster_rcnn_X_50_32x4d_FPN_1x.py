"""ResNeXt-50 32x4d, Detectron's 1x schedule."""

from .faster_rcnn_X_50_32x4d_FPN_paper import dataloader, lr_multiplier, model, optimizer, train

lr_multiplier.scheduler.update(
    values=[1.0, 0.1, 0.1**2], milestones=[60_000, 80_000], num_updates=90_000
)
lr_multiplier.warmup_length = 1000 / 90_000
train.max_iter = 90_000
