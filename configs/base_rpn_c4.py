"""Base-RPN-C4.yaml as a LazyConfig: the RPN alone."""

from detectron2.config import LazyCall as L
from detectron2.modeling import ProposalNetwork
from detectron2.modeling.anchor_generator import DefaultAnchorGenerator
from detectron2.modeling.box_regression import Box2BoxTransform
from detectron2.modeling.matcher import Matcher
from detectron2.modeling.proposal_generator import RPN
from detectron2.modeling.proposal_generator.rpn import StandardRPNHead

from .base_resnext_c4 import backbone, dataloader, lr_multiplier, optimizer, pixels, train

proposal_generator = L(RPN)(
    in_features=["res4"],
    head=L(StandardRPNHead)(in_channels=1024, num_anchors=12),
    anchor_generator=L(DefaultAnchorGenerator)(
        sizes=[[64, 128, 256, 512]],
        aspect_ratios=[0.5, 1.0, 2.0],
        strides=[16],
        offset=0.0,
    ),
    anchor_matcher=L(Matcher)(
        thresholds=[0.3, 0.7], labels=[0, -1, 1], allow_low_quality_matches=True
    ),
    box2box_transform=L(Box2BoxTransform)(weights=[1.0, 1.0, 1.0, 1.0]),
    batch_size_per_image=256,
    positive_fraction=0.5,
    pre_nms_topk=[1, 12000],  # in training, which ignores them, and in testing
    post_nms_topk=[1, 2000],
    nms_thresh=0.7,
    min_box_size=16,
    anchor_boundary_thresh=0,
    smooth_l1_beta=1 / 9,
)

model = L(ProposalNetwork)(backbone=backbone, proposal_generator=proposal_generator, **pixels)
