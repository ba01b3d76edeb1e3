"""A file of Torch7 (.t7) -> plain data. Lua functions are code: a file that holds one is refused.

The format, as torch/torch7 publishes it (File.lua, generic/Tensor.c, generic/Storage.c); binary,
little endian, int of 4 bytes, long of 8. A value is a type id (int) and what follows it:

    0 nil        nothing
    1 number     a double
    2 string     its length (int), its bytes
    5 boolean    an int, 0 or 1
    3 table      an index (int); if the index is new, how many entries (int), then keys and values
    4 object     an index (int); if it is new, "V 1" and the class as strings, then its content
    6, 7, 8      a Lua function

Indices count tables and objects from 1 in the order of the file, so the next number is a new one
and a smaller one refers back. The content of torch.*Tensor is its dimensions (int), sizes and
strides (longs), the place of its first element in the storage (long, from 1) and the storage (a
value); that of torch.*Storage how many numbers (long), then those; that of a module a table.
Files from before versions have the class in the place of "V 1".

Nothing is allocated before the bytes that are left allow it: a file claims what it likes.

Tested on files written from the format's published description; no real file was ever seen here.
"""

from __future__ import annotations

import math
import re
import struct
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any, NoReturn, TypeAlias, Union

import numpy as np

from resnext_det.errors import WeightsError

Array: TypeAlias = "np.ndarray[Any, np.dtype[Any]]"
Table: TypeAlias = "dict[str | float, Value]"
Value: TypeAlias = Union[
    bool, float, str, Table, "Torch7Object", "Torch7Tensor", "Torch7Storage", None
]

_NIL, _NUMBER, _STRING, _TABLE, _OBJECT, _BOOLEAN = range(6)
_FUNCTIONS = (6, 7, 8)  # 7 as early versions wrote it, 6 before functions had an index

_NUMBERS = {
    "Byte": "u1",
    "Char": "i1",
    "Short": "<i2",
    "Int": "<i4",
    "Long": "<i8",
    "Half": "<f2",
    "Float": "<f4",
    "Double": "<f8",
}
_KINDS = {f"torch.{place}{name}": kind for place in ("", "Cuda") for name, kind in _NUMBERS.items()}
_KINDS["torch.Cuda"] = "<f4"  # torch.CudaTensor holds floats

# A ResNeXt-152 has tens of thousands of values, about 25 deep.
_MOST_VALUES = 1_000_000
_DEEPEST = 100
_MOST_DIMENSIONS = 8
_SMALLEST_ENTRY = 12  # bytes: an empty string as the key, nil as the value

_CLASS = re.compile(r"[A-Za-z_][A-Za-z0-9_.]{0,99}")
_VERSION = re.compile(r"V ([0-9]{1,4})")
_AGAIN = "the file is truncated or damaged: fetch or make it again"


@dataclass(frozen=True, eq=False)
class Torch7Storage:
    """A torch.*Storage.

    Attributes:
        kind: its class without "Storage", such as "torch.Float".
        values: its numbers; read from the file when they are used, and read-only.
    """

    kind: str
    values: Array


@dataclass(frozen=True, eq=False)
class Torch7Tensor:
    """A torch.*Tensor: a view of a storage, which other tensors may view as well.

    Attributes:
        size: its sizes; () is Torch7's empty tensor, which has no element.
        stride: in elements.
        offset: of the first element in the storage, from 0.
        storage: None for an empty tensor.
    """

    size: tuple[int, ...]
    stride: tuple[int, ...]
    offset: int
    storage: Torch7Storage | None

    @property
    def elements(self) -> int:
        """How many elements it has: never more than its storage."""
        return math.prod(self.size) if self.size else 0

    def view(self) -> Array:
        """Return the numbers as a read-only array that shares the storage's memory."""
        if self.storage is None or not self.size:
            return np.empty(0, np.float32)
        values = self.storage.values[self.offset :]
        strides = tuple(step * values.itemsize for step in self.stride)
        return np.lib.stride_tricks.as_strided(values, self.size, strides, writeable=False)


@dataclass(eq=False)
class Torch7Object:
    """An object of any other class, such as a module: a table with a name.

    Attributes:
        class_name: such as "nn.Sequential".
        version: of its class; 0 in files from before versions.
        fields: by name.
    """

    class_name: str
    version: int
    fields: Table = field(repr=False)  # they may hold one another without end


def looks_like_torch7(start: bytes) -> bool:
    """Tell by its first 8 bytes or more whether a file is one of Torch7.

    One in ASCII is as well, and `read_torch7` says what to do with it.
    """
    return start[:8] in _BINARY or start[:4] in _ASCII


_BINARY = [struct.pack("<ii", kind, 1) for kind in (_TABLE, _OBJECT)]
_ASCII = [b"%d\n1\n" % kind for kind in (_TABLE, _OBJECT)]


def read_torch7(file: Path) -> Value:
    """Read a file that Torch7's torch.save wrote.

    The numbers of storages stay in the file until they are used, so reading costs no memory for
    them; the file must stay as it is while the result is in use.

    Args:
        file: the file, in binary.

    Returns:
        What it holds: tables as dicts by string and number, objects as the classes above. What is
        shared in the file is shared here, and what holds itself there holds itself here. Entries
        of a table under other keys (booleans, objects) are left out: nothing could name them.

    Raises:
        WeightsError: it is damaged, of another kind, or holds code. The message begins with the
            place and leaves the name of the file and the full stop to the caller.
    """
    try:
        length = file.stat().st_size
        # As a plain array: every slice of a memmap would be a memmap, which is slow.
        content = np.asarray(np.memmap(file, np.uint8, "r")) if length else np.empty(0, np.uint8)
    except OSError as error:
        raise WeightsError(f"it cannot be opened: {error}") from error
    start = content[:8].tobytes()
    if start[:4] in _ASCII:
        raise WeightsError(
            "at byte 0 it is a Torch7 file in ASCII, and only binary ones are read: load it in "
            "Torch7 with torch.load(file, 'ascii') and save it with torch.save(file, object)"
        )
    if not looks_like_torch7(start):
        raise WeightsError(
            f"at byte 0 it begins with {start!r}, and a binary file of Torch7 with its first table "
            f"or object; it is of another kind, or {_AGAIN}"
        )
    reader = _Reader(content)
    root = reader.value()
    if reader.left:
        reader.refuse(reader.at, f"the object ends, and {reader.left} bytes follow it")
    return root


class _Reader:
    """Reads values one after the other, each checked against the bytes that are left."""

    def __init__(self, content: Array) -> None:
        self.at = 0
        self._content = content
        self._objects: list[Value] = []
        self._values = 0

    @property
    def left(self) -> int:
        """How many bytes of the file are not yet read."""
        return len(self._content) - self.at

    def refuse(self, at: int, found: str, advice: str = _AGAIN) -> NoReturn:
        """Raise what was found at which byte, and what to do."""
        raise WeightsError(f"at byte {at} {found}; {advice}")

    def value(self, depth: int = 0) -> Value:
        """Read the next value, and all that it holds."""
        at = self.at
        self._values += 1
        if depth > _DEEPEST or self._values > _MOST_VALUES:
            limit = f"{_DEEPEST} levels" if depth > _DEEPEST else f"{_MOST_VALUES:,} values"
            self.refuse(at, f"it passes the {limit} that are read", "no network has as many")
        kind = self._int()
        if kind == _NIL:
            return None
        if kind == _NUMBER:
            return float(self._take("d")[0])
        if kind == _STRING:
            return self._string()
        if kind == _BOOLEAN:
            if (truth := self._int()) not in (0, 1):
                self.refuse(at, f"there is a boolean of {truth}, and it may be 0 or 1")
            return truth == 1
        if kind in (_TABLE, _OBJECT):
            return self._indexed(kind, at, depth)
        if kind in _FUNCTIONS:
            code = f"there is a Lua function (type id {kind}): code, and only data is read"
            advice = "take it out in Torch7 (of a nn.DataParallelTable, save model:get(1) alone)"
            self.refuse(at, code, advice)
        self.refuse(at, f"there is the type id {kind}, and Torch7 has 0 to 8")

    def _indexed(self, kind: int, at: int, depth: int) -> Value:
        index, known = self._int(), len(self._objects)
        if 1 <= index <= known:
            found = self._objects[index - 1]
            if found is None or isinstance(found, dict) != (kind == _TABLE):
                what = "an unfinished tensor" if found is None else f"a {type(found).__name__}"
                self.refuse(at, f"the type id {kind} refers to object {index}, which is {what}")
            return found
        if index != known + 1:
            self.refuse(at, f"it refers to object {index}, and {known} objects come before it")
        if kind == _OBJECT:
            return self._object(at, depth)
        table: Table = {}
        self._objects.append(table)
        self._fill(table, depth)
        return table

    def _fill(self, table: Table, depth: int) -> None:
        entries = self._count(self.at, self._int(), _SMALLEST_ENTRY, "a table of {} entries")
        for _ in range(entries):
            at = self.at
            key, value = self.value(depth + 1), self.value(depth + 1)
            if key is None or key != key:
                self.refuse(at, "a table has an entry under nil or NaN")
            if isinstance(key, (str, float)):
                table[key] = value

    def _object(self, at: int, depth: int) -> Value:
        version, name = self._class(at)
        kind = name.removesuffix("Tensor").removesuffix("Storage")
        if kind in _KINDS and name == f"{kind}Storage":
            self._objects.append(self._storage(kind, at))
            return self._objects[-1]
        if kind in _KINDS and name == f"{kind}Tensor":
            index = len(self._objects)
            self._objects.append(None)  # its index comes before that of its storage
            self._objects[index] = self._tensor(kind, at, depth)
            return self._objects[index]
        if name.startswith("torch."):
            known = f"only tensors and storages of {', '.join(_NUMBERS)} are read"
            self.refuse(at, f"there is a {name}, and {known}", "save the network without it")
        module = Torch7Object(name, version, {})
        self._objects.append(module)
        if name == "nn.DataParallelTable" and version >= 2:
            self.value(depth + 1)  # the GPUs it ran on, ahead of its fields
        fields = self.value(depth + 1)
        if not isinstance(fields, dict):
            self.refuse(at, f"there is a {name} whose content is no table")
        module.fields = fields
        return module

    def _class(self, at: int) -> tuple[int, str]:
        first = self._string()
        match = _VERSION.fullmatch(first)
        name = self._string() if match else first
        if not _CLASS.fullmatch(name):
            self.refuse(at, f"there is an object of the class {name[:40]!a}")
        return int(match[1]) if match else 0, name

    def _tensor(self, kind: str, at: int, depth: int) -> Torch7Tensor:
        dimensions = self._int()
        if not 0 <= dimensions <= _MOST_DIMENSIONS:
            allowed = f"0 to {_MOST_DIMENSIONS} are read"
            self.refuse(at, f"there is a tensor of {dimensions} dimensions, and {allowed}")
        size, stride = self._take("q", dimensions), self._take("q", dimensions)
        offset = self._take("q")[0] - 1
        storage = self.value(depth + 1)
        numbers = 0
        if isinstance(storage, Torch7Storage) and storage.kind == kind:
            numbers = len(storage.values)
        elif storage is not None:
            self.refuse(at, f"there is a {kind}Tensor whose storage is no {kind}Storage")
        tensor = Torch7Tensor(size, stride, offset, storage)
        last = offset + sum((length - 1) * step for length, step in zip(size, stride))
        # With more elements than its storage it would be a few numbers many times: a tensor that
        # a few bytes make as large as they like.
        fits = offset >= 0 and last < numbers and tensor.elements <= numbers
        if size and not (min(size) > 0 and min(stride) >= 0 and fits):
            found = f"a tensor of sizes {size} and strides {stride} from element {offset + 1}"
            self.refuse(at, f"there is {found}, and its storage has {numbers} numbers")
        return tensor

    def _storage(self, kind: str, at: int) -> Torch7Storage:
        size, what = np.dtype(_KINDS[kind]).itemsize, f"a {kind}Storage of {{}} numbers"
        numbers = self._count(at, self._take("q")[0], size, what)
        return Torch7Storage(kind, self._slice(numbers * size).view(_KINDS[kind]))

    def _string(self) -> str:
        length = self._count(self.at, self._int(), 1, "a string of {} bytes")
        return self._slice(length).tobytes().decode("latin-1")  # Lua knows no encoding

    def _int(self) -> int:
        return int(self._take("i")[0])

    def _take(self, code: str, count: int = 1) -> tuple[Any, ...]:
        layout = f"<{count}{code}"
        size = self._count(self.at, struct.calcsize(layout), 1, "a number of {} bytes due")
        self.at += size
        return struct.unpack_from(layout, self._content.data, self.at - size)

    def _slice(self, length: int) -> Array:
        begin, self.at = self.at, self.at + length
        return self._content[begin : self.at]

    def _count(self, at: int, count: int, size: int, what: str) -> int:
        """Return a count that the file claims, if that many things of this size are left in it."""
        if count < 0 or count * size > self.left:
            self.refuse(at, f"there is {what.format(count)}, and {self.left} bytes are left")
        return count
