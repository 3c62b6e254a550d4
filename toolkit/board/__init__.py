"""The board: a table and figures that compare interventions and trained policies on the same problems.

A *condition* is a model together with its interventions; a ``Spec`` describes one. *Base* is the unchanged model. *Random controls* are
conditions that make an arbitrary change of the kind of an intervention, such as an edit of equally many random heads. P-values are
corrected for the number of comparisons (Holm).

Modules:

* ``spec``: descriptions of conditions. ``default``: the conditions of the default board.
* ``ground``: inputs that all conditions share, such as the base model and the sizes of the measurements.
* ``measure``: measures one condition. ``running``: measures all of them.
* ``reading``: computes the value of every metric and its difference from base. ``statistics``: corrects p-values and computes the Pareto
  front. ``page``: writes the board as a web page.

Start with ``toolkit board --help``. For a model of 1.5 to 8 billion weights on one GPU, see ``data/board/README.md``.
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
