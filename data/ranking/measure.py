"""Measure full ranking beside sliding windows, on small models trained here: ``python data/ranking/measure.py``.

Needs the extra ``search`` (BM25). Writes ``results.json`` and the table in ``README.md`` here. Trained models and finished parts are kept in
``runs/ranking``, so after a stop the same command goes on; other code or settings start anew. About a quarter of an hour on one core.

A model is a Qwen3 with 3 layers of width 64 and one token per word, trained from scratch; three seeds. Every seed first trains one base
model on generated lists of 2 to 8 passages with the plain loss. Four copies of it then train on lists that BM25 made from training problems,
as it makes those of the test problems:

- *windows*: 2 to 4 passages of a list, plain loss;
- *full*: lists of 8, plain loss;
- *full, weighted*: lists of 8, the paper's weights by rank;
- *full, shuffled weights*: lists of 8, the same weights, given to ranks at random. This is the control of the weights.

They rank the 8 passages of each test problem at once or in windows of 4 with step 2. BM25 chose these passages and their order, among 60.
Controls without a model are the order of BM25 and random orders.
"""

from __future__ import annotations

import copy
import math
import random
import sys
from collections.abc import Callable, Sequence
from functools import cache, partial
from pathlib import Path
from typing import Any

import numpy as np
import torch
from torch import Tensor
from torch.nn.utils.rnn import pad_sequence
from tqdm.auto import tqdm
from transformers import Qwen3Config, Qwen3ForCausalLM

from toolkit import stats, store
from toolkit.methods import full_ranking
from toolkit.stats.rankings import ndcg
from toolkit.tasks import ranking, splits

HERE = Path(__file__).parent
ROOT = HERE.parents[1]
sys.path.insert(0, str(ROOT / "data"))
import publish  # noqa: E402

CODE = store.code_of("toolkit.methods.full_ranking", "toolkit.tasks.ranking")
SEEDS, PROBLEMS, N, WINDOW, STEP, CLAUSES = (0, 1, 2), 80, 8, 4, 2, (1, 2)
BASE_STEPS, ARM_STEPS, BATCH, LR, ARM_LR = 380, 160, 32, 1.0, 0.5
LISTS = 1200  # training problems with lists of BM25
TOP = 3  # ranks of the second NDCG
FULL, IN_WINDOWS = "at once", "in windows"
ARMS: dict[str, tuple[int, int, str, tuple[str, ...]]] = {
    "windows": (2, WINDOW, "plain", (IN_WINDOWS,)),
    "full": (N, N, "plain", (FULL, IN_WINDOWS)),
    "full, weighted": (N, N, "weighted", (FULL,)),
    "full, shuffled weights": (N, N, "shuffled", (FULL,)),
}
"""Arm -> shortest and longest list in training, the loss, and the ways in which the trained model ranks."""
VOCABULARY = ["<pad>", "<end>", ":", "=", " > ", *ranking.VERBS, *ranking.SUBJECTS, *(f"[{i}]" for i in range(1, N + 1))]
ID = {word: i for i, word in enumerate(VOCABULARY)}


def prompt(subject: str, passages: Sequence[str]) -> list[int]:
    """Return a short prompt as token ids: the subject, then the numbered passages without "the" and commas."""
    words = [subject, ":"]
    for i, passage in enumerate(passages, 1):
        words += [f"[{i}]", *passage.replace(",", "").replace(" the ", " ").split()]
    return [ID[word] for word in (*words, "=")]


def response(order: Sequence[int]) -> list[int]:
    """Return a ranking as token ids, with the end of the sequence."""
    words = [word for i in order for word in (f"[{i + 1}]", " > ")]
    return [ID[word] for word in (*words[:-1], "<end>")]


# --- training ------------------------------------------------------------------------------------------------


Example = tuple[list[int], list[int]]


def lesson(rng: random.Random, n: int) -> Example:
    """Return prompt and response of a random training example with ``n`` passages, most of which contain the subject.

    In the test problems about half of them do.
    """
    while True:
        subject, passages = rng.choice(ranking.SUBJECTS), []
        for passage in ranking.corpus(rng, n, CLAUSES):
            first = passage.split(", ")[0].split(" the ")[1]
            swap = subject not in passage and rng.random() < 0.85
            passages.append(passage.replace(f"the {first}", f"the {subject}") if swap else passage)
        grades = [ranking.relevance(subject, p) for p in passages]
        if splits.split_of(ranking.message(subject, passages)) == "train":
            return prompt(subject, passages), response(ranking.best(grades))


@cache
def lists() -> list[Any]:
    """Return the training problems, with the candidates of BM25 in its order."""
    return ranking.load("train", LISTS, 0, candidates=N, clauses=CLAUSES, retrieve=ranking.bm25)


def list_lesson(rng: random.Random, n: int) -> Example:
    """Return prompt and response of ``n`` passages, in their order, from a list of BM25."""
    p = rng.choice(lists())
    kept = sorted(rng.sample(range(N), n))
    passages, grades = ([p.meta[key][i] for i in kept] for key in ("passages", "relevance"))
    return prompt(p.meta["subject"], passages), response(ranking.best(grades))


def weights_of(labels: Tensor, kind: str, rng: random.Random) -> Tensor:
    """Return the weight of each label under a loss: ``plain``, ``weighted``, or ``shuffled`` (weights of ranks exchanged at random)."""
    if kind == "plain":
        return torch.ones(labels.shape)
    weights = full_ranking.label_weights(labels, VOCABULARY.__getitem__)
    if kind == "shuffled":
        for row, ids in zip(weights, labels, strict=True):
            identifiers = torch.nonzero(ids >= ID["[1]"]).flatten()
            row[identifiers] = row[identifiers][rng.sample(range(len(identifiers)), len(identifiers))]
    return weights


def train(
    model: Qwen3ForCausalLM,
    name: str,
    lengths: tuple[int, int],
    kind: str,
    steps: int,
    peak: float,
    draw: Callable[[random.Random, int], Example],
    *,
    grows: bool = False,
) -> None:
    """Train a model in place on examples from ``draw``, of lengths drawn from ``lengths``.

    With ``grows``, the longest grows from 2 to ``lengths[1]`` in the first 60 % of training: a base model learns short lists first.
    """
    rng, of_control = random.Random(f"ranking-{name}"), random.Random(f"ranking-control-{name}")
    matrices = [p for path, p in model.model.layers.named_parameters() if p.ndim == 2]
    others = [p for p in model.parameters() if not any(p is m for m in matrices)]
    optimizers: list[tuple[Any, float]] = [
        (torch.optim.Muon(matrices, lr=0.02, momentum=0.95, weight_decay=0.05), 0.02),
        (torch.optim.AdamW(others, lr=2.5e-3, betas=(0.9, 0.98), weight_decay=0.0), 2.5e-3),
    ]
    low, high = lengths
    for step in (bar := tqdm(range(steps), desc=name, mininterval=10)):
        done = step / steps
        longest = min(high, 2 + int(done / 0.6 * (high - 1))) if grows else high
        rows = [draw(rng, rng.randint(low, longest)) for _ in range(BATCH)]
        ids = pad_sequence([torch.tensor(p + r) for p, r in rows], batch_first=True)
        labels = pad_sequence([torch.tensor([-100] * len(p) + r) for p, r in rows], batch_first=True, padding_value=-100)
        weights = weights_of(labels, kind, of_control)
        loss = full_ranking.weighted_token_nll(model(ids).logits, labels, weights)
        loss.backward()
        for optimizer, lr in optimizers:
            for group in optimizer.param_groups:
                group["lr"] = lr * peak * min((step + 1) / 20, 0.02 + 0.98 * 0.5 * (1 + math.cos(math.pi * done)))
            optimizer.step()
            optimizer.zero_grad()
        bar.set_postfix(loss=f"{loss.item():.3f}", refresh=False)


def base_model(seed: int) -> Qwen3ForCausalLM:
    """Return the base model of a seed, trained if it is not kept."""
    torch.manual_seed(seed)
    config = Qwen3Config(
        vocab_size=len(VOCABULARY), hidden_size=64, intermediate_size=128, num_hidden_layers=3, num_attention_heads=4,
        num_key_value_heads=4, head_dim=16, tie_word_embeddings=True, pad_token_id=0, eos_token_id=1, bos_token_id=None,
        max_position_embeddings=256,
    )  # fmt: skip
    model, path = Qwen3ForCausalLM(config), publish.work_folder(__file__, CODE) / f"base-{seed}.pt"
    if path.is_file():
        model.load_state_dict(torch.load(path, weights_only=True))
    else:
        train(model, f"base-{seed}", (2, N), "plain", BASE_STEPS, LR, lesson, grows=True)
        with store.atomic(path) as temporary:
            torch.save(model.state_dict(), temporary)
    return model


# --- ranking -------------------------------------------------------------------------------------------------


@torch.inference_mode()
def answer(model: Qwen3ForCausalLM, subject: str, spent: dict[str, int], passages: Sequence[str]) -> str:
    """Return the model's greedy answer, and add what it read and wrote to ``spent``."""
    ids = prompt(subject, passages)
    made = model.generate(
        torch.tensor([ids]), attention_mask=torch.ones(1, len(ids)), max_new_tokens=2 * len(passages), do_sample=False
    )[0, len(ids) :]
    for name, amount in (("read", len(ids)), ("written", len(made)), ("calls", 1)):
        spent[name] += amount
    return "".join(VOCABULARY[i] for i in made.tolist())


def ranked(model: Qwen3ForCausalLM, way: str) -> list[dict[str, float]]:
    """Return NDCG and tokens of each test problem."""
    rows = []
    for p in problems():
        passages, spent = p.meta["passages"], dict.fromkeys(("read", "written", "calls"), 0)
        rank = full_ranking.listwise(passages, partial(answer, model, p.meta["subject"], spent))
        first = list(range(N))
        order = list(rank(first)) if way == FULL else full_ranking.sliding_windows(first, rank, window=WINDOW, step=STEP)
        rows.append(scores(order, p.meta["relevance"]) | spent)
    return rows


def scores(order: Sequence[int], relevance: Sequence[int]) -> dict[str, float]:
    """Return the NDCG over all ranks, and over the first ``TOP``."""
    return {"ndcg": ndcg(order, relevance), "ndcg_top": ndcg(order, relevance, TOP)}


@cache
def problems() -> list[Any]:
    """Return the test problems, with the candidates of BM25 in its order."""
    return ranking.load("test", PROBLEMS, 0, candidates=N, clauses=CLAUSES, retrieve=ranking.bm25)


def without_model(seed: int) -> dict[str, list[dict[str, float]]]:
    """Return the scores of the order of BM25, and of random orders."""
    rng, tests = random.Random(f"ranking-order-{seed}"), problems()
    return {
        "order of BM25": [scores(range(N), p.meta["relevance"]) for p in tests],
        "random order": [scores(rng.sample(range(N), N), p.meta["relevance"]) for p in tests],
    }


def measured(seed: int) -> dict[str, list[dict[str, float]]]:
    """Return the rows of every arm and way of one seed; parts that are kept are read."""
    parts = without_model(seed)
    base: Callable[[], Qwen3ForCausalLM] = partial(base_model, seed)
    for arm, (low, high, kind, ways) in ARMS.items():
        path = publish.work_folder(__file__, CODE) / f"{store.safe_name(arm)}-{seed}.json"
        if not path.is_file():
            model = copy.deepcopy(base())
            train(model, f"{arm}-{seed}", (low, high), kind, ARM_STEPS, ARM_LR, list_lesson)
            store.write_json({f"{arm}, ranked {way}": ranked(model.eval(), way) for way in ways}, path)
        parts |= store.read_json(path, dict[str, list[Any]])
    return parts


# --- results -------------------------------------------------------------------------------------------------

COMPARED = {
    "full ranking instead of windows, each trained for its way": ("full, ranked at once", "windows, ranked in windows"),
    "full ranking instead of windows, same model": ("full, ranked at once", "full, ranked in windows"),
    "weights by rank instead of the plain loss": ("full, weighted, ranked at once", "full, ranked at once"),
    "control: shuffled weights instead of the plain loss": ("full, shuffled weights, ranked at once", "full, ranked at once"),
    "weights by rank instead of shuffled weights": ("full, weighted, ranked at once", "full, shuffled weights, ranked at once"),
    "windows instead of the order of BM25": ("windows, ranked in windows", "order of BM25"),
    "control: random order instead of the order of BM25": ("random order", "order of BM25"),
}
"""Difference -> the two conditions, first minus second."""


def estimate(values: np.ndarray, minus: np.ndarray | None = None, *, seeded: bool = True) -> dict[str, Any]:
    e = stats.mean_effect(values, minus, seeded=seeded)
    return {"mean": e.mean, "low": e.low, "high": e.high} | ({} if minus is None else {"p": e.p, "note": e.note})


def results(by_seed: Sequence[dict[str, list[dict[str, float]]]]) -> dict[str, Any]:
    """Return means and differences with 95 % intervals over problems and seeds."""

    def column(condition: str, name: str) -> np.ndarray:
        return np.array([[float(row[name]) for row in parts[condition]] for parts in by_seed])

    conditions = {name: {metric: estimate(column(name, metric)) for metric in rows[0]} for name, rows in by_seed[0].items()}
    differences = {
        name: {metric: estimate(column(a, metric), column(b, metric)) for metric in ("ndcg", "ndcg_top")}
        for name, (a, b) in COMPARED.items()
    }
    return {"conditions": conditions, "differences": differences}


def table(found: dict[str, Any]) -> str:
    """Return the results as Markdown tables."""

    def cell(e: dict[str, Any], digits: int, sign: str = "") -> str:
        return f"{e['mean']:{sign}.{digits}f} [{e['low']:{sign}.{digits}f}, {e['high']:{sign}.{digits}f}]"

    lines = [f"| condition | NDCG | NDCG of the first {TOP} | tokens read | tokens written |", "| --- | --- | --- | --- | --- |"]
    for name, row in found["conditions"].items():
        tokens = [f"{row[key]['mean']:.0f}" if key in row else "" for key in ("read", "written")]
        lines.append(f"| {name} | {cell(row['ndcg'], 3)} | {cell(row['ndcg_top'], 3)} | {' | '.join(tokens)} |")
    lines += ["", f"| difference | NDCG | NDCG of the first {TOP} |", "| --- | --- | --- |"]
    lines += [
        f"| {name} | {cell(row['ndcg'], 3, '+')} | {cell(row['ndcg_top'], 3, '+')} |" for name, row in found["differences"].items()
    ]
    return "\n".join(lines)


def main() -> None:
    torch.set_num_threads(1)
    torch.set_flush_denormal(True)  # denormal gradients make a CPU several times slower
    ranking.bm25_scores("mill", ["describes the mill"])  # refuses now, not after the training, if BM25 is missing
    found = results([measured(seed) for seed in SEEDS])
    sizes = {"problems": PROBLEMS, "candidates": N, "window": WINDOW, "step": STEP, "clauses": CLAUSES, "top": TOP}
    sizes |= {"base_steps": BASE_STEPS, "arm_steps": ARM_STEPS, "batch": BATCH, "peak": LR, "arm_peak": ARM_LR}
    store.write_json({"seeds": SEEDS, "sizes": sizes, "made_by": store.made_by(CODE), **found}, HERE / "results.json")
    publish.splice("ranking", table(found), HERE / "README.md")


if __name__ == "__main__":
    main()
