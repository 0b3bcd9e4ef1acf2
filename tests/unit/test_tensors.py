"""Bytes of the wire and arrays: nothing is allocated or believed before sizes agree."""

from __future__ import annotations

import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st
from hypothesis.extra import numpy as arrays

from rafaga.errors import InvalidTensor
from rafaga.tensors import (
    check_shape,
    describe,
    from_wire,
    length_prefixed,
    relative_error,
    to_wire,
    with_lengths,
)

UINT8, FLOAT32 = np.dtype(np.uint8), np.dtype(np.float32)


@given(
    arrays.arrays(
        st.sampled_from([np.uint8, np.int64, np.float32, np.float64, np.bool_]).map(np.dtype),
        arrays.array_shapes(max_dims=4, max_side=5),
    )
)
def test_there_and_back(array: np.ndarray) -> None:
    back = from_wire(to_wire(array), array.dtype, array.shape)
    assert back.shape == array.shape
    np.testing.assert_array_equal(back, array)


def test_a_view_is_given_and_nothing_copied() -> None:
    view = from_wire(bytes(range(24)), UINT8, (2, 3, 4))
    assert not view.flags.owndata
    assert not view.flags.writeable
    assert view[1, 0, 0] == 12


def test_the_wire_is_little_endian_and_row_by_row() -> None:
    assert to_wire(np.array([1.0], ">f4")) == to_wire(np.array([1.0], "<f4")) == b"\x00\x00\x80?"
    assert from_wire(b"\x00\x00\x80?", FLOAT32, (1,))[0] == 1.0
    assert to_wire(np.asfortranarray(np.arange(6, dtype=np.uint8).reshape(2, 3))) == bytes(range(6))


@pytest.mark.parametrize(
    ("content", "dtype", "shape", "message"),
    [
        *((bytes(size), "uint8", (2, 3, 4), r"expected 24 bytes for uint8 \[2, 3, 4\], got") for size in (0, 23, 25)),
        *((b"", "uint8", shape, "at least one element") for shape in ((0,), (3, 0), (0, 2**32 - 1))),
        (b"\0\2", "bool", (2,), "bytes of 0 or 1 for bool, got 2"),
        # Four times the largest that the wire can declare: compared, never allocated, and no overflow.
        (b"1234", "float32", (2**32 - 1,) * 4, "got 4"),
    ],
)
def test_bytes_that_do_not_fit(content: bytes, dtype: str, shape: tuple[int, ...], message: str) -> None:
    with pytest.raises(InvalidTensor, match=message):
        from_wire(content, np.dtype(dtype), shape)


@pytest.mark.parametrize("got", [(7, 28, 28), (7, 28, 28, 1, 1), (7, 27, 28, 1), ()])
def test_shapes_that_do_not_fit(got: tuple[int, ...]) -> None:
    check_shape("pixels", (7, 28, 28, 1), (None, 28, 28, 1))
    with pytest.raises(InvalidTensor, match=r"expected pixels of shape \[N, 28, 28, 1\], got \["):
        check_shape("pixels", got, (None, 28, 28, 1))


def test_shapes_for_people() -> None:
    assert describe((None, None, 3)) == "[N, any, 3]"
    assert describe((2, 3)) == "[2, 3]"
    assert describe(()) == "[]"


@given(st.lists(st.binary(max_size=10)))
def test_framed_elements_come_back(elements: list[bytes]) -> None:
    raw = with_lengths(elements)
    assert list(length_prefixed(raw)) == list(length_prefixed(memoryview(raw))) == elements
    for cut in range(1, len(raw)):
        try:
            whole = list(length_prefixed(raw[:cut]))
        except InvalidTensor:
            continue
        assert whole == elements[: len(whole)]


def test_relative_error_is_relative_to_the_largest_value_from_one_up() -> None:
    reference = np.array([[0.0, -200.0], [3.0, 4.0]], dtype=np.float32)
    assert relative_error(reference + np.float32(2), reference) == pytest.approx(0.01)
    small = np.array([0.25, 0.5])
    assert relative_error(small + 0.1, small) == pytest.approx(0.1)
    assert np.isnan(relative_error(np.array([np.nan, 0.0]), np.zeros(2)))
    with pytest.raises(ValueError, match="shapes differ"):
        relative_error(np.zeros(2), np.zeros(3))


def test_of_classes_the_error_is_the_share_that_differs() -> None:
    reference = np.array([[1, 2, 200, 4]], dtype=np.uint8)
    assert relative_error(np.array([[1, 2, 7, 4]], dtype=np.uint8), reference) == 0.25
    assert relative_error(reference, reference) == 0.0
