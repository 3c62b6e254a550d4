"""The board's default conditions: training-free interventions, trained policies and trained parts of the model, with random controls.

To make your own list, copy this file and change the copy. The strengths of edits and steering and the token budgets are our choice for
the tiny reasoner, the small model that comes with the toolkit. For another model, choose them on problems of the dev split, since the
board measures on the test split.

The settings of ``RIVALS`` were chosen on the tiny reasoner's dev split, each among four, with directions and heads from fewer responses
than the board's (``data/rivals``). The learning rates of ``PARTS`` had the highest reward of three in ten steps with the naive length
penalty, and the random heads have that of the chosen heads (``data/why``).
"""

from __future__ import annotations

from dataclasses import replace

from toolkit.baselines import Budget, Instruction, SecondLook
from toolkit.board import rivals
from toolkit.board.spec import Spec, base, edited, masked, prompted, steered, trained, with_rule
from toolkit.grpo import recipes
from toolkit.jobs.finding import OURS, PUBLISHED

LAST = (-1,)  # the layer where Efficiency Steering worked best on the tiny reasoner's dev split

EDITS = [
    edited("ThinkEdit, as published", 1.0, PUBLISHED),
    edited("ThinkEdit (ours), strength 0.5", 0.5, OURS),
    edited("ThinkEdit (ours)", 1.0, OURS),
    edited("ThinkEdit (ours), strength 2", 2.0, OURS),
    edited("ThinkEdit (ours), adapter", 1.0, OURS, adapter=True),
    edited("control: random heads edited", 1.0, OURS, control="heads"),
    edited("control: random direction edited", 1.0, OURS, control="direction"),
]
STEERING = [
    *(steered(f"steered {a:+g}", a) for a in (-1.0, -0.5, 0.5, 1.0)),
    *(steered(f"Efficiency Steering {a:+g}", a, "efficiency", layers=LAST) for a in (-0.5, -0.25, 0.25, 0.5)),
    steered("steered -0.5 while thinking", -0.5, during="think"),
    *(steered(f"control: steered randomly {a:+g}", a, control=True) for a in (-0.5, 0.5)),
    steered("control: Efficiency Steering, random direction -0.25", -0.25, "efficiency", layers=LAST, control=True),
]
# Of one layer's eight heads, four retrieval heads leave only the same four others to every draw of the control.
MASKS = [masked("2 retrieval heads masked", 2), masked("control: 2 random heads masked", 2, control=True)]
DECODING = [
    *(with_rule(f"budget of {tokens}", Budget(tokens, before="\n"), "2501.19393") for tokens in (12, 24, 48)),
    with_rule("Wait, once", SecondLook("wait ", 1), "2501.19393"),
    prompted("asked to be quick", Instruction("quick")),
]
SURE = replace(rivals.ANSWERS, low=0.9999, high=0.99995)
RIVALS = [
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
    rivals.closed("control: budget of 48", 48),
]
POLICIES = [
    trained("GRPO: correctness", recipes.plain("correctness")),
    trained("GRPO: naive length penalty", recipes.plain("length_penalty")),
    trained("GRPO-lambda", recipes.grpo_lambda()),
    trained("DLER", recipes.dler()),
    trained("DA-DLER", recipes.da_dler()),
    trained("LASER", recipes.laser()),
    trained("LASER-D", recipes.laser_d()),
    trained("HAPO", recipes.hapo()),
    trained("DRPO", recipes.drpo()),
    trained("SLPO", recipes.slpo()),
    trained("SAR", recipes.sar()),
    trained("PEAR", recipes.pear()),
    trained(
        "Train Long, Think Short",
        recipes.train_long_think_short(),
        note="judged with the last budget of its training in every prompt, lookup included",
    ),
    trained("Efficient Reasoning", recipes.plain("arora_zanette"), note="Arora and Zanette's discount by length within the group"),
    trained("Surrogate format and length", recipes.surrogate()),
]
PARTS = [
    trained("GRPO-lambda, one vector per layer", recipes.grpo_lambda(), part="vector", learning_rate=3e-2),
    trained("GRPO-lambda, two heads", recipes.grpo_lambda(), part="heads", learning_rate=1e-2),
    trained("control: GRPO-lambda, two random heads", recipes.grpo_lambda(), part="random heads", learning_rate=1e-2),
]
COMBINED = [
    trained("DLER, merged", recipes.dler(), merged=True),
    trained("ThinkEdit (ours), then GRPO-lambda", recipes.grpo_lambda(), edit=1.0),
    trained("GRPO-lambda, then steered -0.5", recipes.grpo_lambda(), steer=-0.5),
]
CONDITIONS: list[Spec] = [base(), *EDITS, *STEERING, *MASKS, *DECODING, *RIVALS, *POLICIES, *PARTS, *COMBINED]
