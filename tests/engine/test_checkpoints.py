from __future__ import annotations

import multiprocessing
import os
import pickle
import socket
from collections.abc import Callable
from pathlib import Path
from threading import Event, Timer
from typing import Any

import pytest
import torch
from detectron2.checkpoint import DetectionCheckpointer
from detectron2.engine import HookBase, SimpleTrainer
from detectron2.engine import hooks as stock_hooks
from torch import nn

from resnext_det.checkpoint_file import write_checkpoint
from resnext_det.engine.checkpoints import Checkpointer, PeriodicCheckpointer, last_good
from resnext_det.errors import TrainingError, WeightsError

fork = multiprocessing.get_context("fork")


class Model(nn.Module):
    """Learns to halve its input."""

    def __init__(self, size: int = 3, seed: int = 0) -> None:
        super().__init__()
        generator = torch.Generator().manual_seed(seed)
        self.weight = nn.Parameter(torch.rand(size, size, generator=generator))

    def forward(self, data: torch.Tensor) -> torch.Tensor:
        return (self.weight @ data - data / 2).square().mean()


class Training:
    """A training of Detectron2's with this package's checkpointer, or the stock one."""

    def __init__(self, folder: Path, size: int = 3, seed: int = 0, kind: Any = Checkpointer):
        self.model = Model(size, seed)
        generator = torch.Generator().manual_seed(1)
        self.data = [torch.rand(size, generator=generator) for _ in range(200)]
        optimizer = torch.optim.SGD(self.model.parameters(), lr=0.1, momentum=0.9)
        self.trainer = SimpleTrainer(self.model, self.data, optimizer)
        self.checkpointer = kind(self.model, str(folder), trainer=self.trainer)

    def run(self, start: int, end: int, *hooks: HookBase) -> Training:
        self.trainer._data_loader_iter_obj = iter(self.data[start:])
        self.trainer.register_hooks(list(hooks))
        self.trainer.train(start, end)
        return self

    def state(self) -> list[float]:
        momentum = self.trainer.optimizer.state_dict()["state"][0]["momentum_buffer"]
        return [*self.model.weight.flatten().tolist(), *momentum.flatten().tolist()]


def names(folder: Path) -> set[str]:
    return {file.name for file in folder.iterdir()}


@pytest.fixture()
def folder(tmp_path: Path) -> Path:
    """A run of 7 iterations, saved after every second and at the end."""
    training = Training(tmp_path / "run")
    training.run(0, 7, PeriodicCheckpointer(training.checkpointer, 2))
    return tmp_path / "run"


def test_writes_what_stock_detectron2_writes(folder: Path, tmp_path: Path) -> None:
    stock = Training(tmp_path / "stock", kind=DetectionCheckpointer)
    (tmp_path / "stock").mkdir()
    stock.run(0, 7, stock_hooks.PeriodicCheckpointer(stock.checkpointer, 2))
    assert names(folder) == names(tmp_path / "stock")
    for name in names(folder) - {"last_checkpoint"}:
        mine, theirs = torch.load(folder / name), torch.load(tmp_path / "stock" / name)
        assert mine.keys() - theirs.keys() == {"resnext_det_run"}
        assert mine["iteration"] == theirs["iteration"]
        assert mine["trainer"]["iteration"] == theirs["trainer"]["iteration"]
        assert torch.equal(mine["model"]["weight"], theirs["model"]["weight"])
        assert mine["model"]._metadata == theirs["model"]._metadata  # versions of modules
    assert (folder / "last_checkpoint").read_text() == "model_final.pth"


@pytest.mark.parametrize(
    ("writes", "reads"),
    [(Checkpointer, DetectionCheckpointer), (DetectionCheckpointer, Checkpointer)],
)
def test_stock_detectron2_resumes_our_training_and_we_its(
    tmp_path: Path, writes: Any, reads: Any
) -> None:
    first = Training(tmp_path, kind=writes)
    first.run(0, 5, stock_hooks.PeriodicCheckpointer(first.checkpointer, 3))
    second = Training(tmp_path, seed=7, kind=reads)
    assert second.checkpointer.resume_or_load("", resume=True)["iteration"] == 4
    second.run(second.trainer.iter + 1, 9)
    assert second.state() == Training(tmp_path / "other").run(0, 9).state()


def test_resumes_the_one_before_a_damaged_one(
    folder: Path, caplog: pytest.LogCaptureFixture
) -> None:
    damaged = folder / "model_final.pth"
    damaged.write_bytes(damaged.read_bytes()[:-1])
    (folder / ".model_0000007.pth.0123abcd.partial").write_bytes(b"half")
    training = Training(folder, seed=7)
    training.checkpointer.add_checkpointable("average", nn.Linear(1, 1))
    resumed = training.checkpointer.resume()
    assert resumed is not None
    assert (resumed.file, resumed.iteration) == (folder / "model_0000005.pth", 5)
    assert "model_final.pth" in caplog.text and f"Using {resumed.file} instead" in caplog.text
    assert "has no average, which starts from scratch" in caplog.text
    assert (folder / "last_checkpoint").read_text() == "model_0000005.pth"
    training.run(6, 7, PeriodicCheckpointer(training.checkpointer, 2))
    assert training.state() == Training(folder).run(0, 7).state()
    assert not list(folder.glob(".*"))


def test_refuses_another_model_or_optimizer(folder: Path) -> None:
    other = Training(folder, size=4)
    before = other.model.weight.clone()
    with pytest.raises(WeightsError, match=r"another model.*\(3, 3\).*\(4, 4\)"):
        other.checkpointer.resume()
    assert torch.equal(other.model.weight, before)
    training = Training(folder)
    training.trainer.optimizer.add_param_group({"params": [nn.Parameter(torch.ones(1))]})
    with pytest.raises(
        TrainingError, match=r"model_final\.pth on .* cannot be resumed.*param.*group"
    ):
        training.checkpointer.resume()


def test_does_nothing_without_a_checkpoint(tmp_path: Path) -> None:
    training = Training(tmp_path / "missing")
    before = training.model.weight.clone()
    assert training.checkpointer.resume() is None
    assert last_good(tmp_path) is None
    assert torch.equal(training.model.weight, before) and not (tmp_path / "missing").exists()


def test_resumes_from_any_folder_name(tmp_path: Path) -> None:
    folder = tmp_path / "run?lr=1#ü %20"
    training = Training(folder).run(0, 1)
    training.checkpointer.save("model_final", iteration=0)
    assert Training(folder, seed=7).checkpointer.resume() is not None


def test_executes_nothing(tmp_path: Path) -> None:
    """Stock would execute a pickle, under either name."""

    class Hostile:
        def __reduce__(self) -> tuple[Any, ...]:
            return Path.mkdir, (tmp_path / "executed",)

    for name in ("model.pkl", "model.pth"):
        (tmp_path / name).write_bytes(pickle.dumps(Hostile()))
        (tmp_path / "last_checkpoint").write_text(name)
        checkpointer = Training(tmp_path).checkpointer
        with pytest.raises(TrainingError, match=name):
            checkpointer.resume()
        with pytest.raises(WeightsError, match=name):
            checkpointer.load(str(tmp_path / name))
    assert not (tmp_path / "executed").exists()


def test_keeps_the_newest_even_after_a_resume(tmp_path: Path) -> None:
    for name, iteration in {"model_0009999": 9999, "model_best": 2, "model_12": 12}.items():
        saved(tmp_path, iteration, name)
    first = Training(tmp_path)
    first.run(0, 7, PeriodicCheckpointer(first.checkpointer, 2, max_to_keep=2))
    others = {"model_0009999.pth", "model_best.pth", "model_12.pth", "model_final.pth"}
    others.add("last_checkpoint")
    assert names(tmp_path) == others | {"model_0000003.pth", "model_0000005.pth"}
    saved(tmp_path, 6)  # as after a signal
    second = Training(tmp_path)
    assert second.checkpointer.resume() is not None
    second.run(7, 9, PeriodicCheckpointer(second.checkpointer, 2, max_to_keep=2))
    assert names(tmp_path) == others | {"model_0000006.pth", "model_0000007.pth"}


# In the background.


class Failing(HookBase):
    """Calls a function in the iteration after `iteration`, and fails."""

    def __init__(self, iteration: int, function: Callable[[], None]) -> None:
        self._iteration = iteration
        self._function = function

    def after_step(self) -> None:
        if self.trainer.iter == self._iteration:
            self._function()
            raise KeyError


def test_background_write_has_the_content_of_its_time(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    whole = Training(tmp_path / "whole")
    whole.run(0, 4, stock_hooks.PeriodicCheckpointer(whole.checkpointer, 3))
    expected = (tmp_path / "whole" / "model_0000002.pth").read_bytes()
    go = Event()

    def late(content: Any, file: Path) -> None:
        assert go.wait(60)
        write_checkpoint(content, file)

    monkeypatch.setattr("resnext_det.engine.checkpoints.write_checkpoint", late)
    training = Training(tmp_path / "run")
    # Two updates later the training fails, while the checkpoint is still being written.
    fail = Failing(4, Timer(0.3, go.set).start)
    with pytest.raises(KeyError):
        training.run(0, 9, PeriodicCheckpointer(training.checkpointer, 3), fail)
    assert (tmp_path / "run" / "model_0000002.pth").read_bytes() == expected
    assert (tmp_path / "run" / "last_checkpoint").read_text() == "model_0000002.pth"


@pytest.mark.parametrize(("name", "before"), [("0000003", "0000001"), ("final", "0000005")])
def test_failed_background_write_ends_training(tmp_path: Path, name: str, before: str) -> None:
    (tmp_path / f"model_{name}.pth").mkdir()
    training = Training(tmp_path)
    with pytest.raises(TrainingError, match=rf"model_{name}\.pth cannot be written"):
        training.run(0, 7, PeriodicCheckpointer(training.checkpointer, 2, max_to_keep=1))
    assert last_good(tmp_path) == tmp_path / f"model_{before}.pth"
    assert len(list(tmp_path.glob("*.pth"))) == 2


# Which checkpoint to resume from.


def saved(folder: Path, iteration: int, name: str = "") -> Path:
    file = folder / f"{name or f'model_{iteration:07d}'}.pth"
    content = {"model": {"w": torch.ones(4)}, "optimizer": {}, "iteration": iteration}
    write_checkpoint(content, file)
    return file


def test_tries_the_tagged_one_first_and_then_the_newest(
    tmp_path: Path, caplog: pytest.LogCaptureFixture
) -> None:
    for iteration in (9, 19, 29):
        saved(tmp_path, iteration)
    saved(tmp_path, 24, "model_best")
    saved(tmp_path, 34, "model_final")
    saved(tmp_path, 99, "sub/model_0000099")
    write_checkpoint({"model": {"w": torch.ones(4)}}, tmp_path / "model_final_ema.pth")
    (tmp_path / ".model_0000039.pth").write_bytes(saved(tmp_path, 9).read_bytes())
    (tmp_path / "last_checkpoint").write_text("model_0000019.pth")
    for name in ("0000019", "final", "0000029", "best", "0000009"):
        file = tmp_path / f"model_{name}.pth"
        assert last_good(tmp_path) == file
        assert len(caplog.records) == 0 or f"Using {file} instead" in caplog.text
        file.write_bytes(file.read_bytes()[:-100])
    with pytest.raises(TrainingError) as caught:
        last_good(tmp_path)
    for name in ("0000019", "final", "0000029", "best", "0000009"):
        assert f"model_{name}.pth" in str(caught.value)


@pytest.mark.parametrize(
    "text",
    ["../outside/model_0000099.pth", "{outside}", "model_0000029.pth", "", "\0\n\xff", "x" * 10**7],
)
def test_the_tag_is_a_name_and_never_a_path(
    tmp_path: Path, text: str, caplog: pytest.LogCaptureFixture
) -> None:
    outside = saved(tmp_path / "outside", 99)
    run = tmp_path / "run"
    good = saved(run, 9)
    (run / "last_checkpoint").write_text(text.replace("{outside}", str(outside)), "latin1")
    assert last_good(run) == good
    assert "last_checkpoint names" in caplog.text and f"Using {good} instead" in caplog.text
    assert len(caplog.text) < 10_000
    good.unlink()
    with pytest.raises(TrainingError, match="which does not exist"):
        last_good(run)


# Several processes. Forked, as starting each from scratch would take seconds.


def resume_together(rank: int, folder: Path, answers: Any) -> None:
    torch.distributed.init_process_group(
        "gloo", init_method=f"file://{folder}/meeting", rank=rank, world_size=2
    )

    def answer(place: Path) -> Any:
        training = Training(place, seed=rank)
        try:
            resumed = training.checkpointer.resume()
        except (TrainingError, WeightsError) as error:
            return type(error).__name__, str(error)
        if resumed is None:
            return None
        training.checkpointer.save(f"by_{rank}", iteration=0)
        return resumed.file.name, resumed.iteration, training.model.weight.tolist()

    os.chdir(folder)
    found = [answer(Path(name)) for name in ("good", "damaged", "empty")]
    os.chdir(folder / ("empty" if rank == 1 else ""))  # like a machine with a disk of its own
    found += [answer(Path("good")), answer(Path("other"))]
    answers.put((rank, found))
    torch.distributed.destroy_process_group()


def test_all_processes_resume_from_the_same_checkpoint(folder: Path) -> None:
    (folder / "model_final.pth").write_bytes(b"damaged")
    meeting = folder.parent
    folder.rename(meeting / "good")
    (meeting / "empty").mkdir()
    (meeting / "damaged").mkdir()
    for place, seed in ((meeting, 3), (meeting / "empty", 4)):  # of the same name, size and shapes
        Training(place / "other", seed=seed).run(0, 1).checkpointer.save("model", iteration=0)
    (meeting / "damaged" / "model_0000001.pth").write_bytes(b"damaged")
    answers = fork.Queue()
    processes = [
        fork.Process(target=resume_together, args=(rank, meeting, answers), daemon=True)
        for rank in (0, 1)
    ]
    for process in processes:
        process.start()
    found = dict(answers.get(timeout=60) for _ in processes)
    for process in processes:
        process.join()
    assert found[0] == found[1]
    good, damaged, empty, unseen, other = found[0]
    expected = torch.load(meeting / "good" / "model_0000005.pth")["model"]["weight"]
    assert good == ("model_0000005.pth", 5, expected.tolist())
    assert damaged[0] == "TrainingError" and "model_0000001.pth" in damaged[1]
    assert empty is None
    host = socket.gethostname()
    assert unseen[0] == "TrainingError" and f"on {host} cannot be resumed by rank 1" in unseen[1]
    assert f"rank 1 of 2: it is another file than on {host}." in other[1]
    assert (meeting / "good" / "by_0.pth").is_file()
    assert not (meeting / "good" / "by_1.pth").exists()  # only the main process writes
