"""How much of a GPU's memory models may take, and which model took it: a load that cannot fit is refused early."""

from __future__ import annotations

import threading
from collections.abc import Sequence
from dataclasses import dataclass

import numpy as np

from rafaga.bundle import TensorSpec
from rafaga.errors import DeviceMemoryError

MIB = 2**20
# Left to the driver, other processes, and what libraries allocate beyond every limit.
HEADROOM = 512 * MIB
# What libraries and activations take besides the weights, before anything was measured.
_WORKSPACE = 256 * MIB
# ONNX Runtime holds the weights of convolutions twice for a moment, while it changes their layout.
_WEIGHTS = 2


@dataclass(eq=False)
class Reservation:
    """One model's share of a budget, in bytes. limit: what the model may have; None: any."""

    model: str
    size: int
    limit: int | None


class MemoryBudget:
    """`total` bytes of `device`. From any thread. Refusals are DeviceMemoryErrors and say how to make room."""

    def __init__(self, device: str, total: int) -> None:
        self._device = device
        self._total = total
        self._lock = threading.Lock()
        self._held: list[Reservation] = []

    @property
    def taken(self) -> int:
        with self._lock:
            return sum(held.size for held in self._held)

    def reserve(self, model: str, size: int, limit: int | None = None) -> Reservation:
        """Reserves the limit, if there is one. Refused when `size` bytes pass it, or when the memory is not left."""
        reservation = Reservation(model, max(size, limit or 0), limit)
        with self._lock:
            self._check_limit(reservation, size, "needs about", 0)
            self._check_total(reservation, reservation.size, "needs about", 0)
            self._held.append(reservation)
        return reservation

    def settle(self, reservation: Reservation, size: int) -> None:
        """The model is loaded and took `size` bytes. Refused when that passes limit or budget by more than the
        headroom: the first model is also charged for what the libraries load once."""
        with self._lock:
            self._check_limit(reservation, size, "took", HEADROOM)
            self._check_total(reservation, size, "took", HEADROOM)
            reservation.size = size

    def release(self, reservation: Reservation) -> None:
        with self._lock:
            if reservation in self._held:
                self._held.remove(reservation)

    def _check_limit(self, reservation: Reservation, size: int, verb: str, tolerance: int) -> None:
        if reservation.limit is not None and size > reservation.limit + tolerance:
            raise DeviceMemoryError(
                f"{reservation.model} {verb} {size // MIB} MiB of {self._device}, a model may have "
                f"{reservation.limit // MIB}: raise gpu_model_memory_mib or lower max_batch_size"
            )

    def _check_total(self, reservation: Reservation, size: int, verb: str, tolerance: int) -> None:
        others = [held for held in self._held if held is not reservation]
        left = self._total - sum(held.size for held in others)
        if size > left + tolerance:
            holders = ", ".join(f"{held.model} {held.size // MIB} MiB" for held in others) or "no other model"
            raise DeviceMemoryError(
                f"{reservation.model} {verb} {size // MIB} MiB of {self._device}, {max(left, 0) // MIB} of "
                f"{self._total // MIB} MiB are left (held by {holders}): serve fewer models on it, lower "
                "max_batch_size, or raise gpu_memory_mib"
            )


def estimate(model_bytes: int, tensors: Sequence[TensorSpec], rows: int, slots: int) -> int:
    """Bytes that a model is expected to take on a GPU before it is loaded. `tensors`: its inputs and outputs, of `rows`
    rows in each of `slots` buffers; free dimensions count as one."""
    per_row = sum(
        np.dtype(spec.dtype).itemsize * int(np.prod([size or 1 for size in spec.shape[1:]], dtype=np.int64))
        for spec in tensors
        if spec.dtype != "object"
    )
    return _WEIGHTS * model_bytes + slots * rows * per_row + _WORKSPACE
