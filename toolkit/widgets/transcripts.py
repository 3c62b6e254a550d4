"""Responses of two conditions to a problem, side by side."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import Any

import numpy as np

from toolkit import transcript
from toolkit.entropies import entropies_of
from toolkit.lm import LM
from toolkit.methods import failed_steps
from toolkit.types import Problem, Rollout
from toolkit.widgets.responses import questions


def compared_html(
    lm: LM, problem: Problem, responses: Mapping[str, Rollout], *, reader_of: failed_steps.ReaderOf = failed_steps.fitting
) -> str:
    """Return responses to one problem side by side as HTML: phases, entropy, steps of thinking, failed steps and re-checks.

    Args:
        lm: Model whose tokenizer made the tokens.
        problem: The problem.
        responses: Name of a condition -> its response, with recorded entropies (``Sampling(details=True)``). Colours share one scale.
        reader_of: Function from the problem to the reader that finds failed steps.

    Raises:
        entropies.NoEntropiesError: a response has no recorded entropies.
    """
    # Tool results are not coloured: their tokens are given, not sampled.
    top = max(float(entropies_of(r)[np.array(r.written, bool)].max(initial=0.0)) for r in responses.values()) or 1.0
    chains = {name: failed_steps.chain(lm, r, reader_of(problem)) for name, r in responses.items()}
    shown = {name: transcript.fragment(lm, r, chain=chains[name], problem=problem, top=top) for name, r in responses.items()}
    return transcript.compared(shown)


def transcripts(lm: LM, problems: Sequence[Problem], rollouts: Mapping[str, Sequence[Rollout]]) -> Any:
    """Return a Jupyter widget that shows the responses of two conditions to a problem side by side (see ``compared_html``).

    Needs the package ipywidgets, which is in the optional dependencies ``notebook``.

    Args:
        lm: Model whose tokenizer made the tokens.
        problems: Problems to choose from.
        rollouts: Name of a condition -> its responses, with recorded entropies. Sample 0 of each problem is shown.
    """
    import ipywidgets as w

    first = {name: {r.problem_id: r for r in sampled if r.sample == 0} for name, sampled in rollouts.items()}
    names = list(first)
    problem = w.Dropdown(options=questions(problems), description="problem")
    left = w.Dropdown(options=names, value=names[0], description="left")
    right = w.Dropdown(options=names, value=names[-1], description="right")
    output = w.HTML()

    def draw(_: Any = None) -> None:
        chosen = dict.fromkeys((left.value, right.value))
        output.value = compared_html(lm, problem.value, {name: first[name][problem.value.id] for name in chosen})

    for control in (problem, left, right):
        control.observe(draw, "value")
    draw()
    return w.VBox([problem, w.HBox([left, right]), output])
