"""Draw the README's picture of texts: one problem answered by base and by the edited model, from a finished demo (``runs/demo``).

``python notebooks/figures/texts.py`` writes ``texts.png``. The response is the first one without a cue word in the prompt that was wrong for
base and right for the edited model, after the same first steps, and where base left out steps. Both samples had the same random numbers.
"""

from __future__ import annotations

import html
import sys
from pathlib import Path

from toolkit import evaluate, store, tasks
from toolkit import lm as lms
from toolkit.lm import LM
from toolkit.rewards.answers import answer_text
from toolkit.types import Problem, Rollout

HERE = Path(__file__).parent
ROLLOUTS = HERE.parents[1] / "runs/demo/rollouts/test"
SIZE = 920, 355  # pixels
BASE, EDITED = "base", "ThinkEdit (ours)"
SHARED = 3  # first steps that both responses must have in common
STYLE = """
body{margin:0;padding:14px;font:15px/1.45 system-ui,sans-serif;background:#fff;color:#1a1a1a}
h1{font-size:17px;font-weight:600;margin:0 0 12px}
h1 code,pre{font-family:ui-monospace,SFMono-Regular,Menlo,Consolas,monospace}
.both{display:grid;grid-template-columns:1fr 1fr;gap:16px}
.one{border:1px solid #d0d0d0;border-radius:10px;padding:10px 14px}
.one b{font-size:15px}.one .verdict{float:right;font-weight:600}
.right{color:#0072B2}.wrong{color:#a3200d}
pre{margin:8px 0 0;font-size:15px;line-height:1.5}
pre span{display:block;padding:0 6px;border-left:4px solid transparent}
pre .new{background:#e3f1fb;border-color:#0072B2}
pre .skipped{background:#fdeeea;border-color:#c0341d}
"""


def lines(rollout: Rollout, lm: LM) -> list[str]:
    """Return the lines of the thinking of a response."""
    assert rollout.think is not None
    return lm.tokenizer.decode(rollout.token_ids[rollout.think.start : rollout.think.stop]).strip().splitlines()


def choose(lm: LM) -> tuple[Problem, Rollout, Rollout]:
    """Return the problem to show, with the responses of base and of the edited model."""
    base, edited = (
        {(r.problem_id, r.sample): r for r in store.load_rollouts(evaluate.rollout_folder(ROLLOUTS, name))}
        for name in (BASE, EDITED)
    )
    problems = {p.id: p for p in tasks.load("arithmetic", "test", 200)}
    for key, first in sorted(base.items()):
        second = edited[key]
        short, long = lines(first, lm), lines(second, lm)
        same = short[:SHARED] == long[:SHARED] and SHARED < len(short) < len(long) - 1
        plain = problems[first.problem_id].messages[-1]["content"].endswith("=?")  # without a cue word
        if same and plain and second.correct and not first.correct:
            return problems[first.problem_id], first, second
    raise LookupError("No problem of the demo shows a step that base skipped.")


def card(name: str, rollout: Rollout, lm: LM, other: list[str], mark: str) -> str:
    """Return the HTML of one response; lines that the other response does not have are marked."""
    steps = "".join(f"<span{'' if line in other else f' class={mark}'}>{html.escape(line)}</span>" for line in lines(rollout, lm))
    verdict = "right" if rollout.correct else "wrong"
    answer = html.escape(answer_text(rollout.text))
    return (
        f'<div class="one"><span class="verdict {verdict}">answers {answer}: {verdict}</span><b>{html.escape(name)}</b>'
        f"<pre>{steps}</pre></div>"
    )


def main() -> None:
    """Draw the picture."""
    sys.path.insert(0, str(HERE.parents[1] / "data"))
    import publish

    lm = lms.load("tiny-reasoner")
    problem, base, edited = choose(lm)
    cards = card("base", base, lm, lines(edited, lm), "skipped") + card("two heads edited", edited, lm, lines(base, lm), "new")
    question = html.escape(problem.messages[-1]["content"])
    page = f"<meta charset=utf-8><style>{STYLE}</style><h1><code>{question}</code> &nbsp; the same model, problem and random numbers</h1>"
    publish.photograph(f'{page}<div class="both">{cards}</div>', HERE / "texts.png", *SIZE)


if __name__ == "__main__":
    main()
