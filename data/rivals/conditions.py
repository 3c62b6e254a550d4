"""Training-free rivals as conditions of a board: ``toolkit board --conditions data/rivals/conditions.py``.

The settings are those that ``measure.py`` chose on the tiny reasoner's dev split. Each rival stands beside its random control.
"""

from __future__ import annotations

from dataclasses import replace

from toolkit.baselines import Budget
from toolkit.board import rivals
from toolkit.board.spec import base, edited, steered, with_rule

SURE = replace(rivals.ANSWERS, low=0.9999, high=0.99995)

CONDITIONS = [
    base(),
    steered("steered -0.125 while thinking", -0.125, during="think"),
    steered("control: steered randomly -0.125", -0.125, during="think", control=True),
    edited("ThinkEdit (ours), strength 0.5", 0.5),
    edited("control: random heads, strength 0.5", 0.5, control="heads"),
    rivals.stable("stable direction -0.2", -0.2),
    rivals.stable("control: stable direction", -0.2, control=True),
    rivals.projected("manifold 0.5", 0.5),
    rivals.projected("control: manifold", 0.5, control=True),
    rivals.rotated("CREST, 8 heads", 8),
    rivals.rotated("control: CREST", 8, control=True),
    rivals.confident("ReBalance 0.5", 0.5),
    rivals.confident("control: ReBalance", 0.5, control=True),
    rivals.answered("CoDE-Stop", SURE),
    rivals.answered("control: CoDE-Stop", SURE, control=True),
    rivals.probed("exit probe 0.7", 0.7),
    rivals.probed("control: exit probe", 0.7, control=True),
    rivals.suppressed("NoWait"),
    rivals.suppressed("control: NoWait", others=rivals.STARTS),
    with_rule("budget of 48", Budget(48, before="\n"), "2501.19393"),
    rivals.closed("control: budget of 48", 48),
]
