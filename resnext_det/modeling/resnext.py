"""The ResNeXt backbone: a Detectron2 ResNet with the paper's template."""

from __future__ import annotations

from collections.abc import Sequence

from detectron2.modeling.backbone.resnet import BasicStem, ResNet

from resnext_det.errors import ConfigError
from resnext_det.modeling.blocks import Norm, block_class
from resnext_det.modeling.checkpointing import CheckpointedStage
from resnext_det.modeling.partial_loads import refuse_partial_loads
from resnext_det.modeling.stages import (
    STAGES,
    check_checkpoint_stages,
    check_deformable,
    check_norm,
    check_types,
    check_zero_init,
    make_stage,
)
from resnext_det.modeling.template import Template

FEATURES = ("stem", *STAGES)


class ResNeXt(ResNet):
    """ResNeXt (arXiv 1611.05431) with Detectron2's parameter names.

    A Detectron2 `ResNet` whose 3x3 convolutions have `template.cardinality` groups and, unlike a
    stock one, depth 26 or 200 as well. At cardinality 1 and width 64 it is ResNet.

    Shapes: an input of (N, in_channels, H, W) gives {name: (N, channels, H / stride, W / stride)}
    for the names in `out_features`; `output_shape()` tells channels and strides.
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
        zero_init_residual: bool = False,
        checkpoint_stages: Sequence[str] = (),
    ) -> None:
        """Build the network.

        Args:
            depth: 26, 50, 101, 152 or 200 layers.
            template: cardinality and width, such as "32x4d".
            in_channels: channels of the input image.
            stem_out_channels: channels of the stem (Table 1: 64).
            res2_out_channels: output channels of res2, doubled with each stage (Table 1: 256).
            norm: any norm of `detectron2.layers.get_norm`, for every convolution.
            stride_in_1x1: stride 2 in the first 1x1 instead of the 3x3 convolution. Published
                ResNeXts have it in the 3x3 (paper, section 4).
            res5_dilation: 2 dilates res5 and leaves its stride at 16 (DC5).
            deform_on_per_stage: which of res2 to res5 have deformable 3x3 convolutions.
            deform_modulated: modulated deformable convolutions (DCNv2).
            deform_num_groups: groups of the deformable offsets.
            num_classes: adds a classifier, called "linear", with this many classes.
            out_features: what to return, of "stem", "res2" to "res5" and "linear"; by default the
                last layer. Without a
                classifier, stages past the last one named are not built.
            freeze_at: 0 freezes nothing, 1 the stem, 2 the stem and res2, up to 5.
                What is frozen has no gradients, and its batch norms become FrozenBN.
            form: "grouped", "concatenated" or "aggregated": one function, three ways to compute it
                (Fig. 3 c, b, a). `forms.convert_form` converts weights between them.
            zero_init_residual: start the last norm of every block at 0 (Goyal et al., 1706.02677,
                section 5.1); by default at 1, as in the paper.
            checkpoint_stages: which of "res2" to "res5" keep only the inputs of their blocks in
                training, and compute the rest twice: less memory, the same gradients.

        Raises:
            ConfigError: a value outside its range.
        """
        check_types(
            depth=depth,
            template=template,
            in_channels=in_channels,
            stem_out_channels=stem_out_channels,
            res2_out_channels=res2_out_channels,
            norm=norm,
            res5_dilation=res5_dilation,
            deform_on_per_stage=deform_on_per_stage,
            out_features=out_features,
            freeze_at=freeze_at,
            form=form,
        )
        template = Template(template) if isinstance(template, str) else template
        _check(freeze_at, res5_dilation, out_features, num_classes)
        block_class(form)
        check_deformable(deform_on_per_stage)
        check_checkpoint_stages(checkpoint_stages)
        check_zero_init(zero_init_residual, frozen=freeze_at >= 2)
        check_norm(norm, (stem_out_channels,))
        deform = {"deform_modulated": deform_modulated, "deform_num_groups": deform_num_groups}
        stem = BasicStem(in_channels=in_channels, out_channels=stem_out_channels, norm=norm)
        stages = [
            make_stage(
                name,
                depth,
                template,
                in_channels=stem_out_channels if name == "res2" else None,
                res2_out_channels=res2_out_channels,
                form=form,
                norm=norm,
                stride_in_1x1=stride_in_1x1,
                dilation=res5_dilation if name == "res5" else 1,
                deformable=deform if deformable else None,
                zero_init_residual=zero_init_residual,
            )
            for name, deformable in zip(STAGES, deform_on_per_stage)
        ]
        features = None if out_features is None else list(out_features)
        super().__init__(  # type: ignore[no-untyped-call]
            stem, stages, num_classes, features if num_classes is None else None
        )
        for number, name in enumerate(self.stage_names):
            if name in checkpoint_stages:
                self.stages[number] = CheckpointedStage(*self.stages[number])
                setattr(self, name, self.stages[number])
        self.freeze(freeze_at)  # type: ignore[no-untyped-call]
        if num_classes is not None and features is not None:
            # Detectron2 drops the stages past the last one named, and with them the classifier's.
            self._out_features = features
        refuse_partial_loads(self)
        self.depth = depth
        self.template = template
        self.form = form


def _check(
    freeze_at: int,
    res5_dilation: int,
    out_features: Sequence[str] | None,
    num_classes: int | None,
) -> None:
    if freeze_at not in range(6):
        raise ConfigError(f"MODEL.BACKBONE.FREEZE_AT is {freeze_at!r}; it must be 0 to 5.")
    if res5_dilation not in (1, 2):
        raise ConfigError(f"MODEL.RESNETS.RES5_DILATION is {res5_dilation!r}; it must be 1 or 2.")
    allowed = FEATURES if num_classes is None else (*FEATURES, "linear")
    if out_features is None:
        return
    unknown = [name for name in out_features if name not in allowed]
    if unknown or not out_features:
        raise ConfigError(
            f"MODEL.RESNETS.OUT_FEATURES is {list(out_features)}; it must name one or more of "
            f"{', '.join(allowed)}."
        )
