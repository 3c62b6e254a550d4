"""Axes of difficulty: tables against plain arithmetic, dispersion groups, next steps that a reader would judge alike, real arms."""

from __future__ import annotations

import math
import re
from itertools import pairwise

import numpy as np
import pytest

from toolkit import figures, generate, jobs
from toolkit.generate import Sampling
from toolkit.jobs import axes
from toolkit.jobs.axes import Cell
from toolkit.lm import Condition
from toolkit.tasks import haystack, lookup, running_sum
from toolkit.types import HeadEdit, Plan


def cell(base: float, treated: float, controls: list[float], n: int = 40, seed: int = 0) -> Cell:
    rng = np.random.default_rng(seed)
    return Cell(
        *((rng.random(n) < p).astype(float) for p in (base, treated)), np.stack([(rng.random(n) < p) * 1.0 for p in controls])
    )


def cells(**levels: Cell) -> dict[tuple[str, str], Cell]:
    return {("arm", level): c for level, c in levels.items()}


# --- tables --------------------------------------------------------------------------------------------------


def test_every_column_is_the_plain_mean_it_names():
    one = cells(only=cell(0.8, 0.3, [0.8, 0.7, 0.9]))
    row = jobs.level_table(one).iloc[0]
    c = one["arm", "only"]
    assert row["base"] == pytest.approx(np.mean(c.base)) and row["treated"] == pytest.approx(np.mean(c.treated))
    assert row["random"] == pytest.approx(np.mean([np.mean(x) for x in c.controls]))
    assert row["change"] == pytest.approx(sum(c.treated - c.base) / 40)
    assert row["beyond_random"] == pytest.approx(sum(np.mean(c.treated - x) for x in c.controls) / 3)
    for name in ("base", "treated", "random", "change", "beyond_random"):
        assert row[f"{name}_low"] <= row[name] <= row[f"{name}_high"]
    assert (row["items"], row["draws"]) == (40, 3)


def test_an_effect_that_random_controls_share_is_no_effect():
    table = jobs.level_table(
        cells(
            real=cell(0.9, 0.1, [0.9] * 3),
            shared=cell(0.9, 0.1, [0.1] * 3),
            none=cell(0.9, 0.9, [0.9] * 3),
            up=cell(0.1, 0.9, [0.1] * 3),
        )
    ).set_index("level")
    assert table.loc["shared", "change_high"] < 0, "base is better"
    assert table["verdict"].to_dict() == {"real": "lower", "shared": axes.NO_EFFECT, "none": axes.NO_EFFECT, "up": "higher"}


def test_with_fewer_than_three_random_controls_nothing_is_judged():
    for draws, verdict in ((1, "not judged: 1 seed"), (2, "not judged: 2 seeds"), (3, "lower")):
        levels = cells(first=cell(0.9, 0.9, [0.9] * draws), last=cell(0.9, 0.1, [0.9] * draws, seed=2))
        table, grown = jobs.level_table(levels), jobs.growth_table(levels)
        assert table["verdict"].iloc[1] == grown["verdict"].iloc[0] == verdict
        assert (table["draws"] == draws).all() and grown["draws"].iloc[0] == draws
        assert (jobs.level_text(table)["controls"] == draws).all()


def test_items_that_do_not_count_are_left_out_of_a_mean_and_of_pairs():
    c = Cell(np.array([1.0, np.nan, 0.0, 1.0]), np.array([0.0, 1.0, np.nan, 1.0]), np.array([[1.0, 1.0, 1.0, np.nan]]))
    row = jobs.level_table({("arm", 1): c}).iloc[0]
    assert row["base"] == pytest.approx(2 / 3) and row["change"] == pytest.approx((-1 + 0) / 2)
    assert row["beyond_random"] == pytest.approx((-1 + 0) / 2)


def test_growth_is_the_difference_of_the_changes_and_shows_when_only_the_last_level_is_hurt():
    grown = cells(first=cell(0.9, 0.9, [0.9] * 3), mid=cell(0.5, 0.5, [0.5] * 3, seed=1), last=cell(0.9, 0.2, [0.9] * 3, seed=2))
    row = jobs.growth_table(grown).iloc[0]
    change = {level: np.mean(c.treated) - np.mean(c.base) for (_, level), c in grown.items()}
    assert row["growth"] == pytest.approx(change["last"] - change["first"])
    assert (row["first"], row["last"], row["verdict"]) == ("first", "last", "lower")
    equal = cells(first=cell(0.9, 0.3, [0.9] * 3), last=cell(0.9, 0.3, [0.9] * 3, seed=3))
    assert jobs.growth_table(equal).iloc[0]["verdict"] == axes.NO_EFFECT


def test_the_interval_of_growth_covers_no_growth_about_as_often_as_it_says():
    """Two levels with equal effects: 19 of 20 intervals hold 0."""
    held = 0
    for seed in range(100):
        same = cells(first=cell(0.7, 0.4, [0.7] * 3, seed=2 * seed), last=cell(0.7, 0.4, [0.7] * 3, seed=2 * seed + 1))
        row = jobs.growth_table(same).iloc[0]
        held += row["growth_low"] <= 0 <= row["growth_high"]
    assert 88 <= held <= 100


def test_growth_without_any_item_that_counts_is_undefined():
    empty = Cell(np.full(3, np.nan), np.full(3, np.nan), np.full((1, 3), np.nan))
    full = Cell(np.ones(3), np.ones(3), np.ones((1, 3)))
    row = jobs.growth_table({("arm", 1): full, ("arm", 2): empty}).iloc[0]
    assert math.isnan(row["growth"]) and row["verdict"] == axes.NO_EFFECT


def test_the_figure_shows_every_number_of_the_table():
    table = jobs.level_table(cells(a=cell(0.9, 0.1, [0.9] * 3), b=cell(0.5, 0.4, [0.5] * 3)))
    figure = figures.axis_effects(table, "title", axis="level")
    drawn = {trace.name: list(trace.y) for trace in figure.data}
    for name, column in (("base", "base"), ("random controls", "random"), ("intervention", "treated")):
        assert drawn[name] == pytest.approx(table[column].tolist())


def test_pooled_levels_have_the_mean_of_all_items():
    parts = cells(a=cell(0.9, 0.5, [0.9, 0.8], n=10), b=cell(0.2, 0.1, [0.2, 0.3], n=30))
    (key, joint), *rest = jobs.pooled(parts).items()
    assert key == ("arm", "all") and not rest
    assert joint.treated.mean() == pytest.approx(
        (10 * parts["arm", "a"].treated.mean() + 30 * parts["arm", "b"].treated.mean()) / 40
    )
    assert joint.controls.shape == (2, 40) and joint.base.tolist() == [*parts["arm", "a"].base, *parts["arm", "b"].base]


def test_the_text_of_a_table_holds_its_numbers_in_percent():
    table = jobs.level_table(cells(only=cell(0.9, 0.1, [0.9] * 3)))
    row, text = table.iloc[0], jobs.level_text(table).loc[("arm", "only")]
    assert text["base, %"] == f"{100 * row['base']:.0f}" and text["verdict"] == "lower"
    change = [float(x) for x in re.findall(r"[+-][\d.]+", text["treated - base"])]
    assert change == pytest.approx([100 * row[name] for name in ("change", "change_low", "change_high")], abs=0.051)


# --- measuring -----------------------------------------------------------------------------------------------


def test_each_condition_is_measured_once_per_level(tiny):
    asked = []

    def measure(condition, items):
        asked.append((condition.note, tuple(items)))
        return np.full(len(items), float(condition.note))

    base, up, down, noise = (Condition(tiny, note=note) for note in ("0.5", "0.9", "0.1", "0.4"))
    arms = {"up": jobs.Arm(up, (noise,)), "down": jobs.Arm(down, (noise,))}
    found = jobs.measure_axis(base, arms, {1: ["a", "b"], 2: ["c"]}, measure)
    assert len(asked) == len(set(asked)) == 8
    assert found["up", 1].treated.tolist() == [0.9, 0.9] and found["down", 2].controls.tolist() == [[0.4]]
    assert found["down", 2].base.tolist() == [0.5]


def test_an_arm_without_controls_or_a_level_without_items_is_refused(tiny):
    base = Condition(tiny)
    with pytest.raises(ValueError, match="bare has no random control"):
        jobs.measure_axis(base, {"bare": jobs.Arm(base, ())}, {1: ["a"]}, lambda c, items: np.ones(1))
    with pytest.raises(ValueError, match=r"1 arms, \[0\] items per level"):
        jobs.measure_axis(base, {"arm": jobs.Arm(base, (base,))}, {1: []}, lambda c, items: np.ones(1))


def test_right_answers_are_those_that_rollouts_grade(tiny):
    problems = lookup.load("test", 6, hops=(1, 2), context=(60, 90))
    sampling = Sampling(n=2, temperature=1.0, max_new_tokens=40)
    graded = [r.correct for r in generate.rollouts(tiny, problems, sampling, progress=False)]
    expected = [(a + b) / 2 for a, b in zip(graded[::2], graded[1::2], strict=True)]
    assert jobs.right_answers(sampling)(Condition(tiny), problems).tolist() == expected


def test_a_next_step_is_right_if_its_total_follows_from_the_history_and_wrong_under_a_mask_that_breaks_sums(tiny):
    histories = [running_sum.planted(p, 3, 1.0) for p in running_sum.load("test", 6, horizons=(5, 5))]
    step = jobs.next_steps()
    assert step(Condition(tiny), histories).tolist() == [1.0] * 6, "short chains are easy, also after wrong totals"
    # Check one by hand: the greedy continuation of the same text states the next total.
    h = histories[0]
    ids = [*tiny.prompt_ids(h.problem.messages), *tiny.tokenizer("<think>" + h.text, add_special_tokens=False)["input_ids"]]
    (r,) = generate.continuations(tiny, [(h.problem, ids)], Sampling(temperature=0.0, max_new_tokens=24))
    assert r.text.startswith(f"{h.totals[-1]}{h.problem.meta['deltas'][3]:+d}={h.totals[-1] + h.problem.meta['deltas'][3]}\n")
    every = Plan(
        tuple(HeadEdit(layer, head, "scale", 1.0) for layer, head in tiny.layout.all_heads), None, "all", tiny.provenance(0)
    )
    broken = jobs.masking_arm(tiny, every)
    assert broken.controls == (), "no other heads are left"
    assert np.nan_to_num(step(broken.treated, histories)).sum() == 0, "without heads nothing is added up"


# --- arms and dispersion -------------------------------------------------------------------------------------


def test_a_line_that_is_cut_off_is_no_wrong_step(tiny):
    histories = [running_sum.planted(p, 3, 1.0) for p in running_sum.load("test", 6, horizons=(5, 5))]
    short, long = (np.array(jobs.next_steps(tokens)(Condition(tiny), histories)) for tokens in (5, 48))
    assert np.isnan(short).all() and not np.isnan(long).any()


def test_dispersion_groups_are_equal_in_size_and_ordered_by_gap(tiny):
    found = [haystack.locate_lookup(tiny, p) for p in lookup.load("test", 18, hops=(2, 3), context=(200, 300))]
    groups = jobs.by_dispersion(found)
    assert list(groups) == ["near", "middle", "far"] and [len(g) for g in groups.values()] == [6, 6, 6]

    def gap(h) -> float:
        """Mean number of tokens between neighbours, by hand."""
        at = sorted((s.start, s.stop) for s in h.needed)
        return sum(b[0] - a[1] for a, b in pairwise(at)) / (len(at) - 1)

    gaps = [[gap(h) for h in g] for g in groups.values()]
    assert max(gaps[0]) <= min(gaps[1]) and max(gaps[1]) <= min(gaps[2])
    assert {h.problem.id for g in groups.values() for h in g} == {h.problem.id for h in found}


def test_dispersion_needs_gaps(tiny):
    single = [haystack.locate_lookup(tiny, p) for p in lookup.load("test", 3, hops=(1, 1), context=(60, 90))]
    with pytest.raises(ValueError, match="needs one piece, so it has no gap"):
        jobs.by_dispersion(single)
    with pytest.raises(ValueError, match="1 haystacks for 3 groups"):
        jobs.by_dispersion(single[:1])


def test_controls_have_the_size_of_the_intervention_and_differ_from_it(tiny):
    rollouts = generate.rollouts(
        tiny, running_sum.load("train", 40, horizons=(2, 6)), Sampling(n=2, max_new_tokens=120), progress=False
    )
    finding = jobs.find_heads(tiny, rollouts, jobs.DEMO, jobs.OURS)
    edit = jobs.edit_arm(tiny, finding, draws=2)
    assert len({c.lm.fingerprint for c in (edit.treated, *edit.controls)} | {tiny.fingerprint}) == 4
    steer = jobs.steering_arm(tiny, finding.direction, -0.5, draws=2)
    texts = [str(c.during[0]) for c in (steer.treated, *steer.controls)]
    assert len(set(texts)) == 3 and all("-0.5" in text for text in texts)
    plan = Plan((HeadEdit(1, 2, "scale", 1.0), HeadEdit(1, 3, "scale", 1.0)), None, "two", tiny.provenance(0))
    mask = jobs.masking_arm(tiny, plan, draws=3)
    masked = [{(e.layer, e.head) for e in c.during[0].plan.edits} for c in (mask.treated, *mask.controls)]
    assert masked[0] == {(1, 2), (1, 3)} and len(masked) == 4
    assert all(len(m) == 2 and not m & masked[0] and {layer for layer, _ in m} == {1} for m in masked[1:])
