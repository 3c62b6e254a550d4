"""Measure reward heads on contexts of several lengths, after LongRM: ``python data/longrm/measure.py``.

Needs ``make smol``. Writes ``results.json`` and the table in ``README.md`` here. The states of every context are kept in ``runs/longrm``, so
after a stop the same command goes on; other code, settings or weights start anew. About 5 minutes on one core.

The judge is a linear head on the frozen states of SmolLM2-135M-Instruct. A context holds a fact and three rivals: facts of the same kind
with other names and other answers. It is padded with filler to 96, 192 or 384 tokens, and followed by the question of the fact, and by four
responses to judge: the fact, and the same sentence with the answers of the rivals. So every answer occurs in the context, and only its name
tells which is right. Two heads are trained on the same problems and as many pairs:

- *short*: all contexts have the shortest length;
- *padded*: each problem has one of the three lengths.

Each head has two controls. Contexts *without the fact* hold the rivals only, so a head that reads the context cannot be better than chance
there; one that is has learnt something else, such as which answers are likely. The other control is heads that are trained on shuffled labels: their mean accuracy, which is near chance by symmetry, and the range of 95 %
of them, which says how far chance alone takes one head. The layer is chosen by cross-validation over the
training problems, with the short contexts. Facts in training and test have no question in common.
"""

from __future__ import annotations

import random
import sys
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any

import numpy as np
import torch
from tqdm.auto import tqdm

from toolkit import judging, stats, store
from toolkit import lm as lms
from toolkit.lm import LM
from toolkit.methods import longrm
from toolkit.tasks import needle
from toolkit.tasks.needle import Needle

HERE = Path(__file__).parent
ROOT = HERE.parents[1]
sys.path.insert(0, str(ROOT / "data"))
import publish  # noqa: E402

CODE = store.code_of("toolkit.methods.longrm", "toolkit.judging.heads", "toolkit.tasks.needle")
LENGTHS, PROBLEMS, POOL, WRONG, FOLDS, CONTROLS, SEED = (96, 192, 384), 32, 400, 3, 4, 200, 0
WITHOUT, SHUFFLED = ", without the fact", ", shuffled labels"
PAIRS = np.array([[0, j] for j in range(1, WRONG + 1)])  # of one context: the right response and each wrong one


def kind(fact: Needle) -> tuple[str, bool]:
    """Return what the answers of one kind of fact share: the first two words of the question, and whether the answer is a number."""
    return " ".join(fact.question.split()[:2]), fact.answer.isdigit()


def rivals(fact: Needle, pool: Sequence[Needle]) -> list[Needle]:
    """Return facts of the same kind with other questions and other answers."""
    others = {o.answer: o for o in pool if kind(o) == kind(fact) and o.question != fact.question and o.answer != fact.answer}
    return random.Random(f"longrm-{fact.sentence}").sample(list(others.values()), WRONG)


def candidates(fact: Needle, others: Sequence[Needle]) -> list[str]:
    """Return the fact's sentence, and the same sentence with the answers of its rivals."""
    return [fact.sentence, *(fact.sentence.replace(fact.answer, other.answer) for other in others)]


def states(
    lm: LM, split: str, lengths: Callable[[int], Sequence[int]], *, with_fact: bool = True
) -> dict[tuple[int, int], np.ndarray]:
    """Return the states ``[responses, layers, d_model]`` of every context, by ``(problem, length)``; states that are kept are read.

    Args:
        lengths: Function from a problem's index to the lengths of its contexts.
        with_fact: False to leave the fact out of the contexts.
    """
    work = publish.work_folder(__file__, CODE, lm.fingerprint)
    facts, pool = needle.facts(split, PROBLEMS, SEED), needle.facts(split, POOL, SEED + 1)
    made: dict[tuple[int, int], np.ndarray] = {}

    def ids(text: str) -> list[int]:
        return lm.tokenizer(text, add_special_tokens=False)["input_ids"]

    name = split if with_fact else f"{split}{WITHOUT}"
    for i, fact in enumerate(tqdm(facts, desc=name, mininterval=10)):
        others = rivals(fact, pool)
        # The fact stands among its rivals at a place of its own in every problem.
        critical = [o.sentence for o in others]
        if with_fact:
            critical.insert(random.Random(f"place-{split}-{i}").randrange(WRONG + 1), fact.sentence)
        filler = needle.sentences(random.Random(f"longrm-{split}-{i}"))
        chunks = [next(filler) for _ in range(max(LENGTHS) // 8 + 8)]
        for n in lengths(i):
            path = work / f"{store.safe_name(name)}-{i}-{n}.npy"
            if not path.is_file():
                context = longrm.pad_to_length(critical, chunks, n, lambda text: len(ids(text)), seed=i)
                prompt = ids(f"{context.text}\n\nQuestion: {fact.question}\nAnswer:")
                responses = [ids(f" {text}") for text in candidates(fact, others)]
                with store.atomic(path) as temporary, temporary.open("wb") as stream:
                    np.save(stream, judging.response_states(lm, prompt, responses).numpy())
            made[i, n] = np.load(path)
    return made


def rows_of(contexts: Sequence[np.ndarray], layer: int) -> tuple[np.ndarray, np.ndarray]:
    """Return the features of all responses at one layer, and the pairs of right and wrong responses as rows of them."""
    features = np.concatenate([c[:, layer] for c in contexts])
    return features, np.concatenate([PAIRS + (WRONG + 1) * i for i in range(len(contexts))])


def chosen_layer(contexts: Sequence[np.ndarray]) -> tuple[int, float]:
    """Return the layer with the best pairwise accuracy in cross-validation over problems, and this accuracy."""

    def accuracy(layer: int) -> float:
        right = []
        for fold in range(FOLDS):
            seen = [c for i, c in enumerate(contexts) if i % FOLDS != fold]
            features, pairs = rows_of([c for i, c in enumerate(contexts) if i % FOLDS == fold], layer)
            head = judging.fit(*rows_of(seen, layer), layer=layer, fingerprint="")
            right.append(stats.pair_agreement(head.score(features), pairs).mean())
        return float(np.mean(right))

    by_layer = {layer: accuracy(layer) for layer in range(contexts[0].shape[1])}
    best = max(by_layer, key=lambda layer: by_layer[layer])
    return best, by_layer[best]


def accuracies(head: judging.RewardHead, test: Sequence[np.ndarray]) -> dict[str, np.ndarray]:
    """Return the pairwise and the best-of-n accuracy on each context of one length."""
    scores = np.stack([head.score(c[:, head.layer]) for c in test])
    right = np.zeros(scores.shape, bool)
    right[:, 0] = True
    pairwise = np.array([stats.pair_agreement(row, PAIRS).mean() for row in scores])
    return {"pairwise": pairwise, "best_of_n": judging.best_of(scores, right)}


Contexts = dict[tuple[int, int], np.ndarray]


def results(train: Contexts, test: Contexts, without: Contexts, fingerprint: str) -> dict[str, Any]:
    """Return accuracies by length of both heads and their controls, and the differences, with 95 % intervals over problems."""
    sets = {
        "short": [train[i, LENGTHS[0]] for i in range(PROBLEMS)],
        "padded": [train[i, LENGTHS[i % len(LENGTHS)]] for i in range(PROBLEMS)],
    }
    layer, validated = chosen_layer(sets["short"])
    values: dict[tuple[str, int], dict[str, np.ndarray]] = {}
    single: dict[tuple[str, int], dict[str, list[float]]] = {}  # of 95 % of the heads trained on shuffled labels
    for name, contexts in sets.items():
        features, pairs = rows_of(contexts, layer)
        head = judging.fit(features, pairs, layer=layer, fingerprint=fingerprint)
        controls = [
            judging.fit(features, judging.flipped(pairs, seed=s), layer=layer, fingerprint=fingerprint) for s in range(CONTROLS)
        ]
        for n in LENGTHS:
            here = [test[i, n] for i in range(PROBLEMS)]
            values[name, n] = accuracies(head, here)
            values[name + WITHOUT, n] = accuracies(head, [without[i, n] for i in range(PROBLEMS)])
            shuffled = [accuracies(control, here) for control in controls]
            control = name + SHUFFLED, n
            values[control] = {m: np.mean([a[m] for a in shuffled], axis=0) for m in shuffled[0]}
            single[control] = {m: np.quantile([a[m].mean() for a in shuffled], [0.025, 0.975]).tolist() for m in shuffled[0]}
    compared = [(name, name + control) for name in sets for control in (WITHOUT, SHUFFLED)] + [("padded", "short")]
    ids = list(map(str, range(PROBLEMS)))

    def estimate(x: np.ndarray) -> dict[str, float]:
        e = stats.over_problems(x, ids)
        return {"mean": e.mean, "low": e.low, "high": e.high}

    return {
        "layer": layer,
        "cross-validated": validated,
        "accuracy": [
            {"head": name, "length": n, **{m: estimate(x) for m, x in v.items()}, "single_heads": single.get((name, n), {})}
            for (name, n), v in values.items()
        ],
        "differences": [
            {"first": a, "minus": b, "length": n, **{m: estimate(values[a, n][m] - values[b, n][m]) for m in values[a, n]}}
            for a, b in compared
            for n in LENGTHS
        ],
    }


def table(found: dict[str, Any]) -> str:
    """Return the results as Markdown tables."""

    def cell(e: dict[str, float], sign: str = "") -> str:
        return f"{100 * e['mean']:{sign}.0f} [{100 * e['low']:{sign}.0f}, {100 * e['high']:{sign}.0f}]"

    lines = [f"| head trained on | tokens of the context | pairwise, % | best of {WRONG + 1}, % |", "| --- | --- | --- | --- |"]
    for r in found["accuracy"]:
        ranges = {m: f"; single heads {100 * low:.0f} to {100 * high:.0f}" for m, (low, high) in r["single_heads"].items()}
        cells = [cell(r[m]) + ranges.get(m, "") for m in ("pairwise", "best_of_n")]
        lines.append(f"| {r['head']} | {r['length']} | {' | '.join(cells)} |")
    lines += [
        "", "| difference | tokens of the context | pairwise, points | best of " f"{WRONG + 1}, points |", "| --- | --- | --- | --- |",
    ]  # fmt: skip
    lines += [
        f"| {r['first']} minus {r['minus']} | {r['length']} | {cell(r['pairwise'], '+')} | {cell(r['best_of_n'], '+')} |"
        for r in found["differences"]
    ]
    return "\n".join(lines)


def main() -> None:
    torch.set_num_threads(1)
    lm = lms.load(lms.smollm2_path(), device="cpu", tags=lms.ThinkTags(None, None))
    train = states(lm, "train", lambda i: sorted({LENGTHS[0], LENGTHS[i % len(LENGTHS)]}))
    test, without = (states(lm, "test", lambda i: LENGTHS, with_fact=fact) for fact in (True, False))
    sizes = {
        "lengths": LENGTHS,
        "problems": PROBLEMS,
        "pool": POOL,
        "wrong": WRONG,
        "folds": FOLDS,
        "controls": CONTROLS,
        "seed": SEED,
    }
    about = {"sizes": sizes, "fingerprint": lm.fingerprint, "made_by": store.made_by(CODE)}
    found = results(train, test, without, lm.fingerprint)
    store.write_json(about | found, HERE / "results.json")
    publish.splice("longrm", table(found), HERE / "README.md")


if __name__ == "__main__":
    main()
