"""One stage of a ResNeXt, in any form and with any norm: for the backbone and for the C4 head."""

from __future__ import annotations

from collections.abc import Sequence
from importlib.util import find_spec
from typing import Any

import torch
from detectron2.layers import CNNBlockBase, get_norm
from detectron2.modeling.backbone.resnet import DeformBottleneckBlock, ResNet
from torch import nn

from resnext_det.errors import ConfigError, quoted
from resnext_det.modeling.blocks import Norm, block_class, last_norm
from resnext_det.modeling.checkpointing import CheckpointedStage
from resnext_det.modeling.forms import load_any_form
from resnext_det.modeling.template import Template, blocks_per_stage

STAGES = ("res2", "res3", "res4", "res5")

# The config key of each argument, to be named in errors.
_KEYS = {
    "depth": "MODEL.RESNETS.DEPTH",
    "template": "the template",
    "in_channels": "the number of input channels",
    "stem_out_channels": "MODEL.RESNETS.STEM_OUT_CHANNELS",
    "res2_out_channels": "MODEL.RESNETS.RES2_OUT_CHANNELS",
    "norm": "MODEL.RESNETS.NORM",
    "res5_dilation": "MODEL.RESNETS.RES5_DILATION",
    "deform_on_per_stage": "MODEL.RESNETS.DEFORM_ON_PER_STAGE",
    "out_features": "MODEL.RESNETS.OUT_FEATURES",
    "freeze_at": "MODEL.BACKBONE.FREEZE_AT",
    "form": "MODEL.RESNEXT.FORM",
    "in_features": "MODEL.FPN.IN_FEATURES",
    "out_channels": "MODEL.FPN.OUT_CHANNELS",
}
_POSITIVE = ("in_channels", "stem_out_channels", "res2_out_channels", "out_channels")
_WHOLE = (*_POSITIVE, "depth", "res5_dilation", "freeze_at")
_LISTS = ("deform_on_per_stage", "out_features", "in_features")


def make_stage(
    name: str,
    depth: int = 50,
    template: str | Template = "32x4d",
    *,
    in_channels: int | None = None,
    res2_out_channels: int = 256,
    form: str = "grouped",
    norm: Norm = "FrozenBN",
    stride_in_1x1: bool = False,
    dilation: int = 1,
    deformable: dict[str, Any] | None = None,
    zero_init_residual: bool = False,
    checkpointed: bool = False,
) -> nn.Sequential:
    """Build one of the stages res2 to res5.

    Args:
        name: "res2", "res3", "res4" or "res5".
        depth: layers of the whole network, which tells how many blocks the stage has.
        template: cardinality and width, such as "32x4d".
        in_channels: of the stage's input; by default those of the stage before it (the stem: 64).
        res2_out_channels: output channels of res2, doubled with each stage (Table 1: 256).
        form: "grouped", "concatenated" or "aggregated" (Fig. 3 c, b, a).
        norm: any norm of `detectron2.layers.get_norm`, for every convolution.
        stride_in_1x1: stride 2 in the first 1x1 instead of the 3x3 convolution.
        dilation: of the 3x3 convolutions; a dilated stage has stride 1 (DC5).
        deformable: arguments of `DeformBottleneckBlock`, to build the stage of these.
        zero_init_residual: start the last norm of every block at 0 (Goyal et al., 1706.02677,
            section 5.1), so that the blocks begin as their shortcuts.
        checkpointed: keep only the inputs of the blocks, and compute the rest twice.

    Returns:
        The blocks; (N, in_channels, H, W) to (N, out_channels, H / stride, W / stride), where
        out_channels is res2_out_channels doubled per stage, and stride 1 in res2 and when dilated,
        else 2.

    Raises:
        ConfigError: a value outside its range.
    """
    if name not in STAGES:
        raise ConfigError(f"there is no stage {name!r}; there are {', '.join(STAGES)}.")
    template = Template(template) if isinstance(template, str) else template
    number = STAGES.index(name) + 2
    count = blocks_per_stage(depth)[number - 2]
    stride = 1 if number == 2 or dilation > 1 else 2
    out_channels = res2_out_channels << (number - 2)
    check_norm(norm, (template.bottleneck_channels(number), out_channels))
    if deformable is not None:
        check_deformable([True] * 4)
    if deformable is not None and form != "grouped":
        raise ConfigError(
            f"MODEL.RESNEXT.FORM is {form}, and MODEL.RESNETS.DEFORM_ON_PER_STAGE names {name}: "
            "deformable convolutions exist in the grouped form only."
        )
    if in_channels is None:
        in_channels = 64 if number == 2 else out_channels // 2
    blocks: list[CNNBlockBase] = ResNet.make_stage(
        block_class(form) if deformable is None else DeformBottleneckBlock,
        count,
        stride_per_block=[stride] + [1] * (count - 1),
        in_channels=in_channels,
        out_channels=out_channels,
        bottleneck_channels=template.bottleneck_channels(number),
        num_groups=template.cardinality,
        norm=norm,
        stride_in_1x1=stride_in_1x1,
        dilation=dilation,
        **(deformable or {}),
    )
    for block in blocks:
        block.register_load_state_dict_pre_hook(load_any_form)
    if zero_init_residual:
        _zero_init_residual(blocks, norm)
    return CheckpointedStage(*blocks) if checkpointed else nn.Sequential(*blocks)


def _zero_init_residual(blocks: Sequence[CNNBlockBase], norm: Norm) -> None:
    for block in blocks:
        weight = getattr(last_norm(block), "weight", None)
        if not isinstance(weight, nn.Parameter):
            raise ConfigError(
                "MODEL.RESNEXT.ZERO_INIT_RESIDUAL is True, and MODEL.RESNETS.NORM is "
                f"{norm!r}, which has no weight that is trained, so the blocks would stay at 0 for "
                "ever. Choose BN, SyncBN, GN or LN, or set ZERO_INIT_RESIDUAL False."
            )
        nn.init.zeros_(weight)


def freeze(stage: nn.Sequential) -> None:
    """Freeze a stage: no gradients, and batch norms become FrozenBN."""
    for block in stage.children():
        assert isinstance(block, CNNBlockBase)
        block.freeze()


def check_norm(norm: Norm, channels: Sequence[int], key: str = "MODEL.RESNETS.NORM") -> None:
    """Refuse a norm that Detectron2 does not have, or that cannot normalise so many channels.

    Args:
        norm: what `detectron2.layers.get_norm` takes; only a name is checked.
        channels: each number of channels that is to be normalised.
        key: the config key to name.

    Raises:
        ConfigError: the norm's name, what is wrong and what is allowed.
    """
    if not isinstance(norm, str):
        return
    for width in sorted(set(channels)):
        try:
            with torch.device("meta"):
                get_norm(norm, width)
        except KeyError as error:
            raise ConfigError(
                f"{key} is {norm!r}; Detectron2 has FrozenBN (the paper's fine-tuning), BN, "
                "SyncBN, nnSyncBN, naiveSyncBN, naiveSyncBN_N, GN, LN, and '' for none."
            ) from error
        except ValueError as error:
            raise ConfigError(
                f"{key} is {norm}, and it cannot normalise {width} channels: {error}. "
                "Detectron2's GN has 32 groups, which must divide every number of channels: choose "
                "another norm, or widths that are multiples of 32 (of ResNeXt templates, 32x4d)."
            ) from error


def check_types(**arguments: object) -> None:
    """Refuse arguments of the wrong type; their ranges are checked where they are used.

    Args:
        arguments: by the names that `ResNeXt` gives them.

    Raises:
        ConfigError: the config key, the value, and what it must be.
    """
    for name, value in arguments.items():
        wanted = _wrong(name, value)
        if wanted:
            raise ConfigError(f"{_KEYS[name]} is {quoted(value)}; it must be {wanted}.")


def _wrong(name: str, value: object) -> str | None:
    """Return what an argument must be, where it is not that."""
    whole = isinstance(value, int) and not isinstance(value, bool)
    if name in _POSITIVE:
        return None if whole and int(str(value)) > 0 else "a whole number of 1 or more"
    if name in _WHOLE:
        return None if whole else "a whole number"
    if name in _LISTS:
        listed = isinstance(value, Sequence) and not isinstance(value, str)
        return None if listed or (value is None and name == "out_features") else "a list"
    if name == "template":
        return None if isinstance(value, str | Template) else 'written as "32x4d"'
    if name == "form":
        return None if isinstance(value, str) else "a name, such as grouped"
    return None if value is None or isinstance(value, str) or callable(value) else "a name"


def check_deformable(deform_on_per_stage: Sequence[bool]) -> None:
    """Refuse deformable convolutions where Detectron2 lacks them.

    Raises:
        ConfigError: not four values, or a Detectron2 without its compiled part.
    """
    if len(deform_on_per_stage) != 4:
        raise ConfigError(
            f"MODEL.RESNETS.DEFORM_ON_PER_STAGE is {list(deform_on_per_stage)}; it must hold four "
            "values, for res2 to res5."
        )
    if any(deform_on_per_stage) and find_spec("detectron2._C") is None:
        raise ConfigError(
            f"MODEL.RESNETS.DEFORM_ON_PER_STAGE is {list(deform_on_per_stage)}, and this "
            "Detectron2 was installed without its compiled part, which deformable convolutions "
            "need. Build Detectron2 from source (make setup DETECTRON2=source), or set it False."
        )


def check_zero_init(zero_init_residual: bool, frozen: bool) -> None:
    """Refuse blocks that start at 0 and are frozen there.

    Raises:
        ConfigError: both are asked for.
    """
    if zero_init_residual and frozen:
        raise ConfigError(
            "MODEL.RESNEXT.ZERO_INIT_RESIDUAL is True, and MODEL.BACKBONE.FREEZE_AT freezes "
            "blocks, which would stay at 0 for ever. It is for training from scratch: set "
            "FREEZE_AT 0 or 1, or ZERO_INIT_RESIDUAL False."
        )


def check_checkpoint_stages(names: Sequence[str]) -> None:
    """Refuse names that are no stage.

    Raises:
        ConfigError: the names, and those that are allowed.
    """
    listed = isinstance(names, Sequence) and not isinstance(names, str)
    if not listed or any(name not in STAGES for name in names):
        raise ConfigError(
            f"MODEL.RESNEXT.CHECKPOINT_STAGES is {names!r}; it must be a list of names among "
            f"{', '.join(STAGES)}."
        )
