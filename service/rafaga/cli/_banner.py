"""What a terminal shows once the server serves: its addresses, and commands to try."""

from __future__ import annotations

import shlex
from pathlib import Path
from typing import TYPE_CHECKING

from rafaga.addresses import GRPC_PORT, UNIX, joined

if TYPE_CHECKING:  # needs the extra `server`
    from rafaga.server.config.settings import Config
    from rafaga.server.lifecycle import Server

_ALL_OR_LOOPBACK = ("127.0.0.1", "::1", "0.0.0.0", "::")
# By task: the body of a request, and the action in its path.
_ACTIONS = {
    "classification": ("--data-binary @IMAGE.jpg", ":classify"),
    "detection": ("--data-binary @IMAGE.jpg", ":detect"),
    "segmentation": ("--data-binary @IMAGE.jpg", ":segment"),
    "features": ("--data-binary @IMAGE.jpg", ":features"),
    "forecasting": ("--data-binary @SERIES.csv", ":forecast"),
    "sequence": ("--data SYMBOLS", ":predict"),
}


def addresses(config: Config, server: Server) -> tuple[str, str]:
    """Of gRPC, as `--server` takes it, and of HTTP, a URL without a path."""
    network = config.network
    host = "localhost" if network.host in _ALL_OR_LOOPBACK else network.host
    grpc = f"{UNIX}{network.grpc_socket}" if network.grpc_socket else joined(host, server.grpc_port)
    scheme = "http" if config.security.tls_key is None else "https"
    return grpc, f"{scheme}://{joined(host, server.http_port)}"


def banner(config: Config, server: Server) -> str:
    """Of `rafaga serve`. The command is for the first model; without credentials, which only the user has."""
    grpc, http = addresses(config, server)
    served = {v.name: v.model.bundle.task for v in server.repository.versions if v.model is not None}
    lines = ["", f"  HTTP   {http}", f"  gRPC   {grpc}"]
    if not served:
        lines += ["", "No model is served; the lines above say why."]
    elif not any(vars(config.security).values()):
        name, task = next(iter(served.items()))
        body, action = _ACTIONS[task] if task else ("", "")
        path = f"/v1/models/{name}{action}" if task else f"/v2/models/{name}"
        lines += ["", "Try:", f"  {' '.join(filter(None, ('curl', body, http + path)))}"]
    return "\n".join([*lines, "", "Ctrl-C stops the server.", ""])


def demo_commands(folder: Path, grpc: str, http: str, program: str = "rafaga") -> list[str]:
    """Commands that ask the models of the demo about files in `folder`."""
    folder = folder.relative_to(Path.cwd()) if folder.is_relative_to(Path.cwd()) else folder
    digit, series = (shlex.quote(str(folder / name)) for name in ("digit.png", "co2.csv"))
    server = "" if grpc == f"localhost:{GRPC_PORT}" else f" --server {grpc}"
    return [
        f"curl --data-binary @{digit} {http}/v1/models/lenet5-mnist:classify",
        f"{program} classify --model lenet5-mnist {digit}{server}",
        f"{program} forecast --model lstm-co2 --horizon 12 {series}{server}",
    ]
