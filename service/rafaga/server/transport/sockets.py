"""What grpcio does not do with sockets: say why an address cannot be bound, and end connections when asked to."""

from __future__ import annotations

import contextlib
import errno
import os
import socket
import stat
from collections.abc import Iterator

from rafaga.addresses import UNIX

_DESCRIPTORS = "/proc/self/fd"  # Linux; elsewhere nothing is hung up


def refuse_taken(address: str) -> None:
    """Raises OSError if a process listens on this Unix socket: the core would remove it and take its place."""
    if not address.startswith(UNIX):
        return
    with socket.socket(socket.AF_UNIX) as probe:
        try:
            probe.connect(address.removeprefix(UNIX))
        except OSError:
            return
    raise OSError(errno.EADDRINUSE, os.strerror(errno.EADDRINUSE), address)


def bind_error(address: str) -> OSError:
    """The reason, which grpcio does not give: found by binding a plain socket."""
    try:
        if address.startswith(UNIX):
            path = address.removeprefix(UNIX)
            with socket.socket(socket.AF_UNIX) as probe:
                probe.bind(path)
            os.unlink(path)
        else:
            host, _, port = address.rpartition(":")
            family = socket.AF_INET6 if ":" in host else socket.AF_INET
            socket.create_server((host.strip("[]"), int(port)), family=family).close()
    except socket.gaierror as error:
        return OSError(error.errno, "no such host", address)
    except OSError as error:
        why = os.strerror(error.errno) if error.errno else str(error)  # a path that is too long has no number
        return OSError(error.errno or errno.ENAMETOOLONG, why, address)
    return OSError(errno.EADDRNOTAVAIL, os.strerror(errno.EADDRNOTAVAIL), address)


def hang_up(address: str, port: int) -> None:
    """Ends the listening sockets of a server, then its connections. What was written to them is still delivered.

    grpcio has no call for this: while its stop() ends connections, it ends calls that arrive on them as CANCELLED.
    """
    with contextlib.ExitStack() as opened:
        every = [opened.enter_context(each) for each in _sockets()]
        found = [each for each in every if _belongs(each, address, port)]
        found.sort(key=lambda each: -each.getsockopt(socket.SOL_SOCKET, socket.SO_ACCEPTCONN))
        for each in found:
            with contextlib.suppress(OSError):
                each.shutdown(socket.SHUT_RDWR)


def _sockets() -> Iterator[socket.socket]:
    """Duplicates of the process's sockets."""
    for name in os.listdir(_DESCRIPTORS) if os.path.isdir(_DESCRIPTORS) else ():
        with contextlib.suppress(OSError):  # closed meanwhile
            if stat.S_ISSOCK(os.stat(int(name)).st_mode):
                yield socket.socket(fileno=os.dup(int(name)))


def _belongs(each: socket.socket, address: str, port: int) -> bool:
    if each.family in (socket.AF_INET, socket.AF_INET6):
        return each.type == socket.SOCK_STREAM and each.getsockname()[1] == port
    return each.family == socket.AF_UNIX and f"{UNIX}{each.getsockname()}" == address
