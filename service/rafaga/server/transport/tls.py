"""The server's certificates. They are read again when their files change: certificates are renewed while it runs."""

from __future__ import annotations

import logging
import ssl
import threading
from collections.abc import Callable
from pathlib import Path
from typing import Any, cast

import grpc

_LOG = logging.getLogger(__name__)


class Tls:
    """PEM files of one port. `client_ca` asks for client certificates signed by it (mTLS)."""

    def __init__(self, private_key: Path, certificate: Path, client_ca: Path | None = None) -> None:
        """Raises OSError for files that cannot be read or do not belong together."""
        self._private_key = private_key
        self._certificate = certificate
        self._client_ca = client_ca
        self._lock = threading.Lock()
        self._stamp = self._current_stamp()
        self._context = self._load()

    def grpc_credentials(self) -> grpc.ServerCredentials:
        """Asks for changed files before every handshake."""

        def renewed() -> grpc.ServerCertificateConfiguration | None:
            return self._configuration() if self._renew() else None

        fetch = cast("Callable[[], grpc.ServerCertificateConfiguration]", renewed)  # the stubs lack "no change": None
        return grpc.dynamic_ssl_server_credentials(self._configuration(), fetch, self._client_ca is not None)

    def http_context(self) -> ssl.SSLContext:
        """The same for Python's ssl: the callback runs in every handshake, with or without a server name."""

        def renewed(connection: ssl.SSLObject, *_: Any) -> None:
            self._renew()
            connection.context = self._context

        context = self._load()
        context.sni_callback = renewed
        return context

    def _configuration(self) -> grpc.ServerCertificateConfiguration:
        pair = (self._private_key.read_bytes(), self._certificate.read_bytes())
        roots = None if self._client_ca is None else self._client_ca.read_bytes()
        return grpc.ssl_server_certificate_configuration([pair], root_certificates=roots)

    def _renew(self) -> bool:
        """Whether there are new certificates. Unfit files are reported once, and the former ones stay in use."""
        with self._lock:
            try:
                stamp = self._current_stamp()
                if stamp == self._stamp:
                    return False
                self._stamp = stamp
                self._context = self._load()
            except OSError as error:
                _LOG.error("the certificate files have changed and are unfit; the former ones stay in use: %s", error)
                return False
        _LOG.info("certificates renewed", extra={"certificate": str(self._certificate)})
        return True

    def _load(self) -> ssl.SSLContext:
        try:
            context = ssl.create_default_context(ssl.Purpose.CLIENT_AUTH, cafile=self._client_ca)
            # An empty password: otherwise an encrypted key would be asked for on the terminal.
            context.load_cert_chain(self._certificate, self._private_key, password="")
            if self._client_ca is not None:
                # Verified, but not required: probes have none. The HTTP port refuses calls without one.
                context.verify_mode = ssl.CERT_OPTIONAL
        except ssl.SSLError as error:
            names = ", ".join(str(file) for file in self._files)
            raise OSError(error.errno, f"{error.strerror or error} ({names})") from None
        return context

    @property
    def _files(self) -> list[Path]:
        return [file for file in (self._private_key, self._certificate, self._client_ca) if file is not None]

    def _current_stamp(self) -> tuple[tuple[int, int, int], ...]:
        return tuple((s.st_mtime_ns, s.st_ino, s.st_size) for s in (file.stat() for file in self._files))
