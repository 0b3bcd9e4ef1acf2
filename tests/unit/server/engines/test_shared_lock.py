"""The gate: many at once or one alone, nobody starves, and nobody waits for ever."""

from __future__ import annotations

import threading

import pytest

from rafaga.errors import DeviceError
from rafaga.server.engines.shared_lock import Gate

WAIT_S = 30.0


def test_many_at_once() -> None:
    gate = Gate()
    with gate.shared(), gate.shared():
        pass
    with gate.alone():
        pass


def test_nobody_comes_in_beside_the_one_who_is_alone() -> None:
    gate, inside = Gate(), threading.Event()

    def come() -> None:
        with gate.shared():
            inside.set()

    with gate.alone():
        visitor = threading.Thread(target=come)
        visitor.start()
        assert not inside.wait(0.05)
    visitor.join(WAIT_S)
    assert inside.is_set()


def test_who_wants_to_be_alone_is_not_kept_waiting_by_those_who_come_later() -> None:
    gate, alone, later = Gate(), threading.Event(), threading.Event()
    gate.enter()

    def be_alone() -> None:
        with gate.alone():
            alone.set()
            assert not later.is_set()

    def come_later() -> None:
        with gate.shared():
            later.set()

    first = threading.Thread(target=be_alone)
    first.start()
    while not gate._closed:
        pass
    second = threading.Thread(target=come_later)
    second.start()
    assert not later.wait(0.05)
    gate.leave()
    first.join(WAIT_S)
    second.join(WAIT_S)
    assert alone.is_set()
    assert later.is_set()


def test_somebody_who_never_leaves_is_told_of_and_others_go_on() -> None:
    gate = Gate()
    gate.enter()
    with pytest.raises(DeviceError, match="does not end"), gate.alone(0.01):
        pass
    with gate.shared():
        pass
    gate.leave()
    with gate.alone(0.01):
        pass


def test_an_error_of_the_one_alone_opens_it_again() -> None:
    gate = Gate()
    with pytest.raises(ZeroDivisionError), gate.alone():
        _ = 1 // 0
    with gate.shared():
        pass
