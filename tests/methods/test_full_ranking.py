"""Full ranking: weights and loss against loops, windows that a perfect teacher needs, and TRL's trainer with this loss."""

from __future__ import annotations

import itertools
import math
import random

import pytest
import torch

from toolkit import shipped
from toolkit.methods import full_ranking as fr
from toolkit.stats.rankings import written


def perfect(indices):
    return sorted(indices)


def test_identifier_weights_are_the_golden_ones():
    assert [fr.identifier_weight(r) for r in (1, 2, 3, 10)] == pytest.approx([2, 1.6309, 1.5, 1.2891], abs=5e-5)


def test_each_token_has_the_weight_of_its_rank_however_the_text_is_cut():
    text = written([11, 0, 4])  # [12] > [1] > [5]
    of_character = [1.0] * len(text)
    for rank, part in enumerate(("[12]", "[1]", "[5]"), 1):
        at = text.index(part)
        of_character[at : at + len(part)] = [1 + 1 / math.log2(rank + 1)] * len(part)
    rng = random.Random(0)
    for _ in range(50):
        cuts = sorted({0, len(text), *rng.sample(range(1, len(text)), 6)})
        pieces = [text[a:b] for a, b in itertools.pairwise(cuts)]
        expected = [max(of_character[a:b]) for a, b in itertools.pairwise(cuts)]
        assert fr.token_weights(pieces) == expected
    assert fr.token_weights([" > ", ""], alpha=0.25) == [0.25, 0.25]
    with pytest.raises(ValueError, match="from 0 to 1"):
        fr.token_weights(["x"], alpha=2.0)


def naive(logits, labels, weights, n=None):
    total, active = 0.0, 0
    for row, ids, ws in zip(logits, labels, weights, strict=True):
        for t in range(1, len(ids)):
            if ids[t] != -100:
                total -= ws[t].item() * torch.log_softmax(row[t - 1].double(), 0)[ids[t]].item()
                active += 1
    return total / (n or active)


def test_the_loss_is_that_of_a_loop_and_with_weights_of_1_the_cross_entropy():
    g = torch.Generator().manual_seed(0)
    logits, labels = torch.randn(3, 7, 11, generator=g), torch.randint(0, 11, (3, 7), generator=g)
    labels[0, :4], labels[2, 5:] = -100, -100
    weights = torch.rand(3, 7, generator=g)
    assert fr.weighted_token_nll(logits, labels, weights).item() == pytest.approx(naive(logits, labels, weights), rel=1e-5)
    assert fr.weighted_token_nll(logits, labels, weights, n=5).item() == pytest.approx(naive(logits, labels, weights, 5), rel=1e-5)
    plain = torch.nn.functional.cross_entropy(logits[:, :-1].flatten(0, 1), labels[:, 1:].flatten())
    assert torch.allclose(fr.weighted_token_nll(logits, labels, torch.ones(3, 7)), plain)
    with pytest.raises(ValueError, match="No token is predicted"):
        fr.weighted_token_nll(logits, torch.full((3, 7), -100), weights)


# --- windows and labels --------------------------------------------------------------------------------------


def naive_windows(order, window, step):
    order, end = list(order), len(order)
    while True:
        start = max(0, end - window)
        order[start : start + window] = sorted(order[start : start + window])
        if start == 0:
            return order
        end -= step


@pytest.mark.parametrize(("n", "window", "step"), [(8, 4, 2), (9, 4, 2), (10, 4, 3), (3, 4, 2), (1, 4, 2), (23, 5, 1)])
def test_windows_go_from_the_end_to_the_beginning(n, window, step):
    order = random.Random(n).sample(range(n), n)
    made = fr.sliding_windows(order, perfect, window=window, step=step)
    assert made == naive_windows(order, window, step)
    assert made[: window - step] == list(range(min(n, window - step))), "the best ones are carried to the front"


def test_labels_of_100_passages_take_9_passes_and_are_perfect_with_a_perfect_teacher():
    seen: list[int] = []

    def teacher(indices):
        seen.append(len(indices))
        return sorted(indices)

    order = random.Random(0).sample(range(100), 100)
    assert fr.full_list_labels(order, teacher) == list(range(100))
    assert fr.sliding_windows(order, perfect) != list(range(100)), "one pass is not enough"
    assert set(seen) == {20} and len(seen) == sum((n - 20) // 10 + 1 for n in range(100, 10, -10))
    assert len(range(100, 10, -10)) == 9


def test_impossible_windows_and_teachers_are_refused():
    with pytest.raises(ValueError, match="step from 1 to window - 1"):
        fr.sliding_windows([0, 1], perfect, window=2, step=2)
    with pytest.raises(ValueError, match="finds the best 2 at most"):
        fr.full_list_labels([0, 1], perfect, window=4, step=2, fixed=3)
    with pytest.raises(ValueError, match="has to return each of them once"):
        fr.sliding_windows([0, 1, 2], lambda indices: [0, 0, 1], window=3, step=1)


def test_an_answer_ranks_the_passages_of_its_prompt():
    prompts = []

    def answer(passages):
        prompts.append(passages)
        return "[2] > [1]"

    assert fr.listwise(["a", "b", "c", "d"], answer)([3, 1, 0]) == [1, 3, 0]
    assert prompts == [["d", "b", "a"]]


# --- TRL -----------------------------------------------------------------------------------------------------

ROWS = [
    {"prompt": "K=5; rank", "completion": "[2] > [10] > [1]"},
    {"prompt": "B?", "completion": "[1] > [2]"},
    {"prompt": "17+5=?", "completion": "[3] > [1] > [2]"},
]


def by_hand(model, tokenizer):
    """The loss of the first step: prompt masked, weights by rank, all rows in one sum."""
    total, active = 0.0, 0
    for row in ROWS:
        prompt, whole = tokenizer(row["prompt"])["input_ids"], tokenizer(row["prompt"] + row["completion"])["input_ids"]
        whole = [*whole, tokenizer.eos_token_id]
        pieces = [tokenizer.decode([i]) for i in whole[len(prompt) :]]
        weights = fr.token_weights(pieces)
        with torch.inference_mode():
            logp = model(torch.tensor([whole])).logits[0].log_softmax(-1)
        for t, weight in zip(range(len(prompt), len(whole)), weights, strict=True):
            total -= weight * logp[t - 1, whole[t]].item()
            active += 1
    return total / active


@pytest.mark.filterwarnings("ignore:.*compute_loss_func. is deprecated:FutureWarning")
@pytest.mark.filterwarnings("ignore:.*pin_memory.*:UserWarning")
@pytest.mark.parametrize("accumulated", [1, 3])
@pytest.mark.parametrize("way", ["argument", "subclass"])
def test_trl_trains_with_this_loss(way, accumulated, tmp_path):
    trl, datasets = pytest.importorskip("trl"), pytest.importorskip("datasets")
    from transformers import AutoModelForCausalLM, AutoTokenizer

    folder = shipped.path_of("tiny-reasoner")
    model, tokenizer = AutoModelForCausalLM.from_pretrained(folder), AutoTokenizer.from_pretrained(folder)
    expected = by_hand(model.eval(), tokenizer)
    settings = trl.SFTConfig(
        str(tmp_path), per_device_train_batch_size=3 // accumulated, gradient_accumulation_steps=accumulated, max_steps=1, logging_steps=1,
        save_strategy="no", report_to="none", use_cpu=True, bf16=False, gradient_checkpointing=False, disable_tqdm=True, learning_rate=1e-3,
    )  # fmt: skip
    data = datasets.Dataset.from_list(ROWS)
    if way == "argument":
        loss = {"compute_loss_func": fr.loss_function(tokenizer)}
        trainer = trl.SFTTrainer(model, settings, train_dataset=data, processing_class=tokenizer, **loss)
    else:
        trainer = fr.trainer_class(tokenizer)(model, settings, train_dataset=data, processing_class=tokenizer)
    trainer.train()
    (logged,) = [row["loss"] for row in trainer.state.log_history if "loss" in row]
    assert logged == pytest.approx(expected, rel=1e-3)
