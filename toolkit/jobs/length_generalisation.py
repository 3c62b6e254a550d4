"""Train a small decoder on short examples of a task, and test it on longer ones, for one encoding, hint and seed.

The protocol of arXiv 2305.19466 and 2310.00726 at small size (``methods/positional_encodings``, ``methods/task_hinting``).
``data/length-generalisation/study.py`` runs it for all combinations.
"""

from __future__ import annotations

import math
import random
from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

import torch
from jaxtyping import Float
from torch import Tensor

from toolkit.methods import task_hinting
from toolkit.methods.positional_encodings import Decoder, attention_distance
from toolkit.tasks.generators.sequences import TASKS, VOCABULARY, Draw, Example, padded

MULTIPLES = (1, 2, 3, 4, 5)  # test lengths, as multiples of the longest trained length
WARM_UP = 0.06  # share of steps in which the learning rate rises: of arXiv 2305.19466
DECAY = 0.05  # weight decay: of arXiv 2305.19466
NO_HINT = "none"


@dataclass(frozen=True, kw_only=True)
class Run:
    """One decoder to train.

    Attributes:
        task: Name in ``sequences.TASKS``.
        encoding: Name in ``positional_encodings.ENCODINGS``.
        hint: ``"none"``, a name in ``task_hinting.HINTS`` (mixed) or one in ``task_hinting.NOTES`` (noted).
        seed: Random seed of weights and training examples. Test examples are always the same.
    """

    task: str
    encoding: str
    hint: str = NO_HINT
    seed: int = 0

    @property
    def name(self) -> str:
        """Name of the run, which is also a name of a file."""
        return f"{self.task}-{self.encoding}-{self.hint.replace(' ', '_')}-seed{self.seed}"


@dataclass(frozen=True, kw_only=True)
class Size:
    """Sizes of the training, of the tests and of the decoder.

    Attributes:
        longest: Longest trained length; see ``trained``.
        steps: Steps of training.
        batch: Examples per step.
        rate: Largest learning rate; it rises linearly, and falls as a cosine to 0.
        tested: Test examples per length.
        mapped: Test examples on which attention is measured.
        width, heads, layers: Sizes of the decoder.
    """

    longest: int = 5
    steps: int = 600
    batch: int = 32
    rate: float = 4e-3
    tested: int = 100
    mapped: int = 8
    width: int = 48
    heads: int = 4
    layers: int = 2

    def trained(self, task: str) -> int:
        """Return the longest trained length of a task: half as many digits, rounded up, for the two numbers of an addition."""
        return (self.longest + 1) // 2 if task == "addition" else self.longest


def train(run: Run, size: Size) -> Decoder:
    """Return a decoder trained on examples of length 1 to ``size.trained(run.task)``; all lengths are equally frequent.

    The length of an example is the number of its items, such as digits to sort (see ``Size``).

    Raises:
        ValueError: unknown task, encoding or hint.
    """
    draw, note, hint = _task(run)
    rng = random.Random(f"train-{run.task}-{run.seed}")
    with torch.random.fork_rng():
        torch.manual_seed(run.seed)
        model = Decoder(run.encoding, VOCABULARY, width=size.width, heads=size.heads, layers=size.layers)
    optimizer = torch.optim.AdamW(model.parameters(), lr=size.rate, weight_decay=DECAY, fused=True)
    schedule = torch.optim.lr_scheduler.LambdaLR(optimizer, lambda step: _rate(step, size.steps))
    for _ in range(size.steps):
        lengths = [rng.randint(1, size.trained(run.task)) for _ in range(size.batch)]
        examples = task_hinting.mixed(rng, draw, hint, lengths) if hint else [draw(rng, n) for n in lengths]
        ids, targets, notes = (torch.tensor(rows) for rows in padded([note(e) for e in examples] if note else examples))
        out = model(ids)
        loss = task_hinting.multi_task_loss(out.logits, targets, out.notes, notes)
        optimizer.zero_grad()
        loss.backward()
        torch.nn.utils.clip_grad_norm_(model.parameters(), 1.0)
        optimizer.step()
        schedule.step()
    return model


def held_out(task: str, length: int, n: int) -> list[Example]:
    """Return the n test examples of a task and a length: the same for all runs. A task with few different examples repeats them."""
    rng = random.Random(f"test-{task}-{length}")
    return [TASKS[task](rng, length) for _ in range(n)]


@torch.inference_mode()
def right_tokens(model: Decoder, examples: Sequence[Example]) -> list[int]:
    """Return how many tokens of each answer, with its ``END``, are the model's likeliest after the right tokens before them.

    If all are, greedy decoding writes the answer; if one is not, it does not. So this one pass also tells whether an answer is right.
    """
    ids, targets, _ = (torch.tensor(rows) for rows in padded(examples))
    return (model(ids).logits.argmax(-1) == targets).sum(1).tolist()


@torch.inference_mode()
def maps(model: Decoder, examples: Sequence[Example]) -> Float[Tensor, "layers examples heads T T"]:
    """Return the attention probabilities of a model on examples of equal length."""
    ids, _, _ = (torch.tensor(rows) for rows in padded(examples))
    return torch.stack(model(ids).attention)


def measure(model: Decoder, task: str, size: Size) -> dict[str, Any]:
    """Return a model's right tokens and attention distances on test examples: field -> test length (as text) -> value.

    The field ``right_tokens`` holds one count per example (see the function), ``answer_tokens`` the number of tokens of an answer with its
    ``END``, ``attention_distance`` the mean distance in tokens of each head, ``[layers][heads]``, in sequences of ``tokens`` tokens.
    """
    fields: dict[str, dict[str, Any]] = {"right_tokens": {}, "answer_tokens": {}, "attention_distance": {}, "tokens": {}}
    for n in (m * size.trained(task) for m in MULTIPLES):
        examples, attention = held_out(task, n, size.tested), maps(model, held_out(task, n, size.mapped))
        fields["right_tokens"][str(n)] = right_tokens(model, examples)
        fields["answer_tokens"][str(n)] = len(examples[0].answer) + 1
        fields["attention_distance"][str(n)] = attention_distance(attention).mean(1).tolist()
        fields["tokens"][str(n)] = attention.shape[-1]
    return fields


def _task(run: Run) -> tuple[Draw, Any, task_hinting.Hint | None]:
    """Return the functions that draw, note and hint; ``None`` for those that a run does not have."""
    hints = (NO_HINT, *task_hinting.HINTS, *task_hinting.NOTES)
    for value, what, known in ((run.task, "task", tuple(TASKS)), (run.hint, "hint", hints)):
        if value not in known:
            raise ValueError(f"Unknown {what} {value!r}: expected one of {', '.join(known)}.")
    return TASKS[run.task], task_hinting.NOTES.get(run.hint), task_hinting.HINTS.get(run.hint)


def _rate(step: int, steps: int) -> float:
    warm = max(1, round(WARM_UP * steps))
    return (step + 1) / warm if step < warm else (1 + math.cos(math.pi * (step - warm) / max(1, steps - warm))) / 2
