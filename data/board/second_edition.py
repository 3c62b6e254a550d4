"""Conditions of the board's second edition: the default ones, rivals that need no training, and trained parts of the model.

Not measured as a whole yet: ``toolkit board --conditions data/board/second_edition.py`` takes about four and a half hours of one processor
core, three of them for 57 policies. Then this list becomes ``toolkit/board/default.py``. Policies are trained for 60 steps, not 100: by the
learning curves in ``data/grpo``, accuracy and length change little after that, except where a penalty keeps shortening.

The settings of the rivals were chosen on the dev split, each among four, with directions and heads from fewer responses than the board's
(``data/rivals``). The learning rates of trained parts had the highest reward of three in ten steps with the naive length penalty, and the
random heads have that of the chosen heads (``data/why``).
"""

from __future__ import annotations

import runpy
from dataclasses import replace
from pathlib import Path

from toolkit.board import FULL, default
from toolkit.board.spec import masked, steered, trained
from toolkit.grpo import recipes

SIZES = replace(FULL, training=replace(FULL.training, steps=60))
RIVALS = [
    spec
    for spec in runpy.run_path(str(Path(__file__).parents[1] / "rivals" / "conditions.py"))["CONDITIONS"]
    if spec.family != "base"
    and not spec.name.startswith(("steered", "control: steered", "ThinkEdit", "control: random heads", "budget"))
]
STEERED = [
    steered("control: steered randomly -0.5", -0.5, control=True),
    steered("control: Efficiency Steering, random direction -0.25", -0.25, "efficiency", layers=default.LAST, control=True),
]
# Of one layer's eight heads, four retrieval heads leave only the same four others to every draw of the control.
MASKS = [masked("2 retrieval heads masked", 2), masked("control: 2 random heads masked", 2, control=True)]
PARTS = [
    trained("GRPO-lambda, one vector per layer", recipes.grpo_lambda(), part="vector", learning_rate=3e-2),
    trained("GRPO-lambda, two heads", recipes.grpo_lambda(), part="heads", learning_rate=1e-2),
    trained("control: GRPO-lambda, two random heads", recipes.grpo_lambda(), part="random heads", learning_rate=1e-2),
]
REPLACED = {spec.name for spec in default.MASKS} | {"no re-checks"}  # NoWait is among the rivals
CONDITIONS = [*(spec for spec in default.CONDITIONS if spec.name not in REPLACED), *STEERED, *MASKS, *RIVALS, *PARTS]
