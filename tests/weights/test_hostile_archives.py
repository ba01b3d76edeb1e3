"""Archives and safetensors files that say one thing and hold another: refused by name."""

from __future__ import annotations

import io
import json
import zipfile
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch

from resnext_det.errors import WeightsError
from resnext_det.weights.reading import read_tensors

TENSORS = {"conv1.weight": torch.arange(6.0).reshape(2, 3), "bn1.bias": torch.ones(2)}
Save = Callable[[Any, Path], None]


def zipped(
    data: bytes, file: Path, method: int = zipfile.ZIP_STORED, order: bytes = b"little"
) -> None:
    """Write torch.save's archive with other content, its sums in order."""
    buffer = io.BytesIO()
    torch.save(TENSORS, buffer)
    with zipfile.ZipFile(buffer) as source, zipfile.ZipFile(file, "w", method) as target:
        for entry in source.infolist():
            part = entry.filename.partition("/")[2]
            own = {"data.pkl": data, "byteorder": order}
            target.writestr(entry.filename, own.get(part) or source.read(entry))


# --- archives ---


def content() -> bytes:
    """Return the pickle that torch.save writes."""
    buffer = io.BytesIO()
    torch.save(TENSORS, buffer)
    return zipfile.ZipFile(buffer).read("archive/data.pkl")


def test_an_archive_that_is_not_compressed_is_read(tmp_path: Path) -> None:
    """So that the tests below refuse what they say, not the way the archive is written here."""
    zipped(content(), tmp_path / "a.pth")
    assert read_tensors(tmp_path / "a.pth").keys() == TENSORS.keys()
    zipped(content(), tmp_path / "b.pth", zipfile.ZIP_DEFLATED)
    with pytest.raises(WeightsError, match="compressed archive"):
        read_tensors(tmp_path / "b.pth")


def test_a_part_that_claims_more_than_the_file_has(tmp_path: Path) -> None:
    file = tmp_path / "a.pth"
    zipped(content(), file)
    archive = bytearray(file.read_bytes())
    place = archive.rindex(b"archive/data/0") - 46
    assert archive[place : place + 4] == b"PK\x01\x02"
    archive[place + 20 : place + 28] = 2 * (2**31).to_bytes(4, "little")
    file.write_bytes(archive)
    with pytest.raises(WeightsError, match="may unpack to any size"):
        read_tensors(file)


@pytest.mark.filterwarnings("ignore:Detected pickle protocol")
def test_what_a_file_says_is_not_printed_as_it_stands(tmp_path: Path) -> None:
    """PyTorch's messages hold words of the file, and its advice is to trust it."""
    zipped(content(), tmp_path / "a.pth", order=b"\x1b[2J\n")
    torch.save(TENSORS, tmp_path / "b.pth", pickle_protocol=4)
    for name in ("a.pth", "b.pth"):
        with pytest.raises(WeightsError, match=name) as caught:
            read_tensors(tmp_path / name)
        assert str(caught.value).isprintable()
        assert "weights_only" not in str(caught.value)


def twice(entry: str) -> Callable[[zipfile.ZipFile], None]:
    return lambda archive: archive.writestr(entry, b"\x80\x02}.")


ARCHIVES: dict[str, Callable[[zipfile.ZipFile], None]] = {
    "its content twice": twice("archive/data.pkl"),
    "its content in capitals": twice("archive/DATA.PKL"),
    "another folder": twice("other/data.pkl"),
}


@pytest.mark.filterwarnings("ignore:Duplicate name")
@pytest.mark.parametrize("case", ARCHIVES)
def test_archives_that_may_be_read_in_two_ways_are_refused(case: str, tmp_path: Path) -> None:
    buffer = io.BytesIO()
    torch.save(TENSORS, buffer)
    with zipfile.ZipFile(buffer, "a") as archive:
        ARCHIVES[case](archive)
    file = tmp_path / "a.pth"
    file.write_bytes(buffer.getvalue())
    with pytest.raises(WeightsError, match="a zip archive, but not one"):
        read_tensors(file)


def test_changed_numbers_in_an_archive_are_noticed(tmp_path: Path) -> None:
    """PyTorch itself does not compare the sums that it writes."""
    buffer = io.BytesIO()
    torch.save({"a": torch.full((100,), 3.0)}, buffer)
    content = buffer.getvalue().replace(torch.full((9,), 3.0).numpy().tobytes(), bytes(36), 1)
    file = tmp_path / "a.pth"
    file.write_bytes(content)
    assert not torch.load(file, weights_only=True)["a"].all()
    with pytest.raises(WeightsError, match="has changed since it was written"):
        read_tensors(file)


def test_archives_saved_without_sums_are_read(tmp_path: Path) -> None:
    options = torch.serialization.get_crc32_options()
    torch.serialization.set_crc32_options(False)
    try:
        torch.save(TENSORS, tmp_path / "a.pth")
    finally:
        torch.serialization.set_crc32_options(options)
    assert read_tensors(tmp_path / "a.pth").keys() == TENSORS.keys()


# --- safetensors ---


def safetensors_file(header: Any, content: bytes = bytes(24), length: int | None = None) -> bytes:
    text = header if isinstance(header, bytes) else json.dumps(header).encode()
    return (len(text) if length is None else length).to_bytes(8, "little") + text + content


def one(shape: list[int], begin: int, end: int, kind: str = "F32") -> dict[str, Any]:
    return {"dtype": kind, "shape": shape, "data_offsets": [begin, end]}


LIES: dict[str, bytes] = {
    "a header that is longer": safetensors_file({"a": one([6], 0, 24)}, length=10**6),
    "a header that is shorter": safetensors_file({"a": one([6], 0, 24)}, length=20),
    "a header without end": safetensors_file({"a": one([6], 0, 24)}, length=2**60),
    "overlapping tensors": safetensors_file({"a": one([6], 0, 24), "b": one([2], 16, 24)}),
    "tensors behind the end": safetensors_file({"a": one([60], 0, 240)}),
    "a shape of more": safetensors_file({"a": one([600], 0, 24)}),
    "a shape that overflows": safetensors_file({"a": one([2**32, 2**32, 4], 0, 24)}),
    "a hole": safetensors_file({"a": one([2], 0, 8), "b": one([2], 16, 24)}),
    "bytes left over": safetensors_file({"a": one([2], 0, 8)}),
    "an end before the begin": safetensors_file({"a": one([6], 24, 0)}),
    "negative offsets": safetensors_file({"a": one([6], -24, 0)}),
    "an unknown type": safetensors_file({"a": one([6], 0, 24, "F99")}),
    "no JSON": safetensors_file(b"{not json at all}"),
    "deep JSON": safetensors_file(b'{"a":' + b"[" * 100_000),
}


@pytest.mark.parametrize("case", LIES)
def test_lies_in_safetensors(case: str, tmp_path: Path) -> None:
    file = tmp_path / "a.safetensors"
    file.write_bytes(LIES[case])
    with pytest.raises(WeightsError, match=r"a\.safetensors cannot be read"):
        read_tensors(file)


def test_safetensors_written_here_are_read(tmp_path: Path) -> None:
    file = tmp_path / "a.safetensors"
    file.write_bytes(safetensors_file({"a": one([6], 0, 24)}))
    assert read_tensors(file)["a"].shape == (6,)
