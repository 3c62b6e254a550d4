"""Judge the published claims on SmolLM2-135M-Instruct as it is, on a few word problems: ``python data/claims/measure.py``.

Writes ``README.md`` (the text for posting), ``claims.json`` and ``figure.png`` here. Everything is kept in ``runs/claims``, so after a stop
the same command goes on; about 12 minutes of CPU time. It is what ``toolkit claims`` does with the settings below.
"""

from __future__ import annotations

import sys
from dataclasses import replace
from pathlib import Path

import torch

from toolkit import figures, jobs, shipped, store
from toolkit import lm as lms
from toolkit.tags import ThinkTags

HERE = Path(__file__).parent
sys.path.insert(0, str(HERE.parent))
import publish  # noqa: E402

NAME, COMMAND = "SmolLM2-135M-Instruct", "python data/claims/measure.py"
PLAN = jobs.ClaimsStudy(
    jobs.Study("wordproblems", problems=8, samples=2, max_new_tokens=100, batch_size=48),
    tuple(jobs.CLAIMS),
    jobs.EditSettings(share=0.3),
    jobs.Search("needle", instances=8, lengths=(160,), max_new_tokens=24),
    train_problems=24,
)
CODE = store.code_of("toolkit.jobs.published_claims")


def main() -> None:
    """Measure what is not kept, then write."""
    torch.set_num_threads(1)
    lm = lms.load(shipped.smollm2_path(), tags=ThinkTags(None, None), device="cpu")
    lm = replace(lm, name=NAME)  # without the path of the file, which differs between machines
    work = publish.work_folder(__file__, CODE, lm.fingerprint)
    found = jobs.claims_report(lm, PLAN, work, say=lambda line: print(line, flush=True), command=COMMAND)
    title, *text = store.read_lines(work / "claims.md")
    picture = "![Effects in units of the smallest that matters; grey crosses compare with a random control](figure.png)"
    store.write_text("\n".join([title, "", picture, *text, ""]), HERE / "README.md")
    store.write_json(store.read_json(work / "claims.json"), HERE / "claims.json")
    publish.draw(figures.claimed(found), HERE / "figure.png", 1000, 150 + 26 * len(found))


if __name__ == "__main__":
    main()
