"""Measure short and long answers on SmolLM2-135M, after SLAQ (arXiv:2510.11218): ``python data/slaq/measure.py``.

Writes ``smollm2.json`` and the tables in ``README.md`` here. Needs ``make smol``. Pairs are kept in ``runs/slaq``, so after a stop the
same command goes on.

1. *Check.* On the tiny reasoner, attributions by gradient times activation beside the exact drop when a component is set to 0: Spearman's
   correlation over components, mean over prompts. The control shuffles the components: its expected correlation is 0.
2. *Pairs.* Accuracy of short and long answers, position and momentum, similarity of the contributing components, and the prediction of
   alignment, on facts of the test split.
"""

from __future__ import annotations

import argparse
import sys
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import numpy as np
import pandas as pd

from toolkit import lm as lms
from toolkit import report, stats, store, tasks
from toolkit.generate import Sampling, rollouts
from toolkit.jobs import slaq as job
from toolkit.lm import LM
from toolkit.methods import slaq as method
from toolkit.metrics import with_interval
from toolkit.stats import Estimate
from toolkit.tasks import slaq

HERE = Path(__file__).parent
ROOT = HERE.parents[1]
sys.path.insert(0, str(ROOT / "data"))
import publish  # noqa: E402

CODE = store.code_of("toolkit.jobs.slaq", "toolkit.methods.slaq", "toolkit.tasks.slaq", "toolkit.tasks.lookup")
FACTS, NOISE = 3, 0  # facts per long question, and further facts in the prompt: with more, SmolLM2 gets nearly all short ones wrong
PAIRS = 20
GREEDY = Sampling(temperature=0.0, max_new_tokens=60, batch_size=40)
CHECKED = 12  # prompts of the tiny reasoner


def checked(lm: LM) -> dict[str, Estimate]:
    """Return the agreement of attributions with exact ablation, over right answers to lookups."""
    problems = tasks.load("lookup", "dev", 2 * CHECKED)
    answers = rollouts(lm, problems, Sampling(temperature=0.0, max_new_tokens=120), progress=False)
    right = [r for r in answers if r.correct and r.answer][:CHECKED]
    found: dict[str, list[float]] = {"heads": [], "MLPs": [], "heads and MLPs": [], "share of the 4 strongest heads that agree": []}
    for r in right:
        assert r.answer is not None
        fast, exact = method.attribute(lm, r.token_ids, [r.answer])[0], method.ablation(lm, r.token_ids, r.answer)
        heads = [x.heads[~x.heads.isnan()].numpy() for x in (fast, exact)]
        found["heads"].append(stats.spearman(*heads))
        found["MLPs"].append(stats.spearman(fast.mlps.numpy(), exact.mlps.numpy()))
        found["heads and MLPs"].append(stats.spearman(fast.components, exact.components))
        tops = [set(np.argsort(-x, kind="stable")[:4].tolist()) for x in heads]
        found["share of the 4 strongest heads that agree"].append(len(tops[0] & tops[1]) / 4)
    return {name: stats.bootstrap(stats.mean_of(np.array(values)[:, None]), len(values)) for name, values in found.items()}


def shown(e: Estimate | Mapping[str, float], unit: str = "correlation", *, sign: str = "") -> str:
    """Return an estimate with its interval as text; shares in percent."""
    mean, low, high = (e[k] if isinstance(e, Mapping) else getattr(e, k) for k in ("mean", "low", "high"))
    return with_interval(mean, low, high, unit, sign=sign, digits=1 if unit == "share" else 2)


def page(result: Mapping[str, Any]) -> dict[str, str]:
    """Return the tables of the README, by mark."""
    found = result["results"]
    acc, pos, mom = found["accuracy"], found["position"], found["momentum"]
    rows = {
        f"right, asked alone (F_S), % of {found['facts']} facts in {found['pairs']} pairs": shown(acc["short"], "share"),
        "right, in the long answer (F_L), %": shown(acc["long"], "share"),
        "aligned, %": shown(acc["aligned"], "share"),
        "accuracy falls from first to last position, points (+ as claimed)": shown(pos["long"], "share", sign="+"),
        "the same asked alone (control)": shown(pos["short"], "share", sign="+"),
        "long minus alone": shown(pos["long - short"], "share", sign="+"),
        "momentum: right after right minus right after wrong, points (+ as claimed)": shown(mom["momentum"], "share", sign="+"),
        "expected from easy questions and easy positions alone (control)": shown(mom["chance"], "share", sign="+"),
        "momentum minus control": f"{shown(mom['momentum - chance'], 'share', sign='+')}, p = {found['momentum p']:.2f}",
    }
    for name in ("components cosine", "components jaccard", "neurons cosine", "neurons jaccard"):
        s = found["similarity"][name]
        rows[f"similarity, {name}: same fact"] = shown(s["same fact"])
        rows[f"similarity, {name}: same minus other fact"] = shown(s["same - other"], sign="+")
    for name, p in found["prediction"].items():
        rows[f"alignment predicted from {name}: AUC"] = shown(p["auc"])
        rows[f"alignment predicted from {name}: AUC minus shuffled labels' {p['shuffled']:.2f}"] = (
            f"{shown(p['above'], sign='+')}, p = {p['p']:.2f}"
        )
        rows[f"alignment predicted from {name}: balanced accuracy"] = shown(p["accuracy"])
    check = {name: shown(e) for name, e in result["check"].items()}
    return {
        "slaq": report.markdown(pd.DataFrame.from_dict(rows, orient="index", columns=["SmolLM2-135M"])),
        "check": report.markdown(pd.DataFrame.from_dict(check, orient="index", columns=["gradients against ablation"])),
    }


def main() -> None:
    """Measure, then write the results and the tables."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--pairs", type=int, default=PAIRS, help="long questions")
    pairs_wanted = parser.parse_args().pairs
    check = checked(lms.load(lms.TINY_REASONER, device="cpu"))
    print(check, flush=True)
    lm = lms.load(lms.smollm2_path(), device="cpu", tags=lms.ThinkTags(None, None))
    pairs = slaq.draw_pairs("test", pairs_wanted, 0, m=FACTS, noise=NOISE)
    facts = job.measure(lm, pairs, GREEDY, out=publish.work_folder(__file__, CODE, lm.fingerprint))
    settings = {"pairs": pairs_wanted, "facts": FACTS, "noise": NOISE, "seed": 0, "sampling": GREEDY, "checked": CHECKED}
    result = {
        "made_by": store.made_by(CODE),
        "provenance": lm.provenance(0),
        "settings": settings,
        "check": check,
        "results": job.summary(facts),
    }
    store.write_json(result, HERE / "smollm2.json")
    for mark, text in page(store.read_json(HERE / "smollm2.json")).items():
        publish.splice(mark, text, HERE / "README.md")
        print(text)


if __name__ == "__main__":
    main()
