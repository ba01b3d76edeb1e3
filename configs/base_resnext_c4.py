"""Base-ResNeXt-C4.yaml as a LazyConfig: what both steps of the paper's own detector share.

The yaml gives the sources of all values; base_resnext_fpn.py says what Detectron2's tool does not
read. The steps are base_rpn_c4.py and base_fast_rcnn_c4.py.
"""

import torch
from detectron2.config import LazyCall as L
from detectron2.data import (
    build_detection_test_loader,
    build_detection_train_loader,
    get_detection_dataset_dicts,
)
from detectron2.data import transforms as T
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

backbone = L(ResNeXt)(
    depth=50,
    template="32x4d",
    norm="FrozenBN",
    freeze_at=2,
    out_features=["res4"],
)

# ImageNet's statistics in this package's only pixel convention: BGR, 0 to 255.
pixels = {"pixel_mean": [103.530, 116.280, 123.675], "pixel_std": [57.375, 57.120, 58.395]}

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
                    short_edge_length=[600], max_size=1000, sample_style="choice"
                ),
                L(T.RandomFlip)(horizontal=True),
            ],
            image_format="BGR",
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
                    short_edge_length=600, max_size=1000, sample_style="choice"
                ),
            ],
            image_format="BGR",
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
    params=L(get_default_optimizer_params)(
        base_lr="${..lr}", weight_decay_norm=0.0, bias_lr_factor=2.0
    ),
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
