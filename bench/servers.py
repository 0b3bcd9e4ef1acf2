"""The servers under test: one process per transport, and the peer. Those that are not asked sleep and cost nothing."""

from __future__ import annotations

import tempfile
from collections.abc import Iterator, Sequence
from contextlib import ExitStack, contextmanager
from pathlib import Path

from bench import models
from bench.cores import Cores, on
from bench.triton import Target, peers, triton
from demo.server import ServerProcess

TRANSPORTS = ("grpcio", "native")
TRITON = "Triton"
_START_TIMEOUT_S = 300.0  # every batch size of VGG-16 is warmed up


@contextmanager
def serving(
    repository: Path,
    names: Sequence[str],
    *options: str,
    threads: int,
    cores: Cores,
    transports: Sequence[str] = TRANSPORTS,
    peer: bool = False,
) -> Iterator[dict[str, Target]]:
    """A server of `names` on each of the transports with `options`; `peer`: and Triton, where it is at hand."""
    with ExitStack() as stack:
        folder = Path(stack.enter_context(tempfile.TemporaryDirectory()))
        chosen = folder / "repository"
        chosen.mkdir()
        for name in names:
            (chosen / name).symlink_to((repository / name).resolve())
        targets: dict[str, Target] = {}
        with on(cores.server):
            for transport in transports:
                arguments = ["--transport", transport, "--triton-metrics", "true", "--threads", str(threads), *options]
                server = ServerProcess(chosen, folder / f"{transport}.log", arguments, _START_TIMEOUT_S)
                stack.callback(server.kill)
                server.start()
                targets[transport] = Target(server.address, server.metrics_url, server.pid)
            if peer and (scripts := peers()) is not None:
                files = {name: models.file(repository, name) for name in names}
                targets[TRITON] = stack.enter_context(triton(scripts, files, threads, folder / "triton.log"))
        yield targets
