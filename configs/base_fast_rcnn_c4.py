"""Base-Fast-RCNN-C4.yaml as a LazyConfig: Fast R-CNN on proposals from files.

Name the files in the `proposal_files` of dataloader.train.dataset and dataloader.test.dataset.
"""

from detectron2.config import LazyCall as L
from detectron2.layers import ShapeSpec
from detectron2.modeling import GeneralizedRCNN
from detectron2.modeling.box_regression import Box2BoxTransform
from detectron2.modeling.matcher import Matcher
from detectron2.modeling.poolers import ROIPooler
from detectron2.modeling.roi_heads import FastRCNNOutputLayers

from resnext_det import ResNeXtRes5ROIHeads
from resnext_det.data.proposals import records_with_proposals
from resnext_det.modeling.resnext import make_stage

from .base_resnext_c4 import backbone, dataloader, lr_multiplier, optimizer, pixels, train

model = L(GeneralizedRCNN)(
    backbone=backbone,
    proposal_generator=None,
    roi_heads=L(ResNeXtRes5ROIHeads)(
        num_classes=80,
        batch_size_per_image=64,
        positive_fraction=0.25,
        proposal_matcher=L(Matcher)(
            thresholds=[0.5], labels=[0, 1], allow_low_quality_matches=False
        ),
        in_features=["res4"],
        pooler=L(ROIPooler)(
            output_size=14, scales=[1 / 16], sampling_ratio=0, pooler_type="ROIPool"
        ),
        res5=L(make_stage)(
            name="res5",
            depth="${...backbone.depth}",
            template="${...backbone.template}",
            norm="${...backbone.norm}",
        ),
        box_predictor=L(FastRCNNOutputLayers)(
            input_shape=L(ShapeSpec)(channels=2048, height=1, width=1),
            box2box_transform=L(Box2BoxTransform)(weights=[10.0, 10.0, 5.0, 5.0]),
            num_classes="${..num_classes}",
            test_score_thresh=0.05,
            test_nms_thresh=0.3,
            test_topk_per_image=100,
            smooth_l1_beta=1.0,
        ),
    ),
    input_format="BGR",
    **pixels,
)

dataloader.train.dataset = L(records_with_proposals)(
    names=dataloader.train.dataset.names, proposal_files=[]
)
dataloader.train.mapper.precomputed_proposal_topk = 2000
dataloader.train.total_batch_size = 8
dataloader.test.dataset = L(records_with_proposals)(
    names=dataloader.test.dataset.names, proposal_files=[], filter_empty=False
)
dataloader.test.mapper.precomputed_proposal_topk = 300

optimizer.lr = 0.005
