from __future__ import annotations

import copy
import itertools
import math
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
from resnext_det.engine.train_loop import (
    Batch,
    TrainLoop,
    check_batch_norms,
    distributed,
    shared_seed,
)
from resnext_det.errors import ConfigError, TrainingError

IMAGES = torch.randn(4096, 3, dtype=torch.float64, generator=torch.Generator().manual_seed(1))


class Detector(nn.Sequential):
    """Two losses of a linear layer; one depends on random numbers, like sampled proposals."""

    def __init__(self, random: bool = True) -> None:
        super().__init__()
        self.layer = nn.Linear(3, 2, dtype=torch.float64)
        nn.init.constant_(self.layer.weight, 0.1)
        nn.init.zeros_(self.layer.bias)
        self.random = random
        self.products: set[torch.dtype] = set()

    def forward(self, batch: Batch) -> dict[str, Tensor]:
        images = torch.stack([IMAGES[each["number"]] for each in batch])
        found = self.layer(images.to(self.layer.weight.dtype))
        self.products.add(found.dtype)
        chosen = torch.rand(len(batch)) < 0.5 if self.random else torch.ones(len(batch))
        wrong = float("nan") if any(each.get("broken") for each in batch) else 1.0
        return {
            "loss_box": (found[:, 0] - 1).square().mean() * wrong,
            "loss_class": ((found[:, 1] + 1).square() * chosen).mean(),
        }


def numbers(share: Share, start: int, broken: tuple[int, ...] = ()) -> Iterator[Batch]:
    """Yield images that depend on update and stream only, as the real data does."""
    for update in itertools.count(start):
        for stream in share.streams:
            first = (update * share.total + stream) * share.images
            yield [
                {"number": n, "file_name": f"{n}.jpg", "broken": n in broken}
                for n in range(first, first + share.images)
            ]


def loop(
    share: Share = Share(0, 1, 1, 4),
    *,
    model: nn.Module | None = None,
    folder: Path = Path(),
    broken: tuple[int, ...] = (),
    seed: int = 3,
    **more: Any,
) -> TrainLoop:
    model = Detector() if model is None else model
    optimizer = torch.optim.SGD(model.parameters(), lr=0.1, momentum=0.9)
    data = lambda _, start: numbers(share, start, broken)  # noqa: E731
    return TrainLoop(model, data, optimizer, share, seed, folder, **more)


def run(trained: TrainLoop, updates: range) -> EventStorage:
    with EventStorage(updates.start) as storage:
        for trained.iter in updates:
            storage.iter = trained.iter
            trained.run_step()
    return storage


def weights(trained: SimpleTrainer) -> Tensor:
    return torch.cat([each.detach().flatten() for each in trained.model.parameters()])


def test_an_update_is_detectron2s_bit_for_bit() -> None:
    share = Share(0, 1, 1, 4)
    ours = loop(share, model=Detector(random=False))
    model = Detector(random=False)
    data = list(itertools.islice(numbers(share, 0), 5))
    stock = SimpleTrainer(model, data, torch.optim.SGD(model.parameters(), lr=0.1, momentum=0.9))
    with EventStorage() as expected:
        for stock.iter in range(5):
            expected.iter = stock.iter
            stock.run_step()
    storage = run(ours, range(5))
    assert torch.equal(weights(ours), weights(stock))
    for name in ("total_loss", "loss_box", "loss_class"):
        assert storage.history(name).values() == expected.history(name).values()


def test_micro_batches_accumulate_to_one_large_batch() -> None:
    split = loop(Share(0, 1, 4, 2), model=Detector(random=False))
    whole = loop(Share(0, 1, 1, 8), model=Detector(random=False))
    for each in (split, whole):
        run(each, range(3))
    torch.testing.assert_close(weights(split), weights(whole), rtol=0, atol=1e-14)


def test_several_micro_batches_in_a_pass_make_the_same_update() -> None:
    """Of five micro-batches in passes of 2, 2 and 1, losses are weighted by their number."""
    few, many = (loop(Share(0, 1, 5, 2), model=Detector(random=False), per_pass=n) for n in (2, 1))
    storages = [run(each, range(3)) for each in (few, many)]
    torch.testing.assert_close(weights(few), weights(many), rtol=0, atol=1e-14)
    found, expected = (storage.latest()["total_loss"][0] for storage in storages)
    assert found == pytest.approx(expected, rel=1e-14)


def test_an_update_depends_on_seed_iteration_and_state_alone(tmp_path: Path) -> None:
    straight = loop(Share(0, 1, 2, 2), ema_decay=0.5)
    run(straight, range(6))
    first = loop(Share(0, 1, 2, 2), ema_decay=0.5)
    run(first, range(4))
    first.model.loss_normalizer = 87.5  # as Detectron2's RetinaNet sets it
    torch.save([first.model.state_dict(), first.state_dict()], tmp_path / "state.pth")
    model, state = torch.load(tmp_path / "state.pth", weights_only=True)  # plain data
    second = loop(Share(0, 1, 2, 2), seed=99, ema_decay=0.5)
    second.model.load_state_dict(model)
    second.load_state_dict(state)
    torch.rand(17)  # what others draw does not matter
    run(second, range(4, 6))
    assert torch.equal(weights(second), weights(straight))
    assert straight.ema is not None and second.ema is not None
    for name, tensor in straight.ema.state_dict().items():
        assert torch.equal(second.ema.state_dict()[name], tensor)
    assert second.model.loss_normalizer == 87.5
    other = loop(Share(0, 1, 2, 2), seed=4)
    run(other, range(6))
    assert not torch.equal(weights(other), weights(straight))


def test_clips_the_norm_of_all_gradients() -> None:
    free, clipped = loop(Share(0, 1, 2, 2)), loop(Share(0, 1, 2, 2), max_norm=0.01)
    before = weights(free)
    storage = run(clipped, range(1))
    run(free, range(1))
    step, limited = weights(free) - before, weights(clipped) - before
    torch.testing.assert_close(limited.norm(), torch.tensor(0.001, dtype=torch.float64))
    torch.testing.assert_close(limited / limited.norm(), step / step.norm())
    assert storage.latest()["gradient_norm"][0] == pytest.approx(float(step.norm() / 0.1))


def test_averages_the_weights(caplog: pytest.LogCaptureFixture) -> None:
    averaged = loop(ema_decay=0.75)
    expected = None
    for update in range(4):
        run(averaged, range(update, update + 1))
        now = weights(averaged)
        expected = now if expected is None else 0.75 * expected + 0.25 * now
    assert averaged.ema is not None
    found = torch.cat([each.flatten() for each in averaged.ema.module.parameters()])
    torch.testing.assert_close(found, expected)
    averaged.load_state_dict(loop(Share(0, 1, 2, 2)).state_dict())
    assert "has no moving average" in caplog.text
    assert "2 micro-batches per update and resumes with 1" in caplog.text
    assert "SOLVER.IMS_PER_MICRO_BATCH 2 keeps" in caplog.text


@pytest.mark.parametrize("precision", [None, torch.bfloat16])
def test_autocast_changes_products_only(precision: torch.dtype | None) -> None:
    trained = loop(Share(0, 1, 2, 2), model=Detector().float(), precision=precision)
    run(trained, range(1))
    assert trained.model.products == {precision or torch.float32}
    weight = trained.model.layer.weight
    assert weight.dtype == weight.grad.dtype == torch.float32


def test_a_non_finite_loss_stops_and_names_the_images(tmp_path: Path) -> None:
    bad = loop(Share(0, 1, 2, 2), folder=tmp_path, broken=(10,))  # update 2, second micro-batch
    run(bad, range(2))
    kept = weights(bad)
    with pytest.raises(TrainingError) as caught:
        run(bad, range(2, 3))
    said = str(caught.value)
    assert "iteration 2, learning rate 0.1" in said and "loss_box nan" in said
    assert "10.jpg, 11.jpg" in said and "8.jpg" not in said
    assert torch.equal(weights(bad), kept)
    saved = torch.load(tmp_path / "bad_update_0000002_process0.pth", weights_only=True)
    (part,) = saved["micro_batches"]
    assert [image["file_name"] for image in part["images"]] == ["10.jpg", "11.jpg"]
    assert math.isnan(part["losses"]["loss_box"])


def test_skips_as_many_bad_updates_as_allowed(
    tmp_path: Path, caplog: pytest.LogCaptureFixture
) -> None:
    bad = loop(folder=tmp_path, broken=(0, 8, 16), skip=2)
    run(bad, range(4))  # the first and the third are skipped
    assert "skipped update 2 of at most 2" in caplog.text
    assert weights(bad).isfinite().all()
    resumed = loop(folder=tmp_path, broken=(16,), skip=2)
    resumed.load_state_dict(copy.deepcopy(bad.state_dict()))
    with pytest.raises(TrainingError, match="SKIP_BAD_UPDATES is 2"):
        run(resumed, range(4, 5))


def test_counts_images_skipped_by_the_loader(caplog: pytest.LogCaptureFixture) -> None:
    trained = loop()
    batch = next(numbers(trained.share, 0))
    trained._data = lambda _, start: itertools.repeat([{**batch[0], "skipped": ["image x"]}])
    run(trained, range(1))
    assert "image skipped (1 so far): image x" in caplog.text
    assert trained.state_dict()["skipped_images"] == 1


@pytest.mark.parametrize(
    ("layer", "said"),
    [
        (nn.BatchNorm2d(2), "running statistics of batch norms"),
        (nn.SyncBatchNorm(2), "SyncBN normalizes over"),
        (nn.GroupNorm(1, 2), ""),
    ],
)
def test_warns_if_the_number_of_processes_changes_the_result(
    layer: nn.Module, said: str, caplog: pytest.LogCaptureFixture
) -> None:
    trained = loop(Share(0, 1, 8, 2), model=Detector().append(layer))
    state = {**trained.state_dict(), "processes": 3}
    trained.load_state_dict({**state, "loss_normalizer": 9.0})
    assert ("resumes on 1 processes instead of 3" in caplog.text) and said in caplog.text
    assert "the losses' normalizer over its own images" in caplog.text
    assert "different images" not in caplog.text


def test_refuses_syncbn_in_unequal_shares() -> None:
    model = nn.Sequential(nn.SyncBatchNorm(1))
    check_batch_norms(model, Share(0, 4, 8, 2), exact=False)
    check_batch_norms(nn.Sequential(nn.BatchNorm2d(1)), Share(0, 3, 8, 2), exact=True)
    with pytest.raises(ConfigError, match="3 processes must call equally often"):
        check_batch_norms(model, Share(0, 3, 8, 2), exact=False)


def test_refuses_syncbn_in_several_cpu_processes(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(comm, "get_world_size", lambda: 2)
    with pytest.raises(ConfigError, match="SyncBN, which needs GPUs, and 2 processes"):
        distributed(nn.Sequential(nn.Conv2d(1, 1, 1), nn.SyncBatchNorm(1)))


def test_chooses_a_seed_if_none_is_given() -> None:
    assert shared_seed(7) == 7
    assert shared_seed(-1) >= 0
