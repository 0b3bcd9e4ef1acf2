"""The command line: `rafaga serve` runs a server, `rafaga load` tests one, the other commands send requests."""

from rafaga.cli._main import main

__all__ = ["main"]
