"""Read ImageNet weights, rename and check them, write them with a record of their origin."""

from __future__ import annotations

import logging
from collections.abc import Callable, Iterable, Mapping
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any, TypeVar

import torch

from resnext_det.errors import WeightsError, plain, quoted
from resnext_det.files import file_digest, written_beside
from resnext_det.modeling.forms import convert_form, in_form_of
from resnext_det.modeling.template import Template
from resnext_det.weights.catalog import Entry
from resnext_det.weights.checks import check_backbone, describe, doubts
from resnext_det.weights.layouts import CLASSIFIER, is_backbone, recognise
from resnext_det.weights.pixels import Pixels, fold
from resnext_det.weights.reading import Checkpoint, read_checkpoint, read_tensors

logger = logging.getLogger(__name__)

T = TypeVar("T")


@dataclass(frozen=True)
class Record:
    """Where converted weights came from, and what they ask for.

    Attributes:
        source: the name of the file that was converted first.
        sha256: its digest.
        layout: its layout.
        depth: layers, such as 50.
        template: such as "32x4d".
        pixels: what the converted weights take for an image; None where that is not known.
        fused: batch norms hold weight and bias alone; only FrozenBN takes them.
        stride_in_1x1: where the source had its stride; None where that is not known.
        name: in the catalog, such as "resnext50_32x4d.tv_in1k"; None for a file that is not in it.
        licence: of the weights; None where it is not known.
        top1: published accuracy on ImageNet-1K in percent; None if there is none.
        top5: the same, of the five best.
    """

    source: str
    sha256: str
    layout: str
    depth: int
    template: str
    pixels: Pixels | None
    fused: bool
    stride_in_1x1: bool | None
    name: str | None = None
    licence: str | None = None
    top1: float | None = None
    top5: float | None = None

    def plain(self) -> dict[str, Any]:
        """Return it in plain containers, as a file holds it."""
        return asdict(self)

    @classmethod
    def of(cls, content: Any) -> Record | None:
        """Read what a file holds; None where it holds nothing.

        Raises:
            WeightsError: it holds something else.
        """
        if content is None:
            return None
        try:
            fields: Mapping[str, Any] = dict(content)
            words = {
                key: plain(str(fields[key])) for key in ("source", "sha256", "layout", "template")
            }
            return cls(
                **words,
                depth=int(fields["depth"]),
                pixels=_pixels(fields["pixels"]),
                fused=bool(fields["fused"]),
                stride_in_1x1=_unless_none(bool, fields["stride_in_1x1"]),
                name=_unless_none(plain, fields["name"]),
                licence=_unless_none(plain, fields["licence"]),
                top1=_unless_none(float, fields["top1"]),
                top5=_unless_none(float, fields["top5"]),
            )
        except (KeyError, TypeError, ValueError, OverflowError) as error:
            raise WeightsError(
                f"its record of where it came from cannot be read ({quoted(error)}); "
                "convert it again."
            ) from error


def _unless_none(kind: Callable[[Any], T], value: Any) -> T | None:
    return None if value is None else kind(value)


def _pixels(content: Any) -> Pixels | None:
    if content is None:
        return None
    return Pixels(
        str(content["order"]),
        float(content["range"]),
        tuple(float(value) for value in content["mean"]),  # type: ignore[arg-type]
        tuple(float(value) for value in content["std"]),  # type: ignore[arg-type]
    )


_COUNTER = "num_batches_tracked"


@dataclass(frozen=True)
class BackboneWeights:
    """The weights of a backbone under Detectron2's names, for BGR images of 0 to 255.

    Attributes:
        source: the file they came from.
        layout: such as "torchvision" or "Detectron2".
        tensors: by name, such as "res2.0.conv2.weight"; blocks are in the grouped form.
        left_out: names in the source that no detector's backbone has: the classifier.
        counters: how many num_batches_tracked were left out; nothing reads them.
        depth: layers, or None where the blocks are those of no known depth.
        template: cardinality and width.
        pixels: what they take for an image, after folding; None where that is not known.
        fused: the source's batch norms were folded into weight and bias, which only FrozenBN takes.
        stride_in_1x1: where the source had its stride; None where that is not known.
        record: what a file that was converted before says of where it came from; else None.
    """

    source: Path
    layout: str
    tensors: Mapping[str, torch.Tensor]
    left_out: tuple[str, ...]
    counters: int
    depth: int | None
    template: Template
    pixels: Pixels | None = None
    fused: bool = False
    stride_in_1x1: bool | None = None
    record: Record | None = None

    def __str__(self) -> str:
        depth = "of unknown depth" if self.depth is None else str(self.depth)
        return f"ResNeXt-{depth} {self.template}"


def in_form(
    source: Path, tensors: Mapping[str, torch.Tensor], like: Iterable[str]
) -> dict[str, torch.Tensor]:
    """Give the weights of a file the form of other names, such as those of a model.

    Raises:
        WeightsError: blocks that are not whole; the message names the file.
    """
    try:
        return in_form_of(tensors, like)
    except WeightsError as error:
        raise WeightsError(f"{source}: {error}") from error


def warn_of_untrained(source: Path, tensors: Mapping[str, torch.Tensor]) -> None:
    """Log a warning if the numbers in a file cannot be those of a trained network."""
    if (doubt := doubts(tensors)) is not None:
        logger.warning(
            "%s does not look like a trained network: %s. Compare it with the file it should be.",
            quoted(source),
            doubt,
        )


def holds_backbone(source: Path) -> bool:
    """Tell whether a file holds a bare backbone in a layout that is known, and not a detector.

    Raises:
        WeightsError: the file cannot be read.
    """
    return is_backbone(read_tensors(source))


def read_backbone(source: Path, pixels: Pixels | None = None) -> BackboneWeights:
    """Read the weights of a backbone, in any layout that is known, with every check there is.

    The convention of the source's pixels is folded into the first convolution (`pixels.fold`).

    Args:
        source: a checkpoint in one of the layouts of `sources.py`.
        pixels: what the source takes for an image, where it is not what its layout usually does.

    Returns:
        The weights, each norm complete and every value finite.

    Raises:
        WeightsError: another layout, tensors missing or unknown, or values that are not finite.
    """
    return backbone_of(source, read_checkpoint(source), pixels)


def backbone_of(
    source: Path, checkpoint: Checkpoint, pixels: Pixels | None = None
) -> BackboneWeights:
    """Do what `read_backbone` does, with a file that was read before.

    Args:
        source: the file, to be named.
        checkpoint: what `read_checkpoint` gave.
        pixels: as for `read_backbone`.

    Raises:
        WeightsError: as `read_backbone`.
    """
    try:
        found = recognise(checkpoint.tensors)
        record = Record.of(checkpoint.record)
    except WeightsError as error:
        raise WeightsError(f"{source}: {error}") from error
    kept = {
        name: tensor
        for name, tensor in found.tensors.items()
        if not name.startswith(CLASSIFIER) and not name.endswith(_COUNTER)
    }
    check_backbone(source, kept)
    warn_of_untrained(source, kept)
    if record is not None:
        taken, fused, stride_in_1x1 = record.pixels, record.fused, record.stride_in_1x1
    else:
        taken = pixels or found.pixels
        if taken is not None:
            kept["stem.conv1.weight"], taken = fold(kept["stem.conv1.weight"], taken)
        fused, stride_in_1x1 = found.fused, found.stride_in_1x1
    depth, template = describe(kept)
    counters = sum(name.endswith(_COUNTER) for name in found.tensors)
    return BackboneWeights(
        source=source,
        layout=found.layout,
        tensors=kept,
        left_out=found.left_out,
        counters=counters,
        depth=depth,
        template=template,
        pixels=taken,
        fused=fused,
        stride_in_1x1=stride_in_1x1,
        record=record,
    )


def write_detectron2(
    weights: BackboneWeights,
    output: Path,
    form: str = "grouped",
    published: Entry | None = None,
) -> None:
    """Write a backbone as a .pth that stock Detectron2 loads into FPN and C4 detectors.

    Args:
        weights: what `read_backbone` gave.
        output: the file to write; it is written beside and then renamed.
        form: of the blocks; stock Detectron2 has the grouped one.
        published: the source's entry in the catalog, whose licence and accuracy are recorded.

    Raises:
        ConfigError: there is no such form.
        WeightsError: the name does not end in .pth, or the file cannot be written.
    """
    if not any(name.endswith("running_mean") for name in weights.tensors):
        raise WeightsError(
            f"{weights.source} has norms without running statistics (GN, LN, or batch norms that "
            "lost theirs), which Detectron2 would fill with 0 and 1 in silence where batch norms "
            "are wanted. Load the file itself: MODEL.WEIGHTS FILE, with the MODEL.RESNETS.NORM it "
            "was trained with."
        )
    if weights.depth is None:
        raise WeightsError(
            f"{weights.source} holds a ResNeXt of no known depth, which no config can describe."
        )
    _refuse_to_overwrite(weights.source, output)
    tensors = _converted(weights.source, weights.tensors, form)
    record = weights.record or _record(weights, weights.depth, published)
    author = f"resnext_det, from {record.source} ({record.layout} layout)"
    # res5 is backbone.bottom_up.res5 under FPN and roi_heads.res5 in C4: Detectron2 finds it.
    _write(tensors, output, author, matching_heuristics=True, resnext_det=record.plain())


def _refuse_to_overwrite(source: Path, output: Path) -> None:
    if output.exists() and source.exists() and output.samefile(source):
        raise WeightsError(f"{quoted(output)} is the file that is converted: name another output.")


def _record(weights: BackboneWeights, depth: int, published: Entry | None) -> Record:
    accuracy = published.accuracy if published else None
    return Record(
        source=weights.source.name,
        sha256=file_digest(weights.source),
        layout=weights.layout,
        depth=depth,
        template=str(weights.template),
        pixels=weights.pixels,
        fused=weights.fused,
        stride_in_1x1=weights.stride_in_1x1,
        name=published.name if published else None,
        licence=published.licence if published else None,
        top1=accuracy.top1 if accuracy else None,
        top5=accuracy.top5 if accuracy else None,
    )


def convert_detector(source: Path, output: Path, form: str) -> int:
    """Write the weights of a whole detector with its blocks in another form.

    Args:
        source: a checkpoint of a detector under Detectron2's names.
        output: the .pth to write; it is written beside and then renamed.
        form: "grouped", "concatenated" or "aggregated".

    Returns:
        How many tensors were written. What else the source holds, such as the state of an
        optimizer, is left out.

    Raises:
        ConfigError: there is no such form.
        WeightsError: a file that cannot be read, has no ResNeXt blocks, or cannot be written.
    """
    _refuse_to_overwrite(source, output)
    converted = _converted(source, read_tensors(source), form)
    _write(converted, output, f"resnext_det, from {source.name}")
    return len(converted)


def _converted(
    source: Path, tensors: Mapping[str, torch.Tensor], form: str
) -> dict[str, torch.Tensor]:
    try:
        return convert_form(tensors, form)
    except WeightsError as error:
        raise WeightsError(f"{source}: {error}") from error


def _write(tensors: Mapping[str, torch.Tensor], output: Path, author: str, **more: object) -> None:
    if output.suffix != ".pth":
        raise WeightsError(f"{quoted(output)} must end in .pth, as PyTorch's files do.")
    # Copies, as a part of a larger tensor would be saved with all of it.
    copies = {name: tensor.clone() for name, tensor in tensors.items()}
    content = {"model": copies, "__author__": author, **more}
    with written_beside(output, WeightsError) as beside, beside.open("wb") as stream:
        torch.save(content, stream)
