"""Say in words how conditions differ from base, as shown in the box at the top of a page.

An effect is named only if its interval excludes zero; otherwise "no effect detectable" is said, with the interval. Random controls are
conditions that make an arbitrary change of the same kind. A sentence on them always stands beside the effects: if it names an effect too,
the effects may have nothing to do with the chosen heads or direction. A control of which only one draw was measured is marked as such.
"""

from __future__ import annotations

import math
import re
from collections import Counter
from collections.abc import Collection, Mapping, Sequence
from dataclasses import dataclass
from typing import Any

import pandas as pd

from toolkit.claims import Claim
from toolkit.metrics import with_interval

NAMED = 6  # most conditions, and most controls, that a verdict names one by one
JUDGED = ("think_tokens", "accuracy")  # metrics that a verdict reads
LEVEL = 0.05  # significance level
UNITS = {"share": "points", "tokens": "tokens"}  # unit of a metric -> unit of its differences
_RANDOM = re.compile(r"\brandom(ly)?\b", re.IGNORECASE)
_DRAW = re.compile(r"\s\d+$")  # number of a draw at the end of a control's name; a strength has a sign


@dataclass(frozen=True, kw_only=True)
class Change:
    """Difference of a condition from base (condition minus base) in one metric, with its 95 % interval.

    Attributes:
        mean: The difference. Shares, such as accuracies, are from -1 to 1.
        low: Lower end of the interval.
        high: Upper end of the interval.
        p: p-value after a correction for many comparisons; ``None`` if only the interval decides.
        note: Why the difference was not tested, such as ``"2 seeds"``; "" if it was.
    """

    mean: float
    low: float
    high: float
    p: float | None = None
    note: str = ""

    @property
    def is_clear(self) -> bool:
        """True if the interval excludes zero and, where there is a p-value, it is below .05.

        An interval of width 0 means that nothing varies. The uncertainty is then unknown, and the change is not clear.
        """
        return self.excludes_zero and not self.note and (self.p is None or self.p < LEVEL)

    @property
    def excludes_zero(self) -> bool:
        """True if the interval has a width and does not contain zero."""
        return bool(self.low < self.high and (self.low > 0 or self.high < 0))


Changes = Mapping[str, Change]
"""Metric -> change. A verdict reads those in ``JUDGED`` and ignores others."""


def is_control(name: str) -> bool:
    """Return True if a condition is a random control by its name: it has the word "random" or "randomly".

    >>> is_control("ours: random heads"), is_control("edited")
    (True, False)
    """
    return bool(_RANDOM.search(name))


def words(changes: Changes) -> str:
    """Return the changes of one condition in words.

    >>> longer, better = Change(mean=6.6, low=4.9, high=8.4), Change(mean=0.081, low=0.057, high=0.106)
    >>> words({"think_tokens": longer, "accuracy": better})
    'thinks 6.6 tokens longer [4.9, 8.4], +8.1 points [+5.7, +10.6]'
    """
    length, accuracy = changes.get("think_tokens"), changes.get("accuracy")
    parts = [_length(length)] if length else []
    parts += [_accuracy(accuracy)] if accuracy else []
    return ", ".join(parts) or "not measured"


def _length(change: Change) -> str:
    if not change.is_clear:
        return _undetected("thinking length", change, "tokens")
    low, high = sorted((abs(change.low), abs(change.high)))
    size, interval = with_interval(abs(change.mean), low, high, "tokens").split(" ", 1)
    return f"thinks {size} tokens {'longer' if change.mean > 0 else 'shorter'} {interval}"


def _accuracy(change: Change) -> str:
    if not change.is_clear:
        return _undetected("accuracy", change, "share")
    mean, interval = with_interval(change.mean, change.low, change.high, "share", sign="+").split(" ", 1)
    return f"{mean} points {interval}"


def _undetected(metric: str, change: Change, unit: str) -> str:
    if change.note or not math.isfinite(change.mean) or (change.low == change.high != 0):
        return f"{metric} not tested ({change.note or 'no variance'})"
    corrected = " after correction for many comparisons" * change.excludes_zero  # the p-value is not below .05
    interval = with_interval(change.mean, change.low, change.high, unit, sign="+").partition(" ")[2]
    return f"no effect on {metric} detectable{corrected}" + f" ({interval} {UNITS[unit]})" * bool(interval)


def sentences(effects: Mapping[str, Changes], controls: Collection[str]) -> list[str]:
    """Return one sentence per condition, then one on the random controls.

    Args:
        effects: Name of a condition, without base -> its changes. At most ``NAMED`` conditions are named, those with a clear effect first.
        controls: Names in ``effects`` that are random controls.
    """
    clear = {name: any(c.is_clear for m, c in changes.items() if m in JUDGED) for name, changes in effects.items()}
    changed = sorted((name for name in effects if name not in controls), key=lambda name: not clear[name])
    said = [f"{name}: {words(effects[name])}." for name in changed[:NAMED]]
    if len(changed) > NAMED:
        said.append(f"{len(changed) - NAMED} more conditions are in the table.")
    return [*said, controls_sentence({name: effects[name] for name in effects if name in controls})]


def controls_sentence(effects: Mapping[str, Changes]) -> str:
    """Return the sentence on the random controls: those with a clear effect by name, the others together.

    Controls whose names differ only in a number at the end are draws of one control, and are told together.

    Args:
        effects: Name of a control -> its changes.
    """
    if not effects:
        return "No random control was measured: an arbitrary change might do the same."
    judged = {name: [c for m, c in changes.items() if m in JUDGED] for name, changes in effects.items()}
    clear = [name for name, changes in judged.items() if any(c.is_clear for c in changes)]
    tested = [
        name for name, changes in judged.items() if name not in clear and changes and not any(_is_untested(c) for c in changes)
    ]
    draws: dict[str, list[str]] = {}
    for name in effects:
        draws.setdefault(_DRAW.sub("", name), []).append(name)
    clear_ones = {stem: names for stem, names in draws.items() if set(names) & set(clear)}
    parts = [_of_draws(stem, [effects[name] for name in names], names) for stem, names in [*clear_ones.items()][:NAMED]]
    parts += [f"{len(clear_ones) - NAMED} more controls have an effect"] * (len(clear_ones) > NAMED)
    silent = [_called(stem, names) for stem, names in draws.items() if set(names) <= set(tested)]
    parts += [f"{_together(silent, bool(clear))}: no effect detectable"] if silent else []
    untested = [_called(stem, names) for stem, names in draws.items() if stem not in clear_ones and not set(names) <= set(tested)]
    parts += [f"{_together(untested, False)}: not tested"] if untested else []
    text = f"Random controls: {'; '.join(parts)}."
    by_p = any(c.p is not None for changes in judged.values() for c in changes)
    count = sum(len(changes) for changes in judged.values())
    if clear and count * LEVEL >= 0.5 and not by_p:
        text += f" Of their {count} intervals, about {round(count * LEVEL)} would exclude zero by chance."
    return text


def _called(stem: str, names: Sequence[str]) -> str:
    return f"{stem} ({len(names)} draws)" if len(names) > 1 else names[0]


def _of_draws(stem: str, effects: Sequence[Changes], names: Sequence[str]) -> str:
    """Return what the draws of one control do: the effect of a single draw, or the range of all and how many are clear."""
    if len(names) == 1:
        return f"{names[0]}: {words({m: c for m, c in effects[0].items() if c.is_clear})}"
    parts = []
    for metric, unit in zip(JUDGED, ("tokens", "share"), strict=True):
        changes = [e[metric] for e in effects if metric in e]
        if count := sum(c.is_clear for c in changes):
            means = [c.mean for c in changes]
            low, high = (with_interval(mean, mean, mean, unit, sign="+") for mean in (min(means), max(means)))
            parts.append(f"{low} to {high} {UNITS[unit]}, clear in {count}")
    return f"{_called(stem, names)}: {'; '.join(parts)}"


def _is_untested(change: Change) -> bool:
    return bool(change.note) or not math.isfinite(change.mean) or change.low == change.high != 0


def _together(names: Sequence[str], others: bool) -> str:
    """Return names as a list, or their number if they are many. ``others`` is True if other controls were named before."""
    if len(names) <= NAMED:
        return ", ".join(names)
    return f"the other {len(names)}" if others else f"all {len(names)}"


def of_summary(summary: pd.DataFrame, *, base: str = "base") -> list[str]:
    """Return the verdict of a comparison, one sentence per entry. Random controls are found by their names (see ``is_control``).

    Controls whose names differ only in a number at the end are draws of one control. A control with one draw is marked: the intervals hold for
    this draw, and other draws may differ.

    Args:
        summary: Table from ``evaluate.summary``.
        base: Name of the base condition.
    """
    effects: dict[str, dict[str, Change]] = {}
    for row in summary[summary["condition"] != base].itertuples():
        change = Change(mean=row.difference, low=row.difference_low, high=row.difference_high)
        effects.setdefault(str(row.condition), {})[str(row.metric)] = change
    if not effects:
        return ["Only base was measured."]
    controls = [name for name in effects if is_control(name)]
    draws = Counter(_DRAW.sub("", name) for name in controls)
    marked = {name: f"{name} (one draw)" for name in controls if draws[_DRAW.sub("", name)] == 1}
    *others, control = sentences({marked.get(name, name): c for name, c in effects.items()}, {marked.get(n, n) for n in controls})
    return [*others, control + " Other draws of a control with one draw may have other effects." * bool(marked)]


def of_board(board: Mapping[str, Any]) -> list[str]:
    """Return the verdict of a board, one sentence per entry. Effects are named if p < .05 after Holm's correction.

    The sentences name the condition with the highest accuracy without training, the one with the highest accuracy after training, and the
    one with the shortest thinking that has no detectable loss of accuracy: here the interval must contain zero, before any correction. The
    last sentence is on the random controls.

    Args:
        board: Content of ``board.json``.
    """
    families = {name: about["family"] for name, about in board["conditions"].items() if name != board.get("base", "base")}
    effects = {name: _of_board(board["paired"].get(name, {})) for name in families}
    effects = {name: changes for name, changes in effects.items() if {"accuracy", "think_tokens"} <= set(changes)}
    if not effects:
        return []
    groups = (("Without training", ("edit", "steer", "mask", "decode", "prompt")), ("After training", ("trained", "combined")))
    said = []
    for when, members in groups:
        group = {name: changes for name, changes in effects.items() if families[name] in members}
        gains = [name for name, changes in group.items() if changes["accuracy"].is_clear and changes["accuracy"].mean > 0]
        if gains:
            best = max(gains, key=lambda name: group[name]["accuracy"].mean)
            said.append(f"{when}, the most accurate of {len(group)} is {best}: {words(group[best])}.")
        elif group:
            said.append(f"{when}, none of {len(group)} gains accuracy detectably.")
    shorter = [name for name, c in effects.items() if families[name] != "control" and _is_shorter_at_no_loss(c)]
    if shorter:
        best = min(shorter, key=lambda name: effects[name]["think_tokens"].mean)
        said.append(f"The shortest without a detectable loss of accuracy is {best}: {words(effects[best])}.")
    else:
        said.append("None thinks detectably less without a detectable loss of accuracy.")
    controls = {name.removeprefix("control: "): c for name, c in effects.items() if families[name] == "control"}
    return [
        *said,
        controls_sentence(controls),
        "The named conditions are the best of many, so their effects are somewhat overestimated.",
    ]


def of_training(before: Mapping[str, float], after: Mapping[str, float], *, steps: int) -> list[str]:
    """Return the verdict of one training run, one sentence per entry. It claims no effect, since one run has no interval.

    Args:
        before: Metric -> value before training. Metrics: ``accuracy`` (0 to 1) and ``think_tokens``.
        after: The same after training.
        steps: Number of optimizer steps.
    """
    accuracy = f"{100 * before['accuracy']:.1f} to {100 * after['accuracy']:.1f} %"
    tokens = f"{before['think_tokens']:.1f} to {after['think_tokens']:.1f}"
    return [
        f"In {steps} steps, accuracy went from {accuracy}, and think tokens from {tokens}.",
        "No effect is claimed: this is one run, without an interval and without a control. The comparison below gives intervals.",
    ]


def of_claims(claims: Sequence[Claim]) -> list[str]:
    """Return the verdict on published effects, one sentence per entry: how many have each verdict, then the claims about controls.

    Args:
        claims: Claims with their measurements. Those with the source ``control`` compare an effect with a random control.
    """
    published = [claim for claim in claims if claim.source != "control"]
    by_verdict: dict[str, list[str]] = {}
    for claim in published:
        by_verdict.setdefault(claim.verdict, []).append(claim.text)
    order = sorted(by_verdict, key=lambda verdict: (verdict != "reproduced", verdict))
    counts = ", ".join(f"{len(by_verdict[verdict])} {verdict}" for verdict in order)
    said = [f"Of {len(published)} published effects: {counts}."] if published else []
    controls = [claim for claim in claims if claim.source == "control"]
    beyond = sum(claim.verdict == "reproduced" for claim in controls)
    if controls:
        said.append(f"Against random controls: {beyond} of {len(controls)} effects are larger than with the control.")
    else:
        said.append("No comparison with a random control is among them.")
    return said


def _is_shorter_at_no_loss(changes: Changes) -> bool:
    length, accuracy = changes["think_tokens"], changes["accuracy"]
    # A loss need not survive the correction for many comparisons: the correction hides losses.
    loses = accuracy.excludes_zero and accuracy.mean < 0
    return length.is_clear and length.mean < 0 and not _is_untested(accuracy) and not loses


def _of_board(paired: Mapping[str, Mapping[str, Any]]) -> dict[str, Change]:
    """Return the changes of one condition from its entry in the board's ``paired``."""
    changes = {}
    for metric, d in paired.items():
        if all(isinstance(d.get(k), int | float) for k in ("mean", "low", "high")):
            note = "" if d.get("p_holm") is not None else d.get("note") or "no test"
            changes[metric] = Change(**{k: float(d[k]) for k in ("mean", "low", "high")}, p=d.get("p_holm"), note=note)
    return changes
