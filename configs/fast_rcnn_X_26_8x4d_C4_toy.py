"""The second step of the paper's own detector on the toy data."""

from .base_fast_rcnn_c4 import dataloader, lr_multiplier, model, optimizer, train

model.backbone.update(depth=26, template="8x4d", stem_out_channels=32, res2_out_channels=64)
model.roi_heads.res5.res2_out_channels = 64
model.roi_heads.box_predictor.input_shape.channels = 512
model.roi_heads.num_classes = 6
model.roi_heads.pooler.output_size = 4

dataloader.train.dataset.names = ["toy_coco_train"]
dataloader.train.mapper.augmentations[0].update(short_edge_length=[224], max_size=288)
dataloader.train.mapper.precomputed_proposal_topk = 200
dataloader.train.update(total_batch_size=8, num_workers=0)
dataloader.test.dataset.names = "toy_coco_minival"
dataloader.test.mapper.augmentations[0].update(short_edge_length=224, max_size=288)
dataloader.test.mapper.precomputed_proposal_topk = 100

optimizer.lr = 0.04
lr_multiplier.scheduler.update(milestones=[450], num_updates=600)
lr_multiplier.warmup_length = 50 / 600
train.update(max_iter=600, seed=1)
