"""Early exits: thinking ends at the first end of a step where the check says so, and the control exits as often elsewhere."""

from __future__ import annotations

from dataclasses import dataclass, replace

import pytest
from scripts import Steps
from zoo import model_of_type

from toolkit import exits
from toolkit.baselines import Suppress
from toolkit.exits import EarlyExit, RandomExit
from toolkit.generate import Sampling, rollouts
from toolkit.lm import Condition, ThinkTags
from toolkit.spans import Reader, spans
from toolkit.types import Rollout

SAMPLING = Sampling(n=4, max_new_tokens=40, seed=3)


@dataclass(frozen=True)
class SumCheck:
    """A check that depends on all tokens so far."""

    modulus: int

    def __call__(self, lm, reader, earlier):
        earlier.append(sum(reader.ids))
        return sum(reader.ids) % self.modulus == 0


@pytest.mark.parametrize("model_type", ["llama", "qwen3", "gpt_neox"])
def test_thinking_ends_at_the_first_end_of_a_step_where_the_check_says_so(model_type, problems_of):
    lm = model_of_type(model_type)
    line, close = lm.token_id("\n"), lm.token_id("</think>")
    rule = EarlyExit(SumCheck(3), "\n")
    early = 0
    open_ended = Suppress(("</think>", "<|end|>"))  # the model never wants to stop by itself, which is no candidate
    for r in rollouts(Condition(lm, (open_ended,), rules=(rule, Steps())), problems_of(4), SAMPLING, progress=False):
        ends = [t for t in range(r.think.start, r.think.stop) if r.token_ids[t] == line]
        says = [sum(r.token_ids[: t + 1]) % 3 == 0 for t in ends]
        if any(says):
            assert says.index(True) == len(says) - 1 and r.think.stop == ends[-1] + 1
            assert r.token_ids[r.think.stop] == close
            early += 1
    assert early > 3


def test_an_exit_never_happens_if_the_check_never_says_so(tiny, problems_of):
    base, ruled = (
        rollouts(Condition(tiny, rules=rules), problems_of(4), SAMPLING, progress=False)
        for rules in ((), (EarlyExit(RandomExit((0.0,), 0), "\n"),))
    )
    assert [r.token_ids for r in base] == [r.token_ids for r in ruled]


def test_rates_are_the_shares_of_exits_among_the_responses_that_reach_a_candidate(tiny, problems_of):
    rule, base = EarlyExit(SumCheck(2), "\n"), rollouts(tiny, problems_of(6), SAMPLING, progress=False)
    reached, left = {}, {}
    for r in base:
        ends = [t for t in range(r.think.start, r.think.stop) if tiny.text([r.token_ids[t]]) == "\n"]
        for j, t in enumerate(t for t in ends if t + 1 < r.think.stop):  # the last step is closed by the model itself
            reached[j] = reached.get(j, 0) + 1
            if sum(r.token_ids[: t + 1]) % 2 == 0:
                left[j] = left.get(j, 0) + 1
                break
    assert exits.rates(tiny, rule, base) == pytest.approx([left.get(j, 0) / n for j, n in sorted(reached.items())])


def test_the_control_of_a_check_that_always_stops_is_that_check(tiny, problems_of):
    always = EarlyExit(SumCheck(1), "\n")
    shares = exits.rates(tiny, always, rollouts(tiny, problems_of(4), SAMPLING, progress=False))
    assert shares == (1.0,)
    both = [
        rollouts(Condition(tiny, rules=(rule,)), problems_of(4), SAMPLING, progress=False)
        for rule in (always, EarlyExit(RandomExit(shares, 7), "\n"))
    ]
    assert [r.token_ids for r in both[0]] == [r.token_ids for r in both[1]]


def test_random_exits_occur_at_their_rate_and_do_not_depend_on_the_batch(tiny, problems_of):
    shares, problems = (0.25, 0.5), problems_of(40)
    rule = EarlyExit(RandomExit(shares, 1), "\n")
    sampled = rollouts(Condition(tiny, rules=(rule,)), problems, Sampling(n=6, max_new_tokens=40), progress=False)
    alone = rollouts(Condition(tiny, rules=(rule,)), problems[:3], Sampling(n=6, max_new_tokens=40, batch_size=1), progress=False)
    assert [r.token_ids for r in alone] == [r.token_ids for r in sampled[:18]]
    # Whether a response leaves at its first candidate: it stops after one step although base goes on there.
    base = rollouts(tiny, problems, Sampling(n=6, max_new_tokens=40), progress=False)
    longer = [i for i, r in enumerate(base) if any(exits.candidates(tiny, rule, r))]
    left = sum(tiny.text(sampled[i].token_ids[slice(*_span(sampled[i]))]).count("\n") == 1 for i in longer)
    assert len(longer) > 100 and abs(left / len(longer) - 0.25) < 3 * (0.25 * 0.75 / len(longer)) ** 0.5


def _span(r):
    return r.think.start, r.think.stop


def test_rules_with_other_rates_have_other_names():
    assert str(RandomExit((0.33334,), 0)) != str(RandomExit((0.33326,), 0))


def test_cues_limit_the_candidates_to_steps_that_begin_with_them(tiny, problems_of):
    base = rollouts(tiny, problems_of(10), SAMPLING, progress=False)
    rule = EarlyExit(RandomExit((1.0,), 0), "\n", cues=("w",))
    for r in base:
        text = tiny.text(r.token_ids[slice(*_span(r))])
        assert len(list(exits.candidates(tiny, rule, r))) == text.count("\nw")
    assert any(any(exits.candidates(tiny, rule, r)) for r in base)


def test_the_first_token_of_a_closing_tag_of_several_tokens_begins_no_step(llama):
    """The tag is "))", two tokens; the model closes its thinking after the second line."""
    lm = replace(llama, tags=ThinkTags("((", "))"))
    pieces = {piece: lm.tokenizer.encode(piece, add_special_tokens=False)[0] for piece in ("a", "b", "c", "(", ")", "\n")}
    prompt, end = lm.prompt_ids([{"role": "user", "content": "a"}]), next(iter(lm.eos_ids))
    ids = [*prompt, *(pieces[p] for p in "((ab\nb\n))c"), end]
    think, answer = spans(lm, ids, len(prompt), ended=True)
    r = Rollout("p", 0, tuple(ids), len(prompt), think, answer, "stop", "", True)
    assert lm.text(ids[slice(think.start, think.stop)]) == "ab\nb\n"
    rule = EarlyExit(RandomExit((1.0,), 0), "\n")
    first, last = think.start + 3, think.stop
    assert [at for at, _ in exits.candidates(lm, rule, r)] == [first]
    assert [at for at, _ in exits.candidates(lm, rule, r, closed=True)] == [first, last]
    begun = Reader(lm, prompt)
    for token in ids[len(prompt) : last]:
        begun.push(token)
    assert rule.after_step(lm, begun) and rule(lm, begun, pieces[")"]) is None
    assert rule(lm, begun, pieces["b"]) == (pieces[")"], pieces[")"])


def test_bad_input_is_refused(tiny, problems_of):
    with pytest.raises(ValueError, match="text with which a step ends"):
        EarlyExit(SumCheck(2), "")
    for rates in ((), (0.5, 1.2)):
        with pytest.raises(ValueError, match="one probability per candidate"):
            RandomExit(rates, 0)
    base = rollouts(tiny, problems_of(1), SAMPLING, progress=False)
    with pytest.raises(ValueError, match="has a step of thinking that ends with"):
        exits.rates(tiny, EarlyExit(SumCheck(2), "\n\n"), base)
