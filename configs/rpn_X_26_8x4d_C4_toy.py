"""The first step of the paper's own detector on the toy data."""

from .base_rpn_c4 import dataloader, lr_multiplier, model, optimizer, train

model.backbone.update(depth=26, template="8x4d", stem_out_channels=32, res2_out_channels=64)
model.proposal_generator.head.update(in_channels=256, num_anchors=5)
model.proposal_generator.anchor_generator.update(
    sizes=[[28, 48, 72, 112, 176]], aspect_ratios=[1.0]
)
model.proposal_generator.update(batch_size_per_image=64, anchor_boundary_thresh=-1)
model.proposal_generator.update(pre_nms_topk=[1, 600], post_nms_topk=[1, 200])

dataloader.train.dataset.names = ["toy_coco_train"]
dataloader.train.mapper.augmentations[0].update(short_edge_length=[224], max_size=288)
dataloader.train.update(total_batch_size=8, num_workers=0)
dataloader.test.dataset.names = "toy_coco_minival"
dataloader.test.mapper.augmentations[0].update(short_edge_length=224, max_size=288)

optimizer.lr = 0.04
lr_multiplier.scheduler.update(milestones=[160], num_updates=240)
lr_multiplier.warmup_length = 50 / 240
train.update(max_iter=240, seed=1)
