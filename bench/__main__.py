"""Nothing but a door: the load generator's processes import this module again, and need none of the rest."""

from __future__ import annotations

import sys

if __name__ == "__main__":
    from bench.command import main

    sys.exit(main())
