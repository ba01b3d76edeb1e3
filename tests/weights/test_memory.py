"""Small files that ask for much memory are refused without allocating it."""

from __future__ import annotations

import copy
import json
import pickle
import subprocess
import sys
import zipfile
from collections import OrderedDict
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import torch

from tests.weights.test_reading import (
    TENSORS,
    legacy_parts,
    rewrite_archive,
    save_legacy,
    save_pickle,
)


class Call:
    """Asks for a call when it is unpickled."""

    def __init__(self, function: Any, *arguments: Any) -> None:
        self.call = function, arguments

    def __reduce__(self) -> Any:
        return self.call


def compressed(file: Path) -> None:
    torch.save({"a": torch.zeros(30_000_000)}, file)
    rewrite_archive(file, zipfile.ZIP_DEFLATED)


def stored_with_false_size(file: Path) -> None:
    torch.save(TENSORS, file)
    archive = bytearray(file.read_bytes())
    place = archive.rindex(b"/data/0") - 46 - len(file.stem)
    assert archive[place : place + 4] == b"PK\x01\x02"
    archive[place + 20 : place + 28] = 2 * (2**31).to_bytes(4, "little")
    file.write_bytes(archive)


def overlapping_archive(file: Path) -> None:
    """60 entries with the same 4 MB; without checksums, as torch.save may leave them out."""
    torch.save({str(number): torch.full((1_000_000,), float(number)) for number in range(60)}, file)
    with zipfile.ZipFile(file) as source:
        held = {name: source.read(name) for name in source.namelist()}
    with zipfile.ZipFile(file, "w") as target:
        for name, content in held.items():
            if "/data/" not in name or name.endswith("/data/0"):
                target.writestr(name, content)
        (first,) = (entry for entry in target.filelist if entry.filename.endswith("/data/0"))
        for name in held.keys() - set(target.namelist()):
            target.filelist.append(same := copy.copy(first))
            same.filename = name
        for entry in target.filelist:
            entry.CRC = 0


def far_memo_archive(file: Path) -> None:
    torch.save(TENSORS, file)
    rewrite_archive(file, zipfile.ZIP_STORED, data=b"\x80\x02}r\0\0\0\x08.")


def legacy_claim(file: Path) -> None:
    save_legacy({"a": torch.zeros(6)}, file)
    content = file.read_bytes()
    assert b"K\x06N" in content
    file.write_bytes(content.replace(b"K\x06N", b"J\xff\xff\xff\x7fN"))


def legacy_without_numbers(file: Path) -> None:
    """Its storages are not on the list of those that follow."""
    legacy_claim(file)
    program, _, _ = legacy_parts(file)
    file.write_bytes(program + pickle.dumps([], 2))


def many_copies_of_one_list(file: Path) -> None:
    pairs = [(number, number) for number in range(10_000)]
    save_pickle([Call(OrderedDict, pairs) for _ in range(10_000)], file, 2)


def many_arrays_of_one_block(file: Path) -> None:
    build = np.ones(2).__reduce__()[0]
    content = bytes(1_000_000)

    class Same:
        def __reduce__(self) -> Any:
            state = (1, (250_000,), np.dtype("f4"), False, content)
            return build, (np.ndarray, (0,), b"b"), state

    save_pickle({str(number): Same() for number in range(3000)}, file)


def array_with_shape(shape: Any, dtype: Any = np.dtype("f4"), content: Any = b"1234") -> bytes:
    class State:
        def __reduce__(self) -> tuple[Any, ...]:
            build = np.zeros(1).__reduce__()[0]
            return build, (np.ndarray, (0,), b"b"), (1, shape, dtype, False, content)

    return pickle.dumps({"a": State()})


def opcode(code: bytes, size: int, width: int = 8) -> bytes:
    return b"\x80\x04" + code + size.to_bytes(width, "little") + b"x."


def safetensors_file(header: Any, length: int | None = None) -> bytes:
    text = header if isinstance(header, bytes) else json.dumps(header).encode()
    return (len(text) if length is None else length).to_bytes(8, "little") + text + bytes(24)


def entry(shape: list[int], begin: int, end: int) -> dict[str, Any]:
    return {"dtype": "F32", "shape": shape, "data_offsets": [begin, end]}


WRITERS: dict[str, Callable[[Path], object]] = {
    "compressed archive": compressed,
    "archive with a false size": stored_with_false_size,
    "archive with overlapping entries": overlapping_archive,
    "archive with a far memo": far_memo_archive,
    "archive of a bytearray": lambda file: torch.save({"a": Call(bytearray, 2**30)}, file),
    "archive of a tensor": lambda file: torch.save({"a": Call(torch.FloatTensor, 2**32)}, file),
    "archive of a storage": lambda file: torch.save({"a": Call(torch.UntypedStorage, 2**34)}, file),
    "expanded tensor": lambda file: torch.save({"a": torch.ones(1).expand(2**40)}, file),
    "legacy bytearray": lambda file: save_legacy({"a": Call(bytearray, 2**30)}, file),
    "legacy claim": legacy_claim,
    "legacy without numbers": legacy_without_numbers,
    "pickled bytearray": lambda file: save_pickle({"a": Call(bytearray, 2**30)}, file),
    "pickled ndarray": lambda file: save_pickle({"a": Call(np.ndarray, (2**34,), "u1")}, file),
    "pickled zeros": lambda file: save_pickle({"a": Call(np.zeros, 2**34)}, file),
    "pickled dtype": lambda file: save_pickle({"a": Call(np.dtype, f"V{10**12}")}, file),
    "many copies": many_copies_of_one_list,
    "many arrays": many_arrays_of_one_block,
}
CONTENTS: dict[str, bytes] = {
    "far memo": b"\x80\x02Nr\0\0\0\x08.",
    "long bytes": opcode(b"\x8e", 2**34),
    "longer bytes": opcode(b"\x8e", 2**62),
    "long bytearray": opcode(b"\x96", 2**34),
    "long text": opcode(b"\x8d", 2**34),
    "long number": opcode(b"\x8b", 2**31 - 1, 4),
    "long frame": opcode(b"\x95", 2**40),
    "deep lists": b"\x80\x04" + b"](" * 20_000 + b"e" * 20_000 + b".",
    **{
        f"array of shape {number}": array_with_shape(shape)
        for number, shape in enumerate([(10**12,), (2**32, 2**32), (2,), (1.5,), "1", (1,) * 99])
    },
    "array of no bytes": array_with_shape((2**62, 4), content=b""),
    "array of a list": array_with_shape((1,), content=[b"1234"]),
    "array of objects": array_with_shape((2**40,), np.dtype(object), [None]),
    "array without a type": array_with_shape((1,), None),
    "long header": safetensors_file({"a": entry([6], 0, 24)}, 2**60),
    "short header": safetensors_file({"a": entry([6], 0, 24)}, 20),
    "overlap": safetensors_file({"a": entry([6], 0, 24), "b": entry([2], 16, 24)}),
    "beyond the end": safetensors_file({"a": entry([60], 0, 240)}),
    "large shape": safetensors_file({"a": entry([2**32, 2**32, 4], 0, 24)}),
    "negative offset": safetensors_file({"a": entry([6], -24, 0)}),
    "deep JSON": safetensors_file(b'{"a":' + b"[" * 100_000),
}

READ_ALL = """
import resource, sys
from pathlib import Path
from resnext_det.errors import WeightsError
from resnext_det.weights.reading import read_tensors

def peak():
    return resource.getrusage(resource.RUSAGE_SELF).ru_maxrss // 1024

read_tensors(Path(sys.argv[1]))
for file in sorted(Path(sys.argv[2]).iterdir()):
    before = peak()
    try:
        read_tensors(file)
        print(file.name, "read")
    except WeightsError as error:
        assert str(file) in str(error), error
        print(file.name, "refused", peak() - before)
"""


def test_memory_is_limited_by_the_file(tmp_path: Path) -> None:
    """In a separate process, as any of the files might kill it."""
    folder, good = tmp_path / "bombs", tmp_path / "good.pth"
    folder.mkdir()
    torch.save(TENSORS, good)
    for name, write in WRITERS.items():
        write(folder / name)
    for name, content in CONTENTS.items():
        (folder / name).write_bytes(content)
    words = [sys.executable, "-W", "ignore", "-c", READ_ALL, str(good), str(folder)]
    done = subprocess.run(words, capture_output=True, text=True, timeout=100)
    assert done.returncode == 0, (done.stdout[-300:], done.stderr[-2000:])
    lines = done.stdout.splitlines()
    assert len(lines) == len(WRITERS) + len(CONTENTS)
    assert not [line for line in lines if line.endswith("read")]
    for line in lines:
        assert int(line.split()[-1]) < 100, line  # megabytes
