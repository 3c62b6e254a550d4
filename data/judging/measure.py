"""Measure judges on generated preferences: ``python data/judging/measure.py``.

Needs ``make smol``. Writes ``results.json``, ``figure.png`` and the tables in ``README.md`` here. States and verdicts are kept in
``runs/judging``, so after a stop the same command goes on. About 10 minutes on one core.

The judge is a linear head on frozen states of SmolLM2-135M-Instruct. Responses are made by rule, so their true dimensions are known
(``tasks.generators.preferences``). Two annotators label the same pairs of responses: *plain* prefers the higher true quality; *length-loving*
also likes every word, which outweighs conciseness. One head per annotator and seed; a seed draws other training prompts. The control is heads
trained on shuffled labels. True quality is always the utility of the plain annotator. The layer is chosen by cross-validation on the
training prompts of the first seed.
"""

from __future__ import annotations

import random
import sys
from collections.abc import Sequence
from functools import partial
from pathlib import Path
from typing import Any, NamedTuple

import numpy as np
import pandas as pd
import torch

from toolkit import figures, judging, stats, store
from toolkit import lm as lms
from toolkit.generate import Sampling
from toolkit.grpo import advantages, log, measures
from toolkit.lm import LM
from toolkit.methods import branch_rethink, job_application, learning_to_summarize, mrmbench
from toolkit.methods.job_application import REJECTED, SELECTED, Penalties
from toolkit.progress import stage
from toolkit.tasks.generators import preferences
from toolkit.tasks.generators.preferences import DIMENSIONS, Annotator, Question, Response

HERE = Path(__file__).parent
sys.path.insert(0, str(HERE.parent))
import publish  # noqa: E402

CODE = store.code_of("toolkit.judging", "toolkit.tasks.generators.preferences", "toolkit.methods.branch_rethink")
SEEDS, TRAIN, TEST, SAMPLES, FOLDS, CONTROLS, VERDICTS = (0, 1, 2), 64, 24, 16, 4, 20, 12
NS, BETAS, KEPT = (1, 2, 4, 8, 16), (8.0, 4.0, 2.0, 1.0, 0.5, 0.25), 0.75
ANNOTATORS = {"plain": Annotator(), "length-loving": Annotator(length=0.1)}
PENALTIES = {
    "gentle": job_application.GENTLE,
    "aggressive": job_application.AGGRESSIVE,
    "aggressive for decisions": Penalties(wrong_select=5.0),
    "aggressive for claims": Penalties(unsupported=10.0),
}


class Part(NamedTuple):
    """Responses with their states, ``[prompts, samples, ...]``."""

    questions: list[Question]
    responses: list[list[Response]]
    states: np.ndarray

    def utility(self, annotator: Annotator) -> np.ndarray:
        return np.array([[annotator.utility(r) for r in row] for row in self.responses])

    @property
    def words(self) -> np.ndarray:
        return np.array([[r.words for r in row] for row in self.responses], float)


def states(lm: LM, work: Path, name: str, prompts: Sequence[str], texts: Sequence[Sequence[str]]) -> np.ndarray:
    """Return the states ``[prompts, samples, layers, d_model]`` of responses; states that are kept are read."""
    made, bar = [], stage(f"states of {name}", len(prompts), "prompt")
    for i, (prompt, row) in enumerate(zip(prompts, texts, strict=True)):
        path = work / f"{name}-{i}.npy"
        if not path.is_file():
            ids = lm.prompt_ids([{"role": "user", "content": prompt}])
            responses = [lm.tokenizer(text, add_special_tokens=False)["input_ids"] for text in row]
            with store.atomic(path) as temporary, temporary.open("wb") as stream:
                np.save(stream, judging.response_states(lm, ids, responses).numpy().astype(np.float16))
        made.append(np.load(path).astype(np.float32))
        bar.update(1)
    bar.close()
    return np.stack(made)


def part(lm: LM, work: Path, split: str, n: int, samples: int, seed: int) -> Part:
    """Return the responses of one split and seed."""
    questions = preferences.questions(split, n, seed)
    responses = [preferences.sample(q, samples, seed) for q in questions]
    texts = [[r.text for r in row] for row in responses]
    return Part(questions, responses, states(lm, work, f"{split}-{seed}", [q.prompt for q in questions], texts))


def pairs_of(utility: np.ndarray) -> np.ndarray:
    """Return pairs of neighbouring responses as rows of the flat arrays, the one of higher utility first; ties are left out."""
    flat, rows = utility.reshape(-1), np.arange(utility.size).reshape(-1, 2)
    rows = rows[flat[rows[:, 0]] != flat[rows[:, 1]]]
    return np.where((flat[rows[:, 0]] > flat[rows[:, 1]])[:, None], rows, rows[:, ::-1])


def features(part: Part, layer: int) -> np.ndarray:
    """Return the states at one layer, one row per response."""
    return part.states[:, :, layer].reshape(-1, part.states.shape[-1])


def chosen_layer(train: Part) -> int:
    """Return the layer with the best accuracy in cross-validation over prompts."""
    pairs, score = pairs_of(train.utility(ANNOTATORS["plain"])), {}
    fold = pairs[:, 0] // 2 % FOLDS
    for layer in range(train.states.shape[2]):
        x, right = features(train, layer), []
        for f in range(FOLDS):
            head = judging.fit(x, pairs[fold != f], layer=layer, fingerprint="")
            right += stats.pair_agreement(head.score(x), pairs[fold == f]).tolist()
        score[layer] = np.mean(right)
    return max(score, key=lambda layer: score[layer])


def estimate(e: stats.Estimate) -> dict[str, float]:
    return {"mean": e.mean, "low": e.low, "high": e.high}


# --- the heads -----------------------------------------------------------------------------------------------


def judged(trains: Sequence[Part], test: Part, layer: int) -> tuple[dict[str, Any], dict[str, np.ndarray]]:
    """Return reports on the heads of both annotators, and scores of the test responses: judge -> ``[seeds, prompts, samples]``."""
    x, prompts = features(test, layer), np.repeat(np.arange(TEST), SAMPLES).astype(str)
    true = pairs_of(test.utility(ANNOTATORS["plain"]))
    scores: dict[str, list[np.ndarray]] = {}
    for train in trains:
        z = features(train, layer)
        for name, annotator in ANNOTATORS.items():
            pairs = pairs_of(train.utility(annotator))
            gaps = np.abs(np.diff(train.utility(annotator).reshape(-1)[pairs], axis=1))[:, 0]
            fit = partial(judging.fit, z, layer=layer, fingerprint="")
            scores.setdefault(name, []).append(fit(pairs).score(x))
            scores.setdefault(f"{name}, margins", []).append(fit(pairs, margins=gaps).score(x))
            for s in range(CONTROLS):
                scores.setdefault(f"{name}, shuffled labels", []).append(fit(judging.flipped(pairs, seed=s)).score(x))
    reports = []
    for name in (*ANNOTATORS, *(f"{a}, margins" for a in ANNOTATORS)):
        tables = [judging.report(s, test.words.reshape(-1), true, prompts).set_index("metric") for s in scores[name]]
        for metric in tables[0].index:
            first = tables[0].loc[metric]
            reports.append(
                {"judge": name, "metric": metric, **first.to_dict(), "seeds": [float(t.loc[metric, "mean"]) for t in tables]}
            )
    agreement = {n: np.array([stats.pair_agreement(s, true) for s in v]) for n, v in scores.items()}
    of = prompts[true[:, 0]]

    def gap(a: str, b: str) -> dict[str, float]:
        return estimate(stats.over_problems(agreement[a].mean(axis=0) - agreement[b].mean(axis=0), of))

    differences = {
        "plain minus shuffled labels": gap("plain", "plain, shuffled labels"),
        "plain minus length-loving": gap("plain", "length-loving"),
        "margins minus none, plain": gap("plain, margins", "plain"),
    }
    return {"reports": reports, "differences": differences}, {n: np.stack(v).reshape(-1, TEST, SAMPLES) for n, v in scores.items()}


def curves(scores: dict[str, np.ndarray], test: Part) -> list[dict[str, Any]]:
    """Return score and true quality under optimisation against each judge; scores are in standard deviations of the test responses."""
    quality, rows = test.utility(ANNOTATORS["plain"]), []
    for name in (*ANNOTATORS, "plain, shuffled labels"):
        s = scores[name] / scores[name].std(axis=(1, 2), keepdims=True)
        table = learning_to_summarize.optimisation_curve(
            s.reshape(-1, SAMPLES),
            np.tile(quality, (len(s), 1)),
            ns=NS,
            betas=BETAS,
            problems=np.tile(np.arange(TEST), len(s)).astype(str),
        )
        rows += [{"judge": name, **row} for row in table.to_dict("records")]
    return rows


# --- dimensions ----------------------------------------------------------------------------------------------


def dimensions(lm: LM, work: Path, trains: Sequence[Part], test: Part, layer: int, scores: np.ndarray) -> dict[str, Any]:
    """Return accuracies of the probes, and what the distances to the centroids tell."""
    x = np.concatenate([features(t, layer) for t in trains])
    y = np.array([r.quality for t in trains for row in t.responses for r in row])
    held, held_y = features(test, layer), np.array([r.quality for row in test.responses for r in row])
    prompts = np.repeat(np.arange(TEST), SAMPLES).astype(str)
    table = mrmbench.probe_dimensions((x, y), (held, held_y), prompts, DIMENSIONS)

    def distances(of: np.ndarray, labels: np.ndarray) -> np.ndarray:
        centres = [mrmbench.centroids(x, labels[:, k]) for k in range(len(DIMENSIONS))]
        return np.min([mrmbench.centroid_distance(of, c) for c in centres], axis=0)

    d, pairs = distances(held, y), pairs_of(test.utility(ANNOTATORS["plain"]))
    right = np.mean([stats.pair_agreement(s.reshape(-1), pairs) for s in scores], axis=0)
    kept = mrmbench.within_quantile(d[pairs].max(axis=1), KEPT)
    rng = np.random.default_rng(0)
    chance = [right[k].mean() - right[~k].mean() for k in (rng.permutation(kept) for _ in range(1000))]
    # Responses whose words are in random order: they are of another kind than those of the centroids.
    texts = [
        [" ".join(random.Random(f"words-{r.text}").sample(r.text.split(), len(r.text.split()))) for r in row[:2]]
        for row in test.responses
    ]
    odd = states(lm, work, "mixed", [q.prompt for q in test.questions], texts)[:, :, layer].reshape(-1, x.shape[1])
    same = held.reshape(TEST, SAMPLES, -1)[:, :2].reshape(len(odd), -1)
    truth = np.repeat([True, False], len(odd))
    shuffled = np.stack([rng.permutation(y[:, k]) for k in range(y.shape[1])], axis=1)
    aucs = {
        n: stats.auc(truth, distances(np.concatenate([odd, same]), labels))
        for n, labels in (("centroids", y), ("shuffled", shuffled))
    }
    return {
        "probes": table.to_dict("records"),
        "filter": {"kept minus left out": float(right[kept].mean() - right[~kept].mean()), "chance": np.quantile(chance, [0.025, 0.975]).tolist()},
        "auc of mixed words": aucs,
    }  # fmt: skip


# --- applications and verdicts -------------------------------------------------------------------------------


def collapse() -> list[dict[str, Any]]:
    """Return the end of each polishing, over seeds, and the first step at which the alarm is raised."""
    train, test = job_application.applications("train", 400), job_application.applications("test", 200)
    gold, rows = [a.label for a in test], []
    selected = np.array([g == SELECTED for g in gold])
    for by in ("grpo", "dr_grpo"):
        for name, penalties in PENALTIES.items():
            for seed in SEEDS:
                chosen = job_application.polish(train, test, advantages.ALL[by], penalties, seed=seed) > 0.5
                raised = None
                for step, c in enumerate(chosen):
                    recalls = measures.class_recalls((c == selected).tolist(), gold)
                    row = {"held_out/recall_low": min(recalls.values()), "held_out/recall_high": max(recalls.values())}
                    if raised is None and log.alarms([row]):
                        raised = step
                end = chosen[-1]
                rows.append(
                    {
                        "advantage": by, "penalties": name, "seed": seed, "accuracy": float((end == selected).mean()),
                        "recall": float(end[selected].mean()), "selected": float(end.mean()), "start": float((chosen[0] == selected).mean()),
                        "alarm": raised,
                    }
                )  # fmt: skip
    assert {SELECTED, REJECTED} == set(gold)
    return rows


def verdicts(lm: LM, work: Path) -> dict[str, float]:
    """Return how often SmolLM2 keeps the format of the two turns, and how often its verdict is right."""
    path = work / "verdicts.json"
    if not path.is_file():
        drawn = preferences.pairs("test", VERDICTS)
        shown = [(p.chosen.text, p.rejected.text) if i % 2 else (p.rejected.text, p.chosen.text) for i, p in enumerate(drawn)]
        write = branch_rethink.writer(lm, Sampling(temperature=0.0, max_new_tokens=96))
        made = branch_rethink.judge(write, [(p.question.prompt, s) for p, s in zip(drawn, shown, strict=True)])
        gold = [1 if i % 2 else 2 for i in range(VERDICTS)]
        rewards = [branch_rethink.reward(j, g) for j, g in zip(made, gold, strict=True)]
        found = {
            "pairs": VERDICTS,
            "first turn kept": float(np.mean([j.criteria is not None for j in made])),
            "both turns kept": float(np.mean([j.verdict is not None for j in made])),
            "right": float(np.mean([r == 0 for r in rewards])),
            "reward": float(np.mean(rewards)),
        }
        store.write_json(found, path)
    return store.read_json(path, dict[str, float])


# --- tables and figure ---------------------------------------------------------------------------------------


def cell(e: dict[str, float]) -> str:
    return f"{e['mean']:.2f} [{e['low']:.2f}, {e['high']:.2f}]"


def tables(found: dict[str, Any]) -> str:
    """Return the results as Markdown tables."""
    lines = ["| judge trained on | metric | first seed | all seeds | without the fault |", "| --- | --- | --- | --- | --- |"]
    lines += [
        f"| {r['judge']} | {r['metric']} | {cell(r)} | {', '.join(f'{v:.2f}' for v in r['seeds'])} | {r['reference']:.2f} |"
        for r in found["reports"]
    ]
    lines += ["", "| difference of accuracy, mean over seeds | |", "| --- | --- |"]
    lines += [f"| {name} | {cell(e)} |" for name, e in found["differences"].items()]
    lines += ["", "| judge | optimised by | KL, nats | score, sd | true quality |", "| --- | --- | --- | --- | --- |"]
    by = {(r["judge"], r["by"], r["setting"], r["measure"]): r for r in found["curves"]}
    for (judge, how, setting, measure), r in by.items():
        if measure == "score" and setting in {"best of n": (NS[1], NS[-1]), "penalty": (BETAS[0], BETAS[-1])}[how]:
            quality = by[judge, how, setting, "quality"]
            lines.append(f"| {judge} | {how} {setting:g} | {r['kl']:.2f} | {cell(r)} | {cell(quality)} |")
    lines += ["", "| dimension | accuracy of the probe | shuffled labels: mean, 97.5 % |", "| --- | --- | --- |"]
    lines += [
        f"| {r['dimension']} | {cell(r)} | {r['control']:.2f}, {r['control_high']:.2f} |" for r in found["dimensions"]["probes"]
    ]
    lines += [
        "",
        "| advantage | penalties | accuracy before, after | recall of SELECTED | alarm at step |",
        "| --- | --- | --- | --- | --- |",
    ]
    table = pd.DataFrame(found["collapse"])
    for (advantage, penalties), g in table.groupby(["advantage", "penalties"], sort=False):
        alarm = ", ".join("none" if pd.isna(a) else f"{a:.0f}" for a in g["alarm"])
        lines.append(
            f"| {advantage} | {penalties} | {g['start'].mean():.2f}, {g['accuracy'].mean():.2f} | "
            f"{', '.join(f'{v:.2f}' for v in g['recall'])} | {alarm} |"
        )
    return "\n".join(lines)


def main() -> None:
    torch.set_num_threads(1)
    lm = lms.load(lms.smollm2_path(), device="cpu", tags=lms.ThinkTags(None, None))
    work = publish.work_folder(__file__, CODE, lm.fingerprint)
    trains = [part(lm, work, "train", TRAIN, 2, seed) for seed in SEEDS]
    test = part(lm, work, "test", TEST, SAMPLES, 0)
    layer = chosen_layer(trains[0])
    heads, scores = judged(trains, test, layer)
    found = {"layer": layer, **heads, "curves": curves(scores, test)}
    found["dimensions"] = dimensions(lm, work, trains, test, layer, scores["plain"])
    found |= {"collapse": collapse(), "verdicts": verdicts(lm, work)}
    about = {"fingerprint": lm.fingerprint, "made_by": store.made_by(CODE)}
    store.write_json(about | found, HERE / "results.json")
    publish.splice("judging", tables(found), HERE / "README.md")
    publish.draw(
        figures.over_optimisation(pd.DataFrame(found["curves"]), controls=("plain, shuffled labels",)),
        HERE / "figure.png",
        1100,
        420,
    )


if __name__ == "__main__":
    main()
