"""ResNeXt-50 32x4d, Detectron's 3x schedule."""

from .faster_rcnn_X_50_32x4d_FPN_paper import dataloader, lr_multiplier, model, optimizer, train

lr_multiplier.scheduler.update(
    values=[1.0, 0.1, 0.1**2], milestones=[210_000, 250_000], num_updates=270_000
)
lr_multiplier.warmup_length = 1000 / 270_000
train.max_iter = 270_000
