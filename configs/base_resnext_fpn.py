"""Base-ResNeXt-FPN.yaml as a LazyConfig, for Detectron2's tools/lazyconfig_train_net.py.

Each child is the twin of the yaml of its name; tests/test_lazy_configs.py compares the values.
Base-ResNeXt-FPN.yaml explains the schedule.

That tool has no counterpart of two keys:
- SOLVER.REFERENCE_WORLD_SIZE: on fewer than 8 GPUs nothing is scaled, so set
  dataloader.train.total_batch_size, optimizer.lr and train.max_iter yourself. Warm-up and step
  scale with train.max_iter.
- MODEL.WEIGHTS: Detectron2 alone reads train.init_checkpoint, so give it a file that
  tools/convert_weights.py wrote. The backbone refuses a file that would fill only part of it, but
  nothing checks that pixels and stride are those of the weights.
"""

import torch
from detectron2.config import LazyCall as L
from detectron2.data import (
    build_detection_test_loader,
    build_detection_train_loader,
    get_detection_dataset_dicts,
)
from detectron2.data import transforms as T
from detectron2.layers import ShapeSpec
from detectron2.modeling import GeneralizedRCNN
from detectron2.modeling.anchor_generator import DefaultAnchorGenerator
from detectron2.modeling.backbone import FPN
from detectron2.modeling.backbone.fpn import LastLevelMaxPool
from detectron2.modeling.box_regression import Box2BoxTransform
from detectron2.modeling.matcher import Matcher
from detectron2.modeling.poolers import ROIPooler
from detectron2.modeling.proposal_generator import RPN
from detectron2.modeling.proposal_generator.rpn import StandardRPNHead
from detectron2.modeling.roi_heads import (
    FastRCNNConvFCHead,
    FastRCNNOutputLayers,
    StandardROIHeads,
)
from detectron2.solver import WarmupParamScheduler
from detectron2.solver.build import get_default_optimizer_params
from fvcore.common.param_scheduler import MultiStepParamScheduler

from resnext_det import ResNeXt  # the import registers the data sets, too
from resnext_det.data.mapper import NamingDatasetMapper
from resnext_det.evaluation.evaluator import detection_evaluator

if globals().get("__loader__") is not None:
    # Python imports a module only once, so all children would change the same base.
    raise ImportError(
        "this file is a LazyConfig, which cannot be imported: read it with "
        "resnext_det.model_zoo.get_lazy_config or detectron2.config.LazyConfig.load."
    )

model = L(GeneralizedRCNN)(
    backbone=L(FPN)(
        bottom_up=L(ResNeXt)(
            depth=50,
            template="32x4d",
            norm="FrozenBN",
            freeze_at=2,
            out_features=["res2", "res3", "res4", "res5"],
        ),
        in_features="${.bottom_up.out_features}",
        out_channels=256,
        top_block=L(LastLevelMaxPool)(),
    ),
    proposal_generator=L(RPN)(
        in_features=["p2", "p3", "p4", "p5", "p6"],
        head=L(StandardRPNHead)(in_channels="${...backbone.out_channels}", num_anchors=3),
        anchor_generator=L(DefaultAnchorGenerator)(
            sizes=[[32], [64], [128], [256], [512]],
            aspect_ratios=[0.5, 1.0, 2.0],
            strides=[4, 8, 16, 32, 64],
            offset=0.0,
        ),
        anchor_matcher=L(Matcher)(
            thresholds=[0.3, 0.7], labels=[0, -1, 1], allow_low_quality_matches=True
        ),
        box2box_transform=L(Box2BoxTransform)(weights=[1.0, 1.0, 1.0, 1.0]),
        batch_size_per_image=256,
        positive_fraction=0.5,
        pre_nms_topk=[2000, 1000],  # in training, in testing
        post_nms_topk=[1000, 1000],
        nms_thresh=0.7,
    ),
    roi_heads=L(StandardROIHeads)(
        num_classes=80,
        batch_size_per_image=512,
        positive_fraction=0.25,
        proposal_matcher=L(Matcher)(
            thresholds=[0.5], labels=[0, 1], allow_low_quality_matches=False
        ),
        box_in_features=["p2", "p3", "p4", "p5"],
        box_pooler=L(ROIPooler)(
            output_size=7,
            scales=[1 / 4, 1 / 8, 1 / 16, 1 / 32],
            sampling_ratio=0,
            pooler_type="ROIAlignV2",
        ),
        box_head=L(FastRCNNConvFCHead)(
            input_shape=L(ShapeSpec)(
                channels="${....backbone.out_channels}",
                height="${...box_pooler.output_size}",
                width="${...box_pooler.output_size}",
            ),
            conv_dims=[],
            fc_dims=[1024, 1024],
        ),
        box_predictor=L(FastRCNNOutputLayers)(
            input_shape=L(ShapeSpec)(channels="${...box_head.fc_dims[1]}"),
            box2box_transform=L(Box2BoxTransform)(weights=[10.0, 10.0, 5.0, 5.0]),
            num_classes="${..num_classes}",
            test_score_thresh=0.05,
            test_nms_thresh=0.5,
            test_topk_per_image=100,
        ),
    ),
    # ImageNet's statistics in this package's only pixel convention: BGR, 0 to 255.
    pixel_mean=[103.530, 116.280, 123.675],
    pixel_std=[57.375, 57.120, 58.395],
    input_format="BGR",
)

train = {
    "output_dir": "./output",
    "init_checkpoint": "",
    "max_iter": 180_000,
    "amp": {"enabled": False},
    "ddp": {
        "broadcast_buffers": False,
        "find_unused_parameters": False,
        "fp16_compression": False,
    },
    "checkpointer": {"period": 5000},
    "eval_period": 0,  # after the last iteration only
    "log_period": 20,
    "device": "cuda" if torch.cuda.is_available() else "cpu",
    "seed": -1,  # a different one in each run
}

dataloader = {
    "train": L(build_detection_train_loader)(
        dataset=L(get_detection_dataset_dicts)(
            names=["coco_2014_train", "coco_2014_valminusminival"]
        ),
        mapper=L(NamingDatasetMapper)(
            is_train=True,
            augmentations=[
                L(T.ResizeShortestEdge)(
                    short_edge_length=[640, 672, 704, 736, 768, 800],
                    max_size=1333,
                    sample_style="choice",
                ),
                L(T.RandomFlip)(horizontal=True),
            ],
            image_format="${model.input_format}",
        ),
        total_batch_size=16,
        num_workers=4,
    ),
    "test": L(build_detection_test_loader)(
        dataset=L(get_detection_dataset_dicts)(names="coco_2014_minival", filter_empty=False),
        mapper=L(NamingDatasetMapper)(
            is_train=False,
            augmentations=[
                L(T.ResizeShortestEdge)(
                    short_edge_length=800, max_size=1333, sample_style="choice"
                ),
            ],
            image_format="${model.input_format}",
        ),
        num_workers="${..train.num_workers}",
    ),
    "evaluator": L(detection_evaluator)(
        dataset="${..test.dataset.names}",
        # A subfolder, because the training log and the evaluator's figures are both metrics.json.
        output="${train.output_dir}/inference",
        weights="${train.init_checkpoint}",
    ),
}

optimizer = L(torch.optim.SGD)(
    # The tool sets params.model.
    params=L(get_default_optimizer_params)(weight_decay_norm=0.0),
    lr=0.02,
    momentum=0.9,
    weight_decay=0.0001,
    foreach=True,
)

lr_multiplier = L(WarmupParamScheduler)(
    scheduler=L(MultiStepParamScheduler)(
        values=[1.0, 0.1], milestones=[120_000], num_updates=180_000
    ),
    warmup_factor=0.001,
    warmup_length=1000 / 180_000,
    warmup_method="linear",
)
