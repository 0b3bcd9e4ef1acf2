"""Where settings come from: defaults < TOML file < environment variables < flags. Reads no other part of the system."""

from __future__ import annotations

import argparse
import re
import tomllib
from collections.abc import Mapping
from pathlib import Path

from rafaga.server.config.settings import GROUPS, Config, ConfigError

PREFIX = "RAFAGA_"
_SERVICE_LINK = re.compile("(tcp|udp|sctp)://")
SETTINGS = {name: setting for settings in GROUPS.values() for name, setting in settings.items()}


def add_arguments(parser: argparse.ArgumentParser) -> None:
    """One flag for each setting, in groups, and --config."""
    parser.add_argument("--config", type=Path, metavar="FILE", help="TOML file of settings")
    for title, settings in GROUPS.items():
        group = parser.add_argument_group(title)
        for name, setting in settings.items():
            shown = "" if setting.default in (None, "") else f" (default: {setting.default})"
            # The parser has no default: a flag that was not given must not hide the file or the environment.
            group.add_argument(flag(name), dest=name, metavar=setting.metavar, help=setting.help + shown)


def from_arguments(namespace: argparse.Namespace, environ: Mapping[str, str]) -> Config:
    """Raises ConfigError, which says which source the bad value came from."""
    given: dict[str, tuple[str, object]] = {}
    if namespace.config is not None:
        given |= _from_file(namespace.config)
    ignored = service_links(environ)
    for name in SETTINGS:
        variable = PREFIX + name.upper()
        if (value := environ.get(variable)) is not None and variable not in ignored:
            given[name] = (variable, value)
        if (value := getattr(namespace, name)) is not None:
            given[name] = (flag(name), value)
    return Config.read(given)


def service_links(environ: Mapping[str, str]) -> dict[str, str]:
    """Variables that look like settings but come from Kubernetes. They are ignored.

    For a Service named rafaga-grpc it sets RAFAGA_GRPC_PORT=tcp://… in every pod of the namespace, unless the pod has
    enableServiceLinks: false.
    """
    names = [PREFIX + name.upper() for name in SETTINGS if name.endswith("_port")]
    return {name: environ[name] for name in names if _SERVICE_LINK.match(environ.get(name, ""))}


def flag(name: str) -> str:
    return "--" + name.replace("_", "-")


def _from_file(path: Path) -> dict[str, tuple[str, object]]:
    try:
        values = tomllib.loads(path.read_text())
    except (OSError, ValueError) as error:  # ValueError: not TOML, or not UTF-8
        raise ConfigError(f"{path}: {error}") from None
    if unknown := sorted(values.keys() - SETTINGS.keys()):
        raise ConfigError(f"{path}: unknown settings: {', '.join(unknown)}")
    return {name: (f"{path}: {name}", value) for name, value in values.items()}
