"""Pickles of NumPy arrays, read by an unpickler with an allow-list.

Nothing of NumPy is called: arrays are made of the bytes in the file, never of a claimed size.
"""

from __future__ import annotations

import math
import pickle
import pickletools
import re
from collections.abc import Iterable
from typing import Any, BinaryIO

import numpy as np
import torch

from resnext_det.errors import WeightsError, plain, quoted

_NUMBERS = re.compile(r"[<>=|]?(b1|[iu][1248]|f[248])")


class PickledArray:
    """An array in a pickle: its bytes, from which a tensor is made on request."""

    def __init__(self, *_: Any) -> None:
        self._shape: tuple[int, ...] = ()
        self._kind: str | None = None
        self._order = "C"
        self._axes: tuple[int, ...] | None = None
        self._content: bytes | str = b""

    def __setstate__(self, state: tuple[Any, ...]) -> None:
        """Take what NumPy writes: version, shape, dtype, Fortran's order or not, bytes."""
        _, shape, kind, fortran, content = state
        self.fill(content, kind, shape, "F" if fortran else "C")

    def fill(self, content: Any, kind: Any, shape: Any, order: Any) -> None:
        """Take shape and bytes.

        Raises:
            WeightsError: they do not fit one another.
        """
        if not isinstance(kind, _Kind):
            raise WeightsError("it has an array without a type of numbers")
        if kind.code is None:
            return  # of words or objects, which nothing reads
        size = np.dtype(kind.code).itemsize
        whole = isinstance(shape, tuple) and all(type(n) is int and n >= 0 for n in shape)
        # Bytes of Python 2, and of protocol 2, come as a string.
        fits = isinstance(content, (bytes, bytearray, str)) and whole and len(shape) <= 32
        if not fits or len(content) != math.prod(shape) * size or order not in ("C", "F"):
            raise WeightsError("it has an array whose shape and bytes do not fit one another")
        self._shape, self._kind, self._order, self._content = shape, kind.code, order, content

    def transpose(self, axes: Any) -> None:
        """Take the order of the axes.

        Raises:
            WeightsError: it is not one of the array's axes.
        """
        if not isinstance(axes, tuple) or sorted(map(repr, axes)) != sorted(
            map(repr, range(len(self._shape)))
        ):
            raise WeightsError("it has an array whose axes do not fit its shape")
        self._axes = axes

    @property
    def nbytes(self) -> int:
        """Bytes of the tensor."""
        return len(self._content)

    def tensor(self) -> torch.Tensor | None:
        """Return a tensor with memory of its own; None if the array is not of numbers."""
        if self._kind is None:
            return None
        content = self._content
        plain = content.encode("latin1") if isinstance(content, str) else content
        flat = np.frombuffer(plain, self._kind)
        native = np.array(flat, flat.dtype.newbyteorder("="))
        shaped = native.reshape(self._shape, order="F" if self._order == "F" else "C")
        turned = shaped if self._axes is None else shaped.transpose(self._axes)
        # ascontiguousarray makes a number an array of one.
        return torch.from_numpy(np.ascontiguousarray(turned).reshape(turned.shape))


class _Kind:
    """Stands for a numpy.dtype.

    Attributes:
        code: such as "<f4"; None if it is not one of numbers.
    """

    def __init__(self, code: Any, *_: Any) -> None:
        self.code = code if isinstance(code, str) and _NUMBERS.fullmatch(code) else None

    def __setstate__(self, state: tuple[Any, ...]) -> None:
        """Take what NumPy writes, of which the second is the byte order."""
        if self.code is not None and state[1] in ("<", ">", "=", "|"):
            self.code = f"{state[1]}{self.code[-2:]}"


class Ignored:
    """Stands for a value beside the weights that nothing reads, whatever its class was."""

    def __new__(cls, *_: Any) -> Ignored:
        """Forget the arguments."""
        return super().__new__(cls)

    def __init__(self, *_: Any) -> None:
        pass

    def __setstate__(self, _: Any) -> None:
        """Forget the state."""


def _from_buffer(content: Any, kind: Any, shape: Any, order: Any, axes: Any = None) -> PickledArray:
    """Stand for NumPy's function of protocol 5; since NumPy 2.3, "K" is C's order, transposed."""
    array = PickledArray()
    array.fill(content, kind, shape, "C" if order == "K" and axes is not None else order)
    if order == "K":
        array.transpose(axes)
    return array


def _encode(text: str, encoding: str) -> str:
    """Stand for _codecs.encode, by which protocol 2 writes bytes.

    The string is encoded later, so that a few operations cannot make many copies of a long one.
    """
    if encoding != "latin1":
        raise WeightsError(f"it has bytes encoded as {quoted(encoding, 40)}")
    return text


def _no_bytes() -> bytes:
    """Stand for bytes, by which protocol 2 writes an array without numbers."""
    return b""


# All that a pickle of NumPy arrays in plain containers needs; NumPy 2 renamed numpy.core.
_ALLOWED: dict[str, Any] = {
    "numpy.dtype": _Kind,
    "numpy.ndarray": Ignored,  # named as the class to reconstruct; alone it would only allocate
    "_codecs.encode": _encode,
    "__builtin__.bytes": _no_bytes,
}
for _core in ("core", "_core"):
    _ALLOWED[f"numpy.{_core}.multiarray._reconstruct"] = PickledArray
    _ALLOWED[f"numpy.{_core}.multiarray.scalar"] = Ignored
    _ALLOWED[f"numpy.{_core}.numeric._frombuffer"] = _from_buffer


class ArrayUnpickler(pickle.Unpickler):
    """Reads a pickle of NumPy arrays in plain containers, and refuses everything else."""

    def __init__(self, stream: BinaryIO, ignored: Iterable[str] = ()) -> None:
        """Check the sizes in a pickle before anything is allocated.

        Args:
            stream: seekable; the pickle begins where it is.
            ignored: names of classes whose values are not read, such as "argparse.Namespace".

        Raises:
            WeightsError: a place in the memo that would take more memory than the file has.
            ValueError: the pickle is damaged.
        """
        start = stream.tell()
        for count, (operation, argument, place) in enumerate(pickletools.genops(stream)):
            if operation.name.endswith("PUT") and int(argument or 0) > count:
                raise WeightsError(f"at byte {place} it has {argument} as the place of a value")
        self._items = stream.tell() - start  # no honest pickle has more items than bytes
        stream.seek(start)
        super().__init__(stream, encoding="latin1")
        self._allowed = {
            **dict.fromkeys(ignored, Ignored),
            **_ALLOWED,
            "collections.OrderedDict": self._ordered,
        }

    def find_class(self, module: str, name: str) -> Any:
        """Return the stand-in for a global; refuse one that is not on the list."""
        full = f"{module}.{name}"
        if full not in self._allowed:
            raise more_than_data(full)
        return self._allowed[full]

    def _ordered(self, items: Any = ()) -> dict[Any, Any]:
        """Stand for OrderedDict, which copies what it is given."""
        self._items -= len(items)
        if self._items < 0:
            raise WeightsError("it copies its lists again and again, to any size")
        return dict(items)


def more_than_data(name: str) -> WeightsError:
    """Return the error for a file that asks for a class or function of this name."""
    return WeightsError(
        f"it asks for {plain(name, 80)}, and a checkpoint may only hold tensors or arrays in "
        "plain containers. In the program that wrote it, save the weights alone: "
        "torch.save(model.state_dict(), FILE)"
    )
