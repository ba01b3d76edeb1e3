"""Which checkpoint a run's figures are of, and which weights its training began with."""

from __future__ import annotations

import re
import urllib.parse
from dataclasses import dataclass
from pathlib import Path

from resnext_det.checkpoints.folder import checkpoints
from resnext_det.checkpoints.run import Run, read_run
from resnext_det.checkpoints.writing import checksum_file
from resnext_det.errors import ConfigError, WeightsError
from resnext_det.files import file_digest
from resnext_det.pretrained.catalog import ENTRIES, of_file
from resnext_det.pretrained.catalog_entry import Entry
from resnext_det.pretrained.fit import SCHEME
from resnext_det.pretrained.readers import read_checkpoint
from resnext_det.pretrained.record import Record
from resnext_det.pretrained.sources import is_backbone
from resnext_det.zoo_page.shipped import changes, config_of

_LAST = "model_final.pth"
_LONGEST_NAME = 100


@dataclass(frozen=True)
class Evaluated:
    """The checkpoint that a run's figures are of.

    Attributes:
        file: in the run's folder.
        sha256: of it, as the file beside it has it too.
        began_with: MODEL.WEIGHTS of the training that wrote it.
    """

    file: Path
    sha256: str
    began_with: str


def evaluated_checkpoint(
    run: Path, weights: str, output: str, config: str, iterations: int
) -> Evaluated:
    """Return the checkpoint that figures are of, which must be the run's own and its last.

    Args:
        run: the run's folder; it may have been moved since.
        weights: that were evaluated, as metrics.json has them: a file, or "OUTPUT_DIR, iteration
            N" of an evaluation within the training.
        output: OUTPUT_DIR of the training.
        config: name of the shipped config that the run is one of.
        iterations: of the whole training.

    Raises:
        DatasetError: the config in the checkpoint is none.
        WeightsError: they are of another checkpoint, it is not as it was written, or it does not
            say that such a training wrote it as its last.
    """
    within = weights == f"{output}, iteration {iterations}"
    file = checkpoints(run).get(_LAST if within else Path(weights).name)
    advice = (
        f"Evaluate the run: tools/train_net.py --config-file {config} --eval-only MODEL.WEIGHTS "
        f"{run / _LAST} OUTPUT_DIR {run}."
    )
    if file is None or not (within or _is_same(weights, output, file)):
        raise WeightsError(
            f"{run / 'metrics.json'} is of the weights {weights!r}, which are no checkpoint of "
            f"{run}. {advice}"
        )
    sha256 = _verified(file)
    record = read_run(file)
    if record is None or record.iteration != iterations - 1:
        raise WeightsError(
            f"{run / 'metrics.json'} is of {file.name}, which is not what the training wrote after "
            f"its last iteration, {iterations:,}. {advice}"
        )
    return Evaluated(file, sha256, _began_with(record, config, file))


def _is_same(weights: str, output: str, file: Path) -> bool:
    """Whether weights are a checkpoint, by their bytes, or by their folder where it was moved."""
    named = Path(weights)
    try:
        if named.is_file():
            return named.samefile(file) or file_digest(named) == file_digest(file)
    except (OSError, ValueError):
        return False
    return named.parent == Path(output)


def _verified(file: Path) -> str:
    """Return the SHA-256 of a checkpoint, which must stand beside it."""
    beside = checksum_file(file)
    try:
        with beside.open(encoding="utf-8", errors="replace") as stream:
            recorded = stream.read(64)
        found = file_digest(file)
    except OSError as error:
        raise WeightsError(
            f"{error.filename} cannot be read: {error.strerror}. A training writes a checkpoint "
            "and its SHA-256 beside it; name a folder that has both."
        ) from error
    if found != recorded:
        raise WeightsError(
            f"{file} is not what the training wrote: its SHA-256 begins {found[:16]}, and "
            f"{beside.name} has {recorded[:16]!r}."
        )
    return found


def _began_with(record: Run, config: str, file: Path) -> str:
    given = config_of(record.config, file)
    unlike = list(changes(given, config))
    if unlike:
        raise WeightsError(
            f"{file} was trained with another config than {config}, and unlike there: "
            f"{', '.join(unlike[:5])}."
        )
    model = given.get("MODEL")
    return str(model.get("WEIGHTS", "")) if isinstance(model, dict) else ""


def began_with(weights: str, run: Path) -> str:
    """Return in words what a training began with, without the paths of a machine.

    Args:
        weights: MODEL.WEIGHTS of the training.
        run: its folder, where the file may lie.

    Raises:
        ConfigError: they saw more than ImageNet-1K, or are those of a whole detector.
    """
    if not weights:
        return "nothing, at random"
    file = _file(weights, run)
    known = _entry(weights, file)
    if known is not None:
        if not known.imagenet_1k_only:
            raise ConfigError(
                f"{run} began with {known.name}, which saw more images than ImageNet-1K has. The "
                "page is of trainings that began with ImageNet-1K weights: train again from "
                "others, see tools/list_weights.py."
            )
        return known.name
    name = re.sub(r"[^\w.-]", "_", Path(urllib.parse.urlsplit(weights).path).name)[-_LONGEST_NAME:]
    if file is None:
        return f"{name}, which is not in the catalog"
    return f"{name} (SHA-256 {file_digest(file)}), which is not in the catalog"


def _file(weights: str, run: Path) -> Path | None:
    if "://" in weights:
        return None
    try:
        candidates = (Path(weights), run / Path(weights).name)
        return next((file for file in candidates if file.is_file()), None)
    except (OSError, ValueError):
        return None


def _entry(weights: str, file: Path | None) -> Entry | None:
    """Return the entry of the catalog that weights are, by name, address, record or checksum."""
    if file is None:
        named = ENTRIES.get(weights.removeprefix(SCHEME)) if weights.startswith(SCHEME) else None
        return named or next((each for each in ENTRIES.values() if each.url == weights), None)
    checkpoint = read_checkpoint(file)
    if not is_backbone(checkpoint.tensors):
        raise ConfigError(
            f"the training began with {file}, a whole detector: it is no run of a shipped config, "
            "whose trainings begin with a backbone."
        )
    record = Record.of(checkpoint.record)
    named = ENTRIES.get(record.name) if record is not None and record.name else None
    return named or of_file(file)
