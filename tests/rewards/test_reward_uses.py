"""Rewards in their other two uses: batches and tables of rollouts that exist, and TRL's trainer."""

from __future__ import annotations

import copy
import pickle
from dataclasses import dataclass, replace
from types import SimpleNamespace

import numpy as np
import pandas as pd
import pytest
import torch
from batches import every_reward
from numpy.testing import assert_allclose

from toolkit import figures, generate, lm, rewards, tasks
from toolkit.generate import Sampling
from toolkit.methods import phase_entropy
from toolkit.rewards import MissingColumnError, RewardBatch, as_trl
from toolkit.rewards.correctness import Correctness
from toolkit.rewards.cosine import Cosine
from toolkit.rewards.grpo_lambda import GRPOLambda
from toolkit.rewards.hapo import HAPO
from toolkit.rewards.l1 import L1Max
from toolkit.rewards.laser import Laser, LaserD, Outcome
from toolkit.rewards.laser_targets import TargetSettings
from toolkit.rewards.longwriter import LongWriter
from toolkit.rewards.overlong import Overlong
from toolkit.rewards.repetition import RepetitionPenalty
from toolkit.rewards.ruler import Ruler
from toolkit.rewards.slpo import SLPO
from toolkit.rewards.surrogate import Surrogate
from toolkit.rewards.train_long_think_short import TrainLongThinkShort
from toolkit.tags import ThinkTags
from toolkit.types import Problem, Rollout, Span


@pytest.fixture(scope="module")
def reasoner():
    return lm.load("tiny-reasoner")


@pytest.fixture(scope="module")
def problems():
    return tasks.load("arithmetic", "train", n=12)


@pytest.fixture(scope="module")
def found(reasoner, problems):
    return generate.rollouts(reasoner, problems, Sampling(n=4, max_new_tokens=120, details=True))


# --- offline -------------------------------------------------------------------------------------------------


def test_a_batch_of_rollouts_carries_what_they_say(found, problems):
    batch = RewardBatch.from_rollouts(found, problems, step=3, split="eval")
    assert (len(batch), batch.step, batch.split) == (48, 3, "eval")
    assert batch.groups.tolist() == [i // 4 for i in range(48)]
    for i, r in enumerate(found):
        ids = batch["token_ids"][i]
        assert ids == r.token_ids[r.prompt_len :] and len(ids) == batch["tokens"][i] and batch["text"][i] == r.text
        assert_allclose(batch["logprob"][i], np.mean(r.logprobs))
    assert batch["correct"].tolist() == [r.correct for r in found]
    assert batch["difficulty"].tolist() == [p.meta["difficulty"] for p in problems for _ in range(4)]


def test_phase_entropies_are_those_of_the_method(found):
    batch = RewardBatch.from_rollouts(found)
    means = [phase_entropy.phase_means(r) for r in found]
    assert_allclose(batch["think_entropy"], [np.nan if m.think is None else m.think for m in means])
    assert_allclose(batch["answer_entropy"], [np.nan if m.answer is None else m.answer for m in means])


@pytest.mark.parametrize(
    ("think", "answer", "means"),
    [
        (Span(2, 4), Span(5, 10), (np.nan, 2.5)),  # the prompt closes thinking and begins the answer
        (Span(2, 6), Span(6, 10), (np.nan, 2.5)),  # the prompt closes thinking
        (Span(2, 7), Span(8, 10), (1.0, 3.5)),  # the prompt begins thinking
    ],
)
def test_entropies_of_a_prefilled_response_are_those_of_its_own_tokens(think, answer, means):
    """Of 10 tokens, 6 are the prompt: a span that begins there must not count from the response's end."""
    r = Rollout("p", 0, tuple(range(10)), 6, think, answer, "stop", "x", True, entropies=(1.0, 2.0, 3.0, 4.0))
    batch, method = RewardBatch.from_rollouts([r]), phase_entropy.phase_means(r)
    assert_allclose((batch["think_entropy"][0], batch["answer_entropy"][0]), means)
    assert_allclose([np.nan if m is None else m for m in (method.think, method.answer)], means)


def test_columns_that_some_rollouts_lack_are_left_out(found, problems):
    batch = RewardBatch.from_rollouts([*found[:3], replace(found[3], logprobs=None, entropies=None)])
    assert not {"logprob", "think_entropy", "difficulty"} & set(batch.columns)
    with pytest.raises(ValueError, match="not among the problems given"):
        RewardBatch.from_rollouts(found, problems[1:])
    with pytest.raises(ValueError, match="No rollouts"):
        RewardBatch.from_rollouts([])


def test_a_response_is_well_formed_if_an_answer_follows_a_closed_think_span(found):
    """As LASER and Train Long, Think Short have it: without think tags a response is malformed, unless the model has none."""
    closed = next(r for r in found if r.answer and len(r.answer))
    assert closed.answer is not None and closed.think is not None
    start = closed.prompt_len
    made = {
        "closed": closed,
        "empty answer": replace(closed, answer=replace(closed.answer, stop=closed.answer.start)),
        "never closed": replace(closed, answer=None),
        "never opened": replace(closed, think=None, answer=Span(start, len(closed.token_ids))),
        "closed by the prompt": replace(closed, think=Span(start, start), answer=Span(start, len(closed.token_ids))),
    }

    def true(column: str, close: str | None) -> set[str]:
        values = RewardBatch.from_rollouts(list(made.values()), close=close)[column]
        return {name for name, value in zip(made, values, strict=True) if value}

    assert true("formatted", "</think>") == {"closed", "closed by the prompt"}
    assert true("think_closed", "</think>") == {"closed", "empty answer", "closed by the prompt"}
    assert true("closed", "</think>") == {*made} - {"never closed"}
    assert true("formatted", None) == {"closed", "never opened", "closed by the prompt"}
    right = [replace(r, correct=True) for r in made.values()]
    batch = RewardBatch.from_rollouts(right)
    assert dict(zip(made, Laser(target=0)(batch).values.tolist(), strict=True)) == {
        name: 1.0 if name in true("formatted", "</think>") else -1.0 for name in made
    }
    form = TrainLongThinkShort(format=1.0, budget=100)(batch).components["format"]
    assert form.tolist() == [1.0, 0.5, 0.0, 0.0, 1.0]


def test_a_table_says_what_a_reward_would_have_paid(found):
    table = rewards.score(found, Cosine(120))
    assert_allclose(table["reward"], Cosine(120)(RewardBatch.from_rollouts(found)).values)
    assert_allclose(table["component.correctness"] + table["component.length"], table["reward"])
    assert table["sample"].tolist() == [r.sample for r in found]


def test_scoring_leaves_a_history_alone_unless_told_to_train(found):
    reward = HAPO()
    rewards.score(found, reward)
    assert not reward.history
    rewards.score(found, reward, split="train")
    assert set(reward.history) == {r.problem_id for r in found if r.correct}


def test_many_rewards_on_one_file_of_rollouts(found, problems):
    columns = {
        "budget": 50,
        "mode": "short",
        "conciseness": 0.5,
        "model_score": 0.5,
        "rule_confidence": 0.5,
        "relevance": [(1, 0)] * 48,
        "logprob_without": -2.0,
        "target_tokens": 30,
        "low_tokens": 20,
        "high_tokens": 40,
        "target_words": 30,
        "low_words": 20,
        "high_words": 40,
        "headings": [("Past",)] * 48,
        "keywords": [("rain",)] * 48,
        "gold_documents": [("7",)] * 48,
        "gold_calls": [()] * 48,
        "schema": "create table t (a);",
        "gold_sql": "select a from t",
    }
    table = rewards.compare(found, every_reward(), problems, columns=columns)
    assert table["name"].unique().tolist() == list(rewards.ALL) and len(table) == 48 * len(rewards.ALL)
    assert np.isfinite(table["reward"]).all()
    assert_allclose(table.loc[table["name"] == "correctness", "reward"], [r.correct for r in found])


def test_pushes_are_mean_advantages_of_four_kinds_of_responses():
    table = pd.DataFrame(
        {
            "name": ["r"] * 6,
            "problem_id": ["a"] * 4 + ["b"] * 2,
            "correct": [True, True, False, False, True, True],
            "tokens": [10, 40, 20, 30, 5, 9],
            "reward": [1.0, 0.5, 0.0, 0.0, 1.0, 1.0],
        }
    )
    a = (np.array([1.0, 0.5, 0, 0]) - 0.375) / (np.std([1.0, 0.5, 0, 0], ddof=1) + 1e-4)
    row = rewards.mean_advantages(table).loc["r"]
    assert_allclose(row.to_list(), [a[0] / 2, a[1] / 2, a[2], a[3], 0.5])  # the other problem's two add 0


def test_figures_draw_every_response_and_every_push(found):
    names = ("correctness", "slpo", "hapo", "kimi")
    table = rewards.compare(found, {name: rewards.ALL[name].make() for name in names})
    drawn = figures.reward_by_length(table, across=2)
    assert [a.text for a in drawn.layout.annotations] == list(names)
    assert sum(len(trace.x) for trace in drawn.data) == len(table)
    assert sorted(y for trace in drawn.data for y in trace.y) == sorted(table["reward"])
    pushes = rewards.mean_advantages(table)
    assert_allclose(figures.reward_pushes(pushes).data[0].z, pushes.drop(columns="no push").to_numpy())


# --- TRL: values ---------------------------------------------------------------------------------------------

LENGTHS = [0, 1, 17, 50, 99, 100, 101, 250]


def test_cosine_equals_trls():
    trl = pytest.importorskip("trl.rewards")
    for right, text in ((True, r"\boxed{\frac{1}{3}}"), (False, r"\boxed{\frac{1}{2}}")):
        n = len(LENGTHS)
        theirs = trl.get_cosine_scaled_reward(max_len=100)(
            completions=[[{"content": text}]] * n, solution=[r"\frac{1}{3}"] * n, completion_ids=[[1] * k for k in LENGTHS]
        )
        ours = Cosine(100)(RewardBatch({"problem_id": np.arange(n), "correct": np.full(n, right), "tokens": np.array(LENGTHS)}))
        assert_allclose(ours.values, theirs, rtol=1e-12)


@pytest.mark.parametrize("cache", [0, 20, 100])
def test_overlong_equals_trls(cache):
    trl = pytest.importorskip("trl.rewards")
    theirs = trl.get_soft_overlong_punishment(100, cache)(completion_ids=[[1] * k for k in LENGTHS])
    columns = {"problem_id": np.arange(len(LENGTHS)), "correct": np.zeros(len(LENGTHS), bool), "tokens": np.array(LENGTHS)}
    assert_allclose(Overlong(100, cache)(RewardBatch(columns)).components["overlong"], theirs, rtol=1e-12)


def test_the_repetition_penalty_equals_trls():
    trl = pytest.importorskip("trl.rewards")
    ids = [[], [1], [1, 2, 3], [5] * 9, [1, 2] * 8, list(range(20))]
    theirs = trl.get_repetition_penalty_reward(3, -0.7)(completion_ids=ids)
    assert_allclose(called(as_trl(RepetitionPenalty(3, 0.7), generations=3), ids), theirs, rtol=1e-12)


# --- TRL: the entry ------------------------------------------------------------------------------------------


def called(entry, ids, texts=None, **given) -> list[float]:
    """As TRL calls it."""
    return entry(prompts=["?"] * len(ids), completions=texts or ["."] * len(ids), completion_ids=ids, **given)


@dataclass(frozen=True)
class Graded:
    """A grader that can be pickled."""

    def __call__(self, completions, answer, **given) -> list[bool]:
        return [gold in text for text, gold in zip(completions, answer, strict=True)]


def test_groups_follow_the_id_column_else_contiguous_chunks():
    ids, correct = [[1] * k for k in (10, 20, 10, 40)], [True] * 4
    by_id = as_trl(SLPO(0.5))
    assert called(by_id, ids, correct=correct, problem_id=["a", "a", "b", "b"]) == [1.5, 1.0, 1.5, 1.0]
    assert called(by_id, ids, correct=correct, problem_id=["a", "b", "b", "a"]) == [1.5, 1.0, 1.5, 1.0]
    assert called(as_trl(SLPO(0.5), generations=2), ids, correct=correct) == [1.5, 1.0, 1.5, 1.0]
    assert called(as_trl(SLPO(0.5), group="row"), ids, correct=correct, row=[7, 7, 7, 7]) == pytest.approx(
        [1.5, 1 + 1 / 3, 1.5, 1.0]
    )
    with pytest.raises(ValueError, match="num_generations"):
        called(by_id, ids, correct=correct)
    with pytest.raises(ValueError, match="groups of generations=3"):
        called(as_trl(SLPO(0.5), generations=3), ids, correct=correct)
    with pytest.raises(ValueError, match="remembers problems"):
        called(as_trl(HAPO(), generations=2), ids, correct=correct)


@pytest.mark.parametrize("combined", [lambda r: r, lambda r: rewards.WeightedSum(((2.0, r),)), lambda r: rewards.ReNorm(r)])
def test_only_a_reward_that_remembers_problems_needs_their_ids(combined):
    """LASER-D remembers lengths per difficulty: chunks of rows are groups enough, and give the same lengths as ids."""
    ids, given = [[1] * k for k in (10, 20, 10, 40)], {"correct": [1, 1, 0, 0], "formatted": [1] * 4}
    settings = TargetSettings(base=10, step=10, longest=50, every=1)
    outcome = Outcome(0.25, 0.0, 0.0)  # in [0, 1] with the bonus, as ReNorm requires
    chunks, by_id = (as_trl(combined(LaserD(0.25, settings, outcome)), generations=2) for _ in range(2))
    for _ in range(3):
        assert called(chunks, ids, **given) == called(by_id, ids, problem_id=["a", "a", "b", "b"], **given)
    assert chunks.reward.state_dict() == by_id.reward.state_dict()
    with pytest.raises(ValueError, match="remembers problems"):
        called(as_trl(combined(HAPO()), generations=2), ids, **given)
    with pytest.raises(ValueError, match="remembers problems"):
        called(as_trl(rewards.WeightedSum(((1.0, LaserD()), (1.0, HAPO()))), generations=2), ids, **given)


def test_columns_come_from_functions_the_dataset_and_the_tokens():
    entry = as_trl(L1Max(0.01), columns={"correct": Graded()}, generations=2)
    values = called(entry, [[1] * 100, []], ["is 7", ""], answer=["7", "7"], budget=[100, 100])
    assert values == [0.5, 0.0]  # an empty completion is a row like another
    surrogate = as_trl(rewards.ALL["surrogate"].make(longest=4), generations=2)
    assert called(surrogate, [[1, 2], [1, 2]], ["<think>1</think>7", "<think>1</think>none"]) == [2.0, 0.0]
    chat = as_trl(rewards.Gated(Correctness(), (rewards.Distinct(1, "words"),)), generations=1)
    assert called(chat, [[1]], [[{"role": "assistant", "content": "so so"}]], correct=[True]) == [0.5]
    with pytest.raises(MissingColumnError, match=r"'l1_max' needs the column 'correct'.*your grader"):
        called(as_trl(L1Max(), generations=1), [[1]], budget=[5])


THOUGHTS = {
    "closed": "<think>3+4=7</think>so 7<|end|>",
    "closed, never opened": "3+4=7</think>so 7<|end|>",
    "closed twice": "<think>3</think>4</think>so 7<|end|>",
    "never closed": "<think>3+4=7",
    "never closed, yet ended": "<think>3+4=7<|end|>",
    "never opened": "so 7<|end|>",
    "never opened, cut off": "so 7",
}
ENDS = {"unchanged": "", "thinking opened": "<think>\n", "thinking switched off": "<think>\n\n</think>\n\n"}


@pytest.mark.parametrize("end", ENDS)
@pytest.mark.parametrize("chat", [True, False])
@pytest.mark.parametrize("tags", [ThinkTags(), ThinkTags(None, "</think>")])
def test_trl_pays_the_same_for_an_answer_as_a_batch_of_rollouts(reasoner, end, chat, tags):
    """Closed, unclosed and never opened thinking; the tags of tiny-reasoner are special tokens, which TRL's completions lack."""
    model = replace(reasoner, tokenizer=copy.deepcopy(reasoner.tokenizer), tags=tags)
    model.tokenizer.chat_template += ENDS[end]
    messages = [{"role": "user", "content": "3+4=?"}]
    prompt, ids = model.prompt_ids(messages), [model.tokenizer.encode(t, add_special_tokens=False) for t in THOUGHTS.values()]
    problem = Problem("p", tuple(messages), "7", {})
    sampled = [generate.rollout_from_tokens(model, problem, prompt, i, sample=k) for k, i in enumerate(ids)]
    batch = RewardBatch.from_rollouts(sampled)
    trainer = SimpleNamespace(processing_class=model.tokenizer, chat_template_kwargs={})
    n = len(ids)
    given = {
        "prompts": [messages if chat else model.prompt_text(messages)] * n,
        "completions": model.tokenizer.batch_decode(ids, skip_special_tokens=True),
        "completion_ids": ids,
        "problem_id": ["p"] * n,
        "log_metric": bound_log(trainer),
    }
    assert not any("think>" in text for text in given["completions"])
    for reward in (Surrogate(longest=40), LongWriter(low=1, high=1, unit="words"), Ruler({1: (0, 1)}, target=1)):
        assert as_trl(reward, open=tags.open)(**given) == reward(batch).values.tolist(), (reward, batch["answer_text"])
    by_name = dict(zip(THOUGHTS, batch["answer_text"], strict=True))
    assert by_name["closed"] == by_name["closed twice"] == "so 7"
    unclosed = (tags.open is None and end != "thinking switched off") or end == "thinking opened"
    assert by_name["never opened, cut off"] == ("" if unclosed else "so 7")
    assert (by_name["never closed"] == "") == (end != "thinking switched off")


def test_without_a_trainer_trl_pays_for_an_answer_by_its_completions():
    entry = as_trl(Surrogate(longest=4), generations=1)
    texts = ["<think>1</think>7", "<think>1", "7", "<think>1</think>none"]
    assert called(entry, [[1, 2]] * 4, texts) == [2.0, 0.0, 2.0, 0.0]


def test_a_response_ends_by_itself_if_its_last_id_is_a_stop_id():
    dler = rewards.ALL["dler"].make(target=5)
    entry = as_trl(dler, generations=2, stop_ids=[0])
    assert called(entry, [[1, 0], [1, 2], [], [1] * 5 + [0]], correct=[True] * 4) == [1, 0, 0, 0]


def test_the_entry_is_named_logged_and_can_be_pickled():
    entry = as_trl(SLPO(), columns={"correct": Graded()}, generations=2)
    logged: dict[str, float] = {}
    called(pickle.loads(pickle.dumps(entry)), [[1], [1, 2]], ["a", "b"], answer=["a", "b"], log_metric=logged.__setitem__)
    assert entry.__name__ == "slpo" and logged == {"slpo/correctness": 1.0, "slpo/length": 0.25}


def test_a_split_column_or_the_trainers_mode_tells_eval_from_train():
    entry = as_trl(HAPO())
    given = {"correct": [True], "problem_id": [3]}
    called(entry, [[1] * 9], split=["test"], **given)
    trainer = SimpleNamespace(model=torch.nn.Linear(1, 1).eval())
    called(entry, [[1] * 9], log_metric=bound_log(trainer), **given)
    assert not entry.reward.history
    trainer.model.train()
    called(entry, [[1] * 9], log_metric=bound_log(trainer), **given)
    assert entry.reward.history == {"3": (9.0, 1)}
    with pytest.raises(ValueError, match="splits test, train"):
        called(entry, [[1], [1]], correct=[1, 1], problem_id=[1, 1], split=["train", "test"])


def bound_log(trainer):
    """``log_metric`` as TRL hands it over: bound to its trainer."""
    return (lambda self, name, value: None).__get__(trainer)


def test_rewards_that_are_not_finite_stop_with_the_step_and_the_problem():
    entry = as_trl(rewards.ALL["length_penalty"].make(), columns={"correct": lambda **_: [float("nan")]}, generations=1)
    with pytest.raises(ValueError, match=r"is nan at step 7 for problem"):
        called(entry, [[1]], trainer_state=SimpleNamespace(global_step=7))


def test_processes_that_gather_pay_what_one_process_would():
    ids, correct = [[1] * k for k in (10, 20, 30, 40, 50, 60)], [True, True, True, True, False, True]
    problem = ["a", "a", "a", "b", "b", "b"]  # the cut after two rows goes through a group
    whole = called(as_trl(GRPOLambda(0.5)), ids, correct=correct, problem_id=problem)
    cuts = [slice(0, 2), slice(2, 6)]
    parts = []
    for me, rows in enumerate(cuts):

        def gather(mine: list, me: int = me) -> list:
            others = [collected(ids[c], correct[c], problem[c]) for c in cuts]
            return [*others[:me], *mine, *others[me + 1 :]]

        entry = as_trl(GRPOLambda(0.5), gather=gather)
        parts += called(entry, ids[rows], correct=correct[rows], problem_id=problem[rows])
    assert parts == whole


def collected(ids, correct, problem) -> tuple[str, dict]:
    """What another process would send."""
    sent: list = []

    def spy(mine: list) -> list:
        sent.extend(mine)
        return mine

    called(as_trl(GRPOLambda(0.5), gather=spy), ids, correct=correct, problem_id=problem)
    return sent[0]


def plain_trl(entry, reasoner, problems, out, steps: int, **more):
    """A trainer as anyone's script makes it."""
    trl, datasets = pytest.importorskip("trl"), pytest.importorskip("datasets")
    rows = [{"prompt": list(p.messages), "problem_id": p.id, "answer": p.answer} for p in problems]
    config = trl.GRPOConfig(
        output_dir=str(out), per_device_train_batch_size=4, num_generations=4, max_completion_length=8, max_steps=steps, save_steps=1,
        logging_steps=1, report_to=[], use_cpu=True, gradient_checkpointing=False, disable_tqdm=True,
    )  # fmt: skip
    model = pickle.loads(pickle.dumps(reasoner.model))
    data = datasets.Dataset.from_list(rows)
    return trl.GRPOTrainer(model, entry, config, data, processing_class=reasoner.tokenizer, **more)


def test_a_plain_trl_script_keeps_what_a_reward_remembers_in_its_checkpoints(reasoner, problems, tmp_path):
    pytest.importorskip("trl")
    from toolkit.grpo import kept

    def entry():
        return as_trl(HAPO(), columns={"correct": random_grades})

    first, again, without = entry(), entry(), entry()
    plain_trl(first, reasoner, problems[:4], tmp_path, 2, callbacks=[kept.Kept(first)]).train()
    assert first.reward.history
    plain_trl(again, reasoner, problems[:4], tmp_path, 3, callbacks=[kept.Kept(again)]).train(resume_from_checkpoint=True)
    assert set(again.reward.history.items()) > set(first.reward.history.items()), "the third step is of another problem"
    plain_trl(without, reasoner, problems[:4], tmp_path / "other", 1).train()
    late = entry()
    resumed = plain_trl(late, reasoner, problems[:4], tmp_path / "other", 2, callbacks=[kept.Kept(late)])
    with pytest.raises(ValueError, match=r"states of the rewards \[\], expected \['hapo'\]"):
        resumed.train(resume_from_checkpoint=True)


def test_a_plain_trl_trainer_trains_and_evaluates_with_a_stateful_entry(reasoner, problems, tmp_path):
    trl, datasets = pytest.importorskip("trl"), pytest.importorskip("datasets")
    rows = [{"prompt": list(p.messages), "problem_id": p.id, "answer": p.answer} for p in problems]
    entry = as_trl(HAPO(), columns={"correct": random_grades}, stop_ids=sorted(reasoner.eos_ids))
    config = trl.GRPOConfig(
        output_dir=str(tmp_path),
        per_device_train_batch_size=4,
        per_device_eval_batch_size=4,
        num_generations=4,
        max_completion_length=8,
        max_steps=2,
        logging_steps=1,
        save_strategy="no",
        report_to=[],
        use_cpu=True,
        gradient_checkpointing=False,
        disable_tqdm=True,
    )
    model = pickle.loads(pickle.dumps(reasoner.model))
    train, held_out = datasets.Dataset.from_list(rows[:4]), datasets.Dataset.from_list(rows[4:6])
    trainer = trl.GRPOTrainer(model, entry, config, train, held_out, processing_class=reasoner.tokenizer)
    trainer.train()
    learned = dict(entry.reward.history)
    assert learned and set(learned) <= {p.id for p in problems[:4]}
    trainer.evaluate()
    assert entry.reward.history == learned, "evaluation changed the history"
    logs = [row for row in trainer.state.log_history if "rewards/hapo/mean" in row]
    assert logs and all("hapo/length" in row and "hapo/correctness" in row for row in logs)


def random_grades(completion_ids, **given) -> list[bool]:
    """Half right, so that groups vary."""
    return [i % 2 == 0 for i in range(len(completion_ids))]
