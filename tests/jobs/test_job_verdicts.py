"""The verdicts of the pages on entropy, heads, retrieval and context: an effect is named where its interval shows one."""

from __future__ import annotations

import json
from pathlib import Path

import pandas as pd
import pytest

from toolkit.jobs import verdicts
from toolkit.verdicts import Change

DATA = Path(__file__).parents[2] / "data"


def tables(name: str) -> dict[str, pd.DataFrame]:
    content = json.loads((DATA / name).read_text())
    return {key: pd.DataFrame(rows) for key, rows in content.items() if isinstance(rows, list)}


@pytest.mark.parametrize(
    ("low", "high", "expected"),
    [
        (0.2, 0.6, "Recall rises by 40.0 points [20.0, 60.0]."),
        (-0.6, -0.2, "Recall falls by 40.0 points [20.0, 60.0]."),
        (-0.1, 0.3, "Recall: no effect detectable ([-10.0, +30.0] points)."),
        (0.0, 0.0, "Recall: no effect detectable."),
        (float("nan"), float("nan"), "Recall: effect undefined, since nothing varies."),
    ],
)
def test_an_effect_is_named_only_if_its_interval_excludes_zero(low, high, expected):
    change = Change(mean=(low + high) / 2, low=low, high=high)
    assert verdicts.sentence("Recall", change, "share", "rises by", "falls by") == expected


def test_a_signed_estimate_keeps_its_sign():
    change = Change(mean=-0.3, low=-0.4, high=-0.2)
    text = verdicts.sentence("It", change, "score", "rises:", "falls:", signed=True)
    assert text == "It falls: -0.30 [-0.40, -0.20]."


def test_the_published_entropies_are_told_as_their_tables_say():
    t = tables("entropy/tiny-reasoner.json")
    said = verdicts.of_entropy(t["phases"], t["lengths"], t["correctness"], t["effects"])
    apart = t["phases"].query("responses == 'all' and phase == 'think - answer'").iloc[0]
    assert f"{apart['mean']:.3f} nats per token" in said[0] and ("above" in said[0]) == (apart["mean"] > 0)
    within = t["lengths"].query("kind == 'spearman' and scope == 'within' and x == 'entropy'").iloc[0]
    assert f"rank correlation {within['r']:+.2f} [" in said[1] or "no correlation detectable" in said[1]
    assert "instead of random ones" in said[2]
    assert said[-1].startswith("The same share, shuffled as a control: ") and "no correlation detectable" in said[-1]
    assert len(verdicts.of_entropy(t["phases"], t["lengths"], t["correctness"], None)) == len(said) - 1


def test_the_published_atlas_is_told_with_its_controls():
    t = tables("heads/tiny-reasoner.json")
    said = verdicts.of_atlas(t["overlaps"], t["conditions"], 3)
    assert said[0].startswith(f"Of {len(t['overlaps'])} pairs of scores, none shares more of its top 3 heads than chance")
    assert any(text.startswith("Random controls: ") for text in said)
    entropy = t["conditions"].query("metric == 'think_entropy' and condition == 'ThinkEdit (ours)'").iloc[0]
    assert f"ThinkEdit (ours): think entropy falls by {-entropy['difference']:.3f} nats per token" in " ".join(said)
    agreed = t["overlaps"].assign(p_holm=[0.01, *[1.0] * (len(t["overlaps"]) - 1)])
    assert (
        f"1 share more of their top 3 heads than chance: {agreed['pair'][0]}." in verdicts.of_atlas(agreed, t["conditions"], 3)[0]
    )


def test_the_published_retrieval_heads_are_told_beside_random_heads():
    t = tables("retrieval-heads/tiny-reasoner.json")
    t["masking"]["draws"] = 3
    said = verdicts.of_masking(t["masking"], t["thinking"])
    row = (
        t["masking"].query("ranking == 'write (ours)' and op == 'uniform' and during == 'decode only'").nlargest(1, "heads").iloc[0]
    )
    (text,) = [
        s
        for s in said
        if f"the {row['heads']} best heads of the ranking write (ours) costs more accuracy than masking random heads" in s
    ]
    assert f"of the same layers, by {100 * row['more_than_random']:.1f} points" in text
    assert f"accuracy {100 * row['accuracy']:.1f} % against {100 * row['random']:.1f} %" in text
    assert sum("masking the top heads" in s for s in said) == sum(", masking random heads" in s for s in said) == 2
    without = t["masking"].assign(draws=0, random=float("nan"))
    assert all("too few other heads" in s for s in verdicts.of_masking(without))
    few = t["masking"].assign(draws=1)
    assert all("1 random control, too few for a reliable interval" in s for s in verdicts.of_masking(few))


def test_both_ends_of_the_lengths_are_told():
    columns = ["condition", "length", "recall", "recall_change", "recall_change_low", "recall_change_high"]
    rows = [("changed", 640, 0.9, -0.05, -0.1, 0.02), ("changed", 1280, 0.7, 0.3, 0.1, 0.5), ("changed", 2560, 0.5, 0.5, 0.4, 0.6)]
    table = pd.DataFrame([*rows, ("as trained", 640, 0.95, 0.0, 0.0, 0.0)], columns=columns)
    for end, of in {"": "", "_low": "_high", "_high": "_low"}.items():
        table[f"nll_change{end}"] = -table[f"recall_change{of}"]
    said = verdicts.of_lengths(table, base="as trained", changed="changed")
    assert said[0] == "At length 640, recall: no change detectable ([-10.0, +2.0] points): 95 % to 90 %."
    assert said[2] == "At length 2,560, recall rises by 50.0 points [40.0, 60.0]: 0 % to 50 %."
    assert said[3].startswith("At length 2,560, a right response becomes more likely, by 0.500 nats per token")
    assert not any("1,280" in s for s in said) and "as trained" in said[-1]


def reasons_of(condition: str) -> dict[str, pd.DataFrame]:
    content = json.loads((DATA / "why" / "results.json").read_text())["reasons"][condition]["tables"]
    return {name: pd.DataFrame(rows) for name, rows in content.items()}


def test_the_reasons_give_shares_beside_random_heads():
    edited, trained = (" ".join(verdicts.of_reasons(reasons_of(name))) for name in ("ThinkEdit (ours)", "naive length penalty"))
    assert "heads 2.4, 3.2 put back to base undo 100 % (random heads: 0, 0, 0 %), and changed alone make 100 %" in edited
    assert "Of single heads, the change of 2.4 moves" in edited and "rise by" in edited
    assert "Of the change in length, heads 2.6, 1.7 put back to base undo 1 [-0, 2] % (random heads:" in trained


def test_the_reasons_give_no_shares_of_a_change_that_is_not_clear():
    tables = reasons_of("ThinkEdit (ours)")
    whole = tables["undo"]["heads"] == "whole change"
    tables["undo"].loc[whole, "change_low"] = -1.0
    assert tables["undo"].loc[whole, "change_high"].gt(0).all()
    said = verdicts.of_reasons(tables)
    assert "no effect on thinking length detectable" in said[0] and not any("put back" in text for text in said)


def test_the_reasons_name_layers_only_beyond_random_directions():
    tables = reasons_of("ThinkEdit (ours)")
    assert "length direction in layers 2 (+0." in " ".join(verdicts.of_reasons(tables))
    tables["outputs"]["random"] = 1.0
    assert "In no layer does the residual stream move" in " ".join(verdicts.of_reasons(tables))
