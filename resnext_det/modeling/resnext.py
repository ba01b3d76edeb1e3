"""The ResNeXt backbone, a Detectron2 ResNet with the paper's template, and its stages."""

from __future__ import annotations

from collections.abc import Sequence
from importlib.util import find_spec
from typing import Any, NoReturn

import torch
from detectron2.layers import CNNBlockBase, get_norm
from detectron2.modeling.backbone.resnet import BasicStem, DeformBottleneckBlock, ResNet
from torch import nn

from resnext_det.errors import ConfigError, quoted
from resnext_det.modeling.activation_checkpointing import CheckpointedStage
from resnext_det.modeling.blocks import Norm, NoShortcut, block_class, last_norm
from resnext_det.modeling.forms import load_any_form
from resnext_det.modeling.partial_loads import refuse_partial_loads
from resnext_det.modeling.preactivation import PreactivationBlock
from resnext_det.modeling.template import Template, blocks_per_stage

STAGES = ("res2", "res3", "res4", "res5")
FEATURES = ("stem", *STAGES)


class ResNeXt(ResNet):
    """ResNeXt (arXiv 1611.05431) with Detectron2's parameter names.

    A Detectron2 `ResNet` whose 3x3 convolutions have `template.cardinality` groups; unlike the
    stock one, it also has depths 26 and 200. Cardinality 1 and width 64 is ResNet.

    Shapes: an input of (N, in_channels, H, W) gives {name: (N, channels, H / stride, W / stride)}
    for the names in `out_features`; see `output_shape()`.
    """

    def __init__(
        self,
        depth: int = 50,
        template: str | Template = "32x4d",
        *,
        in_channels: int = 3,
        stem_out_channels: int = 64,
        res2_out_channels: int = 256,
        norm: Norm = "FrozenBN",
        stride_in_1x1: bool = False,
        res5_dilation: int = 1,
        deform_on_per_stage: Sequence[bool] = (False, False, False, False),
        deform_modulated: bool = False,
        deform_num_groups: int = 1,
        num_classes: int | None = None,
        out_features: Sequence[str] | None = None,
        freeze_at: int = 0,
        form: str = "grouped",
        pre_activation: bool = False,
        zero_init_residual: bool = False,
        shortcuts: bool = True,
        checkpoint_stages: Sequence[str] = (),
    ) -> None:
        """Build the network.

        Args:
            depth: 26, 50, 101, 152 or 200 layers.
            template: cardinality and width, such as "32x4d".
            in_channels: channels of the image.
            stem_out_channels: channels of the stem (Table 1: 64).
            res2_out_channels: output channels of res2, doubled in each stage (Table 1: 256).
            norm: any norm of `detectron2.layers.get_norm`, for every convolution.
            stride_in_1x1: stride 2 in the first 1x1 convolution instead of the 3x3, where
                published ResNeXts have it (section 4).
            res5_dilation: 2 dilates res5 and keeps its stride at 16 (DC5).
            deform_on_per_stage: which of res2 to res5 have deformable 3x3 convolutions.
            deform_modulated: modulated deformable convolutions (DCNv2).
            deform_num_groups: groups of the deformable offsets.
            num_classes: adds a classifier, called "linear", with this many classes.
            out_features: which of "stem", "res2" to "res5" and "linear" to return; the last layer
                by default. Without a classifier, later stages are not built.
            freeze_at: 0 freezes nothing, 1 the stem, 2 the stem and res2, up to 5. Frozen parts
                have no gradients, and their batch norms become FrozenBN.
            form: "grouped", "concatenated" or "aggregated" (Fig. 3 c, b, a): one function,
                computed in three ways.
            pre_activation: norm and ReLU before each convolution, as in the paper's ResNet-200.
            zero_init_residual: start the last norm of every block at 0 instead of 1, so that
                blocks begin as their shortcuts (1706.02677, section 5.1).
            shortcuts: False for the paper's ablation without them.
            checkpoint_stages: which of "res2" to "res5" keep few activations in training and
                recompute the others: less memory, the same gradients.

        Raises:
            ConfigError: a value outside its range.
        """
        features = FEATURES if num_classes is None else (*FEATURES, "linear")
        if out_features is not None and not (out_features and _all_among(out_features, features)):
            _refuse("RESNETS.OUT_FEATURES", out_features, f"one or more of {', '.join(features)}")
        if not _all_among(checkpoint_stages, STAGES):
            _refuse("RESNEXT.CHECKPOINT_STAGES", checkpoint_stages, f"some of {', '.join(STAGES)}")
        if freeze_at not in range(6):
            _refuse("BACKBONE.FREEZE_AT", freeze_at, "0 to 5")
        if res5_dilation not in (1, 2):
            _refuse("RESNETS.RES5_DILATION", res5_dilation, "1 or 2")
        if len(deform_on_per_stage) != 4:
            _refuse("RESNETS.DEFORM_ON_PER_STAGE", deform_on_per_stage, "four values, for res2-5")
        if stem_out_channels < 1:
            _refuse("RESNETS.STEM_OUT_CHANNELS", stem_out_channels, "1 or more")
        check_norm(norm, (stem_out_channels,))
        if zero_init_residual and freeze_at >= 2:
            raise ConfigError(
                "MODEL.RESNEXT.ZERO_INIT_RESIDUAL is True, and MODEL.BACKBONE.FREEZE_AT is "
                f"{freeze_at}: frozen blocks would stay at 0. Set FREEZE_AT 0 or 1 to train from "
                "scratch, or ZERO_INIT_RESIDUAL False."
            )
        stem = BasicStem(in_channels=in_channels, out_channels=stem_out_channels, norm=norm)
        deform = {"deform_modulated": deform_modulated, "deform_num_groups": deform_num_groups}
        stages = [
            make_stage(
                name,
                depth,
                template,
                in_channels=stem_out_channels if name == "res2" else None,
                res2_out_channels=res2_out_channels,
                form=form,
                pre_activation=pre_activation,
                norm=norm,
                stride_in_1x1=stride_in_1x1,
                dilation=res5_dilation if name == "res5" else 1,
                deformable=deform if deformable else None,
                zero_init_residual=zero_init_residual,
                shortcuts=shortcuts,
            )
            for name, deformable in zip(STAGES, deform_on_per_stage)
        ]
        super().__init__(  # type: ignore[no-untyped-call]
            stem, stages, num_classes, out_features if num_classes is None else None
        )
        for number, name in enumerate(self.stage_names):
            if name in checkpoint_stages:
                self.stages[number] = CheckpointedStage(*self.stages[number])
                setattr(self, name, self.stages[number])
        self.freeze(freeze_at)  # type: ignore[no-untyped-call]
        if num_classes is not None and out_features is not None:
            # Detectron2 would drop the stages after the last feature, which the classifier needs.
            self._out_features = list(out_features)
        refuse_partial_loads(self)
        self.depth = depth
        self.template = Template(str(template))
        self.form = form


def make_stage(
    name: str,
    depth: int = 50,
    template: str | Template = "32x4d",
    *,
    in_channels: int | None = None,
    res2_out_channels: int = 256,
    form: str = "grouped",
    pre_activation: bool = False,
    norm: Norm = "FrozenBN",
    stride_in_1x1: bool = False,
    dilation: int = 1,
    deformable: dict[str, Any] | None = None,
    zero_init_residual: bool = False,
    shortcuts: bool = True,
    checkpointed: bool = False,
) -> nn.Sequential:
    """Build one of the stages res2 to res5; arguments that `ResNeXt` has too mean the same.

    Args:
        name: "res2", "res3", "res4" or "res5".
        depth: of the whole network.
        template: cardinality and width.
        in_channels: by default those that the stage before puts out (the stem: 64).
        res2_out_channels: output channels of res2.
        form: of the blocks.
        pre_activation: norm and ReLU before each convolution; res5 ends with them.
        norm: for every convolution.
        stride_in_1x1: whether the stride is in the first 1x1 convolution.
        dilation: of the 3x3 convolutions; a dilated stage has stride 1 (DC5).
        deformable: arguments for `DeformBottleneckBlock`, to build the stage from these.
        zero_init_residual: start the last norm of every block at 0.
        shortcuts: whether the blocks have any.
        checkpointed: keep few activations, and recompute the others in backward.

    Returns:
        The blocks. Stride 1 for res2 and dilated stages, else 2; res2_out_channels, doubled in
        each stage after res2.

    Raises:
        ConfigError: a value outside its range.
    """
    if name not in STAGES:
        raise ConfigError(f"stage {quoted(name)} is not one of {', '.join(STAGES)}.")
    template = Template(str(template))
    number = STAGES.index(name) + 2
    count = blocks_per_stage(depth)[number - 2]
    stride = 1 if number == 2 or dilation > 1 else 2
    if res2_out_channels < 1:
        _refuse("RESNETS.RES2_OUT_CHANNELS", res2_out_channels, "1 or more")
    out_channels = res2_out_channels << (number - 2)
    check_norm(norm, (template.bottleneck_channels(number), out_channels))
    if not shortcuts and zero_init_residual:
        raise ConfigError(
            "MODEL.RESNEXT.SHORTCUTS and ZERO_INIT_RESIDUAL contradict each other: blocks without "
            "shortcuts that start at 0 put out nothing. Set ZERO_INIT_RESIDUAL False."
        )
    if pre_activation and (form != "grouped" or deformable or zero_init_residual):
        raise ConfigError(
            "MODEL.RESNEXT.PRE_ACTIVATION is True, which needs MODEL.RESNEXT.FORM grouped, "
            "ZERO_INIT_RESIDUAL False and no deformable stage in "
            "MODEL.RESNETS.DEFORM_ON_PER_STAGE."
        )
    block = block_class(form)
    more: dict[str, Any] = deformable or {}
    if deformable is not None:
        _check_deformable(name, form)
        block = DeformBottleneckBlock
    if pre_activation:
        block = PreactivationBlock
        places = range(count)
        more["takes_activated_per_block"] = [number == 2 and place == 0 for place in places]
        more["is_last_per_block"] = [number == 5 and place == count - 1 for place in places]
    if in_channels is None:
        in_channels = 64 if number == 2 else out_channels // 2
    blocks: list[CNNBlockBase] = ResNet.make_stage(
        block,
        count,
        stride_per_block=[stride] + [1] * (count - 1),
        in_channels=in_channels,
        out_channels=out_channels,
        bottleneck_channels=template.bottleneck_channels(number),
        num_groups=template.cardinality,
        norm=norm,
        stride_in_1x1=stride_in_1x1,
        dilation=dilation,
        **more,
    )
    for each in blocks:
        if not shortcuts:
            each.shortcut = NoShortcut()
        each.register_load_state_dict_pre_hook(load_any_form)
        if zero_init_residual:
            _start_at_zero(each, norm)
    return CheckpointedStage(*blocks) if checkpointed else nn.Sequential(*blocks)


def _check_deformable(stage: str, form: str) -> None:
    if find_spec("detectron2._C") is None:
        raise ConfigError(
            f"MODEL.RESNETS.DEFORM_ON_PER_STAGE names {stage}, and this Detectron2 lacks its "
            "compiled part, which deformable convolutions need. Build Detectron2 from source "
            "(make setup DETECTRON2=source), or set it False."
        )
    if form != "grouped":
        raise ConfigError(
            f"MODEL.RESNEXT.FORM is {form}, and MODEL.RESNETS.DEFORM_ON_PER_STAGE names "
            f"{stage}: deformable convolutions exist only in the grouped form."
        )


def _start_at_zero(block: CNNBlockBase, norm: Norm) -> None:
    weight = getattr(last_norm(block), "weight", None)
    if not isinstance(weight, nn.Parameter):
        raise ConfigError(
            f"MODEL.RESNEXT.ZERO_INIT_RESIDUAL is True, and MODEL.RESNETS.NORM is {norm!r}, which "
            "has no trainable weight, so blocks would stay at 0. Choose BN, SyncBN, GN or LN, or "
            "set ZERO_INIT_RESIDUAL False."
        )
    nn.init.zeros_(weight)


def check_norm(norm: Norm, channels: Sequence[int], key: str = "MODEL.RESNETS.NORM") -> None:
    """Refuse a norm that Detectron2 lacks or that cannot normalise these numbers of channels.

    Raises:
        ConfigError: it names the config key.
    """
    if callable(norm):
        return
    for width in sorted(set(channels)):
        try:
            with torch.device("meta"):
                get_norm(norm, width)
        except (KeyError, TypeError) as error:
            raise ConfigError(
                f"{key} is {quoted(norm)}; it must be one of Detectron2's norms: FrozenBN (the "
                "paper's fine-tuning), BN, SyncBN, nnSyncBN, naiveSyncBN, naiveSyncBN_N, GN, LN, "
                "or '' for none."
            ) from error
        except ValueError as error:
            raise ConfigError(
                f"{key} is {norm}, and it cannot normalise {width} channels: {error}. "
                "Detectron2's GN has 32 groups: choose widths that are multiples of 32, as those "
                "of 32x4d are, or another norm."
            ) from error


def _all_among(names: Sequence[str], allowed: Sequence[str]) -> bool:
    return not isinstance(names, str) and all(name in allowed for name in names)


def _refuse(key: str, value: object, allowed: str) -> NoReturn:
    raise ConfigError(f"MODEL.{key} is {quoted(value)}; it must be {allowed}.")
