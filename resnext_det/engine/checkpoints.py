"""Checkpoints that are never lost: written whole, and verified before a training goes on."""

from __future__ import annotations

import logging
import re
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from detectron2.checkpoint import DetectionCheckpointer
from detectron2.config import CfgNode
from detectron2.engine import HookBase
from detectron2.utils import comm
from torch import nn

from resnext_det.checkpoints import folder as checkpoint_folder
from resnext_det.checkpoints.reading import iteration_of, read_content
from resnext_det.checkpoints.run import run_record
from resnext_det.checkpoints.writing import RUN, remove_leftovers, write_checkpoint
from resnext_det.errors import ConfigError, ResNeXtError, TrainingError
from resnext_det.pretrained.loading import check_same_model
from resnext_det.pretrained.readers import without_prefix

logger = logging.getLogger(__name__)

_NAME = re.compile(r"\w[\w.-]*")


@dataclass(frozen=True)
class Resumed:
    """A checkpoint that a training goes on from.

    Attributes:
        file: the checkpoint.
        iteration: that it was written after, counted from 0; the next one is to be done.
        extra: what it holds beside the model and the checkpointables.
    """

    file: Path
    iteration: int
    extra: Mapping[str, Any]


class Checkpointer(DetectionCheckpointer):
    """Detectron2's checkpointer, whose files survive kills, full disks and damage.

    The files are fvcore's: stock Detectron2 resumes from them, and this from stock ones.
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
            config: the run's, kept in every checkpoint.
            class_names: kept in every checkpoint, in the order of the model's outputs.
            provenance: asked at every save for what else a checkpoint shall say of the run, in
                plain containers; a number under "best" is the best value so far.
            save_to_disk: write checkpoints; by default the main process alone does.
            checkpointables: what is saved and resumed with the model, by name; each has
                `state_dict` and `load_state_dict`.
        """
        super().__init__(  # type: ignore[no-untyped-call]
            model, str(save_dir), save_to_disk=save_to_disk, **checkpointables
        )
        self._config = config
        self._class_names = tuple(class_names)
        self._provenance = provenance
        # What `resume` has read and verified, until `_load_file` hands it on.
        self._content: dict[str, Any] | None = None

    @property
    def folder(self) -> Path | None:
        """Where this process writes; None where it does not."""
        return Path(self.save_dir) if self.save_dir and self.save_to_disk else None

    def save(self, name: str, **kwargs: Any) -> None:
        """Write a checkpoint, and name it as the last one.

        Args:
            name: of the file, without ".pth".
            kwargs: what it shall hold beside the model, the checkpointables and the run's record,
                such as iteration=24, the iteration just finished, counted from 0.

        Raises:
            TrainingError: it cannot be written; those before are as they were.
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
        """Return what a checkpoint written now says about the run; see `export_weights`."""
        provenance = {} if self._provenance is None else self._provenance()
        return run_record(self._config, self._class_names, provenance)

    def tag_last_checkpoint(self, last_filename_basename: str) -> None:
        """Name the checkpoint written last.

        Raises:
            TrainingError: the file that says so cannot be written.
        """
        checkpoint_folder.name_last(Path(self.save_dir), last_filename_basename)

    def get_checkpoint_file(self) -> str:
        """Return the file of the run's folder that is named as the last one; "" for none."""
        files = checkpoint_folder.checkpoints(Path(self.save_dir)) if self.save_dir else {}
        file = files.get(checkpoint_folder.last_named(Path(self.save_dir)) or "")
        return "" if file is None else str(file)

    def candidates(self) -> Iterator[Path]:
        """Yield what a training may go on from; see `checkpoint_folder.candidates`."""
        return checkpoint_folder.candidates(Path(self.save_dir)) if self.save_dir else iter(())

    def last_good(self) -> Path | None:
        """Return the checkpoint that `resume` would choose; see `checkpoint_folder.last_good`."""
        return checkpoint_folder.last_good(Path(self.save_dir)) if self.save_dir else None

    def prune(self, keep: int, protect: Iterable[str] = (), *, up_to: int | None = None) -> None:
        """Remove the oldest periodic checkpoints; see `checkpoint_folder.prune`."""
        if self.folder is not None:
            checkpoint_folder.prune(self.folder, keep, protect, up_to=up_to)

    def resume(self) -> Resumed | None:
        """Go on from the last good checkpoint: the model and all the checkpointables.

        The main process chooses for all, so every process has to call this. It removes what a
        process that was killed left half written, and names the chosen one as the last.

        Returns:
            What was resumed; None, with nothing changed, where there is no checkpoint.

        Raises:
            TrainingError: there are checkpoints, and none is good, or a process cannot load it.
            WeightsError: the checkpoint is of another model.
        """
        chosen = self._agreed()
        if chosen is None:
            return None
        file, iteration = chosen
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
                    f"{file} cannot be resumed by process {rank} of {len(failures)}: {text} - "
                    "Every machine has to see the same OUTPUT_DIR, and the config has to be the "
                    "one that the training was started with."
                )
        if self.folder is not None and self.get_checkpoint_file() != str(file):
            self.tag_last_checkpoint(file.name)
        return Resumed(file, iteration, extra)

    def resume_or_load(self, path: str, *, resume: bool = True) -> dict[str, Any]:
        """Do as fvcore's does, but resume from the last checkpoint that is good.

        Raises:
            TrainingError: as for `resume`.
            WeightsError: as for `resume`, or `path` cannot be read.
        """
        resumed = self.resume() if resume else None
        if resumed is not None:
            return dict(resumed.extra)
        loaded: dict[str, Any] = self.load(path, checkpointables=[])  # type: ignore[no-untyped-call]
        return loaded

    def _agreed(self) -> tuple[Path, int] | None:
        """Choose file and iteration on the main process, for every process."""
        chosen: tuple[Path, int] | ResNeXtError | None = None
        if comm.is_main_process() and self.save_dir:
            try:
                chosen = self._chosen()
            except ResNeXtError as error:
                chosen = error
        chosen = comm.all_gather(chosen)[0]
        if isinstance(chosen, ResNeXtError):
            raise chosen
        return chosen

    def _chosen(self) -> tuple[Path, int] | None:
        if self.folder is not None:
            remove_leftovers(self.folder)
        found = checkpoint_folder.read_last_good(Path(self.save_dir))
        if found is None:
            return None
        file, content = found
        held, wanted = (
            without_prefix(part) for part in (content["model"], self.model.state_dict())
        )
        if _shapes(held) != _shapes(wanted):
            check_same_model(self.model, file)  # reads the file again, to name what differs
        iteration = iteration_of(content)
        assert iteration is not None, "verified before"
        for name in self.checkpointables.keys() - content.keys():
            logger.warning("%s holds no %s, which begins anew.", file, name)
        self._content = content
        return file, iteration

    def _load_file(self, filename: str) -> dict[str, Any]:
        content, self._content = self._content, None
        return read_content(Path(filename)) if content is None else content


class Checkpoints(HookBase):
    """Saves the training every so often and at its end, and removes what is too old."""

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
        """Remove what a killed process left, and tell of an earlier training in the folder."""
        folder = self._checkpointer.folder
        if folder is None:
            return
        remove_leftovers(folder)
        earlier = [name for name in checkpoint_folder.checkpoints(folder) if "model_" in name]
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
