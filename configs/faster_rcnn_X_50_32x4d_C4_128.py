"""ResNeXt-50 32x4d, RPN and Fast R-CNN together, for 16 images on each of 8 GPUs."""

from .base_fast_rcnn_c4 import model
from .base_rpn_c4 import dataloader, lr_multiplier, optimizer, proposal_generator, train

model.proposal_generator = proposal_generator
model.proposal_generator.update(pre_nms_topk=[12000, 6000], post_nms_topk=[2000, 300])
dataloader.train.total_batch_size, optimizer.lr = 128, 0.16
lr_multiplier.scheduler.update(milestones=[15_000], num_updates=22_500)
lr_multiplier.warmup_length = 1000 / 22_500
train.update(max_iter=22_500, checkpointer={"period": 625})
