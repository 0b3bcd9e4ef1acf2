"""How much of a GPU's memory models may take, and who took it: a load that does not fit is refused before it begins."""

from __future__ import annotations

import threading
from collections.abc import Sequence

import numpy as np

from rafaga.bundle import TensorSpec
from rafaga.errors import DeviceMemoryError

MIB = 2**20
# Left to the driver, other processes, and what the libraries allocate past every limit.
HEADROOM = 512 * MIB
# What libraries and activations take beside the weights, before anything was measured.
_WORKSPACE = 256 * MIB
# Weights are on the device twice for a moment, when convolutions' are laid out anew.
_WEIGHTS = 2


class Reservation:
    """One model's share of a budget. `settle` when its size is known, `grow` when it takes more later (or, below zero,
    less), `release` when it is gone.

    The first two raise DeviceMemoryError, and change nothing, where all shares together would pass the budget by more
    than the headroom: what the libraries load once is charged to whoever came first.
    """

    def __init__(self, budget: MemoryBudget, model: str, size: int) -> None:
        self.model = model
        self.size = size
        self._budget = budget

    def settle(self, size: int) -> None:
        self._budget._change(self, size)

    def grow(self, by: int) -> None:
        self._budget._grow(self, by)

    def release(self) -> None:
        self._budget._release(self)


class MemoryBudget:
    """`total` bytes of `device`. From any thread."""

    def __init__(self, device: str, total: int) -> None:
        self._device = device
        self._total = total
        self._lock = threading.Lock()
        self._taken: dict[Reservation, int] = {}

    @property
    def taken(self) -> int:
        with self._lock:
            return sum(self._taken.values())

    def reserve(self, model: str, size: int) -> Reservation:
        """Raises DeviceMemoryError, naming who has what, when `size` bytes are not left."""
        reservation = Reservation(self, model, size)
        with self._lock:
            left = self._total - sum(self._taken.values())
            if size > left:
                holders = ", ".join(f"{r.model} {s // MIB} MiB" for r, s in self._taken.items()) or "nobody"
                raise DeviceMemoryError(
                    f"{model} needs about {size // MIB} MiB of {self._device}, {max(left, 0) // MIB} of "
                    f"{self._total // MIB} MiB are left (held by {holders}): serve fewer models on it, lower "
                    "max_batch_size, or raise gpu_memory_mib"
                )
            self._taken[reservation] = size
        return reservation

    def _change(self, reservation: Reservation, size: int) -> None:
        with self._lock:
            self._set(reservation, size)

    def _grow(self, reservation: Reservation, by: int) -> None:
        with self._lock:
            if reservation in self._taken:  # an engine that was let go may still end a batch
                self._set(reservation, reservation.size + by)

    def _set(self, reservation: Reservation, size: int) -> None:
        others = sum(taken for holder, taken in self._taken.items() if holder is not reservation)
        if size > reservation.size and others + size > self._total + HEADROOM:
            raise DeviceMemoryError(
                f"{reservation.model} takes {size // MIB} MiB of {self._device}, {max(self._total - others, 0) // MIB} "
                f"of {self._total // MIB} MiB are left: serve fewer models on it, lower max_batch_size, or raise "
                "gpu_memory_mib"
            )
        reservation.size = self._taken[reservation] = size

    def _release(self, reservation: Reservation) -> None:
        with self._lock:
            reservation.size = 0
            self._taken.pop(reservation, None)


def estimate(model_bytes: int, tensors: Sequence[TensorSpec], rows: int, slots: int) -> int:
    """Bytes that a model is expected to take on a GPU, before it is there. `tensors`: its inputs and outputs, of `rows`
    rows in each of `slots` buffers; free dimensions count as one."""
    per_row = sum(
        np.dtype(spec.dtype).itemsize * int(np.prod([size or 1 for size in spec.shape[1:]], dtype=np.int64))
        for spec in tensors
        if spec.dtype != "object"
    )
    return _WEIGHTS * model_bytes + slots * rows * per_row + _WORKSPACE
