"""The board's default conditions: training-free interventions, trained policies, and random controls.

To make your own list, copy this file and change the copy. The strengths of edits and steering and the token budgets are our choice for
the tiny reasoner, the small model that comes with the toolkit. For another model, choose them on problems of the dev split, since the
board measures on the test split.
"""

from __future__ import annotations

from toolkit.baselines import Budget, Instruction, SecondLook, Suppress
from toolkit.board.spec import Spec, base, edited, masked, prompted, steered, trained, with_intervention, with_rule
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
    steered("control: steered randomly +0.5", 0.5, control=True),
]
MASKS = [masked("4 retrieval heads masked", 4), masked("control: 4 random heads masked", 4, control=True)]
DECODING = [
    *(with_rule(f"budget of {tokens}", Budget(tokens, before="\n"), "2501.19393") for tokens in (12, 24, 48)),
    with_rule("Wait, once", SecondLook("wait ", 1), "2501.19393"),
    # The tiny reasoner begins a re-check with "wait"; its first token is "w".
    with_intervention("no re-checks", Suppress(("w",)), paper="2506.08343"),
    prompted("asked to be quick", Instruction("quick")),
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
COMBINED = [
    trained("DLER, merged", recipes.dler(), merged=True),
    trained("ThinkEdit (ours), then GRPO-lambda", recipes.grpo_lambda(), edit=1.0),
    trained("GRPO-lambda, then steered -0.5", recipes.grpo_lambda(), steer=-0.5),
]
CONDITIONS: list[Spec] = [base(), *EDITS, *STEERING, *MASKS, *DECODING, *POLICIES, *COMBINED]
