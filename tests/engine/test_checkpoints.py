from __future__ import annotations

import multiprocessing
import os
import pickle
from pathlib import Path
from typing import Any

import pytest
import torch
from detectron2.checkpoint import DetectionCheckpointer
from detectron2.engine import HookBase, SimpleTrainer
from detectron2.engine.hooks import PeriodicCheckpointer
from torch import nn

from resnext_det.checkpoint_file import read_training, write_checkpoint
from resnext_det.engine.checkpoints import (
    Checkpointer,
    Checkpoints,
    _candidates,
    last_good,
)
from resnext_det.errors import ConfigError, TrainingError, WeightsError

fork = multiprocessing.get_context("fork")


class Model(nn.Module):
    """Learns to halve its input, and says how far it is from that."""

    def __init__(self, size: int = 3, seed: int = 0) -> None:
        super().__init__()
        generator = torch.Generator().manual_seed(seed)
        self.weight = nn.Parameter(torch.rand(size, size, generator=generator))

    def forward(self, data: torch.Tensor) -> torch.Tensor:
        return (self.weight @ data - data / 2).square().mean()


class Training:
    """A training of Detectron2's with a checkpointer, this package's or stock."""

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


def periodic(*iterations: int) -> set[str]:
    return {f"model_{iteration:07d}.pth" for iteration in iterations}


LAST = {"last_checkpoint", "model_final.pth"}


@pytest.fixture()
def folder(tmp_path: Path) -> Path:
    """A run of 8 iterations, saved after every second and at the end."""
    training = Training(tmp_path / "run")
    training.run(0, 8, Checkpoints(training.checkpointer, 2))
    return tmp_path / "run"


def test_names_and_contents_are_those_of_stock_detectron2(folder: Path, tmp_path: Path) -> None:
    """But for the last iteration, which stock writes twice."""
    stock = Training(tmp_path / "stock", kind=DetectionCheckpointer)
    (tmp_path / "stock").mkdir()
    stock.run(0, 8, PeriodicCheckpointer(stock.checkpointer, 2))
    ours = names(folder)
    assert names(tmp_path / "stock") - ours == {"model_0000007.pth"}
    assert ours == names(tmp_path / "stock") - {"model_0000007.pth"}
    for name in sorted(ours - {"last_checkpoint"}):
        mine, theirs = torch.load(folder / name), torch.load(tmp_path / "stock" / name)
        assert mine.keys() - theirs.keys() == {"resnext_det_run"}
        assert mine["iteration"] == theirs["iteration"]
        assert mine["trainer"]["iteration"] == theirs["trainer"]["iteration"]
        assert torch.equal(mine["model"]["weight"], theirs["model"]["weight"])
        assert mine["model"]._metadata == theirs["model"]._metadata  # versions of modules
    pointer = (folder / "last_checkpoint").read_text()
    assert pointer == (tmp_path / "stock" / "last_checkpoint").read_text() == "model_final.pth"


@pytest.mark.parametrize("writes", [Checkpointer, DetectionCheckpointer])
@pytest.mark.parametrize("reads", [Checkpointer, DetectionCheckpointer])
def test_a_resumed_training_ends_as_one_that_was_not_interrupted(
    tmp_path: Path, writes: Any, reads: Any
) -> None:
    """Stock Detectron2 goes on from these files, and this package from stock ones."""
    first = Training(tmp_path, kind=writes)
    first.run(0, 5, PeriodicCheckpointer(first.checkpointer, 3))
    second = Training(tmp_path, seed=7, kind=reads)
    assert second.checkpointer.resume_or_load("", resume=True)["iteration"] == 4
    assert second.checkpointer.has_checkpoint()
    second.run(second.trainer.iter + 1, 9)
    assert second.state() == Training(tmp_path / "other").run(0, 9).state()


def test_a_damaged_last_one_costs_the_iterations_since_the_one_before(
    folder: Path, caplog: pytest.LogCaptureFixture
) -> None:
    damaged = folder / "model_final.pth"
    damaged.write_bytes(damaged.read_bytes()[:-1])
    (folder / ".model_0000007.pth.0123abcd.partial").write_bytes(b"half")
    training = Training(folder, seed=7)
    resumed = training.checkpointer.resume()
    assert resumed is not None
    assert (resumed.file, resumed.iteration) == (folder / "model_0000005.pth", 5)
    assert training.trainer.iter == 5
    assert "model_final.pth" in caplog.text and "model_0000005.pth is used instead" in caplog.text
    assert (folder / "last_checkpoint").read_text() == "model_0000005.pth"
    assert not list(folder.glob(".*"))
    training.run(6, 8, Checkpoints(training.checkpointer, 2))
    assert training.state() == Training(folder).run(0, 8).state()
    assert "earlier training" not in caplog.text


def test_another_file_can_be_loaded_after_a_resume(folder: Path) -> None:
    training = Training(folder, seed=7)
    assert training.checkpointer.resume() is not None
    assert training.checkpointer.load(str(folder / "model_0000001.pth"))["iteration"] == 1
    expected = torch.load(folder / "model_0000001.pth")["model"]["weight"]
    assert torch.equal(training.model.weight, expected)


def test_it_loads_what_detectron2_loads(tmp_path: Path) -> None:
    """A bare state dict, its own pickles, and names that only its heuristics match."""
    weight = Model(seed=3).weight.detach()
    torch.save({"weight": weight}, tmp_path / "bare.pth")
    zoo = {"model": {"weight": weight.numpy()}, "__author__": "Detectron2"}
    (tmp_path / "zoo.pkl").write_bytes(pickle.dumps(zoo))
    for name in ("bare.pth", "bare.pth?matching_heuristics=True", "zoo.pkl"):
        found = []
        for kind in (Checkpointer, DetectionCheckpointer):
            model = Model()
            # Detectron2's heuristics match a name that ends in the file's.
            part = nn.ModuleDict({"student": model}) if "?" in name else model
            kind(part, str(tmp_path / "run")).load(str(tmp_path / name))
            found.append(model.weight.detach())
        assert torch.equal(found[0], weight) and torch.equal(found[1], weight), name
    checkpointer = Checkpointer(Model())
    for _ in range(2):  # an error leaves it usable
        with pytest.raises(ValueError, match="Unsupported query"):
            checkpointer.load(str(tmp_path / "bare.pth?heuristics=True"))
    checkpointer.load(str(tmp_path / "bare.pth"))
    assert torch.equal(checkpointer.model.weight, weight)


def test_nothing_to_resume_changes_nothing(tmp_path: Path) -> None:
    training = Training(tmp_path / "missing")
    before = training.model.weight.clone()
    assert training.checkpointer.resume() is None
    assert training.checkpointer.resume_or_load("", resume=True) == {}
    assert Checkpointer(Model()).resume() is None
    assert torch.equal(training.model.weight, before) and not (tmp_path / "missing").exists()


def test_a_checkpoint_of_another_model_is_refused(folder: Path) -> None:
    other = Training(folder, size=4)
    before = other.model.weight.clone()
    with pytest.raises(WeightsError, match=r"another model.*\(3, 3\).*\(4, 4\)"):
        other.checkpointer.resume()
    assert torch.equal(other.model.weight, before)


def test_one_of_another_optimizer_is_refused(folder: Path) -> None:
    training = Training(folder)
    training.trainer.optimizer.add_param_group({"params": [nn.Parameter(torch.ones(1))]})
    with pytest.raises(TrainingError, match=r"model_final\.pth cannot be resumed.*param.*group"):
        training.checkpointer.resume()


def test_what_a_checkpoint_lacks_begins_anew(
    folder: Path, caplog: pytest.LogCaptureFixture
) -> None:
    training = Training(folder)
    training.checkpointer.add_checkpointable("average", nn.Linear(1, 1))
    assert training.checkpointer.resume() is not None
    assert "model_final.pth holds no average" in caplog.text


def test_any_folder_name_is_resumed_from(tmp_path: Path) -> None:
    """Detectron2 takes a path for an address, and what follows a question mark off."""
    folder = tmp_path / "run?lr=1#ü %20"
    training = Training(folder).run(0, 1)
    training.checkpointer.save("model_final", iteration=0)
    assert Training(folder, seed=7).checkpointer.resume() is not None


def test_a_hostile_pickle_is_not_loaded(tmp_path: Path) -> None:
    """Stock would execute what a file named .pkl says."""

    class Hostile:
        def __reduce__(self) -> tuple[Any, ...]:
            return Path.mkdir, (tmp_path / "executed",)

    (tmp_path / "model.pkl").write_bytes(pickle.dumps(Hostile()))
    (tmp_path / "last_checkpoint").write_text("model.pkl")
    checkpointer = Training(tmp_path).checkpointer
    assert checkpointer.get_checkpoint_file() == ""
    with pytest.raises(TrainingError, match=r"model\.pkl"):
        checkpointer.resume_or_load("", resume=True)
    with pytest.raises(WeightsError, match=r"model\.pkl"):
        checkpointer.load(str(tmp_path / "model.pkl"))
    assert not (tmp_path / "executed").exists()


def test_a_process_that_does_not_save_touches_nothing(folder: Path) -> None:
    (folder / ".model_0000007.pth.0123abcd.partial").write_bytes(b"of another process")
    before = {file: file.read_bytes() for file in folder.iterdir()}
    reader = Checkpointer(Model(), folder, save_to_disk=False, trainer=Training(folder).trainer)
    (folder / "model_final.pth").write_bytes(b"")
    before[folder / "model_final.pth"] = b""
    reader.save("model_best", iteration=7)
    reader.prune(1)
    assert reader.resume() is not None
    assert {file: file.read_bytes() for file in folder.iterdir()} == before


@pytest.mark.parametrize("name", ["../model", "a/b", "", ".", "a\nb", ".hidden"])
def test_a_name_that_is_a_path_is_refused(tmp_path: Path, name: str) -> None:
    with pytest.raises(ValueError, match="letters, digits"):
        Training(tmp_path).checkpointer.save(name)
    assert names(tmp_path) == set()


# The hook.


def test_the_hook_keeps_the_newest(tmp_path: Path) -> None:
    training = Training(tmp_path)
    training.run(0, 9, Checkpoints(training.checkpointer, 2, keep=2))
    assert names(tmp_path) == LAST | periodic(5, 7)


def test_the_hook_writes_nothing_twice(tmp_path: Path, caplog: pytest.LogCaptureFixture) -> None:
    caplog.set_level("INFO", "resnext_det")
    training = Training(tmp_path)
    saver = Checkpoints(training.checkpointer, 2)

    class Asks(HookBase):
        def after_step(self) -> None:
            if self.trainer.iter in (1, 2, 3, 5):
                saver.save_now()
                saver.save_now()
            if self.trainer.iter == 5:
                saver.save_final()

    training.run(0, 6, saver, Asks())
    saved = [record.args[0].name for record in caplog.records if record.msg == "saved %s"]
    assert saved == [f"model_{i:07d}.pth" for i in (1, 2, 3)] + ["model_final.pth"]
    for name in saved:
        state = read_training(tmp_path / name)
        assert state["iteration"] == state["trainer"]["iteration"]


def test_a_training_that_ends_early_has_a_final_checkpoint(tmp_path: Path) -> None:
    training = Training(tmp_path)
    saver = Checkpoints(training.checkpointer, 2)

    class Ends(HookBase):
        def after_step(self) -> None:
            if self.trainer.iter == 3:
                saver.save_final()
                raise KeyboardInterrupt

    with pytest.raises(KeyboardInterrupt):
        training.run(0, 6, saver, Ends())
    assert names(tmp_path) == LAST | periodic(1, 3)
    resumed = Training(tmp_path).checkpointer.resume()
    assert resumed is not None and resumed.iteration == 3


def test_the_hook_tells_of_an_earlier_training(
    folder: Path, caplog: pytest.LogCaptureFixture
) -> None:
    again = Training(folder)
    (folder / ".model_0000099.pth.0123abcd.partial").write_bytes(b"half")
    again.run(0, 3, Checkpoints(again.checkpointer, 1, keep=1))
    assert "earlier training" in caplog.text and "model_0000005.pth" in caplog.text
    # Its own: 1 (its final one is 2). Of the earlier: 3 and 5, which are newer by number.
    assert names(folder) == LAST | periodic(1, 3, 5)


@pytest.mark.parametrize(("period", "keep"), [(0, 1), (-5, 1), (5, -1)])
def test_settings_without_a_meaning_are_refused(tmp_path: Path, period: int, keep: int) -> None:
    with pytest.raises(ConfigError, match=r"CHECKPOINT_PERIOD is|KEEP_LAST is"):
        Checkpoints(Training(tmp_path).checkpointer, period, keep)


# Which one to resume from, and which to remove.


def saved(folder: Path, iteration: int, name: str = "") -> Path:
    file = folder / f"{name or f'model_{iteration:07d}'}.pth"
    content = {"model": {"w": torch.ones(4)}, "optimizer": {}, "iteration": iteration}
    write_checkpoint(content, file)
    return file


def order_of(folder: Path) -> list[str]:
    return [file.name for file in _candidates(folder)]


def point(folder: Path, name: str) -> None:
    Checkpointer(Model(), folder).tag_last_checkpoint(name)


def test_the_last_one_comes_first_then_the_newest(tmp_path: Path) -> None:
    for iteration in (9, 19, 29):
        saved(tmp_path, iteration)
    saved(tmp_path, 24, "model_best")
    saved(tmp_path, 34, "model_final")
    saved(tmp_path, 99, "sub/model_0000099")
    write_checkpoint({"model": {"w": torch.ones(4)}}, tmp_path / "model_final_ema.pth")
    (tmp_path / ".model_0000039.pth").write_bytes(saved(tmp_path, 9).read_bytes())
    order = ["model_final", "model_0000029", "model_best", "model_0000019", "model_0000009"]
    assert order_of(tmp_path) == [f"{name}.pth" for name in order]
    point(tmp_path, "model_0000019.pth")
    first = order.pop(3)
    assert order_of(tmp_path) == [f"{name}.pth" for name in (first, *order)]
    assert last_good(tmp_path) == tmp_path / "model_0000019.pth"


def test_damaged_ones_are_skipped_with_a_warning(
    tmp_path: Path, caplog: pytest.LogCaptureFixture
) -> None:
    files = [saved(tmp_path, iteration) for iteration in (9, 19, 29)]
    point(tmp_path, files[2].name)
    for file in files[1:]:
        file.write_bytes(file.read_bytes()[:-100])
    assert last_good(tmp_path) == files[0]
    assert [record.levelname for record in caplog.records] == ["WARNING", "WARNING"]
    for record, file in zip(caplog.records, [files[2], files[1]]):
        text = record.getMessage()
        assert f"{file} cannot be read" in text and f"{files[0]} is used instead" in text


def test_none_good_is_an_error_that_names_them_all(tmp_path: Path) -> None:
    for iteration in (9, 19):
        saved(tmp_path, iteration).write_bytes(b"")
    point(tmp_path, "model_0000029.pth")
    with pytest.raises(TrainingError) as caught:
        last_good(tmp_path)
    for name in ("model_0000009.pth", "model_0000019.pth", "model_0000029.pth"):
        assert name in str(caught.value)


def test_a_folder_without_checkpoints_has_none(tmp_path: Path) -> None:
    for folder in (tmp_path, tmp_path / "missing"):
        assert last_good(folder) is None


@pytest.mark.parametrize(
    "text",
    ["../outside/model_0000099.pth", "{outside}", "model_0000029.pth", "..", "", "\0\n\xff", "/"],
)
def test_the_name_of_the_last_one_is_not_followed_elsewhere(
    tmp_path: Path, text: str, caplog: pytest.LogCaptureFixture
) -> None:
    outside = saved(tmp_path / "outside", 99)
    run = tmp_path / "run"
    good = saved(run, 9)
    text = text.replace("{outside}", str(outside))
    (run / "last_checkpoint").write_text(text, encoding="latin1")
    assert last_good(run) == good
    assert "last_checkpoint names" in caplog.text and "is used instead" in caplog.text
    good.unlink()
    with pytest.raises(TrainingError, match="which does not exist"):
        last_good(run)


def test_a_name_of_any_length_is_looked_at_in_part(tmp_path: Path) -> None:
    saved(tmp_path, 9)
    (tmp_path / "last_checkpoint").write_text("x" * 10_000_000)
    assert last_good(tmp_path) == tmp_path / "model_0000009.pth"


def test_the_oldest_are_removed(tmp_path: Path) -> None:
    for iteration in (9, 19, 29, 39, 10_000_009):
        saved(tmp_path, iteration)
    others = ["model_final", "model_best", "model_12", "my_model_0000001", "model_0000001_ema"]
    for name in others:
        saved(tmp_path, 1, name)
    point(tmp_path, "model_0000009.pth")
    Checkpointer(Model(), tmp_path).prune(0)
    assert len(list(tmp_path.glob("*.pth"))) == 10
    Checkpointer(Model(), tmp_path).prune(2, ["model_0000019"])
    left = {f"{name}.pth" for name in others}
    left |= {f"model_{iteration:07d}.pth" for iteration in (9, 19, 39, 10_000_009)}
    assert {file.name for file in tmp_path.glob("*.pth")} == left


def test_those_of_an_earlier_training_neither_count_nor_go(tmp_path: Path) -> None:
    files = [saved(tmp_path, iteration) for iteration in (9, 19, 29, 39, 89999)]
    Checkpointer(Model(), tmp_path).prune(2, up_to=29)
    assert [file.exists() for file in files] == [False, True, True, True, True]


# Several processes. Forked, as starting each anew would take seconds.


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
        return resumed.file.name, resumed.iteration, training.model.weight.tolist()

    os.chdir(folder)
    found = [answer(Path(name)) for name in ("good", "damaged", "empty")]
    os.chdir(folder / ("empty" if rank == 1 else ""))  # as a machine with a disk of its own
    answers.put((rank, [*found, answer(Path("good"))]))
    torch.distributed.destroy_process_group()


def test_all_processes_go_on_from_the_same_checkpoint(folder: Path) -> None:
    (folder / "model_final.pth").write_bytes(b"damaged")
    meeting = folder.parent
    folder.rename(meeting / "good")
    (meeting / "empty").mkdir()
    (meeting / "damaged").mkdir()
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
    good, damaged, empty, unseen = found[0]
    expected = torch.load(meeting / "good" / "model_0000005.pth")["model"]["weight"]
    assert good == ("model_0000005.pth", 5, expected.tolist())
    assert damaged[0] == "TrainingError" and "model_0000001.pth" in damaged[1]
    assert empty is None
    assert unseen[0] == "TrainingError" and "by rank 1 of 2" in unseen[1]
