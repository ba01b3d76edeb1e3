"""Refuse a `load_state_dict` that would fill only part of a backbone, in any program.

`load_state_dict(strict=False)`, and with it Detectron2's checkpointer, leaves missing tensors
random after a warning. FrozenBN fills missing statistics with 0 and 1 without any warning
(FrozenBatchNorm2d._load_from_state_dict).
"""

from __future__ import annotations

import logging
import re
from collections.abc import Mapping
from typing import Any

from detectron2.layers import FrozenBatchNorm2d
from torch import Tensor, nn

from resnext_det.errors import WeightsError, named, plain
from resnext_det.modeling.forms import in_form_of

logger = logging.getLogger(__name__)

_STATISTICS = (".norm.running_mean", ".norm.running_var")
# Nothing reads the counter. A classifier is not part of the backbone, and differs in size.
_OPTIONAL = re.compile(r"(.*\.)?num_batches_tracked|linear\..*")
# One tensor of a bare backbone as torchvision, mmdetection, Detectron2, Caffe2 and Cadene name it.
_BARE_BACKBONE = re.compile(
    r"(backbone\.)?layer1\.0\.conv2\.weight|res2\.0\.(paths\.0\.)?conv2\.weight"
    r"|res2_0_branch2b_w|features\.4\.0\.0\.0\.0\.0\.weight"
)


def refuse_partial_loads(module: nn.Module) -> None:
    """Make a backbone, or one stage of it, refuse a `load_state_dict` that fills only part of it.

    A state dict without any tensor of the module passes, as it may be meant for another part of
    the model, unless it holds a bare backbone under names that the model lacks.
    `module.allow_partial_loads = True` switches the check off.

    Args:
        module: with the tensor names of a Detectron2 ResNet, in any form.
    """
    module.register_load_state_dict_pre_hook(_refuse_part)  # type: ignore[no-untyped-call]
    module.register_load_state_dict_post_hook(_refuse_other_names)  # type: ignore[no-untyped-call]


def _refuse_part(module: nn.Module, state: Mapping[str, Tensor], prefix: str, *_rest: Any) -> None:
    if getattr(module, "allow_partial_loads", False):
        return
    wanted = {name for name in module.state_dict() if not _OPTIONAL.fullmatch(name)}
    held = {
        name.removeprefix(prefix): tensor
        for name, tensor in state.items()
        if name.startswith(prefix)
    }
    if held.keys() >= wanted:
        return
    arrived = in_form_of(held, wanted).keys() & wanted
    missing = sorted(wanted - arrived)
    if not arrived or not missing:
        return
    statistics = {name for name in wanted if name.endswith(_STATISTICS)}
    if set(missing) == statistics and _all_norms_are_frozen(module):
        logger.warning(
            "the weights have no running statistics of batch norms (such as %s%s), so FrozenBN "
            "uses 0 and 1. That is right only for batch norms folded into weight and bias, as in "
            "Detectron's files.",
            prefix,
            missing[0],
        )
        return
    raise WeightsError(
        f"the weights fill only part of the backbone: {len(missing)} of its {len(wanted)} tensors "
        "are missing or have another shape, and would stay random: "
        f"{named(prefix + name for name in missing)}. Compare DEPTH, NUM_GROUPS, WIDTH_PER_GROUP "
        "and NORM of MODEL.RESNETS with the file, convert a file of another program with "
        "tools/convert_weights.py, or set backbone.allow_partial_loads = True."
    )


def _refuse_other_names(_module: nn.Module, keys: Any) -> None:
    for name in keys.unexpected_keys:
        if _BARE_BACKBONE.fullmatch(name):
            raise WeightsError(
                "none of the weights were loaded: they belong to a bare backbone, under names such "
                f"as {plain(name)} that this model does not have. Convert the file with "
                "tools/convert_weights.py; Detectron2 loads the result."
            )


def _all_norms_are_frozen(module: nn.Module) -> bool:
    parts = list(module.modules())
    trainable = any(isinstance(part, nn.modules.batchnorm._BatchNorm) for part in parts)
    return not trainable and any(isinstance(part, FrozenBatchNorm2d) for part in parts)
