"""How a node's command line ends: errors made on purpose in one line, others with their traceback."""

from __future__ import annotations

import sys
from collections.abc import Callable

from vla.errors import VlaError


def run(main: Callable[[], object]) -> int:
    """Exit code of `main()`: 0, or 1 after printing a VlaError."""
    try:
        main()
    except VlaError as error:
        print(f"error: {error}", file=sys.stderr)
        return 1
    return 0
