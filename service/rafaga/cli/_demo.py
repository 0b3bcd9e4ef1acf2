"""`rafaga demo`: serves the two small bundles that come with the package, and says what to try. It needs the extra
`server`, and no PyTorch."""

from __future__ import annotations

import socket
from collections.abc import Mapping, Sequence
from functools import partial
from pathlib import Path
from typing import TYPE_CHECKING

from rafaga.addresses import GRPC_PORT, HTTP_PORT
from rafaga.cli import _serve
from rafaga.cli._banner import addresses, demo_commands

if TYPE_CHECKING:
    from rafaga.server.config.settings import Config
    from rafaga.server.lifecycle import Server

FOLDER = Path(__file__).parents[1] / "demo"


def run(arguments: Sequence[str], environ: Mapping[str, str], *, own_process: bool = False) -> int:
    """Serves until Ctrl-C or SIGTERM. `arguments`: settings of `rafaga serve`. Returns the exit code."""
    taken = [port for port in (GRPC_PORT, HTTP_PORT) if not _free(port)]
    grpc, http = ("0" if port in taken else str(port) for port in (GRPC_PORT, HTTP_PORT))
    ours = ["--repository", str(FOLDER / "models"), "--log-level", "warning", "--grpc-port", grpc, "--http-port", http]
    announce = partial(_announce, taken)
    code = _serve.run([*ours, *arguments], environ, own_process=own_process, command="demo", announce=announce)
    if code == 0:
        print("Stopped.")
    return code


def _free(port: int) -> bool:
    try:
        socket.create_server(("127.0.0.1", port)).close()
    except OSError:
        return False
    return True


def _announce(taken: Sequence[int], config: Config, server: Server) -> None:
    grpc, http = addresses(config, server)
    if taken:
        print(f"In use, so another port was chosen: {', '.join(map(str, taken))}\n")
    print("Serving lenet5-mnist, which reads digits, and lstm-co2, which forecasts CO2 in the atmosphere.\n")
    print(f"  Page   {http}/\n  gRPC   {grpc}\n\nTry, in another terminal:")
    print(*(f"  {command}" for command in demo_commands(FOLDER, grpc, http)), sep="\n")
    print("\nCtrl-C stops the server.", flush=True)
