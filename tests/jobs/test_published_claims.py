"""The published claims on one model: estimates against naive ones, reasons where nothing can be measured, and nothing measured twice."""

from __future__ import annotations

import math
from dataclasses import replace

import numpy as np
import pandas as pd
import pytest
from scipy.stats import norm
from zoo import model_of_type

from toolkit import claims, directions, evaluate, generate, jobs, stats, store
from toolkit.claims import Claim
from toolkit.generate import Sampling
from toolkit.jobs import claims_page, published_claims
from toolkit.jobs.claims_ground import Comparison, NotMeasuredError, correlated, within_correlation
from toolkit.lm import NoThinkTagsError
from toolkit.stats import Estimate
from toolkit.tags import ThinkTags
from toolkit.types import Provenance, Report, Rollout, Span

PLAN = jobs.ClaimsStudy(
    jobs.Study("arithmetic", problems=6, samples=3, max_new_tokens=60),
    ("length", "direction", "edit"),
    jobs.EditSettings(fraction=0.3, share=0.3),
    jobs.Search("lookup", instances=4),
    train_problems=12,
)


def rows_of(seed: int = 0, problems: int = 12, each: int = 4) -> pd.DataFrame:
    rng = np.random.default_rng(seed)
    names = np.repeat([f"p{i}" for i in range(problems)], each)
    x = rng.normal(size=len(names))
    return pd.DataFrame({"problem_id": names, "x": x, "y": 0.7 * x + rng.normal(size=len(names))})


# --- statistics ---------------------------------------------------------------------------------------------------


def test_a_correlation_within_problems_is_that_of_stats_and_of_a_copied_resample():
    rows = rows_of()
    statistic, n = within_correlation(rows, rows["x"].to_numpy(), rows["y"].to_numpy())
    assert statistic(np.arange(n)[None])[0] == pytest.approx(
        stats.correlation(*(rows[c].to_numpy() for c in ("x", "y", "problem_id")), within=True).mean
    )
    index = np.random.default_rng(1).integers(0, n, n)
    names = sorted(rows["problem_id"].unique())
    copied = pd.concat([rows[rows["problem_id"] == names[i]].assign(problem_id=f"copy {k}") for k, i in enumerate(index)])
    wanted = stats.correlation(*(copied[c].to_numpy() for c in ("x", "y", "problem_id")), within=True).mean
    assert statistic(index[None])[0] == pytest.approx(wanted)


def test_a_correlation_is_refused_with_its_reason_where_nothing_varies_or_nothing_can_be_compared():
    rows = rows_of(each=1)
    with pytest.raises(NotMeasuredError, match="fewer than two problems"):
        within_correlation(rows, rows["x"].to_numpy(), rows["y"].to_numpy())
    rows = rows_of()
    with pytest.raises(NotMeasuredError, match="does not vary"):
        within_correlation(rows, rows["x"].to_numpy(), rows["problem_id"].str[1:].astype(float).to_numpy())


def test_a_real_correlation_exceeds_its_shuffled_control_and_noise_does_not():
    real, beyond = correlated("x goes with y", "paper", rows_of(), "x", "y")
    assert real.verdict == beyond.verdict == "reproduced"
    assert (real.source, beyond.source) == ("paper", "control")
    turned = correlated("x goes against y", "paper", rows_of(), "x", "y", sign=-1)
    assert turned[0].estimate.mean == pytest.approx(-real.estimate.mean) and turned[0].verdict == "contradicted"
    noise = rows_of().assign(y=np.random.default_rng(5).normal(size=48))
    assert "reproduced" not in {claim.verdict for claim in correlated("noise", "paper", noise, "x", "y")}


def test_the_power_is_the_probability_to_see_the_smallest_effect_that_matters():
    """Against draws of a normal estimate whose true value is the smallest effect that matters."""
    claim = Claim(text="", source="", estimate=Estimate(0.0, -1.96, 1.96), smallest=1.7, unit="tokens")  # standard error 1
    drawn = np.random.default_rng(0).normal(1.7, 1.0, 200_000)
    assert claim.power == pytest.approx((np.abs(drawn) > 1.96).mean(), abs=0.005)
    assert replace(claim, smallest=claim.detectable).power == pytest.approx(norm.sf(1.96 - 2.8) + norm.cdf(-1.96 - 2.8))
    limit = replace(claim, smallest=0.0, beyond=-1.7)
    assert limit.power == pytest.approx(claim.power)
    assert np.isnan(replace(claim, smallest=0.0).power) and np.isnan(replace(claim, estimate=Estimate(1.0, 1.0, 1.0)).power)


def report_of(outcomes: dict[str, np.ndarray]) -> Report:
    """A report whose conditions have these think tokens, ``[problems, samples]``; a response is right if its length is even."""
    rows = [
        {"condition": name, "problem_id": f"p{i:02d}", "sample": j, "think_tokens": t, "response_tokens": t, "correct": t % 2 == 0,
         "closed": True, "looping": False, "leaking": False}
        for name, tokens in outcomes.items() for i, row in enumerate(tokens.tolist()) for j, t in enumerate(row)
    ]  # fmt: skip
    return Report(pd.DataFrame(rows), {name: {} for name in outcomes}, "base", Provenance("made up", None, "0", "0", "0.1.0"))


def test_a_difference_is_the_mean_paired_difference_against_base_and_against_the_draws_of_a_control():
    rng = np.random.default_rng(0)
    tokens = {name: rng.integers(1, 30, (8, 4)) for name in ("base", "edited", "random 1", "random 2", "random 3")}
    c = Comparison(report_of(tokens))
    longer = c.claim("longer", "paper", "think_tokens", ["edited"])
    assert longer.estimate.mean == pytest.approx((tokens["edited"] - tokens["base"]).mean())
    assert longer.smallest == pytest.approx(0.05 * tokens["base"].mean())
    noise = ["random 1", "random 2", "random 3"]
    control = c.claim("shorter than noise", "control", "think_tokens", ["edited"], noise, sign=-1)
    assert control.estimate.mean == pytest.approx(np.mean([(tokens[n] - tokens["edited"]).mean() for n in noise]))
    few = c.claim("longer", "control", "think_tokens", ["edited"], noise[:2])
    assert few.verdict == "not judged: 2 seeds"
    single = c.claim("longer", "control", "think_tokens", ["edited"], noise[:1])
    assert single.verdict == "not judged: 1 seed" and math.isnan(single.estimate.p)
    right = c.claim("right", "paper", "accuracy", ["edited"])
    assert right.estimate.mean == pytest.approx(((tokens["edited"] % 2 == 0) * 1.0 - (tokens["base"] % 2 == 0)).mean())


def test_the_shortest_response_counts_with_the_mean_of_those_that_are_equally_short():
    rows = pd.DataFrame({"think_tokens": [3, 3, 5, 9], "correct": [True, False, True, False]})
    ends = published_claims._ends(rows)
    assert ends["shortest"] == pytest.approx(0.5 - 0.5) and ends["longest"] == pytest.approx(0.5 - 0.0)


def test_responses_that_are_cut_off_say_nothing_on_length_and_accuracy(tiny, tmp_path):
    """They are the longest, and wrong by construction."""
    plan = replace(PLAN, study=replace(PLAN.study, problems=12, max_new_tokens=40))
    g = jobs.Ground(tiny, plan, tmp_path)
    ended = [r for r in g.base if r.closed]
    assert len(g.base) > len(ended) > 12
    found = published_claims.length_and_accuracy(g)
    by_problem = {name: [r for r in ended if r.problem_id == name] for name in {r.problem_id for r in ended}}
    wanted = []
    for rs in by_problem.values():
        if len(rs) > 1:
            longest = [r.correct for r in rs if r.think_tokens == max(x.think_tokens for x in rs)]
            wanted.append(np.mean([r.correct for r in rs]) - np.mean(longest))
    claim = next(claim for claim in found if claim.text.startswith("the longest response"))
    assert claim.estimate.mean == pytest.approx(np.mean(wanted))
    vars(g)["base"] = [replace(r, answer=None) for r in g.base]
    assert "0 of 36 responses end within the token budget" in published_claims.length_and_accuracy(g)[0].missing


def responses(lengths: dict[str, list[int]]) -> list[Rollout]:
    """Return right, closed responses with these numbers of think tokens."""
    return [
        Rollout(problem, sample, (0,) * (n + 3), 1, Span(1, n + 1), Span(n + 2, n + 3), "stop", "", correct=True)
        for problem, counts in lengths.items()
        for sample, n in enumerate(counts)
    ]


def test_problems_whose_right_responses_are_equally_long_count_against_the_claim_that_the_longest_is_twice_the_shortest(
    tiny, tmp_path
):
    g = jobs.Ground(tiny, PLAN, tmp_path)
    wrong = [replace(r, correct=False, sample=9) for r in responses({"a": [1]})]
    vars(g)["train"] = [*responses({"a": [5, 10], "b": [5, 9, 5], "c": [7, 7], "d": [7]}), *wrong]
    vars(g)["base"] = responses({"a": [4, 4], "b": [4, 12], "e": [3, 3, 3]})
    (claim,) = published_claims._twice(g)
    # Of six problems with several right responses: a of train and b of base.
    assert claim.estimate.mean == pytest.approx(2 / 6)
    vars(g)["base"] = []
    with pytest.raises(NotMeasuredError, match="3 of 4 problems have two right responses"):
        published_claims._twice(g)


# --- the report ---------------------------------------------------------------------------------------------------


@pytest.fixture(scope="module")
def measured(tiny, tmp_path_factory):
    out = tmp_path_factory.mktemp("claims")
    return out, jobs.claims_report(tiny, PLAN, out, command="toolkit claims -o X")


def test_a_claim_about_the_edit_is_what_a_comparison_by_hand_gives(measured, tiny):
    out, found = measured
    g = jobs.Ground(tiny, PLAN, out)
    edited = generate.rollouts(
        jobs.edit_conditions(tiny, {"edited": g.finding}, PLAN.edit)["edited"],
        g.tests,
        Sampling(3, max_new_tokens=60),
        progress=False,
    )
    base = generate.rollouts(tiny, g.tests, Sampling(3, max_new_tokens=60), progress=False)
    longer = next(claim for claim in found if claim.text == "10 heads edited: thinks longer")
    wanted = np.mean([a.think_tokens - b.think_tokens for a, b in zip(edited, base, strict=True)])
    assert wanted != 0 and longer.estimate.mean == pytest.approx(wanted)
    assert sum("random" in claim.text and claim.source == "control" for claim in found) >= 3


@pytest.mark.parametrize("measure", [published_claims.steered, published_claims.efficiency, published_claims.edited])
def test_a_claim_that_conditions_differ_from_base_stands_beside_one_that_they_differ_from_random_conditions(
    measured, tiny, measure, monkeypatch
):
    asked = []

    def claim(self, text, source, metric, names, minus=("base",), *, sign=1, beyond=0.0):
        asked.append((source == "control", (metric, sign, *names), minus, beyond))
        return Claim(text=text, source=source, estimate=Estimate(0.0, 0.0, 0.0), smallest=0.1, unit="points")

    monkeypatch.setattr(Comparison, "claim", claim)
    monkeypatch.setattr(jobs.Ground, "compare", lambda self, conditions: report_of({"base": np.ones((2, 2), int)}))
    monkeypatch.setattr(published_claims, "_usable", lambda *a: (-1.0, 1.0))
    monkeypatch.setattr(published_claims, "_rise", lambda *a: lambda index: np.zeros(len(index)))
    recipe = published_claims.extract_direction
    monkeypatch.setattr(published_claims, "extract_direction", lambda lm, rs, s, _, **k: recipe(lm, rs, s, **k))
    measure(jobs.Ground(tiny, PLAN, measured[0]))
    against_base = {what for control, what, _, beyond in asked if not control and not beyond}
    against_random = {what for control, what, minus, _ in asked if control and all("random" in name for name in minus)}
    assert against_base and against_base <= against_random
    assert all(len(minus) == PLAN.edit.draws for control, _, minus, _ in asked if control)


def test_page_json_and_post_hold_every_claim_with_power_and_verdict(measured):
    out, found = measured
    posted, page, kept = (out / "claims.md").read_text(), (out / "report.html").read_text(), store.read_json(out / "claims.json")
    rows = [row for group in kept["claims"].values() for row in group]
    assert list(kept["claims"]) == list(PLAN.names) and len(rows) == len(found)
    for claim, row in zip(found, rows, strict=True):
        assert f"| {claim.text} |" in posted and row["verdict"] == claim.verdict
        assert row["power"] is None or row["power"] == pytest.approx(claim.power)
    assert "toolkit claims -o X" in posted and "Verdict" in page and "Transcripts" in page
    table = jobs.posting_table(found)
    assert not table["smallest that matters"].eq("").any() and set(table["verdict"]) == {claim.verdict for claim in found}


def test_given_again_nothing_is_sampled_or_measured_and_the_claims_are_the_same(measured, tiny, monkeypatch):
    out, found = measured
    monkeypatch.setattr(generate, "_sample", lambda *a, **k: pytest.fail("sampled again"))
    monkeypatch.setattr(claims_page, "speed", lambda *a: pytest.fail("timed again"))
    assert claims.json_records(jobs.claims_report(tiny, PLAN, out)) == claims.json_records(found)


def test_after_a_stop_finished_groups_are_read_and_the_others_measured(tiny, tmp_path, monkeypatch, measured):
    stopped = replace(published_claims.CLAIMS["direction"], measure=lambda g: (_ for _ in ()).throw(KeyboardInterrupt))
    groups = dict(published_claims.CLAIMS)
    monkeypatch.setattr(claims_page, "CLAIMS", groups | {"direction": stopped})
    with pytest.raises(KeyboardInterrupt):
        jobs.claims_report(tiny, replace(PLAN, names=("length", "direction")), tmp_path)
    assert [path.name.partition("-")[0] for path in (tmp_path / "parts").iterdir()] == ["length"]
    monkeypatch.setattr(
        claims_page, "CLAIMS", groups | {"length": replace(groups["length"], measure=lambda g: pytest.fail("measured again"))}
    )
    again = jobs.claims_report(tiny, replace(PLAN, names=("length", "direction")), tmp_path)
    wanted = [claim for claim in measured[1] if "edited" not in claim.text]
    assert claims.json_records(again) == claims.json_records(wanted)


def test_other_settings_or_problems_do_not_read_the_claims_that_are_kept(measured, tiny):
    out, _ = measured
    for split in ("train", "dev", "test"):
        g = jobs.Ground(tiny, PLAN, out)
        g.problems[split].pop()
        assert not claims_page._part(g, "edit").exists(), split
    g = jobs.Ground(tiny, PLAN, out)
    other = replace(g, plan=replace(PLAN, edit=replace(PLAN.edit, fraction=0.2)))
    assert claims_page._part(g, "edit").is_file() and not claims_page._part(other, "edit").exists()


def test_a_random_model_without_tags_gets_reasons_instead_of_claims_that_cannot_be_measured(tmp_path):
    """Its responses never end: there is no class of short responses, and nothing is right."""
    lm = replace(model_of_type("llama"), tags=None)
    plan = replace(PLAN, study=replace(PLAN.study, max_new_tokens=12), names=tuple(published_claims.CLAIMS))
    with pytest.raises(NoThinkTagsError, match="whole responses count as thinking"):
        jobs.claims_report(lm, plan, tmp_path)
    lines: list[str] = []
    found = jobs.claims_report(replace(lm, tags=ThinkTags(None, None)), plan, tmp_path, say=lines.append)
    reasons = {claim.text: claim.missing for claim in found if claim.missing}
    for group in ("direction", "steering", "edit"):
        assert "each class needs 8" in reasons[published_claims.CLAIMS[group].text]
    assert "8 needed" in reasons[published_claims.CLAIMS["efficiency"].text]
    assert "the model's context is 512" in reasons[published_claims.CLAIMS["retrieval"].text]
    assert all(np.isnan(claim.estimate.mean) and claim.verdict == "not measured" for claim in found if claim.missing)
    assert not any("answering" in claim.text for claim in found)  # no tag closes the thinking
    assert (
        "Not measured" in (tmp_path / "claims.md").read_text()
        and "Whole responses count as thinking" in (tmp_path / "claims.md").read_text()
    )
    assert any("at most about" in line for line in lines)


def test_the_largest_number_of_responses_is_never_exceeded(measured, tiny):
    out, _ = measured
    g = jobs.Ground(tiny, PLAN, out)
    planned = sum(n for n, _ in published_claims.responses(g).values())
    sampled = sum(store.count_rollouts(folder.parent) for folder in out.rglob("header.json"))
    assert 0 < sampled <= planned


def test_train_problems_are_counted_as_they_were_there_and_named_only_for_directions(measured, tiny):
    g = jobs.Ground(tiny, replace(PLAN, train_problems=10**6), measured[0])
    there = jobs.Ground(tiny, PLAN, measured[0]).problems
    vars(g)["problems"] = {**there, "train": there["train"][:5]}
    assert "Directions and heads come from 5 train problems." in claims_page._made(g)
    for names in (("length",), ("entropy", "steps"), ("retrieval",)):
        assert "train problems" not in claims_page._made(replace_keeping(g, names)), names
    for names, drawn in {("length",): True, ("edit",): True, ("entropy", "steps", "retrieval"): False}.items():
        assert ("train" in published_claims.responses(replace_keeping(g, names))) == drawn


def replace_keeping(g: jobs.Ground, names: tuple[str, ...]) -> jobs.Ground:
    """The same ground with other groups of claims, and with the problems that it holds already."""
    other = replace(g, plan=replace(g.plan, names=names))
    vars(other)["problems"] = g.problems
    return other


def test_another_seed_draws_other_random_directions(measured, tiny, monkeypatch):
    g = jobs.Ground(tiny, PLAN, measured[0])
    other = replace(g, plan=replace(PLAN, study=replace(PLAN.study, seed=1000)))
    for name in ("train", "base", "finding"):
        vars(other)[name] = getattr(g, name)
    drawn, of_seed = [], directions.random_like
    monkeypatch.setattr(published_claims.directions, "random_like", lambda v, seed: drawn.append(seed) or of_seed(v, seed=seed))
    default, changed = (published_claims.length_direction(ground) for ground in (g, other))
    count = published_claims.assumed_shuffles
    assert drawn == [*range(count), *range(1000, 1000 + count)]
    assert default[1].estimate.mean != changed[1].estimate.mean


def test_steering_is_judged_at_usable_strengths_against_random_directions(tiny, tmp_path):
    plan = replace(
        PLAN, names=("steering",), study=replace(PLAN.study, problems=4, samples=2, max_new_tokens=60), train_problems=16
    )
    found = jobs.claims_report(tiny, plan, tmp_path)
    texts = [claim.text for claim in found]
    assert any(text.startswith("length rises with the strength") for text in texts)
    controls = [claim for claim in found if claim.source == "control"]
    assert len(controls) >= 2 and all("seed" not in claim.verdict for claim in controls)
    sampled = {path.parent.name for path in (tmp_path / "rollouts" / "test").rglob("header.json")}
    steered = [name for name in sampled if name != evaluate.rollout_folder(tmp_path, "base").name]
    assert len(steered) in (8, 16)  # two or four strengths, each along the direction and three random ones


def test_one_sample_per_problem_and_greedy_decoding_are_refused():
    with pytest.raises(ValueError, match="at least 2 samples"):
        replace(PLAN, study=replace(PLAN.study, samples=1))
    with pytest.raises(ValueError, match="temperature=0"):
        replace(PLAN, study=replace(PLAN.study, temperature=0.0))
    with pytest.raises(ValueError, match="Unknown claims heads: choose from length"):
        jobs.check_names(["heads"])
    assert jobs.check_names(["edit", "length", "edit"]) == ("length", "edit")
