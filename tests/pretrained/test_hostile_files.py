"""Files made to do harm: refused by name, nothing run, nothing written, no memory taken."""

from __future__ import annotations

import io
import json
import os
import pickle
import subprocess
import sys
import zipfile
from collections import OrderedDict
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch

from resnext_det.errors import WeightsError
from resnext_det.pretrained.readers import read_tensors

TENSORS = {"conv1.weight": torch.arange(6.0).reshape(2, 3), "bn1.bias": torch.ones(2)}
ARRAYS = {name: tensor.numpy() for name, tensor in TENSORS.items()}
Save = Callable[[Any, Path], None]


def save_legacy(content: Any, file: Path) -> None:
    torch.save(content, file, _use_new_zipfile_serialization=False)


def save_pickle(content: Any, file: Path, protocol: int = 4) -> None:
    file.write_bytes(pickle.dumps(content, protocol))


SAVES: dict[str, Save] = {"zip": torch.save, "legacy": save_legacy, "pickle": save_pickle}


# --- code ---


class Attack:
    """Runs a command when it is unpickled."""

    def __init__(self, marker: Path) -> None:
        self.marker = marker

    def __reduce__(self) -> tuple[object, ...]:
        return os.system, (f"touch {self.marker}",)


NESTS: dict[str, Callable[[Any], Any]] = {
    "alone": lambda attack: attack,
    "in a dict": lambda attack: {**ARRAYS, "b": attack},
    "in lists and tuples": lambda attack: {"model": {**ARRAYS, "b": [({"c": attack},)]}},
    "beside the weights": lambda attack: {"state_dict": dict(TENSORS), "optimizer": [attack]},
    "as a key": lambda attack: {"model": {(1, attack): 2}},
    "in an array of objects": lambda attack: {**ARRAYS, "b": np.array([attack, 1], object)},
    "in an ordered dict": lambda attack: OrderedDict(a=OrderedDict(b=attack)),
}


@pytest.mark.parametrize("name", ["weights.pkl", "weights.pth", "weights.safetensors", "x.t7"])
@pytest.mark.parametrize("kind", SAVES)
@pytest.mark.parametrize("nest", NESTS)
def test_code_never_runs(nest: str, kind: str, name: str, tmp_path: Path) -> None:
    marker, file = tmp_path / "it-ran", tmp_path / name
    SAVES[kind](NESTS[nest](Attack(marker)), file)
    with pytest.raises(WeightsError, match=name) as caught:
        read_tensors(file)
    assert [each.name for each in tmp_path.iterdir()] == [name]
    assert "arrays in plain containers" in str(caught.value)
    assert "trust" not in str(caught.value)  # what torch says of a file that it refuses


@pytest.mark.parametrize("kind", SAVES)
def test_the_attack_is_one(kind: str, tmp_path: Path) -> None:
    """The test above would pass for nothing if the files did no harm."""
    marker, file = tmp_path / "it-ran", tmp_path / "weights.pth"
    SAVES[kind]({"a": Attack(marker)}, file)
    if kind == "pickle":
        pickle.loads(file.read_bytes())
    else:
        torch.load(file, weights_only=False)
    assert marker.exists()


def test_a_program_is_refused(tmp_path: Path) -> None:
    file = tmp_path / "script.pth"
    torch.jit.save(torch.jit.script(torch.nn.Linear(2, 2)), file)
    with pytest.raises(WeightsError, match=r"script\.pth is refused: it is a program"):
        read_tensors(file)


# --- memory ---


class Call:
    """Asks for a call when it is unpickled."""

    def __init__(self, function: Any, *arguments: Any) -> None:
        self.call = function, arguments

    def __reduce__(self) -> Any:
        return self.call


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


def unlisted(file: Path, behind: bytes = b"") -> None:
    """Leave storages out of the list by which the old format reads them."""
    save_legacy({"a": torch.ones(6), "optimizer": [torch.ones(1000)]}, file)
    content = file.read_bytes()
    at = content.rindex(b"\x80\x02]")
    file.write_bytes(content[:at] + pickle.dumps([], 2) + behind)


def legacy_claim(file: Path) -> None:
    save_legacy({"a": torch.zeros(6)}, file)
    content = file.read_bytes()
    assert b"K\x06N" in content
    file.write_bytes(content.replace(b"K\x06N", b"J\xff\xff\xff\x7fN"))


def bombed(file: Path) -> None:
    torch.save({"a": torch.zeros(40_000_000)}, file)
    with zipfile.ZipFile(file) as source:
        parts = {entry.filename: source.read(entry) for entry in source.infolist()}
    with zipfile.ZipFile(file, "w", zipfile.ZIP_DEFLATED) as target:
        for name, content in parts.items():
            target.writestr(name, content)


def many_copies(file: Path) -> None:
    """Ten thousand ordered dicts of one list of ten thousand pairs."""
    pairs = [(number, number) for number in range(10_000)]
    save_pickle([Call(OrderedDict, pairs) for _ in range(10_000)], file, 2)


def shared(file: Path) -> None:
    """Thousands of arrays of the same million bytes."""
    build = ARRAYS["bn1.bias"].__reduce__()[0]
    content = bytes(1_000_000)

    class Same:
        def __reduce__(self) -> Any:
            state = (1, (250_000,), np.dtype("f4"), False, content)
            return build, (np.ndarray, (0,), b"b"), state

    save_pickle({str(number): Same() for number in range(3000)}, file)


def huge_opcode(opcode: bytes, size: int, width: int = 8) -> bytes:
    return b"\x80\x04" + opcode + size.to_bytes(width, "little") + b"x."


def keyed_by_tuples(file: Path) -> None:
    """Python hashes tuples in one another without a look at its stack."""
    file.write_bytes(b"\x80\x04}" + b"N" + b"\x85" * 200_000 + b"Ns.")


BOMBS: dict[str, Callable[[Path], object]] = {
    "a place in the memo": lambda file: file.write_bytes(b"\x80\x02Nr\0\0\0\x08."),
    "a place in the memo, zip": lambda file: zipped(b"\x80\x02}r\0\0\0\x08.", file),
    "long bytes": lambda file: file.write_bytes(huge_opcode(b"\x8e", 2**34)),
    "longer bytes": lambda file: file.write_bytes(huge_opcode(b"\x8e", 2**62)),
    "a long bytearray": lambda file: file.write_bytes(huge_opcode(b"\x96", 2**34)),
    "a long text": lambda file: file.write_bytes(huge_opcode(b"\x8d", 2**34)),
    "a long number": lambda file: file.write_bytes(huge_opcode(b"\x8b", 2**31 - 1, 4)),
    "a long frame": lambda file: file.write_bytes(huge_opcode(b"\x95", 2**40)),
    "a bytearray": lambda file: save_pickle({"a": Call(bytearray, 2**30)}, file),
    "a bytearray, zip": lambda file: torch.save({"a": Call(bytearray, 2**30)}, file),
    "a bytearray, legacy": lambda file: save_legacy({"a": Call(bytearray, 2**30)}, file),
    "an array": lambda file: save_pickle({"a": Call(np.ndarray, (2**34,), "u1")}, file),
    "zeros": lambda file: save_pickle({"a": Call(np.zeros, 2**34)}, file),
    "a tensor": lambda file: torch.save({"a": Call(torch.FloatTensor, 2**32)}, file),
    "a storage": lambda file: torch.save({"a": Call(torch.UntypedStorage, 2**34)}, file),
    "a claimed storage": legacy_claim,
    "storages that are not listed": unlisted,
    "storages that are not listed, but there": lambda file: unlisted(file, bytes(5000)),
    "a compressed archive": bombed,
    "one number as many": lambda file: torch.save({"a": torch.ones(1).expand(2**40)}, file),
    "one list in many": many_copies,
    "one block in many": shared,
    "tuples as keys": keyed_by_tuples,
    "tuples as keys, zip": lambda file: zipped(
        b"\x80\x02}" + b"N" + b"\x85" * 200_000 + b"Ns.", file
    ),
    "deep lists": lambda file: file.write_bytes(
        b"\x80\x04" + b"](" * 20_000 + b"e" * 20_000 + b"."
    ),
    "a safetensors header": lambda file: file.write_bytes((2**60).to_bytes(8, "little") + b'{"a"'),
}

READ_ALL = """
import resource, sys
from pathlib import Path
from resnext_det.errors import WeightsError
from resnext_det.pretrained.readers import read_tensors

def peak():
    return resource.getrusage(resource.RUSAGE_SELF).ru_maxrss // 1024

read_tensors(Path(sys.argv[1]))
for file in sorted(Path(sys.argv[2]).iterdir()):
    before = peak()
    try:
        print(file.name, "was read")
        read_tensors(file)
    except WeightsError as error:
        assert str(file) in str(error), error
        print(file.name, "was refused", peak() - before)
"""


def test_memory_is_that_of_the_file(tmp_path: Path) -> None:
    """In a process of its own, which could be killed by any of them.

    Without a check each takes 160 megabytes or more, or crashes, or is read.
    """
    folder, good = tmp_path / "bombs", tmp_path / "good.pth"
    folder.mkdir()
    torch.save(TENSORS, good)
    for name, write in BOMBS.items():
        write(folder / name)
    words = [sys.executable, "-W", "ignore", "-c", READ_ALL, str(good), str(folder)]
    done = subprocess.run(words, capture_output=True, text=True, timeout=100)
    assert done.returncode == 0, (done.stdout[-300:], done.stderr[-2000:])
    refused = [line for line in done.stdout.splitlines() if "was refused" in line]
    assert len(refused) == len(BOMBS), done.stdout
    for line in refused:
        assert int(line.split()[-1]) < 100, line  # megabytes


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


def test_what_a_file_says_is_not_printed_as_it_stands(tmp_path: Path) -> None:
    """PyTorch's messages hold words of the file, and its advice is to trust it."""
    zipped(content(), tmp_path / "a.pth", order=b"\x1b[2J\n")
    torch.save(TENSORS, tmp_path / "b.pth", pickle_protocol=4)
    for name in ("a.pth", "b.pth"):
        with pytest.raises(WeightsError, match=name) as caught:
            read_tensors(tmp_path / name)
        assert str(caught.value).isprintable()
        assert "trust" not in str(caught.value)


def twice(entry: str) -> Callable[[zipfile.ZipFile], None]:
    return lambda archive: archive.writestr(entry, b"\x80\x02}.")


ARCHIVES: dict[str, Callable[[zipfile.ZipFile], None]] = {
    "its content twice": twice("archive/data.pkl"),
    "its content in capitals": twice("archive/DATA.PKL"),
    "another folder": twice("other/data.pkl"),
    "a comment": lambda archive: setattr(archive, "comment", b"PK\x05\x06"),
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
    with pytest.raises(WeightsError, match="a zip archive, and"):
        read_tensors(file)


@pytest.mark.parametrize("save", [torch.save, lambda _, file: zipped(content(), file)])
@pytest.mark.parametrize("ahead", [b"", b"PK\x03\x04 and more"])
def test_bytes_around_an_archive_are_refused(ahead: bytes, save: Save, tmp_path: Path) -> None:
    file = tmp_path / "a.pth"
    save(TENSORS, file)
    file.write_bytes(ahead + file.read_bytes() + (b"" if ahead else b"behind"))
    with pytest.raises(WeightsError, match="does not end as those of torch"):
        read_tensors(file)


def test_another_directory_of_64_bit_is_refused(tmp_path: Path) -> None:
    """Some readers look for it where the file says, others where it always is."""
    buffer = io.BytesIO()
    torch.save(TENSORS, buffer)
    content = bytearray(buffer.getvalue())
    assert content[-42:-38] == b"PK\x06\x07"
    content[-34] ^= 1
    file = tmp_path / "a.pth"
    file.write_bytes(content)
    with pytest.raises(WeightsError, match="does not end as those of torch"):
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
