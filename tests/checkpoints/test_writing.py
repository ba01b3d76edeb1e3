from __future__ import annotations

import contextlib
import itertools
import multiprocessing
import os
import random
import resource
import shutil
import signal
import subprocess
import sys
import time
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch

from resnext_det.checkpoints.folder import last_good, name_last, prune
from resnext_det.checkpoints.reading import read_content, read_verified
from resnext_det.checkpoints.writing import (
    export_weights,
    remove_leftovers,
    write_checkpoint,
    write_text,
)
from resnext_det.errors import TrainingError
from resnext_det.pretrained.readers import read_tensors

fork = multiprocessing.get_context("fork")


def content(iteration: int, numbers: int = 1000) -> dict[str, Any]:
    tensor = torch.from_numpy(np.full(numbers, iteration, np.float32))
    return {"model": {"w": tensor}, "optimizer": {"state": {}}, "iteration": iteration}


def listing(folder: Path) -> dict[str, bytes]:
    return {file.name: file.read_bytes() for file in folder.iterdir()}


@contextlib.contextmanager
def largest_file(size: int) -> Iterator[None]:
    """Files cannot grow beyond a size: the write that would is cut short, and the next one fails.

    Python ignores the signal that comes with it, and sees an error as of a full disk.
    """
    before = resource.getrlimit(resource.RLIMIT_FSIZE)
    resource.setrlimit(resource.RLIMIT_FSIZE, (size, before[1]))
    try:
        yield
    finally:
        resource.setrlimit(resource.RLIMIT_FSIZE, before)


def test_the_checksum_is_one_that_sha256sum_checks(tmp_path: Path) -> None:
    write_checkpoint(content(9), tmp_path / "model_final.pth")
    write_checkpoint(content(19), tmp_path / "model_final.pth")
    command = ["sha256sum", "-c", "model_final.pth.sha256"]
    result = subprocess.run(command, cwd=tmp_path, capture_output=True, text=True)
    assert result.stdout == "model_final.pth: OK\n"
    assert sorted(listing(tmp_path)) == ["model_final.pth", "model_final.pth.sha256"]
    loaded = torch.load(tmp_path / "model_final.pth", weights_only=True)
    assert loaded["iteration"] == 19 and loaded["model"]["w"].unique().tolist() == [19]


@pytest.mark.parametrize("share", [0.0, 0.3, 0.9, 0.9999])
@pytest.mark.parametrize("name", ["model_final.pth", "model_0000019.pth"])
def test_a_full_disk_leaves_everything_as_it_was(tmp_path: Path, name: str, share: float) -> None:
    write_checkpoint(content(9, 20_000), tmp_path / "model_final.pth")
    name_last(tmp_path, "model_final.pth")
    before = listing(tmp_path)
    size = len(before["model_final.pth"])
    with (
        largest_file(int(size * share)),
        pytest.raises(TrainingError, match=r"File too large.*needs 79\.. KiB|0\.1 MiB") as caught,
    ):
        write_checkpoint(content(19, 20_000), tmp_path / name)
    assert name in str(caught.value) and str(tmp_path) in str(caught.value)
    assert "free there" in str(caught.value)
    assert listing(tmp_path) == before
    file = last_good(tmp_path)
    assert file is not None and read_verified(file)["iteration"] == 9


def test_a_full_disk_leaves_the_name_of_the_last_checkpoint(tmp_path: Path) -> None:
    name_last(tmp_path, "model_0000009.pth")
    with largest_file(5), pytest.raises(TrainingError, match="last_checkpoint cannot be written"):
        name_last(tmp_path, "model_0000019.pth")
    assert listing(tmp_path) == {"last_checkpoint": b"model_0000009.pth"}


def test_a_folder_that_cannot_be_is_named(tmp_path: Path) -> None:
    (tmp_path / "file").write_text("")
    with pytest.raises(TrainingError, match=r"model_final\.pth cannot be written into .*file"):
        write_checkpoint(content(9), tmp_path / "file" / "model_final.pth")
    with pytest.raises(TrainingError, match="text cannot be written into"):
        write_text("", tmp_path / "file" / "text")


def test_a_folder_is_made(tmp_path: Path) -> None:
    file = tmp_path / "a run?b=1 #ü" / "output" / "model_final.pth"
    write_checkpoint(content(9), file)
    assert read_verified(file)["iteration"] == 9


class Anything:
    pass


@pytest.mark.parametrize(
    "value", [np.zeros(2), Anything(), Path("x"), {"a": [Anything()]}, 2**3000]
)
def test_what_could_not_be_read_again_is_not_written(tmp_path: Path, value: Any) -> None:
    write_checkpoint(content(9), tmp_path / "model_final.pth")
    before = listing(tmp_path)
    with pytest.raises(TrainingError, match=r"holds .*(ndarray|Anything|Path|not know)"):
        write_checkpoint({**content(19), "hooks": value}, tmp_path / "model_final.pth")
    assert listing(tmp_path) == before


def test_an_error_of_the_content_is_no_full_disk(tmp_path: Path) -> None:
    with pytest.raises(Exception, match="pickle") as caught:
        write_checkpoint({**content(9), "hooks": lambda: None}, tmp_path / "model_final.pth")
    assert not isinstance(caught.value, TrainingError)
    assert listing(tmp_path) == {}


def test_numbers_of_numpy_become_pythons(tmp_path: Path) -> None:
    state = {"best": np.float64(0.25), "of": [np.int64(3), (np.bool_(True), None)], 5: {"x": 1.5}}
    write_checkpoint({**content(9), "hooks": state}, tmp_path / "a.pth")
    found = read_content(tmp_path / "a.pth")["hooks"]
    assert found == {"best": 0.25, "of": [3, (True, None)], 5: {"x": 1.5}}
    assert type(found["best"]) is float and type(found["of"][0]) is int


def test_weights_alone_are_read_by_others(tmp_path: Path) -> None:
    model = torch.nn.Linear(3, 2)
    export_weights(model.state_dict(), tmp_path / "model_final_ema.pth")
    read = read_tensors(tmp_path / "model_final_ema.pth")
    assert {name: tensor.tolist() for name, tensor in read.items()} == {
        name: tensor.tolist() for name, tensor in model.state_dict().items()
    }
    assert last_good(tmp_path) is None
    stock = torch.load(tmp_path / "model_final_ema.pth", weights_only=True)
    assert list(stock) == ["model"]


def test_only_half_files_are_removed(tmp_path: Path) -> None:
    halves = [".a.pth.partial", ".a.pth.sha256.partial", ".last_checkpoint.partial"]
    others = ["a.pth", "a.pth.sha256", ".metrics.json.partial", "x.partial", "last_checkpoint"]
    for name in halves + others:
        (tmp_path / name).write_text("")
    remove_leftovers(tmp_path)
    assert sorted(listing(tmp_path)) == sorted(others)


# Kills. A forked process saves, and is killed for good.


def start(work: Callable[..., None], *arguments: Any) -> multiprocessing.process.BaseProcess:
    process = fork.Process(target=work, args=arguments, daemon=True)
    process.start()
    return process


def save_killed_at(folder: Path, operation: int) -> None:
    """Save over what is there, and remove an older one; end before a file operation in it."""
    counter = itertools.count()

    def count(event: str, arguments: tuple[Any, ...]) -> None:
        changes = event in ("os.rename", "os.remove", "open")
        if changes and str(arguments[0]).startswith(str(folder)) and next(counter) == operation:
            os.kill(os.getpid(), signal.SIGKILL)

    sys.addaudithook(count)
    write_checkpoint(content(19), folder / "model_final.pth")
    name_last(folder, "model_final.pth")
    prune(folder, 1)


def test_a_kill_between_any_two_operations_leaves_the_old_or_the_new(tmp_path: Path) -> None:
    good = tmp_path / "good"
    for name, iteration in {"model_0000003.pth": 3, "model_0000006.pth": 6}.items():
        write_checkpoint(content(iteration), good / name)
    write_checkpoint(content(9), good / "model_final.pth")
    name_last(good, "model_final.pth")
    found = []
    for operation in itertools.count():
        folder = tmp_path / f"killed {operation}"
        shutil.copytree(good, folder)
        process = start(save_killed_at, folder, operation)
        process.join()
        file = last_good(folder)
        assert file == folder / "model_final.pth"
        for whole in folder.glob("*.pth"):  # no file is beside the checksum of another one
            state = read_verified(whole)
            assert state["model"]["w"].unique().tolist() == [state["iteration"]]
        for checksum in folder.glob("*.sha256"):  # and none waits for another file
            assert checksum.with_suffix("").exists()
        found.append(read_verified(file)["iteration"])
        remove_leftovers(folder)
        assert not list(folder.glob(".*"))
        if process.exitcode == 0:
            break
        assert process.exitcode == -signal.SIGKILL
    assert found == sorted(found) and set(found) == {9, 19} and len(found) > 10
    assert not (folder / "model_0000003.pth").exists()


def save_on_and_on(folder: Path, begin: int, done: Any) -> None:
    for iteration in itertools.count(begin):
        file = folder / f"model_{iteration:07d}.pth"
        write_checkpoint(content(iteration, 500_000), file)
        name_last(folder, file.name)
        done.value = iteration
        write_checkpoint(content(iteration, 500_000), folder / "model_final.pth")
        prune(folder, 2)


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
        state = read_verified(file)
        assert state["iteration"] >= done.value
        assert state["model"]["w"].unique().tolist() == [state["iteration"]]
        for whole in tmp_path.glob("*.pth"):
            read_verified(whole)
        remove_leftovers(tmp_path)
        assert not list(tmp_path.glob(".*"))
    assert done.value > 0
