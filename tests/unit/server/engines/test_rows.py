"""Rows of requests become batches: joined, padded, aligned, in order."""

from __future__ import annotations

import numpy as np
from hypothesis import given, settings
from hypothesis import strategies as st

from rafaga.server.engines.batched import assemble
from rafaga.server.scheduling.job import Job, Part, Ragged


def part(*arrays: np.ndarray, start: int = 0, stop: int | None = None) -> Part:
    job = Job(arrays, lambda *_: None, lambda _: None)
    return Part(job, start, job.rows if stop is None else stop)


def test_unaligned_tensors_are_copied() -> None:
    request = b"\0" + np.arange(6, dtype=np.float32).tobytes()
    rows = np.frombuffer(request, np.float32, 6, 1).reshape(2, 3)
    (got,) = assemble([part(rows)])
    assert got.flags.aligned
    np.testing.assert_array_equal(got, rows)


def test_a_lone_job_or_a_part_of_it_is_not_copied() -> None:
    rows = np.arange(6.0).reshape(3, 2)
    assert assemble([part(rows)])[0] is rows
    (got,) = assemble([part(rows, start=1, stop=3)])
    assert np.shares_memory(got, rows)
    assert got.tolist() == [[2, 3], [4, 5]]


def test_a_part_of_ragged_rows_is_as_long_as_its_longest() -> None:
    """Other inputs, such as the lengths, stay as they are."""
    rows, future = np.array([[1, 2, 3, 4], [5, 6, 0, 0], [7, 0, 0, 0]]), np.ones((3, 5))
    ragged = Ragged([4, 2, 1], np.arange(3), (0,))
    job = Job((rows, future), lambda *_: None, lambda _: None, ragged=ragged)
    got, other = assemble([Part(job, 1, 3)])
    assert got.flags.c_contiguous
    assert got.tolist() == [[5, 6], [7, 0]]
    assert other.shape == (2, 5)
    assert assemble([Part(job, 2, 3), part(np.array([[8, 9, 10]]), np.ones((1, 5)))])[0].shape == (2, 3)


@settings(max_examples=60)
@given(st.lists(st.tuples(st.integers(1, 4), st.integers(1, 5), st.integers(1, 3)), min_size=1, max_size=6))
def test_ragged_rows_come_out_as_they_went_in(shapes: list[tuple[int, int, int]]) -> None:
    blocks = [np.full(shape, n + 1, np.int32) for n, shape in enumerate(shapes)]
    (got,) = assemble([part(block) for block in blocks])
    at = 0
    for block in blocks:
        rows, height, width = block.shape
        np.testing.assert_array_equal(got[at : at + rows, :height, :width], block)
        assert got[at : at + rows].sum() == block.sum(), "the rest is zero"
        at += rows
    assert at == len(got)


def test_a_batch_is_filled_with_copies_of_its_last_row() -> None:
    for parts in ([part(np.array([[1], [2]]))], [part(np.array([[1]])), part(np.array([[2]]))]):
        (got,) = assemble(parts, 4)
        assert got.tolist() == [[1], [2], [2], [2]]
        assert assemble(parts, 2)[0].tolist() == [[1], [2]]
