"""Worker processes that do not outlive the process that started them."""

from __future__ import annotations

import os
import threading
import time


def end_with_parent() -> None:
    """Call first in a worker: it ends within a second of its parent, however that ended (a SIGTERM runs no cleanup, and
    a worker left behind would go on computing, and writing, for nobody)."""
    parent = os.getppid()

    def watch() -> None:
        while os.getppid() == parent:
            time.sleep(0.5)
        os._exit(1)

    threading.Thread(target=watch, name="end-with-parent", daemon=True).start()
