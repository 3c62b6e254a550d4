"""Say in words the results of measurements without a base condition: the verdicts of the pages on entropy, heads, retrieval and context.

As in ``verdicts``, an effect is named only if its interval excludes zero, and the control stands beside it.
"""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

import numpy as np
import pandas as pd

from toolkit import verdicts
from toolkit.metrics import with_interval
from toolkit.stats import FEW_SEEDS
from toolkit.verdicts import LEVEL, UNITS, Change

MEASURES = {"think_tokens": "think_tokens", "accuracy": "correct"}  # metric of a verdict -> measure of ``jobs.why.undo``
METRIC_NAMES = {"think_tokens": "length", "accuracy": "accuracy"}
PHASE_NAMES = {"think": "thinking", "answer": "the answer"}
WAYS = {"put back": "put back to base undo", "alone": "changed alone make"}  # way of ``jobs.why.undo`` -> words
# Unit of a number -> its name in sentences; others are in ``verdicts.UNITS``.
UNNAMED = {"nats": "nats per token", "score": "", "preference": "nats", "steps": ""}


def change_of(row: pd.Series | Mapping[str, Any], mean: str, low: str, high: str) -> Change:
    """Return three columns of a row of a table as a ``Change``: the estimate and the ends of its 95 % interval."""
    return Change(mean=float(row[mean]), low=float(row[low]), high=float(row[high]))


def sentence(what: str, change: Change, unit: str, up: str, down: str, *, kind: str = "effect", signed: bool = False) -> str:
    """Return one sentence on an estimate: which way it goes and by how much, or that nothing was detected.

    >>> sentence("Recall", Change(mean=0.4, low=0.2, high=0.6), "share", "rises by", "falls by")
    'Recall rises by 40.0 points [20.0, 60.0].'
    >>> sentence("Recall", Change(mean=0.1, low=-0.1, high=0.3), "share", "rises by", "falls by")
    'Recall: no effect detectable ([-10.0, +30.0] points).'

    Args:
        what: Beginning of the sentence.
        change: The estimate.
        unit: Unit of the estimate: ``share``, ``tokens``, ``nats`` or ``score``.
        up: Words between ``what`` and the size if the estimate is above 0.
        down: The same if it is below 0.
        kind: Word for the estimate if nothing was detected: ``effect``, ``difference``, ``change`` or ``correlation``.
        signed: True to write the sign of the estimate, False to write its size.
    """
    name = UNNAMED.get(unit, UNITS.get(unit, ""))
    if not np.isfinite(change.mean):
        return f"{what.rstrip(',')}: {kind} undefined, since nothing varies."
    if not change.is_clear:
        interval = with_interval(change.mean, change.low, change.high, unit, sign="+").partition(" ")[2]
        bracket = f" ({f'{interval} {name}'.strip()})" * bool(interval)
        return f"{what.rstrip(',')}: no {kind} detectable{bracket}."
    ends = (change.mean, change.low, change.high)
    mean, low, high = ends if signed else (abs(change.mean), *sorted((abs(change.low), abs(change.high))))
    size, interval = with_interval(mean, low, high, unit, sign="+" if signed else "").split(" ", 1)
    return f"{what} {up if change.mean > 0 else down} {f'{size} {name}'.strip()} {interval}."


def of_entropy(phases: pd.DataFrame, lengths: pd.DataFrame, correctness: pd.DataFrame, effects: pd.DataFrame | None) -> list[str]:
    """Return the verdict of ``jobs.entropy_report``, one sentence per entry; its arguments are attributes of ``jobs.EntropyTables``.

    The sentences are on phases, on length (within problem), on the think tokens of highest entropy against random ones, and on failed steps
    against shuffled ones.
    """
    said = []
    apart = phases[(phases["responses"] == "all") & (phases["phase"] == "think - answer")]
    if len(apart):
        change = change_of(apart.iloc[0], "mean", "low", "high")
        words = ("is above that in the answer by", "is below that in the answer by")
        said.append(sentence("Entropy in thinking", change, "nats", *words, kind="difference"))
    within = lengths[(lengths["kind"] == "spearman") & (lengths["scope"] == "within") & (lengths["x"] == "entropy")].iloc[0]
    words = ("rises with length: rank correlation", "falls with length: rank correlation")
    change = change_of(within, "r", "low", "high")
    said.append(sentence("Among responses to one problem, entropy", change, "score", *words, kind="correlation", signed=True))
    if effects is not None:
        mildest = effects[(effects["keep"] == effects["keep"].max()) & (effects["against"] == "random")].iloc[0]
        dropped = (
            f"Dropping the {100 * (1 - mildest['keep']):.0f} % of think tokens with the highest entropy instead of random ones"
        )
        said.append(sentence(dropped, change_of(mildest, "difference", "low", "high"), "share", "gains", "costs"))
    ranked = correctness[(correctness["kind"] == "spearman") & (correctness["scope"] == "within")].set_index("measure")
    words = ("goes with right answers: rank correlation", "goes with wrong answers: rank correlation")
    for measure, name in {
        "fsf": "A larger share of failed steps",
        "fsf (shuffled)": "The same share, shuffled as a control,",
    }.items():
        change = change_of(ranked.loc[measure], "r", "low", "high")
        said.append(sentence(name, change, "score", *words, kind="correlation", signed=True))
    return said


def of_atlas(overlaps: pd.DataFrame, conditions: pd.DataFrame, count: int) -> list[str]:
    """Return the verdict of ``jobs.atlas``, one sentence per entry: agreement of scores, then effects on length, accuracy and retrieval.

    Args:
        overlaps: Table from ``jobs.agreement``.
        conditions: Table from ``jobs.condition_effects``; its first condition is base.
        count: Number of top heads that were compared per score.
    """
    same = overlaps.loc[overlaps["p_holm"] < LEVEL, "pair"].tolist()
    compared = f"Of {len(overlaps)} pairs of scores, "
    if same:
        agree = f"{len(same)} share more of their top {count} heads than chance: {'; '.join(same[: verdicts.NAMED])}."
    else:
        agree = f"none shares more of its top {count} heads than chance (p < .05 after Holm's correction)."
    base = conditions["condition"].iloc[0]
    said = [compared + agree, *verdicts.of_summary(conditions, base=base)]
    for metric, what, unit in (("retrieved", "retrieval", "share"), ("think_entropy", "think entropy", "nats")):
        rows = conditions[(conditions["metric"] == metric) & (conditions["condition"] != base)]
        for row in rows.to_dict("records"):
            change = change_of(row, "difference", "difference_low", "difference_high")
            if change.is_clear:
                said.append(sentence(f"{row['condition']}: {what}", change, unit, "rises by", "falls by"))
    return said


def of_masking(masking: pd.DataFrame, thinking: pd.DataFrame | None = None) -> list[str]:
    """Return the verdict of ``jobs.retrieval_report``, one sentence per entry; random heads of the same layers are in every sentence.

    Args:
        masking: Table from ``jobs.masking_effects``. The largest number of heads is told, masked as published.
        thinking: Table from ``jobs.thinking_or_not``; ``None`` if it was not measured.
    """
    published = masking[(masking["op"] == "uniform") & (masking["during"] == "decode only")]
    said = []
    for row in published[published["heads"] == published["heads"].max()].to_dict("records"):
        heads = (
            f"the {row['heads']} best heads of the ranking {row['ranking']}"
            if row["heads"] > 1
            else f"the best head of the ranking {row['ranking']}"
        )
        if np.isnan(row["random"]):
            said.append(f"Masking {heads} leaves too few other heads for a random control.")
            continue
        change = change_of(row, "more_than_random", "more_than_random_low", "more_than_random_high")
        more, less = (f"costs {which} accuracy than masking random heads of the same layers, by" for which in ("more", "less"))
        text = sentence(f"Masking {heads}", change, "share", more, less)
        left = f"{100 * row['accuracy']:.1f} % against {100 * row['random']:.1f} %"
        said.append(f"{text.removesuffix('.')}: accuracy {left}{_few_controls(row['draws'])}.")
    for row in [] if thinking is None else thinking[thinking["mode"] == "thinking - directly"].to_dict("records"):
        which = {"top": "the top heads", "random": "random heads"}[row["masked"]]
        change = change_of(row, "lost", "lost_low", "lost_high")
        more, less = (f"costs {how} when thinking than when answering directly, by" for how in ("more", "less"))
        text = sentence(f"On {row['task']}, masking {which}", change, "share", more, less, kind="difference")
        # Tables of earlier versions lack the number of controls.
        few = _few_controls(row.get("draws", FEW_SEEDS)) if row["masked"] == "random" else ""
        said.append(f"{text.removesuffix('.')}{few}.")
    return said


def _few_controls(draws: int) -> str:
    """Return a remark for fewer than three random controls; "" otherwise."""
    return f"; {draws} random control{'s' * (draws > 1)}, too few for a reliable interval" * (draws < FEW_SEEDS)


def of_lengths(table: pd.DataFrame, *, base: str, changed: str) -> list[str]:
    """Return the verdict on two models at several prompt lengths, one sentence per entry: recall and right responses at each end.

    Args:
        table: Table from ``jobs.length_table``.
        base: Name of the condition that the other is compared with.
        changed: Name of the other condition.
    """
    rows = table[table["condition"] == changed].sort_values("length")
    ends = dict.fromkeys([rows.index[0], rows.index[-1]])
    said = []
    for row in (rows.loc[at] for at in ends):
        where = f"At length {row['length']:,}"
        recall = change_of(row, "recall_change", "recall_change_low", "recall_change_high")
        left = f"{100 * (row['recall'] - row['recall_change']):.0f} % to {100 * row['recall']:.0f} %"
        text = sentence(f"{where}, recall", recall, "share", "rises by", "falls by", kind="change")
        said.append(f"{text.removesuffix('.')}: {left}.")
        nll = change_of(row, "nll_change", "nll_change_low", "nll_change_high")
        words = ("becomes less likely, by", "becomes more likely, by")
        said.append(sentence(f"{where}, a right response", nll, "nats", *words, kind="change"))
    return [
        *said,
        f"The comparison is with the model {base}, on the same problems. No random change of the frequencies was measured.",
    ]


def of_reasons(tables: Mapping[str, pd.DataFrame]) -> list[str]:
    """Return the verdict on why a changed model thinks longer or shorter, one sentence per entry.

    Args:
        tables: ``jobs.Why.tables``.
    """
    undo = tables["undo"].set_index(["heads", "way", "measure"])
    whole = {
        name: change_of(undo.loc["whole change", "", m], "change", "change_low", "change_high") for name, m in MEASURES.items()
    }
    said = [f"The changed model, compared with base: {verdicts.words(whole)}."]
    first = tables["heads"].iloc[0]
    name = f"Of single heads, the change of {first['layer']:.0f}.{first['head']:.0f} moves the preference for long thinking most"
    change = change_of(first, "effect", "effect_low", "effect_high")
    said.append(sentence(name, change, "preference", "towards longer thinking, by", "towards shorter thinking, by"))
    said.append(f"It is the largest of {len(tables['heads'])} heads on the same responses, so its size tends to be overstated.")
    said += [_shares(undo, metric, measure) for metric, measure in MEASURES.items() if whole[metric].is_clear]
    layers = tables["outputs"].query("head < 0")
    along = layers[layers["cosine"].abs() > layers["random"]]
    listed = ", ".join(f"{row.layer:.0f} ({row.cosine:+.2f})" for row in along.itertuples())
    bound = f"the largest over all {len(layers)} layers for 95 % of random directions"
    said.append(
        f"The residual stream moves along the length direction in layers {listed}: these cosines exceed {bound}. Random directions point "
        "everywhere alike, activations do not, so this is a weak sign."
        if listed
        else f"In no layer does the residual stream move along the length direction more than {bound}."
    )
    for row in tables["steps"].to_dict("records"):
        change = change_of(row, "difference", "difference_low", "difference_high")
        if change.is_clear:
            said.append(sentence(f"Steps of the kind '{row['kind']}' per response", change, "steps", "rise by", "fall by"))
    for row in tables["entropies"].to_dict("records"):
        change = change_of(row, "difference", "difference_low", "difference_high")
        if change.is_clear:
            said.append(sentence(f"Entropy in {PHASE_NAMES[row['phase']]}", change, "nats", "rises by", "falls by"))
    return said


def _shares(undo: pd.DataFrame, metric: str, measure: str) -> str:
    """Return the sentence on the share of the change in one metric that lies in the chosen heads, beside random heads."""
    parts = []
    for way, verb in WAYS.items():
        top = undo.loc["top", way, measure]
        random = [
            f"{100 * undo.loc[at]['share']:.0f}" for at in undo.index if at[0].startswith("random") and at[1:] == (way, measure)
        ]
        share = with_interval(top["share"], top["share_low"], top["share_high"], "share", digits=0)
        parts.append(f"{verb} {share} %" + f" (random heads: {', '.join(random)} %)" * bool(random))
    which = undo.loc["top", "alone", measure]["which"]
    return f"Of the change in {METRIC_NAMES[metric]}, heads {which} {', and '.join(parts)}."
