"""What a checkpoint says about the run that wrote it."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from detectron2.config import CfgNode

from resnext_det.checkpoints.reading import iteration_of, read_outline
from resnext_det.checkpoints.writing import RUN
from resnext_det.environment import versions
from resnext_det.errors import WeightsError


@dataclass(frozen=True)
class Run:
    """The run that a checkpoint is of.

    Attributes:
        config: as yaml text; "" where it was not given.
        class_names: in the order of the model's outputs; empty where they were not given.
        versions: of Python and the packages, by name.
        iteration: that the checkpoint was written after, counted from 0; None for weights alone.
        best: the best value so far of the metric TEST.BEST.METRIC, where there was one.
        provenance: what else the run told of itself.
    """

    config: str
    class_names: tuple[str, ...]
    versions: Mapping[str, str]
    iteration: int | None
    best: float | None
    provenance: Mapping[str, Any]


def run_record(
    config: CfgNode | None, class_names: Sequence[str], provenance: Mapping[str, Any]
) -> dict[str, Any]:
    """Return what a checkpoint says about its run, in plain containers; `read_run` reads it.

    Args:
        config: the run's.
        class_names: in the order of the model's outputs.
        provenance: what else it shall say; a number under "best" is the best value so far.
    """
    return {
        "config": "" if config is None else config.dump(),
        "class_names": [str(name) for name in class_names],
        "versions": versions(),
        "provenance": dict(provenance),
    }


def read_run(file: Path) -> Run | None:
    """Read what a checkpoint says about its run; its tensors are passed over.

    Args:
        file: a checkpoint of this package, or of another program.

    Returns:
        What it says; None where it says nothing, as files of other programs do.

    Raises:
        WeightsError: the file is missing or damaged, holds more than data, or says what cannot be.
    """
    if file.is_file() and not _is_archive(file):
        return None  # such as Detectron2's .pkl: checkpoints of this package are archives
    content = read_outline(file)
    record = content.get(RUN)
    if record is None:
        return None
    try:
        provenance = _mapping(record["provenance"])
        best = provenance.get("best")
        names = record["class_names"]
        if not isinstance(names, list):
            raise TypeError("class_names is no list")
        return Run(
            config=str(record["config"]),
            class_names=tuple(str(name) for name in names),
            versions={str(name): str(one) for name, one in _mapping(record["versions"]).items()},
            iteration=iteration_of(content),
            best=None if best is None else float(best),
            provenance=provenance,
        )
    except (KeyError, TypeError, ValueError) as error:
        raise WeightsError(
            f"{file}: what it says about its run cannot be read ({type(error).__name__}: {error})."
        ) from error


def _is_archive(file: Path) -> bool:
    """Tell by the first bytes, as those of an archive that was cut short are still there."""
    with file.open("rb") as stream:
        start = stream.read(2)
    return start in (b"PK", b"")  # an empty file is a damaged one, of whatever kind


def _mapping(value: object) -> Mapping[str, Any]:
    if not isinstance(value, Mapping):
        raise TypeError(f"a {type(value).__name__} where names and values belong")
    return value
