"""A short version of the paper's schedule for the toy data."""

from .base_resnext_fpn import dataloader, lr_multiplier, model, optimizer, train

model.backbone.bottom_up.update(depth=26, template="8x4d", freeze_at=0)
model.backbone.bottom_up.update(stem_out_channels=32, res2_out_channels=64)
model.backbone.out_channels = 64
model.proposal_generator.anchor_generator.update(
    sizes=[[24], [40], [64], [96], [144]], aspect_ratios=[1.0]
)
model.proposal_generator.head.num_anchors = 1
model.proposal_generator.update(
    batch_size_per_image=64, pre_nms_topk=[300, 300], post_nms_topk=[200, 200]
)
model.roi_heads.update(num_classes=6, batch_size_per_image=64)
model.roi_heads.box_head.fc_dims = [256, 256]

dataloader.train.dataset.names = ["toy_coco_train"]
dataloader.train.mapper.augmentations[0].update(short_edge_length=[192], max_size=256)
dataloader.train.update(total_batch_size=8, num_workers=0)
dataloader.test.dataset.names = "toy_coco_minival"
dataloader.test.mapper.augmentations[0].update(short_edge_length=192, max_size=256)

optimizer.lr = 0.04
lr_multiplier.scheduler.update(milestones=[230], num_updates=300)
lr_multiplier.warmup_length = 50 / 300
train.update(max_iter=300, eval_period=75, seed=1)
