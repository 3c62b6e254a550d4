"""The board: every intervention beside every trained policy, on the same ground, with honest statistics.

``spec`` says what a condition is, ``default`` lists them, ``ground`` makes what they share, ``measure`` measures one, ``running`` all of them, ``statistics`` and
``reading`` make a board of the results, ``page`` writes it for people. ``toolkit board --help`` is the way in.

On a model of 1.5 to 7 billion weights and one GPU: see ``data/board/README.md``.
"""

from toolkit.board.ground import FULL, QUICK, Ground, Sizes, sized
from toolkit.board.reading import board, shown, write
from toolkit.board.running import run
from toolkit.board.spec import Spec, asked, base, checked, during, edited, masked, read, ruled, steered, trained
from toolkit.grpo.plan import TrainingPlan

__all__ = [
    "FULL", "QUICK", "Ground", "Sizes", "Spec", "TrainingPlan", "asked", "base", "board", "checked", "during", "edited", "masked", "read", "ruled",
    "run", "shown", "sized", "steered", "trained", "write",
]  # fmt: skip
