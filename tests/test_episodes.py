"""Episodes: responses in which tool results stand between spans that the model wrote; sampled, graded, kept and resumed."""

from __future__ import annotations

from dataclasses import replace
from itertools import pairwise

import numpy as np
import pandas as pd
import pytest
import torch

from toolkit import collect, identity, positions, store
from toolkit.engines import CannotSampleError, OwnLoop
from toolkit.engines.probing import check_unmodified
from toolkit.generate import Sampling, rollout_from_tokens, rollouts
from toolkit.lm import Condition
from toolkit.methods import phase_entropy
from toolkit.rewards import RewardBatch, RewardValues
from toolkit.rewards.offline import score
from toolkit.spans import spans
from toolkit.steps import Step
from toolkit.store import DamagedFileError, WrongModelError
from toolkit.tags import ThinkTags
from toolkit.tools import Database, Marks, Tool, Toolbox, calculate
from toolkit.types import Rollout, Span

CALC = Toolbox((Tool(calculate),))
LOOPS = {"batches": OwnLoop(in_slots=False), "slots": OwnLoop(in_slots=True)}


class Script:
    """A decoding rule that makes a model write a text at the start of its response, and then lets it write by itself."""

    def __init__(self, lm, text: str, end: bool = False) -> None:
        self.ids = lm.tokenizer(text, add_special_tokens=False)["input_ids"] + ([min(lm.eos_ids)] if end else [])

    def __call__(self, lm, reader, drawn):
        at = reader.placed[self]
        reader.placed[self] += 1
        return [self.ids[at]] if at < len(self.ids) else None


def write(lm, text: str, problems, *, end: bool = True, tools=CALC, engine=LOOPS["batches"], **sampling) -> list[Rollout]:
    settings = Sampling(**{"max_new_tokens": 200, "temperature": 0.0, **sampling})
    condition = Condition(lm, rules=(Script(lm, text, end),), tools=tools)
    return rollouts(condition, problems, settings, engine=engine, progress=False)


@pytest.fixture
def llama(model_of):
    return model_of("llama")


@pytest.mark.parametrize("loop", LOOPS)
def test_a_result_follows_each_call_and_is_marked_as_not_written(llama, problems_of, loop):
    text = "<think>a<calculate>6*7</calculate>b<calculate>1/0</calculate>c</think>42"
    one, *others = write(llama, text, problems_of(3), engine=LOOPS[loop])
    whole = (
        "<think>a<calculate>6*7</calculate><result>42</result>b<calculate>1/0</calculate>"
        "<result>error (division by zero): a divisor is 0</result>c</think>42<|end|>"
    )
    for r in (one, *others):
        assert r.text.replace(" ", "") == whole.replace(" ", "") and r.finish == "stop"
        texts = [llama.text(r.token_ids[s.start : s.stop]) for s in r.results]
        assert texts == ["<result>42</result>", "<result>error (division by zero): a divisor is 0</result>"]
        assert llama.text(r.token_ids[r.answer.start : r.answer.stop]) == "42"
        inside = r.token_ids[r.think.start : r.think.stop]
        assert r.think_tokens == len(inside) - r.result_tokens > 0
        assert r.written_tokens + r.result_tokens == r.response_tokens
        written = [t for t, own in zip(r.token_ids[r.prompt_len :], r.written, strict=True) if own]
        assert written == Script(llama, text, True).ids


@pytest.mark.parametrize("loop", LOOPS)
def test_the_model_goes_on_from_prompt_response_and_result_as_one_pass_would(llama, problems_of, loop):
    for r in write(
        llama, "<calculate>6*7</calculate>", problems_of(4), end=False, engine=LOOPS[loop], details=True, max_new_tokens=70
    ):
        (result,) = r.results
        with torch.inference_mode():
            logits = llama.model(torch.tensor([r.token_ids])).logits[0].double()
        logprobs = logits.log_softmax(dim=-1)
        for at in range(result.stop, len(r.token_ids)):
            assert int(logits[at - 1].argmax()) == r.token_ids[at]
            assert r.logprobs[at - r.prompt_len] == pytest.approx(float(logprobs[at - 1, r.token_ids[at]]), abs=1e-4)
        assert set(r.logprobs[result.start - r.prompt_len : result.stop - r.prompt_len]) == {0.0}


@pytest.mark.parametrize("loop", LOOPS)
def test_tools_that_are_not_called_change_nothing(llama, problems_of, loop):
    sampling = Sampling(n=3, max_new_tokens=40, details=True)
    never = Toolbox((Tool(calculate),), {"calculate": Marks("<<never>>", "<</never>>")})
    plain = rollouts(llama, problems_of(4), sampling, progress=False)
    with_tools = rollouts(Condition(llama, tools=never), problems_of(4), sampling, engine=LOOPS[loop], progress=False)
    assert [r.token_ids for r in plain] == [r.token_ids for r in with_tools]
    if loop == "batches":
        assert plain == with_tools


def test_an_episode_does_not_depend_on_the_responses_beside_it(llama, problems_of):
    settings = {"n": 2, "temperature": 1.0, "end": False, "max_new_tokens": 60}
    together = write(llama, "<calculate>6*7</calculate>", problems_of(3), **settings)
    alone = write(llama, "<calculate>6*7</calculate>", problems_of(3), batch_size=1, **settings)
    assert together == alone and len({r.token_ids for r in together}) == 6


@pytest.mark.parametrize("loop", LOOPS)
def test_an_episode_ends_at_the_call_after_the_last_that_is_answered(llama, problems_of, loop):
    text = "<calculate>1+1</calculate>" * 4 + "never written"
    (r,) = write(llama, text, problems_of(1), tools=replace(CALC, max_calls=2), max_new_tokens=300, engine=LOOPS[loop])
    answered = "<calculate>1+1</calculate><result>2</result>"
    assert r.text == answered * 2 + "<calculate>1+1</calculate>" and r.finish == "length" and len(r.results) == 2


@pytest.mark.parametrize("loop", LOOPS)
def test_a_result_that_does_not_fit_is_left_out_and_one_that_fits_exactly_is_kept(llama, problems_of, loop):
    call, result = "<calculate>1+1</calculate>", "<result>2</result>"
    exact = len(Script(llama, call + result).ids)
    (kept,) = write(llama, call + "x", problems_of(1), max_new_tokens=exact, engine=LOOPS[loop], details=True)
    (cut,) = write(llama, call + "x", problems_of(1), max_new_tokens=exact - 1, engine=LOOPS[loop], details=True)
    assert (kept.text, kept.finish, len(kept.results)) == (call + result, "length", 1)
    assert (cut.text, cut.finish, cut.results) == (call, "length", ())
    assert len(cut.logprobs) == len(cut.entropies) == cut.response_tokens


def test_a_call_that_ends_the_token_limit_and_a_model_without_end_are_cut_too(llama, problems_of):
    call = "<calculate>1+1</calculate>"
    (r,) = write(llama, call, problems_of(1), end=False, max_new_tokens=len(Script(llama, call).ids))
    assert (r.text, r.finish, r.results) == (call, "length", ())
    endless = replace(llama)
    endless.__dict__["eos_ids"] = frozenset({10**6})
    (r,) = write(endless, call * 2, problems_of(1), end=False, tools=replace(CALC, max_calls=1), max_new_tokens=200)
    assert (r.text, r.finish, len(r.results)) == (call + "<result>2</result>" + call, "length", 1)


def test_a_result_never_closes_thinking_ends_the_response_or_calls(llama, problems_of):
    def calculate(expression: str) -> str:
        return "</think><|end|><calculate>1</calculate>" + expression

    (r,) = write(llama, "<think><calculate>q</calculate>x</think>7", problems_of(1), tools=Toolbox((Tool(calculate),)))
    assert r.text == "<think><calculate>q</calculate><result>1q</result>x</think>7<|end|>" and len(r.results) == 1


def test_a_tag_inside_a_result_of_another_program_is_no_tag(llama, problems_of):
    ids = llama.tokenizer("<think>a</think>b</think>7", add_special_tokens=False)["input_ids"]
    close = ids.index(llama.token_id("</think>"))
    written = [1] * len(ids)
    written[close] = 0
    prompt = llama.prompt_ids(problems_of(1)[0].messages)
    r = rollout_from_tokens(llama, problems_of(1)[0], prompt, [*ids, min(llama.eos_ids)], written=[*written, 1])
    assert llama.text(r.token_ids[r.think.start : r.think.stop]) == "a</think>b" and r.think_tokens == 2
    assert r.results == (Span(len(prompt) + close, len(prompt) + close + 1),)
    with pytest.raises(ValueError, match="expected one per token, the first 1"):
        rollout_from_tokens(llama, problems_of(1)[0], prompt, ids, written=written[1:])
    with pytest.raises(ValueError, match="expected one per token, the first 1"):
        rollout_from_tokens(llama, problems_of(1)[0], prompt, ids, written=[0, *written[1:]])


def test_results_after_thinking_are_no_part_of_the_answer(llama, problems_of):
    problem = problems_of(1)[0]
    (r,) = write(llama, f"<think>a</think><calculate>{problem.answer}</calculate>no", [problem])
    assert llama.text(r.token_ids[r.answer.start : r.answer.stop]) == "no" and not r.correct
    (r,) = write(llama, f"<think>a</think><calculate>1</calculate>{problem.answer}", [problem])
    assert r.correct
    opened, closed = (r.token_ids.index(llama.token_id(tag)) for tag in ("<think>", "</think>"))
    end = len(r.token_ids) - 1  # the end-of-sequence token is in no span
    expected = (Span(opened + 1, closed), Span(r.results[-1].stop, end))
    assert (r.think, r.answer) == expected == spans(llama, r.token_ids, r.prompt_len, ended=True, results=r.results)
    assert spans(llama, r.token_ids, r.prompt_len, ended=True)[1] == Span(closed + 1, end)


def test_positions_of_thinking_leave_results_out(llama, problems_of):
    def say(words: str) -> str:
        return f"{words}. so. 7"

    (r,) = write(llama, "<think>a<say>1</say>b. c</think>42", problems_of(1), tools=Toolbox((Tool(say),)))
    predicted = [r.token_ids[t + 1] for t in positions.THINK.of(r)]
    assert predicted == Script(llama, "a<say>1</say>b. c").ids and len(predicted) == r.think_tokens
    ends = positions.sentence_ends(llama)
    assert [llama.text([r.token_ids[t]]).strip()[-1] for t in ends.of(r)] == ["."]
    assert len(ends.of(replace(r, results=()))) > 1  # the result has sentences too


def test_kept_episodes_come_back_equal_and_are_not_sampled_again(llama, problems_of, tmp_path):
    text = "<think>a<calculate>6*7</calculate>b</think>42"
    script, sampling = (Script(llama, text, True),), Sampling(n=2, max_new_tokens=90)
    condition = Condition(llama, rules=script, tools=CALC)
    first = rollouts(condition, problems_of(2), sampling, out=tmp_path, progress=False)
    assert store.load_rollouts(tmp_path) == first and all(r.results for r in first)
    parts = sorted(p.name for p in tmp_path.glob("part-*"))
    assert rollouts(condition, problems_of(2), sampling, out=tmp_path, progress=False) == first
    assert sorted(p.name for p in tmp_path.glob("part-*")) == parts
    assert store.load_header(tmp_path)["interventions"][-1].startswith("tools calculate ")
    with pytest.raises(WrongModelError, match="interventions"):
        rollouts(replace(condition, tools=replace(CALC, max_calls=9)), problems_of(2), sampling, out=tmp_path, progress=False)


def test_without_tools_headers_identities_and_columns_are_those_from_before_tools(llama, rollout_of):
    assert identity.describe_interventions(Condition(llama)) == []
    assert set(identity.of(Condition(llama)).body) == {"lm", "during", "rules", "ask"}
    assert set(identity.of(Condition(llama, tools=CALC)).body) == {"lm", "during", "rules", "ask", "tools"}
    columns = list(store.rollout_table([rollout_of(3)]).columns)
    assert not any("result" in name for name in columns)


def test_the_identity_of_tools_depends_on_all_that_results_depend_on(llama):
    def named(box: Toolbox) -> str:
        return identity.describe_tools(box)

    table = "create table t (a); insert into t values (1);"
    boxes = [
        CALC,
        replace(CALC, max_calls=9),
        replace(CALC, result=Marks("[", "]")),
        Toolbox((Tool(calculate, characters=99),)),
        *(Toolbox((Tool(Database(script).sql),)) for script in (table, table + "insert into t values (2);")),
    ]
    assert len({named(box) for box in boxes}) == len(boxes)
    assert named(Toolbox((Tool(Database(table).sql),))) == named(boxes[4])


def test_the_identity_of_tools_depends_on_their_code(monkeypatch):
    def tool(body: str) -> Tool:
        space = {"__name__": "mine"}
        exec(f"def shout(words: str) -> str:\n    return {body}", space)
        return Tool(space["shout"])

    def named(t: Tool) -> str:
        return identity.describe_tools(Toolbox((t,)))

    assert named(tool("words.upper()")) == named(tool("words.upper()")) != named(tool("words.lower()"))
    before = named(Tool(calculate))
    real = store.modules_of
    monkeypatch.setattr(store, "modules_of", lambda *names: real(*names) | {"toolkit.tools.calculator": "other code"})
    assert named(Tool(calculate)) != before


def test_a_tool_that_holds_a_connection_needs_an_identity_of_its_own(tmp_path):
    with (tmp_path / "notes").open("w+") as file:

        def note(words: str) -> str:
            return words + file.name

        def named(**more) -> str:
            return identity.describe_tools(Toolbox((Tool(note, **more),)))

        with pytest.raises(identity.UnknownIdentityError, match=r"note > file: no key.*Pass Tool\(\.\.\., identity=\.\.\.\)"):
            named()
        assert named(identity="v1") == named(identity="v1") != named(identity="v2")
        assert named(identity="v1", characters=99) != named(identity="v1")


def test_a_directory_may_hold_parts_with_and_without_results(tmp_path, rollout_of):
    old, new = rollout_of(3, name="old"), replace(rollout_of(6, name="new"), results=(Span(7, 9), Span(10, 11)))
    store.append_rollouts([old], tmp_path)
    store.append_rollouts([new, rollout_of(2)], tmp_path)
    assert store.load_rollouts(tmp_path) == [old, new, rollout_of(2)]


BAD = {
    "a result in the prompt": (
        {"result_starts": [0], "result_stops": [2]},
        r"a tool result is 0\.\.2, expected a span within 3\.\.6",
    ),
    "a response that begins with a result": ({"result_starts": [2], "result_stops": [3]}, r"a tool result is 2\.\.3"),
    "a result past the end": ({"result_starts": [4], "result_stops": [7]}, r"a tool result is 4\.\.7"),
    "an empty result": ({"result_starts": [4], "result_stops": [4]}, r"a tool result is 4\.\.4"),
    "results that overlap": (
        {"result_starts": [3, 4], "result_stops": [5, 6]},
        r"a tool result is 4\.\.6, expected a span within 6\.\.6",
    ),
    "results side by side": ({"result_starts": [3, 4], "result_stops": [4, 6]}, r"a tool result is 4\.\.6"),
    "a start without a stop": ({"result_starts": [3, 4], "result_stops": [4]}, "expected two lists of one length"),
    "a number": ({"result_starts": 3, "result_stops": 4}, "expected two lists of one length"),
    "fractions": ({"result_starts": [3.5], "result_stops": [4.5]}, r"a tool result is 3\.5\.\.4\.5"),
}


@pytest.mark.parametrize("what", BAD)
def test_a_row_with_impossible_results_is_an_error_with_file_row_and_what_was_expected(what, tmp_path):
    change, message = BAD[what]
    row = Rollout("p", 0, (1, 2, 3, 4, 5, 6), 2, None, None, "stop", "", True, results=(Span(3, 4),))
    pd.DataFrame([store.rollout_table([row]).to_dict("records")[0] | change]).to_parquet(tmp_path / "part-00000.parquet")
    with pytest.raises(DamagedFileError, match=r"part-00000\.parquet, row 0: .*" + message):
        store.load_rollouts(tmp_path)


def test_a_table_with_starts_but_no_stops_is_an_error_that_names_the_column(tmp_path):
    row = Rollout("p", 0, (1, 2, 3, 4), 2, None, None, "stop", "", True, results=(Span(3, 4),))
    store.rollout_table([row]).drop(columns="result_stops").to_parquet(tmp_path / "part-00000.parquet")
    with pytest.raises(DamagedFileError, match="no column 'result_stops'"):
        store.load_rollouts(tmp_path)


def test_servers_refuse_tools_and_marks_that_are_think_tags_are_refused(llama, problems_of):
    with pytest.raises(CannotSampleError, match=r"cannot answer tool calls.*tools calculate"):
        check_unmodified(Condition(llama, tools=CALC), Sampling(), "a server")
    clash = replace(CALC, result=Marks("<think>", "</result>"))
    with pytest.raises(CannotSampleError, match="'<think>' is a think tag"):
        rollouts(Condition(llama, tools=clash), problems_of(1), Sampling(max_new_tokens=4), progress=False)


def test_rewards_see_calls_and_tokens_and_count_no_result_as_answer_or_entropy(llama, problems_of):
    problem = problems_of(1)[0]
    (inside,) = write(llama, "<think>a<calculate>6*7</calculate>b</think>42", [problem], details=True)
    (after,) = write(llama, "<think>a</think><calculate>6*7</calculate>so 7", [problem], details=True)
    (none,) = write(llama, "<think>a</think>42", [problem], details=True)
    batch = RewardBatch.from_rollouts([inside, after, none])
    assert batch["calls"].tolist() == [1, 1, 0]
    result = len(Script(llama, "<result>42</result>").ids)
    assert batch["result_tokens"].tolist() == [result, result, 0]
    assert (batch["written_tokens"] + batch["result_tokens"] == batch["tokens"]).all()
    assert batch["answer_text"].tolist() == ["42", "so 7", "42"]
    assert batch["think_tokens"].tolist() == [inside.think_tokens, 1, 1]
    for r, entropy, logprob in zip((inside, after, none), batch["think_entropy"], batch["logprob"], strict=True):
        own = [h for h, mine in zip(r.entropies, r.written, strict=True) if mine]
        closing = [t for t, mine in zip(r.token_ids[r.prompt_len :], r.written, strict=True) if mine].index(
            llama.token_id("</think>")
        )
        assert entropy == pytest.approx(sum(own[:closing]) / closing) == phase_entropy.phase_means(r).think
        assert logprob == pytest.approx(sum(r.logprobs) / r.written_tokens)


MARKS = replace(CALC, result=Marks("[[", "]]"))
UNTAGGED = ThinkTags(None, None)
ANSWERS = {
    "an answer with the default mark": (CALC, "<think>a</think><calculate>6*7</calculate>so </result> 7", "so </result> 7"),
    "an answer with other marks": (MARKS, "<think>a</think><calculate>6*7</calculate>so 7", "so 7"),
    "other marks in the answer": (MARKS, "<think>a</think><calculate>6*7</calculate>so ]] 7", "so ]] 7"),
    "no answer after the result": (CALC, "<think>a</think><calculate>6*7</calculate>", ""),
    "no thinking": (MARKS, "<calculate>6*7</calculate>so 7", "so 7"),
}


@pytest.mark.parametrize("what", ANSWERS)
def test_the_answer_is_the_text_after_the_last_result_whatever_the_marks_are(what, llama, problems_of, tmp_path):
    tools, text, answer = ANSWERS[what]
    for lm, close in ((llama, "</think>"), (replace(llama, tags=UNTAGGED), None)):
        (r,) = write(lm, text, problems_of(1), tools=tools)
        assert len(r.results) == 1
        store.append_rollouts([r], folder := tmp_path / str(close).strip("</>"))
        for kept in ([r], store.load_rollouts(folder)):
            assert RewardBatch.from_rollouts(kept, close=close)["answer_text"].tolist() == [answer]


def test_think_tokens_before_and_after_a_position_leave_results_out(llama, problems_of):
    (r,) = write(llama, "<think>ab<calculate>6*7</calculate>c.</think>42", problems_of(1))
    own = [t for t in range(r.think.start, r.think.stop) if not any(s.start <= t < s.stop for s in r.results)]
    places = positions.Positions("think tokens", lambda r: own)
    rows = collect.states(llama, [r], "resid_post", positions=places, each=True).rows
    assert rows["position"].tolist() == list(range(1, r.think_tokens + 1))
    assert rows["remaining"].tolist() == list(range(r.think_tokens - 1, -1, -1))


def test_entropies_of_responses_and_steps_leave_results_out(llama, problems_of):
    (r,) = write(llama, "<think>ab<calculate>6*7</calculate>c</think>42", problems_of(1), details=True)
    h, own = np.array(r.entropies), np.array(r.written)
    assert phase_entropy.table([r])["entropy"].tolist() == [pytest.approx(h[own].mean())]
    (result,) = r.results
    # Three steps: up to a token of the result, the rest of the result, and what follows.
    cuts = [r.think.start, result.start + 1, result.stop, r.think.stop]
    spans_ = [Span(a, b) for a, b in pairwise(cuts)]
    rows = phase_entropy.step_entropy([r], lambda r: [Step(s, str(s)) for s in spans_])
    parts = [
        h[r.think.start - r.prompt_len : result.start - r.prompt_len],
        h[result.stop - r.prompt_len : r.think.stop - r.prompt_len],
    ]
    assert rows["step"].tolist() == [0, 1] and rows["of"].tolist() == [2, 2] and rows["tokens"].sum() == r.think_tokens
    assert rows["entropy"].tolist() == pytest.approx([part.sum() for part in parts])
    assert rows["mean"].tolist() == pytest.approx([part.mean() for part in parts])


def test_a_mark_that_ends_responses_is_refused_with_the_remedy(llama, problems_of):
    # As after training in TRL: the closing mark is in generation_config.eos_token_id, which save_pretrained keeps.
    trained = replace(llama)
    trained.__dict__["eos_ids"] = frozenset({*llama.eos_ids, llama.token_id("]")})
    box = Toolbox((Tool(calculate),), {"calculate": Marks("[", "]")})
    with pytest.raises(CannotSampleError, match=r"'\]', the end of a call of calculate, .*remove its id \(\d+\) from eos_token_id"):
        rollouts(Condition(trained, tools=box), problems_of(1), Sampling(max_new_tokens=4), progress=False)
    assert len(write(llama, "[6*7]so 42", problems_of(1), tools=box)[0].results) == 1


def test_a_reward_scores_recorded_episodes_offline(llama, problems_of):
    rollouts_ = write(llama, "<think>a<calculate>6*7</calculate>b</think>42", problems_of(3))
    table = score(rollouts_, Calls())
    assert table["reward"].tolist() == [-1.0] * 3


class Calls:
    """A reward that costs 1 per call."""

    name, needs = "calls", frozenset({"calls"})

    def __call__(self, batch: RewardBatch) -> RewardValues:
        return RewardValues.sum(cost=-1.0 * batch["calls"])
