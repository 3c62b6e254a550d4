"""How today's reasoning models mark their thinking: tags, what opens it, switches and earlier thoughts, on templates of each format.

The templates are short versions, written from the formats' descriptions, with the parts that decide about thinking.
"""

from __future__ import annotations

import copy
from dataclasses import dataclass, field, replace
from functools import cache
from typing import Any

import pytest
from bpe import bpe_lm, random_lm

from toolkit import spans
from toolkit.baselines import Budget
from toolkit.lm import LM, ThinkTags, UnsupportedModelError
from toolkit.spans import ANSWER, PROMPT, THINK
from toolkit.tags import FORMATS, find_tags

CHATML = (
    "{% for m in messages %}{% set text = m['content'] %}{% if m['role'] == 'assistant' and '</think>' in text %}"
    "{% set text = text.split('</think>')[-1].lstrip() %}{% endif %}<|im_start|>{{ m['role'] }}\n{{ text }}<|im_end|>\n{% endfor %}"
    "{% if add_generation_prompt %}<|im_start|>assistant\n"
)
TAGS = ("<think>", "</think>")


@dataclass(frozen=True)
class Case:
    """A chat template and what follows from it.

    Attributes:
        template: The template.
        special: Tokens of the vocabulary with an id of their own.
        phase: Phase at the end of a prompt.
        off: Switches that turn thinking off, and the phase then.
        format: Name in ``FORMATS``; ``None`` if no tags are found.
        switches: Switches that the template reads.
    """

    template: str
    special: tuple[str, ...] = TAGS
    phase: int = PROMPT
    off: tuple[dict[str, Any], int] | None = None
    format: str | None = "<think>"
    switches: frozenset[str] = field(default=frozenset())


CASES = {
    "Qwen3": Case(
        CHATML + "{% if enable_thinking is defined and enable_thinking is false %}<think>\n\n</think>\n\n{% endif %}{% endif %}",
        off=({"enable_thinking": False}, ANSWER), switches=frozenset({"enable_thinking"}),
    ),
    "Qwen3.5": Case(
        CHATML + "{% if enable_thinking is defined and enable_thinking is false %}<think>\n\n</think>\n\n{% else %}<think>\n{% endif %}{% endif %}",
        phase=THINK, off=({"enable_thinking": False}, ANSWER), switches=frozenset({"enable_thinking"}),
    ),
    "Qwen3.5, small": Case(
        CHATML + "{% if enable_thinking is defined and enable_thinking is true %}<think>\n{% else %}<think>\n\n</think>\n\n{% endif %}{% endif %}",
        phase=ANSWER, switches=frozenset({"enable_thinking"}),
    ),
    "DeepSeek-R1": Case(
        "{{ bos_token }}{% for m in messages %}{% if m['role'] == 'user' %}<｜User｜>{{ m['content'] }}{% else %}<｜Assistant｜>"
        "{{ m['content'].split('</think>')[-1] }}<｜end▁of▁sentence｜>{% endif %}{% endfor %}{% if add_generation_prompt %}<｜Assistant｜><think>\n{% endif %}",
        special=(*TAGS, "<｜User｜>", "<｜Assistant｜>"), phase=THINK,
    ),
    "DeepSeek-V3.1": Case(
        "{% for m in messages %}{% if m['role'] == 'user' %}<｜User｜>{{ m['content'] }}{% else %}<｜Assistant｜></think>{{ m['content'] }}"
        "<｜end▁of▁sentence｜>{% endif %}{% endfor %}{% if add_generation_prompt %}<｜Assistant｜>{% if thinking %}<think>{% else %}</think>{% endif %}{% endif %}",
        special=(*TAGS, "<｜User｜>", "<｜Assistant｜>"), phase=ANSWER, switches=frozenset({"thinking"}),
    ),
    "gpt-oss": Case(
        "<|start|>system<|message|>Reasoning: {{ reasoning_effort if reasoning_effort is defined else 'medium' }}\n"
        "# Valid channels: analysis, commentary, final.<|end|>{% for m in messages %}{% if m['role'] == 'assistant' %}"
        "<|start|>assistant<|channel|>final<|message|>{{ m['content'] }}<|end|>{% else %}<|start|>{{ m['role'] }}<|message|>{{ m['content'] }}<|end|>"
        "{% endif %}{% endfor %}{% if add_generation_prompt %}<|start|>assistant{% endif %}",
        special=("<|start|>", "<|end|>", "<|message|>", "<|channel|>", "<|return|>"), format="gpt-oss", switches=frozenset({"reasoning_effort"}),
    ),
    "Gemma 4": Case(
        "{% if enable_thinking is defined and enable_thinking %}<|turn>system\n<|think|><turn|>\n{% endif %}{% for m in messages %}"
        "<|turn>{{ 'model' if m['role'] == 'assistant' else m['role'] }}\n{{ m['content'] }}<turn|>\n{% endfor %}{% if add_generation_prompt %}<|turn>model\n"
        "{% if not (enable_thinking is defined and enable_thinking) %}<|channel>thought\n<channel|>{% endif %}{% endif %}",
        special=("<|turn>", "<turn|>", "<|channel>", "<channel|>", "<|think|>"), phase=ANSWER, format="Gemma 4", switches=frozenset({"enable_thinking"}),
    ),
    "Magistral": Case(
        "{% if messages[0]['role'] == 'system' %}{% set system = messages[0]['content'] %}{% else %}{% set system = 'First draft your thinking: "
        "[THINK]your thoughts[/THINK]' %}{% endif %}[SYSTEM_PROMPT]{{ system }}[/SYSTEM_PROMPT]{% for m in messages %}{% if m['role'] == 'user' %}"
        "[INST]{{ m['content'] }}[/INST]{% elif m['role'] == 'assistant' %}{{ m['content'] }}</s>{% endif %}{% endfor %}",
        special=("[THINK]", "[/THINK]", "[INST]", "[/INST]"), format="Magistral",
    ),
    "Seed-OSS": Case(
        "{% for m in messages %}<seed:bos>{{ m['role'] }}\n{{ m['content'] }}<seed:eos>{% endfor %}{% if thinking_budget is defined and thinking_budget > 0 %}"
        "<seed:bos>system\nThink with at most {{ thinking_budget }} tokens.<seed:eos>{% endif %}{% if add_generation_prompt %}<seed:bos>assistant\n"
        "{% if thinking_budget is defined and thinking_budget == 0 %}<seed:think><seed:cot_budget_reflect>{% endif %}{% endif %}",
        special=("<seed:think>", "</seed:think>", "<seed:bos>", "<seed:eos>"), format="Seed-OSS", switches=frozenset({"thinking_budget"}),
    ),
    "GLM-4.5": Case(
        "[gMASK]<sop>{% for m in messages %}<|{{ m['role'] }}|>\n{% if m['role'] == 'assistant' %}<think></think>\n{% endif %}{{ m['content'] }}"
        "{% if m['role'] == 'user' and enable_thinking is defined and not enable_thinking %}/nothink{% endif %}{% endfor %}"
        "{% if add_generation_prompt %}<|assistant|>{% if enable_thinking is defined and not enable_thinking %}\n<think></think>{% endif %}{% endif %}",
        special=(*TAGS, "<|user|>", "<|assistant|>"), off=({"enable_thinking": False}, ANSWER), switches=frozenset({"enable_thinking"}),
    ),
    "SmolLM3": Case(
        "<|im_start|>system\nReasoning Mode: {{ '/no_think' if enable_thinking is defined and not enable_thinking else '/think' }}<|im_end|>\n"
        + CHATML + "{% if enable_thinking is defined and not enable_thinking %}<think>\n\n</think>\n{% endif %}{% endif %}",
        special=("<|im_start|>", "<|im_end|>"), off=({"enable_thinking": False}, ANSWER), switches=frozenset({"enable_thinking"}),
    ),
    "Granite 3.3": Case(
        "{% if thinking is defined and thinking %}<|start_of_role|>system<|end_of_role|>Write your thoughts between <think></think> and your answer "
        "between <response></response>.<|end_of_text|>\n{% endif %}{% for m in messages %}<|start_of_role|>{{ m['role'] }}<|end_of_role|>{{ m['content'] }}"
        "<|end_of_text|>\n{% endfor %}{% if add_generation_prompt %}<|start_of_role|>assistant<|end_of_role|>{% endif %}",
        special=("<|start_of_role|>", "<|end_of_role|>"), switches=frozenset({"thinking"}),
    ),
    "Phi-4-reasoning": Case(
        "<|im_start|>system<|im_sep|>Structure your response into <think> {Thought} </think> {Solution}.<|im_end|>{% for m in messages %}"
        "<|im_start|>{{ m['role'] }}<|im_sep|>{{ m['content'] }}<|im_end|>{% endfor %}{% if add_generation_prompt %}<|im_start|>assistant<|im_sep|>{% endif %}",
        special=(*TAGS, "<|im_start|>", "<|im_sep|>", "<|im_end|>"),
    ),
    "Nemotron Nano 2": Case(
        "{% set ns = namespace(think=true) %}{% for m in messages %}{% if '/no_think' in m['content'] %}{% set ns.think = false %}{% endif %}{% endfor %}"
        "{% for m in messages %}<SPECIAL_11>{{ m['role'] }}\n{{ m['content'] }}<SPECIAL_12>\n{% endfor %}{% if add_generation_prompt %}<SPECIAL_11>Assistant\n"
        "{% if ns.think %}<think>\n{% else %}<think></think>{% endif %}{% endif %}",
        special=(*TAGS, "<SPECIAL_11>", "<SPECIAL_12>"), phase=THINK,
    ),
    # The template never contains the closing tag, and the vocabulary has neither tag as a token.
    "OLMo 3 Think": Case(
        "{% set has_system = messages|selectattr('role', 'equalto', 'system')|list|length > 0 %}{% if not has_system %}<|im_start|>system\nYou are "
        "a helpful assistant.<|im_end|>\n{% endif %}{% for m in messages %}<|im_start|>{{ m['role'] }}\n{{ m['content'] }}<|im_end|>\n"
        "{% if loop.last and add_generation_prompt %}{{ '<|im_start|>assistant\\n<think>' }}{% endif %}{% endfor %}",
        special=("<|im_start|>", "<|im_end|>"), phase=THINK,
    ),
    "no tags": Case(
        "{% for m in messages %}<|im_start|>{{ m['role'] }}\n{{ m['content'] }}<|im_end|>\n{% endfor %}{% if add_generation_prompt %}<|im_start|>assistant\n{% endif %}",
        special=(), phase=ANSWER, format=None,
    ),
}  # fmt: skip
QUESTION = [{"role": "user", "content": "12+3=?"}]


@cache
def model(name: str) -> LM:
    case = CASES[name]
    tokenizer = copy.deepcopy(bpe_lm().tokenizer)
    tokenizer.add_special_tokens({"additional_special_tokens": list(case.special), "bos_token": "<|start|>"})
    tokenizer.chat_template = case.template
    return random_lm(tokenizer, name=name)


def response(lm: LM, text: str) -> list[int]:
    return lm.tokenizer.encode(text, add_special_tokens=False)


@pytest.mark.parametrize("name", CASES)
def test_the_tags_are_found_from_template_and_vocabulary_and_described_in_a_sentence(name):
    lm, case = model(name), CASES[name]
    assert lm.tags == (FORMATS[case.format].tags if case.format else None)
    told = lm.thinking
    if case.format is None:
        assert "no think tags found" in told
        return
    assert repr(lm.tags.open) in told and repr(lm.tags.close) in told
    opens = {THINK: "the prompt opens it", ANSWER: "the prompt closes it", PROMPT: "the model opens it"}[case.phase]
    assert opens in told and all(switch in told for switch in case.switches)


@pytest.mark.parametrize("name", CASES)
def test_the_phase_at_the_end_of_a_prompt_is_read_off_its_tokens(name):
    lm, case = model(name), CASES[name]
    assert spans.phase_at_end(lm, lm.prompt_ids(QUESTION)) == case.phase
    if case.off is not None:
        switches, phase = case.off
        off = replace(lm, template=switches)
        assert spans.phase_at_end(off, off.prompt_ids(QUESTION)) == phase


@pytest.mark.parametrize("name", [name for name, case in CASES.items() if case.format])
@pytest.mark.parametrize("ended", [True, False])
def test_thinking_and_answer_are_split_at_the_tags_of_the_format(name, ended):
    lm, case = model(name), CASES[name]
    prompt, thought, answer = lm.prompt_ids(QUESTION), "Twelve and three.", "15"
    opening = lm.tags.open if case.phase == PROMPT else ""
    if case.phase == ANSWER:
        ids = [*prompt, *response(lm, answer)]
        think, reply = spans.spans(lm, ids, len(prompt), ended=False)
        assert len(think) == 0 and lm.text(ids[reply.start : reply.stop]) == answer
        return
    ids = [*prompt, *response(lm, f"{opening}{thought}{lm.tags.close}{answer}")]
    ids += [lm.tokenizer.eos_token_id] * ended
    think, reply = spans.spans(lm, ids, len(prompt), ended=ended)
    assert lm.text(ids[think.start : think.stop]).strip() == thought
    assert lm.text(ids[reply.start : reply.stop]).strip() == answer


def test_thoughts_of_earlier_turns_are_not_those_of_this_one():
    for name in ("Qwen3", "DeepSeek-R1"):
        lm = model(name)
        turns = [*QUESTION, {"role": "assistant", "content": "<think>old</think>15"}, {"role": "user", "content": "And 1 more?"}]
        ids = lm.prompt_ids(turns)
        assert "old" not in lm.text(ids) and spans.phase_at_end(lm, ids) == CASES[name].phase


def test_all_messages_of_gpt_oss_before_the_final_one_are_thinking():
    lm = model("gpt-oss")
    prompt = lm.prompt_ids(QUESTION)
    text = "<|channel|>analysis<|message|>First.<|end|><|start|>assistant<|channel|>analysis<|message|>Second."
    ids = [*prompt, *response(lm, f"{text}<|end|><|start|>assistant<|channel|>final<|message|>15")]
    think, answer = spans.spans(lm, ids, len(prompt), ended=False)
    thought = lm.text(ids[think.start : think.stop])
    assert thought.startswith("First.") and thought.endswith("Second.") and lm.text(ids[answer.start : answer.stop]) == "15"


def test_a_budget_closes_thinking_with_the_whole_closing_tag_of_the_format():
    lm = model("gpt-oss")
    reader = spans.Reader(lm, lm.prompt_ids(QUESTION))
    rule = Budget(2)
    for token in response(lm, "<|channel|>analysis<|message|>"):
        reader.push(token)
    assert reader.phase == THINK
    for token in response(lm, "a b"):
        reader.push(token)
    forced = rule(lm, reader, response(lm, " c")[0])
    assert lm.text(forced).endswith("<|channel|>final<|message|>")
    for token in forced:
        reader.push(token)
    assert reader.phase == ANSWER


def test_a_response_of_gpt_oss_without_thoughts_is_all_answer_and_its_header_is_no_part_of_it():
    lm = model("gpt-oss")
    prompt = lm.prompt_ids(QUESTION)
    ids = [*prompt, *response(lm, "<|channel|>final<|message|>15")]
    think, answer = spans.spans(lm, ids, len(prompt), ended=False)
    assert len(think) == 0 and lm.text(ids[answer.start : answer.stop]) == "15"


def test_a_budget_that_meets_a_closing_tag_half_written_places_only_the_rest():
    lm = model("gpt-oss")
    reader = spans.Reader(lm, lm.prompt_ids(QUESTION))
    begun = response(lm, "<|channel|>analysis<|message|>abc<|end|><|start|>")
    for token in begun:
        reader.push(token)
    forced = Budget(2)(lm, reader, response(lm, "x")[0])
    assert lm.text([*begun, *forced]) == "<|channel|>analysis<|message|>abc<|end|><|start|>assistant<|channel|>final<|message|>"


@pytest.mark.parametrize(
    ("text", "expected"),
    [("<think>", "<think>"), ("[THINK]", "Magistral"), ("</seed:think>", "Seed-OSS"), ("<|channel>", None), ("<thinking>", None)],
)
def test_one_tag_in_a_template_tells_the_format(text, expected):
    tokenizer = copy.deepcopy(bpe_lm().tokenizer)
    tokenizer.chat_template = tokenizer.chat_template + "{% if add_generation_prompt %}" + text + "{% endif %}"
    assert find_tags(tokenizer) == (FORMATS[expected].tags if expected else None)


def test_two_formats_in_one_template_are_an_error_that_names_both_and_the_remedy():
    tokenizer = copy.deepcopy(model("Magistral").tokenizer)
    tokenizer.chat_template = CASES["Magistral"].template + "{# <think> </think> #}"
    with pytest.raises(UnsupportedModelError, match=r"<think>.* or Magistral \('\[THINK\]'.*tags=ThinkTags.*--think") as caught:
        random_lm(tokenizer, name="both")
    assert len(str(caught.value)) <= 400
    from toolkit import lm as lms

    chosen = lms.wrap(model("Magistral").model, tokenizer, name="both", tags=ThinkTags("[THINK]", "[/THINK]"))
    assert chosen.tags.open == "[THINK]"
