"""Figures say what their colours and symbols mean, their texts do not collide, and their axes fit what they show."""

from __future__ import annotations

import numpy as np
import pandas as pd
import pytest
import torch

from toolkit import figures
from toolkit.figures import labels
from toolkit.figures.base import ticks
from toolkit.types import HeadScores, Provenance

MADE = Provenance("example", None, "0", "0", "0.1.0")
SIZE = labels.SIZES[-1]
UNIT = (0.0, 1.0)


def summary(**effects: tuple[float, float]) -> pd.DataFrame:
    """A summary of base and of conditions: name -> (difference, half width of its interval) of every metric."""
    rows = []
    for name, (effect, half) in {"base": (0.0, 0.0), **effects}.items():
        for metric, value in (("accuracy", 0.7), ("think_tokens", 30.0)):
            mean = value * (1 + effect)
            rows.append((name.replace("_", " "), metric, mean, mean - 0.05, mean + 0.05, effect, effect - half, effect + half))
    columns = ["condition", "metric", "mean", "low", "high", "difference", "difference_low", "difference_high"]
    return pd.DataFrame(rows, columns=columns)


def note_of(figure) -> str:
    return figure.layout.title.subtitle.text or ""


def names_in(figure) -> set[str]:
    return {a.name for a in figure.layout.annotations}


# --- what colours and symbols mean ------------------------------------------------------------------------------


def test_accuracy_against_length_explains_each_colour_that_it_shows_and_no_other():
    shown = note_of(figures.length_accuracy(summary(better=(0.1, 0.05), random_heads=(0.0, 0.1))))
    assert "blue: clearly more accurate" in shown and "crosses: random controls" in shown
    assert "brown" not in shown and "grey" not in shown
    shown = note_of(figures.length_accuracy(summary(worse=(-0.1, 0.05), same=(0.0, 0.1))))
    assert "brown: clearly less accurate" in shown and "dark grey: no clear difference" in shown
    assert "blue" not in shown and "crosses" not in shown


def test_differences_explain_filled_and_open_marks_colours_and_crosses():
    table = summary(better=(0.1, 0.05), same=(0.0, 0.1), random_heads=(0.0, 0.1))
    assert note_of(figures.differences(table, "accuracy")) == (
        "filled: interval excludes 0; open: it does not; blue: better than base; crosses: random controls"
    )
    assert "blue" not in note_of(figures.differences(table, "think_tokens")), "neither length is better"


def test_at_most_three_random_controls_are_named_and_their_crosses_lie_above_the_star_of_base():
    three = summary(edited=(0.1, 0.05), **{f"random_heads_{i}": (0.0, 0.1) for i in range(3)})
    figure = figures.length_accuracy(three)
    assert names_in(figure) == {"base", "edited", *(f"random heads {i}" for i in range(3))}
    order = [trace.name for trace in figure.data]
    assert order.index("base") < min(order.index(f"random heads {i}") for i in range(3))
    four = summary(edited=(0.1, 0.05), **{f"random_heads_{i}": (0.0, 0.1) for i in range(4)})
    assert names_in(figures.length_accuracy(four)) == {"base", "edited"}


def test_the_colour_bar_of_short_thinking_says_where_a_positive_score_points():
    scores = HeadScores(torch.tensor([[-9.0, 9.0]]), "short_thinking_contrast", "units of something", MADE)
    bar = figures.head_scores(scores).data[0].colorbar.title.text
    assert "towards short thinking" in bar and "units of something" in bar
    write = HeadScores(torch.tensor([[-9.0, 9.0]]), "retrieval_write", "logits", MADE)
    assert figures.head_scores(write).data[0].colorbar.title.text == "logits"


def test_a_score_without_negative_values_is_drawn_on_a_scale_from_0():
    heat = figures.head_scores(HeadScores(torch.tensor([[0.0, 0.2]]), "retrieval_copy", "share", MADE)).data[0]
    assert heat.zmin == 0 and heat.zmax == pytest.approx(0.2)
    heat = figures.head_scores(HeadScores(torch.tensor([[-0.1, 0.2]]), "retrieval_write", "logits", MADE)).data[0]
    assert heat.zmin == -heat.zmax


def masking(names=("copy", "write")) -> pd.DataFrame:
    rows = [
        {
            "ranking": name,
            "heads": k,
            "op": "uniform",
            "during": "decode only",
            "accuracy": 0.5,
            "low": 0.4,
            "high": 0.6,
            "lost": 0.4,
        }
        | {"random": 0.8, "random_low": 0.7, "random_high": 0.9}
        for name in names
        for k in (1, 2)
    ]
    return pd.DataFrame(rows)


def test_the_dotted_line_of_masking_curves_is_named_in_the_legend():
    named = [t for t in figures.masking_curve(masking()).data if t.name == "unmasked"]
    assert [list(t.y) for t in named] == [pytest.approx([0.9, 0.9])] * 2
    assert [t.showlegend for t in named] == [True, False]


def test_published_models_share_one_entry_of_the_legend():
    table = pd.DataFrame({"model": ["mine", *"abcdefg"], "above 0.1": 0.05, "above 0.5": 0.01, "zero": 0.6})
    bars = figures.sparsity(table).data
    assert [b.name for b in bars if b.showlegend] == ["mine", "7 published models"]
    assert [b.hovertemplate.split(":")[0] for b in bars] == ["mine", *"abcdefg"]


def test_the_colour_bar_of_advantages_says_that_it_is_clipped_if_it_is():
    table = pd.DataFrame({"right, shorter": [2.5], "right, longer": [0.1], "no push": [0.0]}, index=["arora_zanette"])
    heat = figures.reward_pushes(table).data[0]
    assert "clipped" in heat.colorbar.title.text and list(heat.y) == ["arora_zanette (0%)"]
    assert "clipped" not in figures.reward_pushes(table / 10).data[0].colorbar.title.text


def test_axes_name_measures_in_words_and_entropies_with_their_unit():
    rows = pd.DataFrame({"problem_id": ["a", "a"], "entropy": [0.1, 0.2], "response_tokens": [3, 4]})
    correlations = pd.DataFrame({"scope": ["pooled", "within"], "kind": "spearman", "r": 0.1, "low": 0.0, "high": 0.2})
    layout = figures.correlation(rows, correlations).layout
    assert layout.xaxis.title.text == "entropy (nats per token)" and layout.yaxis.title.text == "response tokens"


# --- texts do not collide ---------------------------------------------------------------------------------------


def test_a_label_is_not_struck_through_by_an_error_bar_where_there_is_room():
    at = (0.5, 0.5)
    lines = [((0.0, 0.5), (1.0, 0.5)), ((0.5, 0.0), (0.5, 1.0))]
    (free,) = labels.placed([at], ["a name"], UNIT, UNIT)
    assert free["xshift"] == 0, "without error bars the label stands above its point"
    (label,) = labels.placed([at], ["a name"], UNIT, UNIT, lines=lines)
    wide, high = 0.6 * labels.FONT * 6 + 4, 1.3 * labels.FONT + 2
    assert abs(label["ax"]) >= wide / 2 and abs(label["ay"]) >= high / 2, "it stands in one of the four corners"
    assert label["showarrow"], "and a line says to which point it belongs"


def test_a_line_that_joins_a_label_to_its_point_avoids_other_labels():
    """Points at which the nearest free places would have such a line."""
    points = [(0.57, 0.55), (0.48, 0.45), (0.5, 0.48), (0.56, 0.46), (0.5, 0.52)]
    placed = labels.placed(points, [f"condition {i}" for i in range(5)], UNIT, UNIT)
    wide, high = 0.6 * labels.FONT * 11 + 4, 1.3 * labels.FONT + 2
    shifts = [np.array((a["ax"], a["ay"]) if a["showarrow"] else (a["xshift"], -a["yshift"])) for a in placed]
    starts = [np.array((x * SIZE[0], (1 - y) * SIZE[1])) for x, y in points]
    centres = [start + shift for start, shift in zip(starts, shifts, strict=True)]
    joined = [i for i, a in enumerate(placed) if a["showarrow"]]
    assert joined
    for i in joined:
        on_line = starts[i] + np.linspace(0, 1, 200)[:, None] * shifts[i]
        for centre in (c for k, c in enumerate(centres) if k != i):
            assert not (np.abs(on_line - centre) < (wide / 2, high / 2)).all(axis=1).any()


def test_arms_whose_points_touch_share_one_label():
    def e(mean):
        return {"mean": mean, "low": mean - 0.01, "high": mean + 0.01}

    arms = {f"arm {i}": {"accuracy": e(0.8), "calls": e(2.0), "tokens": e(20.0 + 5 * (i == 2))} for i in range(3)}
    arms["apart"] = {"accuracy": e(0.4), "calls": e(1.0), "tokens": e(10.0)}
    figure = figures.price_of_accuracy(arms, base="arm 0")
    named = {axis: {a.name for a in figure.layout.annotations if a.xref == axis} for axis in ("x", "x2")}
    assert named == {"x": {"arm 0, arm 1, arm 2", "apart"}, "x2": {"arm 0, arm 1", "arm 2", "apart"}}


def test_titles_below_three_panels_are_short_and_the_note_says_what_the_sign_means():
    rows = [
        ("length", a, metric, 0.5, 0.4, 0.6) for a in (-1.0, 0.0, 1.0) for metric in ("closed", "looping", "perplexity", "accuracy")
    ]
    table = pd.DataFrame(rows, columns=["direction", "strength", "metric", "mean", "low", "high"])
    figure = figures.damage(table)
    assert {figure.layout[axis].title.text for axis in ("xaxis", "xaxis2", "xaxis3")} == {"strength"}
    assert "- towards shorter" in note_of(figure) and "- towards shorter" in note_of(figures.dose_response(table))


@pytest.mark.parametrize(("count", "apart"), [(4, 1), (16, 1), (30, 5), (80, 5)])
def test_numbers_of_many_layers_do_not_overlap_and_no_layer_is_shown_that_is_not_there(count, apart):
    assert ticks(count) == apart
    axis = figures.by_layer({"a": [0.1] * count}, "title", "unit").layout.xaxis
    assert axis.dtick == apart and tuple(axis.range) == (-0.5, count - 0.5)
    scores = HeadScores(torch.rand(count, 2), "short_thinking", "unit", MADE)
    assert figures.head_scores(scores).layout.yaxis.dtick == apart


# --- training ---------------------------------------------------------------------------------------------------


def log(last: float) -> pd.DataFrame:
    return pd.DataFrame({"step": [0, 1], "held_out/accuracy": [0.5, last]})


def test_curves_that_end_alike_share_a_colour_and_an_entry_if_there_are_more_than_colours():
    curves = {f"recipe {i}": log(0.9 + 0.001 * i) for i in range(8)} | {"harmful": log(0.1), "middling": log(0.5)}
    figure = figures.learning_curves(curves, ["held_out/accuracy"])
    entries = [t for t in figure.data if t.showlegend]
    assert [t.name.replace("<br>", " ") for t in entries] == [", ".join(f"recipe {i}" for i in range(8)), "harmful", "middling"]
    assert len({t.line.color for t in figure.data}) == 3
    assert [t.hovertemplate.split(":")[0] for t in figure.data] == list(curves)
    assert "share a colour" in note_of(figure)


def test_as_many_curves_as_colours_keep_a_colour_and_an_entry_each():
    figure = figures.learning_curves({f"recipe {i}": log(0.9) for i in range(8)}, ["held_out/accuracy"])
    assert len({t.line.color for t in figure.data}) == len([t for t in figure.data if t.showlegend]) == 8
    assert note_of(figure) == ""


def test_a_figure_of_many_trained_models_is_high_enough_for_its_legend():
    rows = [{"name": f"model {i}", "think_tokens": i, "accuracy": 0.5} for i in range(18)]
    ends = {f"{column}_{end}": 0.5 for column in ("think_tokens", "accuracy") for end in ("low", "high")}
    assert figures.length_against_accuracy(pd.DataFrame(rows).assign(**ends)).layout.height >= 24 * 18
    apart = {f"recipe {i}": log(0.05 * i) for i in range(20)}
    figure = figures.learning_curves(apart, ["held_out/accuracy"])
    lines = sum(1 + t.name.count("<br>") for t in figure.data if t.showlegend)
    assert figure.layout.height >= 100 + 15 * lines


# --- boards -----------------------------------------------------------------------------------------------------


def board(**points: tuple[float, float]) -> dict:
    """A board of conditions: name -> (think tokens, accuracy)."""

    def e(mean, half):
        return {"mean": mean, "low": mean - half, "high": mean + half}

    conditions = {
        name: {"family": "base" if name == "base" else "edit", "metrics": {"think_tokens": e(x, 3.0), "accuracy": e(y, 0.05)}}
        for name, (x, y) in points.items()
    }
    return {"conditions": conditions, "paired": {}, "metrics": {}}


def test_the_axes_of_a_small_board_are_those_of_its_points():
    layout = figures.pareto(board(base=(36.0, 0.70), edited=(42.0, 0.78)), labels=["base", "edited"]).layout
    assert 25 < layout.xaxis.range[0] < 33 and 45 < layout.xaxis.range[1] < 50
    assert 0.5 < layout.yaxis.range[0] < 0.65 and 0.83 < layout.yaxis.range[1] < 0.95


def test_the_wide_interval_of_a_condition_with_two_seeds_does_not_shrink_the_rest():
    made = board(base=(36.0, 0.70), edited=(42.0, 0.78))
    made["conditions"]["edited"]["metrics"]["think_tokens"] |= {"low": -200.0, "high": 300.0}
    low, high = figures.pareto(made).layout.xaxis.range
    assert low > 25 and high < 55


def test_a_condition_without_an_interval_is_drawn():
    made = board(base=(36.0, 0.70), edited=(42.0, 0.78))
    made["conditions"]["edited"]["metrics"]["accuracy"] |= {"low": None, "high": None}
    assert len(figures.pareto(made, labels=["edited"]).layout.annotations) == 1
