"""Steering strengths that fit a model and a direction: sized by the relative dose, then tried on a handful of prompts.

The same strength is weak in one model and breaks another. It depends on the norm of the direction, on the norm of the activations, and on
the number of steered layers, since every layer adds to what the layers before it added. So strengths are sized by the *total dose*::

    total dose = sum over the steered layers of  |strength| * |v| / |h|

with v the direction at a layer and |h| the typical norm of the activations there. One term of the sum is the *relative dose* of a layer.
``fit`` doubles the total dose on each side of 0 until a few responses show damage (see ``doses.is_intact``).
"""

from __future__ import annotations

import math
from collections.abc import Callable, Sequence
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

import pandas as pd
from jaxtyping import Float
from torch import Tensor

from toolkit import doses, evaluate
from toolkit.generate import Sampling, rollouts
from toolkit.lm import LM, Condition
from toolkit.progress import stage
from toolkit.steering import Steering
from toolkit.types import Problem, Rollout

assumed_totals = (0.1, 0.2, 0.4, 0.8, 1.6)
"""Total doses that are tried, in this order (ours). Class differences did damage at 1.6 in the tiny reasoner, and at 0.8 in smol-reasoner."""
assumed_handful = 8  # number of prompts on which strengths are tried: ours
assumed_patience = 3.0  # a response this many times as long as base's longest counts as one that never closes: ours
assumed_margin = 1.5  # a dose-response curve goes this far beyond the usable range: ours
assumed_closed = 0.5  # share of base's responses that must close, or no usable range is looked for: ours


@dataclass(frozen=True)
class Fit:
    """Strengths that were tried on a handful of prompts.

    Attributes:
        table: One row per strength, ascending, with the strength as index; 0 is the base model. Columns: ``relative_dose`` (largest of the
            steered layers), ``total_dose``, ``length`` (mean think tokens of a response; response tokens if there are no think tags),
            ``closed`` and ``looping`` (shares, 0 to 1), ``intact`` (bool; see ``doses.is_intact``).
        prompts: Number of prompts.
        layers: Number of steered layers.
    """

    table: pd.DataFrame
    prompts: int
    layers: int

    @property
    def usable(self) -> tuple[float, float]:
        """Usable range ``(lowest, highest)``: around 0, up to the last strength before the first that does damage."""
        return doses.range_around_zero(self.table["intact"])

    @property
    def shorter(self) -> float:
        """Usable strength below 0 with the shortest responses; 0 if none shortens them."""
        return self._best(self.table[self.table.index < 0], shortest=True)

    @property
    def longer(self) -> float:
        """Usable strength above 0 with the longest responses; 0 if none lengthens them."""
        return self._best(self.table[self.table.index > 0], shortest=False)

    @property
    def shown(self) -> tuple[float, ...]:
        """Strengths to show first, ascending: ``shorter``, 0 (the base model) and ``longer``.

        If no usable strength shortens or lengthens thinking, the end of ``usable`` on that side stands in.
        """
        low, high = self.usable
        return tuple(sorted({self.shorter or low, 0.0, self.longer or high}))

    @property
    def grid(self) -> tuple[float, ...]:
        """Nine strengths for a dose-response curve, evenly spaced on each side of 0, the last one beyond the usable range."""
        ends = (end or near for end, near in zip(self.usable, self._smallest, strict=True))
        steps = [_rounded(end * assumed_margin * i / 4) for end in ends for i in range(1, 5)]
        return tuple(sorted({0.0, *steps}))

    @property
    def _smallest(self) -> tuple[float, float]:
        tried = self.table.index
        return max(tried[tried < 0]), min(tried[tried > 0])

    def _best(self, side: pd.DataFrame, *, shortest: bool) -> float:
        low, high = self.usable
        usable = side.loc[low:high, "length"]
        if usable.empty:
            return 0.0
        best = float(usable.idxmin() if shortest else usable.idxmax())
        change = self.table.loc[best, "length"] - self.table.loc[0.0, "length"]
        return best if (change < 0 if shortest else change > 0) else 0.0

    def __str__(self) -> str:
        """Return what was found in one sentence, for people."""
        low, high = self.usable
        lengths = ", ".join(
            f"{self.table.loc[a, 'length']:.3g} at {a:+g}" if a else f"{self.table.loc[a, 'length']:.3g} without"
            for a in self.shown
        )
        missing = [word for word, best in (("shortens", self.shorter), ("lengthens", self.longer)) if not best]
        nothing = f"; no usable strength {' or '.join(missing)} them" if missing else ""
        return f"usable {low:+g} to {high:+g} (still closes, no loops), found on {self.prompts} prompts; mean tokens of thinking {lengths}{nothing}"


class TooFewClosedError(ValueError):
    """Raised if base closes so few of its responses that damage by steering could not be seen."""


def fit(
    lm: LM,
    act: Callable[[float], Steering],
    problems: Sequence[Problem],
    sampling: Sampling,
    *,
    out: Path | None = None,
) -> Fit:
    """Try strengths of growing total dose on a handful of problems, and return the lengths and the damage that they cause.

    Each side of 0 is searched outwards and ends at the first strength that does damage. Responses of base come first; a steered response
    is cut when it is ``assumed_patience`` times as long as the longest of them, so that a loop costs little.

    Args:
        lm: Model to steer.
        act: Function from a strength to the intervention, which must have the operation ``add``.
        problems: A few problems; only their prompts are used.
        sampling: Sampling settings.
        out: Directory to save the rollouts in, from which a repeated call resumes; ``None`` saves nothing.

    Raises:
        ValueError: there is no problem, or the direction is zero in every steered layer.
        TooFewClosedError: base closes less than half of its responses.
    """
    if not problems:
        raise ValueError("There is no problem to try strengths on: give at least one.")
    base = _sampled(lm, None, problems, sampling, out)
    typical = doses.typical_norms(lm, base, act(1.0).site)
    if (closed := sum(r.closed for r in base) / len(base)) < assumed_closed:
        raise TooFewClosedError(
            f"{lm.name} closes its thinking in {closed:.0%} of {len(base)} responses of at most {sampling.max_new_tokens} tokens, so damage by "
            "steering could not be seen: give a larger --max-new-tokens, or strengths of your own (--alpha)."
        )
    short = replace(sampling, max_new_tokens=_cap(base, sampling.max_new_tokens))
    rows = [_row(lm, act(0.0), problems, base, typical)]
    with stage("trying strengths", 2 * len(assumed_totals), "strength") as bar:
        for sign in (-1, 1):
            for n, total in enumerate(assumed_totals):
                strength = sign * _rounded(strength_of(act, total, typical))
                row = _row(lm, act(strength), problems, _sampled(lm, act(strength), problems, short, out), typical)
                row["intact"] = doses.is_intact(row, rows[0])
                rows.append(row)
                bar.update(1 if row["intact"] else len(assumed_totals) - n)
                if not row["intact"]:
                    break
    table = pd.DataFrame(rows).set_index("strength").sort_index()
    return Fit(table, len(problems), len(steered_layers(act(1.0))))


def steered_layers(act: Steering) -> list[int]:
    """Return the numbers of the layers at which an intervention acts."""
    return list(range(len(act.direction.vector))) if act.layers is None else list(act.layers)


def relative_doses(act: Steering, typical: Float[Tensor, " layers"]) -> Float[Tensor, " steered"]:
    """Return the relative dose of each steered layer, ``|strength| |v| / |h|``. Their sum is the total dose.

    Args:
        act: The intervention.
        typical: Typical norm of the activations per layer of the model, from ``doses.typical_norms``.
    """
    return act.relative_dose(typical)[steered_layers(act)]


def strength_of(act: Callable[[float], Steering], total: float, typical: Float[Tensor, " layers"]) -> float:
    """Return the strength, above 0, whose total dose is ``total``.

    Example: a direction of norm 2 in each of 4 layers, typical norm 10 and a total dose of 0.4 give the strength 0.5.

    Args:
        act: Function from a strength to the intervention.
        total: Wanted sum of the relative doses of the steered layers.
        typical: Typical norm of the activations per layer.

    Raises:
        ValueError: the direction is zero in every steered layer.
    """
    unit = relative_doses(act(1.0), typical).sum().item()
    if not unit > 0:
        raise ValueError("The direction is zero in every steered layer: choose other layers.")
    return total / unit


def handful(first: Sequence[Problem], others: Sequence[Problem] = (), n: int = assumed_handful) -> list[Problem]:
    """Return all of ``first``, filled up to ``n`` with ``others``."""
    return [*first, *others[: max(0, n - len(first))]]


def _cap(base: Sequence[Rollout], budget: int) -> int:
    longest = max(r.response_tokens for r in base)
    return min(budget, math.ceil(assumed_patience * longest))


def _sampled(lm: LM, act: Steering | None, problems: Sequence[Problem], sampling: Sampling, out: Path | None) -> list[Rollout]:
    condition = Condition(lm) if act is None else Condition(lm, (act,))
    folder = None if out is None else out / ("base" if act is None else f"{act.strength:+g}")
    return rollouts(condition, problems, sampling, out=folder, progress=False)


def _row(
    lm: LM, act: Steering, problems: Sequence[Problem], responses: Sequence[Rollout], typical: Float[Tensor, " layers"]
) -> dict[str, Any]:
    """Return a row of ``Fit.table``, with the column ``intact`` set to True."""
    dose, table = relative_doses(act, typical), evaluate.rollout_table(responses, problems, lm.tags)
    return {
        "strength": act.strength,
        "relative_dose": dose.max().item(),
        "total_dose": dose.sum().item(),
        "length": float(table["response_tokens" if lm.tags is None else "think_tokens"].mean()),
        "closed": float(table["closed"].mean()),
        "looping": float(table["looping"].mean()),
        "intact": True,
    }


def _rounded(x: float) -> float:
    """Return a number with two significant digits."""
    return float(f"{x:.2g}")
