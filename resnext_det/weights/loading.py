"""Weights into a model: do they fit its config, and did all of them arrive?"""

from __future__ import annotations

import logging
import re
from collections import defaultdict
from collections.abc import Iterable, Mapping
from dataclasses import dataclass
from pathlib import Path

import torch
from detectron2.checkpoint.c2_model_loading import align_and_update_state_dicts
from detectron2.config import CfgNode
from detectron2.modeling.backbone import ResNet
from detectron2.modeling.roi_heads import Res5ROIHeads
from detectron2.utils.file_io import PathManager
from torch import nn

from resnext_det.errors import WeightsError, named, quoted
from resnext_det.modeling.template import Template
from resnext_det.weights.catalog import ENTRIES, Entry
from resnext_det.weights.converting import (
    BackboneWeights,
    backbone_of,
    in_form,
    warn_of_untrained,
)
from resnext_det.weights.layouts import GROUPED, is_backbone
from resnext_det.weights.pixels import Pixels, folded
from resnext_det.weights.reading import read_checkpoint, read_tensors, without_prefix

logger = logging.getLogger(__name__)

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
        WeightsError: it names both values, and the override to use.
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
        WeightsError: it names both values, and the override to use.
    """
    _refuse_other_network(needs, cfg)
    _refuse_other_stride(needs, cfg)
    _refuse_fused_norms(needs, cfg)
    _refuse_other_pixels(needs, cfg)


def _refuse_other_network(needs: Needs, cfg: CfgNode) -> None:
    resnets = cfg.MODEL.RESNETS
    wanted = resnets.DEPTH, Template.of(resnets.NUM_GROUPS, resnets.WIDTH_PER_GROUP)
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


_COUNTER = "num_batches_tracked"
_BLOCK = re.compile(r"(?:^|\.)res([2-5])\.([0-9]{1,4})\.")


def load_weights(model: nn.Module, cfg: CfgNode, *, whole_detector: bool = False) -> str:
    """Load cfg.MODEL.WEIGHTS into a detector, and say in one line what came and what did not.

    Args:
        model: the detector, changed in place.
        cfg: its config.
        whole_detector: refuse weights of a backbone alone, as an evaluation must.

    Returns:
        The line, such as "265/265 backbone tensors loaded from resnext50.pth (torchvision layout);
        2 left out: fc.weight, fc.bias".

    Raises:
        WeightsError: the file cannot be read, does not fit the config, or leaves a tensor of the
            backbone (of the detector, with `whole_detector`) as it was initialised.
    """
    path = cfg.MODEL.WEIGHTS
    if not path:
        return _without_weights(cfg, whole_detector)
    try:
        source = Path(PathManager.get_local_path(path))
    except Exception as error:  # each kind of address has errors of its own
        raise WeightsError(
            f"MODEL.WEIGHTS {quoted(path)} cannot be fetched: {quoted(error)}"
        ) from error
    checkpoint = read_checkpoint(source)
    if not is_backbone(checkpoint.tensors):
        return _load_detector(model, checkpoint.tensors, source, whole_detector)
    if whole_detector:
        raise WeightsError(
            f"MODEL.WEIGHTS {path} holds a backbone alone. To evaluate, name the weights of a "
            "whole detector, such as model_final.pth of a training's output folder."
        )
    return load_backbone(model, backbone_of(source, checkpoint), cfg)


def _without_weights(cfg: CfgNode, whole_detector: bool) -> str:
    if whole_detector:
        raise WeightsError(
            "MODEL.WEIGHTS is empty: name the weights of the detector to evaluate, such as "
            "MODEL.WEIGHTS output/model_final.pth."
        )
    line = "no weights loaded: MODEL.WEIGHTS is empty, so every tensor starts random"
    if cfg.MODEL.RESNETS.NORM == "FrozenBN":
        line += (
            ", and MODEL.RESNETS.NORM FrozenBN on random weights normalises nothing: "
            "to train from scratch choose BN, SyncBN or GN, and MODEL.BACKBONE.FREEZE_AT 0"
        )
    return line


def check_same_model(model: nn.Module, checkpoint: Path) -> None:
    """Refuse to resume from the checkpoint of another model.

    Detectron2's checkpointer warns of tensors that do not fit, and continues with random ones.

    Args:
        model: the model to resume.
        checkpoint: what it would go on from.

    Raises:
        WeightsError: tensors that are missing, left over, or of another shape.
    """
    held = {name: tuple(tensor.shape) for name, tensor in read_tensors(checkpoint).items()}
    state = without_prefix(model.state_dict())  # as it is taken off in reading
    wanted = {name: tuple(tensor.shape) for name, tensor in state.items()}
    other = sorted(name for name in {*held, *wanted} if held.get(name) != wanted.get(name))
    if other:
        first = other[0]
        raise WeightsError(
            f"{checkpoint} is the checkpoint of another model, and cannot be resumed: {len(other)} "
            f"tensors differ, the first being {first} (in the file {held.get(first, 'missing')}, "
            f"in the model {wanted.get(first, 'missing')}). Resume with the config it was started "
            "with, or start anew with MODEL.WEIGHTS and another OUTPUT_DIR."
        )


def load_backbone(model: nn.Module, weights: BackboneWeights, cfg: CfgNode) -> str:
    """Load a backbone's weights into a detector whose backbone is a Detectron2 ResNet.

    Args:
        model: the detector, changed in place; in a C4 detector res5 sits in the head.
        weights: what `read_backbone` gave.
        cfg: the detector's config, for the message when they do not fit.

    Returns:
        One line on what was loaded and what was left out.

    Raises:
        WeightsError: another depth, template or norm, or tensors that are missing.
    """
    check_config(Needs.of_weights(weights), cfg)
    targets = _backbone_tensors(model)
    tensors = in_form(weights.source, weights.tensors, targets)
    _refuse_other_norms(weights.source, tensors, targets)
    missing = [name for name in targets if name not in tensors]
    if missing:
        raise WeightsError(
            f"{weights.source} lacks {len(missing)} of {len(targets)} backbone tensors: "
            f"{named(missing)}. Nothing was loaded."
        )
    _refuse_other_shapes(weights.source, tensors, targets)
    with torch.no_grad():
        for name, places in targets.items():
            for place in places:
                place.copy_(tensors[name])
    unused = [*weights.left_out, *(name for name in tensors if name not in targets)]
    line = (
        f"{len(targets)}/{len(targets)} backbone tensors loaded from {weights.source} "
        f"({weights.layout} layout); {len(unused)} left out"
    )
    if unused:
        line += f": {named(unused, 8)}"
    if weights.counters:
        line += f" (and {weights.counters} num_batches_tracked, which nothing reads)"
    if weights.pixels is None:
        line += "; the file does not say what it takes for an image: compare PIXEL_MEAN, PIXEL_STD"
    return line


def _refuse_other_norms(
    source: Path, tensors: Mapping[str, object], targets: Iterable[str]
) -> None:
    """Refuse norms of another kind: of GN and BN, one has tensors that the other lacks."""
    wanted = set(targets)
    for name in tensors:
        conv, found, kind = name.partition(".norm.")
        if found and kind != _COUNTER and name not in wanted and f"{conv}.weight" in wanted:
            raise _other_norm(source, f"has {name}")
    lacking = [name for name in wanted if name.endswith(".norm.running_mean")]
    if any(name in tensors for name in lacking):
        return
    for name in sorted(lacking):
        if name.replace("running_mean", "weight") in tensors:
            raise _other_norm(source, f"lacks {name}")


def _other_norm(source: Path, what: str) -> WeightsError:
    return WeightsError(
        f"{source} {what}, and the norm there is of another kind in the model. Set "
        "MODEL.RESNETS.NORM to the kind that the weights were trained with: FrozenBN, BN "
        "and SyncBN have running statistics, GN and LN have none."
    )


def _refuse_unknown_blocks(
    source: Path, tensors: Mapping[str, object], state: Mapping[str, object]
) -> None:
    """Refuse a deeper network's weights: the blocks too many would be left out in silence."""
    held, wanted = _blocks(tensors), _blocks(state)
    stages = {stage for stage, _ in wanted}
    over = sorted(block for block in held - wanted if block[0] in stages)
    if over:
        stage, number = over[0]
        raise WeightsError(
            f"{source} has blocks that the model lacks, {len(over)} of them, the first being "
            f"res{stage}.{number}: it is of another depth than MODEL.RESNETS.DEPTH says."
        )


def _blocks(names: Iterable[str]) -> set[tuple[int, int]]:
    matches = (_BLOCK.search(name) for name in names)
    return {(int(match[1]), int(match[2])) for match in matches if match is not None}


def _refuse_other_shapes(
    source: Path, tensors: Mapping[str, torch.Tensor], targets: Mapping[str, list[torch.Tensor]]
) -> None:
    wrong = [
        f"{name} is {tuple(tensors[name].shape)} in the file and {tuple(target.shape)} here"
        for name, places in targets.items()
        for target in places
        if tensors[name].shape != target.shape
    ]
    if wrong:
        raise WeightsError(
            f"{source}: {len(wrong)} tensors have another shape: {'; '.join(wrong[:3])}. "
            "Compare STEM_OUT_CHANNELS, RES2_OUT_CHANNELS and WIDTH_PER_GROUP of MODEL.RESNETS."
        )


def _backbone_tensors(model: nn.Module) -> dict[str, list[torch.Tensor]]:
    """Return the tensors of a model's ResNets by the names they have in a ResNet alone.

    There may be several of a name: a teacher's and a student's.
    """
    state = model.state_dict(keep_vars=True)
    prefixes = {
        f"{name}." if name else "": ""
        for name, module in model.named_modules()
        if isinstance(module, ResNet)
    }
    if not prefixes:
        raise WeightsError(
            "this model has no Detectron2 ResNet or ResNeXt to load weights into; set "
            "MODEL.BACKBONE.NAME to one of this package's backbones."
        )
    for name, module in model.named_modules():
        if isinstance(module, Res5ROIHeads):  # C4: res5 is in the head
            prefixes[f"{name}.res5."] = "res5."
    found: dict[str, list[torch.Tensor]] = defaultdict(list)
    for name, tensor in state.items():
        for prefix, replacement in prefixes.items():
            if name.startswith(prefix) and not name.endswith(_COUNTER):
                found[replacement + name.removeprefix(prefix)].append(tensor)
    return found


def _load_detector(
    model: nn.Module, raw: Mapping[str, torch.Tensor], source: Path, whole_detector: bool
) -> str:
    """Load a detector, or a backbone under names that Detectron2 knows how to match."""
    # Names are compared in the grouped form, the one that other programs write.
    state = in_form(source, model.state_dict(), GROUPED)
    raw = in_form(source, raw, GROUPED)
    _refuse_unknown_blocks(source, raw, state)
    matched = {name: tensor for name, tensor in raw.items() if name in state}
    if not matched:
        caffe2 = any("branch2a" in name for name in raw)
        aligned = align_and_update_state_dicts(state, dict(raw), c2_conversion=caffe2)
        matched = {name: tensor for name, tensor in aligned.items() if name in state}
    _refuse_other_norms(source, {n: t for n, t in raw.items() if n not in state}, state)
    fitting = {name: t for name, t in matched.items() if t.shape == state[name].shape}
    absent = [name for name in state if name not in fitting and not name.endswith(_COUNTER)]
    backbone = [name for name in absent if name.startswith(("backbone.", "roi_heads.res5."))]
    pyramid = ("backbone.fpn_", "backbone.top_block")
    needed = absent if whole_detector else [n for n in backbone if not n.startswith(pyramid)]
    if needed or not fitting:
        raise WeightsError(
            f"{source} leaves {len(needed) or len(state)} tensors of the model without weights: "
            f"{named(needed or state)}. Either they are missing in the file or "
            "they have another shape there; compare MODEL.RESNETS and NUM_CLASSES of the config "
            "with those the file was trained with. Nothing was loaded."
        )
    wrong = [name for name, tensor in fitting.items() if not torch.isfinite(tensor).all()]
    if wrong:
        raise WeightsError(f"{source} holds NaN or infinite values in: {named(wrong)}")
    warn_of_untrained(source, fitting)
    model.load_state_dict(in_form(source, fitting, model.state_dict()), strict=False)
    total = sum(not name.endswith(_COUNTER) for name in state)
    line = f"{total - len(absent)}/{total} tensors of the detector loaded from {source}"
    if absent:
        line += (
            f"; {len(absent)} start random, as the file lacks them or holds another shape: "
            f"{named(absent, 8)}"
        )
    return line
