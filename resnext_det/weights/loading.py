"""Load weights into a model; refuse those that do not fit its config or fill only part of it."""

from __future__ import annotations

import re
from collections import defaultdict
from collections.abc import Iterable, Mapping
from pathlib import Path

import torch
from detectron2.checkpoint.c2_model_loading import align_and_update_state_dicts
from detectron2.config import CfgNode
from detectron2.modeling.backbone import ResNet
from detectron2.modeling.roi_heads import Res5ROIHeads
from detectron2.utils.file_io import PathManager
from torch import Tensor, nn

from resnext_det.errors import ResNeXtError, WeightsError, named, quoted
from resnext_det.modeling.forms import in_form_of
from resnext_det.modeling.template import Template
from resnext_det.weights.catalog import ENTRIES, SCHEME
from resnext_det.weights.converting import (
    BackboneWeights,
    backbone_of,
    naming,
    warn_if_untrained,
)
from resnext_det.weights.layouts import GROUPED, is_backbone
from resnext_det.weights.pixels import Pixels, folded
from resnext_det.weights.reading import read_checkpoint, read_tensors, without_prefix

_SAME_PIXEL = 0.01  # of 255: means are written with two or three decimals
_COUNTER = "num_batches_tracked"
_BLOCK = re.compile(r"(?:^|\.)res([2-5])\.([0-9]{1,4})\.")


def check_named_weights(cfg: CfgNode) -> None:
    """Refuse a config that does not fit the catalog entry its MODEL.WEIGHTS names.

    Detectron2 would load whatever has the right shape, and train with the rest random or with
    wrong pixels. Nothing is downloaded.

    Raises:
        WeightsError: names both values, and the override to use.
    """
    name = str(cfg.MODEL.WEIGHTS or "")
    entry = ENTRIES.get(name.removeprefix(SCHEME)) if name.startswith(SCHEME) else None
    if entry is not None:
        check_config(
            cfg,
            name,
            depth=entry.depth,
            template=entry.template,
            pixels=folded(entry.pixels),
            fused=entry.batch_norm == "fused",
            stride_in_1x1=entry.stride == "1x1",
        )


def check_config(
    cfg: CfgNode,
    source: object,
    *,
    depth: int | None,
    template: Template,
    pixels: Pixels | None,
    fused: bool,
    stride_in_1x1: bool | None,
) -> None:
    """Refuse a config that describes another network than the weights', or other pixels.

    Args:
        cfg: any Detectron2 config.
        source: of the weights, for messages.
        depth: of the weights; None, for an unknown one, fits no config.
        template: of the weights.
        pixels: the images that the weights expect; None if unknown.
        fused: whether their norms need FrozenBN.
        stride_in_1x1: where they were trained with the stride; None if unknown.

    Raises:
        WeightsError: names both values, and the override to use.
    """
    model, resnets = cfg.MODEL, cfg.MODEL.RESNETS
    wanted = Template.of(resnets.NUM_GROUPS, resnets.WIDTH_PER_GROUP)
    if (depth, template) != (resnets.DEPTH, wanted):
        raise WeightsError(
            f"{source} holds a ResNeXt-{depth or 'of unknown depth'} {template}, and the config "
            f"describes a ResNeXt-{resnets.DEPTH} {wanted}. Name other weights, or set "
            f"MODEL.RESNETS.DEPTH {depth} MODEL.RESNETS.NUM_GROUPS {template.cardinality} "
            f"MODEL.RESNETS.WIDTH_PER_GROUP {template.width}."
        )
    # Such weights would load without a warning, and detect worse.
    if stride_in_1x1 not in (None, resnets.STRIDE_IN_1X1):
        raise WeightsError(
            f"{source} was trained with its stride in the {'1x1' if stride_in_1x1 else '3x3'} "
            f"convolutions, and MODEL.RESNETS.STRIDE_IN_1X1 is {resnets.STRIDE_IN_1X1}. Set "
            f"MODEL.RESNETS.STRIDE_IN_1X1 {stride_in_1x1}."
        )
    if fused and resnets.NORM != "FrozenBN":
        raise WeightsError(
            f"{source} has its batch norms folded into weight and bias, and MODEL.RESNETS.NORM is "
            f"{resnets.NORM}, which needs statistics. Set MODEL.RESNETS.NORM FrozenBN, or use "
            "weights that kept theirs."
        )
    if pixels is None:
        return
    given = Pixels(cfg.INPUT.FORMAT, 255, tuple(model.PIXEL_MEAN), tuple(model.PIXEL_STD))
    pairs = zip((*pixels.mean, *pixels.std), (*given.mean, *given.std))
    if given.order != pixels.order or any(abs(one - two) > _SAME_PIXEL for one, two in pairs):
        raise WeightsError(
            f"{source} expects images as {pixels}, and the config gives {given}. Set INPUT.FORMAT "
            f"{pixels.order} MODEL.PIXEL_MEAN {list(pixels.mean)} "
            f"MODEL.PIXEL_STD {list(pixels.std)}."
        )


def weights_file(cfg: CfgNode) -> Path:
    """Return the local file of MODEL.WEIGHTS, downloaded if it is an address.

    Raises:
        WeightsError: it cannot be fetched.
    """
    try:
        return Path(PathManager.get_local_path(cfg.MODEL.WEIGHTS))
    except ResNeXtError:
        raise
    except Exception as error:  # each path handler raises its own
        raise WeightsError(
            f"MODEL.WEIGHTS {quoted(cfg.MODEL.WEIGHTS)} cannot be fetched: {quoted(error)}"
        ) from error


def load_weights(model: nn.Module, cfg: CfgNode, *, whole_detector: bool = False) -> str:
    """Load cfg.MODEL.WEIGHTS into a detector.

    Args:
        model: the detector, changed in place.
        cfg: its config.
        whole_detector: refuse weights of a bare backbone, as an evaluation must.

    Returns:
        A line for the log, such as "265/265 backbone tensors loaded from resnext50.pth (torchvision
        layout); 2 left out: fc.weight, fc.bias".

    Raises:
        WeightsError: the file cannot be read, does not fit the config, or leaves a tensor of the
            backbone (with `whole_detector`: of the detector) at its initial value.
    """
    path = cfg.MODEL.WEIGHTS
    if not path:
        return _without_weights(cfg, whole_detector)
    source = weights_file(cfg)
    checkpoint = read_checkpoint(source)
    if not is_backbone(checkpoint.tensors):
        return _load_detector(model, checkpoint.tensors, source, whole_detector)
    if whole_detector:
        raise WeightsError(
            f"MODEL.WEIGHTS {path} holds a bare backbone. To evaluate, name the weights of a whole "
            "detector, such as model_final.pth in the output folder of a training."
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


def load_backbone(model: nn.Module, weights: BackboneWeights, cfg: CfgNode) -> str:
    """Load a backbone's weights into a detector whose backbone is a Detectron2 ResNet.

    Args:
        model: the detector, changed in place; in a C4 detector res5 is part of the head.
        weights: from `read_backbone`.
        cfg: the detector's config.

    Returns:
        A line for the log, as from `load_weights`.

    Raises:
        WeightsError: the weights do not fit the config or the model. Nothing was loaded.
    """
    source = weights.source
    check_config(
        cfg,
        source,
        depth=weights.depth,
        template=weights.template,
        pixels=weights.pixels,
        fused=weights.fused,
        stride_in_1x1=weights.stride_in_1x1,
    )
    targets = _backbone_tensors(model)
    with naming(source):
        tensors = in_form_of(weights.tensors, targets)
    _check_norms(source, tensors, targets)
    wrong = [
        name
        for name, places in targets.items()
        if name not in tensors or any(tensors[name].shape != place.shape for place in places)
    ]
    if wrong:
        raise WeightsError(
            f"{source} lacks {len(wrong)} of {len(targets)} backbone tensors, or holds them in "
            f"another shape: {named(wrong)}. Nothing was loaded. Compare STEM_OUT_CHANNELS, "
            "RES2_OUT_CHANNELS and WIDTH_PER_GROUP of MODEL.RESNETS, and "
            "MODEL.RESNEXT.PRE_ACTIVATION."
        )
    with torch.no_grad():
        for name, places in targets.items():
            for place in places:
                place.copy_(tensors[name])
    unused = [*weights.left_out, *(name for name in tensors if name not in targets)]
    line = (
        f"{len(targets)}/{len(targets)} backbone tensors loaded from {source} "
        f"({weights.layout} layout); {len(unused)} left out"
    )
    if unused:
        line += f": {named(unused, 8)}"
    if weights.counters:
        line += f" (and {weights.counters} num_batches_tracked, which nothing reads)"
    if weights.pixels is None:
        line += "; the file does not say which pixels it expects: compare PIXEL_MEAN, PIXEL_STD"
    return line


def _backbone_tensors(model: nn.Module) -> dict[str, list[Tensor]]:
    """Return the tensors of all ResNets in a model by their names in a bare ResNet.

    There are several ResNets in a model with a teacher and a student.
    """
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
        if isinstance(module, Res5ROIHeads):  # C4: res5 is part of the head
            prefixes[f"{name}.res5."] = "res5."
    found: dict[str, list[Tensor]] = defaultdict(list)
    for name, tensor in model.state_dict(keep_vars=True).items():
        for prefix, replacement in prefixes.items():
            if name.startswith(prefix) and not name.endswith(_COUNTER):
                found[replacement + name.removeprefix(prefix)].append(tensor)
    return found


def _check_norms(source: Path, tensors: Iterable[str], targets: Iterable[str]) -> None:
    """Refuse norms of another kind than the model's: FrozenBN would invent what they lack."""
    held, wanted = (_norms(names) for names in (tensors, targets))
    if held != wanted:
        raise WeightsError(
            f"{source} has {held} in its backbone, and the model has {wanted}. Set "
            "MODEL.RESNETS.NORM to the norm the weights were trained with: FrozenBN, BN and "
            "SyncBN have running statistics, GN and LN have none."
        )


def _norms(names: Iterable[str]) -> str:
    inside = [name for name in names if ".norm." in name and _BLOCK.search(name)]
    if any(name.endswith("running_mean") for name in inside):
        return "norms with running statistics"
    return "norms without running statistics" if inside else "no norms"


def _load_detector(
    model: nn.Module, raw: Mapping[str, Tensor], source: Path, whole_detector: bool
) -> str:
    """Load a detector, or a backbone under names that Detectron2 can match."""
    with naming(source):
        # Names are compared in the grouped form, which other programs write.
        state = in_form_of(model.state_dict(), GROUPED)
        raw = in_form_of(raw, GROUPED)
    held, wanted = (
        {(match[1], match[2]) for name in names if (match := _BLOCK.search(name))}
        for names in (raw, state)
    )
    stages = {stage for stage, _ in wanted}
    if more := sorted(block for block in held - wanted if block[0] in stages):
        raise WeightsError(
            f"{source} has {len(more)} blocks that the model lacks, such as "
            f"res{more[0][0]}.{more[0][1]}: it has another depth than MODEL.RESNETS.DEPTH."
        )
    matched = {name: tensor for name, tensor in raw.items() if name in state}
    if not matched:
        aligned = align_and_update_state_dicts(state, dict(raw), c2_conversion=False)
        matched = {name: tensor for name, tensor in aligned.items() if name in state}
    elif held:
        _check_norms(source, raw, state)
    fitting = {name: t for name, t in matched.items() if t.shape == state[name].shape}
    absent = [name for name in state if name not in fitting and not name.endswith(_COUNTER)]
    backbone = [
        name
        for name in absent
        if name.startswith(("backbone.", "roi_heads.res5."))
        and not name.startswith(("backbone.fpn_", "backbone.top_block"))
    ]
    needed = absent if whole_detector else backbone
    if needed or not fitting:
        raise WeightsError(
            f"{source} leaves {len(needed) or len(state)} tensors of the model without weights: "
            f"{named(needed or state)}. They are missing in the file or have another shape; "
            "compare MODEL.RESNETS and NUM_CLASSES with the config the file was trained with. "
            "Nothing was loaded."
        )
    if wrong := [name for name, tensor in fitting.items() if not torch.isfinite(tensor).all()]:
        raise WeightsError(f"{source} holds NaN or infinite values in: {named(wrong)}")
    warn_if_untrained(source, fitting)
    model.load_state_dict(in_form_of(fitting, model.state_dict()), strict=False)
    total = sum(not name.endswith(_COUNTER) for name in state)
    line = f"{total - len(absent)}/{total} tensors of the detector loaded from {source}"
    if absent:
        line += (
            f"; {len(absent)} start random, as the file lacks them or holds another shape: "
            f"{named(absent, 8)}"
        )
    return line


def check_same_model(model: nn.Module, checkpoint: Path) -> None:
    """Refuse to resume from the checkpoint of another model.

    Detectron2's checkpointer warns of tensors that do not fit, and continues with random ones.

    Raises:
        WeightsError: tensors that are missing, left over, or of another shape.
    """
    held = {name: tuple(tensor.shape) for name, tensor in read_tensors(checkpoint).items()}
    state = without_prefix(model.state_dict())  # as `read_tensors` does
    wanted = {name: tuple(tensor.shape) for name, tensor in state.items()}
    other = sorted(name for name in {*held, *wanted} if held.get(name) != wanted.get(name))
    if other:
        first = other[0]
        raise WeightsError(
            f"{checkpoint} is the checkpoint of another model, and cannot be resumed: {len(other)} "
            f"tensors differ, the first being {first} (in the file {held.get(first, 'missing')}, "
            f"in the model {wanted.get(first, 'missing')}). Resume with the config it was started "
            "with, or start over with MODEL.WEIGHTS and another OUTPUT_DIR."
        )
