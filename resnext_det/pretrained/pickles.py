"""Pickles as data: what one would do is checked before it is done, and arrays are read by hand.

A pickle is a program for a small machine with a stack and a memo. Even where it may call nothing
harmful, a few bytes of it can ask for any amount of memory (an index of the memo, a numpy.ndarray
of a claimed shape) or crash the process (tuples in one another, when hashed). So its operations are
looked through first, and arrays are made of the bytes that are in the file, never of a claim.
"""

from __future__ import annotations

import math
import pickle
import pickletools
import re
from collections import OrderedDict
from dataclasses import dataclass
from typing import IO, Any

import numpy as np
import torch

from resnext_det.errors import WeightsError

# A detector in the aggregated form, with its optimizer, has a few million operations, 10 deep.
_MOST_OPERATIONS = 20_000_000
_DEEPEST = 100
_ADDS = {"APPEND", "APPENDS", "ADDITEMS", "SETITEM", "SETITEMS", "BUILD"}  # to what is there
# The first copy what they are given, what the others make is walked through when it is hashed: the
# same must not be in it again and again, at most so many times the bytes that were read.
_COPIES = {"REDUCE", "BUILD", "NEWOBJ", "NEWOBJ_EX", "OBJ", "INST"}
_HASHED = {"TUPLE", "TUPLE1", "TUPLE2", "TUPLE3", "FROZENSET"}
_TIMES = 16

_NUMBERS = re.compile(r"[<>=|]?(b1|[iu][1248]|f[248])")
_ARRAY = object()  # in the place of numpy.ndarray, which would allocate what it is told to


@dataclass(slots=True)
class _Value:
    """What is known of a value on the stack: how deep it is, and how large (items and bytes)."""

    depth: int = 1
    size: int = 1


def check_pickle(stream: IO[bytes], allowed: re.Pattern[str] | None = None) -> None:
    """Look through the next pickle of a stream, doing nothing of it; the stream stands behind it.

    Args:
        stream: binary.
        allowed: what it may ask for, such as "collections.OrderedDict"; anything, if it is None.

    Raises:
        WeightsError: it asks for something else, or for more memory or depth than a network has.
            The message leaves the name of the file and the full stop to the caller.
        Exception: of any kind, if it is damaged.
    """
    start, copied = stream.tell(), 0
    stack: list[_Value | None] = []  # None is a mark
    memo: dict[int, _Value] = {}
    for count, (operation, argument, place) in enumerate(pickletools.genops(stream)):
        name = operation.name
        if name == "GLOBAL" and allowed is not None:
            refuse_other_than(allowed, str(argument).replace(" ", "."))
        if name == "MEMOIZE" or name.endswith("PUT"):
            index = len(memo) if argument is None else int(argument)
            memo[index] = (stack[-1] if stack else None) or _Value()
            if index > count:
                raise WeightsError(f"at byte {place} it has {index} for the place of a value")
        elif name.endswith("GET"):
            stack.append(memo.get(int(argument or 0)) or _Value())
        else:
            taken = _taken(operation, stack)
            result = _result(operation, argument, taken)
            copied += sum(value.size for value in taken) if name in _COPIES else 0
            size = result.size if name in _HASHED else copied
            long = count > _MOST_OPERATIONS or size > _TIMES * (1 + (place or 0) - start)
            if long or result.depth > _DEEPEST:
                raise WeightsError(f"at byte {place} it is deeper or longer than any network")
            for each in operation.stack_after:
                stack.append(None if each is pickletools.markobject else result)


def _taken(operation: pickletools.OpcodeInfo, stack: list[_Value | None]) -> list[_Value]:
    """Take from the stack what an operation takes, in its order there."""
    taken: list[_Value] = []
    before = operation.stack_before
    count = len(before)
    if pickletools.markobject in before:
        while stack and (top := stack.pop()) is not None:
            taken.append(top)
        count = before.index(pickletools.markobject)
    taken += [stack.pop() or _Value() for _ in range(min(count, len(stack)))]
    return taken[::-1]


def _result(operation: pickletools.OpcodeInfo, argument: Any, taken: list[_Value]) -> _Value:
    """Tell how deep and large what an operation puts on the stack is; containers grow in place."""
    if not taken:
        return _Value(
            1, 1 + (len(argument) if isinstance(argument, (str, bytes, bytearray)) else 0)
        )
    grows = operation.name in _ADDS
    result, items = (taken[0], taken[1:]) if grows else (_Value(), taken)
    for item in items:
        result.depth = max(result.depth, 1 + item.depth)
        result.size += item.size
    return result


def refuse_other_than(allowed: re.Pattern[str], name: str) -> None:
    """Raise a WeightsError if a pickle may not ask for this name."""
    if not allowed.fullmatch(name):
        shown = name if name.isprintable() else ascii(name)
        raise WeightsError(
            f"it asks for {shown[:80]}; a checkpoint may hold arrays in plain containers only"
        )


class PickledArray:
    """An array in a pickle: its bytes, of which numbers are made when they are asked for."""

    def __init__(self) -> None:
        self._shape: tuple[int, ...] = ()
        self._kind: str | None = None
        self._order = "C"
        self._content: bytes | str = b""

    def __setstate__(self, state: tuple[Any, ...]) -> None:
        """Take what numpy writes: version, shape, dtype, Fortran's order or not, bytes."""
        _, shape, kind, fortran, content = state
        self.fill(content, kind, shape, "F" if fortran else "C")

    def fill(self, content: Any, kind: Any, shape: Any, order: Any) -> None:
        """Take shape and bytes, if they fit one another.

        Raises:
            WeightsError: they do not.
        """
        if not isinstance(kind, _Kind):
            raise WeightsError("it has an array without a type of numbers")
        if kind.code is None:
            return  # of words or objects, which nothing reads
        size = np.dtype(kind.code).itemsize
        whole = isinstance(shape, tuple) and all(type(n) is int and n >= 0 for n in shape)
        # As a string its bytes come from Python 2, and from protocol 2.
        fits = isinstance(content, (bytes, bytearray, str)) and whole and len(shape) <= 32
        if not fits or len(content) != math.prod(shape) * size or order not in ("C", "F"):
            raise WeightsError("it has an array whose shape and bytes do not fit one another")
        self._shape, self._kind, self._order, self._content = shape, kind.code, order, content

    def tensor(self) -> torch.Tensor | None:
        """Return a tensor with memory of its own; None where there are no numbers."""
        if self._kind is None:
            return None
        content = self._content
        plain = content.encode("latin1") if isinstance(content, str) else content
        flat = np.frombuffer(plain, self._kind)
        native = np.array(flat, flat.dtype.newbyteorder("="))
        shaped = native.reshape(self._shape, order="F" if self._order == "F" else "C")
        return torch.from_numpy(np.ascontiguousarray(shaped).reshape(self._shape))


class _Kind:
    """What stands for a numpy.dtype.

    Attributes:
        code: such as "<f4"; None where it is none of numbers.
    """

    def __init__(self, code: Any, *_: Any) -> None:
        self.code = code if isinstance(code, str) and _NUMBERS.fullmatch(code) else None

    def __setstate__(self, state: tuple[Any, ...]) -> None:
        """Take what numpy writes, of which the second is the order of bytes."""
        if self.code is not None and state[1] in ("<", ">", "=", "|"):
            self.code = f"{state[1]}{self.code[-2:]}"


def _reconstruct(*_: Any) -> PickledArray:
    """Stand for numpy's, whose result is filled afterwards."""
    return PickledArray()


def _from_buffer(content: Any, kind: Any, shape: Any, order: Any) -> PickledArray:
    array = PickledArray()
    array.fill(content, kind, shape, order)
    return array


def _scalar(*_: Any) -> PickledArray:
    """Stand for a number of numpy's, which nothing reads."""
    return PickledArray()


def _encode(text: str, encoding: str) -> str:
    """Stand for _codecs.encode, by which protocol 2 writes bytes; the encoding is left for later.

    So that a few operations cannot make many copies of one long string.
    """
    if encoding != "latin1":
        raise WeightsError(f"it has bytes encoded as {encoding!a:.40}")
    return text


def _no_bytes() -> bytes:
    """Stand for bytes, by which protocol 2 writes an array without numbers."""
    return b""


# All that a pickle of numpy arrays in plain containers needs; numpy 2 renamed numpy.core.
_BUILDERS: dict[str, Any] = {
    "collections.OrderedDict": OrderedDict,
    "numpy.dtype": _Kind,
    "numpy.ndarray": _ARRAY,
    "_codecs.encode": _encode,
    "__builtin__.bytes": _no_bytes,
}
for _core in ("core", "_core"):
    _BUILDERS[f"numpy.{_core}.multiarray._reconstruct"] = _reconstruct
    _BUILDERS[f"numpy.{_core}.multiarray.scalar"] = _scalar
    _BUILDERS[f"numpy.{_core}.numeric._frombuffer"] = _from_buffer
_BUILDABLE = re.compile("|".join(re.escape(name) for name in _BUILDERS))


class _ArrayUnpickler(pickle.Unpickler):
    """Reads pickles of numpy arrays in plain containers, and refuses everything else."""

    def find_class(self, module: str, name: str) -> Any:
        """Return what stands for a global; refuse any that builds no array."""
        refuse_other_than(_BUILDABLE, f"{module}.{name}")
        return _BUILDERS[f"{module}.{name}"]


def read_arrays(stream: IO[bytes]) -> Any:
    """Read a pickle of numpy arrays in plain containers.

    Args:
        stream: binary, and seekable.

    Returns:
        What is in it, each array a `PickledArray`.

    Raises:
        WeightsError: it asks for something else, or for more memory or depth than a network has.
        Exception: of any kind, if it is damaged.
    """
    start = stream.tell()
    check_pickle(stream)
    stream.seek(start)
    return _ArrayUnpickler(stream, encoding="latin1").load()
