"""Files cut short and files with other bytes: refused by name, or read as the network they were."""

from __future__ import annotations

import functools
import io
import pickle
import random
import zipfile
from collections.abc import Callable
from pathlib import Path

import pytest
import safetensors.torch
import torch
from torch import Tensor

from resnext_det import ResNeXt
from resnext_det.errors import WeightsError
from resnext_det.weights.converting import read_backbone
from resnext_det.weights.layouts import to_torchvision
from resnext_det.weights.reading import read_tensors


@functools.cache
def tensors() -> dict[str, Tensor]:
    """A network as narrow as there is one, so that names and shapes are much of its file."""
    torch.manual_seed(3)
    sizes = {"stem_out_channels": 4, "res2_out_channels": 8}
    return to_torchvision(ResNeXt(26, "2x2d", norm="BN", num_classes=3, **sizes).state_dict())


def saved(**options: bool) -> bytes:
    buffer = io.BytesIO()
    torch.save({"state_dict": tensors(), "epoch": 3}, buffer, **options)
    return buffer.getvalue()


def pickled(protocol: int) -> bytes:
    return pickle.dumps({n: tensor.numpy() for n, tensor in tensors().items()}, protocol)


KINDS: dict[str, Callable[[], bytes]] = {
    "zip": saved,
    "legacy": lambda: saved(_use_new_zipfile_serialization=False),
    "pickle, protocol 2": lambda: pickled(2),
    "pickle, protocol 4": lambda: pickled(4),
    "safetensors": lambda: safetensors.torch.save(tensors()),
}


@functools.cache
def content_of(kind: str) -> bytes:
    return KINDS[kind]()


@functools.cache
def shapes() -> dict[str, torch.Size]:
    """The names and shapes of the undamaged network, by Detectron2's names."""
    sizes = {"stem_out_channels": 4, "res2_out_channels": 8}
    network = ResNeXt(26, "2x2d", norm="FrozenBN", **sizes)
    return {name: tensor.shape for name, tensor in network.state_dict().items()}


def read_or_refused(content: bytes, file: Path) -> bool:
    """Tell whether a file is read; if so, it holds the network, and else it is refused by name."""
    file.write_bytes(content)
    try:
        found = read_backbone(file).tensors
    except WeightsError as error:
        assert str(file) in str(error)
        assert str(error).isprintable()
        return False
    assert {name: tensor.shape for name, tensor in found.items()} == shapes()
    assert all(torch.isfinite(tensor).all() for tensor in found.values())
    return True


@pytest.mark.parametrize("kind", KINDS)
def test_undamaged_files_are_read(kind: str, tmp_path: Path) -> None:
    assert read_or_refused(content_of(kind), tmp_path / "weights")


@pytest.mark.parametrize("kind", KINDS)
def test_files_cut_short_are_refused(kind: str, tmp_path: Path) -> None:
    """At every 64th of the length, and near both ends."""
    content, file = content_of(kind), tmp_path / "weights"
    ends = [len(content) * part // 64 for part in range(64)]
    for end in sorted({*ends, *range(16), *range(len(content) - 16, len(content))}):
        file.write_bytes(content[:end])
        with pytest.raises(WeightsError, match="weights"):
            read_tensors(file)


def changed(content: bytes, generator: random.Random, within: int) -> bytes:
    """Change one to three bytes, all of them among the first so many."""
    other = bytearray(content)
    for _ in range(generator.randint(1, 3)):
        place = generator.randrange(min(within, len(other)))
        other[place] = generator.choice([other[place] ^ (1 << generator.randrange(8)),
                                         generator.randrange(256)])  # fmt: skip
    return bytes(other)


@pytest.mark.parametrize("within", [300, 5000, 10**9], ids=["start", "names", "all"])
@pytest.mark.parametrize("kind", KINDS)
def test_changed_bytes(kind: str, within: int, tmp_path: Path) -> None:
    generator = random.Random(f"{kind} {within}")
    content, file = content_of(kind), tmp_path / "weights"
    read = [read_or_refused(changed(content, generator, within), file) for _ in range(25)]
    assert not all(read)


@pytest.mark.parametrize("within", [300, 10**9], ids=["start", "all"])
def test_changed_bytes_under_sums_that_fit(within: int, tmp_path: Path) -> None:
    """An archive's checksums would hide what a change does to its pickle."""
    generator = random.Random(within)
    with zipfile.ZipFile(io.BytesIO(content_of("zip"))) as archive:
        parts = {entry.filename: archive.read(entry) for entry in archive.infolist()}
    for _ in range(30):
        buffer = io.BytesIO()
        with zipfile.ZipFile(buffer, "w") as archive:
            for name, part in parts.items():
                own = name.endswith("data.pkl")
                archive.writestr(name, changed(part, generator, within) if own else part)
        read_or_refused(buffer.getvalue(), tmp_path / "weights")
