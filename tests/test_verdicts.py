"""The sentences of the verdict box: an effect is named only where its interval shows one, and so is the silence of controls."""

from __future__ import annotations

import json
from pathlib import Path

import pandas as pd
import pytest
from hypothesis import given
from hypothesis import strategies as st

from toolkit import verdicts
from toolkit.claims import Claim
from toolkit.stats import Estimate
from toolkit.verdicts import Change

DATA = Path(__file__).parents[1] / "data"
ends = st.floats(-20, 20, allow_nan=False).map(lambda v: round(v, 3))


def change(low: float, high: float, **more) -> Change:
    return Change(mean=(low + high) / 2, low=low, high=high, **more)


LONGER, BETTER = Change(mean=6.6, low=4.9, high=8.4), Change(mean=0.081, low=0.057, high=0.106)
NOTHING = {"think_tokens": change(-0.5, 0.6), "accuracy": change(-0.01, 0.02)}


@given(st.tuples(ends, ends), st.tuples(ends, ends))
def test_an_effect_is_claimed_exactly_if_its_interval_excludes_zero(length, accuracy):
    length, accuracy = sorted(length), sorted(v / 40 for v in accuracy)
    text = verdicts.words({"think_tokens": change(*length), "accuracy": change(*accuracy)})
    clear_length = length[0] < length[1] and not length[0] <= 0 <= length[1]
    clear_accuracy = accuracy[0] < accuracy[1] and not accuracy[0] <= 0 <= accuracy[1]
    assert ("thinks" in text) == clear_length
    assert ("longer" in text) == (clear_length and length[0] > 0)
    # Without a clear effect, "points" stands only in the brackets of the interval.
    assert (" points [" in text) == clear_accuracy


def test_numbers_are_those_of_the_changes_with_the_length_as_a_size():
    shorter = Change(mean=-5.0, low=-6.25, high=-4.0)
    assert verdicts.words({"think_tokens": LONGER, "accuracy": BETTER}) == (
        "thinks 6.6 tokens longer [4.9, 8.4], +8.1 points [+5.7, +10.6]"
    )
    assert verdicts.words({"think_tokens": shorter}) == "thinks 5.0 tokens shorter [4.0, 6.2]"


def test_controls_are_silent_only_if_every_interval_contains_zero():
    silent = verdicts.controls_sentence({"random heads": NOTHING, "random direction": NOTHING})
    assert silent == "Random controls: random heads, random direction: no effect detectable."
    one = {"think_tokens": change(0.1, 0.9), "accuracy": NOTHING["accuracy"]}
    told = verdicts.controls_sentence({"random heads": NOTHING, "random direction": one})
    assert "random direction: thinks 0.5 tokens longer [0.1, 0.9]" in told and "random heads: no effect detectable" in told


def test_draws_of_one_control_are_told_together_with_their_range_and_how_many_are_clear():
    clear = {
        f"random heads {i}": {"think_tokens": change(low, low + 1), "accuracy": NOTHING["accuracy"]}
        for i, low in enumerate((0.5, 2.0, -0.5))
    }
    told = verdicts.controls_sentence({**clear, "random direction 1": NOTHING, "random direction 2": NOTHING})
    assert told.startswith(
        "Random controls: random heads (3 draws): +0.0 to +2.5 tokens, clear in 2; random direction (2 draws): no effect detectable."
    )


def test_a_control_that_was_not_tested_is_not_called_silent():
    few = {"accuracy": change(-0.01, 0.02, note="2 seeds")}
    assert verdicts.controls_sentence({"random heads": few}) == "Random controls: random heads: not tested."
    nan = {"accuracy": Change(mean=float("nan"), low=float("nan"), high=float("nan"))}
    assert "no effect" not in verdicts.controls_sentence({"random heads": nan})


def test_without_controls_the_verdict_says_so():
    said = verdicts.sentences({"edited": {"think_tokens": LONGER, "accuracy": BETTER}}, set())
    assert said[-1].startswith("No random control was measured")


def test_many_clear_controls_are_weighed_against_chance():
    clear = {"think_tokens": change(0.1, 0.9), "accuracy": NOTHING["accuracy"]}
    controls = {f"random {i}": NOTHING for i in range(9)} | {"random 9": clear}
    assert verdicts.controls_sentence(controls).endswith("Of their 20 intervals, about 1 would exclude zero by chance.")


def test_a_p_value_after_correction_outranks_the_interval():
    text = verdicts.words({"accuracy": change(0.05, 0.1, p=0.2)})
    assert text == "no effect on accuracy detectable after correction for many comparisons ([+5.0, +10.0] points)"


def test_an_interval_without_width_is_no_effect():
    assert not change(3.0, 3.0).is_clear
    assert verdicts.words({"think_tokens": change(3.0, 3.0)}) == "thinking length not tested (no variance)"
    assert verdicts.words({"think_tokens": change(0.0, 0.0)}) == "no effect on thinking length detectable"


@pytest.mark.parametrize(
    ("name", "control"), [("ours: random heads", True), ("steered randomly", True), ("edited", False), ("randomised", False)]
)
def test_controls_are_known_by_the_word_random(name, control):
    assert verdicts.is_control(name) == control


def test_a_summary_becomes_sentences_with_clear_effects_first():
    rows = [
        (name, metric, c.mean, c.low, c.high)
        for name, changes in {
            "dud": NOTHING,
            "edited": {"think_tokens": LONGER, "accuracy": BETTER},
            "random heads": NOTHING,
        }.items()
        for metric, c in changes.items()
    ]
    summary = pd.DataFrame(rows, columns=["condition", "metric", "difference", "difference_low", "difference_high"])
    first, second, controls = verdicts.of_summary(summary)
    assert first == "edited: thinks 6.6 tokens longer [4.9, 8.4], +8.1 points [+5.7, +10.6]."
    assert second.startswith("dud: no effect on thinking length detectable")
    assert controls.startswith("Random controls: random heads (one draw): no effect detectable.")


def summary_of(controls: dict[str, dict[str, Change]]) -> pd.DataFrame:
    rows = [
        (name, metric, c.mean, c.low, c.high)
        for name, changes in ({"edited": {"think_tokens": LONGER}} | controls).items()
        for metric, c in changes.items()
    ]
    return pd.DataFrame(rows, columns=["condition", "metric", "difference", "difference_low", "difference_high"])


def test_a_control_with_one_draw_is_called_one_draw_and_one_with_several_is_not():
    once, several = "edited: random heads", [f"edited: random direction {i}" for i in (1, 2, 3)]
    *_, said = verdicts.of_summary(summary_of(dict.fromkeys([once, *several], NOTHING)))
    assert said == (
        "Random controls: edited: random heads (one draw), edited: random direction (3 draws): no effect detectable. Other draws of a "
        "control with one draw may have other effects."
    )
    assert "one draw" not in verdicts.of_summary(summary_of(dict.fromkeys(several, NOTHING)))[-1]
    clear = {"think_tokens": LONGER}
    assert "random heads (one draw): thinks 6.6 tokens longer" in verdicts.of_summary(summary_of({"random heads": clear}))[-1]


def test_one_random_direction_at_several_strengths_is_one_draw():
    *_, said = verdicts.of_summary(summary_of(dict.fromkeys(["random direction -0.5", "random direction +1"], NOTHING)))
    assert "random direction -0.5 (one draw), random direction +1 (one draw): no effect detectable" in said


def test_the_published_board_is_told_as_its_numbers_say():
    board = json.loads((DATA / "board" / "board.json").read_text())
    text = "\n".join(verdicts.of_board(board))
    edit = board["paired"]["ThinkEdit (ours), strength 2"]
    assert (
        f"+{100 * edit['accuracy']['mean']:.1f} points" in text
        and f"thinks {edit['think_tokens']['mean']:.1f} tokens longer" in text
    )
    stopped = board["paired"]["control: CoDE-Stop"]["accuracy"]
    assert f"CoDE-Stop: thinks 7.5 tokens shorter [5.9, 9.1], {100 * stopped['mean']:.1f} points" in text
    assert "The shortest without a detectable loss of accuracy is NoWait: thinks 6.4 tokens shorter" in text
    for name in board["conditions"]:  # no condition is named for a difference that Holm's correction rejects
        for metric, phrase in (("accuracy", "points ["), ("think_tokens", "thinks")):
            p = board["paired"].get(name, {}).get(metric, {}).get("p_holm")
            line = next((line for line in text.split("\n") if f" {name}: " in line and "Random controls" not in line), "")
            assert phrase not in line or (p is not None and p < 0.05)


def test_a_loss_that_only_the_correction_hides_is_not_called_no_detectable_loss():
    shorter = {"mean": -26.0, "low": -30.0, "high": -23.0, "p_holm": 0.02}
    lost = {"mean": -0.64, "low": -0.89, "high": -0.39, "p_holm": 0.3}
    conditions = {"base": {"family": "base"}, "penalty": {"family": "trained"}}
    board = {"conditions": conditions, "paired": {"penalty": {"think_tokens": shorter, "accuracy": lost}}}
    assert "None thinks detectably less without a detectable loss of accuracy." in verdicts.of_board(board)
    board["paired"]["penalty"]["accuracy"] = {**lost, "high": 0.01}
    assert any("without a detectable loss of accuracy is penalty" in line for line in verdicts.of_board(board))


def test_a_training_run_without_intervals_claims_no_effect():
    first, second = verdicts.of_training(
        {"accuracy": 0.5, "think_tokens": 20.0}, {"accuracy": 0.75, "think_tokens": 30.0}, steps=10
    )
    assert first == "In 10 steps, accuracy went from 50.0 to 75.0 %, and think tokens from 20.0 to 30.0."
    assert second.startswith("No effect is claimed")


def test_published_effects_are_counted_by_verdict_apart_from_controls():
    def claim(low, high, source="paper"):
        return Claim(
            text="longer", source=source, estimate=Estimate((low + high) / 2, float(low), float(high)), smallest=2.0, unit="tokens"
        )

    claims = [claim(1, 5), claim(1, 5), claim(-5, -3), claim(1, 5, "control"), claim(-1, 1, "control")]
    assert verdicts.of_claims(claims) == [
        "Of 3 published effects: 2 reproduced, 1 contradicted.",
        "Against random controls: 1 of 2 effects are larger than with the control.",
    ]
