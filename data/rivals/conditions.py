"""Training-free rivals as conditions of a board: ``toolkit board --conditions data/rivals/conditions.py``.

The settings of the rivals are those that ``measure.py`` chose on the tiny reasoner's dev split. Each rival stands beside its random control.
"""

from __future__ import annotations

from toolkit.baselines import Budget
from toolkit.board.default import RIVALS
from toolkit.board.spec import base, edited, steered, with_rule

CONDITIONS = [
    base(),
    steered("steered -0.125 while thinking", -0.125, during="think"),
    steered("control: steered randomly -0.125", -0.125, during="think", control=True),
    edited("ThinkEdit (ours), strength 0.5", 0.5),
    edited("control: random heads, strength 0.5", 0.5, control="heads"),
    with_rule("budget of 48", Budget(48, before="\n"), "2501.19393"),
    *RIVALS,
]
