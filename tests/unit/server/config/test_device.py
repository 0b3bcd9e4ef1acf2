"""Names of devices: what they mean, and what an invalid one is answered with."""

from __future__ import annotations

import pytest

from rafaga.server.config.device import CPU, Device, DeviceKind, parse


@pytest.mark.parametrize(
    ("texts", "found"),
    [
        (["auto"], None),
        (["cpu"], (CPU,)),
        (["cuda"], (Device(DeviceKind.CUDA, 0),)),
        (["cuda:3"], (Device(DeviceKind.CUDA, 3),)),
        (["tensorrt:1"], (Device(DeviceKind.TENSORRT, 1),)),
        (["cuda:0", "cuda:1"], (Device(DeviceKind.CUDA, 0), Device(DeviceKind.CUDA, 1))),
    ],
)
def test_names(texts: list[str], found: tuple[Device, ...] | None) -> None:
    assert parse(texts) == found


@pytest.mark.parametrize(
    ("texts", "message"),
    [
        (["gpu"], r"'gpu': expected auto, cpu, cuda\[:N\] or tensorrt\[:N\]"),
        (["cuda:"], "'cuda:': expected"),
        (["cuda:-1"], "'cuda:-1': expected"),
        (["cpu:0"], "'cpu:0': expected"),
        (["auto", "cpu"], "'auto': expected"),
        ([], "got nothing"),
        (["cuda", "cuda:0"], "cuda:0 is listed twice"),
        (["cuda:0", "cpu"], "cuda:0, cpu: expected devices of one kind"),
        (["cuda:0", "tensorrt:1"], "devices of one kind"),
    ],
)
def test_invalid_names(texts: list[str], message: str) -> None:
    with pytest.raises(ValueError, match=message):
        parse(texts)


@pytest.mark.parametrize("text", ["cpu", "cuda:0", "tensorrt:2"])
def test_a_device_is_written_as_it_is_read(text: str) -> None:
    assert [str(device) for device in parse([text]) or ()] == [text]
