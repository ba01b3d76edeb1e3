"""ResNeXt-50 32x4d, the paper's schedule for 16 images on each of 8 GPUs."""

from .faster_rcnn_X_50_32x4d_FPN_paper import dataloader, lr_multiplier, model, optimizer, train

dataloader.train.total_batch_size, optimizer.lr = 128, 0.16
lr_multiplier.scheduler.update(milestones=[15_000], num_updates=22_500)
lr_multiplier.warmup_length = 1000 / 22_500
train.update(max_iter=22_500, checkpointer={"period": 625})
