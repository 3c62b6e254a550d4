"""Levels of difficulty, against naive loops, and without regression to the mean."""

from __future__ import annotations

import math
from dataclasses import replace

import numpy as np
import pandas as pd
import pytest
from test_evaluate import made_up

from toolkit import difficulty, evaluate, figures, report, stats
from toolkit.types import Report


def leveled(*difficulties: float) -> list[str | float]:
    rows = pd.DataFrame({"problem_id": [f"p{i}" for i in range(len(difficulties))], "task": "a", "difficulty": difficulties})
    levels = difficulty.levels_of(rows)
    assert levels.index.tolist() == rows["problem_id"].tolist()
    return levels.fillna("none").tolist()


def test_levels_are_thirds_of_the_range_of_difficulties_however_narrow_it_is():
    thirds = ["easy", "easy", "medium", "hard", "hard"]
    for scale in (0.01, 0.5, 1.0, 100.0):
        assert leveled(*(scale * x for x in (0, 0.3, 0.5, 0.7, 1.0))) == thirds
    assert leveled(2.0, 2.0) == ["easy", "easy"]


def test_a_problem_without_a_difficulty_has_no_level():
    assert leveled(0, math.nan, 1, 2) == ["easy", "none", "medium", "hard"]
    assert leveled(math.nan, math.nan) == ["none", "none"]


def naive_levels(made: Report, levels: np.ndarray) -> dict[tuple[str, str, str], tuple[float, float]]:
    """Mean and difference from base by (condition, level, metric), one response at a time."""
    ids, rows = sorted(set(made.rows["problem_id"])), made.rows.set_index(["condition", "problem_id", "sample"])
    found = {}
    for name in made.conditions:
        for level in difficulty.LEVELS:
            where = [(ids[i], s) for i, s in zip(*np.nonzero(levels == level), strict=True)]
            for metric, column in (("accuracy", "correct"), ("think_tokens", "think_tokens")):
                own = [float(rows.loc[(name, *key), column]) for key in where]
                base = [float(rows.loc[("base", *key), column]) for key in where]
                found[name, level, metric] = sum(own) / len(own), (sum(own) - sum(base)) / len(own)
        for metric in ("accuracy", "think_tokens"):
            pairs = zip(found[name, "hard", metric], found[name, "easy", metric], strict=True)
            found[name, difficulty.HARDER, metric] = tuple(h - e for h, e in pairs)
    return found


@pytest.mark.parametrize("levels_of", [difficulty.stated_levels, difficulty.solved_levels])
def test_results_by_difficulty_equal_a_naive_loop_over_responses(outcomes, provenance, levels_of):
    made = made_up(outcomes, provenance, 3)
    levels = levels_of(made)
    naive = naive_levels(made, levels)
    table = difficulty.by_level(made, levels)
    assert len(table) == len(naive) == 2 * 4 * 2
    for _, row in table.iterrows():
        mean, difference = naive[row["condition"], row["level"], row["metric"]]
        assert row["mean"] == pytest.approx(mean) and row["difference"] == pytest.approx(difference)
        assert row["low"] <= row["mean"] <= row["high"] and row["difference_low"] <= row["difference"] <= row["difference_high"]
    sizes = table.groupby("level")["responses"].first()
    assert sizes[list(difficulty.LEVELS)].sum() == levels.size and sizes[difficulty.HARDER] == sizes["easy"] + sizes["hard"]


def test_a_stratum_has_the_interval_of_a_bootstrap_over_problems(outcomes, provenance):
    """Naive: resample problems with the same random numbers, and average the responses of the drawn problems of the level."""
    made = made_up(outcomes, provenance)
    levels = difficulty.solved_levels(made)
    table = difficulty.by_level(made, levels, seed=5).set_index(["condition", "level", "metric"])
    change = outcomes[0]["edited"].astype(float) - outcomes[0]["base"]
    means = []
    for drawn in stats.resamples(20, seed=5):
        taken = [change[p, s] for p in drawn for s in range(4) if levels[p, s] == "medium"]
        means.append(np.mean(taken) if taken else np.nan)
    row = table.loc[("edited", "medium", "accuracy")]
    assert (row["difference_low"], row["difference_high"]) == pytest.approx(tuple(np.nanquantile(means, [0.025, 0.975])))


def test_the_level_of_a_response_depends_on_the_other_responses_of_base_only(outcomes, provenance):
    correct, lengths = outcomes
    levels = difficulty.solved_levels(made_up(outcomes, provenance))
    for i, s in np.ndindex(levels.shape):
        solved = np.delete(correct["base"][i], s).mean()
        assert levels[i, s] == ("hard" if solved < 1 / 3 else "medium" if solved < 2 / 3 else "easy")
    flipped = {**correct, "base": correct["base"].copy()}
    flipped["base"][:, 2] = ~flipped["base"][:, 2]
    assert np.array_equal(difficulty.solved_levels(made_up((flipped, lengths), provenance))[:, 2], levels[:, 2])


def test_hard_problems_gain_nothing_if_a_condition_changes_nothing(provenance):
    """All problems are equally hard, and a condition draws its answers anew: no level has an effect. Naive levels invent one."""
    rng = np.random.default_rng(1)
    correct = {name: rng.random((100, 4)) < 0.5 for name in ("base", "redrawn")}
    made = made_up((correct, {name: np.ones((100, 4)) for name in correct}), provenance)
    solved = correct["base"].mean(axis=1, keepdims=True) + np.zeros((1, 4))
    biased = np.select([solved < 1 / 3, solved < 2 / 3], ["hard", "medium"], "easy")

    def change(levels):
        rows = difficulty.by_level(made, levels).set_index(["condition", "level", "metric"])
        return rows.loc[("redrawn", difficulty.HARDER, "accuracy")]

    fair, naive = change(difficulty.solved_levels(made)), change(biased)
    assert fair["difference_low"] < 0 < fair["difference_high"]
    assert naive["difference_low"] > 0.3


def test_problems_of_one_difficulty_have_no_harder_level_and_one_sample_cannot_tell(outcomes, provenance):
    made = made_up(outcomes, provenance)
    same = Report(made.rows.assign(difficulty=0), made.conditions, made.base, made.provenance)
    assert set(difficulty.by_level(same, difficulty.stated_levels(same))["level"]) == {"easy"}
    single = made_up(tuple({name: v[:, :1] for name, v in part.items()} for part in outcomes), provenance)
    with pytest.raises(ValueError, match="at least 2 samples per problem"):
        difficulty.solved_levels(single)


def test_levels_are_those_of_the_task_if_it_has_several_else_those_of_other_responses(outcomes, provenance):
    made = made_up(outcomes, provenance)
    assert np.array_equal(difficulty.levels_for(made)[0], difficulty.stated_levels(made))
    same = Report(made.rows.assign(difficulty=0), made.conditions, made.base, made.provenance)
    levels, origin = difficulty.levels_for(same)
    assert np.array_equal(levels, difficulty.solved_levels(same)) and "other responses" in origin


def test_the_text_and_the_figure_of_levels_hold_the_numbers_of_the_table(outcomes, provenance):
    made = made_up(outcomes, provenance)
    table = difficulty.by_level(made, difficulty.stated_levels(made))
    row = table.set_index(["condition", "level", "metric"]).loc[("edited", "hard", "accuracy")]
    texts = difficulty.text_table(table)
    assert texts.loc["edited, accuracy", "hard"].startswith(f"{100 * row['mean']:.1f} ({100 * row['difference']:+.1f} [")
    assert "(" not in texts.loc["base, accuracy", "hard"] and list(texts) == [*difficulty.LEVELS, difficulty.HARDER]
    drawn = figures.by_level(pd.concat([table, table[table["condition"] == "edited"].replace({"edited": "control: random heads"})]))
    marks = {(t.name, t.xaxis): t for t in drawn.data}
    hard = marks["hard", "x"]
    assert hard.x[list(hard.y).index("edited")] == pytest.approx(100 * row["difference"])
    assert hard.marker.symbol[list(hard.y).index("control: random heads")] == "x"
    assert "base" not in hard.y


def test_a_page_has_a_section_on_difficulty_unless_all_problems_are_alike(outcomes, provenance):
    def titles(measured: Report) -> list[str]:
        return [s.title for s in report.comparison_page("t", measured, evaluate.summary(measured)).sections]

    made = made_up(outcomes, replace(provenance, notes={"problems": 20}))
    assert "By difficulty" in titles(made)
    once = made.only(sample=0)
    alike = Report(once.rows.assign(difficulty=0), once.conditions, once.base, once.provenance)
    assert "By difficulty" not in titles(alike)


def test_problems_without_a_level_do_not_count_as_another_level(outcomes, provenance):
    """Half of the problems state the same difficulty, the others none: nothing that the task states divides them."""
    made = made_up(outcomes, provenance)
    stated = np.where(made.rows["problem_id"] < "p10", 1.0, math.nan)
    some = Report(made.rows.assign(difficulty=stated), made.conditions, made.base, made.provenance)
    assert set(difficulty.stated_levels(some).ravel()) == {"", "easy"}
    assert np.array_equal(difficulty.levels_for(some)[0], difficulty.solved_levels(some))


def test_a_page_explains_the_column_of_hard_minus_easy_only_if_the_table_has_it(provenance):
    def explained(correct: np.ndarray) -> bool:
        both = {"base": correct, "edited": np.roll(correct, 1, axis=1)}
        made = made_up(
            (both, {name: np.ones(correct.shape) for name in both}), replace(provenance, notes={"problems": len(correct)})
        )
        same = Report(made.rows.assign(difficulty=0), made.conditions, made.base, made.provenance)
        (section,) = [s for s in report.comparison_page("t", same, evaluate.summary(same)).sections if s.title == "By difficulty"]
        assert (difficulty.HARDER in section.html) == ("hard problems minus" in section.text)
        return difficulty.HARDER in section.html

    half, none, full = ([1, 1, 0, 0], [0] * 4, [1] * 4)
    assert explained(np.array([full, half, none] * 6)) and not explained(np.array([full, half] * 6))


def test_a_level_with_too_few_problems_for_an_interval_is_left_out(outcomes, provenance):
    """A bootstrap over one problem has no variance, however much its samples vary."""
    made = made_up(outcomes, provenance)
    for few in (1, 4, 5):
        levels = np.repeat(np.where(np.arange(20) < few, "hard", "easy")[:, None], 4, axis=1)
        shown = set(difficulty.by_level(made, levels)["level"])
        assert shown == ({"easy", "hard", difficulty.HARDER} if few >= difficulty.assumed_problems else {"easy"})
