"""Base-ResNeXt-C4.yaml as a LazyConfig: what both steps of the paper's own detector share.

The yaml gives the sources of all values; base_resnext_fpn.py says what Detectron2's tool does not
read. The steps are base_rpn_c4.py and base_fast_rcnn_c4.py.
"""

from detectron2.config import LazyCall as L

from resnext_det import ResNeXt  # the import registers the data sets, too

from .base_resnext_fpn import dataloader, lr_multiplier, optimizer, train

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

for loader, sides in ((dataloader["train"], [600]), (dataloader["test"], 600)):
    loader.mapper.image_format = "BGR"
    loader.mapper.augmentations[0].short_edge_length = sides
    loader.mapper.augmentations[0].max_size = 1000

optimizer.params.base_lr = "${..lr}"
optimizer.params.bias_lr_factor = 2.0
