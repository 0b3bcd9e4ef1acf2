"""The protocols that the load tester speaks, and how their replies are read."""

from __future__ import annotations

from rafaga.load.codecs.base import Reader, Replies


def reader(replies: Replies) -> Reader:
    """Imports only the requested protocol: a process can hold only one definition of `inference`."""
    if replies is Replies.INFER:
        from rafaga.load.codecs.open_inference import InferReader

        return InferReader()
    from rafaga.load.codecs import rafaga_v1

    return rafaga_v1.READERS[replies]()
