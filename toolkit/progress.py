"""Progress of long stages: a bar with rate and time left in a terminal or notebook, and a plain line now and then in a log.

Every bar of the toolkit comes from ``stage``, so that stages are named and totals known, and no carriage return gets into a log file.
"""

from __future__ import annotations

import logging
import sys
import time
from typing import Any

from tqdm.auto import tqdm

EVERY = 60.0  # seconds between two lines of a stage, where there is no terminal
SLOW = 10.0  # a stage that takes fewer seconds than this gets no line at its end
log = logging.getLogger(__name__)


class Stage(tqdm):  # type: ignore[misc,valid-type]  # tqdm.auto chooses its base class at run time
    """Progress of a stage, made by ``stage``: a tqdm bar, or plain lines in a log if there is no terminal or notebook.

    Attributes:
        logs: True if lines are logged instead of a bar.
    """

    def __init__(self, *, logs: bool, **settings: Any) -> None:
        super().__init__(**settings)
        self.logs, self.name, self.kind = logs, settings["desc"], settings["unit"]
        self.first, self.began = self.n, time.monotonic()
        self.said, self.said_at = self.began, -1  # time of the last line, and the units done by then

    def update(self, n: int | float | None = 1) -> Any:
        """Count ``n`` more units as done."""
        if not self.logs:
            return super().update(n)
        self.n += n or 0
        now = time.monotonic()
        if now - self.said >= EVERY:
            self.said, self.said_at = now, self.n
            log.info("%s", self._line(now))
        return None

    def close(self) -> None:
        """End the stage."""
        now = time.monotonic()
        if self.logs and now - self.began >= SLOW and self.said_at != self.n:
            log.info("%s", self._line(now, ended=True))
        self.logs = False
        super().close()

    def _line(self, now: float, *, ended: bool = False) -> str:
        spent = now - self.began
        rate = (self.n - self.first) / spent if spent else 0.0
        if self.n >= self.total:
            ends = f"took {_clock(spent)}"
        elif ended:
            ends = f"stopped after {_clock(spent)}"
        else:
            ends = f"{_clock((self.total - self.n) / rate)} left" if rate else f"{_clock(spent)} so far"
        return f"{self.name}: {self.n:g} of {self.total:g} {self.kind}s, {rate:.3g} per second, {ends}"


def stage(name: str, total: int, unit: str, *, show: bool = True, initial: int = 0) -> Stage:
    """Return a progress bar of one stage of work, to be used as a context manager, with ``update(n)`` for each part done.

    In a terminal and in Jupyter it is a tqdm bar, which disappears at the end. Elsewhere, as in a log file, it logs a plain line every
    minute, and one at the end if the stage took long.

    Args:
        name: Name of the stage, such as ``"sampling"``.
        total: Number of units in all.
        unit: Word for one unit, such as ``"rollout"``.
        show: False shows and logs nothing.
        initial: Number of units that are done already.
    """
    watched = is_watched()
    return Stage(
        logs=show and not watched, desc=name, total=total, unit=unit, initial=initial, leave=False, disable=not (show and watched)
    )


def is_watched() -> bool:
    """Return True if progress bars are seen as such: stderr is a terminal, or this is a Jupyter notebook."""
    notebook = any("notebook" in base.__module__ for base in tqdm.__mro__)
    return notebook or bool(getattr(sys.stderr, "isatty", lambda: False)())


def _clock(seconds: float) -> str:
    minutes, rest = divmod(round(seconds), 60)
    return f"{minutes // 60}:{minutes % 60:02}:{rest:02}" if minutes >= 60 else f"{minutes}:{rest:02}"
