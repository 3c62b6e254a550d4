"""Start helper processes that end when the process that started them (the *parent*) ends, for whatever reason.

A helper imports this module first. The module imports nothing slow, so that the helper watches its parent from the start.
"""

from __future__ import annotations

import ctypes
import os
import signal
import subprocess
import sys
import threading
import time
from collections.abc import Sequence

EVERY = 0.5  # seconds between checks that the parent process still runs
PR_SET_PDEATHSIG = 1  # linux/prctl.h


def start_helper(code: str, arguments: Sequence[str]) -> subprocess.Popen[bytes]:
    """Start a Python process that runs ``code``, and return it. If it is still running when this process ends, it ends too.

    Args:
        code: Python source text to run. It need not call ``end_with``: this is done before it runs.
        arguments: ``sys.argv[1:]`` of the new process.
    """
    watched = f"from toolkit.processes import end_with; end_with({os.getpid()}); {code}"
    return subprocess.Popen([sys.executable, "-c", watched, *arguments])


def end_with(parent: int) -> None:
    """Make this process end when its parent process ends.

    On Linux, the kernel kills this process when the parent ends. In addition, on all systems, a thread of this process checks every half
    second whether the parent still runs. No file is damaged, since results are written atomically.

    Args:
        parent: Process id of the process that started this one.
    """
    if sys.platform == "linux":
        ctypes.CDLL(None).prctl(PR_SET_PDEATHSIG, signal.SIGKILL)
    threading.Thread(target=_watch, args=(parent,), daemon=True).start()


def _watch(parent: int) -> None:
    while os.getppid() == parent:
        time.sleep(EVERY)
    os._exit(1)
