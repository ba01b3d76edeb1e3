"""Torch7 files that are damaged, or made to do harm: refused with the place, in little memory."""

from __future__ import annotations

import contextlib
import gc
import struct
import sys
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st

from resnext_det.errors import WeightsError
from resnext_det.pretrained import torch7
from resnext_det.pretrained.torch7 import Torch7Object, Torch7Storage, Torch7Tensor, read_torch7
from resnext_det.pretrained.torch7_layout import torch7_tensors

sys.path.append(str(Path(__file__).parent))  # tests are no package to import from
from written_torch7 import (
    Object,
    Raw,
    Storage,
    Style,
    View,
    little_memory,
    tiny_network,
    tiny_state,
    written,
)


@pytest.fixture()
def file(tmp_path: Path) -> Path:
    return tmp_path / "model.t7"


def read(value: object, file: Path) -> Any:
    file.write_bytes(value.content if isinstance(value, Raw) else written(value))
    return read_torch7(file)


def packed(layout: str, *values: int) -> bytes:
    return struct.pack(f"<{layout}", *values)


def named(name: str, index: int = 1) -> bytes:
    """Type id, index, version and class of an object."""
    return packed("iii3si", 4, index, 3, b"V 1", len(name)) + name.encode()


def table(*values: bytes, index: int = 1) -> bytes:
    return packed("iii", 3, index, len(values) // 2) + b"".join(values)


KEY = packed("ii1s", 2, 1, b"k")
FLOATS = packed("q", 4) + bytes(16)
STORAGE = named("torch.FloatStorage", 2) + FLOATS

HOSTILE: dict[str, tuple[bytes, str]] = {
    "a long string": (table(KEY, packed("ii", 2, 2**31 - 1)), r"byte 25 .*2147483647 bytes"),
    "a negative string": (table(KEY, packed("ii", 2, -1)), r"byte 25 .*-1 bytes"),
    "a large table": (packed("iii", 3, 1, 2**31 - 1), r"byte 8 .*2147483647 entries"),
    "a negative table": (packed("iii", 3, 1, -5), r"byte 8 .*-5 entries"),
    "a large storage": (named("torch.FloatStorage") + packed("q", 2**60), r"byte 0 .*FloatStorage"),
    "an overflowing storage": (
        named("torch.DoubleStorage") + packed("q", 2**61 + 1) + bytes(8),
        r"2305843009213693953 numbers",
    ),
    "a negative storage": (named("torch.FloatStorage") + packed("q", -1), r"-1 numbers"),
    "many dimensions": (named("torch.FloatTensor") + packed("i", 2**31 - 1), r"dimensions"),
    "negative dimensions": (named("torch.FloatTensor") + packed("i", -1), r"-1 dimensions"),
    "nine dimensions": (
        named("torch.FloatTensor") + packed("i", 9) + packed("19q", *[1] * 19) + STORAGE,
        r"9 dimensions",
    ),
    "sizes that overflow": (
        named("torch.FloatTensor") + packed("i5q", 2, 2**62, 2**62, 2**62, 1, 1) + STORAGE,
        r"sizes \(4611686018427387904, 4611686018427387904\).*storage has 4 numbers",
    ),
    "sizes that overflow to a few": (
        named("torch.FloatTensor") + packed("i5q", 2, 2**33, 2**31, 0, 0, 1) + STORAGE,
        r"sizes .*storage has 4 numbers",
    ),
    "one number many times": (
        named("torch.FloatTensor") + packed("i3q", 1, 2**40, 0, 1) + STORAGE,
        r"sizes \(1099511627776,\) and strides \(0,\)",
    ),
    "a negative size": (
        named("torch.FloatTensor") + packed("i5q", 2, -2, -2, 1, 1, 1) + STORAGE,
        r"sizes \(-2, -2\)",
    ),
    "a size of 0": (named("torch.FloatTensor") + packed("i3q", 1, 0, 1, 1) + STORAGE, r"\(0,\)"),
    "a negative stride": (
        named("torch.FloatTensor") + packed("i3q", 1, 2, -1, 2) + STORAGE,
        r"strides \(-1,\)",
    ),
    "a stride that leaves": (
        named("torch.FloatTensor") + packed("i3q", 1, 2, 4, 1) + STORAGE,
        r"strides \(4,\) from element 1",
    ),
    "an offset that leaves": (
        named("torch.FloatTensor") + packed("i3q", 1, 2, 1, 4) + STORAGE,
        r"from element 4",
    ),
    "an offset of 0": (
        named("torch.FloatTensor") + packed("i3q", 1, 2, 1, 0) + STORAGE,
        r"from element 0",
    ),
    "no storage": (named("torch.FloatTensor") + packed("i3qi", 1, 2, 1, 1, 0), r"has 0 numbers"),
    "a storage of another type": (
        named("torch.DoubleTensor") + packed("i3q", 1, 2, 1, 1) + STORAGE,
        r"DoubleTensor whose storage is no torch.DoubleStorage",
    ),
    "a storage that is a table": (
        named("torch.FloatTensor") + packed("i3q", 1, 2, 1, 1) + packed("iii", 3, 2, 0),
        r"storage is no torch.FloatStorage",
    ),
    "a tensor that is its own storage": (
        named("torch.FloatTensor") + packed("i3qii", 1, 2, 1, 1, 4, 1),
        r"refers to object 1, which is an unfinished tensor",
    ),
    "a reference to nowhere": (table(KEY, packed("ii", 3, 77)), r"byte 21 .*object 77, and 1"),
    "a negative reference": (table(KEY, packed("ii", 4, -1)), r"byte 21 .*object -1"),
    "reference 0": (table(KEY, packed("ii", 3, 0)), r"byte 21 .*object 0"),
    "a reference to another type": (table(KEY, packed("ii", 4, 1)), r"object 1, which is a dict"),
    "an object as a table": (
        named("nn.Identity") + table(KEY, packed("ii", 3, 1), index=2),
        r"object 1, which is a Torch7Object",
    ),
    "a Lua function": (
        table(KEY, packed("iii4s", 8, 2, 4, b"\x1bLua")),
        r"byte 21 .*\(type id 8\)",
    ),
    "an old Lua function": (table(KEY, packed("ii4s", 6, 4, b"\x1bLJ\2")), r"Lua function.*id 6"),
    "an early Lua function": (table(KEY, packed("ii4s", 7, 2, b"\x1bLJ\2")), r"Lua function.*id 7"),
    "an unknown type": (table(KEY, packed("i", 9)), r"byte 21 there is the type id 9"),
    "a negative type": (table(KEY, packed("i", -3)), r"type id -3"),
    "a boolean of 2": (table(KEY, packed("ii", 5, 2)), r"byte 21 .*boolean of 2"),
    "an entry under nil": (table(packed("i", 0), KEY), r"byte 12 .*under nil"),
    "an entry under NaN": (table(packed("id", 1, float("nan")), KEY), r"byte 12 .*NaN"),
    "an unknown class of torch": (named("torch.Timer") + table(index=2), r"a torch\.Timer, and"),
    "a class of no name": (named("") + table(index=2), r"class ''"),
    "a class of rubbish": (named("\x1b[2J") + table(index=2), r"class '\\x1b\[2J'"),
    "a class with a long name": (named("n" * 101) + table(index=2), r"class 'nnn"),
    "an object that is no table": (named("nn.Identity") + KEY, r"nn\.Identity whose content is no"),
    "bytes at the end": (table() + b"x", r"byte 12 the object ends, and 1 bytes follow"),
    "ASCII": (b"4\n1\n3\nV 1\n13\nnn.Sequential\n", r"ASCII.*torch\.save\(file, object\)"),
    "a zip": (b"PK\x03\x04" + bytes(40), r"begins with b'PK"),
    "text": (b"hello, I am no checkpoint", r"begins with b'hello, I'"),
    "nothing": (b"", r"begins with b''"),
    "a number": (packed("id", 1, 5), r"begins with"),
    "nils": (bytes(64), r"begins with"),
    "big endian": (struct.pack(">iii", 3, 1, 0), r"begins with"),
}


@pytest.mark.parametrize("case", HOSTILE)
def test_hostile_files_are_refused_with_the_place(case: str, file: Path) -> None:
    content, message = HOSTILE[case]
    file.write_bytes(content)
    with little_memory(), pytest.raises(WeightsError, match=message) as caught:
        read_torch7(file)
    assert len(str(caught.value)) < 500
    assert str(caught.value).startswith("at byte ")


DEEP: dict[str, Callable[[int], bytes]] = {
    "tables": lambda index: packed("iii", 3, index, 1) + KEY,
    "tables as keys": lambda index: packed("iii", 3, index, 1),
    "modules as contents": lambda index: named("nn.Identity", index),
    "GPUs": lambda index: named("nn.DataParallelTable", index).replace(b"V 1", b"V 3"),
    "storages": lambda index: named("torch.FloatTensor", index) + packed("iq", 0, 1),
}


@pytest.mark.parametrize("kind", DEEP)
def test_deep_files_are_refused(kind: str, file: Path) -> None:
    file.write_bytes(b"".join(DEEP[kind](index) for index in range(1, 100_000)))
    with little_memory(), pytest.raises(WeightsError, match="100 levels that are read"):
        read_torch7(file)


def test_a_chain_of_references_may_be_long(file: Path) -> None:
    """It is not deep in the file, and nothing may walk it recursively, not even to free it."""
    chain: dict[object, object] = {}
    tables: list[object] = [chain]
    for _ in range(20_000):
        chain = {"next": chain}
        tables.append(chain)
    root = read(dict(enumerate(tables)), file)
    count, at = 0, root[20_000]
    while "next" in at:
        count, at = count + 1, at["next"]
    assert count == 20_000
    del root, at
    gc.collect()


def test_more_values_than_any_network_has_are_refused(
    file: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    assert torch7._MOST_VALUES == 1_000_000
    monkeypatch.setattr(torch7, "_MOST_VALUES", 10_000)
    file.write_bytes(packed("iii", 3, 1, 6_000) + (KEY + packed("i", 0)) * 6_000)
    with pytest.raises(WeightsError, match=r"10,000 values that are read"):
        read_torch7(file)


def test_missing_files(tmp_path: Path) -> None:
    for file in (tmp_path, tmp_path / "none.t7"):
        with pytest.raises(WeightsError, match="cannot be opened"):
            read_torch7(file)


def every_kind() -> dict[object, object]:
    """A small root with every part of the format in it."""
    storage = Storage("Float", np.arange(4, dtype=np.float32))
    root: dict[object, object] = {"self": None, 1: 0.5, "flag": True, "text": "four"}
    root["self"] = root
    root["tensor"] = View("Float", (2, 2), (2, 1), 1, storage)
    root["again"] = View("Float", (2,), (2,), 2, storage)
    root["parallel"] = Object("nn.DataParallelTable", {"modules": {}}, 3, [{1: 1}])
    root["old"] = Object("nn.Identity", {"train": False}, None)
    return root


def test_every_truncation_is_refused(file: Path) -> None:
    content = written(every_kind())
    read(Raw(content), file)
    for length in range(len(content)):
        with pytest.raises(WeightsError, match="at byte"):
            read(Raw(content[:length]), file)


def test_truncated_networks_are_refused(file: Path) -> None:
    for length in range(0, len(NETWORK), 1009):
        with pytest.raises(WeightsError, match="at byte"):
            read(Raw(NETWORK[:length]), file)


def walk(root: object) -> int:
    """Use all that was read, so that what cannot be used shows."""
    seen, todo, numbers = set(), [root], 0
    while todo:
        value = todo.pop()
        if id(value) in seen:
            continue
        seen.add(id(value))
        if isinstance(value, dict):
            todo += [*value, *value.values()]
        elif isinstance(value, Torch7Object):
            todo.append(value.fields)
        elif isinstance(value, Torch7Tensor):
            numbers += np.array(value.view()).size
        elif isinstance(value, Torch7Storage):
            numbers += np.array(value.values).size
    return numbers


def test_every_byte_changed_is_refused_or_read(file: Path) -> None:
    content = written(every_kind())
    good = 0
    with little_memory():
        for place in range(len(content)):
            for change in (0x01, 0xFF):
                changed = bytearray(content)
                changed[place] ^= change
                with contextlib.suppress(WeightsError):
                    good += walk(read(Raw(bytes(changed)), file)) >= 0
    assert 0 < good < 2 * len(content)


NETWORK = written(tiny_network(Style(nested=True), (1, 1, 1, 1)))
SHAPES = {name: tensor.shape for name, tensor in tiny_state((1, 1, 1, 1)).items()}
FUZZ = settings(
    deadline=None, suppress_health_check=[HealthCheck.function_scoped_fixture], max_examples=60
)


def check_network(content: bytes, file: Path) -> None:
    """A file is refused in words, or gives the tensors of the network that it was."""
    file.write_bytes(content)
    with little_memory(8):
        try:
            tensors = torch7_tensors(read_torch7(file))
        except WeightsError:
            return
    assert {name: tensor.shape for name, tensor in tensors.items()} == SHAPES


@FUZZ
@given(st.lists(st.tuples(st.floats(0, 0.999), st.integers(1, 255)), min_size=1, max_size=3))
def test_networks_with_changed_bytes(file: Path, changes: list[tuple[float, int]]) -> None:
    content = bytearray(NETWORK)
    for place, change in changes:
        content[int(place * len(content))] ^= change
    check_network(bytes(content), file)


INTERESTING = [0, 1, 2, 3, 4, 8, -1, 255, 2**16, 2**31 - 1, -(2**31)]


@FUZZ
@given(st.floats(0, 0.999), st.one_of(st.sampled_from(INTERESTING), st.integers(-300, 300)))
def test_networks_with_changed_numbers(file: Path, place: float, number: int) -> None:
    at = int(place * (len(NETWORK) - 4))
    check_network(NETWORK[:at] + packed("i", number) + NETWORK[at + 4 :], file)


@FUZZ
@given(
    st.sampled_from([table(KEY, KEY)[:21], named("torch.FloatTensor"), named("nn.Sequential")]),
    st.lists(
        st.one_of(
            st.sampled_from(
                [packed("i", n) for n in range(-1, 9)] + [packed("q", 1), KEY, STORAGE]
            ),
            st.binary(max_size=12),
        ),
        max_size=12,
    ),
)
def test_rubbish_behind_a_good_start(file: Path, start: bytes, rest: list[bytes]) -> None:
    file.write_bytes(start + b"".join(rest))
    with little_memory(), contextlib.suppress(WeightsError):
        walk(read_torch7(file))
