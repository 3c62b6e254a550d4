"""Test the five properties of retrieval heads on the shipped models: ``python data/retrieval-heads/properties.py``.

Writes ``properties.json`` here and the tables in ``README.md`` beside it. Needs ``make smol``. Copy scores are measured on needles in filler
text (SmolLM2) or on variable lookup (tiny reasoner), on the dev split, for

* SmolLM2-135M-Instruct,
* the smol reasoner (SmolLM2 after fine-tuning),
* the tiny reasoner,
* the tiny reasoner with its context doubled: rotary frequencies by parts (arXiv:2308.10882), nothing trained; it reads the responses of the
  unchanged one.

Nothing is masked here: effects of masking are read from the committed results of ``toolkit retrieval-heads`` and of the smol reasoner.
Responses and scores are kept in ``runs/retrieval-heads``, so after a stop the same command goes on.
"""

from __future__ import annotations

import sys
from collections.abc import Mapping
from dataclasses import replace
from pathlib import Path
from typing import Any

import pandas as pd

from toolkit import claims, needles, pages, report, store
from toolkit import lm as lms
from toolkit.claims import Claim
from toolkit.generate import rollouts
from toolkit.jobs import retrieval_claims
from toolkit.jobs.retrieval import Search
from toolkit.jobs.retrieval_claims import CopyScores
from toolkit.lm import LM
from toolkit.methods import giraffe, retrieval_heads
from toolkit.tasks.haystack import Haystack

HERE = Path(__file__).parent
ROOT = HERE.parents[1]
sys.path.insert(0, str(ROOT / "data"))
import publish  # noqa: E402

CODE = store.code_of(
    "toolkit.jobs.retrieval", "toolkit.jobs.retrieval_claims", "toolkit.methods.retrieval_heads", "toolkit.methods.giraffe", "toolkit.needles",
    "toolkit.generate", "toolkit.tasks.haystack",
)  # fmt: skip
NEEDLES = Search(task="needle", instances=45, lengths=(256, 384, 512), max_new_tokens=32, batch_size=5)
LOOKUPS = Search(task="lookup", instances=100)
STRONGEST = 5  # heads to name
SCALE = 2.0  # factor by which the context grows
SMOL, TUNED, TINY, TINY_LONG = "SmolLM2", "smol reasoner", "tiny reasoner", "tiny reasoner, context doubled"


def load() -> dict[str, tuple[LM, LM, Search]]:
    """Return every model, the model whose responses it reads, and the haystacks to measure it on."""
    base = lms.load(lms.smollm2_path(), device="cpu", tags=lms.ThinkTags(None, None))
    tiny, tuned = (lms.load(name, device="cpu") for name in (lms.TINY_REASONER, lms.SMOL_REASONER))
    return {
        TINY: (tiny, tiny, LOOKUPS),
        TINY_LONG: (giraffe.with_parts(tiny, SCALE), tiny, LOOKUPS),
        SMOL: (base, base, NEEDLES),
        TUNED: (tuned, tuned, NEEDLES),
    }


def kind(haystack: Haystack) -> str:
    """Return the kind of a haystack: the first two words of the question, or the number of steps of a lookup."""
    question = haystack.problem.meta.get("question")
    return " ".join(question.split()[:2]) if question else str(haystack.problem.meta["difficulty"])


def scores_file(lm: LM, writer: LM, search: Search) -> Path:
    """Return the file of a model's copy scores while it reads the responses of ``writer``."""
    return publish.work_folder(__file__, CODE, [writer.fingerprint, store.jsonable(search)]) / f"copy-{lm.fingerprint[:12]}.json"


def measured(name: str, lm: LM, writer: LM, search: Search) -> tuple[CopyScores, dict[str, Any]]:
    """Return a model's copy scores while it reads the responses of ``writer``, and a summary. Kept scores are read."""
    haystacks = search.haystacks(writer, "dev")
    file = scores_file(lm, writer, search)
    if not file.exists():
        answers = rollouts(writer, [h.problem for h in haystacks], search.sampling, out=file.parent / "rollouts")
        # Without control prompts and questions, one pass over each response is enough.
        examples = [replace(e, control=None, query=None) for e in needles.examples(haystacks, answers, whole=False)]
        metrics = retrieval_heads.measure(lm, examples, success=lambda e: bool(e.rollout.correct))
        scores = retrieval_claims.copy_scores(name, metrics, [kind(h) for h in haystacks])
        found = {
            "copy": scores.copy.tolist(),
            "layers": scores.layers.tolist(),
            "statistics": retrieval_heads.statistics(metrics.select("copy")),
            "accuracy": sum(metrics.success) / len(metrics.success),
            "ranked": retrieval_heads.scores(metrics).ranked()[:STRONGEST],
        }
        store.write_json(found, file)
    found = store.read_json(file)
    scores = CopyScores(
        name, pd.DataFrame(found["copy"]).to_numpy(float), pd.Series(found["layers"]).to_numpy(), tuple(map(kind, haystacks))
    )
    about = {"accuracy of the responses": found["accuracy"], "strongest": found["ranked"], **found["statistics"]}
    return scores, about | {"search": search, "provenance": lm.provenance(search.seed)}


def committed() -> list[Claim]:
    """Return the causal claims of masks that were measured before."""
    made = []
    for model, file, heads in ((SMOL, "smollm2", 5), (TINY, "tiny-reasoner", 2)):  # of four heads of a layer, there is one control
        kept = store.read_json(HERE / f"{file}.json")
        for row in kept["masking"]:
            if (row["heads"], row["op"], row["during"]) == (heads, "uniform", "decode only"):
                # Rows of earlier versions lack the number of different controls.
                numbers = {"draws": kept["search"]["draws"], **row}
                made += retrieval_claims.causal(f"{model}, {heads} heads by {row['ranking']}", numbers)
    tuned = {row["effect"]: row["estimate"] for row in store.read_json(ROOT / "data/smol-reasoner/results/claims.json")}
    effects = {
        "lost": tuned["4 retrieval heads (our score) masked: needles lost"],
        "more_than_random": tuned["more needles lost than with random heads"],
    }
    ends = {"mean": "", "low": "_low", "high": "_high"}
    row = {f"{column}{end}": e[key] for column, e in effects.items() for key, end in ends.items()}
    board = store.read_json(ROOT / "data/smol-reasoner/results/board.json")
    row["draws"] = len(board["conditions"]["control: 4 random heads masked"]["seeds"])
    return [*made, *retrieval_claims.causal(f"{TUNED}, 4 heads by write (ours)", row)]


def page(result: Mapping[str, Any]) -> dict[str, str]:
    """Return the tables of the README, by mark."""
    table = pd.DataFrame(result["claims"])[list(claims.COLUMNS)].set_index("effect")
    rows = {
        name: {
            "accuracy of the responses, %": f"{100 * about['accuracy of the responses']:.0f}",
            "retrieval heads, % of heads": f"{100 * about['share_retrieval']:.1f}",
            "heads that never copy, %": f"{100 * about['share_zero']:.1f}",
            "always active": about["always"],
            "strongest (layer-head)": ", ".join(f"{layer}-{head}" for layer, head in about["strongest"]),
        }
        for name, about in result["models"].items()
    }
    return {
        "models": report.markdown(pd.DataFrame.from_dict(rows, orient="index")),
        "properties": report.markdown(table),
    }


def main() -> None:
    """Measure every model, then write the claims."""
    models = load()
    scores, about = {}, {}
    for name, (lm, writer, search) in models.items():
        scores[name], about[name] = measured(name, lm, writer, search)
        print(name, {k: v for k, v in about[name].items() if k not in ("search", "provenance")}, flush=True)
    found = [c for s in scores.values() for c in (*retrieval_claims.universal(s), *retrieval_claims.sparse(s))]
    for base, derived in ((SMOL, TUNED), (TINY, TINY_LONG)):
        found += retrieval_claims.intrinsic(scores[base], scores[derived])
    found += [c for s in scores.values() for c in retrieval_claims.dynamic(s)]
    found += committed()
    print(claims.verdict_table(found).to_string())
    result = {"made_by": store.made_by(CODE), "models": about, "claims": claims.json_records(found)}
    store.write_json(result, HERE / "properties.json")
    made = f"{', '.join(scores)}. {result['made_by']}."
    shown = report.claims_page(
        "Properties of retrieval heads", found, made=made, command="python data/retrieval-heads/properties.py"
    )
    pages.write(shown, HERE / "report.html")
    for mark, text in page(store.read_json(HERE / "properties.json")).items():
        publish.splice(mark, text, HERE / "README.md")


if __name__ == "__main__":
    main()
