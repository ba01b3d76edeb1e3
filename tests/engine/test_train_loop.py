from __future__ import annotations

import copy
import itertools
import json
import logging
import math
import os
import signal
import subprocess
import sys
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest
import torch
from detectron2.engine import SimpleTrainer
from detectron2.utils import comm
from detectron2.utils.events import EventStorage
from torch import Tensor, nn

from resnext_det.data.stream import Share
from resnext_det.engine.stopping import SIGNALS, Abandoned
from resnext_det.engine.train_loop import Arithmetic, Batch, TrainLoop, distributed, shared_seed
from resnext_det.errors import ConfigError, TrainingError

IMAGES = torch.randn(4096, 3, dtype=torch.float64, generator=torch.Generator().manual_seed(1))


class Detector(nn.Module):
    """Two losses of a linear layer, one of them random, as a sampling of proposals is."""

    def __init__(self) -> None:
        super().__init__()
        self.layer = nn.Linear(3, 2, dtype=torch.float64)
        nn.init.constant_(self.layer.weight, 0.1)
        nn.init.zeros_(self.layer.bias)

    def forward(self, batch: Batch) -> dict[str, Tensor]:
        images = torch.stack([IMAGES[each["number"]] for each in batch])
        found = self.layer(images)
        chosen = torch.rand(len(batch), dtype=torch.float64) < 0.5
        wrong = float("nan") if any(each.get("broken") for each in batch) else 1.0
        return {
            "loss_box": (found[:, 0] - 1).square().mean() * wrong,
            "loss_class": ((found[:, 1] + 1).square() * chosen).mean(),
        }


def numbers(share: Share, start: int, broken: tuple[int, ...] = ()) -> Iterator[Batch]:
    """Image numbers as a function of update and stream, as the real data is."""
    for update in itertools.count(start):
        for stream in share.streams:
            total = share.processes * share.micro_batches
            first = (update * total + stream) * share.images
            batch = [
                {"number": n, "file_name": f"{n}.jpg"} for n in range(first, first + share.images)
            ]
            yield [{**each, "broken": each["number"] in broken} for each in batch]


def loop(
    share: Share = Share(0, 1, 1, 4),
    *,
    folder: Path = Path(),
    broken: tuple[int, ...] = (),
    seed: int = 3,
    rate: float = 0.1,
    **more: Any,
) -> TrainLoop:
    model = Detector()
    optimizer = torch.optim.SGD(model.parameters(), lr=rate, momentum=0.9)
    data = lambda _, start: numbers(share, start, broken)  # noqa: E731
    return TrainLoop(model, data, optimizer, share, seed, folder, Arithmetic(**more))


def run(trained: TrainLoop, updates: range) -> EventStorage:
    with EventStorage(updates.start) as storage:
        for trained.iter in updates:
            storage.iter = trained.iter
            trained.run_step()
    return storage


def weights(trained: TrainLoop) -> Tensor:
    return torch.cat([each.detach().flatten() for each in trained.model.parameters()])


def test_one_micro_batch_is_detectron2s_own_update() -> None:
    """Without anything random in the losses, SimpleTrainer is the truth."""

    class Plain(Detector):
        def forward(self, batch: Batch) -> dict[str, Tensor]:
            return {"loss_box": super().forward(batch)["loss_box"]}

    share, models = Share(0, 1, 1, 4), (Plain(), Plain())
    optimizers = [torch.optim.SGD(model.parameters(), lr=0.1, momentum=0.9) for model in models]
    stock = SimpleTrainer(models[0], list(itertools.islice(numbers(share, 0), 5)), optimizers[0])
    ours = TrainLoop(
        models[1], lambda _, start: numbers(share, start), optimizers[1], share, 0, Path()
    )
    with EventStorage():
        for stock.iter in range(5):
            stock.run_step()
    storage = run(ours, range(5))
    assert torch.equal(models[0].layer.weight, models[1].layer.weight)
    assert storage.latest()["total_loss"][0] > 0


def test_micro_batches_make_one_large_batch() -> None:
    """Of means over as many images each; no momentum, so that the gradient itself is compared."""
    torch.manual_seed(0)
    split, whole = loop(Share(0, 1, 4, 2)), loop(Share(0, 1, 1, 8))
    for each in (split, whole):
        each.model.forward = lambda batch, model=each.model: {
            "loss": (model.layer(torch.stack([IMAGES[e["number"]] for e in batch]))).square().mean()
        }
        run(each, range(3))
    torch.testing.assert_close(weights(split), weights(whole), rtol=0, atol=1e-14)


def test_an_update_is_a_function_of_iteration_and_weights() -> None:
    straight = loop(Share(0, 1, 2, 2))
    run(straight, range(6))
    first = loop(Share(0, 1, 2, 2))
    run(first, range(4))
    state, model = copy.deepcopy(first.state_dict()), copy.deepcopy(first.model.state_dict())
    second = loop(Share(0, 1, 2, 2), seed=99)
    second.model.load_state_dict(model)
    second.load_state_dict(state)
    torch.rand(17)  # what happens in between does not matter
    run(second, range(4, 6))
    assert torch.equal(weights(second), weights(straight))


def test_the_seed_matters() -> None:
    one, other = loop(seed=1), loop(seed=2)
    run(one, range(2)), run(other, range(2))
    assert not torch.equal(weights(one), weights(other))


def test_gradients_are_clipped_by_their_norm_together() -> None:
    free, clipped = loop(Share(0, 1, 2, 2)), loop(Share(0, 1, 2, 2), largest_norm=0.01)
    before = weights(free)
    storage = run(clipped, range(1))
    run(free, range(1))
    step, limited = weights(free) - before, weights(clipped) - before
    torch.testing.assert_close(limited.norm(), torch.tensor(0.001, dtype=torch.float64))
    torch.testing.assert_close(limited / limited.norm(), step / step.norm())
    assert storage.latest()["gradient_norm"][0] == pytest.approx(float(step.norm() / 0.1))


def test_the_moving_average_is_one() -> None:
    averaged = loop(ema_decay=0.75)
    expected = None
    for update in range(4):
        run(averaged, range(update, update + 1))
        now = weights(averaged)
        expected = now if expected is None else 0.75 * expected + 0.25 * now
    assert averaged.ema is not None
    found = torch.cat([each.flatten() for each in averaged.ema.module.parameters()])
    torch.testing.assert_close(found, expected)
    resumed = loop(ema_decay=0.75)
    resumed.load_state_dict(copy.deepcopy(averaged.state_dict()))
    assert resumed.ema is not None
    again = torch.cat([each.flatten() for each in resumed.ema.module.parameters()])
    assert torch.equal(again, found)


def test_a_bad_loss_stops_and_tells_all(tmp_path: Path) -> None:
    bad = loop(Share(0, 1, 2, 2), folder=tmp_path, broken=(10,))  # update 2, the second half
    run(bad, range(2))
    kept = weights(bad)
    with pytest.raises(TrainingError) as caught:
        run(bad, range(2, 3))
    said = str(caught.value)
    assert "iteration 2, learning rate 0.1" in said and "loss_box nan" in said
    assert "10.jpg, 11.jpg" in said and "8.jpg" not in said
    assert torch.equal(weights(bad), kept)
    (file,) = tmp_path.glob("*.json")
    content = json.loads(file.read_text())
    assert content["micro_batches"][0]["files"] == ["10.jpg", "11.jpg"]
    assert math.isnan(content["micro_batches"][0]["losses"]["loss_box"])
    saved = torch.load(file.with_suffix(".pth"), weights_only=True)
    assert [each["file_name"] for each in saved] == ["10.jpg", "11.jpg"]


def test_bad_updates_are_left_out_as_often_as_allowed(
    tmp_path: Path, caplog: pytest.LogCaptureFixture
) -> None:
    bad = loop(folder=tmp_path, broken=(0, 8, 16), skipped=2)
    with caplog.at_level(logging.WARNING):
        run(bad, range(4))  # the first and the third are left out
    assert "update left out (2 of at most 2)" in caplog.text
    assert weights(bad).isfinite().all() and bad.skipped_updates == 2
    resumed = loop(folder=tmp_path, broken=(16,), skipped=2)
    resumed.load_state_dict(copy.deepcopy(bad.state_dict()))
    with pytest.raises(TrainingError, match="SKIP_BAD_UPDATES"):
        run(resumed, range(4, 5))


def test_skipped_images_are_counted_and_told(caplog: pytest.LogCaptureFixture) -> None:
    told = loop()
    batch = next(numbers(told.share, 0))
    told._data = lambda _, start: itertools.repeat([{**batch[0], "skipped": ["the image x"]}])
    with caplog.at_level(logging.WARNING):
        run(told, range(1))
    assert "image skipped (1 so far): the image x" in caplog.text
    assert told.state_dict()["skipped_images"] == 1


def test_the_state_is_plain(tmp_path: Path) -> None:
    """So that a checkpoint of it is data: torch reads it without running anything."""
    trained = loop(ema_decay=0.5)
    run(trained, range(2))
    torch.save(trained.state_dict(), tmp_path / "state.pth")
    state = torch.load(tmp_path / "state.pth", weights_only=True)
    resumed = loop(ema_decay=0.5)
    resumed.load_state_dict(state)
    assert torch.equal(torch.get_rng_state(), state["random_states"]["torch"])


def test_another_number_of_micro_batches_is_warned_of(caplog: pytest.LogCaptureFixture) -> None:
    first = loop(Share(0, 1, 2, 2))
    run(first, range(1))
    with caplog.at_level(logging.WARNING):
        loop(Share(0, 1, 1, 4)).load_state_dict(copy.deepcopy(first.state_dict()))
    assert "started with 2 micro-batches an update and goes on with 1" in caplog.text


@pytest.mark.parametrize("precision", [None, torch.bfloat16])
def test_precision_is_that_of_the_products(precision: torch.dtype | None) -> None:
    """Autocast on a CPU: products in bfloat16, weights, their gradients and updates in float32."""
    kinds = []

    class Single(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.layer = nn.Linear(3, 2)

        def forward(self, batch: Batch) -> Tensor:
            found = self.layer(torch.stack([IMAGES[each["number"]].float() for each in batch]))
            kinds.append(found.dtype)
            return found.float().square().mean()

    model, share = Single(), Share(0, 1, 2, 2)
    optimizer = torch.optim.SGD(model.parameters(), lr=0.1)
    trained = TrainLoop(
        *(model, lambda _, start: numbers(share, start), optimizer, share, 0, Path()),
        Arithmetic(precision=precision),
    )
    run(trained, range(1))
    assert kinds == [precision or torch.float32] * 2
    assert model.layer.weight.dtype == model.layer.weight.grad.dtype == torch.float32


def test_retinanets_normaliser_is_resumed() -> None:
    first, second = loop(), loop()
    run(first, range(1))
    assert first.state_dict()["loss_normalizer"] is None
    first.model.loss_normalizer = 87.5  # as DenseDetector._ema_update does
    second.load_state_dict(copy.deepcopy(first.state_dict()))
    assert second.model.loss_normalizer == 87.5


class Normed(Detector):
    """With statistics that a forward pass changes, and a signal in the middle of one."""

    def __init__(self) -> None:
        super().__init__()
        self.norm = nn.BatchNorm1d(2, dtype=torch.float64)
        self.loss_normalizer = 100.0
        self.interrupted: tuple[int, str] | None = None  # at which forward pass, and where
        self.passes = 0

    def forward(self, batch: Batch) -> dict[str, Tensor]:
        self.passes += 1
        self.loss_normalizer *= 0.9
        found = self.norm(super().forward(batch)["loss_class"] * torch.ones(4, 2) + self.layer.bias)
        if self.interrupted == (self.passes, "forward"):
            os.kill(os.getpid(), signal.SIGTERM)
        if self.interrupted == (self.passes, "backward"):
            found.register_hook(lambda gradient: os.kill(os.getpid(), signal.SIGTERM))
        return {"loss": found.square().mean()}


@pytest.mark.parametrize("where", ["forward", "backward"])
@pytest.mark.parametrize("micro_batch", [1, 2])
def test_a_signal_drops_an_update_and_the_next_time_it_is_the_same(
    micro_batch: int, where: str
) -> None:
    """Nothing is left of the half: neither statistics nor random numbers nor gradients."""

    def loops() -> TrainLoop:
        torch.manual_seed(0)
        share, model = Share(0, 1, 2, 2), Normed()
        optimizer = torch.optim.SGD(model.parameters(), lr=0.1, momentum=0.9)
        return TrainLoop(
            model,
            lambda _, start: numbers(share, start),
            optimizer,
            share,
            3,
            Path(),
            Arithmetic(ema_decay=0.5),
        )

    straight, dropped, resumed = loops(), loops(), loops()
    run(straight, range(4))
    dropped.model.interrupted = (4 + micro_batch, where)  # of the third update
    with SIGNALS.listening(), pytest.raises(Abandoned) as caught:
        run(dropped, range(4))
    assert caught.value.number == signal.SIGTERM
    assert dropped.model.passes == 4 + micro_batch  # at once
    dropped.iter = 1
    resumed.model.load_state_dict(copy.deepcopy(dropped.model.state_dict()))
    resumed.load_state_dict(copy.deepcopy(dropped.state_dict()))
    run(resumed, range(2, 4))
    assert resumed.ema is not None and straight.ema is not None
    for one, other in ((straight.model, resumed.model), (straight.ema, resumed.ema)):
        expected, found = one.state_dict(), other.state_dict()
        assert all(torch.equal(tensor, found[name]) for name, tensor in expected.items())
    assert resumed.model.loss_normalizer == straight.model.loss_normalizer
    assert torch.equal(torch.get_rng_state(), resumed.state_dict()["random_states"]["torch"])


def test_syncbn_on_several_cpu_processes_is_refused(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(comm, "get_world_size", lambda: 2)
    with pytest.raises(ConfigError, match="SyncBN, which works on GPUs alone, and 2 processes"):
        distributed(nn.Sequential(nn.Conv2d(1, 1, 1), nn.SyncBatchNorm(1)))


def test_seeds_that_nobody_chose() -> None:
    assert shared_seed(7) == 7
    assert shared_seed(-1) >= 0


PROCESSES = """
import sys
from pathlib import Path

import torch
from detectron2.engine.defaults import create_ddp_model
from detectron2.utils import comm

sys.path.insert(0, {tests!r})
import test_train_loop as tested
from resnext_det.data.stream import Share
from resnext_det.engine.launch import Job, run_everywhere
from resnext_det.engine.train_loop import Arithmetic, TrainLoop
from resnext_det.errors import TrainingError


def train(folder, broken):
    share = Share(comm.get_rank(), 2, 2, 2)
    model = create_ddp_model(tested.Detector(), broadcast_buffers=False, device_ids=None)
    optimizer = torch.optim.SGD(model.parameters(), lr=0.1, momentum=0.9)
    data = lambda _, start: tested.numbers(share, start, broken)
    loop = TrainLoop(model, data, optimizer, share, 3, folder, Arithmetic(largest_norm=1.0))
    tested.run(loop, range(5))
    if comm.is_main_process():
        torch.save(tested.weights(loop), folder / "weights.pth")
    try:
        tested.run(loop, range(5, 6))
    except TrainingError as error:
        (folder / f"said{{share.process}}").write_text(str(error))


if __name__ == "__main__":
    # Of update 5, the second micro-batch of the second process: 5 * 8 + 6 and 7.
    run_everywhere(train, Job(processes=2), (Path(sys.argv[1]), (46,)))
"""


def test_two_processes_and_two_micro_batches_give_the_same_weights(tmp_path: Path) -> None:
    """And a bad loss of one process is told by both, none of which waits for the other."""
    script = tmp_path / "processes.py"
    script.write_text(PROCESSES.format(tests=str(Path(__file__).parent)))
    subprocess.run([sys.executable, str(script), str(tmp_path)], check=True, timeout=120)
    alone = loop(Share(0, 1, 4, 2), folder=tmp_path, largest_norm=1.0)
    run(alone, range(5))
    torch.testing.assert_close(
        torch.load(tmp_path / "weights.pth"), weights(alone), rtol=0, atol=1e-15
    )
    said = [(tmp_path / f"said{process}").read_text() for process in range(2)]
    assert said[0] == said[1] and "46.jpg, 47.jpg" in said[0]
