"""Processes that help: they end with the one that started them, however it ends. Imports nothing heavy, so that a helper watches at once."""

from __future__ import annotations

import ctypes
import os
import signal
import subprocess
import sys
import threading
import time
from collections.abc import Sequence

EVERY = 0.5  # seconds between looks at the parent
PR_SET_PDEATHSIG = 1  # linux/prctl.h


def start_helper(code: str, arguments: Sequence[str]) -> subprocess.Popen[bytes]:
    """Start Python on ``code`` with arguments (its ``sys.argv[1:]``), as a process that ends with this one."""
    watched = f"from toolkit.processes import end_with; end_with({os.getpid()}); {code}"
    return subprocess.Popen([sys.executable, "-c", watched, *arguments])


def end_with(parent: int) -> None:
    """End this process, at once and whatever it does, when the process ``parent``, which started it, is gone.

    Linux kills it by itself; elsewhere a thread looks every half second. Everything kept is written atomically, so no file is lost.
    """
    if sys.platform == "linux":
        ctypes.CDLL(None).prctl(PR_SET_PDEATHSIG, signal.SIGKILL)
    threading.Thread(target=_watch, args=(parent,), daemon=True).start()


def _watch(parent: int) -> None:
    while os.getppid() == parent:
        time.sleep(EVERY)
    os._exit(1)
