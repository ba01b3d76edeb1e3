"""Convert a backbone of any layout into a file that Detectron2 loads."""

from __future__ import annotations

import contextlib
import logging
from collections.abc import Callable, Iterator, Mapping
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

from torch import Tensor

from resnext_det.errors import WeightsError, plain, quoted
from resnext_det.files import file_digest, written_beside
from resnext_det.modeling.forms import convert_form
from resnext_det.modeling.template import Template
from resnext_det.weights.catalog import Entry
from resnext_det.weights.checks import check_backbone, describe, doubts
from resnext_det.weights.layouts import CLASSIFIER, is_backbone, recognise
from resnext_det.weights.pixels import Pixels, fold
from resnext_det.weights.reading import Checkpoint, read_checkpoint, read_tensors, save_file

logger = logging.getLogger(__name__)

_COUNTER = "num_batches_tracked"


@dataclass(frozen=True)
class Record:
    """Where converted weights came from, and what they need; None for what is unknown.

    Attributes:
        source: the name of the file that was converted first.
        sha256: of that file.
        layout: of that file.
        depth: layers, such as 50.
        template: such as "32x4d".
        pixels: the images that the converted weights expect.
        fused: the norms need FrozenBN, as their statistics are folded into weight and bias.
        stride_in_1x1: as in MODEL.RESNETS.
        name: in the catalog, such as "resnext50_32x4d.tv_in1k".
        licence: of the weights.
        top1: published accuracy on ImageNet-1K in per cent.
        top5: likewise.
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

    @classmethod
    def of(cls, content: Any) -> Record | None:
        """Read the record in a file; raise a WeightsError if it is malformed."""
        if content is None:
            return None
        try:
            fields: dict[str, Any] = dict(content)
            read: dict[str, Any] = {
                name: None if fields[name] is None else kind(fields[name])
                for name, kind in _FIELDS.items()
            }
            return cls(**read)
        except (KeyError, TypeError, ValueError, OverflowError) as error:
            raise WeightsError(
                f"its record of its source cannot be read ({quoted(error)}); convert it again"
            ) from error


def _text(value: Any) -> str:
    return plain(str(value))


def _pixels(content: Any) -> Pixels:
    mean, std = (tuple(float(value) for value in content[key]) for key in ("mean", "std"))
    return Pixels(str(content["order"]), float(content["range"]), mean, std)  # type: ignore[arg-type]


_FIELDS: dict[str, Callable[[Any], Any]] = {
    **dict.fromkeys(("source", "sha256", "layout", "template", "name", "licence"), _text),
    **dict.fromkeys(("fused", "stride_in_1x1"), bool),
    **dict.fromkeys(("top1", "top5"), float),
    **{"depth": int, "pixels": _pixels},
}


@dataclass(frozen=True)
class BackboneWeights:
    """The weights of a backbone under Detectron2's names, for BGR images from 0 to 255.

    Attributes:
        source: the file they came from.
        layout: such as "torchvision" or "Detectron2".
        tensors: by name, such as "res2.0.conv2.weight"; blocks in the grouped form.
        left_out: names in the source that do not belong to a backbone, such as the classifier's.
        counters: the number of num_batches_tracked that were dropped, as nothing reads them.
        depth: layers; None if no known depth has these blocks.
        template: cardinality and width.
        pixels: the images they expect, after folding; None if unknown.
        fused: the norms need FrozenBN, as their statistics are folded into weight and bias.
        stride_in_1x1: as in MODEL.RESNETS; None if unknown.
        record: of a file that was converted before; else None.
    """

    source: Path
    layout: str
    tensors: Mapping[str, Tensor]
    left_out: tuple[str, ...]
    counters: int
    depth: int | None
    template: Template
    pixels: Pixels | None = None
    fused: bool = False
    stride_in_1x1: bool | None = None
    record: Record | None = None

    def __str__(self) -> str:
        return f"ResNeXt-{'of unknown depth' if self.depth is None else self.depth} {self.template}"


@contextlib.contextmanager
def naming(source: Path) -> Iterator[None]:
    """Put the name of the file before the message of a WeightsError."""
    try:
        yield
    except WeightsError as error:
        raise WeightsError(f"{quoted(source)}: {str(error).rstrip('.')}.") from error


def holds_backbone(source: Path) -> bool:
    """Return whether a file holds a bare backbone and not a detector."""
    return is_backbone(read_tensors(source))


def read_backbone(source: Path, pixels: Pixels | None = None) -> BackboneWeights:
    """Read a backbone in any known layout, check it, and fold its pixels into the stem.

    Args:
        source: a checkpoint in one of the layouts of `layouts.py`.
        pixels: the images that the source expects, if unusual for its layout.

    Raises:
        WeightsError: another layout, tensors missing or unknown, or impossible values.
    """
    return backbone_of(source, read_checkpoint(source), pixels)


def backbone_of(
    source: Path, checkpoint: Checkpoint, pixels: Pixels | None = None
) -> BackboneWeights:
    """Return the backbone in a file that was already read; see `read_backbone`."""
    with naming(source):
        found = recognise(checkpoint.tensors)
        record = Record.of(checkpoint.record)
        kept = {
            name: tensor
            for name, tensor in found.tensors.items()
            if not name.startswith(CLASSIFIER) and not name.endswith(_COUNTER)
        }
        check_backbone(kept)
        depth, template = describe(kept)
        folded = pixels or found.pixels
        if record is None and folded is not None:
            kept["stem.conv1.weight"], folded = fold(kept["stem.conv1.weight"], folded)
    warn_if_untrained(source, kept)
    return BackboneWeights(
        source=source,
        layout=found.layout,
        tensors=kept,
        left_out=found.left_out,
        counters=sum(name.endswith(_COUNTER) for name in found.tensors),
        depth=depth,
        template=template,
        pixels=record.pixels if record else folded,
        fused=record.fused if record else found.fused,
        stride_in_1x1=record.stride_in_1x1 if record else found.stride_in_1x1,
        record=record,
    )


def warn_if_untrained(source: Path, tensors: Mapping[str, Tensor]) -> None:
    """Log a warning if the values in a file cannot be those of a trained network."""
    if (doubt := doubts(tensors)) is not None:
        logger.warning(
            "%s does not look like a trained network: %s. Check that it is the right file.",
            quoted(source),
            doubt,
        )


def write_detectron2(
    weights: BackboneWeights,
    output: Path,
    form: str = "grouped",
    published: Entry | None = None,
) -> None:
    """Write a backbone as a .pth that stock Detectron2 loads into FPN and C4 detectors.

    Args:
        weights: from `read_backbone`.
        output: the file to write.
        form: of the blocks; stock Detectron2 has only the grouped one.
        published: the source's entry in the catalog, whose licence and accuracy are recorded.

    Raises:
        ConfigError: there is no such form.
        WeightsError: the weights have no statistics or an unknown depth, or the output is the
            source, does not end in .pth, or cannot be written.
    """
    if not any(name.endswith("running_mean") for name in weights.tensors):
        raise WeightsError(
            f"{weights.source} has norms without running statistics (GN, LN, or incomplete batch "
            "norms), which Detectron2 would silently fill with 0 and 1. Load the file itself: "
            "MODEL.WEIGHTS FILE, with the MODEL.RESNETS.NORM it was trained with."
        )
    if weights.depth is None:
        raise WeightsError(f"{weights.source} holds a {weights}, which no config can describe.")
    record = weights.record
    if record is None:
        accuracy = published.accuracy if published else None
        record = Record(
            source=weights.source.name,
            sha256=file_digest(weights.source),
            layout=weights.layout,
            depth=weights.depth,
            template=str(weights.template),
            pixels=weights.pixels,
            fused=weights.fused,
            stride_in_1x1=weights.stride_in_1x1,
            name=published.name if published else None,
            licence=published.licence if published else None,
            top1=accuracy.top1 if accuracy else None,
            top5=accuracy.top5 if accuracy else None,
        )
    author = f"resnext_det, from {record.source} ({record.layout} layout)"
    # res5 is backbone.bottom_up.res5 with FPN and roi_heads.res5 in C4: Detectron2 finds it.
    extra = {"matching_heuristics": True, "resnext_det": asdict(record)}
    _write(weights.source, weights.tensors, form, output, author, extra)


def convert_detector(source: Path, output: Path, form: str) -> int:
    """Write the weights of a detector, and nothing else, with its blocks in another form.

    Returns:
        The number of tensors.

    Raises:
        ConfigError: there is no such form.
        WeightsError: a file cannot be read, has no ResNeXt blocks, or cannot be written.
    """
    return _write(source, read_tensors(source), form, output, f"resnext_det, from {source.name}")


def _write(
    source: Path,
    tensors: Mapping[str, Tensor],
    form: str,
    output: Path,
    author: str,
    extra: Mapping[str, Any] | None = None,
) -> int:
    if output.suffix != ".pth":
        raise WeightsError(f"{quoted(output)} must end in .pth, as PyTorch's files do.")
    if output.exists() and source.exists() and output.samefile(source):
        raise WeightsError(f"{quoted(output)} is the source: name another output.")
    with naming(source):
        converted = convert_form(tensors, form)
    # Copies, as a slice would be saved with the whole tensor it belongs to.
    copies = {name: tensor.clone() for name, tensor in converted.items()}
    with written_beside(output, WeightsError, durable=True) as beside:
        save_file({"model": copies, "__author__": author, **(extra or {})}, beside)
    return len(copies)
