"""The second step of the paper's own detector on the toy data."""

from .base_fast_rcnn_c4 import dataloader, lr_multiplier, model, optimizer, train

model.backbone.update(depth=26, template="8x4d", freeze_at=0)
model.backbone.update(stem_out_channels=32, res2_out_channels=64)
model.roi_heads.res5.res2_out_channels = 64
model.roi_heads.box_predictor.input_shape.channels = 512
model.roi_heads.update(num_classes=6, batch_size_per_image=32)
model.roi_heads.pooler.output_size = 7

dataloader.train.dataset.names = ["toy_coco_train"]
dataloader.train.mapper.augmentations[0].update(short_edge_length=[224], max_size=288)
dataloader.train.mapper.precomputed_proposal_topk = 200
dataloader.train.update(total_batch_size=8, num_workers=0)
dataloader.test.dataset.names = "toy_coco_minival"
dataloader.test.mapper.augmentations[0].update(short_edge_length=224, max_size=288)
dataloader.test.mapper.precomputed_proposal_topk = 100

optimizer.lr = 0.04
lr_multiplier.scheduler.update(milestones=[200], num_updates=260)
lr_multiplier.warmup_length = 50 / 260
train.update(max_iter=260, seed=1)
