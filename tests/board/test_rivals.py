"""Every rival is a condition of the board with a random control, and both are what they say."""

from __future__ import annotations

import pytest
import torch

from toolkit import board, collect, entropies, generate, store
from toolkit.baselines import Suppress
from toolkit.board import Ground, Sizes, default, measure, rivals, spec
from toolkit.exits import EarlyExit, RandomExit
from toolkit.generate import Sampling, rollouts
from toolkit.lm import Condition
from toolkit.methods import efficiency_steering
from toolkit.methods.crest import HeadRotation
from toolkit.methods.rebalance import Confident
from toolkit.steering import Steering
from toolkit.step_states import starts_with, step_states

KINDS = {
    "stable": (lambda control: rivals.stable("stable", -0.2, control=control), Steering),
    "manifold": (lambda control: rivals.projected("manifold", 1.0, components=4, control=control), Steering),
    "crest": (lambda control: rivals.rotated("crest", 4, control=control), HeadRotation),
    "rebalance": (lambda control: rivals.confident("rebalance", 1.0, control=control), Confident),
    "code": (lambda control: rivals.answered("code", control=control), EarlyExit),
    "probe": (lambda control: rivals.probed("probe", 0.5, control=control), EarlyExit),
    "ban": (lambda control: rivals.suppressed("ban", others=rivals.STARTS if control else ()), Suppress),
}


@pytest.fixture(scope="module")
def ground(tiny, tmp_path_factory):
    return Ground(tiny, Sizes(extraction=(60, 4), max_new_tokens=100), tmp_path_factory.mktemp("rivals"))


@pytest.mark.parametrize("name", KINDS)
def test_a_rival_and_its_control_are_conditions_of_the_same_kind_with_a_random_part(ground, name):
    make, kind = KINDS[name]
    mine, control = make(False), make(True)
    assert not mine.seeded and control.seeded and control.family == "control" != mine.family
    made = [mine.make(ground, 0), *(control.make(ground, seed) for seed in (0, 1))]
    acts = [(*c.during, *c.rules) for c in made]
    assert all(len(each) == 1 and isinstance(each[0], kind) for each in acts)
    assert len({str(each[0]) for each in acts}) == 3
    if kind is Steering and acts[0][0].op == "add":  # the norm of a vector along which a component is removed changes nothing
        assert torch.allclose(acts[0][0].direction.norms, acts[1][0].direction.norms)
        assert acts[0][0].op == acts[1][0].op and acts[0][0].layers == acts[1][0].layers
    if kind is HeadRotation:
        heads = [{(t.layer, t.head) for t in each[0].turns} for each in acts]
        assert len(heads[0]) == len(heads[1]) and all(heads[0].isdisjoint(other) for other in heads[1:])
    if kind is EarlyExit:
        assert isinstance(acts[1][0].check, RandomExit) and acts[1][0].ends == acts[0][0].ends


@pytest.mark.parametrize("name", ["manifold", "crest"])
def test_a_control_of_removing_a_component_removes_about_as_large_a_component(ground, name):
    make = KINDS[name][0]
    responses = ground.sample()

    def removed(act):
        """The mean share of an activation's norm that lies along what is removed."""
        if isinstance(act, Steering):
            states = (
                collect.states(ground.lm, responses, "resid_post", by=efficiency_steering.pairs(responses)).values[:, -1].double()
            )
            return float(((states @ act.direction.unit()[-1].double()).abs() / states.norm(dim=-1)).mean())
        states, layout = step_states(ground.lm, responses, "z", starts_with(*rivals.WORDS)).values, ground.lm.layout
        z = [layout.by_head(t.layer, states[:, t.layer])[:, t.head] for t in act.turns]
        return float(torch.stack([(h @ t.vector).abs() / h.norm(dim=-1) for h, t in zip(z, act.turns, strict=True)]).mean())

    mine, *controls = (
        removed(c.make(ground, seed).during[0]) for c, seed in ((make(False), 0), *((make(True), s) for s in range(3)))
    )
    assert mine > 0.1 and all(mine / 2 < control < 2 * mine for control in controls), (mine, controls)


def test_seeds_of_a_banned_start_of_steps_ban_different_tokens(ground):
    control = rivals.suppressed("ban", others=rivals.STARTS)
    banned = {str(control.make(ground, seed).during[0]) for seed in range(len(rivals.STARTS))}
    assert len(banned) == len(rivals.STARTS)


def test_a_banned_start_of_steps_begins_no_line_and_is_still_written_inside_lines(ground):
    problems, lines = ground.study.load("train", ground.lm)[:12], []
    condition = Condition(ground.lm, (Suppress(("5", "6", "7"), after="\n"),))
    for r in rollouts(condition, problems, Sampling(2, max_new_tokens=80), progress=False):
        lines += ground.lm.text(r.token_ids[r.think.start : r.think.stop]).splitlines()
    assert len(lines) > 40 and not any(line[:1] in {"5", "6", "7"} for line in lines)
    assert any(set("567") & set(line[1:]) for line in lines)


def test_a_response_without_thinking_has_no_share_of_failed_or_checking_steps(ground):
    problems = ground.study.load("train", ground.lm)[:2]
    silent, thinking = (
        generate.rollout_from_tokens(
            ground.lm, p, ground.lm.prompt_ids(p.messages), ground.lm.tokenizer.encode(text, add_special_tokens=False)
        )
        for p, text in zip(problems, ("<think></think>5<|end|>", "<think>1+1=3\n</think>5<|end|>"), strict=True)
    )
    rows = measure._rows(Condition(ground.lm), entropies.with_entropies(ground.lm, [silent, thinking]), problems)
    assert rows["no_think"].tolist() == [True, False]
    assert rows["failed"].isna().tolist() == rows["review"].isna().tolist() == [True, False] and rows["failed"].iloc[1] == 1


def test_reference_texts_are_from_problems_throughout_the_list(ground):
    sampled = [r for r in ground.sample() if r.think_tokens and r.closed]
    few = len(sampled) * 2 // 3
    texts = measure.reference_texts(sampled, few)
    assert len(texts) == few and (texts[0], texts[-1]) == (sampled[0], sampled[-1])
    assert measure.reference_texts(sampled[:2], 5) == sampled[:2]


def test_the_keys_of_rivals_and_controls_differ():
    specs = [spec.base(), *(make(control) for make, _ in KINDS.values() for control in (False, True)), rivals.closed("closed", 24)]
    names = [f"{i}" for i in range(len(specs))]
    spec.check_distinct({name: str(s.known.body) for name, s in zip(names, specs, strict=True)})


def test_the_control_of_a_budget_closes_as_many_responses_as_the_budget(ground):
    base = ground.sample()
    (rule,) = rivals.closed("closed", 24).make(ground, 0).rules
    (rate,), wanted = rule.check.rates, sum(r.think_tokens > 24 for r in base)
    # A response with n steps before the last is closed with chance 1 - (1 - rate)^n.
    counts = [ground.lm.text(r.token_ids[r.think.start : r.think.stop - 1]).count("\n") for r in base]
    assert sum(1 - (1 - rate) ** n for n in counts) == pytest.approx(wanted, abs=0.5)


@pytest.mark.parametrize("name", ["rebalance", "crest"])
def test_an_intervention_of_a_rival_acts_in_sampling_and_in_passes_over_whole_responses(ground, name):
    condition = KINDS[name][0](False).make(ground, 0)
    problems = ground.study.load("train", ground.lm)[:3]
    sampled = rollouts(condition, problems, Sampling(2, max_new_tokens=80, details=True), progress=False)
    for r in sampled:
        with condition.active() as lm, torch.inference_mode():
            logits = lm.model(input_ids=torch.tensor([r.token_ids]), use_cache=False).logits[0, r.prompt_len - 1 : -1]
        expected = logits.log_softmax(-1).gather(1, torch.tensor(r.token_ids[r.prompt_len :])[:, None])[:, 0]
        assert list(r.logprobs) == pytest.approx(expected.tolist(), abs=1e-3)


def test_the_board_measures_a_strength_that_follows_confidence_and_leaves_out_what_cannot_be_read(tiny, tmp_path):
    sizes = Sizes(
        main=(("arithmetic", 6),),
        unseen=(("running_sum", 2),),
        samples=2,
        extraction=(60, 4),
        max_new_tokens=100,
        haystacks=2,
        texts=6,
    )
    said: list[str] = []
    ground = Ground(tiny, sizes, tmp_path, say=said.append)
    specs = [spec.base(), rivals.confident("ReBalance", 1.0)]
    board.run(ground, specs, progress=False)
    found = board.write(ground, specs, "rivals", tmp_path)["conditions"]
    assert set(found["base"]["metrics"]) - set(found["ReBalance"]["metrics"]) == {"retrieval_write"}
    assert any("retrieval_write is left out" in text for text in said)
    assert "retrieved" in store.read_json(tmp_path / "board.json")["conditions"]["ReBalance"]["metrics"]


def test_every_rival_of_the_default_board_stands_beside_its_control():
    specs = {each.name: each for each in spec.select_conditions(default.CONDITIONS)}
    controls = {name.removeprefix("control: ") for name, each in specs.items() if each.family == "control"}
    for method in (
        "stable direction",
        "manifold",
        "CREST",
        "ReBalance",
        "CoDE-Stop",
        "exit probe",
        "NoWait",
        "budget of 48",
        "2 random heads masked",
    ):
        assert method in controls
    assert sum(name.startswith(("NoWait", "no re-checks")) for name in specs) == 1, "one condition, one name"
    assert {each.plan.keywords["part"] for each in specs.values() if each.recipe} == {None, "vector", "heads", "random heads"}
