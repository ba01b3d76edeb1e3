"""Read pickles of NumPy arrays with an allow-list: nothing else is looked up or called.

NumPy itself cannot be called on hostile arguments: `numpy.ndarray` allocates any size, and the
state of a dtype may corrupt memory. Stand-ins make arrays from the bytes in the file alone.
"""

from __future__ import annotations

import pickle
import pickletools
import re
from collections.abc import Callable, Iterable
from typing import Any, BinaryIO

import numpy as np
import torch

from resnext_det.errors import WeightsError, plain, quoted

_NUMBERS = re.compile(r"[<>=|]?(b1|[iu][1248]|f[248])")


class Ignored:
    """Stands in for a value that nobody reads, whatever its class was."""

    def __new__(cls, *_: Any) -> Ignored:
        """Ignore the arguments."""
        return super().__new__(cls)

    def __init__(self, *_: Any) -> None:
        pass

    def __setstate__(self, _: Any) -> None:
        pass


class _DType:
    """Stands in for numpy.dtype; its code is None unless it is a type of real numbers."""

    def __init__(self, code: Any, *_: Any) -> None:
        self.code = code if isinstance(code, str) and _NUMBERS.fullmatch(code) else None

    def __setstate__(self, state: tuple[Any, ...]) -> None:
        if self.code is not None and state[1] in ("<", ">", "=", "|"):
            self.code = f"{state[1]}{self.code[-2:]}"


class PickledArray:
    """Stands in for a numpy.ndarray; `tensor` is None if it holds no real numbers."""

    def __init__(self, spend: Callable[[int], None]) -> None:
        self._spend = spend
        self.tensor: torch.Tensor | None = None

    def __setstate__(self, state: tuple[Any, ...]) -> None:
        _, shape, dtype, fortran, content = state
        self.fill(content, dtype, shape, "F" if fortran else "C")

    def fill(self, content: Any, dtype: _DType, shape: Any, order: Any) -> None:
        """Make the tensor; NumPy refuses a shape that does not fit the bytes."""
        if dtype.code is None:
            return
        self._spend(len(content))
        # Python 2 and protocol 2 write bytes as text.
        data = content.encode("latin1") if isinstance(content, str) else content
        flat = np.frombuffer(data, dtype.code)
        native = flat.astype(flat.dtype.newbyteorder("="))
        self.tensor = torch.from_numpy(native.reshape(shape, order=order)).contiguous()


class ArrayUnpickler(pickle.Unpickler):
    """Reads a pickle of NumPy arrays in plain containers, and refuses everything else."""

    def __init__(self, stream: BinaryIO, ignored: Iterable[str] = ()) -> None:
        """Check a pickle before anything is allocated.

        Args:
            stream: seekable, at the start of the pickle.
            ignored: classes whose values become `Ignored`, such as "argparse.Namespace".

        Raises:
            WeightsError: a memo that takes more memory than the file.
            ValueError: the pickle is damaged.
        """
        start = stream.tell()
        for count, (operation, argument, place) in enumerate(pickletools.genops(stream)):
            if operation.name.endswith("PUT") and int(argument or 0) > count:
                raise WeightsError(f"at byte {place} it puts a value at {argument} of its memo")
        self._left = stream.tell() - start
        stream.seek(start)
        super().__init__(stream, encoding="latin1")
        self._allowed: dict[str, Any] = {
            **dict.fromkeys(ignored, Ignored),
            "collections.OrderedDict": self._dict,
            "numpy.dtype": _DType,
            "numpy.ndarray": Ignored,  # only an argument of _reconstruct
            "_codecs.encode": _encode,
            "__builtin__.bytes": lambda: b"",  # how protocol 2 writes an empty array
        }
        for core in ("numpy.core", "numpy._core"):  # before and since NumPy 2
            self._allowed[f"{core}.multiarray._reconstruct"] = lambda *_: PickledArray(self._spend)
            self._allowed[f"{core}.multiarray.scalar"] = Ignored
            self._allowed[f"{core}.numeric._frombuffer"] = self._from_buffer

    def find_class(self, module: str, name: str) -> Any:
        """Return the stand-in for a global; refuse one that is not on the list."""
        full = f"{module}.{name}"
        if full not in self._allowed:
            raise WeightsError(
                f"it asks for {plain(full, 80)}, and a checkpoint may only hold tensors or arrays "
                "in plain containers: save model.state_dict() alone"
            )
        return self._allowed[full]

    def _spend(self, count: int) -> None:
        """Count bytes and items that are copied: honest pickles copy no more than they hold."""
        self._left -= count
        if self._left < 0:
            raise WeightsError("it copies its content again and again, to any size")

    def _dict(self, items: Any = ()) -> dict[Any, Any]:
        self._spend(len(items))
        return dict(items)

    def _from_buffer(
        self, content: Any, dtype: _DType, shape: Any, order: Any, axes: Any = None
    ) -> PickledArray:
        """Read an array of protocol 5; since NumPy 2.3 with the order of its axes, if not C's."""
        array = PickledArray(self._spend)
        array.fill(content, dtype, shape, order if axes is None else "C")
        if axes is not None and array.tensor is not None:
            array.tensor = array.tensor.permute(axes).contiguous()
        return array


def _encode(text: str, encoding: str) -> str:
    """Stand in for _codecs.encode, which protocol 2 writes bytes with; `fill` encodes the text."""
    if encoding != "latin1":
        raise WeightsError(f"it has bytes encoded as {quoted(encoding, 40)}")
    return text
