"""Checkpoints that survive kills, full disks and damage."""

from __future__ import annotations

import contextlib
import io
import logging
import re
import socket
import zipfile
import zlib
from collections.abc import Mapping, Sequence
from concurrent.futures import Future, ThreadPoolExecutor
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from detectron2.config import CfgNode
from detectron2.engine import hooks
from detectron2.utils import comm
from fvcore.common import checkpoint as fvcore
from torch import nn

from resnext_det.checkpoint_file import (
    RUN,
    archived,
    iteration_of,
    not_written,
    read_run,
    read_training,
    run_record,
    write_checkpoint,
)
from resnext_det.engine.recorded_config import Changes, check_resumable
from resnext_det.errors import ResNeXtError, TrainingError, WeightsError, quoted
from resnext_det.files import remove_leftovers, written_beside
from resnext_det.weights.loading import check_same_model
from resnext_det.weights.reading import read_content, read_outline

logger = logging.getLogger(__name__)

# fvcore's file that names the last checkpoint, and its names for periodic ones.
_POINTER = "last_checkpoint"
_PERIODIC = re.compile(r"model_([0-9]{7,})\.pth")


@dataclass(frozen=True)
class Resumed:
    """A checkpoint that a training resumes from.

    Attributes:
        file: the checkpoint.
        iteration: the last finished iteration, counted from 0.
        changes: settings that have changed since it was written.
    """

    file: Path
    iteration: int
    changes: Changes


class Checkpointer(fvcore.Checkpointer):
    """fvcore's checkpointer, except that files are written atomically and verified when read.

    Stock Detectron2 can resume from its files, and it from stock ones.
    """

    def __init__(
        self,
        model: nn.Module,
        save_dir: str | Path = "",
        *,
        config: CfgNode | None = None,
        class_names: Sequence[str] = (),
        **checkpointables: Any,
    ) -> None:
        """Initialize fvcore's checkpointer, which writes in the main process only.

        Every checkpoint records `config` and `class_names`, in the order of the model's outputs.
        """
        main = comm.is_main_process()
        super().__init__(model, str(save_dir), save_to_disk=main, **checkpointables)
        self._config = config
        self._class_names = tuple(class_names)
        self.keep = 0
        """How many periodic checkpoints to keep; 0 for all."""
        self._thread = ThreadPoolExecutor(1, "checkpoints")
        self._writing: Future[None] | None = None

    def save(self, name: str, *, background: bool = False, **kwargs: Any) -> None:
        """Write NAME.pth atomically, with `kwargs` as further content, and tag it as the last.

        In the background, training goes on once its content is copied to the host's memory.

        Raises:
            TrainingError: it, or the one before it in the background, cannot be written; earlier
                checkpoints are intact.
        """
        if not self.save_dir or not self.save_to_disk:
            return
        self.wait()
        file = Path(self.save_dir) / f"{name}.pth"
        content = {
            "model": self.model.state_dict(),
            **{key: each.state_dict() for key, each in self.checkpointables.items()},
            **kwargs,
            RUN: self.run_record(),
        }
        if background:
            self._writing = self._thread.submit(self._write, archived(content), file)
        else:
            self._write(content, file)

    def _write(self, content: Mapping[str, Any] | io.BytesIO, file: Path) -> None:
        write_checkpoint(content, file)
        self.tag_last_checkpoint(file.name)
        logger.info("saved %s", file)
        if self.keep:
            last = _number(file, -1)  # higher ones are from an earlier training in the same folder
            found = [each for each in _files(file.parent) if -1 < _number(each, -1) <= last]
            for surplus in sorted(found, key=_number)[: -self.keep]:
                surplus.unlink(missing_ok=True)

    def wait(self, *, block: bool = True) -> None:
        """Wait for the checkpoint that is written in the background; only look if not `block`.

        Raises:
            TrainingError: it cannot be written.
        """
        writing = self._writing
        if writing is not None and (block or writing.done()):
            self._writing = None
            writing.result()

    def run_record(self) -> dict[str, Any]:
        """Return what a checkpoint records about the run."""
        return run_record(self._config, self._class_names)

    def tag_last_checkpoint(self, last_filename_basename: str) -> None:
        """Name a file of the folder as the last checkpoint."""
        pointer = Path(self.save_dir) / _POINTER
        try:
            with written_beside(pointer, None, durable=True) as beside:
                beside.write_text(last_filename_basename, encoding="utf-8")
        except OSError as error:
            raise not_written(pointer, error) from error

    def resume(self) -> Resumed | None:
        """Load the newest intact checkpoint, if there is one, and return it.

        A collective call; the main process chooses the file.

        Raises:
            TrainingError: all checkpoints are damaged, or a process cannot load the chosen one, or
                finds another file under its name.
            WeightsError: the checkpoint is of another model.
            ConfigError: a setting has changed that a resume cannot change.
        """
        own = self._choose() if comm.is_main_process() else None
        chosen: Resumed | ResNeXtError | None = comm.all_gather(own)[0]
        if isinstance(chosen, ResNeXtError):
            raise chosen
        if chosen is None:
            return None
        failure = None
        try:
            self.load(str(chosen.file))
        except Exception as error:  # load_state_dict may raise anything
            failure = f"{type(error).__name__}: {error}"
            logger.debug("%s cannot be loaded", chosen.file, exc_info=True)
        content = None if failure else _fingerprint(chosen.file)
        found = comm.all_gather((socket.gethostname(), failure, content))
        for rank, (host, text, content) in enumerate(found):
            if text is None and content != found[0][2]:
                text = f"it is another file than on {found[0][0]}."
            if text is not None:
                raise TrainingError(
                    f"{chosen.file} on {host} cannot be resumed by rank {rank} of {len(found)}: "
                    f"{text} - All machines must see the same OUTPUT_DIR, and the config must be "
                    "the one that training was started with."
                )
        if self.save_to_disk:
            self.tag_last_checkpoint(chosen.file.name)
        return chosen

    def _choose(self) -> Resumed | ResNeXtError | None:
        try:
            file = last_good(Path(self.save_dir)) if self.save_dir else None
            if file is None:
                return None
            changes: Changes = {}
            if self._config is not None:
                names = list(self._class_names)
                changes = check_resumable(self._config, file, read_run(file), names)
            check_same_model(self.model, file)
        except ResNeXtError as error:
            return error
        outline = read_outline(file)
        for name in self.checkpointables.keys() - outline.keys():
            logger.warning("%s has no %s, which starts from scratch", file, name)
        return Resumed(file, iteration_of(outline) or 0, changes)

    def _load_file(self, f: str) -> dict[str, Any]:
        """Return a file's content, without executing it as torch.load might."""
        return read_content(Path(f))


class PeriodicCheckpointer(hooks.PeriodicCheckpointer):
    """Detectron2's hook, which writes in the background.

    `max_to_keep` includes checkpoints from before a resume. An older one is removed once the newer
    one is on the disk.
    """

    checkpointer: Checkpointer

    def before_train(self) -> None:
        """Remove files that a kill left half written."""
        super().before_train()  # type: ignore[no-untyped-call]
        if self.max_to_keep is not None:  # fvcore would not wait for the newer one
            self.checkpointer.keep, self.max_to_keep = self.max_to_keep, None
        folder = Path(self.checkpointer.save_dir)
        try:
            for pattern in ("*.pth", _POINTER):
                remove_leftovers(folder, pattern)
        except OSError as error:
            raise not_written(folder / _POINTER, error) from error

    def after_step(self) -> None:
        """Begin to write a checkpoint if one is due, or raise the error of the one before."""
        self.checkpointer.wait(block=False)
        self.step(self.trainer.iter, background=True)

    def after_train(self) -> None:
        """Wait for the last one, after errors as well."""
        self.checkpointer.wait()


def _fingerprint(file: Path) -> tuple[int, int]:
    """Return a file's size and, of a zip archive, a checksum of its entries' checksums."""
    entries = []
    with contextlib.suppress(zipfile.BadZipFile), zipfile.ZipFile(file) as archive:
        entries = [(each.filename, each.CRC) for each in archive.infolist()]
    return file.stat().st_size, zlib.crc32(repr(entries).encode())


def last_good(folder: Path) -> Path | None:
    """Return the newest intact checkpoint of a training, or None if the folder has no checkpoint.

    Damaged ones are skipped with a warning.

    Raises:
        TrainingError: all checkpoints are damaged.
    """
    refused: list[str] = []
    files = {file.name: file for file in _files(folder)}
    named = _last_named(folder)
    if named is not None and named not in files:
        refused.append(f"{folder / _POINTER} names {quoted(named)}, which does not exist.")
    last = files.pop(named or "", None)
    # Weights alone, such as a moving average, have no iteration.
    numbered = [(_iteration(file), file.name, file) for file in files.values()]
    others = [file for iteration, _, file in sorted(numbered, reverse=True) if iteration >= 0]
    for file in others if last is None else [last, *others]:
        try:
            read_training(file)
        except WeightsError as error:
            refused.append(str(error))
            continue
        for reason in refused:
            logger.warning("%s Using %s instead.", reason, file)
        return file
    if not refused:
        return None
    raise TrainingError(
        f"no checkpoint of {folder} can be resumed. {' '.join(refused)} Restore a copy, or train "
        "without --resume in another OUTPUT_DIR."
    )


def _files(folder: Path) -> list[Path]:
    return [file for file in folder.glob("[!.]*.pth") if file.is_file()]


def _last_named(folder: Path) -> str | None:
    """Return the content of last_checkpoint, to compare with names and never to use as a path."""
    try:
        with (folder / _POINTER).open(encoding="utf-8", errors="replace") as stream:
            return stream.read(4096).strip()
    except OSError:
        return None


def _number(file: Path, otherwise: int = 0) -> int:
    """Return the iteration in a periodic checkpoint's name."""
    match = _PERIODIC.fullmatch(file.name)
    return otherwise if match is None else int(match[1])


def _iteration(file: Path) -> int:
    """Return the last finished iteration, or -1 for weights alone."""
    try:
        iteration = iteration_of(read_outline(file))
    except WeightsError:  # refused later, with the reason
        return _number(file)
    return -1 if iteration is None else iteration
