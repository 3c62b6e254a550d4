"""Task hinting: hints have the right answers, the mixer is exact, the loss is the formula; the tasks' answers are right."""

from __future__ import annotations

import math
import random

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st

from toolkit.methods import task_hinting as th
from toolkit.tasks.generators import sequences
from toolkit.tasks.generators.sequences import ASK, BEGIN, END, PLUS, SILENT, TASKS, THEN, Example, padded

SEEDS = st.integers(0, 10**6)


@given(SEEDS, st.integers(1, 12))
def test_answers_of_the_tasks_are_right(seed, n):
    rng = random.Random(seed)
    drawn = {name: draw(rng, n) for name, draw in TASKS.items()}
    prompts, answers = ({name: list(getattr(e, part)) for name, e in drawn.items()} for part in ("prompt", "answer"))
    assert answers["copy"] == prompts["copy"] and answers["reverse"] == prompts["reverse"][::-1]
    assert answers["sort"] == sorted(prompts["sort"]) and len(set(answers["sort"])) == n
    assert answers["parity"] == [prompts["parity"].count(1) % 2]
    assert answers["count"] == list(range(prompts["count"][0], prompts["count"][1] + 1)) and len(answers["count"]) == n
    first, second = (int("".join(map(str, digits[::-1]))) for digits in split(prompts["addition"]))
    assert int("".join(map(str, answers["addition"][::-1]))) == first + second and len(answers["addition"]) == n + 1


def split(prompt: list[int]) -> tuple[list[int], list[int]]:
    at = prompt.index(PLUS)
    return prompt[:at], prompt[at + 1 :]


@given(SEEDS, st.integers(1, 12))
def test_answers_of_the_hints_are_right(seed, n):
    rng = random.Random(seed)
    task = sequences.sort(rng, n)
    for hint in (th.successor, th.rank, th.any_element):
        *given_numbers, ask, element = hint(rng, task).prompt
        assert tuple(given_numbers) == task.prompt and ask == ASK and element in task.prompt
    example = th.successor(rng, task)
    rank = task.answer.index(example.prompt[-1])
    assert example.answer == task.answer[rank + 1 : rank + 2], "the element that follows it in the sorted sequence"
    counted = th.rank(rng, task)
    assert counted.answer == (task.answer.index(counted.prompt[-1]),)


def test_the_random_control_tells_nothing_about_its_element():
    rng, task = random.Random(0), Example((3, 1, 2, 0), (0, 1, 2, 3))
    pairs = [(e.prompt[-1], e.answer[0]) for e in (th.any_element(rng, task) for _ in range(8000))]
    for element in range(4):
        answers = [a for x, a in pairs if x == element]
        assert all(abs(answers.count(a) / len(answers) - 0.25) < 0.05 for a in range(4))


@given(SEEDS, st.integers(1, 12))
def test_notes_look_only_at_what_came_before(seed, n):
    rng = random.Random(seed)
    for draw, note in (
        (sequences.sort, th.successor_so_far),
        (sequences.parity, th.parity_so_far),
        (sequences.sort, th.relabelled),
    ):
        whole = draw(rng, n)
        notes = note(whole).notes
        assert len(notes) == n
        for i in range(1, n + 1):
            assert note(Example(whole.prompt[:i], ())).notes == notes[:i]
    assert th.parity_so_far(Example((1, 1, 1, 0), ())).notes == (1, 0, 1, 1)


def test_relabelling_is_one_permutation_that_says_nothing_of_the_order():
    labels = th.relabelled(Example(tuple(range(64)), ())).notes
    assert sorted(labels) == list(range(64)) and abs(torch.corrcoef(torch.tensor([range(64), labels]).float())[0, 1]) < 0.3


@pytest.mark.parametrize(("share", "expected"), [(0.0, 0), (0.25, 8), (0.5, 16), (1.0, 32)])
def test_the_share_of_hints_in_a_batch_is_exact(share, expected):
    batch = th.mixed(random.Random(0), sequences.sort, th.successor, [3] * 32, share)
    assert len(batch) == 32 and sum(ASK in e.prompt for e in batch) == expected


def test_a_share_outside_0_to_1_is_refused():
    with pytest.raises(ValueError, match=r"share=1\.5"):
        th.mixed(random.Random(0), sequences.sort, th.successor, [3], 1.5)


def test_targets_are_the_next_tokens_of_the_answer_and_nothing_else():
    examples = [Example((7, 8), (9,), (1, 2)), Example((5,), (6, 4))]
    inputs, targets, notes = padded(examples)
    assert inputs == [[BEGIN, 7, 8, THEN, 9], [BEGIN, 5, THEN, 6, 4]]
    assert targets == [[SILENT, SILENT, SILENT, 9, END], [SILENT, SILENT, 6, 4, END]]
    assert notes == [[SILENT, 1, 2, SILENT, SILENT], [SILENT] * 5]
    longer = padded([*examples, Example((1, 1, 1), (2, 2))])
    assert longer[1][0] == [SILENT, SILENT, SILENT, 9, END, SILENT, SILENT] and {len(r) for part in longer for r in part} == {7}


def test_the_loss_is_the_mean_log_probability_of_counted_tokens_of_both_heads():
    torch.manual_seed(0)
    logits, note_logits = torch.randn(2, 3, 5), torch.randn(2, 3, 5)
    targets = torch.tensor([[SILENT, 1, 2], [SILENT, SILENT, 4]])
    notes = torch.tensor([[3, SILENT, SILENT], [0, SILENT, SILENT]])

    def mean(z: torch.Tensor, labels: torch.Tensor) -> float:
        terms = []
        for b in range(2):
            for t in range(3):
                if labels[b, t] != SILENT:
                    terms.append(math.log(sum(math.exp(v) for v in z[b, t].tolist())) - z[b, t, labels[b, t]].item())
        return sum(terms) / len(terms)

    expected = mean(logits, targets) + 0.3 * mean(note_logits, notes)
    assert th.multi_task_loss(logits, targets, note_logits, notes, 0.3).item() == pytest.approx(expected, rel=1e-5)
    silent = torch.full_like(notes, SILENT)
    assert th.multi_task_loss(logits, targets, note_logits, silent, 0.3).item() == pytest.approx(mean(logits, targets), rel=1e-5)
