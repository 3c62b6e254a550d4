"""Conditions and sizes of the board for the smol reasoner: published interventions, our forms of them, and controls.

    toolkit board -m smol-reasoner --dtype bfloat16 --conditions data/smol-reasoner/board.py --out runs/smol-board --jobs 2

``results.py`` beside this file reads the results. Strengths, and layer and scope of Efficiency Steering (the middle layer, every newest
position), are ours: on dev problems with the first stage's adapter, strength 1 had little effect and 4 broke the model.
"""

from toolkit.board import Sizes, TrainingPlan, base, edited, masked, steered, trained
from toolkit.grpo import parts, recipes
from toolkit.jobs.finding import OURS, PUBLISHED

SIZES = Sizes(
    main=(("wordproblems", 80),),
    unseen=(("arithmetic", 8),),
    samples=4,
    max_new_tokens=200,
    unseen_tokens=160,
    seeds=3,
    extraction=(160, 6),
    haystack="needle",
    haystacks=24,
    lengths=(200, 400),
    texts=16,
    fraction=0.04,
    training=TrainingPlan(
        task="wordproblems", steps=8, pool=48, held_out=12, evaluate_every=4, tiny=False, micro_batch=8, train=parts.adapter(8),
        changes=(("problems", 6), ("samples", 8), ("max_tokens", 160), ("learning_rate", 5e-4)),
    ),
)  # fmt: skip
CONDITIONS = [
    base(),
    trained("GRPO: correctness", recipes.plain("correctness")),
    trained("GRPO-lambda", recipes.grpo_lambda()),
    *(edited(f"ThinkEdit, as published, {100 * f:.0f} % of heads", 1.0, PUBLISHED, fraction=f) for f in (0.02, 0.04, 0.06)),
    *(edited(f"ThinkEdit (ours), {100 * f:.0f} % of heads", 1.0, OURS, fraction=f) for f in (0.02, 0.04, 0.06)),
    edited("control: random heads edited, as published", 1.0, PUBLISHED, control="heads"),
    edited("control: random heads edited (ours)", 1.0, OURS, control="heads"),
    edited("control: random direction edited (ours)", 1.0, OURS, control="direction"),
    steered("steered shorter", -2.0),
    steered("steered longer", 2.0),
    steered("control: steered randomly", 2.0, control=True),
    steered("control: steered randomly, shorter", -2.0, control=True),
    steered("Efficiency Steering, shorter", -2.0, "efficiency", layers=(15,), during="newest"),
    steered("control: Efficiency Steering, random direction", -2.0, "efficiency", layers=(15,), during="newest", control=True),
    masked("4 retrieval heads masked", 4),
    masked("control: 4 random heads masked", 4, control=True),
]
