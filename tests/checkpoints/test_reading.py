from __future__ import annotations

import os
import pickle
import random
import zipfile
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch

from resnext_det.checkpoints.folder import last_good
from resnext_det.checkpoints.reading import iteration_of, read_outline, read_verified
from resnext_det.checkpoints.run import read_run
from resnext_det.checkpoints.writing import checksum_file, write_checkpoint
from resnext_det.errors import TrainingError, WeightsError
from resnext_det.files import file_digest

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


@pytest.mark.parametrize("checksum", [True, False])
def test_a_file_that_was_cut_short_is_refused(file: Path, checksum: bool) -> None:
    whole = file.read_bytes()
    if not checksum:
        checksum_file(file).unlink()
    assert same(read_verified(file))
    for size in (0, 1, 100, len(whole) // 2, len(whole) * 9 // 10, len(whole) - 1):
        file.write_bytes(whole[:size])
        with pytest.raises(WeightsError, match=r"model_0000024\.pth"):
            read_verified(file)


def flipped(whole: bytes, bit: int) -> bytes:
    changed = bytearray(whole)
    changed[bit // 8] ^= 1 << bit % 8
    return bytes(changed)


def test_a_flipped_bit_is_noticed_by_the_checksum_beside_the_file(file: Path) -> None:
    whole = file.read_bytes()
    for bit in random.Random(0).sample(range(8 * len(whole)), 25):
        file.write_bytes(flipped(whole, bit))
        with pytest.raises(WeightsError, match="damaged: its sha256"):
            read_verified(file)


def test_a_flipped_bit_changes_no_number_of_a_file_without_a_checksum(file: Path) -> None:
    """As stock Detectron2 writes them; torch.load itself would take changed numbers."""
    checksum_file(file).unlink()
    whole = file.read_bytes()
    numbers = whole.index(torch.arange(64.0).numpy().tobytes()) * 8
    silent = refused = 0
    bits = [*random.Random(1).sample(range(8 * len(whole)), 100), numbers, numbers + 64 * 32 - 1]
    for bit in bits:
        file.write_bytes(flipped(whole, bit))
        try:
            assert same(read_verified(file))
            silent += 1  # of what only fills up, or is not read
        except WeightsError:
            refused += 1
    assert refused > 30 and silent + refused == len(bits)
    file.write_bytes(flipped(whole, numbers))
    assert not torch.equal(torch.load(file)["model"]["w"], torch.arange(64.0))
    with pytest.raises(WeightsError, match=r"its part .*data/. is damaged"):
        read_verified(file)


def test_checksums_that_were_left_out_are_not_asked_for(tmp_path: Path) -> None:
    before = torch.serialization.get_crc32_options()
    torch.serialization.set_crc32_options(False)
    try:
        torch.save(CONTENT, tmp_path / "stock.pth")
    finally:
        torch.serialization.set_crc32_options(before)
    assert same(read_verified(tmp_path / "stock.pth"))


@pytest.mark.parametrize(
    "text", ["", "\0\xff" * 40, "0" * 64 + "  model_0000024.pth\n", "{right}  other.pth\n"]
)
def test_a_checksum_of_another_file_condemns(file: Path, text: str) -> None:
    text = text.replace("{right}", file_digest(file))
    checksum_file(file).write_text(text, encoding="latin1")
    with pytest.raises(WeightsError, match=r"remove model_0000024\.pth\.sha256"):
        read_verified(file)


class Hostile:
    def __init__(self, mark: Path) -> None:
        self.mark = mark

    def __reduce__(self) -> tuple[Callable[..., Any], tuple[Any, ...]]:
        return os.mkdir, (str(self.mark),)


def hide(file: Path, mark: Path) -> None:
    """Put a pickle into a file of torch.save that makes what it calls of words on its stack."""
    with zipfile.ZipFile(file) as source:
        parts = {name: source.read(name) for name in source.namelist()}
    with zipfile.ZipFile(file, "w") as target:
        for name, part in parts.items():
            hidden = f"}}(S'x'\n(S'{mark}'\nios\nmkdir\nu.".encode()
            target.writestr(name, hidden if name.endswith("/data.pkl") else part)


@pytest.mark.parametrize("kind", ["zip", "hidden", "legacy", "pickle"])
def test_a_hostile_file_is_never_executed(tmp_path: Path, kind: str) -> None:
    file, mark = tmp_path / "model_final.pth", tmp_path / "executed"
    hostile = {**CONTENT, "resnext_det_run": None if kind == "hidden" else Hostile(mark)}
    if kind == "pickle":
        file.write_bytes(pickle.dumps(hostile))
    else:
        torch.save(hostile, file, _use_new_zipfile_serialization=kind != "legacy")
    if kind == "hidden":
        hide(file, mark)
    checksum_file(file).write_text(f"{file_digest(file)}  {file.name}\n")
    archive = kind in ("zip", "hidden")
    for read in (read_verified, read_outline, *([read_run] if archive else [])):
        with pytest.raises(WeightsError, match="asks for" if kind == "zip" else "cannot be read"):
            read(file)
    if not archive:  # a file of another program, which tells nothing of a run: it is not opened
        assert read_run(file) is None
    with pytest.raises(TrainingError, match="asks for" if kind == "zip" else "cannot be read"):
        last_good(tmp_path)
    assert not mark.exists()
    torch.load(file, weights_only=False) if kind != "pickle" else pickle.loads(file.read_bytes())
    assert mark.exists()  # it would have been


def test_a_file_that_unpacks_to_more_than_its_size_is_refused(tmp_path: Path, file: Path) -> None:
    torch.save({**CONTENT, "model": {"w": torch.zeros(1_000_000)}}, tmp_path / "large.pth")
    packed = tmp_path / "packed.pth"
    with (
        zipfile.ZipFile(tmp_path / "large.pth") as source,
        zipfile.ZipFile(packed, "w", zipfile.ZIP_DEFLATED) as target,
    ):
        for name in source.namelist():
            target.writestr(name, source.read(name))
    assert packed.stat().st_size < 100_000
    for read in (read_verified, read_outline):
        with pytest.raises(WeightsError, match="unpack to more than its size"):
            read(packed)


@pytest.mark.parametrize(
    ("change", "reason"),
    [
        ({"model": {}}, "no model"),
        ({"model": {"w": 1}}, "no model"),
        ({"model": {1: torch.ones(1)}}, "no model"),
        ({"model": [torch.ones(1)]}, "no model"),
        ({"iteration": -1}, "no iteration"),
        ({"iteration": "24"}, "no iteration"),
        ({"optimizer": None}, "no optimizer"),
    ],
)
def test_what_is_no_checkpoint_of_a_training_is_told(
    tmp_path: Path, change: dict[str, Any], reason: str
) -> None:
    write_checkpoint({**CONTENT, **change}, tmp_path / "a.pth")
    with pytest.raises(WeightsError, match=rf"a\.pth is no checkpoint of a training: .*{reason}"):
        read_verified(tmp_path / "a.pth")


def test_other_contents_and_places_are_refused(tmp_path: Path) -> None:
    torch.save([1, 2], tmp_path / "list.pth")
    with pytest.raises(WeightsError, match="holds a list"):
        read_verified(tmp_path / "list.pth")
    for place in (tmp_path, tmp_path / "missing.pth"):
        with pytest.raises(WeightsError, match="no such file"):
            read_verified(place)


def test_an_outline_has_everything_but_the_numbers(file: Path) -> None:
    outline = read_outline(file)
    assert outline["iteration"] == 24 and outline["model"]["w"].shape == (64,)
    assert outline["model"]["w"].is_meta


def test_the_iteration_is_found_where_detectron2_keeps_it() -> None:
    assert iteration_of({"iteration": 0, "trainer": {"iteration": 7}}) == 0
    assert iteration_of({"model": {}, "trainer": {"iteration": 7}}) == 7
    assert iteration_of({"model": {"iteration": torch.ones(1)}}) is None
