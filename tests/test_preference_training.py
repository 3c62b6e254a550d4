"""Preference training: the first step follows the gradient of SimPO's loss, half of the control's labels are swapped, and runs resume."""

from __future__ import annotations

import copy

import pandas as pd
import pytest
import torch

pytest.importorskip("trl")

from toolkit import lm as lms
from toolkit import preferences, store
from toolkit.preferences import Settings

PAIRS = pd.DataFrame(
    [
        (f"p{i}", f"<|user|>{i}+3=?<|end|><|assistant|>", f"<think>{i}+3={i + 3}\n</think>{i + 3}<|end|>", f"<think>wait wait\n</think>{i}<|end|>")
        for i in range(1, 5)
    ],
    columns=list(preferences.COLUMNS),
)  # fmt: skip


@pytest.fixture(scope="module")
def reasoner():
    return lms.load("tiny-reasoner")


def score(model, tokenizer, prompt: str, response: str) -> torch.Tensor:
    """Mean log-probability of the response tokens."""
    head, tail = tokenizer.encode(prompt), tokenizer.encode(response)
    logs = model(torch.tensor([head + tail])).logits[0].log_softmax(-1)
    return torch.stack([logs[len(head) + i - 1, t] for i, t in enumerate(tail)]).mean()


def margins(lm) -> list[float]:
    with torch.no_grad():
        return [
            (score(lm.model, lm.tokenizer, r.prompt, r.chosen) - score(lm.model, lm.tokenizer, r.prompt, r.rejected)).item()
            for r in PAIRS.itertuples()
        ]


@pytest.mark.parametrize("cut", [False, True])
def test_the_first_step_follows_the_gradient_of_the_loss_by_hand(reasoner, tmp_path, cut):
    """AdamW's first step is the sign of the gradient. The loss by hand uses one pair at a time, without padding.

    A response that was cut off has no end token, and gets none.
    """
    pairs = PAIRS.rename(
        columns={"chosen": "rejected", "rejected": "chosen"}
    )  # what the model does not do yet, so gradients are large
    if cut:
        pairs = pairs.assign(chosen=pairs["chosen"].str.partition("\n")[0])
    settings = Settings(steps=1, batch=4, rate=1e-3, beta=3.0, gamma=0.7)
    taken = preferences.train(reasoner, pairs, settings, tmp_path, name="one step")
    model = copy.deepcopy(reasoner.model).float()
    scores = [[score(model, reasoner.tokenizer, r.prompt, text) for text in (r.chosen, r.rejected)] for r in pairs.itertuples()]
    losses = [-torch.nn.functional.logsigmoid(3.0 * (chosen - rejected) - 0.7) for chosen, rejected in scores]
    torch.stack(losses).mean().backward()
    norm = torch.stack([p.grad.norm() for p in model.parameters()]).norm().item()
    compared = 0
    for (name, old), new in zip(model.named_parameters(), taken.model.parameters(), strict=True):
        clear = old.grad.abs() > 1e-4 * max(1.0, norm)  # far above Adam's epsilon after clipping, so that the step is the sign
        compared += int(clear.sum())
        assert torch.allclose((new - old)[clear], -1e-3 * old.grad[clear].sign(), atol=3e-6), name
    assert compared > 1000


def test_training_prefers_the_chosen_responses_and_leaves_the_initial_model_alone(reasoner, tmp_path):
    before = margins(reasoner)
    trained = preferences.train(reasoner, PAIRS, Settings(steps=4, batch=4, rate=1e-3), tmp_path, name="taught")
    assert all(a > b for a, b in zip(margins(trained), before, strict=True))
    assert margins(reasoner) == before
    assert trained.name == "taught" and trained.parent == reasoner.fingerprint
    again = preferences.train(reasoner, PAIRS, Settings(steps=4, batch=4, rate=1e-3), tmp_path, name="taught")
    assert again.fingerprint == trained.fingerprint
    with pytest.raises(store.WrongModelError, match="pairs"):
        preferences.train(reasoner, preferences.flipped(PAIRS), Settings(steps=4, batch=4, rate=1e-3), tmp_path, name="taught")


@pytest.mark.parametrize("n", [2, 3, 4])
def test_half_of_the_flipped_labels_are_swapped_and_the_texts_stay(n):
    pairs, drawn = PAIRS[:n], set()
    for seed in range(20):
        found = preferences.flipped(pairs, seed=seed)
        swapped = tuple(found["chosen"] == pairs["rejected"])
        drawn.add(swapped)
        assert sum(swapped) == n // 2
        assert [{a, b} for a, b in zip(found["chosen"], found["rejected"], strict=True)] == [
            {a, b} for a, b in zip(pairs["chosen"], pairs["rejected"], strict=True)
        ]
        assert (found[["problem_id", "prompt"]] == pairs[["problem_id", "prompt"]]).all(axis=None)
    assert len(drawn) > 1


@pytest.mark.parametrize(
    ("pairs", "message"),
    [
        (PAIRS[:0], "no preference pairs"),
        (PAIRS.drop(columns="chosen"), "no column 'chosen'"),
        (PAIRS.assign(rejected=PAIRS["chosen"]), "4 of 4 pairs .* 'p1'"),
        (PAIRS.assign(prompt=["", "a", "a", "a"]), "1 of 4 pairs"),
        (PAIRS.assign(rejected="1" * 5000), "4 of 8 texts .* longer than the"),
    ],
)
def test_pairs_that_cannot_be_trained_on_are_refused_before_anything_is_written(reasoner, tmp_path, pairs, message):
    with pytest.raises(ValueError, match=message):
        preferences.train(reasoner, pairs, Settings(steps=1), tmp_path / "out", name="a")
    assert not (tmp_path / "out").exists()


@pytest.mark.parametrize("end", ["", "<|end|>"])
def test_an_end_token_counts_against_the_context_only_if_the_text_has_it(reasoner, tmp_path, end):
    context, prompt = reasoner.model.config.max_position_embeddings, PAIRS["prompt"][0]
    full = PAIRS[:1].assign(rejected="1" * (context - len(reasoner.tokenizer.encode(prompt))) + end)
    assert preferences._lengths(reasoner, full)[1] == context + bool(end)
    if not end:
        return
    with pytest.raises(ValueError, match=f"1 of 2 texts .* has {context + 1} tokens"):
        preferences.train(reasoner, full, Settings(steps=1), tmp_path, name="a")
