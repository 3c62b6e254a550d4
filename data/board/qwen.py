"""Conditions for a reasoning model of 1.5 to 8 billion weights that thinks for hundreds to thousands of tokens; see README.md here.

Budgets and strengths are first guesses; choose them on the dev split (``toolkit dose``). Those of the tiny reasoner do not apply here.
"""

from toolkit.baselines import Budget, Instruction, SecondLook, Suppress
from toolkit.board import base, edited, prompted, steered, trained, with_intervention, with_rule
from toolkit.grpo import recipes
from toolkit.jobs.finding import OURS, PUBLISHED

CONDITIONS = [
    base(),
    edited("ThinkEdit, as published", 1.0, PUBLISHED),
    edited("ThinkEdit (ours)", 1.0, OURS),
    edited("control: random heads edited", 1.0, OURS, control="heads"),
    edited("control: random direction edited", 1.0, OURS, control="direction"),
    *(steered(f"steered {a:+g}", a) for a in (-0.08, -0.04, 0.04, 0.08)),
    steered("control: steered randomly -0.08", -0.08, control=True),
    *(with_rule(f"budget of {tokens}", Budget(tokens, before="\n"), "2501.19393") for tokens in (256, 1024, 4096)),
    with_rule("Wait, once", SecondLook("Wait", 1), "2501.19393"),
    with_intervention("NoWait", Suppress(), paper="2506.08343"),
    prompted("asked to be brief", Instruction("Think briefly.")),
    trained("GRPO: correctness", recipes.plain("correctness")),
    trained("GRPO-lambda", recipes.grpo_lambda()),
    trained("DLER", recipes.dler()),
    trained("DLER, merged", recipes.dler(), merged=True),
    trained("HAPO", recipes.hapo()),
    trained("DRPO", recipes.drpo()),
]
