"""Think spans, decided once and by token ids: every way in which models open, close, skip or never mark their thinking."""

from __future__ import annotations

import copy
from contextlib import contextmanager
from dataclasses import dataclass, replace

import pytest
import torch
from tokenizers import Tokenizer, decoders, models, pre_tokenizers
from transformers import PreTrainedTokenizerFast

from toolkit import hooks
from toolkit.generate import Sampling, rollouts
from toolkit.lm import LM, Condition, ThinkTags
from toolkit.sites import Site
from toolkit.spans import spans
from toolkit.types import Problem, Span

END = "<|end|>"
PROMPT = "<|user|>1+2=?<|end|><|assistant|>"
USUAL = ThinkTags()
R1, EMPTY = "<think>\n", "<think>\n\n</think>\n\n"


@dataclass(frozen=True)
class Case:
    """What is prompted and said, and the texts of the spans that have to be found (``None``: no such span)."""

    prompt: str
    response: str
    think: str | None
    answer: str | None
    tags: ThinkTags | None = USUAL


CASES = {
    "generated tags": Case(PROMPT, "<think>ab</think>cd" + END, "ab", "cd"),
    "generated tags after blanks": Case(PROMPT, "\n <think>ab</think>cd" + END, "ab", "cd"),
    "newlines belong to the spans": Case(PROMPT, "<think>\nab\n</think>\n\ncd" + END, "\nab\n", "\n\ncd"),
    "prefilled by the template": Case(PROMPT + R1, "ab</think>cd" + END, "ab", "cd"),
    "prefilled without a newline": Case(PROMPT + "<think>", "ab</think>cd" + END, "ab", "cd"),
    "prefilled and opened once more": Case(PROMPT + R1, "a<think>b</think>cd" + END, "a<think>b", "cd"),
    "switched off, Qwen 3": Case(PROMPT + EMPTY, "cd" + END, "", "cd"),
    "switched off without blanks": Case(PROMPT + "<think></think>", "cd" + END, "", "cd"),
    "several closing tags": Case(PROMPT, "<think>ab</think>c</think>d" + END, "ab", "c</think>d"),
    "two think blocks": Case(PROMPT, "<think>a</think>b<think>c</think>d" + END, "a", "b<think>c</think>d"),
    "opened twice": Case(PROMPT, "<think>a<think>b</think>c" + END, "a<think>b", "c"),
    "empty thinking": Case(PROMPT, "<think></think>cd" + END, "", "cd"),
    "empty answer": Case(PROMPT, "<think>ab</think>" + END, "ab", ""),
    "closed, then out of budget": Case(PROMPT, "<think>ab</think>c", "ab", "c"),
    "never closed, out of budget": Case(PROMPT, "<think>abcd", "abcd", None),
    "never closed, yet ended": Case(PROMPT, "<think>abcd" + END, "abcd", None),
    "never closed, prefilled": Case(PROMPT + R1, "abcd", "abcd", None),
    "out of budget at once": Case(PROMPT, "<think>", "", None),
    "never opened": Case(PROMPT, "cd" + END, None, "cd"),
    "never opened, out of budget": Case(PROMPT, "cd", None, "cd"),
    "closed without opening": Case(PROMPT, "ab</think>cd" + END, "ab", "cd"),
    "an earlier turn's tags": Case("<|user|>x<|end|><|assistant|><think>q</think>r<|end|>" + PROMPT, "<think>ab</think>cd" + END, "ab", "cd"),
    "an earlier turn's tags, prefilled": Case("<think>q</think>r" + PROMPT + R1, "ab</think>cd" + END, "ab", "cd"),
    "the user speaks of both tags": Case("Think in <think> </think> please." + PROMPT, "<think>ab</think>c" + END, "ab", "c"),
    "the user speaks of the opening tag": Case("Start with <think> please." + PROMPT, "<think>ab</think>c" + END, "ab", "c"),
    "the user speaks of the opening tag, never opened": Case("Start with <think> please." + PROMPT, "cd" + END, None, "cd"),
    "thinking begun by the prompt": Case(PROMPT + R1 + "Okay, ", "ab</think>c" + END, "ab", "c"),
    "the user speaks of the closing tag": Case("Mind </think> please." + PROMPT, "<think>ab</think>c" + END, "ab", "c"),
    "custom tags of several tokens": Case(PROMPT, "((ab))cd" + END, "ab", "cd", ThinkTags("((", "))")),
    "custom tags, prefilled": Case(PROMPT + "((", "ab))cd" + END, "ab", "cd", ThinkTags("((", "))")),
    "custom tags, switched off": Case(PROMPT + "((\n))\n", "cd" + END, "", "cd", ThinkTags("((", "))")),
    "custom tags, never closed": Case(PROMPT, "((ab)cd", "ab)cd", None, ThinkTags("((", "))")),
    "custom tags, several closings": Case(PROMPT, "((ab))c))d" + END, "ab", "c))d", ThinkTags("((", "))")),
    "a word as closing tag only": Case(PROMPT, "abAnswer: cd" + END, "ab", " cd", ThinkTags(None, "Answer:")),
    "closing tag only, in the prompt too": Case("Answer: " + PROMPT, "abAnswer: cd" + END, "ab", " cd", ThinkTags(None, "Answer:")),
    "closing tag only, never": Case(PROMPT, "abcd", "abcd", None, ThinkTags(None, "Answer:")),
    "response mode": Case(PROMPT, "<think>ab</think>cd" + END, "<think>ab</think>cd", "<think>ab</think>cd", ThinkTags(None, None)),
    "response mode, out of budget": Case(PROMPT, "abcd", "abcd", None, ThinkTags(None, None)),
    "no tags known": Case(PROMPT, "<think>ab</think>cd" + END, None, "<think>ab</think>cd", None),
}  # fmt: skip


@pytest.mark.parametrize("name", CASES)
def test_spans_are_what_a_reader_would_mark(name, llama):
    case = CASES[name]
    lm = replace(llama, tags=case.tags)
    prompt, response = (lm.tokenizer.encode(text, add_special_tokens=False) for text in (case.prompt, case.response))
    think, answer = spans(lm, prompt + response, len(prompt), ended=case.response.endswith(END))

    def text(span: Span | None) -> str | None:
        return None if span is None else lm.tokenizer.decode((prompt + response)[span.start : span.stop])

    assert (text(think), text(answer)) == (case.think, case.answer)
    for span in (think, answer):
        assert span is None or len(prompt) <= span.start <= span.stop <= len(prompt + response)


def test_a_tag_that_shares_its_last_token_with_what_follows_keeps_that_token_to_itself(llama):
    """Byte-pair vocabularies hold '>' and two newlines as one token; the tag ends inside it."""
    vocab = {piece: i for i, piece in enumerate(["[end]", "<", "/", "think", ">", ">\n\n", "a", "b"])}
    tokenizer = PreTrainedTokenizerFast(tokenizer_object=Tokenizer(models.WordLevel(vocab, unk_token="[end]")))
    tokenizer.backend_tokenizer.decoder = decoders.Fuse()
    lm = replace(llama, tokenizer=tokenizer, tags=ThinkTags())
    ids = [vocab[p] for p in ["a", "<", "think", ">", "a", "b", "<", "/", "think", ">\n\n", "b", "[end]"]]
    assert spans(lm, ids, 1, ended=True) == (Span(4, 6), Span(10, 11))
    # The same when it opens: the shared token counts as tag.
    ids[3] = vocab[">\n\n"]
    assert spans(lm, ids, 1, ended=True) == (Span(4, 6), Span(10, 11))


def test_a_tag_of_two_words_is_found_where_tokens_carry_their_blank_in_front(llama):
    """Sentencepiece vocabularies (Llama 2, Gemma, Phi-3) mark the blank before a word; a lone token decodes without it."""
    vocab = {piece: i for i, piece in enumerate(["[end]", "▁Final", "▁Answer", ":", "▁so", "▁4"])}
    backend = Tokenizer(models.WordLevel(vocab, unk_token="[end]"))
    backend.pre_tokenizer, backend.decoder = pre_tokenizers.Metaspace(), decoders.Metaspace()
    tokenizer = PreTrainedTokenizerFast(tokenizer_object=backend)
    lm = replace(llama, tokenizer=tokenizer, tags=ThinkTags(None, "Final Answer:"))
    ids = [vocab[p] for p in ["▁so", "▁so", "▁4", "▁Final", "▁Answer", ":", "▁4", "[end]"]]
    assert tokenizer.decode(ids[1:-1]) == "so 4 Final Answer: 4"
    assert spans(lm, ids, 1, ended=True) == (Span(1, 3), Span(6, 7))


# --- through the whole engine --------------------------------------------------------------------------------


@contextmanager
def speaking(lm: LM, prompt_len: int, response: list[int]):
    """The model says ``response``, token by token, whatever it is asked (by a raw hook on its logits)."""

    def hook(module, args, kwargs, output):
        at = kwargs["position_ids"][:, -1] + 1 - prompt_len
        output.logits.fill_(-30.0)
        for row, step in enumerate(at.tolist()):
            output.logits[row, -1, response[min(step, len(response) - 1)]] = 30.0
        return output

    handle = lm.model.register_forward_hook(hook, with_kwargs=True)
    try:
        yield
    finally:
        handle.remove()


def said(lm: LM, response: str, problem: Problem, budget: int = 64, **changes):
    ids = lm.tokenizer.encode(response, add_special_tokens=False)
    with speaking(lm, len(lm.prompt_ids(problem.messages)), ids):
        return rollouts(lm, [problem], replace(Sampling(max_new_tokens=budget), **changes), progress=False)[0]


SUM = Problem("p", ({"role": "user", "content": "1+2=?"},), "3")


def with_template(lm: LM, tail: str) -> LM:
    tokenizer = copy.deepcopy(lm.tokenizer)
    tokenizer.chat_template = tokenizer.chat_template.replace("<|assistant|>{% endif %}", f"<|assistant|>{tail}{{% endif %}}")
    assert lm.tokenizer.chat_template != tokenizer.chat_template
    return replace(lm, tokenizer=tokenizer)


@pytest.mark.parametrize(
    ("tail", "response", "think"),
    [
        ("", "<think>1+2=3</think>3<|end|>", 5),
        ("<think>\\n", "1+2=3</think>3<|end|>", 5),
        (EMPTY.replace("\n", "\\n"), "3<|end|>", 0),
    ],
    ids=["generated", "prefilled", "switched off"],
)
def test_one_engine_serves_tags_generated_prefilled_and_switched_off(tail, response, think, llama):
    lm = with_template(llama, tail) if tail else llama
    rollout = said(lm, response, SUM)
    assert (rollout.think_tokens, rollout.closed, rollout.finish, rollout.correct) == (think, True, "stop", True)
    assert lm.tokenizer.decode(rollout.token_ids[rollout.answer.start : rollout.answer.stop]) == "3"
    assert rollout.text == response
    assert rollout.prompt_len == len(lm.prompt_ids(SUM.messages))


def test_out_of_budget_while_thinking_is_an_open_span_that_finished_by_length(llama):
    rollout = said(llama, "<think>" + "1+2=3" * 20, SUM, budget=17)
    assert (rollout.finish, rollout.closed, rollout.answer, rollout.correct) == ("length", False, None, False)
    assert rollout.think == Span(rollout.prompt_len + 1, rollout.prompt_len + 17)
    assert rollout.response_tokens == 17


def test_ended_without_closing_is_open_and_finished_by_stop(llama):
    rollout = said(llama, "<think>1+2=3<|end|>", SUM)
    assert (rollout.finish, rollout.closed, rollout.correct) == ("stop", False, False)
    assert rollout.think_tokens == 5


def test_the_grade_looks_at_the_answer_only_not_at_the_thinking(llama):
    assert not said(llama, "<think>3</think>4<|end|>", SUM).correct
    assert said(llama, "<think>4</think>3<|end|>", SUM).correct


def test_any_end_of_sequence_id_of_the_generation_config_stops(llama, monkeypatch):
    """'~' is a second end-of-sequence token: it ends the response and belongs to no span."""
    second = llama.tokenizer.convert_tokens_to_ids("~")
    config = copy.deepcopy(llama.model.generation_config)
    config.eos_token_id = [second, 4]
    monkeypatch.setattr(llama.model, "generation_config", config)
    lm = replace(llama)
    assert lm.eos_ids == {second, 4}
    for end in ("~", "<|end|>"):
        rollout = said(lm, "<think>12</think>3" + end + "abc", SUM)
        assert (rollout.finish, rollout.correct, rollout.response_tokens) == ("stop", True, 6)
        assert lm.tokenizer.decode(rollout.token_ids[rollout.answer.start :]) == "3" + end
    assert said(llama, "<think>12</think>3~<|end|>", SUM).response_tokens == 7


def test_a_model_without_any_end_of_sequence_id_runs_to_its_budget(llama):
    lm = replace(llama)
    lm.__dict__["eos_ids"] = frozenset()
    rollout = said(lm, "<think>12</think>3<|end|>4", SUM, budget=12)
    assert (rollout.finish, rollout.response_tokens) == ("length", 12)


# --- predictor positions -------------------------------------------------------------------------------------


def test_predictors_are_one_to_the_left():
    assert Span(3, 7).predictors() == Span(2, 6)
    assert len(Span(3, 7).predictors()) == len(Span(3, 7)) == 4
    with pytest.raises(ValueError, match="starts at position 0"):
        Span(0, 3).predictors()


@pytest.mark.parametrize(("start", "stop"), [(-1, 2), (3, 2)])
def test_a_span_that_runs_backwards_is_refused(start, stop):
    with pytest.raises(ValueError, match=f"start={start}, stop={stop}"):
        Span(start, stop)


@torch.no_grad()
def test_states_at_the_predictors_are_those_that_cached_decoding_drew_the_spans_tokens_from(any_lm):
    """Record the last block while decoding with a cache: state k drew think token k, and it is the teacher-forced state at
    predictor k. One position to either side it is not."""
    lm, site = any_lm, Site("resid_post", any_lm.layout.n_layers - 1)
    states = []

    class Watch:
        def __str__(self) -> str:
            return "watch"

        def __call__(self, lm: LM):
            return hooks.observe(lm.layout, {site: lambda value: states.append(value[:, -1].clone())})

    response = lm.tokenizer.encode("<think>12+34=46\n</think>46<|end|>", add_special_tokens=False)
    with speaking(lm, len(lm.prompt_ids(SUM.messages)), response):
        sampling = Sampling(max_new_tokens=len(response))
        rollout = rollouts(Condition(lm, (Watch(),)), [SUM], sampling, progress=False)[0]
    assert rollout.think_tokens == 9
    with hooks.record(lm.layout, [site]) as values:
        lm.model(input_ids=torch.tensor([rollout.token_ids]))
    # The state that drew response token i is the i-th that was seen (prefill gives the 0th).
    first = rollout.think.start - rollout.prompt_len
    drew = torch.cat(states)[first : first + rollout.think_tokens]
    where = rollout.think.predictors()
    forced = values[site][0]
    scale = forced.abs().max()
    assert (drew - forced[where.start : where.stop]).abs().max() < 1e-4 * scale
    assert (drew - forced[where.start + 1 : where.stop + 1]).abs().max() > 1e-2 * scale
    assert (drew - forced[where.start - 1 : where.stop - 1]).abs().max() > 1e-2 * scale


def test_think_tags_are_parsed():
    assert ThinkTags.parse("response") == ThinkTags(None, None)
    assert ThinkTags.parse("<a>,</a>") == ThinkTags("<a>", "</a>")
    assert ThinkTags.parse(",</a>") == ThinkTags(None, "</a>")
    for bad in ("<a>", "<a>,", "a,b,c"):
        with pytest.raises(ValueError, match=r'give "response", or the two tags'):
            ThinkTags.parse(bad)


@pytest.mark.parametrize("tags", [("<a>", None), ("", None), ("", "</a>"), ("<a>", "")])
def test_an_opening_tag_needs_a_closing_one_and_no_tag_is_empty(tags):
    """An opening tag alone would be two things: thinking without an end, and a response that counts as thinking as a whole."""
    with pytest.raises(ValueError, match=r"expected an opening and a closing tag that are not empty, a closing tag alone"):
        ThinkTags(*tags)
