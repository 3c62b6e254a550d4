"""Test both interventions of the failed-step paper on the tiny reasoner: ``python data/failed-steps/measure.py``.

Writes ``results.json``, and the tables in ``README.md`` here. Responses are kept in ``runs/failed-steps``, so after a stop the same command
goes on. About 5 minutes on one core.

*Select*: of the sampled responses to a problem, the one with the lowest failed-step fraction. Controls: the response with the fewest think
tokens, and the lowest of failed-step fractions that are shuffled among the responses of a problem, in addition to a random response.

*Cut*: a chain of thought is cut after its last (or first) failed branch, and goes on from a context with the branch, without it, or without
as many random steps that did not fail (``toolkit/methods/failed_branches.py``).

The reader recomputes every line of arithmetic. So its marks are exact, unlike those of the paper's language models. It does not see the
gold answer.
"""

from __future__ import annotations

import sys
from pathlib import Path
from typing import Any

import numpy as np
import pandas as pd
import torch

from toolkit import lm as lms
from toolkit import report, store, tasks
from toolkit.generate import Sampling, rollouts
from toolkit.methods import failed_branches, failed_steps
from toolkit.metrics import with_interval
from toolkit.stats import Estimate

HERE = Path(__file__).parent
sys.path.insert(0, str(HERE.parent))
import publish  # noqa: E402

CODE = store.code_of(
    "toolkit.methods.failed_branches", "toolkit.methods.failed_steps", "toolkit.generate", "toolkit.tasks.arithmetic"
)
PROBLEMS, SAMPLES, CONTINUATIONS, LONGEST, SEED = 200, 16, 4, 200, 0


def number(e: Estimate) -> dict[str, float]:
    return {"mean": e.mean, "low": e.low, "high": e.high}


def selected(rows: pd.DataFrame) -> dict[str, Any]:
    """Return, for each rule, the accuracy of the responses that it selects, and the gain over a random response."""
    rng = np.random.default_rng(SEED)
    rows = rows.sort_values(["problem_id", "sample"])
    rows["shuffled"] = rows.groupby("problem_id")["fsf"].transform(lambda values: rng.permutation(values.to_numpy(float)))
    rules = {
        "lowest failed-step fraction": "fsf",
        "lowest failed-step fraction, shuffled (control)": "shuffled",
        "fewest think tokens (control)": "think_tokens",
    }
    found = {name: failed_steps.accuracy_of_lowest(rows, column) for name, column in rules.items()}
    return {name: {"accuracy": number(accuracy), "gain": number(gain)} for name, (accuracy, gain) in found.items()}


def continued(lm: lms.LM, cuts: list[failed_branches.Cut], problems: list[Any]) -> dict[str, Any]:
    """Return accuracies by context and the paired differences."""
    sampling = Sampling(n=CONTINUATIONS, max_new_tokens=LONGEST, seed=SEED)
    rows = failed_branches.continued(lm, cuts, problems, sampling)
    pairs = (("removed", "kept"), ("control", "kept"), ("removed", "control"))
    return {
        "branches": len(cuts),
        "problems": rows["problem_id"].nunique(),
        "accuracy": rows.groupby("form")["accuracy"].mean().to_dict(),
        "tokens": rows.groupby("form")["tokens"].mean().to_dict(),
        "differences": {f"{a} minus {b}": number(failed_branches.effect(rows, a, b)) for a, b in pairs},
    }


def page(found: dict[str, Any]) -> str:
    """Return the tables of the README."""

    def text(e: dict[str, float], sign: str = "") -> str:
        return with_interval(e["mean"], e["low"], e["high"], "share", sign=sign)

    rules = pd.DataFrame(
        {
            name: {"accuracy": text(r["accuracy"]), "minus a random response": text(r["gain"], "+")}
            for name, r in found["select"].items()
        }
    ).T.rename_axis("response selected by")
    cuts = {
        f"{group}, {difference}": {"branches": r["branches"], "difference in accuracy": text(e, "+")}
        for group, r in found["cut"].items()
        for difference, e in r["differences"].items()
    }
    return f"{report.markdown(rules)}\n\n{report.markdown(pd.DataFrame(cuts).T.rename_axis('cut'))}"


def main() -> None:
    torch.set_num_threads(1)
    lm = lms.load("tiny-reasoner", device="cpu")
    work = publish.work_folder(__file__, CODE, lm.fingerprint)
    problems = tasks.load("arithmetic", "test", PROBLEMS, SEED)
    sampled = rollouts(lm, problems, Sampling(n=SAMPLES, max_new_tokens=LONGEST, seed=SEED), out=work / "rollouts")
    chains = failed_steps.chains(lm, sampled, problems)
    rows = failed_steps.table(sampled, chains)
    groups = {
        f"{which} branch, {name}": (which, wanted)
        for which in ("last", "first")
        for name, wanted in (("all", None), ("wrong answers", False))
    }
    found: dict[str, Any] = {"select": selected(rows), "cut": {}}
    for group, (which, wanted) in groups.items():
        path = work / f"{store.safe_name(group)}.json"
        if not path.is_file():
            cuts = [
                failed_branches.cut(r, c.steps, c.failed, which=which, seed=SEED)
                for r, c in zip(sampled, chains, strict=True)
                if wanted in (None, r.correct) and c.texts
            ]
            store.write_json(continued(lm, [c for c in cuts if c is not None], problems), path)
        found["cut"][group] = store.read_json(path, dict[str, Any])
    share = float((rows["failed"] > 0).mean())
    settings = {"problems": PROBLEMS, "samples": SAMPLES, "continuations": CONTINUATIONS, "longest": LONGEST, "seed": SEED}
    about = {
        "made_by": store.made_by(CODE),
        "fingerprint": lm.fingerprint,
        "settings": settings,
        "responses_with_a_failed_step": share,
    }
    store.write_json(about | found, HERE / "results.json")
    publish.splice("failed-steps", page(found), HERE / "README.md")


if __name__ == "__main__":
    main()
