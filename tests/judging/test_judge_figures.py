"""Figures of judges."""

import numpy as np
import pandas as pd

from toolkit import figures
from toolkit.figures.base import CONTROL
from toolkit.methods.learning_to_summarize import optimisation_curve


def curves() -> pd.DataFrame:
    rng, tables = np.random.default_rng(0), []
    for judge in ("good", "shuffled"):
        scores = rng.normal(size=(6, 8))
        quality = scores if judge == "good" else rng.normal(size=(6, 8))
        table = optimisation_curve(scores, quality, ns=(1, 2, 4), betas=(2.0, 1.0), problems=np.arange(6).astype(str))
        tables.append(table.assign(judge=judge))
    return pd.concat(tables)


def test_every_judge_is_drawn_by_both_ways_in_both_panels_and_only_controls_are_grey():
    figure = figures.over_optimisation(curves(), controls=("shuffled",))
    assert len(figure.data) == 2 * 2 * 2
    assert {t.name.partition(",")[0] for t in figure.data if t.line.color == CONTROL} == {"shuffled"}
    assert {t.name.partition(",")[0] for t in figure.data if t.line.color != CONTROL} == {"good"}


def test_points_are_those_of_the_table_in_the_order_of_kl():
    table = curves()
    drawn = next(t for t in figures.over_optimisation(table).data if t.name == "good, penalty" and t.xaxis == "x2")
    rows = table[(table["judge"] == "good") & (table["by"] == "penalty") & (table["measure"] == "quality")]
    assert sorted(zip(rows["kl"], rows["mean"], strict=True)) == list(zip(drawn.x, drawn.y, strict=True))


def test_a_line_marks_the_first_step_at_which_a_class_is_lost_and_none_if_no_class_is():
    kept = pd.DataFrame({"selected": [0.9, 0.9, 0.9], "rejected": [0.9, 0.8, 0.7]})
    lost = pd.DataFrame({"selected": [0.9, 0.05, 0.0], "rejected": [0.9, 1.0, 1.0]})
    figure = figures.class_recalls({"kept": kept, "lost": lost}, lowest=0.1)
    assert [(line.x0, line.xref) for line in figure.layout.shapes] == [(1, "x2")]
    assert not figures.class_recalls({"kept": kept}, lowest=0.1).layout.shapes
