"""resnext://NAME from a real server to a detector, and everything that may come between."""

from __future__ import annotations

import dataclasses
import hashlib
import logging
import multiprocessing
import pickle
import resource
import time
from collections.abc import Callable
from concurrent.futures import ProcessPoolExecutor, ThreadPoolExecutor
from pathlib import Path
from typing import Any

import pytest
import torch
from detectron2 import model_zoo as stock_zoo
from detectron2.checkpoint import DetectionCheckpointer
from detectron2.modeling import build_model
from detectron2.utils.file_io import PathManager
from filelock import FileLock
from torch import Tensor

from resnext_det import ResNeXt
from resnext_det.errors import ConfigError, WeightsError
from resnext_det.weights import fetching
from resnext_det.weights.catalog import Checksum, Entry, entry
from resnext_det.weights.converting import read_backbone, write_detectron2
from resnext_det.weights.fetching import Patience, ResNeXtHandler
from resnext_det.weights.layouts import to_torchvision
from resnext_det.weights.reading import read_checkpoint, read_tensors

Web = Any  # the class is in conftest.py, which tests cannot import

NAME = "resnext50_4x4d.test_in1k"
PREFIX = "resnext://"
QUICK = Patience(attempts=2, pause=0.01, timeout=20)
Handler = Callable[..., ResNeXtHandler]


@pytest.fixture(scope="module")
def checkpoint(tmp_path_factory: pytest.TempPathFactory) -> bytes:
    """A small ResNeXt-50 4x4d as torchvision would save it; stock Detectron2 has none less deep."""
    torch.manual_seed(0)
    network = ResNeXt(
        50, "4x4d", norm="BN", stem_out_channels=8, res2_out_channels=16, num_classes=5
    )
    for name, tensor in network.state_dict().items():
        if ".norm." in name and tensor.is_floating_point():
            tensor.uniform_(0.5, 1.5)
    file = tmp_path_factory.mktemp("checkpoint") / "weights.pth"
    torch.save(to_torchvision(network.state_dict()), file)
    return file.read_bytes()


def described(url: str, content: bytes | None, **changes: Any) -> Entry:
    """An entry like torchvision's, of another address and with another checksum."""
    checksum = None if content is None else Checksum(hashlib.sha256(content).hexdigest()[:8])
    like = entry("resnext50_32x4d.tv_in1k")
    return dataclasses.replace(like, **{"name": NAME, "url": url, "checksum": checksum, **changes})


@pytest.fixture
def handler(web: Web, checkpoint: bytes, tmp_path: Path) -> Handler:
    """Make a handler of a catalog with one entry, whose file is on this machine's server."""

    def make(content: bytes | None = checkpoint, **changes: Any) -> ResNeXtHandler:
        url = changes.pop("url", f"{web.address}/weights-0123.pth")
        known = described(url, content, **changes)
        return ResNeXtHandler({known.name: known}, tmp_path / "cache", QUICK)

    web.serve("/weights-0123.pth", checkpoint)
    return make


def ask(handler: ResNeXtHandler, name: str = NAME, **options: Any) -> Path:
    return Path(handler._get_local_path(f"{PREFIX}{name}", **options))


def placed(tmp_path: Path) -> Path:
    """Where the file as published is kept, and is to be put by hand."""
    return tmp_path / "cache" / NAME / "weights-0123.pth"


def left(tmp_path: Path) -> list[str]:
    """What is in the cache but for the lock, which stays for good."""
    files = [path for path in (tmp_path / "cache").rglob("*") if path.is_file()]
    return sorted(path.name for path in files if path.name != ".lock")


def equal(one: dict[str, Tensor], other: dict[str, Tensor]) -> bool:
    return one.keys() == other.keys() and all(torch.equal(one[name], other[name]) for name in one)


def test_a_name_becomes_what_a_direct_conversion_gives(
    handler: Handler, web: Web, checkpoint: bytes, tmp_path: Path
) -> None:
    asked = handler()
    got = ask(asked)
    source = tmp_path / "weights-0123.pth"
    source.write_bytes(checkpoint)
    direct = tmp_path / "direct.pth"
    write_detectron2(read_backbone(source), direct, published=asked.entries[NAME])
    assert equal(read_tensors(got), read_tensors(direct))
    assert read_checkpoint(got).record == read_checkpoint(direct).record
    assert read_checkpoint(got).record["licence"] == asked.entries[NAME].licence
    assert placed(tmp_path).read_bytes() == checkpoint
    digits = hashlib.sha256(checkpoint).hexdigest()[:8]
    assert left(tmp_path) == [f"{NAME}-{digits}-format{fetching.FORMAT}.pth", "weights-0123.pth"]
    assert web.requests == ["/weights-0123.pth"]


@pytest.mark.parametrize("content", ["known", None], ids=["checksum", "no-checksum"])
def test_the_second_use_needs_no_network(
    content: str | None, handler: Handler, web: Web, checkpoint: bytes
) -> None:
    first = ask(handler(content and checkpoint))
    stamp = first.stat().st_mtime_ns
    web.serve("/weights-0123.pth", web.sends(b"gone", status=404))
    assert ask(handler(content and checkpoint)) == first
    assert first.stat().st_mtime_ns == stamp
    assert web.requests == ["/weights-0123.pth"]


def test_stock_detectron2_loads_every_tensor(
    handler: Handler, checkpoint: bytes, tmp_path: Path, caplog: pytest.LogCaptureFixture
) -> None:
    cfg = stock_zoo.get_config("COCO-Detection/faster_rcnn_R_50_FPN_1x.yaml")
    cfg.MODEL.DEVICE = "cpu"
    cfg.MODEL.RESNETS.NUM_GROUPS, cfg.MODEL.RESNETS.WIDTH_PER_GROUP = 4, 4
    cfg.MODEL.RESNETS.STEM_OUT_CHANNELS, cfg.MODEL.RESNETS.RES2_OUT_CHANNELS = 8, 16
    cfg.MODEL.RESNETS.STRIDE_IN_1X1 = False
    detector = build_model(cfg)
    PathManager.register_handler(handler())
    try:
        with caplog.at_level(logging.WARNING):
            DetectionCheckpointer(detector).load(f"{PREFIX}{NAME}")
    finally:
        fetching.register()
    source = tmp_path / "source.pth"
    source.write_bytes(checkpoint)
    expected = dict(read_backbone(source).tensors)
    loaded = detector.backbone.bottom_up.state_dict()
    assert len(expected) == 265
    assert equal(loaded, expected)


def test_the_path_manager_knows_the_scheme_once() -> None:
    fetching.register()
    fetching.register()
    with pytest.raises(ConfigError, match=r"resnext50_32x4d\.tv_in1k"):
        PathManager.get_local_path(f"{PREFIX}resnext50_32x4d.tv_in2k")
    with pytest.raises(ConfigError, match="stem of three convolutions"):
        PathManager.get_local_path(f"{PREFIX}resnext50d_32x4d.bt_in1k")


@pytest.fixture(scope="module")
def processes() -> multiprocessing.context.ForkServerContext:
    """Processes that start with the package imported, and share nothing else with this one."""
    context = multiprocessing.get_context("forkserver")
    context.set_forkserver_preload(["resnext_det.weights.fetching"])
    return context


def test_eight_processes_fetch_once(
    handler: Handler, web: Web, checkpoint: bytes, processes: Any
) -> None:
    web.serve("/weights-0123.pth", web.sends(checkpoint, waits_after=1000))
    with ProcessPoolExecutor(8, mp_context=processes) as pool:
        list(pool.map(time.sleep, [0.3] * 8))  # all of them have started
        asked = [pool.submit(handler()._get_local_path, f"{PREFIX}{NAME}") for _ in range(8)]
        wait_for(lambda: bool(web.requests))
        time.sleep(1.2)  # the others come to the lock, and say that they wait
        web.gate.set()
        paths = {future.result(60) for future in asked}
    assert len(paths) == 1
    assert web.requests == ["/weights-0123.pth"]
    assert len(read_tensors(Path(paths.pop()))) == 265


def test_a_killed_process_leaves_a_cache_that_works(
    handler: Handler, web: Web, checkpoint: bytes, processes: Any, tmp_path: Path
) -> None:
    half = web.sends(checkpoint, waits_after=len(checkpoint) // 2)
    web.serve("/weights-0123.pth", half, checkpoint)
    child = processes.Process(target=handler()._get_local_path, args=(f"{PREFIX}{NAME}",))
    child.start()
    wait_for(lambda: left(tmp_path) == [".weights-0123.pth.partial"])
    child.kill()
    child.join()
    assert left(tmp_path) == [".weights-0123.pth.partial"]
    web.gate.set()
    got = ask(handler())
    assert left(tmp_path) == [got.name, "weights-0123.pth"]
    assert placed(tmp_path).read_bytes() == checkpoint
    assert web.requests == ["/weights-0123.pth"] * 2


def test_what_a_killed_conversion_left_is_cleared(handler: Handler, tmp_path: Path) -> None:
    folder = placed(tmp_path).parent
    folder.mkdir(parents=True)
    (folder / f".{NAME}-0123-format1.pth.partial").write_bytes(b"half")
    got = ask(handler())
    assert left(tmp_path) == [got.name, "weights-0123.pth"]


def test_a_full_disk_is_said_so(handler: Handler, processes: Any, tmp_path: Path) -> None:
    """A limit on the size of files stands in for it: the same call fails, with another number."""
    limit = (resource.RLIMIT_FSIZE, (1 << 16, 1 << 16))
    with ProcessPoolExecutor(
        1, mp_context=processes, initializer=resource.setrlimit, initargs=limit
    ) as pool:
        error = pool.submit(handler()._get_local_path, f"{PREFIX}{NAME}").exception(60)
    assert isinstance(error, WeightsError)
    assert "cannot be written to" in str(error)
    assert "RESNEXT_DET_CACHE" in str(error)
    assert left(tmp_path) == []


def test_a_disk_that_is_full_when_converting_costs_no_file(
    handler: Handler, checkpoint: bytes, monkeypatch: pytest.MonkeyPatch, tmp_path: Path
) -> None:
    def full(*_: object, **more: object) -> None:
        raise WeightsError("cannot write: No space left on device")

    monkeypatch.setattr(fetching, "write_detectron2", full)
    with pytest.raises(WeightsError, match="No space left"):
        ask(handler(None))
    assert placed(tmp_path).read_bytes() == checkpoint


def test_what_is_ready_is_served_while_another_process_fetches(
    handler: Handler, tmp_path: Path
) -> None:
    """And from a folder that cannot be written, where there can be no lock."""
    ready = ask(handler())
    with ThreadPoolExecutor(1) as thread, FileLock(placed(tmp_path).parent / ".lock"):
        assert thread.submit(ask, handler()).result(10) == ready


def wait_for(condition: Callable[[], bool]) -> None:
    while not condition():  # pytest's timeout ends what never comes
        time.sleep(0.01)


@pytest.mark.parametrize("content", [b"another", None], ids=["checksum", "no-checksum"])
def test_a_file_that_is_not_the_right_one_is_thrown_away(
    content: bytes | None, handler: Handler, web: Web, checkpoint: bytes, tmp_path: Path
) -> None:
    web.serve("/weights-0123.pth", checkpoint[:1000])
    with pytest.raises(WeightsError, match="thrown away") as caught:
        ask(handler(content))
    assert f"put it here: {placed(tmp_path)}" in str(caught.value)
    assert web.address in str(caught.value)
    assert left(tmp_path) == []
    web.serve("/weights-0123.pth", checkpoint)
    assert ask(handler()).is_file()


class Attack:
    """Makes a file when it is unpickled."""

    def __init__(self, marker: Path) -> None:
        self.marker = marker

    def __reduce__(self) -> tuple[object, ...]:
        return Path.touch, (self.marker,)


def test_code_in_a_fetched_file_never_runs(handler: Handler, web: Web, tmp_path: Path) -> None:
    attack = pickle.dumps({"model": Attack(tmp_path / "it-ran")})
    for name in ("weights-0123.pth", "weights.pkl"):
        url = web.serve(f"/{name}", attack)
        with pytest.raises(WeightsError, match="thrown away"):
            ask(handler(None, url=url))
    assert not (tmp_path / "it-ran").exists()
    pickle.loads(attack)
    assert (tmp_path / "it-ran").exists()  # the attack is one


@pytest.mark.parametrize(
    ("changes", "said"),
    [
        ({"name": "resnext101_4x4d.test"}, r"ResNeXt-50 4x4d, and .* ResNeXt-101 4x4d"),
        ({"name": "resnext50_32x4d.test"}, r"ResNeXt-50 4x4d, and .* ResNeXt-50 32x4d"),
        ({"batch_norm": "fused"}, "norms that are kept, and .* are fused"),
    ],
)
def test_a_file_that_is_not_what_the_catalog_says_is_refused(
    changes: dict[str, str], said: str, handler: Handler
) -> None:
    known = handler(**changes)
    (name,) = known.entries
    with pytest.raises(WeightsError, match=said):
        ask(known, name)
    with pytest.raises(WeightsError, match=said):
        ask(known, name)


def test_the_catalog_says_what_a_network_takes_for_an_image(
    handler: Handler, checkpoint: bytes, tmp_path: Path
) -> None:
    """A file with torchvision's names that takes BGR, as OpenMMLab's copy of Detectron2's does."""
    rgb = read_tensors(ask(handler()))["stem.conv1.weight"]
    known = handler(name="resnext50_4x4d.bgr", pixels=entry("resnext101_32x8d.d2_in1k").pixels)
    bgr = read_tensors(ask(known, "resnext50_4x4d.bgr"))["stem.conv1.weight"]
    assert torch.equal(bgr, rgb.flip(1))


def test_a_file_put_there_by_hand_is_used(
    handler: Handler, web: Web, checkpoint: bytes, tmp_path: Path
) -> None:
    placed(tmp_path).parent.mkdir(parents=True)
    placed(tmp_path).write_bytes(checkpoint)
    assert len(read_tensors(ask(handler()))) == 265
    assert not web.requests


def test_another_file_put_there_by_hand_is_refused_and_kept(
    handler: Handler, web: Web, checkpoint: bytes, tmp_path: Path
) -> None:
    """A checkpoint, and of the right network; only its checksum tells."""
    placed(tmp_path).parent.mkdir(parents=True)
    placed(tmp_path).write_bytes(checkpoint)
    with pytest.raises(WeightsError, match=r"its sha256 begins .*Remove it") as caught:
        ask(handler(b"of another content"))
    assert str(placed(tmp_path)) in str(caught.value)
    assert left(tmp_path) == ["weights-0123.pth"]
    assert not web.requests


def test_rubbish_put_there_by_hand_is_refused_and_kept(
    handler: Handler, web: Web, tmp_path: Path
) -> None:
    placed(tmp_path).parent.mkdir(parents=True)
    placed(tmp_path).write_bytes(b"rubbish")
    with pytest.raises(WeightsError, match="cannot be read as a checkpoint") as caught:
        ask(handler(None))
    assert str(placed(tmp_path)) in str(caught.value)
    assert left(tmp_path) == ["weights-0123.pth"]
    assert not web.requests


def test_a_new_file_put_there_by_hand_is_converted(
    handler: Handler, checkpoint: bytes, tmp_path: Path
) -> None:
    """Where no checksum is published, the file's own decides which conversion is its."""
    first = ask(handler(None))
    state = torch.load(placed(tmp_path), weights_only=True)
    state["bn1.bias"] += 1
    torch.save(state, placed(tmp_path))
    second = ask(handler(None))
    assert second != first
    bias = [read_tensors(path)["stem.conv1.norm.bias"] for path in (first, second)]
    assert torch.equal(bias[0] + 1, bias[1])


def test_a_new_way_of_converting_is_not_served_the_old_file(
    handler: Handler, web: Web, monkeypatch: pytest.MonkeyPatch
) -> None:
    first = ask(handler())
    monkeypatch.setattr(fetching, "FORMAT", fetching.FORMAT + 1)
    assert ask(handler()) != first
    assert web.requests == ["/weights-0123.pth"]


def test_force_fetches_and_converts_anew(handler: Handler, web: Web) -> None:
    first = ask(handler())
    first.write_bytes(b"damaged")
    assert ask(handler(), force=True) == first
    assert len(read_tensors(first)) == 265
    assert web.requests == ["/weights-0123.pth"] * 2
    web.serve("/weights-0123.pth", web.sends(b"gone", status=404))
    with pytest.raises(WeightsError, match="404"):
        ask(handler(), force=True)
    assert len(read_tensors(ask(handler()))) == 265  # what was there before still is


def test_a_name_that_is_not_there_suggests_others(handler: Handler, tmp_path: Path) -> None:
    with pytest.raises(ConfigError, match=rf"nearest: {NAME}"):
        ask(handler(), "resnext50_4x4d.tset")
    with pytest.raises(ConfigError, match="cannot be used: it normalises after the addition"):
        ask(handler(), "resnet50.fb_torch7")
    assert not (tmp_path / "cache").exists()


@pytest.mark.parametrize("name", ["../../etc/passwd", "", ".", f"{NAME}/..", f"{NAME}?force=1"])
def test_only_names_of_the_catalog_reach_the_disk(
    name: str, handler: Handler, tmp_path: Path
) -> None:
    with pytest.raises(ConfigError, match="no checkpoint"):
        ask(handler(), name)
    assert not (tmp_path / "cache").exists()


def test_a_cache_that_cannot_be_written_is_said_so(handler: Handler, tmp_path: Path) -> None:
    (tmp_path / "cache").write_text("a file")
    with pytest.raises(WeightsError, match=rf"{NAME} cannot be kept in .*RESNEXT_DET_CACHE"):
        ask(handler())


def test_a_licence_that_forbids_commerce_is_warned_of_once(
    handler: Handler, caplog: pytest.LogCaptureFixture
) -> None:
    free, other = handler(), handler(licence="CC-BY-NC-4.0", commercial=False)
    with caplog.at_level(logging.WARNING):
        ask(free)
        assert not caplog.records
        ask(other)
        ask(other)
    (record,) = caplog.records
    assert record.getMessage() == (f"{NAME} may not be used commercially (licence: CC-BY-NC-4.0).")


def test_the_scheme_can_be_opened_to_read(handler: Handler) -> None:
    known = handler()
    with known._open(f"{PREFIX}{NAME}", "rb") as stream:
        assert stream.read() == ask(known).read_bytes()
    with pytest.raises(WeightsError, match="only be read"):
        known._open(f"{PREFIX}{NAME}", "wb")


def published(handler: ResNeXtHandler, tmp_path: Path) -> Path:
    """Ask for the file itself instead of what is made of it."""
    return fetching.published_file(handler.entries[NAME], tmp_path / "cache", QUICK)


@pytest.mark.parametrize("content", ["known", None], ids=["checksum", "no-checksum"])
def test_the_published_file_is_fetched_once_and_not_converted(
    content: str | None, handler: Handler, web: Web, checkpoint: bytes, tmp_path: Path
) -> None:
    known = handler(content and checkpoint)
    placed(tmp_path).parent.mkdir(parents=True)
    (placed(tmp_path).parent / ".weights.pth.partial").write_bytes(b"half, of a killed process")
    for _ in range(2):
        assert published(known, tmp_path) == placed(tmp_path)
        assert placed(tmp_path).read_bytes() == checkpoint
        assert left(tmp_path) == ["weights-0123.pth"]
    ask(known)  # and is what a conversion starts from
    assert web.requests == ["/weights-0123.pth"]
    placed(tmp_path).unlink()
    assert published(known, tmp_path).read_bytes() == checkpoint
    assert len(web.requests) == 2


@pytest.mark.parametrize("content", [b"another", None], ids=["checksum", "no-checksum"])
def test_a_published_file_that_is_not_the_right_one_is_thrown_away(
    content: bytes | None, handler: Handler, web: Web, checkpoint: bytes, tmp_path: Path
) -> None:
    web.serve("/weights-0123.pth", checkpoint[:1000])
    with pytest.raises(WeightsError, match="thrown away"):
        published(handler(content), tmp_path)
    assert left(tmp_path) == []


def test_another_file_than_the_published_one_is_refused_and_kept(
    handler: Handler, web: Web, checkpoint: bytes, tmp_path: Path
) -> None:
    placed(tmp_path).parent.mkdir(parents=True)
    placed(tmp_path).write_bytes(b"put there by hand")
    with pytest.raises(WeightsError, match=r"its sha256 begins .*Remove it"):
        published(handler(), tmp_path)
    assert left(tmp_path) == ["weights-0123.pth"]
    assert not web.requests


def test_who_waits_for_the_published_file_does_not_fetch_it_again(
    handler: Handler, web: Web, checkpoint: bytes, tmp_path: Path
) -> None:
    known = handler()
    web.serve("/weights-0123.pth", web.sends(checkpoint, waits_after=1000))
    with ThreadPoolExecutor(2) as threads:
        asked = [threads.submit(published, known, tmp_path) for _ in range(2)]
        wait_for(lambda: bool(web.requests))
        time.sleep(0.1)  # the other one comes to the lock
        web.gate.set()
        assert {future.result(60) for future in asked} == {placed(tmp_path)}
    assert web.requests == ["/weights-0123.pth"]


@pytest.mark.parametrize(
    ("variables", "expected"),
    [
        ({"RESNEXT_DET_CACHE": "/own", "FVCORE_CACHE": "/shared"}, "/own"),
        ({"RESNEXT_DET_CACHE": "", "FVCORE_CACHE": "/shared"}, "/shared/resnext_det"),
        ({}, "/home/somebody/.torch/iopath_cache/resnext_det"),
        ({"RESNEXT_DET_CACHE": "~/weights"}, "/home/somebody/weights"),
    ],
)
def test_where_files_are_kept(
    variables: dict[str, str], expected: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setenv("HOME", "/home/somebody")
    for name in ("RESNEXT_DET_CACHE", "FVCORE_CACHE"):
        monkeypatch.delenv(name, raising=False)
    for name, value in variables.items():
        monkeypatch.setenv(name, value)
    assert fetching.cache_folder() == Path(expected)


def test_the_cache_is_where_the_environment_says(
    handler: Handler, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setenv("RESNEXT_DET_CACHE", str(tmp_path / "elsewhere"))
    got = ask(ResNeXtHandler(handler().entries, patience=QUICK))
    assert got.parent == tmp_path / "elsewhere" / NAME
