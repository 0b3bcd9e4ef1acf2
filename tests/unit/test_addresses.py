from __future__ import annotations

import pytest

from rafaga.addresses import joined


@pytest.mark.parametrize(
    ("host", "text"), [("localhost", "localhost:1"), ("10.0.0.1", "10.0.0.1:1"), ("::1", "[::1]:1"), ("::", "[::]:1")]
)
def test_joined(host: str, text: str) -> None:
    assert joined(host, 1) == text
