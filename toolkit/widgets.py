"""Jupyter widgets: steering with controls for strength, layers and more, and learning curves that update while a model trains."""

from __future__ import annotations

import html
import json
from collections.abc import Callable, Mapping, Sequence
from itertools import pairwise
from typing import Any

import pandas as pd

from toolkit import figures, jobs, stats, transcript
from toolkit.directions import random_like
from toolkit.edits import steering
from toolkit.entropies import entropies_of
from toolkit.generate import Sampling, rollouts
from toolkit.lm import LM, Condition
from toolkit.methods import failed_steps
from toolkit.spans import Reader
from toolkit.steering import Steering
from toolkit.types import Direction, Problem, Rollout

PHASES = ("all", "prompt", "think", "answer", "think+answer", "newest")
GREEDY = Sampling(temperature=0.0, max_new_tokens=400)
_BOX = "display:inline-block;vertical-align:top;width:17rem;margin:.3rem;padding:.5rem;border:1px solid #ccc;border-radius:6px"


def responses_html(lm: LM, responses: Sequence[tuple[str, float, Rollout]], *, note: str = "") -> str:
    """Return steered responses side by side as HTML: strength and think tokens above, thinking in blue, the answer in bold.

    Args:
        responses: Tuples ``(prompt, strength, rollout)``, from ``jobs.steered_responses``.
        note: Text before the strength, such as the name of the direction.
    """
    boxes = []
    for _, strength, r in responses:
        # Without a think span, an empty one at the start of the response.
        start, stop = (r.think.start, r.think.stop) if r.think else (r.prompt_len, r.prompt_len)
        parts = (html.escape(lm.text(r.token_ids[a:b])) for a, b in pairwise((r.prompt_len, start, stop, len(r.token_ids))))
        before, thought, rest = parts
        text = f"<span style='color:#888'>{before}</span><span style='color:#0072B2'>{thought}</span><b>{rest}</b>"
        head = f"<small>{html.escape(note)}strength {strength:+g}: {r.think_tokens} think tokens{'' if r.closed else ', never closed'}</small>"
        boxes.append(f"<div style='{_BOX}'>{head}<pre style='white-space:pre-wrap;margin:.4rem 0 0'>{text}</pre></div>")
    return "".join(boxes)


def static(lm: LM, v: Direction, prompt: str, strengths: Sequence[float] | None = None, *, during: str = "all") -> Any:
    """Return HTML for Jupyter that shows greedy responses to a prompt side by side, one per steering strength.

    The package ipywidgets is not needed. Each response has at most 400 tokens.

    Args:
        v: Direction of thinking length to steer along.
        prompt: Text of the user message.
        strengths: Steering strengths. Positive strengths lengthen thinking; at 0 the model is not steered. ``None`` finds some that fit (see
            ``strengths.fit``).
        during: Positions at which steering acts, see ``edits.steering``.

    Returns:
        An ``IPython.display.HTML``.
    """
    from IPython.display import HTML

    if strengths is None:
        strengths = jobs.fitting_strengths(lm, lambda a: steering(v, a, during=during), GREEDY, prompts=[prompt]).shown
    acts = {a: steering(v, a, during=during) for a in strengths}
    return HTML(responses_html(lm, jobs.steered_responses(lm, acts, [prompt], GREEDY)))


class Stream:
    """Decoding rule that shows a response while it is decoded, and ends a response that repeats itself.

    It changes no token until the response loops (see ``stats.looping``). Then the next token is replaced by an end-of-sequence token. Use
    one object per response: pass it in ``Condition.rules`` and sample one response.

    Attributes:
        cut: True if the rule ended the response.
    """

    def __init__(self, show: Callable[[str], None], *, every: int = 8) -> None:
        """Remember what to call.

        Args:
            show: Function that is called with the text so far.
            every: Number of tokens between two calls.
        """
        self._show, self._every, self._tokens, self.cut = show, every, list[int](), False

    def __call__(self, lm: LM, reader: Reader, drawn: int) -> Sequence[int] | None:
        """Return an end-of-sequence token if the response loops, else ``None``. See ``baselines.Budget`` for the arguments."""
        if stats.looping(self._tokens):
            self.cut = True
            return (min(lm.eos_ids),)
        self._tokens.append(drawn)
        if len(self._tokens) % self._every == 0:
            self._show(lm.text(self._tokens))
        return None


def streamed(lm: LM, act: Steering, prompt: str, sampling: Sampling, show: Callable[[str], None]) -> tuple[Rollout, bool]:
    """Sample one steered response, and show it while it is decoded. Return the response, and True if it was cut because it loops.

    Args:
        act: Steering, from ``edits.steering``.
        prompt: Text of the user message.
        sampling: Sampling settings; one sample.
        show: Function that is called with the text so far every few tokens.
    """
    rule = Stream(show)
    problem = Problem("prompt", ({"role": "user", "content": prompt},), "")
    (response,) = rollouts(Condition(lm, (act,), rules=(rule,)), [problem], sampling, progress=False)
    return response, rule.cut


def partial_html(label: str, text: str) -> str:
    """Return a box with the beginning of a response that is still being decoded, as HTML.

    Args:
        label: Text above the response.
        text: The response so far.
    """
    head = f"<small>{html.escape(label)}: decoding…</small>"
    return f"<div style='{_BOX};border-style:dashed'>{head}<pre style='white-space:pre-wrap;margin:.4rem 0 0'>{html.escape(text)}</pre></div>"


def steer(lm: LM, v: Direction, prompt: str, *, most: float | None = None) -> Any:
    """Return a Jupyter widget with controls for steering. It shows the responses at strength 0 and at the chosen strength.

    Responses appear while they are decoded; a response that repeats itself is cut. The controls are prompt, strength, layers, phase (the
    positions to steer, such as ``think``), temperature, and a switch that adds the response along a random direction of equal norm. If
    ipywidgets is not installed (it is in the package's optional dependencies ``notebook``), return the result of ``static`` instead. It has
    no controls, and shows the responses at the strengths ``-most``, 0 and ``most``.

    Args:
        v: Direction of thinking length to steer along.
        prompt: Text of the user message at the start.
        most: Largest strength that can be chosen; the smallest is ``-most``. ``None`` ends the slider a little beyond the usable range on
            each side. The range is found on a handful of prompts (see ``strengths.fit``).
    """
    try:
        import ipywidgets as w
    except ImportError:
        return static(lm, v, prompt, None if most is None else (-most, 0.0, most))
    if most is None:
        least, *_, most = jobs.fitting_strengths(lm, lambda a: steering(v, a), GREEDY, prompts=[prompt]).grid
    else:
        least = -most
    wide = {"layout": w.Layout(width="28rem"), "continuous_update": False, "style": {"description_width": "6rem"}}
    choice = {k: wide[k] for k in ("layout", "style")}
    last = lm.layout.n_layers - 1
    controls = {
        "prompt": w.Text(prompt, description="prompt", **wide),
        "strength": w.FloatSlider(0.0, min=least, max=most, step=(most - least) / 60, description="strength", **wide),
        "layers": w.IntRangeSlider(value=(0, last), min=0, max=last, description="layers", **wide),
        "during": w.ToggleButtons(
            options=PHASES, description="phase", style={"description_width": "6rem", "button_width": "6.5rem"}
        ),
        "temperature": w.FloatSlider(0.0, min=0.0, max=1.5, step=0.1, description="temperature", **wide),
        "control": w.Checkbox(False, description="also along a random direction (control)", **choice),
    }
    busy, output, noise = w.HTML("ready"), w.HTML(), random_like(v, seed=0)

    def generate(_: Any = None) -> None:
        now = {name: control.value for name, control in controls.items()}
        layers = range(now["layers"][0], now["layers"][1] + 1)
        sampling = Sampling(temperature=now["temperature"], max_new_tokens=400)
        chosen = [("", v, a) for a in dict.fromkeys((0.0, now["strength"]))]
        chosen += [("random direction, ", noise, now["strength"])] if now["control"] and now["strength"] else []
        done = ""
        try:
            for number, (name, direction, a) in enumerate(chosen, 1):
                busy.value = f"<b>busy</b>: response {number} of {len(chosen)}"
                act, label = steering(direction, a, layers=layers, during=now["during"]), f"{name}strength {a:+g}"

                def show(text: str, before: str = done, label: str = label) -> None:
                    output.value = before + partial_html(label, text)

                show("")
                response, cut = streamed(lm, act, now["prompt"], sampling, show)
                note = f"{name}{'cut: it repeats itself, ' * cut}"
                done += responses_html(lm, [(now["prompt"], a, response)], note=note)
                output.value = done
        finally:
            busy.value = "ready"

    for control in controls.values():
        control.observe(generate, "value")
    generate()
    return w.VBox([*controls.values(), busy, output])


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
    top = max(float(entropies_of(r).max()) for r in responses.values()) or 1.0
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
    questions = [(f"{i}. {str(p.messages[-1]['content'])[:60]}", p) for i, p in enumerate(problems, 1)]
    problem = w.Dropdown(options=questions, description="problem")
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


def live(*, every: int = 5, metrics: Sequence[str] = ("accuracy", "think_tokens", "reward")) -> Any:
    """Return a callback for GRPO training that draws learning curves in Jupyter during the run.

    Pass it to the trainer as ``grpo.extras.Extras(callbacks=(live(),))``.

    Args:
        every: Number of training steps between two updates of the figure.
        metrics: Columns of the training log, one panel each.
    """
    from toolkit.grpo.log import Watch  # imports transformers' trainer, which nothing else here needs

    displays: list[Any] = []

    def show(rows: Sequence[dict[str, Any]]) -> None:
        from IPython.display import display

        figure = figures.learning_curves({"this run": pd.DataFrame(rows)}, metrics).update_layout(showlegend=False)
        # Update the picture's data: displaying the figure again would add a second one below.
        picture = {"application/vnd.plotly.v1+json": json.loads(figure.to_json())}
        if displays:
            displays[0].update(picture, raw=True)
        else:
            displays.append(display(picture, raw=True, display_id=True))

    return Watch(show, every)
