"""Do ImageNet weights fit a config? Depth, template, side of the stride, norms and pixels."""

from __future__ import annotations

from dataclasses import dataclass

from detectron2.config import CfgNode

from resnext_det.errors import WeightsError
from resnext_det.modeling.template import Template
from resnext_det.pretrained.catalog import ENTRIES, Entry
from resnext_det.pretrained.convert import BackboneWeights
from resnext_det.pretrained.pixels import Pixels, folded

SCHEME = "resnext://"
_SAME_PIXEL = 0.01  # of 255: means are written with two or three decimals


@dataclass(frozen=True)
class Needs:
    """What weights ask of a config.

    Attributes:
        source: the file or the name of the weights, to be named.
        depth: layers.
        template: cardinality and width.
        pixels: what they take for an image; None where that is not known.
        fused: only FrozenBN takes their norms.
        stride_in_1x1: where they were trained with the stride; None where that is not known.
    """

    source: str
    depth: int
    template: Template
    pixels: Pixels | None
    fused: bool
    stride_in_1x1: bool | None

    @classmethod
    def of_weights(cls, weights: BackboneWeights) -> Needs:
        """Return what weights that were read ask for.

        Raises:
            WeightsError: they are of no depth that a config can describe.
        """
        if weights.depth is None:
            raise WeightsError(
                f"{weights.source} holds a ResNeXt of no known depth: its stages have blocks as "
                "none of 26, 50, 101, 152 and 200 layers has."
            )
        return cls(
            str(weights.source),
            weights.depth,
            weights.template,
            weights.pixels,
            weights.fused,
            weights.stride_in_1x1,
        )

    @classmethod
    def of_entry(cls, entry: Entry) -> Needs:
        """Return what a checkpoint of the catalog will ask for, once fetched and converted."""
        return cls(
            f"{SCHEME}{entry.name}",
            entry.depth,
            entry.template,
            folded(entry.pixels),
            entry.batch_norm == "fused",
            entry.stride == "1x1",
        )


def check_named_weights(cfg: CfgNode) -> None:
    """Refuse a config whose MODEL.WEIGHTS names a checkpoint of the catalog that does not fit it.

    Detectron2 itself would load what has the right shape, and train on with the rest random, or on
    other pixels. Names that the catalog does not have are left to the path manager.

    Args:
        cfg: any Detectron2 config.

    Raises:
        WeightsError: both values, and the override that mends it.
    """
    name = str(cfg.MODEL.WEIGHTS or "").removeprefix(SCHEME)
    if name != cfg.MODEL.WEIGHTS and name in ENTRIES:
        check_config(Needs.of_entry(ENTRIES[name]), cfg)


def check_config(needs: Needs, cfg: CfgNode) -> None:
    """Refuse a config that describes another network than weights are of, or feeds it otherwise.

    Args:
        needs: of the weights.
        cfg: any Detectron2 config.

    Raises:
        WeightsError: both values, and the override that mends it.
    """
    _refuse_other_network(needs, cfg)
    _refuse_other_stride(needs, cfg)
    _refuse_fused_norms(needs, cfg)
    _refuse_other_pixels(needs, cfg)


def _refuse_other_network(needs: Needs, cfg: CfgNode) -> None:
    wanted = cfg.MODEL.RESNETS.DEPTH, Template.from_cfg(cfg)
    if (needs.depth, needs.template) == wanted:
        return
    raise WeightsError(
        f"{needs.source} holds a ResNeXt-{needs.depth} {needs.template}, and the config describes "
        f"a ResNeXt-{wanted[0]} {wanted[1]}. Name other weights, or set MODEL.RESNETS.DEPTH "
        f"{needs.depth} MODEL.RESNETS.NUM_GROUPS {needs.template.cardinality} "
        f"MODEL.RESNETS.WIDTH_PER_GROUP {needs.template.width}."
    )


def _refuse_other_stride(needs: Needs, cfg: CfgNode) -> None:
    """Refuse a stride on the other side: such weights fit, load in silence, and detect worse."""
    given = cfg.MODEL.RESNETS.STRIDE_IN_1X1
    if needs.stride_in_1x1 is None or needs.stride_in_1x1 == given:
        return
    side = "1x1" if needs.stride_in_1x1 else "3x3"
    raise WeightsError(
        f"{needs.source} was trained with its stride in the {side} convolutions, and "
        f"MODEL.RESNETS.STRIDE_IN_1X1 is {given}. Set MODEL.RESNETS.STRIDE_IN_1X1 "
        f"{needs.stride_in_1x1}."
    )


def _refuse_fused_norms(needs: Needs, cfg: CfgNode) -> None:
    norm = cfg.MODEL.RESNETS.NORM
    if needs.fused and norm != "FrozenBN":
        raise WeightsError(
            f"{needs.source} has its batch norms folded into weight and bias, and "
            f"MODEL.RESNETS.NORM is {norm}: there are no statistics to go on with. "
            "Set MODEL.RESNETS.NORM FrozenBN, or take weights that kept theirs."
        )


def _refuse_other_pixels(needs: Needs, cfg: CfgNode) -> None:
    """Refuse a config that feeds the network other pixels than its weights take."""
    wanted, model = needs.pixels, cfg.MODEL
    if wanted is None:
        return
    given = Pixels(cfg.INPUT.FORMAT, 255, tuple(model.PIXEL_MEAN), tuple(model.PIXEL_STD))
    unlike = [
        one
        for one, two in zip((*wanted.mean, *wanted.std), (*given.mean, *given.std))
        if abs(one - two) > _SAME_PIXEL
    ]
    if unlike or given.order != wanted.order:
        raise WeightsError(
            f"{needs.source} takes images as {wanted}, and the config gives {given}. Set "
            f"INPUT.FORMAT {wanted.order} MODEL.PIXEL_MEAN {list(wanted.mean)} "
            f"MODEL.PIXEL_STD {list(wanted.std)}."
        )
