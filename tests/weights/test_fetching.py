"""resnext://NAME from a local server to a detector, with all that can go wrong."""

from __future__ import annotations

import dataclasses
import hashlib
import logging
import multiprocessing
import pickle
import resource
import socket
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
from resnext_det.weights.fetching import ResNeXtHandler
from resnext_det.weights.layouts import to_torchvision
from resnext_det.weights.reading import read_checkpoint, read_tensors

Web = Any  # the class is in conftest.py, which tests cannot import

NAME = "resnext50_4x4d.test_in1k"
PREFIX = "resnext://"
FILE = "/weights-0123.pth"
Handler = Callable[..., ResNeXtHandler]


@pytest.fixture(autouse=True)
def impatience(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(fetching, "_PAUSE", 0.01)
    monkeypatch.setattr(fetching, "_ATTEMPTS", 2)


@pytest.fixture(scope="module")
def checkpoint(tmp_path_factory: pytest.TempPathFactory) -> bytes:
    """A small ResNeXt-50 4x4d as torchvision would save it; stock Detectron2 has none shallower."""
    torch.manual_seed(0)
    sizes = {"stem_out_channels": 8, "res2_out_channels": 16}
    network = ResNeXt(50, "4x4d", norm="BN", num_classes=5, **sizes)
    for name, tensor in network.state_dict().items():
        if ".norm." in name and tensor.is_floating_point():
            tensor.uniform_(0.5, 1.5)
    file = tmp_path_factory.mktemp("checkpoint") / "weights.pth"
    torch.save(to_torchvision(network.state_dict()), file)
    return file.read_bytes()


@pytest.fixture
def handler(web: Web, checkpoint: bytes, tmp_path: Path) -> Handler:
    """Make a handler of a catalog with one entry, whose file is on this machine's server."""

    def make(content: bytes | None = checkpoint, **changes: Any) -> ResNeXtHandler:
        checksum = None if content is None else Checksum(hashlib.sha256(content).hexdigest()[:8])
        fields = {"name": NAME, "url": web.address + FILE, "checksum": checksum, **changes}
        known: Entry = dataclasses.replace(entry("resnext50_32x4d.tv_in1k"), **fields)
        return ResNeXtHandler({known.name: known}, tmp_path / "cache")

    web.serve(FILE, checkpoint)
    return make


def ask(handler: ResNeXtHandler, name: str = NAME, **options: Any) -> Path:
    return Path(handler._get_local_path(f"{PREFIX}{name}", **options))


def placed(tmp_path: Path) -> Path:
    """Return the published file's path in the cache."""
    return tmp_path / "cache" / NAME / FILE[1:]


def left(tmp_path: Path) -> list[str]:
    """Return the files in the cache except for the lock, which stays."""
    files = [path for path in (tmp_path / "cache").rglob("*") if path.is_file()]
    return sorted(path.name for path in files if path.name != ".lock")


def equal(one: dict[str, Tensor], other: dict[str, Tensor]) -> bool:
    return one.keys() == other.keys() and all(torch.equal(one[name], other[name]) for name in one)


def wait_for(condition: Callable[[], bool]) -> None:
    while not condition():  # pytest has a timeout
        time.sleep(0.01)


def test_same_as_a_direct_conversion(
    handler: Handler, web: Web, checkpoint: bytes, tmp_path: Path
) -> None:
    asked = handler()
    got = ask(asked)
    source, direct = tmp_path / "weights-0123.pth", tmp_path / "direct.pth"
    source.write_bytes(checkpoint)
    write_detectron2(read_backbone(source), direct, published=asked.entries[NAME])
    assert equal(read_tensors(got), read_tensors(direct))
    assert read_checkpoint(got).record == read_checkpoint(direct).record
    assert read_checkpoint(got).record["licence"] == asked.entries[NAME].licence
    assert placed(tmp_path).read_bytes() == checkpoint
    digits = hashlib.sha256(checkpoint).hexdigest()[:8]
    assert left(tmp_path) == [f"{NAME}-{digits}-format{fetching.FORMAT}.pth", "weights-0123.pth"]


@pytest.mark.parametrize("known", [True, False], ids=["checksum", "no-checksum"])
def test_second_use_needs_no_network(
    known: bool, handler: Handler, web: Web, checkpoint: bytes, tmp_path: Path
) -> None:
    """Not even while another process holds the lock."""
    first = ask(handler(checkpoint if known else None))
    stamp = first.stat().st_mtime_ns
    web.serve(FILE, web.sends(b"gone", status=404))
    with ThreadPoolExecutor(1) as thread, FileLock(placed(tmp_path).parent / ".lock"):
        again = thread.submit(ask, handler(checkpoint if known else None)).result(10)
    assert again == first and first.stat().st_mtime_ns == stamp
    published = fetching.published_file(handler().entries[NAME], tmp_path / "cache")
    assert published == placed(tmp_path)
    assert web.requests == [FILE]


def test_stock_detectron2_loads_every_tensor(
    handler: Handler, checkpoint: bytes, tmp_path: Path
) -> None:
    cfg = stock_zoo.get_config("COCO-Detection/faster_rcnn_R_50_FPN_1x.yaml")
    cfg.MODEL.DEVICE = "cpu"
    cfg.MODEL.RESNETS.NUM_GROUPS, cfg.MODEL.RESNETS.WIDTH_PER_GROUP = 4, 4
    cfg.MODEL.RESNETS.STEM_OUT_CHANNELS, cfg.MODEL.RESNETS.RES2_OUT_CHANNELS = 8, 16
    cfg.MODEL.RESNETS.STRIDE_IN_1X1 = False
    detector = build_model(cfg)
    PathManager.register_handler(handler())
    try:
        DetectionCheckpointer(detector).load(f"{PREFIX}{NAME}")
    finally:
        fetching.register()
        fetching.register()
    source = tmp_path / "source.pth"
    source.write_bytes(checkpoint)
    expected = dict(read_backbone(source).tensors)
    assert len(expected) == 265
    assert equal(detector.backbone.bottom_up.state_dict(), expected)
    with pytest.raises(ConfigError, match=r"resnext50_32x4d\.tv_in1k"):
        PathManager.get_local_path(f"{PREFIX}resnext50_32x4d.tv_in2k")


# --- several processes, kills, full disks ---


@pytest.fixture(scope="module")
def processes() -> multiprocessing.context.ForkServerContext:
    """Processes that start with the package imported."""
    context = multiprocessing.get_context("forkserver")
    context.set_forkserver_preload(["resnext_det.weights.fetching"])
    return context


def test_four_processes_download_once(
    handler: Handler, web: Web, checkpoint: bytes, processes: Any
) -> None:
    web.serve(FILE, web.sends(checkpoint, waits_after=1000))
    with ProcessPoolExecutor(4, mp_context=processes) as pool:
        list(pool.map(time.sleep, [0.3] * 4))  # all of them have started
        asked = [pool.submit(handler()._get_local_path, f"{PREFIX}{NAME}") for _ in range(4)]
        wait_for(lambda: bool(web.requests))
        time.sleep(1.2)  # the others come to the lock, and log that they wait
        web.gate.set()
        paths = {future.result(60) for future in asked}
    assert len(paths) == 1
    assert len(web.requests) == 1
    assert len(read_tensors(Path(paths.pop()))) == 265


def test_killed_process_leaves_a_working_cache(
    handler: Handler, web: Web, checkpoint: bytes, processes: Any, tmp_path: Path
) -> None:
    half = web.sends(checkpoint, waits_after=len(checkpoint) // 2)
    web.serve(FILE, half, checkpoint)
    child = processes.Process(target=handler()._get_local_path, args=(f"{PREFIX}{NAME}",))
    child.start()
    wait_for(lambda: any(name.endswith(".partial") for name in left(tmp_path)))
    child.kill()
    child.join()
    assert left(tmp_path)
    web.gate.set()
    got = ask(handler())
    assert left(tmp_path) == [got.name, "weights-0123.pth"]
    assert placed(tmp_path).read_bytes() == checkpoint


def test_full_disk(handler: Handler, processes: Any, tmp_path: Path) -> None:
    """Simulated by a limit on the size of files: the same call fails with another errno."""
    limit = (resource.RLIMIT_FSIZE, (1 << 16, 1 << 16))
    with ProcessPoolExecutor(
        1, mp_context=processes, initializer=resource.setrlimit, initargs=limit
    ) as pool:
        error = pool.submit(handler()._get_local_path, f"{PREFIX}{NAME}").exception(60)
    assert isinstance(error, WeightsError)
    assert "RESNEXT_DET_CACHE" in str(error)
    assert left(tmp_path) == []
    (tmp_path / "cache" / NAME / ".lock").unlink()
    (tmp_path / "cache" / NAME).rmdir()
    (tmp_path / "cache" / NAME).write_text("a file")
    with pytest.raises(WeightsError, match=rf"{NAME} cannot be stored in .*RESNEXT_DET_CACHE"):
        ask(handler())


# --- wrong files ---


class Attack:
    """Makes a file when it is unpickled."""

    def __init__(self, marker: Path) -> None:
        self.marker = marker

    def __reduce__(self) -> tuple[object, ...]:
        return Path.touch, (self.marker,)


@pytest.mark.parametrize("known", [True, False], ids=["checksum", "no-checksum"])
def test_discards_wrong_downloads(
    known: bool, handler: Handler, web: Web, checkpoint: bytes, tmp_path: Path
) -> None:
    content = checkpoint if known else None
    attack = pickle.dumps({"model": Attack(tmp_path / "it-ran")})
    for wrong in (checkpoint[:1000], attack, b"<html>log in"):
        web.serve(FILE, wrong)
        with pytest.raises(WeightsError, match="put it here") as caught:
            ask(handler(content))
        assert str(placed(tmp_path)) in str(caught.value) and web.address in str(caught.value)
        assert left(tmp_path) == []
    assert not (tmp_path / "it-ran").exists()
    web.serve(FILE, checkpoint)
    first = ask(handler(content))
    web.serve(FILE, b"damaged")
    with pytest.raises(WeightsError):
        ask(handler(content), force=True)
    assert left(tmp_path) == [first.name, "weights-0123.pth"]  # a bad file replaces no good one
    first.write_bytes(b"damaged")
    web.serve(FILE, checkpoint)
    assert ask(handler(content), force=True) == first
    assert len(read_tensors(first)) == 265


@pytest.mark.parametrize(
    ("changes", "said"),
    [
        ({"name": "resnext101_4x4d.test"}, r"ResNeXt-50 4x4d .* ResNeXt-101 4x4d"),
        ({"name": "resnext50_32x4d.test"}, r"ResNeXt-50 4x4d .* ResNeXt-50 32x4d"),
        ({"batch_norm": "fused"}, "batch norms kept, and .* batch norms fused"),
    ],
)
def test_file_must_be_what_the_catalog_says(
    changes: dict[str, str], said: str, handler: Handler
) -> None:
    known = handler(**changes)
    (name,) = known.entries
    for _ in range(2):
        with pytest.raises(WeightsError, match=said):
            ask(known, name)


def test_uses_a_file_put_there_by_hand(
    handler: Handler, web: Web, checkpoint: bytes, tmp_path: Path
) -> None:
    placed(tmp_path).parent.mkdir(parents=True)
    for content, expected in ((b"of another content", "Remove it"), (None, "cannot be read")):
        placed(tmp_path).write_bytes(checkpoint if content else b"rubbish")
        with pytest.raises(WeightsError, match=expected) as caught:
            ask(handler(content))
        assert str(placed(tmp_path)) in str(caught.value)
        assert left(tmp_path) == ["weights-0123.pth"]
    placed(tmp_path).write_bytes(checkpoint)
    assert len(read_tensors(ask(handler()))) == 265
    first = ask(handler(None))
    state = torch.load(placed(tmp_path), weights_only=True)
    state["bn1.bias"] += 1
    torch.save(state, placed(tmp_path))
    second = ask(handler(None))  # without a published checksum, the file's own decides
    bias = [read_tensors(path)["stem.conv1.norm.bias"] for path in (first, second)]
    assert torch.equal(bias[0] + 1, bias[1])
    assert not web.requests


def test_converts_with_the_pixels_of_the_catalog(
    handler: Handler, web: Web, monkeypatch: pytest.MonkeyPatch
) -> None:
    """OpenMMLab's copy of Detectron2's file has torchvision's names and expects BGR."""
    first = ask(handler())
    rgb = read_tensors(first)["stem.conv1.weight"]
    known = handler(name="resnext50_4x4d.bgr", pixels=entry("resnext101_32x8d.d2_in1k").pixels)
    bgr = read_tensors(ask(known, "resnext50_4x4d.bgr"))["stem.conv1.weight"]
    assert torch.equal(bgr, rgb.flip(1))
    monkeypatch.setattr(fetching, "FORMAT", fetching.FORMAT + 1)
    assert ask(handler()) != first


# --- names, licences, folders ---


@pytest.mark.parametrize("name", ["../../etc/passwd", "", ".", f"{NAME}/..", "resnext50_4x4d.tset"])
def test_only_names_of_the_catalog_reach_the_disk(
    name: str, handler: Handler, tmp_path: Path
) -> None:
    with pytest.raises(ConfigError, match=rf"is not in the catalog.*nearest: {NAME}"):
        ask(handler(), name)
    with pytest.raises(ConfigError, match="cannot be used: it normalises after the addition"):
        ask(handler(), "resnet50.fb_torch7")
    assert not (tmp_path / "cache").exists()


def test_warns_once_of_a_licence(handler: Handler, caplog: pytest.LogCaptureFixture) -> None:
    free, other = handler(), handler(licence="CC-BY-NC-4.0", commercial=False)
    with caplog.at_level(logging.WARNING):
        ask(free)
        assert not caplog.records
        ask(other)
        ask(other)
    (record,) = caplog.records
    assert record.getMessage() == f"{NAME} may not be used commercially (licence: CC-BY-NC-4.0)."


@pytest.mark.parametrize(
    ("variables", "expected"),
    [
        ({"RESNEXT_DET_CACHE": "/own", "FVCORE_CACHE": "/shared"}, "/own"),
        ({"RESNEXT_DET_CACHE": "", "FVCORE_CACHE": "/shared"}, "/shared/resnext_det"),
        ({}, "/home/somebody/.torch/iopath_cache/resnext_det"),
        ({"RESNEXT_DET_CACHE": "~/weights"}, "/home/somebody/weights"),
    ],
)
def test_cache_folder(
    variables: dict[str, str], expected: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setenv("HOME", "/home/somebody")
    for name in ("RESNEXT_DET_CACHE", "FVCORE_CACHE"):
        monkeypatch.delenv(name, raising=False)
    for name, value in variables.items():
        monkeypatch.setenv(name, value)
    assert fetching.cache_folder() == Path(expected)


# --- servers ---

BODY = bytes(range(256)) * 4096  # one megabyte


def refused(url: str, folder: Path, said: str) -> None:
    with pytest.raises(WeightsError, match=said) as caught:
        fetching.download(url, folder / "weights.pth")
    assert url in str(caught.value)
    assert not list(folder.iterdir())


def test_downloads_through_redirections_and_passing_errors(web: Web, tmp_path: Path) -> None:
    target = tmp_path / "weights.pth"
    half = web.sends(BODY[:500_000], length=len(BODY))
    later = web.sends(b"later", status=503)
    for number, answers in enumerate([(BODY,), (later, BODY), (half, BODY)]):
        url = web.serve(f"/{number}", *answers)
        fetching.download(web.serve("/a", web.redirects(url)), target)
        assert target.read_bytes() == BODY
    assert [path.name for path in tmp_path.iterdir()] == ["weights.pth"]


@pytest.mark.parametrize(
    ("words", "said"),
    [
        ({"status": 404}, "in 1 attempts.*404"),
        ({"status": 500}, "in 2 attempts.*500"),
        ({"kind": "text/html; charset=utf-8"}, "is a web page"),
        ({"length": 10**12}, r"sends 1,000,000,000,000 bytes, and at most"),
        ({"length": None}, "sends an unknown number of bytes"),
        ({"length": None, "chunked": True}, "sends an unknown number of bytes"),
        ({"chunked": True}, "sends an unknown number of bytes"),
        ({"length": len(BODY) + 1}, "1,048,576 of 1,048,577 bytes arrived"),
    ],
)
def test_refuses_bad_answers(words: dict[str, Any], said: str, web: Web, tmp_path: Path) -> None:
    refused(web.serve("/a", web.sends(BODY, **words)), tmp_path, said)


def test_reads_no_more_than_was_announced(web: Web, tmp_path: Path) -> None:
    fetching.download(web.serve("/a", web.sends(BODY, length=1000)), tmp_path / "weights.pth")
    assert (tmp_path / "weights.pth").stat().st_size == 1000


@pytest.mark.parametrize("target", ["file:///etc/hostname", "data:,x"])
def test_refuses_redirections_out_of_the_web(target: str, web: Web, tmp_path: Path) -> None:
    refused(web.serve("/a", web.redirects(target)), tmp_path, r"[Rr]edirect")


def test_refuses_to_leave_https(monkeypatch: pytest.MonkeyPatch, web: Web, tmp_path: Path) -> None:
    real = fetching.urllib.request.urlopen
    insecure = web.serve("/a", BODY)
    monkeypatch.setattr(fetching.urllib.request, "urlopen", lambda *_, **__: real(insecure))
    refused("https://example.org/a", tmp_path, "redirects to 'http:.*not secure")


def test_gives_up_on_silent_servers(
    web: Web, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(fetching, "_TIMEOUT", 0.3)
    url = web.serve("/a", web.sends(BODY, waits_after=500_000))
    refused(url, tmp_path, "in 2 attempts.*timed out")
    with socket.create_server(("127.0.0.1", 0)) as server:
        port = server.getsockname()[1]
        refused(f"http://127.0.0.1:{port}/a", tmp_path, "in 2 attempts.*timed out")
    refused(f"http://127.0.0.1:{port}/a", tmp_path, "in 2 attempts.*refused.*offline")
