"""Checkpoints that are never lost: written whole, and verified before a training resumes."""

from __future__ import annotations

import logging
import re
from collections.abc import Callable, Iterable, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from detectron2.checkpoint import DetectionCheckpointer
from detectron2.config import CfgNode
from detectron2.engine import HookBase
from detectron2.utils import comm
from torch import Tensor, nn

from resnext_det.checkpoint_file import (
    RUN,
    iteration_of,
    not_written,
    read_content,
    read_outline,
    read_run,
    read_training,
    run_record,
    write_checkpoint,
)
from resnext_det.config import complete
from resnext_det.engine.recorded_config import Changes, check_resumable
from resnext_det.errors import ConfigError, ResNeXtError, TrainingError, WeightsError, quoted
from resnext_det.files import remove_leftovers, written_beside
from resnext_det.weights.loading import check_same_model
from resnext_det.weights.reading import read_checkpoint, without_prefix

logger = logging.getLogger(__name__)

_NAME = re.compile(r"\w[\w.-]*")
# fvcore's file that names the last checkpoint, and its names for the periodic ones.
_POINTER = "last_checkpoint"
_PERIODIC = re.compile(r"model_([0-9]{7,})\.pth")


@dataclass(frozen=True)
class Resumed:
    """A checkpoint that a training resumes from.

    Attributes:
        file: the checkpoint.
        iteration: the last finished one, counted from 0.
        extra: what it holds beside the model and the checkpointables.
        changes: settings that were others when it was written.
    """

    file: Path
    iteration: int
    extra: Mapping[str, Any]
    changes: Changes


class Checkpointer(DetectionCheckpointer):
    """Detectron2's checkpointer, whose files survive kills, full disks and damage.

    The files are fvcore's: stock Detectron2 resumes from them, and this class from stock ones.
    """

    def __init__(
        self,
        model: nn.Module,
        save_dir: str | Path = "",
        *,
        config: CfgNode | None = None,
        class_names: Sequence[str] = (),
        provenance: Callable[[], Mapping[str, Any]] | None = None,
        save_to_disk: bool | None = None,
        **checkpointables: Any,
    ) -> None:
        """Prepare; nothing is read or written.

        Args:
            model: what is trained.
            save_dir: the run's folder, OUTPUT_DIR; "" to save nothing.
            config: the run's, recorded in every checkpoint.
            class_names: recorded in every checkpoint, in the order of the model's outputs.
            provenance: called at every save for anything else to record, in plain containers; a
                number under "best" is the best value so far.
            save_to_disk: write checkpoints; by default only the main process does.
            checkpointables: saved and resumed with the model, by name; each has `state_dict` and
                `load_state_dict`.
        """
        super().__init__(  # type: ignore[no-untyped-call]
            model, str(save_dir), save_to_disk=save_to_disk, **checkpointables
        )
        self._config = config
        self._class_names = tuple(class_names)
        self._provenance = provenance
        # What `resume` has read and verified, until `_load_file` returns it.
        self._content: dict[str, Any] | None = None

    @property
    def folder(self) -> Path | None:
        """Where this process writes; None if it does not."""
        return Path(self.save_dir) if self.save_dir and self.save_to_disk else None

    def save(self, name: str, **kwargs: Any) -> None:
        """Write a checkpoint, and make it the last one.

        Args:
            name: of the file, without ".pth".
            kwargs: what to save beside the model, the checkpointables and the run's record, such
                as iteration=24, the last finished iteration, counted from 0.

        Raises:
            TrainingError: it cannot be written; earlier ones are intact.
        """
        if self.folder is None:
            return
        if not _NAME.fullmatch(name):
            raise ValueError(f"a checkpoint's name is of letters, digits, _, - and .: {name!r}")
        content = {
            "model": self.model.state_dict(),
            **{key: part.state_dict() for key, part in self.checkpointables.items()},
            **kwargs,
            RUN: self.run_record(),
        }
        file = self.folder / f"{name}.pth"
        write_checkpoint(content, file)
        self.tag_last_checkpoint(file.name)
        logger.info("saved %s", file)

    def run_record(self) -> dict[str, Any]:
        """Return what a checkpoint written now records about the run."""
        provenance = {} if self._provenance is None else self._provenance()
        return run_record(self._config, self._class_names, provenance)

    def tag_last_checkpoint(self, last_filename_basename: str) -> None:
        """Make a file of the run's folder the last checkpoint.

        Raises:
            TrainingError: the file that names it cannot be written.
        """
        pointer = Path(self.save_dir) / _POINTER
        try:
            with written_beside(pointer, None, durable=True) as beside:
                beside.write_text(last_filename_basename, encoding="utf-8")
        except OSError as error:
            raise not_written(pointer, error) from error

    def get_checkpoint_file(self) -> str:
        """Return the file of the run's folder that is named as the last one; "" for none."""
        if not self.save_dir:
            return ""
        folder = Path(self.save_dir)
        file = _files(folder).get(_last_named(folder) or "")
        return "" if file is None else str(file)

    def prune(self, keep: int, protect: Iterable[str] = (), *, up_to: int | None = None) -> None:
        """Remove the oldest periodic checkpoints (model_0000024.pth and so on).

        Args:
            keep: how many of the newest to keep; 0 for all.
            protect: names of files to keep as well, as is the last one.
            up_to: iteration of the newest one; later ones are of an earlier training in the same
                folder, and stay.
        """
        if self.folder is None or not keep:
            return
        periodic = sorted(
            (number, file)
            for number, file in ((_number(file), file) for file in _files(self.folder).values())
            if number is not None and (up_to is None or number <= up_to)
        )
        stay = {*protect, _last_named(self.folder)}
        for _, file in periodic[:-keep]:
            if file.name in stay or file.stem in stay:
                continue
            try:
                file.unlink(missing_ok=True)
            except OSError as error:
                logger.warning("%s is not needed and cannot be removed: %s", file, error.strerror)

    def resume(self) -> Resumed | None:
        """Load the last good checkpoint: the model and all the checkpointables.

        The main process chooses for all, so every process has to call this. It removes what killed
        processes left half written, and makes the chosen checkpoint the last one.

        Returns:
            What was resumed; None, with nothing changed, if there is no checkpoint.

        Raises:
            TrainingError: there are checkpoints and none is good, or a process cannot load it.
            WeightsError: the checkpoint is of another model.
            ConfigError: a setting or a class that a resume cannot change is not the recorded one.
        """
        chosen = self._agreed()
        if chosen is None:
            return None
        file, iteration, changes = chosen
        extra: dict[str, Any] = {}
        failure = None
        try:
            # Not Detectron2's own `load`, which takes a path for an address and cuts it at a "?".
            extra = super(DetectionCheckpointer, self).load(str(file))
        except Exception as error:  # load_state_dict may raise anything
            failure = f"{type(error).__name__}: {error}"
            logger.debug("%s cannot be loaded", file, exc_info=True)
        failures = comm.all_gather(failure)
        for rank, text in enumerate(failures):
            if text is not None:
                raise TrainingError(
                    f"{file} cannot be resumed by rank {rank} of {len(failures)}: {text} - Every "
                    "machine has to see the same OUTPUT_DIR, and the config has to be the one the "
                    "training was started with."
                )
        if self.folder is not None and self.get_checkpoint_file() != str(file):
            self.tag_last_checkpoint(file.name)
        return Resumed(file, iteration, extra, changes)

    def resume_or_load(self, path: str, *, resume: bool = True) -> dict[str, Any]:
        """Do as fvcore's does, but resume from the last checkpoint that is good.

        Raises:
            TrainingError: as for `resume`.
            WeightsError: as for `resume`, or `path` cannot be read.
        """
        resumed = self.resume() if resume else None
        if resumed is not None:
            return dict(resumed.extra)
        loaded: dict[str, Any] = self.load(path, checkpointables=[])
        return loaded

    def _agreed(self) -> tuple[Path, int, Changes] | None:
        """Choose the file on the main process, for every process."""
        chosen: tuple[Path, int, Changes] | ResNeXtError | None = None
        if comm.is_main_process() and self.save_dir:
            try:
                chosen = self._chosen()
            except ResNeXtError as error:
                chosen = error
        chosen = comm.all_gather(chosen)[0]
        if isinstance(chosen, ResNeXtError):
            raise chosen
        return chosen

    def _chosen(self) -> tuple[Path, int, Changes] | None:
        if self.folder is not None:
            _remove_leftovers(self.folder)
        found = read_last_good(Path(self.save_dir))
        if found is None:
            return None
        file, content = found
        changes: Changes = {}
        if self._config is not None:
            names = list(self._class_names)
            changes = check_resumable(self._config, file, read_run(file), names)
        held, wanted = (
            without_prefix(part) for part in (content["model"], self.model.state_dict())
        )
        if _shapes(held) != _shapes(wanted):
            check_same_model(self.model, file)  # reads the file again, to name what differs
        iteration = iteration_of(content)
        assert iteration is not None, "verified before"
        for name in self.checkpointables.keys() - content.keys():
            logger.warning("%s holds no %s, which starts afresh.", file, name)
        self._content = content
        return file, iteration, changes

    def load(self, path: str, *args: Any, **kwargs: Any) -> Any:
        """Load any checkpoint that Detectron2 takes: a file or an address, ".pkl" included.

        Args:
            path: with "?matching_heuristics=True" to match names as Detectron2 does.
            args: fvcore's; the names of the checkpointables to load.
            kwargs: likewise.

        Raises:
            WeightsError: the file is missing or damaged, or holds more than data.
        """
        try:
            return super().load(path, *args, **kwargs)  # type: ignore[no-untyped-call]
        finally:
            self._parsed_url_during_load = None  # which Detectron2 leaves after an error

    def _load_file(self, filename: str) -> dict[str, Any]:
        """Return a file's content: what `resume` has read, else any that Detectron2 takes."""
        content, self._content = self._content, None
        if content is not None:
            return content
        if self._parsed_url_during_load is None:  # in `resume`
            return read_content(Path(filename))
        if not filename.endswith(".pkl"):
            loaded: dict[str, Any] = super()._load_file(filename)  # type: ignore[no-untyped-call]
            return loaded
        # Detectron2 would execute the pickle.
        tensors = read_checkpoint(Path(filename)).tensors
        author = "Caffe2" if any("branch2a" in name for name in tensors) else ""
        return {"model": dict(tensors), "__author__": author, "matching_heuristics": True}

    def _torch_load(self, file: str) -> dict[str, Any]:
        return read_content(Path(file))


def last_good(folder: Path) -> Path | None:
    """Return the checkpoint to resume from, or to evaluate: the newest that is intact.

    Damaged ones are skipped with a warning.

    Returns:
        The file; None if the folder holds no checkpoint of a training.

    Raises:
        TrainingError: there are checkpoints, and none is good.
    """
    found = read_last_good(folder)
    return None if found is None else found[0]


def read_last_good(folder: Path) -> tuple[Path, dict[str, Any]] | None:
    """Return the result of `last_good` with the content of the file, so that it is read once."""
    refused: list[str] = []
    named = _last_named(folder)
    if named is not None and named not in _files(folder):
        refused.append(f"{folder / _POINTER} names {quoted(named)}, which does not exist.")
    for file in _candidates(folder):
        try:
            content = read_training(file)
        except WeightsError as error:
            refused.append(str(error))
            continue
        for reason in refused:
            logger.warning("%s %s is used instead.", reason, file)
        return file, content
    if not refused:
        return None
    raise TrainingError(
        f"no checkpoint of {folder} can be resumed. {' '.join(refused)} Restore a copy, or start "
        "over: without --resume, in another OUTPUT_DIR."
    )


def _candidates(folder: Path) -> list[Path]:
    """Return the files a training may resume from, intact or not: the last one, then by age.

    Weights alone, such as those of a moving average, are left out.
    """
    files = _files(folder)
    named = files.pop(_last_named(folder) or "", None)
    numbered = [(_iteration(file), file.name, file) for file in files.values()]
    others = [file for iteration, _, file in sorted(numbered, reverse=True) if iteration >= 0]
    return others if named is None else [named, *others]


def _files(folder: Path) -> dict[str, Path]:
    return {file.name: file for file in folder.glob("[!.]*.pth") if file.is_file()}


def _last_named(folder: Path) -> str | None:
    """Return the content of last_checkpoint, which is compared with names and never a path."""
    try:
        with (folder / _POINTER).open(encoding="utf-8", errors="replace") as stream:
            return stream.read(4096).strip()
    except OSError:
        return None


def _number(file: Path) -> int | None:
    match = _PERIODIC.fullmatch(file.name)
    return None if match is None else int(match[1])


def _iteration(file: Path) -> int:
    """Return the last finished iteration; -1 for weights alone.

    If the file cannot be read its name decides: it is refused later, with the reason.
    """
    try:
        iteration = iteration_of(read_outline(file))
    except WeightsError:
        return _number(file) or 0
    return -1 if iteration is None else iteration


def _remove_leftovers(folder: Path) -> None:
    try:
        for pattern in ("*.pth", _POINTER):
            remove_leftovers(folder, pattern)
    except OSError as error:
        raise TrainingError(
            f"{folder} holds half a file of a killed process, which cannot be removed: "
            f"{error.strerror}. Make the folder writable."
        ) from error


def checkpoint_bytes(model: nn.Module, cfg: CfgNode) -> int:
    """Return the approximate size of a checkpoint of a model, in bytes.

    It holds the weights and buffers, the momentum of what is trained (one number per weight,
    unless SOLVER.MOMENTUM is 0) and the moving average of the weights, if there is one.

    Args:
        model: the detector.
        cfg: SOLVER.MOMENTUM and SOLVER.EMA.ENABLED are read.
    """
    weights = list(model.parameters())
    held: list[Tensor] = list(model.state_dict().values())
    if cfg.SOLVER.MOMENTUM:
        held += [each for each in weights if each.requires_grad]
    if complete(cfg).SOLVER.EMA.ENABLED:
        held += weights
    return sum(each.numel() * each.element_size() for each in held)


class Checkpoints(HookBase):
    """Saves the training periodically and at its end, and removes the oldest checkpoints."""

    def __init__(self, checkpointer: Checkpointer, period: int, keep: int = 0) -> None:
        """Prepare.

        Args:
            checkpointer: writes them.
            period: iterations from one to the next, SOLVER.CHECKPOINT_PERIOD.
            keep: how many stay beside the best and the final one, SOLVER.KEEP_LAST; 0 for all.

        Raises:
            ConfigError: `period` is not positive, or `keep` is negative.
        """
        if period < 1:
            raise ConfigError(f"SOLVER.CHECKPOINT_PERIOD is {period}; it has to be 1 or more.")
        if keep < 0:
            raise ConfigError(f"SOLVER.KEEP_LAST is {keep}; it is a number of files, or 0 for all.")
        self._checkpointer = checkpointer
        self._period = period
        self._keep = keep
        self._saved: int | None = None
        self._final: int | None = None

    def before_train(self) -> None:
        """Remove what killed processes left, and warn about an earlier training in the folder."""
        folder = self._checkpointer.folder
        if folder is None:
            return
        _remove_leftovers(folder)
        earlier = [name for name in _files(folder) if "model_" in name]
        if earlier and self.trainer.start_iter == 0:
            logger.warning(
                "%s holds checkpoints of an earlier training (%s), which stay until one of the "
                "same name is written. Give every training an OUTPUT_DIR of its own.",
                folder,
                ", ".join(sorted(earlier)[:5]),
            )

    def after_step(self) -> None:
        """Save the iteration just finished, where it is due; the last one as the final one."""
        if self.trainer.iter >= self.trainer.max_iter - 1:
            self.save_final()
        elif (self.trainer.iter + 1) % self._period == 0:
            self.save_now()

    def save_now(self) -> None:
        """Save the iteration just finished, unless that is done; to be called after a step.

        Raises:
            TrainingError: it cannot be written.
        """
        iteration = self.trainer.iter
        if self._saved != iteration:
            self._save(f"model_{iteration:07d}", iteration)

    def save_final(self) -> None:
        """Save the iteration just finished as model_final, unless that is done.

        A training that ends before its last iteration may call this after a step, too.

        Raises:
            TrainingError: it cannot be written.
        """
        iteration = self.trainer.iter
        if self._final != iteration:
            self._save("model_final", iteration)
            self._final = iteration

    def _save(self, name: str, iteration: int) -> None:
        self._checkpointer.save(name, iteration=iteration)
        self._saved = iteration
        self._checkpointer.prune(self._keep, up_to=iteration)


def _shapes(tensors: Mapping[str, Any]) -> dict[str, tuple[int, ...]]:
    return {name: tuple(tensor.shape) for name, tensor in tensors.items()}
