"""Measure five rewards of several aspects on generated data: ``python data/aspects/measure.py``.

Needs ``make smol``. Writes ``results.json`` and the tables in ``README.md`` here. Finished parts, policies and responses are kept in
``runs/aspects``, so after a stop the same command goes on; other code or settings start anew. About 10 minutes on one core. Brackets are
95 % intervals: over problems, pairs or groups, and for policies over problems and three seeds. Each head of a judge is fitted once.

- *Fine-Grained RLHF*: the tiny reasoner is trained with rewards at segment ends and one advantage per token, and with the same rewards paid
  at the end (holistic), paid for errors only, or replaced by correctness. The control is dense rewards whose values are shuffled
  among the segments of a response.
- *CRM*: judges on the tiny reasoner's states, trained on planted redundancy, on sampled pairs by length, and on shuffled labels; tested on
  pairs of chains with equal numbers of lines.
- *Beyond monolithic*: a rule that cannot read a random half of the answers, a head trained on right and wrong chains, and both joined. The
  control is a head trained on shuffled labels.
- *ACE-RL*: SmolLM2 answers generated instructions. Groups in which the reward varies are those that GRPO can learn from: with the
  checklist, with and without the score of the length, which nearly always varies, and with all constraints or nothing. The control pays for
  the constraints of another instruction, so its score of the length varies, too.
- *PageLLM*: a Plackett-Luce policy learns to rank pages with REINFORCE, from the page alone, from items too, and from shuffled items.
"""

from __future__ import annotations

import random
import sys
from collections.abc import Callable, Sequence
from dataclasses import dataclass, field, replace
from pathlib import Path
from typing import Any, ClassVar

import numpy as np
import torch

from toolkit import generate, judging, stats, store, tasks
from toolkit import lm as lms
from toolkit.constraints import extract
from toolkit.generate import Sampling
from toolkit.grpo import advantages, judge, recipes
from toolkit.grpo.extras import Extras
from toolkit.grpo.run import Run, train
from toolkit.lm import LM
from toolkit.metrics import with_interval
from toolkit.rewards import RewardBatch, RewardValues
from toolkit.rewards.ace_rl import ACERL
from toolkit.rewards.answers import answer_text
from toolkit.rewards.beyond_monolithic import hybrid
from toolkit.rewards.columns import object_array
from toolkit.rewards.fine_grained import FineGrained, Response, Segment, irrelevant, wrong_facts
from toolkit.rewards.page_llm import PageLLM
from toolkit.stats.rankings import ndcg, written
from toolkit.tasks import arithmetic, ranking
from toolkit.tasks.generators.redundant import KINDS, concise, equal_lengths, pairs

HERE = Path(__file__).parent
sys.path.insert(0, str(HERE.parent))
import publish  # noqa: E402

CODE = store.code_of(
    "toolkit.grpo.run", "toolkit.grpo.recipes:plain", "toolkit.grpo.recipes:fine_grained", "toolkit.rewards.correctness",
    "toolkit.rewards.fine_grained", "toolkit.rewards.ace_rl", "toolkit.rewards.beyond_monolithic", "toolkit.rewards.page_llm",
    "toolkit.judging.heads", "toolkit.tasks.arithmetic", "toolkit.tasks.instructions", "toolkit.tasks.ranking",
    "toolkit.tasks.generators.redundant", "toolkit.generate", "toolkit.stats",
)  # fmt: skip
SEEDS, STEPS, PROBLEMS, SAMPLES, TESTS, RATE = (0, 1, 2), 15, 8, 8, 60, 3e-4
PAIRS, FLIPS, DRAWN = 150, 10, 2
INSTRUCTIONS, ANSWERS, TOKENS = 16, 4, 90
PAGES, PAGE_STEPS, PAGE_SAMPLES, PAGE_RATE = 40, 120, 8, 0.3


def estimate(values: Any, ids: Sequence[str] | None = None) -> dict[str, float]:
    v = np.asarray(values, float)
    e = stats.over_problems(v, list(ids) if ids is not None else list(map(str, range(len(v)))))
    return {"mean": e.mean, "low": e.low, "high": e.high}


# --- Fine-Grained RLHF -------------------------------------------------------------------------------------------


@dataclass(frozen=True)
class Shuffled:
    """Fine-grained rewards with the values of each response's segments given to its segments at random.

    Equal seeds and steps give equal orders; a response that is sampled again has another.
    """

    seed: int
    inner: FineGrained = field(default_factory=FineGrained)
    name: ClassVar[str] = "shuffled segments"
    needs: ClassVar[frozenset[str]] = FineGrained.needs

    def segments(self, batch: RewardBatch) -> list[list[Segment]]:
        made, rng = [], np.random.default_rng([self.seed, batch.step])
        for own in self.inner.segments(batch):
            values = rng.permutation([s.value for s in own]).tolist()
            made.append([s._replace(value=v) for s, v in zip(own, values, strict=True)])
        return made

    def __call__(self, batch: RewardBatch) -> RewardValues:
        return self.inner(batch)


ARMS: dict[str, tuple[Callable[[int], Any] | None, str]] = {
    "correctness": (None, "grpo"),
    "at the end (holistic)": (lambda seed: FineGrained(), "grpo"),
    "at segment ends": (lambda seed: FineGrained(), "reward_to_go"),
    "at segment ends, errors only": (lambda seed: FineGrained(assumed_right_step=0.0), "reward_to_go"),
    "shuffled among segments (control)": (Shuffled, "reward_to_go"),
}
"""Arm -> function from the seed to the reward (None: correctness), and advantage. Only the control depends on the seed."""
# Steps are counted like calls: numbers from 0.
OUTCOMES = {"accuracy": "share", "think tokens": "tokens", "wrong steps": "calls", "repeated or foreign steps": "calls"}


def outcomes(lm: LM, tests: Sequence[Any], seed: int) -> np.ndarray:
    """Return the outcomes of each response, ``[responses, outcomes]``; problems in order, ``DRAWN`` samples each."""
    rows = []
    by_id = {p.id: p for p in tests}
    for r in generate.rollouts(lm, tests, Sampling(n=DRAWN, max_new_tokens=200, seed=seed), progress=False):
        response = Response(r.text, by_id[r.problem_id].messages[0]["content"], "", r.correct)
        wrong, foreign = (sum(s.score < 0 for s in f(response)) for f in (wrong_facts, irrelevant))
        rows.append((r.correct, r.think_tokens, wrong, foreign))
    return np.array(rows, float)


def fine_grained(work: Path) -> dict[str, Any]:
    """Return outcomes of each arm, and differences to the arm with correctness, over problems and seeds."""
    tiny = lms.load("tiny-reasoner", device="cpu")
    problems, tests = tasks.load("arithmetic", "train", 256), tasks.load("arithmetic", "test", TESTS)
    measured: dict[str, list[np.ndarray]] = {"base": []}
    for seed in SEEDS:
        measured["base"].append(outcomes(tiny, tests, seed))
        for name, (reward, advantage) in ARMS.items():
            recipe = replace(
                recipes.find("correctness" if reward is None else "fine_grained").scaled(),
                problems=PROBLEMS, samples=SAMPLES, learning_rate=RATE, advantage=advantage, max_tokens=120,
            )  # fmt: skip
            kept = work / f"{list(ARMS).index(name)}-{seed}.npy"
            if not kept.is_file():
                out = work / f"run-{list(ARMS).index(name)}-{seed}"
                run = Run(out, steps=STEPS, seed=seed, evaluate_every=0)
                done = train(tiny, recipe, problems, run, extras=Extras(reward=reward and reward(seed)), resume=out.exists())
                with store.atomic(kept) as temporary, temporary.open("wb") as stream:
                    np.save(stream, outcomes(done.lm, tests, seed))
            measured.setdefault(name, []).append(np.load(kept))
    rows = {
        name: {o: publish.estimate(per_problem(v, i), unit=unit) for i, (o, unit) in enumerate(OUTCOMES.items())}
        for name, v in measured.items()
    }
    compared = [(a, b) for a, b in (
        ("at segment ends", "at the end (holistic)"), ("at segment ends", "shuffled among segments (control)"),
        ("at segment ends", "correctness"), ("at segment ends, errors only", "at segment ends"),
    )]  # fmt: skip
    differences = [
        {"first": a, "minus": b}
        | {
            o: publish.estimate(per_problem(measured[a], i), per_problem(measured[b], i), unit=unit)
            for i, (o, unit) in enumerate(OUTCOMES.items())
        }
        for a, b in compared
    ]
    return {"arms": rows, "differences": differences}


def per_problem(by_seed: Sequence[np.ndarray], outcome: int) -> np.ndarray:
    """Return the mean of an outcome over the samples of each problem, ``[seeds, problems]``."""
    return np.array([x[:, outcome].reshape(-1, DRAWN).mean(1) for x in by_seed])


# --- judges ------------------------------------------------------------------------------------------------------


def crm(work: Path) -> dict[str, Any]:
    """Return the share of pairs with equal numbers of lines that each judge orders rightly; pairs with all kinds of redundancy, and restatements alone."""
    tiny = lms.load("tiny-reasoner", device="cpu")
    problems, held_out = arithmetic.load("train", PAIRS, operands=(3, 8)), arithmetic.load("test", PAIRS, operands=(3, 8))
    made, flips = pairs(problems, seed=0), np.random.default_rng(0).random((FLIPS, PAIRS)) < 0.5
    heads = {
        "planted": judge.train_on_planted(tiny, made).head,
        "by length": judge.train_judge(tiny, problems[:64], Sampling(8, max_new_tokens=200, seed=0)).head,
    }
    shuffled = [judge.train_on_planted(tiny, made, reverse=f.tolist()).head for f in flips]
    found: dict[str, Any] = {}
    for name, kinds in {"all kinds": KINDS, "restatements": KINDS[1:]}.items():
        tests = equal_lengths(held_out, 0, kinds)
        states = judge.chain_states(tiny, [c for pair in tests for c in pair])
        rows = np.arange(len(states)).reshape(-1, 2)
        right = {head: stats.pair_agreement(h.logits(states), rows) for head, h in heads.items()}
        controls = [stats.pair_agreement(h.logits(states), rows) for h in shuffled]
        found |= {f"{head}, {name}": estimate(v) for head, v in right.items()}
        found[f"planted minus by length, {name}"] = estimate(right["planted"] - right["by length"])
        found[f"shuffled labels, {name}"] = estimate(np.mean(controls, axis=0))
        found[f"pairs, {name}"] = len(tests)
        found[f"single heads with shuffled labels, {name}"] = np.quantile([c.mean() for c in controls], [0.025, 0.975]).tolist()
    return found


def monolithic(work: Path) -> dict[str, Any]:
    """Return the AUC of right against wrong chains, by rule, by model, and by both."""
    tiny, rng = lms.load("tiny-reasoner", device="cpu"), np.random.default_rng(0)
    sets = {split: [concise(p) for p in arithmetic.load(split, PAIRS, operands=(3, 6))] for split in ("train", "test")}

    def both(chains: Sequence[Any]) -> list[Any]:
        # The wrong one ends in another answer.
        return [c for right in chains for c in (right, replace(right, problem=_wrong(right.problem)))]

    features = {split: judge.chain_states(tiny, both(chains)) for split, chains in sets.items()}
    rows = np.arange(2 * PAIRS).reshape(-1, 2)
    correct, sure = np.tile([1.0, 0.0], PAIRS), (rng.random(2 * PAIRS) < 0.5).astype(float)

    def aucs(scores: np.ndarray) -> dict[str, Any]:
        forms = {
            "rule": sure * correct + (1 - sure) * 0.5,
            "model": scores,
            "both": sum(hybrid(correct, sure, scores)),
        }
        return {name: stats.pair_agreement(v, rows) for name, v in forms.items()}

    head = judging.fit(features["train"], rows, layer=tiny.layout.n_layers - 1, fingerprint=tiny.fingerprint)
    found = aucs(head.score(features["test"]))
    flipped = [
        aucs(judging.fit(features["train"], judging.flipped(rows, seed=s), layer=0, fingerprint="").score(features["test"]))["both"]
        for s in range(FLIPS)
    ]
    return {
        **{name: estimate(v) for name, v in found.items()},
        "both, shuffled labels": estimate(np.mean(flipped, axis=0)),
        "both minus rule": estimate(found["both"] - found["rule"]),
        "both minus both, shuffled labels": estimate(found["both"] - np.mean(flipped, axis=0)),
    }


def _wrong(p: Any) -> Any:
    shift = random.Random(p.id).choice([-10, -2, -1, 1, 2, 10])
    return replace(p, answer=str(abs(int(p.answer) + shift) if abs(int(p.answer) + shift) != int(p.answer) else int(p.answer) + 3))


# --- ACE-RL ------------------------------------------------------------------------------------------------------


def ace_rl(work: Path) -> dict[str, Any]:
    """Return how often each reward varies within a group of SmolLM2's answers, and the share of constraints met."""
    lm = lms.load(lms.smollm2_path(), device="cpu", tags=lms.ThinkTags(None, None))
    problems = tasks.load("instructions", "train", INSTRUCTIONS)
    rollouts = generate.rollouts(lm, problems, Sampling(n=ANSWERS, max_new_tokens=TOKENS, seed=0), progress=False)
    # A response that was cut off has no answer span; it is scored as it is.
    texts = [answer_text(r.text, None) for r in rollouts]
    batch = RewardBatch.from_rollouts(rollouts, problems, close=None).with_columns(answer_text=object_array(texts))
    other = np.roll(batch["question"], ANSWERS)
    met = [[c.met(a) for c in extract(q)] for q, a in zip(batch["question"], batch["answer_text"], strict=True)]
    whole = np.array([np.mean(each) for each in met])
    forms = {
        "checklist and length": ACERL()(batch).values,
        "checklist: share of constraints met": whole,
        "all or nothing": np.array([all(each) for each in met], float),
        "checklist of another instruction and length (control)": ACERL()(batch.with_columns(question=other)).values,
    }
    groups, best = batch.groups, {}
    for name, values in forms.items():
        gain = [
            whole[groups == g][values[groups == g] == values[groups == g].max()].mean() - whole[groups == g].mean()
            for g in range(groups.max() + 1)
        ]
        best[name] = {
            "varies": estimate([np.ptp(values[groups == g]) > 1e-9 for g in range(groups.max() + 1)]),
            "best of 4 minus mean, share met": estimate(gain),
        }
    return {"share met": estimate(whole, list(map(str, groups))), "rewards": best}


# --- PageLLM -----------------------------------------------------------------------------------------------------


def features_of(p: Any) -> np.ndarray:
    """Return the features of each passage: the verb of the subject, other verbs, and two numbers at random."""
    rng = np.random.default_rng(int(p.id.rsplit("-", 1)[-1][:8], 16))
    rows = []
    for passage in p.meta["passages"]:
        own = [f"{verb} the {p.meta['subject']}" in passage for verb in ranking.VERBS]
        rows.append([*own, *(passage.count(verb) for verb in ranking.VERBS)])
    return np.hstack([np.array(rows, float), rng.normal(size=(len(rows), 2))])


def rank(weights: np.ndarray, x: np.ndarray, rng: np.random.Generator | None) -> list[int]:
    """Return a ranking drawn from the Plackett-Luce policy; the best one without random numbers."""
    noise = rng.gumbel(size=len(x)) if rng is not None else 0.0
    return np.argsort(-(x @ weights + noise), kind="stable").tolist()


def gradient(weights: np.ndarray, x: np.ndarray, order: Sequence[int], advantage: np.ndarray) -> np.ndarray:
    """Return the policy gradient of one ranking: the sum over ranks of the advantage times the gradient of the log-probability."""
    total = np.zeros_like(weights)
    for r in range(len(order)):
        rest = list(order[r:])
        logits = x[rest] @ weights
        p = np.exp(logits - logits.max())
        total += advantage[r] * (x[order[r]] - (p / p.sum()) @ x[rest])
    return total


def page_llm(work: Path) -> dict[str, Any]:
    """Return NDCG on held-out pages of policies that are trained with each reward."""
    pages, tests = tasks.load("ranking", "train", PAGES), tasks.load("ranking", "test", PAGES)
    inputs = {p.id: features_of(p) for p in [*pages, *tests]}
    measured: dict[str, list[np.ndarray]] = {"page": [], "page and items": [], "page and shuffled items (control)": []}
    for seed in SEEDS:
        for name, scores in measured.items():
            rng, weights = np.random.default_rng(seed), np.zeros(next(iter(inputs.values())).shape[1])
            for step in range(PAGE_STEPS):
                p = pages[step % len(pages)]
                x, relevance = inputs[p.id], tuple(p.meta["relevance"])
                orders = [rank(weights, x, rng) for _ in range(PAGE_SAMPLES)]
                written_orders = [written(o) for o in orders]
                columns = {"text": written_orders, "answer_text": written_orders, "relevance": [relevance] * len(orders)}
                batch = RewardBatch.from_columns(**columns)
                each = np.zeros((PAGE_SAMPLES, len(x)))
                for row, own in zip(each, PageLLM().segments(batch), strict=True):
                    items = np.array([s.value for s in own[:-1]])
                    if "shuffled" in name:
                        items = rng.permutation(items)
                    row[: len(items)] = items if name != "page" else 0.0
                    row[-1] += own[-1].value
                values = advantages.reward_to_go(each, np.zeros(PAGE_SAMPLES, np.int64))
                step_gradient = [gradient(weights, x, o, a) for o, a in zip(orders, values, strict=True)]
                weights = weights + PAGE_RATE * np.mean(step_gradient, axis=0)
            scores.append(np.array([ndcg(rank(weights, inputs[p.id], None), p.meta["relevance"]) for p in tests]))
    random_order = [
        ndcg(np.random.default_rng(i).permutation(len(p.meta["relevance"])).tolist(), p.meta["relevance"])
        for i, p in enumerate(tests)
    ]
    rows = {name: publish.estimate(v) for name, v in measured.items()} | {"random order": estimate(random_order)}
    a = "page and items"
    return {"NDCG": rows, "differences": {b: publish.estimate(measured[a], measured[b]) for b in measured if b != a}}


# --- writing -----------------------------------------------------------------------------------------------------

PARTS: dict[str, Callable[[Path], dict[str, Any]]] = {
    "crm": crm, "monolithic": monolithic, "page_llm": page_llm, "ace_rl": ace_rl, "fine_grained": fine_grained,
}  # fmt: skip


def cell(e: dict[str, float], sign: str = "", unit: str = "share") -> str:
    return with_interval(e["mean"], e["low"], e["high"], unit, sign=sign)


def tables(found: dict[str, Any]) -> dict[str, str]:
    """Return mark -> Markdown table."""
    fine, ace, page = found["fine_grained"], found["ace_rl"], found["page_llm"]
    head = f"| | {' | '.join(OUTCOMES)} |\n{'| --- ' * (len(OUTCOMES) + 1)}|"
    arms = [f"| {n} | {' | '.join(cell(r[o], unit=u) for o, u in OUTCOMES.items())} |" for n, r in fine["arms"].items()]
    more = [
        f"| *{d['first']}* minus *{d['minus']}* | {' | '.join(cell(d[o], '+', u) for o, u in OUTCOMES.items())} |"
        for d in fine["differences"]
    ]
    simple = {
        mark: "\n".join(
            [
                "| | pairs ordered rightly, % |",
                "| --- | --- |",
                *(f"| {n} | {cell(e)} |" for n, e in found[mark].items() if isinstance(e, dict)),
                *(
                    f"| {n}: 95 % lie in | [{100 * e[0]:.1f}, {100 * e[1]:.1f}] |"
                    for n, e in found[mark].items()
                    if isinstance(e, list)
                ),
            ]
        )
        for mark in ("crm", "monolithic")
    }
    return {
        "fine_grained": "\n".join([head, *arms, *more]),
        **simple,
        "ace_rl": "\n".join(
            ["| reward | groups in which it varies, % | best of 4 minus mean, constraints met, points |", "| --- | --- | --- |"]
            + [
                f"| {n} | {cell(r['varies'])} | {cell(r['best of 4 minus mean, share met'], '+')} |"
                for n, r in ace["rewards"].items()
            ]
        ),
        "page_llm": "\n".join(
            ["| trained with | NDCG on held-out pages, % |", "| --- | --- |"]
            + [f"| {n} | {cell(e)} |" for n, e in page["NDCG"].items()]
            + [f"| *page and items* minus *{n}* | {cell(e, '+')} |" for n, e in page["differences"].items()]
        ),
    }


def main() -> None:
    torch.set_num_threads(1)
    loaded = lms.load("tiny-reasoner", device="cpu"), lms.load(lms.smollm2_path(), device="cpu", tags=lms.ThinkTags(None, None))
    work, found = publish.work_folder(__file__, CODE, [lm.fingerprint for lm in loaded]), {}
    for name, part in PARTS.items():
        path = work / f"{name}.json"
        if not path.is_file():
            store.write_json(part(work), path)
        found[name] = store.read_json(path)
    settings = {"seeds": SEEDS, "steps": STEPS, "problems": PROBLEMS, "samples": SAMPLES, "tests": TESTS, "pairs": PAIRS}
    store.write_json({"made_by": store.made_by(CODE), "settings": settings, **found}, HERE / "results.json")
    for mark, table in tables(found).items():
        publish.splice(mark, table, HERE / "README.md")


if __name__ == "__main__":
    main()
