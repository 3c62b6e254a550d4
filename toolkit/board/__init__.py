"""The board: every intervention beside every trained policy, on the same ground, with honest statistics.

``spec`` says what a condition is, ``default`` lists them, ``ground`` makes what they share, ``measure`` measures one, ``running`` all of them, ``statistics`` and
``reading`` make a board of the results, ``page`` writes it for people. ``toolkit board --help`` is the way in.

On a model of 1.5 to 7 billion weights and one GPU: see ``data/board/README.md``.
"""

from toolkit.board.ground import FULL, QUICK, Ground, Sizes, adjust_sizes
from toolkit.board.reading import make_board, text_table, write
from toolkit.board.running import run
from toolkit.board.spec import (
    Spec,
    base,
    edited,
    masked,
    prompted,
    read_conditions,
    select_conditions,
    steered,
    trained,
    with_intervention,
    with_rule,
)
from toolkit.grpo.plan import TrainingPlan

__all__ = [
    "FULL",
    "QUICK",
    "Ground",
    "Sizes",
    "Spec",
    "TrainingPlan",
    "adjust_sizes",
    "base",
    "edited",
    "make_board",
    "masked",
    "prompted",
    "read_conditions",
    "run",
    "select_conditions",
    "steered",
    "text_table",
    "trained",
    "with_intervention",
    "with_rule",
    "write",
]  # fmt: skip
