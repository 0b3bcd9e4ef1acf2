"""The command line: `rafaga models | classify | features | forecast` ask a server, `rafaga serve` is one."""

from rafaga.cli._main import main

__all__ = ["main"]
