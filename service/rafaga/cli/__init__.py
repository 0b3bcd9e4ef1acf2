"""The command line: `rafaga serve` is a server, `rafaga load` tests one, the other commands ask one."""

from rafaga.cli._main import main

__all__ = ["main"]
