"""BR-RM: a strict gate on both turns, rewards as published, a scripted judge that is followed through both turns, and a real model."""

from __future__ import annotations

import numpy as np
import pytest

from toolkit import generate
from toolkit.generate import Sampling
from toolkit.grpo import advantages
from toolkit.methods import branch_rethink as br
from toolkit.tasks.generators import preferences

NAMED = "Criteria: accuracy, clarity\nResponse 2 has a wrong value."


@pytest.mark.parametrize(
    ("reply", "expected"),
    [
        ("Criteria: safety", ("safety",)),
        ("I see.\nCriteria: Accuracy, reasoning, clarity.\nIssues follow.", ("accuracy", "reasoning", "clarity")),
        ("Criteria: accuracy, reasoning, clarity, safety", None),  # four
        ("Criteria: accuracy, accuracy", None),
        ("Criteria: accuracy, beauty", None),
        ("Criteria:", None),
        ("Criteria: accuracy\nCriteria: clarity", None),
        ("The criteria are accuracy and clarity.", None),
    ],
)
def test_the_first_turn_has_to_name_one_to_three_known_criteria_in_one_line(reply, expected):
    assert br.chosen_criteria(reply) == expected


@pytest.mark.parametrize(
    ("reply", "expected"),
    [
        (r"Thus \boxed{1}", 1),
        (r"\boxed{ 2 }.", 2),
        (r"\boxed{3}", None),
        (r"\boxed{1}, or rather \boxed{2}", None),
        (r"\boxed{1} \boxed{1}", None),
        (r"\boxed{\text{1}}", None),
        (r"\boxed 1", None),
        (r"\boxed{1}\boxed", None),
        ("1", None),
    ],
)
def test_a_verdict_is_a_single_box_with_one_or_two(reply, expected):
    assert br.verdict(reply) == expected


def test_rewards_are_those_of_the_paper_and_any_broken_turn_costs_most():
    def of(criteria, verdict):
        return br.Judgement("", "", criteria, verdict)

    assert [br.reward(of(("clarity",), v), 2) for v in (2, 1, None)] == [0, -10, -100]
    assert br.reward(of(None, None), 1) == -100
    with pytest.raises(ValueError, match="1 or 2"):
        br.reward(of(("clarity",), 1), 0)


class Scripted:
    """A judge that answers the first turn with given texts, then finds the response that holds the right value."""

    def __init__(self, branches):
        self.branches, self.seen = branches, []

    def __call__(self, conversations):
        self.seen.append(conversations)
        if len(conversations[0]) == 1:
            return self.branches
        return [self.decide(c) for c in conversations]

    @staticmethod
    def decide(conversation):
        text = conversation[0]["content"]
        notes = [n.strip() for n in text.split("Notes: ")[1].splitlines()[0].split(".") if n.strip()]
        first, second = text.split("Response 1:\n")[1].split("Response 2:\n")
        held = [max((n in part) for n in notes) for part in (first, second.split("Do not decide")[0])]
        return r"\boxed{1}" if held[0] > held[1] else r"\boxed{2}"


def test_a_scripted_judge_sees_its_own_issues_again_and_is_right_where_it_kept_the_format():
    annotator = preferences.Annotator((1.0, 0.0, 0.0, 0.0, 0.0))
    drawn = preferences.pairs("test", 6, annotator=annotator)
    shown = [(p.chosen.text, p.rejected.text) if i % 2 else (p.rejected.text, p.chosen.text) for i, p in enumerate(drawn)]
    gold = [1 if i % 2 else 2 for i in range(6)]
    write = Scripted([NAMED, "no line", NAMED, NAMED, "Criteria: taste", NAMED])
    judgements = br.judge(write, [(p.question.prompt, s) for p, s in zip(drawn, shown, strict=True)])
    assert [j.verdict for j in judgements] == [gold[0], None, gold[2], gold[3], None, gold[5]]
    second = write.seen[1]
    assert len(second) == 4 and all(c[1] == {"role": "assistant", "content": NAMED} for c in second)
    assert drawn[0].question.prompt in second[0][0]["content"] and shown[0][0] in second[0][0]["content"]
    rewards = np.array([[br.reward(j, g)] for j, g in zip(judgements, gold, strict=True)])
    assert rewards[:, 0].tolist() == [0, -100, 0, 0, -100, 0]
    # One group: each advantage is the reward minus the mean of the other five.
    a = advantages.leave_one_out(rewards, np.zeros(6, int), np.ones(6, int))
    assert a == pytest.approx([r - (rewards.sum() - r) / 5 for r in rewards[:, 0]])


def test_any_model_judges_and_its_replies_are_its_answers(tiny):
    sampling = Sampling(temperature=0.0, max_new_tokens=12)
    write = br.writer(tiny, sampling)
    messages = br.branch_messages("1+1=?", ("2", "3"))
    problem = br.Problem("judgement-0", messages, "")
    rollout = generate.rollouts(tiny, [problem], sampling, progress=False)[0]
    expected = (
        "" if rollout.answer is None else tiny.text(rollout.token_ids[rollout.answer.start : rollout.answer.stop], special=False)
    )
    assert write([messages]) == [expected]
    judgement = br.judge(write, [("1+1=?", ("2", "3"))])[0]
    assert judgement.branch == expected and br.reward(judgement, 1) in (0, -10, -100)
    with pytest.raises(ValueError, match="one reply per conversation"):
        br.writer(tiny, Sampling(n=2))
