"""Chat templates: switches reach every prompt, a begun message is continued, and a template that misbehaves is refused in time."""

from __future__ import annotations

import copy
import hashlib
import json
import time
from dataclasses import replace
from datetime import datetime

import pytest
from families import family, tokenizer
from transformers.utils import chat_template_utils
from typer.testing import CliRunner

from toolkit import cli, collect, identity, origins, spans, store, templates
from toolkit import lm as lms
from toolkit.generate import Sampling, rollout_from_tokens, rollouts
from toolkit.grpo import recipes
from toolkit.grpo.run import Run, arguments
from toolkit.lm import LM
from toolkit.sites import UnsupportedModelError
from toolkit.types import Problem, Span


def run(*arguments: object):
    return CliRunner().invoke(cli.app, [str(a) for a in arguments])


OPEN = "{% if add_generation_prompt %}<|assistant|>{% endif %}"
SWITCH = (
    "{% if add_generation_prompt %}<|assistant|>"
    "{% if enable_thinking is defined and enable_thinking is false %}<think></think>{% endif %}{% endif %}"
)
LOOPS_IF_CONTINUED = (
    "{% for m in messages %}{{ m.content }}{% endfor %}{% if not add_generation_prompt and messages[-1].role == 'assistant' %}"
    "{% for a in range(99999) %}{% for b in range(99999) %}{% endfor %}{% endfor %}{% endif %}"
)
ASKED = [{"role": "user", "content": "1+2=?"}]
PROBLEM = Problem("p", tuple(ASKED), "3")


@pytest.fixture(scope="module")
def switchable(tmp_path_factory):
    """A directory whose template reads ``enable_thinking``."""
    path = family("llama").save(tmp_path_factory.mktemp("switch") / "model")
    text = (path / "chat_template.jinja").read_text()
    assert OPEN in text
    (path / "chat_template.jinja").write_text(text.replace(OPEN, SWITCH))
    return path


@pytest.fixture(scope="module")
def without(switchable) -> LM:
    return lms.load(switchable, device="cpu", template={"enable_thinking": False})


# --- switches ------------------------------------------------------------------------------------------------


def test_a_switch_is_in_every_prompt_and_spans_follow_it(switchable, without):
    usual = lms.load(switchable, device="cpu")
    assert without.text(without.prompt_ids(ASKED)) == "<|user|>1+2=?<|end|><|assistant|><think></think>"
    assert usual.text(usual.prompt_ids(ASKED)) == "<|user|>1+2=?<|end|><|assistant|>"
    (r,) = rollouts(without, [PROBLEM], Sampling(max_new_tokens=6), progress=False)
    assert r.token_ids[: r.prompt_len] == tuple(without.prompt_ids(ASKED))
    assert r.think == Span(r.prompt_len, r.prompt_len) and r.answer is not None
    assert lms.child(without, without.model, "child").prompt_ids(ASKED) == without.prompt_ids(ASKED)


def test_a_switch_is_in_provenance_and_in_the_header_of_rollouts(switchable, without, tmp_path):
    usual = lms.load(switchable, device="cpu")
    assert without.provenance(split="dev").notes == {"template": {"enable_thinking": False}, "split": "dev"}
    assert without.provenance().template_hash != usual.provenance().template_hash
    assert usual.provenance().notes == {} and without.fingerprint == usual.fingerprint
    rollouts(without, [PROBLEM], Sampling(max_new_tokens=2), out=tmp_path, progress=False)
    assert store.read_json(tmp_path / "header.json")["switches"] == {"enable_thinking": False}
    with pytest.raises(store.WrongModelError):
        rollouts(usual, [PROBLEM], Sampling(max_new_tokens=2), out=tmp_path, progress=False)


def test_moments_keep_the_switches_beside_the_problems(without, mixed_rollouts):
    for found in (
        collect.moments(without, mixed_rollouts[:4], lambda r: "all"),
        collect.moments_and_entropies(without, mixed_rollouts[:4], lambda r: "all")[0],
    ):
        assert found.provenance.notes["template"] == {"enable_thinking": False}
        assert found.provenance.notes["problem_ids"] == sorted(origins.digest(r.problem_id) for r in mixed_rollouts[:4])


@pytest.mark.parametrize("name", ["thinking", "messages", "add_generation_prompt", "eos_token"])
def test_a_switch_that_the_template_does_not_read_is_an_error(name, switchable):
    with pytest.raises(UnsupportedModelError, match=f"does not read the switch '{name}'. It reads enable_thinking."):
        lms.load(switchable, device="cpu", template={name: True})


def test_the_switches_of_known_templates_are_found():
    deepseek = "{% if not thinking is defined %}{% set thinking = false %}{% endif %}{{ bos_token }}{{ messages[0].content }}"
    gpt_oss = '{%- if reasoning_effort is not defined %}{%- set reasoning_effort = "medium" %}{%- endif %}{{ strftime_now("%Y") }}'
    assert templates.variables(deepseek) == {"thinking"}
    assert templates.variables(gpt_oss) == {"reasoning_effort", "strftime_now"}


def test_every_command_that_loads_a_model_has_the_option():
    from typer.main import get_command

    commands = get_command(cli.app).commands
    assert len(commands) > 10
    for name, command in commands.items():
        if name in ("push", "replicate"):  # the first uploads a folder, the second reads the variables from its plan
            continue
        assert "--template" in {option for parameter in command.params for option in parameter.opts}, name


def test_the_command_line_sets_a_switch_and_refuses_what_is_no_json(switchable, tmp_path):
    sizes = ("-n", "1", "-k", "1", "--max-new-tokens", "2", "--device", "cpu")
    done = run("rollouts", "-m", switchable, *sizes, "--template", "enable_thinking=false", "-o", tmp_path / "r")
    assert done.exit_code == 0, done.output
    assert store.read_json(tmp_path / "r" / "header.json")["switches"] == {"enable_thinking": False}
    wrong = run("rollouts", "-m", switchable, *sizes, "--template", "enable_thinking=False", "-o", tmp_path / "w")
    assert wrong.exit_code == 2 and "NAME=JSON" in wrong.output


def test_training_asks_as_the_model_was_loaded_and_takes_no_switches_of_its_own(without, tmp_path):
    recipe = recipes.find("correctness").scaled()
    assert arguments(without, recipe, Run(tmp_path)).chat_template_kwargs == {"enable_thinking": False}
    with pytest.raises(ValueError, match="--template NAME=JSON"):
        arguments(without, recipe, Run(tmp_path, overrides={"chat_template_kwargs": {"enable_thinking": True}}))


# --- the date ------------------------------------------------------------------------------------------------

CLOCKED = "<|user|>{% macro day() %}{{ strftime_now('%d:%m:%Y') }}{% endmacro %}{{ day() }}<|end|>"


@pytest.fixture(scope="module")
def clocked(tmp_path_factory):
    """A directory whose template prints today's date, from a macro, as that of gpt-oss does."""
    path = family("llama").save(tmp_path_factory.mktemp("clock") / "model")
    text = (path / "chat_template.jinja").read_text()
    (path / "chat_template.jinja").write_text(CLOCKED + text)
    return path


def on_the_day(monkeypatch, day: int) -> None:
    """Set the clock that transformers gives to templates."""

    class Clock(datetime):
        @classmethod
        def now(cls, tz=None):
            return cls(2031, 1, day)

    monkeypatch.setattr(chat_template_utils, "datetime", Clock)


def test_a_run_that_stopped_resumes_after_midnight(clocked, tmp_path, monkeypatch):
    problems = [PROBLEM, replace(PROBLEM, id="q")]
    prompts, made = [], []
    for day in (1, 2):
        on_the_day(monkeypatch, day)
        lm = lms.load(clocked, device="cpu")
        prompts.append(lm.text(lm.prompt_ids(ASKED)))
        made.append(rollouts(lm, problems, Sampling(max_new_tokens=2), out=tmp_path, progress=False))
    assert prompts == ["<|user|>01:01:2026<|end|><|user|>1+2=?<|end|><|assistant|>"] * 2
    assert made[0] == made[1]


def test_the_date_of_prompts_is_recorded_and_another_one_is_another_condition(clocked, tmp_path):
    usual, other = (lms.load(clocked, device="cpu", template=t) for t in (None, {"strftime_now": "2030-12-31"}))
    assert other.text(other.prompt_ids(ASKED)).startswith("<|user|>31:12:2030<|end|>")
    assert usual.provenance().notes == {"template": {"strftime_now": templates.DATE}} and templates.DATE in usual.thinking
    assert identity.of_lm(usual) != identity.of_lm(other)
    rollouts(usual, [PROBLEM], Sampling(max_new_tokens=2), out=tmp_path, progress=False)
    assert store.read_json(tmp_path / "header.json")["switches"] == {"strftime_now": templates.DATE}
    with pytest.raises(store.WrongModelError):
        rollouts(other, [PROBLEM], Sampling(max_new_tokens=2), out=tmp_path, progress=False)


def test_keys_of_a_model_whose_template_prints_no_date_depend_on_the_template_alone(switchable, llama):
    assert llama.switches == {} and llama.dated_tokenizer() is llama.tokenizer
    expected = hashlib.sha256(json.dumps(llama.tokenizer.chat_template, sort_keys=True).encode()).hexdigest()[:16]
    assert llama.provenance().template_hash == expected and llama.provenance().notes == {}


def test_training_reads_the_date_of_the_prompts(clocked, tmp_path):
    lm = lms.load(clocked, device="cpu", template={"strftime_now": "2030-12-31"})
    arguments_of = arguments(lm, recipes.find("correctness").scaled(), Run(tmp_path)).chat_template_kwargs
    rendered = lm.dated_tokenizer().apply_chat_template(ASKED, tokenize=False, add_generation_prompt=True, **arguments_of)
    assert rendered == lm.prompt_text(ASKED) and lm.tokenizer.chat_template.startswith(CLOCKED)


@pytest.mark.parametrize("form", ["%Y-%m-%d", "%d %b %Y", "%B %d, %Y", "%A, %-d %B %Y, %H:%M", "no date"])
def test_dates_are_printed_as_strftime_prints_them(form):
    dated = templates.with_date("{{ strftime_now(form) }}", "2026-11-07T09:05")
    assert chat_template_utils._compile_jinja_template(dated).render(form=form) == datetime(2026, 11, 7, 9, 5).strftime(form)


@pytest.mark.parametrize(
    "template", ["\n  {% if a %}\n x\n{% endif %}", "{{ '1' }}\n", "  {{- '1' }}", "a\n\n{# c #}\n b", "{%- set x = 1 %}\n{{ x }}"]
)
def test_nothing_but_the_date_changes_in_a_prompt(template):
    plain, dated = (chat_template_utils._compile_jinja_template(t) for t in (template, templates.with_date(template, "2026-11-07")))
    assert plain.render(a=True) == dated.render(a=True)


@pytest.mark.parametrize("date", ["today", 20261127, None, ["2026-11-27"]])
def test_a_date_that_is_none_is_refused(date, clocked):
    with pytest.raises(UnsupportedModelError, match=r'strftime_now=.*, expected a date such as "2026-11-27"'):
        lms.load(clocked, device="cpu", template={"strftime_now": date})


def test_the_help_states_the_date_of_templates():
    from typer.main import get_command

    (option,) = (p for p in get_command(cli.app).commands["rollouts"].params if p.name == "template")
    assert templates.DATE in option.help


# --- a message that is continued -----------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("begun", "response", "think", "answer"),
    [
        ("<think>12", "+3=15</think>15", "+3=15", "15"),
        ("<think>", "12</think>15", "12", "15"),
        ("<think>12+3=15</think>", "15", "", "15"),
        ("<think>12+3=15</think>1", "5", "", "5"),
        ("<think>12</think><think>3", "+1</think>5", "+1", "5"),
        ("1", "5", None, "5"),
        ("1", "<think>2</think>5", "2", "5"),
    ],
)
def test_a_begun_message_is_continued_and_its_tags_count(begun, response, think, answer, llama):
    prompt = llama.prompt_ids([*ASKED, {"role": "assistant", "content": begun}])
    assert llama.text(prompt) == f"<|user|>1+2=?<|end|><|assistant|>{begun}"
    ids = [*prompt, *llama.tokenizer.encode(response, add_special_tokens=False)]
    found = spans.spans(llama, ids, len(prompt), ended=False)
    texts = [None if span is None else llama.text(ids[span.start : span.stop]) for span in found]
    assert texts == [think, answer]
    reader = spans.Reader(llama, prompt)
    wanted = spans.ANSWER if think == "" else spans.THINK if "<think>" in begun else spans.PROMPT
    assert reader.phase == wanted


@pytest.mark.parametrize(
    ("begun", "response", "right"),
    [
        ("<think>12+3=15</think>1", "5", True),
        ("<think>12+3=15</think>", "15", True),
        ("<think>1", "</think>5", False),
        ("<think>15</think>2", "5", False),
        ("1", "5", True),
    ],
)
def test_an_answer_that_a_message_begins_is_graded_whole(begun, response, right, llama):
    problem = Problem("p", (*ASKED, {"role": "assistant", "content": begun}), "15")
    tokens = [*llama.tokenizer.encode(response, add_special_tokens=False), *llama.eos_ids][: len(response) + 1]
    for lm in (llama, replace(llama, tags=None)) if begun == "1" else (llama,):
        assert rollout_from_tokens(lm, problem, lm.prompt_ids(problem.messages), tokens).correct == right


def test_what_the_user_says_of_tags_opens_nothing_in_a_begun_message(llama):
    messages = [{"role": "user", "content": "Use <think>."}, {"role": "assistant", "content": "1"}]
    prompt = llama.prompt_ids(messages)
    assert spans.Reader(llama, prompt).phase == spans.PROMPT


def test_a_template_that_changes_the_begun_message_is_refused(llama):
    def having(text: str) -> LM:
        changed = copy.deepcopy(tokenizer())
        changed.chat_template = text
        return replace(llama, tokenizer=changed)

    messages = [*ASKED, {"role": "assistant", "content": "<think>12"}]
    turn = "{% if add_generation_prompt %}<|assistant|>{% endif %}"
    emptied = "{% for m in messages %}<|user|>{% if m.role == 'user' %}{{ m.content }}{% endif %}<|end|>{% endfor %}" + turn
    with pytest.raises(ValueError, match="changes the assistant's message '<think>12'"):
        having(emptied).prompt_ids(messages)
    trimming = (
        "{% for m in messages %}<|user|>{% if m.role == 'assistant' %}<|assistant|>{% endif %}{{ m.content | trim }}<|end|>{% endfor %}"
        + turn
    )
    assert having(trimming).prompt_text([*ASKED, {"role": "assistant", "content": "Let me"}]).endswith("Let me")
    for blank in ("Let me ", "Let me\n", " Let me"):
        with pytest.raises(ValueError, match=r"changes the assistant's message .*strip blanks"):
            having(trimming).prompt_text([*ASKED, {"role": "assistant", "content": blank}])
    qwen = (
        "{% for m in messages %}{% if m.role == 'user' %}<|user|>{{ m.content }}<|end|>"
        "{% else %}<|assistant|><think></think>{{ m.content }}<|end|>{% endif %}{% endfor %}" + turn
    )
    with pytest.raises(ValueError, match="has think tags that may not belong to the message: the chat template adds some"):
        having(qwen).prompt_ids(messages)


# --- limits --------------------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("template", "said"),
    [
        ("{% for a in range(99999) %}{% for b in range(99999) %}{% endfor %}{% endfor %}", "does not finish within 3 seconds"),
        ("{% set n = namespace(s='x') %}{% for i in range(40) %}{% set n.s = n.s ~ n.s %}{% endfor %}{{ n.s }}", "more than 1 GB"),
        ("{{ messages[0].content }}{{ 'x' * 300000 }}", "it makes a prompt of 300006 characters"),
        ("{{ 'hello' }}", "leaves out the user.s question"),
        ("{% if x %}", "TemplateSyntaxError"),
        (LOOPS_IF_CONTINUED, "does not finish within 3 seconds"),
    ],
)
def test_a_template_that_misbehaves_is_refused_in_time(template, said, tmp_path):
    path = family("llama").save(tmp_path / "model")
    (path / "chat_template.jinja").write_text(template)
    began = time.perf_counter()
    with pytest.raises(UnsupportedModelError, match=said) as caught:
        lms.load(path, device="cpu")
    assert len(str(caught.value)) <= 400 and time.perf_counter() - began < 20


def test_a_template_may_refuse_a_system_prompt():
    refusing = "{% for m in messages %}{% if m.role == 'system' %}{{ raise_exception('no') }}{% endif %}{{ m.content }}{% endfor %}"
    templates.check(refusing, {"eos_token": "x"}, {})


def test_the_template_is_the_same_bytes_after_a_save(switchable, without, tmp_path):
    saved = without.save(tmp_path / "again")
    assert (saved / "chat_template.jinja").read_text() == (switchable / "chat_template.jinja").read_text()
    assert json.loads((saved / "config.json").read_text())["model_type"] == "llama"
