"""Pickles of arrays against numpy's own, and what no pickle of a checkpoint may ask for."""

from __future__ import annotations

import io
import pickle
import pickletools
from collections import OrderedDict
from typing import Any

import numpy as np
import pytest
import torch

from resnext_det.errors import WeightsError
from resnext_det.weights.pickles import ArrayUnpickler, PickledArray


def read_arrays(stream: io.BytesIO) -> Any:
    return ArrayUnpickler(stream).load()


BLOCK = np.arange(24).reshape(2, 3, 4)
ARRAYS: dict[str, np.ndarray[Any, Any]] = {
    **{kind: BLOCK.astype(kind) for kind in ("f2", "f4", "f8", "i1", "i2", "i4", "i8", "u1", "b1")},
    "big endian": BLOCK.astype(">f4"),
    "Fortran's order": np.asfortranarray(BLOCK.astype("f4")),
    "turned": BLOCK.astype("f4").transpose(2, 0, 1),
    "every other": BLOCK.astype("f4")[:, ::2],
    "a number": np.array(7.5),
    "nothing": np.zeros((0, 3), "f4"),
    "read-only": np.frombuffer(bytes(8), "f4"),
}


@pytest.mark.parametrize("protocol", [0, 2, 3, 4, 5])
@pytest.mark.parametrize("kind", ARRAYS)
def test_arrays_are_those_that_numpy_reads(kind: str, protocol: int) -> None:
    array = ARRAYS[kind]
    content = pickle.dumps(OrderedDict(a=array, b=[array, "words"]), protocol)
    read = read_arrays(io.BytesIO(content))
    assert read["a"] is read["b"][0]
    tensor = read["a"].tensor()
    expected = pickle.loads(content)["a"]
    assert (
        tensor.dtype
        == torch.from_numpy(np.array(expected, expected.dtype.newbyteorder("=")).copy()).dtype
    )
    np.testing.assert_array_equal(tensor.numpy(), expected)
    assert tensor.shape == expected.shape
    assert tensor.is_contiguous()
    assert tensor.untyped_storage().nbytes() == array.nbytes


# What Python 2 wrote, byte for byte: its strings are bytes (opcode U), and so is the array.
PYTHON_2 = (
    b"\x80\x02}q\x00U\x01wq\x01cnumpy.core.multiarray\n_reconstruct\nq\x02cnumpy\nndarray\nq\x03"
    b"K\x00\x85U\x01b\x87Rq\x04(K\x01K\x02\x85cnumpy\ndtype\nq\x05U\x02f4K\x00K\x01\x87Rq\x06"
    b"(K\x03U\x01<NNNJ\xff\xff\xff\xffJ\xff\xff\xff\xffK\x00tb\x89U\x08\x00\x00\x80\x3f\x00\x00\x40\xc0"
    b"tbs."
)


def test_what_python_2_wrote() -> None:
    read = read_arrays(io.BytesIO(PYTHON_2))
    assert read["w"].tensor().tolist() == [1.0, -3.0]
    assert pickle.loads(PYTHON_2, encoding="latin1")["w"].tolist() == [1.0, -3.0]


@pytest.mark.parametrize(
    "array", [np.array(["x"]), np.array([{}, {}]), np.ones(2, "c8"), np.zeros(2, "f4,i4")]
)
def test_what_is_no_real_number_is_nothing(array: np.ndarray[Any, Any]) -> None:
    read = read_arrays(io.BytesIO(pickle.dumps({"a": array, "b": np.float64(3)})))
    assert isinstance(read["a"], PickledArray)
    assert read["a"].tensor() is None


def test_a_pickle_may_stand_anywhere_in_a_stream() -> None:
    stream = io.BytesIO(b"ahead" + pickle.dumps([3]) + pickle.dumps([4]))
    stream.seek(5)
    assert read_arrays(stream) == [3]


# --- what is refused before it is done ---


@pytest.mark.parametrize("index", [3, 1000, 2**31 - 1, 2**32 - 1])
def test_a_place_far_away_in_the_memo_is_refused(index: int) -> None:
    content = b"\x80\x02Nr" + index.to_bytes(4, "little") + b"."
    with pytest.raises(WeightsError, match=rf"at byte 3 it has {index} as the place of a value"):
        read_arrays(io.BytesIO(content))


def test_places_in_the_memo_may_be_counted_in_any_way() -> None:
    for content in (pickle.dumps(ARRAYS["f4"], 2), pickletools.optimize(pickle.dumps([[]] * 3))):
        read_arrays(io.BytesIO(content))


def array_state(shape: Any, kind: Any, content: Any, order: Any = False) -> bytes:
    """Return a pickle of an array whose state is this."""

    class State:
        def __reduce__(self) -> tuple[Any, ...]:
            build = np.zeros(1).__reduce__()[0]
            return build, (np.ndarray, (0,), b"b"), (1, shape, kind, order, content)

    return pickle.dumps(State())


@pytest.mark.parametrize(
    ("shape", "content"),
    [
        ((10**12,), b"1234"),
        ((2**62, 4), b""),
        ((2**32, 2**32), b""),
        ((-1, -1), b"1234"),
        ((2,), b"1234"),
        ((1,), b"12345678"),
        ((True,), b"1234"),
        ((1.0,), b"1234"),
        ([1], b"1234"),
        ("1", b"1234"),
        (1, b"1234"),
        (None, b"1234"),
        ((1,) * 33, b"1234"),
        ((1,), [b"1234"]),
        ((1,), None),
    ],
)
def test_shapes_that_do_not_fit_the_bytes(shape: Any, content: Any) -> None:
    with pytest.raises(WeightsError, match="shape and bytes do not fit"):
        read_arrays(io.BytesIO(array_state(shape, np.dtype("f4"), content)))


@pytest.mark.parametrize("kind", [None, "f4", 3, (np.dtype("f4"), 5)])
def test_arrays_without_a_type(kind: Any) -> None:
    with pytest.raises(WeightsError, match="without a type of numbers"):
        read_arrays(io.BytesIO(array_state((1,), kind, b"1234")))


class Call:
    """Asks for a call when it is unpickled."""

    def __init__(self, function: Any, *arguments: Any) -> None:
        self.call = function, arguments

    def __reduce__(self) -> Any:
        return self.call


MULTIARRAY = np.zeros(1).__reduce__()[0].__module__
CALLS = {
    "an array of any size": Call(np.ndarray, (10**12,), "u1"),
    "a type of any size": Call(np.dtype, "V1000000000000"),
    "a type of types": Call(np.dtype, [("a", "f4", (10**6, 10**6))]),
}


@pytest.mark.parametrize("case", CALLS)
def test_calls_that_would_take_memory(case: str) -> None:
    """They fail, or nothing comes of them."""
    try:
        found = read_arrays(io.BytesIO(pickle.dumps({"a": CALLS[case]})))
    except Exception:
        return
    assert not isinstance(found["a"], (np.ndarray, np.dtype))


@pytest.mark.parametrize("codec", ["zlib_codec", "utf-7", "idna", "punycode", "no such"])
def test_bytes_are_of_one_encoding(codec: str) -> None:
    import _codecs

    with pytest.raises(WeightsError, match="has bytes encoded as"):
        read_arrays(io.BytesIO(pickle.dumps(Call(_codecs.encode, "abc", codec))))


@pytest.mark.parametrize("protocol", [0, 2, 4])
@pytest.mark.parametrize("function", [print, eval, getattr, np.load, np.zeros, torch.load, Call])
def test_anything_else_is_refused_by_name(function: Any, protocol: int) -> None:
    with pytest.raises(WeightsError, match=rf"it asks for \S+\.{function.__name__}, and"):
        read_arrays(io.BytesIO(pickle.dumps({"a": [function]}, protocol)))


def test_names_that_are_not_words_are_not_printed() -> None:
    with pytest.raises(WeightsError) as caught:
        read_arrays(io.BytesIO(b"c\x1b[2J\n\x1b]0;x\x07\n."))
    assert str(caught.value).isprintable()
