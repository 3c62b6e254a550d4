"""Random controls of ThinkEdit's edit: other heads, or another direction in the same heads."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import replace

import numpy as np

from toolkit import edits
from toolkit.jobs.finding import ESTIMATORS, FORMS, Finding
from toolkit.lm import LM
from toolkit.methods import thinkedit
from toolkit.types import Plan


def random_heads(lm: LM, finding: Finding, like: Plan, *, seed: int) -> Plan:
    """Return a control for the choice of heads: the same form of ThinkEdit with random other heads of the same layers.

    If the form removes what the edited heads write, what the random heads write themselves is removed from them. The direction of the edited
    heads would be next to nothing of their output.

    Args:
        lm: The base model.
        finding: Result of ``find_heads``.
        like: The plan for which a control is wanted: ``finding.plan``, or one with another strength or number of heads.
        seed: Seed of the random choice.

    Raises:
        ValueError: the plan edits more than half of all heads.
    """
    return FORMS[finding.form].removes(edits.random_heads(like, lm.layout, seed=seed), finding.moments, lm)


def random_groups(lm: LM, finding: Finding, like: Plan, *, seed: int) -> Plan:
    """Return a control for the direction: the same heads, and the direction between two random groups of responses.

    Each group has half of the responses with short thinking and half of those with long thinking, so their difference does not depend on
    length. It is computed as the length direction is. The outputs of the heads vary along it as much as they vary by chance, which a
    vector drawn at random from all that the heads can write does not give: it would remove a fraction of what the edit removes.

    Args:
        lm: The base model.
        finding: Result of ``find_heads``.
        like: The plan for which a control is wanted, as in ``random_heads``.
        seed: Seed of the groups.
    """
    form, rng = FORMS[finding.form], np.random.default_rng(seed)
    groups: dict[str, str] = {}
    for label in (thinkedit.SHORT, thinkedit.LONG):
        parts = rng.permutation([part for part in finding.cells.labels if part.split()[0] == label])
        groups |= {str(part): (thinkedit.SHORT, thinkedit.LONG)[2 * i < len(parts)] for i, part in enumerate(parts)}
    moments = finding.cells.merged(groups)
    v = thinkedit.direction(moments, form.recipe.kind, estimator=ESTIMATORS[form.recipe.estimator])
    plan = form.removes(edits.with_direction(like, v), moments, lm)
    return replace(plan, name=f"random groups (seed {seed}) for: {like.name}")


def random_controls(lm: LM, finding: Finding, like: Plan, draw: Callable[..., Plan], draws: int, *, seed: int) -> list[Plan]:
    """Return up to ``draws`` different random controls of an edit (see ``edits.different_draws``).

    Args:
        lm: The base model.
        finding: Result of ``find_heads``.
        like: The plan for which controls are wanted.
        draw: ``random_heads`` or ``random_groups``.
        draws: Number of controls.
        seed: Seed of the first draw; the others have the next seeds.
    """
    return edits.different_draws(lambda at: draw(lm, finding, like, seed=at), draws, seed=seed)
