"""Checkpoints of a training: verified when read, written atomically, with a record of the run."""

from __future__ import annotations

import contextlib
import itertools
import multiprocessing
import os
import pickle
import platform
import random
import resource
import shutil
import signal
import sys
import time
import zipfile
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import detectron2
import numpy as np
import pytest
import safetensors.torch
import torch
from detectron2.checkpoint import DetectionCheckpointer
from detectron2.config import CfgNode, get_cfg
from torch import nn

from resnext_det.checkpoint_file import (
    RUN,
    iteration_of,
    read_run,
    read_training,
    write_checkpoint,
)
from resnext_det.config import add_resnext_config
from resnext_det.engine.checkpoints import Checkpointer, last_good
from resnext_det.errors import TrainingError, WeightsError
from resnext_det.files import remove_leftovers
from resnext_det.weights.reading import read_content, read_outline

CONTENT = {
    "model": {"w": torch.arange(64.0), "b": torch.ones(3)},
    "optimizer": {"state": {0: {"momentum_buffer": torch.arange(5.0)}}, "param_groups": []},
    "iteration": 24,
}


def same(found: dict[str, Any]) -> bool:
    momentum = found["optimizer"]["state"][0]["momentum_buffer"]
    return (
        torch.equal(found["model"]["w"], torch.arange(64.0))
        and torch.equal(found["model"]["b"], torch.ones(3))
        and torch.equal(momentum, torch.arange(5.0))
        and found["iteration"] == 24
    )


@pytest.fixture()
def file(tmp_path: Path) -> Path:
    write_checkpoint(CONTENT, tmp_path / "model_0000024.pth")
    return tmp_path / "model_0000024.pth"


def test_refuses_truncated_files(file: Path) -> None:
    whole = file.read_bytes()
    assert same(read_training(file))
    for size in (0, 1, 100, len(whole) // 2, len(whole) * 9 // 10, len(whole) - 1):
        file.write_bytes(whole[:size])
        with pytest.raises(WeightsError, match=r"model_0000024\.pth"):
            read_training(file)


def flipped(whole: bytes, bit: int) -> bytes:
    changed = bytearray(whole)
    changed[bit // 8] ^= 1 << bit % 8
    return bytes(changed)


def test_flipped_bits_change_no_number(file: Path) -> None:
    """torch.load itself accepts changed numbers."""
    whole = file.read_bytes()
    numbers = whole.index(torch.arange(64.0).numpy().tobytes()) * 8
    silent = refused = 0
    bits = [*random.Random(1).sample(range(8 * len(whole)), 100), numbers, numbers + 64 * 32 - 1]
    for bit in bits:
        file.write_bytes(flipped(whole, bit))
        try:
            assert same(read_training(file))
            silent += 1  # padding, or never read
        except WeightsError:
            refused += 1
    assert refused > 30 and silent + refused == len(bits)
    file.write_bytes(flipped(whole, numbers))
    assert not torch.equal(torch.load(file)["model"]["w"], torch.arange(64.0))
    with pytest.raises(WeightsError, match=r"data/.. is damaged"):
        read_training(file)


class Hostile:
    def __init__(self, mark: Path) -> None:
        self.mark = mark

    def __reduce__(self) -> tuple[Callable[..., Any], tuple[Any, ...]]:
        return os.mkdir, (str(self.mark),)


def hide(file: Path, mark: Path) -> None:
    """Insert a pickle that calls os.mkdir through the opcode INST instead of GLOBAL."""
    with zipfile.ZipFile(file) as source:
        parts = {name: source.read(name) for name in source.namelist()}
    with zipfile.ZipFile(file, "w") as target:
        for name, part in parts.items():
            hidden = f"}}(S'x'\n(S'{mark}'\nios\nmkdir\nu.".encode()
            target.writestr(name, hidden if name.endswith("/data.pkl") else part)


@pytest.mark.parametrize("kind", ["zip", "hidden", "legacy", "pickle"])
def test_never_executes_a_hostile_file(tmp_path: Path, kind: str) -> None:
    file, mark = tmp_path / "model_final.pth", tmp_path / "executed"
    hostile = {**CONTENT, "resnext_det_run": None if kind == "hidden" else Hostile(mark)}
    if kind == "pickle":
        file.write_bytes(pickle.dumps(hostile))
    else:
        torch.save(hostile, file, _use_new_zipfile_serialization=kind != "legacy")
    if kind == "hidden":
        hide(file, mark)
    archive = kind in ("zip", "hidden")
    for read in (read_training, read_outline, *([read_run] if archive else [])):
        with pytest.raises(WeightsError, match=r"asks for|cannot be read|refused"):
            read(file)
    if not archive:  # a file of another program, without a record
        assert read_run(file) is None
    with pytest.raises(TrainingError, match=r"asks for|cannot be read|refused"):
        last_good(tmp_path)
    assert not mark.exists()
    torch.load(file, weights_only=False) if kind != "pickle" else pickle.loads(file.read_bytes())
    assert mark.exists()  # the attack works


@pytest.mark.parametrize(
    ("change", "reason"),
    [
        ({"model": {}}, "no model"),
        ({"model": {"w": 1}}, "no model"),
        ({"model": {1: torch.ones(1)}}, "no model"),
        ({"iteration": -1}, "no iteration"),
        ({"optimizer": None}, "no optimizer"),
    ],
)
def test_refuses_other_content_than_a_training(
    tmp_path: Path, change: dict[str, Any], reason: str
) -> None:
    write_checkpoint({**CONTENT, **change}, tmp_path / "a.pth")
    with pytest.raises(
        WeightsError, match=rf"a\.pth is not the checkpoint of a training: .*{reason}"
    ):
        read_training(tmp_path / "a.pth")


def test_outline_has_shapes_without_values(file: Path) -> None:
    outline = read_outline(file)
    assert outline["iteration"] == 24 and outline["model"]["w"].shape == (64,)
    assert outline["model"]["w"].is_meta


def test_finds_iteration_where_detectron2_keeps_it() -> None:
    assert iteration_of({"iteration": 0, "trainer": {"iteration": 7}}) == 0
    assert iteration_of({"model": {}, "trainer": {"iteration": 7}}) == 7
    assert iteration_of({"model": {"iteration": torch.ones(1)}}) is None


def defaults() -> CfgNode:
    cfg = get_cfg()
    add_resnext_config(cfg)
    return cfg


def config() -> CfgNode:
    cfg = defaults()
    cfg.SOLVER.STEPS = (3, 7)
    return cfg


def test_checkpoint_records_its_run(tmp_path: Path) -> None:
    checkpointer = Checkpointer(
        nn.Linear(2, 2),
        tmp_path,
        config=config(),
        class_names=("Stoppschild", "自行车"),
    )
    checkpointer.save("model_best", iteration=4)
    run = read_run(tmp_path / "model_best.pth")
    assert run is not None
    read = defaults()
    read.merge_from_other_cfg(CfgNode.load_cfg(run.config))
    assert read.SOLVER == config().SOLVER != defaults().SOLVER
    assert read.MODEL.RESNEXT == config().MODEL.RESNEXT
    assert run.class_names == ("Stoppschild", "自行车")
    assert run.iteration == 4
    assert torch.__version__.startswith(run.versions["torch"])
    assert run.versions["python"] == platform.python_version()
    assert run.versions["detectron2"] == detectron2.__version__
    assert {"torchvision", "numpy", "resnext_det"} <= run.versions.keys()
    record = checkpointer.run_record()
    write_checkpoint({"model": checkpointer.model.state_dict(), RUN: record}, tmp_path / "ema.pth")
    exported = read_run(tmp_path / "ema.pth")
    assert exported is not None and exported.iteration is None
    assert exported.class_names == run.class_names


GOOD = {"config": "", "class_names": ["a"], "versions": {}}


@pytest.mark.parametrize("kind", ["stock", "pickle", "legacy", "safetensors"])
def test_files_of_other_programs_have_no_record(kind: str, tmp_path: Path) -> None:
    """Such as the detectors of Detectron2's zoo, which can be evaluated as well."""
    file = tmp_path / "model.pth"
    if kind == "stock":
        DetectionCheckpointer(nn.Linear(2, 2), str(tmp_path)).save("model")
    elif kind == "pickle":
        content = {"model": {"weight": np.ones(3)}, "__author__": "Detectron2"}
        file.write_bytes(pickle.dumps(content))
    elif kind == "safetensors":
        safetensors.torch.save_file({"weight": torch.ones(3)}, file)
    else:
        torch.save({"weight": torch.ones(3)}, file, _use_new_zipfile_serialization=False)
    assert read_run(file) is None


@pytest.mark.parametrize(
    "record",
    [
        *(5, [], {}),
        {**GOOD, "class_names": "abc"},
        {**GOOD, "versions": ["torch"]},
    ],
)
def test_refuses_malformed_record(tmp_path: Path, record: Any) -> None:
    write_checkpoint({"model": {"w": torch.ones(1)}, RUN: record}, tmp_path / "a.pth")
    with pytest.raises(WeightsError, match=r"a\.pth: its record of the run cannot be read"):
        read_run(tmp_path / "a.pth")


fork = multiprocessing.get_context("fork")


def content(iteration: int, numbers: int = 1000) -> dict[str, Any]:
    tensor = torch.from_numpy(np.full(numbers, iteration, np.float32))
    return {"model": {"w": tensor}, "optimizer": {"state": {}}, "iteration": iteration}


def point(folder: Path, name: str) -> None:
    Checkpointer(nn.Identity(), folder).tag_last_checkpoint(name)


def listing(folder: Path) -> dict[str, bytes]:
    return {file.name: file.read_bytes() for file in folder.iterdir()}


@contextlib.contextmanager
def largest_file(size: int) -> Iterator[None]:
    """Limit the size of files, so that a write fails as on a full disk."""
    before = resource.getrlimit(resource.RLIMIT_FSIZE)
    resource.setrlimit(resource.RLIMIT_FSIZE, (size, before[1]))
    try:
        yield
    finally:
        resource.setrlimit(resource.RLIMIT_FSIZE, before)


@pytest.mark.parametrize("share", [0.0, 0.9999])
@pytest.mark.parametrize("name", ["model_final.pth", "model_0000019.pth"])
def test_full_disk_changes_nothing(tmp_path: Path, name: str, share: float) -> None:
    write_checkpoint(content(9, 20_000), tmp_path / "model_final.pth")
    point(tmp_path, "model_final.pth")
    before = listing(tmp_path)
    size = len(before["model_final.pth"])
    with (
        largest_file(int(size * share)),
        pytest.raises(TrainingError, match="File too large") as caught,
    ):
        write_checkpoint(content(19, 20_000), tmp_path / name)
    assert name in str(caught.value) and str(tmp_path) in str(caught.value)
    assert "free there" in str(caught.value)
    assert listing(tmp_path) == before
    file = last_good(tmp_path)
    assert file is not None and read_training(file)["iteration"] == 9


def test_full_disk_keeps_the_name_of_the_last_checkpoint(tmp_path: Path) -> None:
    point(tmp_path, "model_0000009.pth")
    with largest_file(5), pytest.raises(TrainingError, match="last_checkpoint cannot be written"):
        point(tmp_path, "model_0000019.pth")
    assert listing(tmp_path) == {"last_checkpoint": b"model_0000009.pth"}


def test_names_a_folder_that_cannot_be_created(tmp_path: Path) -> None:
    (tmp_path / "file").write_text("")
    with pytest.raises(TrainingError, match=r"model_final\.pth cannot be written into .*file"):
        write_checkpoint(content(9), tmp_path / "file" / "model_final.pth")
    with pytest.raises(TrainingError, match="last_checkpoint cannot be written into"):
        point(tmp_path / "file", "a.pth")


class Anything:
    pass


@pytest.mark.parametrize(
    "value",
    [np.zeros(2), Path("x"), {"a": [Anything()]}, 2**3000],
    ids=["array", "path", "object", "int"],
)
def test_refuses_to_write_unreadable_content(tmp_path: Path, value: Any) -> None:
    write_checkpoint(content(9), tmp_path / "model_final.pth")
    before = listing(tmp_path)
    with pytest.raises(TrainingError, match="could not be read again"):
        write_checkpoint({**content(19), "hooks": value}, tmp_path / "model_final.pth")
    assert listing(tmp_path) == before


def test_content_error_is_not_a_full_disk(tmp_path: Path) -> None:
    with pytest.raises(Exception, match="pickle") as caught:
        write_checkpoint({**content(9), "hooks": lambda: None}, tmp_path / "model_final.pth")
    assert not isinstance(caught.value, TrainingError)
    assert listing(tmp_path) == {}


def test_converts_numpy_numbers(tmp_path: Path) -> None:
    state = {"best": np.float64(0.25), "of": [np.int64(3), (np.bool_(True), None)], 5: {"x": 1.5}}
    write_checkpoint({**content(9), "hooks": state}, tmp_path / "a.pth")
    found = read_content(tmp_path / "a.pth")["hooks"]
    assert found == {"best": 0.25, "of": [3, (True, None)], 5: {"x": 1.5}}
    assert type(found["best"]) is float and type(found["of"][0]) is int


# --- a forked process is killed while it saves ---


def start(work: Callable[..., None], *arguments: Any) -> multiprocessing.process.BaseProcess:
    process = fork.Process(target=work, args=arguments, daemon=True)
    process.start()
    return process


def save_killed_at(folder: Path, operation: int) -> None:
    """Save in the background and remove older ones; die before the given file operation."""
    counter = itertools.count()

    def count(event: str, arguments: tuple[Any, ...]) -> None:
        changes = event in ("os.rename", "os.remove", "open")
        if changes and str(arguments[0]).startswith(str(folder)) and next(counter) == operation:
            os.kill(os.getpid(), signal.SIGKILL)

    sys.addaudithook(count)
    checkpointer = Checkpointer(nn.Identity(), folder)
    checkpointer.keep = 1
    checkpointer.save("model_0000019", background=True, **content(19))
    checkpointer.wait()


def test_kill_between_any_two_operations_leaves_the_old_or_the_new(tmp_path: Path) -> None:
    good = tmp_path / "good"
    for iteration in (3, 6, 9):
        write_checkpoint(content(iteration), good / f"model_000000{iteration}.pth")
    point(good, "model_0000009.pth")
    found = []
    for operation in itertools.count():
        folder = tmp_path / f"killed {operation}"
        shutil.copytree(good, folder)
        process = start(save_killed_at, folder, operation)
        process.join()
        file = last_good(folder)
        assert file is not None
        for whole in folder.glob("*.pth"):
            state = read_training(whole)
            assert state["model"]["w"].unique().tolist() == [state["iteration"]]
        found.append(read_training(file)["iteration"])
        remove_leftovers(folder, "*")
        assert not list(folder.glob(".*"))
        if process.exitcode == 0:
            break
        assert process.exitcode == -signal.SIGKILL
    assert found == sorted(found) and set(found) == {9, 19} and len(found) > 6


def save_on_and_on(folder: Path, begin: int, done: Any) -> None:
    for iteration in itertools.count(begin):
        file = folder / f"model_{iteration:07d}.pth"
        write_checkpoint(content(iteration, 500_000), file)
        point(folder, file.name)
        done.value = iteration
        write_checkpoint(content(iteration, 500_000), folder / "model_final.pth")


def test_kills_at_random_moments_lose_nothing(tmp_path: Path) -> None:
    generator = random.Random(0)
    done = fork.Value("l", -1)
    for _ in range(6):
        process = start(save_on_and_on, tmp_path, done.value + 1, done)
        time.sleep(generator.uniform(0.03, 0.15))
        process.kill()
        process.join()
        file = last_good(tmp_path)
        if file is None:
            assert done.value == -1
            continue
        state = read_training(file)
        assert state["iteration"] >= done.value
        assert state["model"]["w"].unique().tolist() == [state["iteration"]]
        for whole in tmp_path.glob("*.pth"):
            read_training(whole)
        remove_leftovers(tmp_path, "*")
        assert not list(tmp_path.glob(".*"))
    assert done.value > 0
