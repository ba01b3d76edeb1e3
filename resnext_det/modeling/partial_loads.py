"""A load that fills a backbone only in part is refused, in whatever program it happens.

`load_state_dict(strict=False)`, Detectron2's checkpointer above all, continue with random tensors
after a warning; FrozenBN makes up the statistics that a file lacks without one
(FrozenBatchNorm2d._load_from_state_dict).
"""

from __future__ import annotations

import logging
from collections.abc import Mapping
from typing import Any

import torch
from detectron2.layers import FrozenBatchNorm2d
from torch import Tensor, nn

from resnext_det.errors import WeightsError, named, plain
from resnext_det.modeling.forms import in_form_of
from resnext_det.weights.layouts import is_backbone

logger = logging.getLogger(__name__)

_COUNTER = "num_batches_tracked"
_CLASSIFIER = "linear."  # no part of a backbone, and of another size in every data set
_STATISTICS = (".norm.running_mean", ".norm.running_var")
_NOTHING = torch.empty(0)


def refuse_partial_loads(module: nn.Module) -> None:
    """Make a backbone, or a part of one, refuse a `load_state_dict` that fills it only in part.

    A state dict without a single tensor of the module is let through, since it may be that of
    another part of the model; unless it is a backbone's under names that the module does not have.
    Setting `module.allow_partial_loads = True` lets everything through.

    Args:
        module: has tensors named as in a Detectron2 ResNet, in any form.
    """
    module.register_load_state_dict_pre_hook(_refuse_part)  # type: ignore[no-untyped-call]
    module.register_load_state_dict_post_hook(_refuse_other_names)  # type: ignore[no-untyped-call]


def _refuse_part(module: nn.Module, state: Mapping[str, Tensor], prefix: str, *_rest: Any) -> None:
    """Compare a state dict with the module before it is loaded; torch calls this."""
    if getattr(module, "allow_partial_loads", False):
        return
    wanted = {
        name
        for name in module.state_dict()
        if not name.endswith(_COUNTER) and not name.startswith(_CLASSIFIER)
    }
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
    if _are_all_statistics(missing, wanted) and _has_frozen_norms_alone(module):
        logger.warning(
            "the weights that are loaded have no running statistics of batch norms (such as %s%s), "
            "and FrozenBN takes 0 and 1 for them. That is right for batch norms that were folded "
            "into weight and bias, as in Detectron's files, and wrong for all others.",
            prefix,
            missing[0],
        )
        return
    raise WeightsError(
        f"the weights that are loaded fill the backbone only in part: {len(missing)} of its "
        f"{len(wanted)} tensors are missing or have another shape, the first being "
        f"{named(prefix + name for name in missing)}; they would stay random. Compare "
        "DEPTH, NUM_GROUPS, WIDTH_PER_GROUP and NORM of MODEL.RESNETS with the file, and convert "
        "it with tools/convert_weights.py where it is of another program. Where a part is what "
        "you want, set allow_partial_loads = True on the backbone before loading."
    )


def _refuse_other_names(_module: nn.Module, keys: Any) -> None:
    """Look, after a load, at the names that found no place in the model; torch calls this."""
    if is_backbone(dict.fromkeys(keys.unexpected_keys, _NOTHING)):
        raise WeightsError(
            "none of the weights that are loaded arrived: they are a backbone's, under names such "
            f"as {plain(keys.unexpected_keys[0])}, and this model has others. Convert the file "
            "with tools/convert_weights.py, whose result Detectron2 loads."
        )


def _are_all_statistics(missing: list[str], wanted: set[str]) -> bool:
    """Tell whether what is missing is every statistic that there is, and nothing else."""
    return set(missing) == {name for name in wanted if name.endswith(_STATISTICS)}


def _has_frozen_norms_alone(module: nn.Module) -> bool:
    return not any(
        isinstance(part, nn.modules.batchnorm._BatchNorm) for part in module.modules()
    ) and any(isinstance(part, FrozenBatchNorm2d) for part in module.modules())
