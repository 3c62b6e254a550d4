"""Jupyter widgets: steering with controls for strength, layers and more, and learning curves that update while a model trains."""

from __future__ import annotations

import html
import json
from collections.abc import Sequence
from itertools import pairwise
from typing import Any

import pandas as pd

from toolkit import figures, jobs
from toolkit.edits import steering
from toolkit.generate import Sampling
from toolkit.lm import LM
from toolkit.types import Direction, Rollout

PHASES = ("all", "prompt", "think", "answer", "think+answer", "newest")
GREEDY = Sampling(temperature=0.0, max_new_tokens=400)
_BOX = "display:inline-block;vertical-align:top;width:17rem;margin:.3rem;padding:.5rem;border:1px solid #ccc;border-radius:6px"


def responses_html(lm: LM, responses: Sequence[tuple[str, float, Rollout]]) -> str:
    """Return steered responses side by side as HTML: strength and think tokens above, thinking in blue, the answer in bold.

    Args:
        responses: Tuples ``(prompt, strength, rollout)``, from ``jobs.steered_responses``.
    """
    boxes = []
    for _, strength, r in responses:
        # Without a think span, an empty one at the start of the response.
        start, stop = (r.think.start, r.think.stop) if r.think else (r.prompt_len, r.prompt_len)
        parts = (html.escape(lm.text(r.token_ids[a:b])) for a, b in pairwise((r.prompt_len, start, stop, len(r.token_ids))))
        before, thought, rest = parts
        text = f"<span style='color:#888'>{before}</span><span style='color:#0072B2'>{thought}</span><b>{rest}</b>"
        head = f"<small>strength {strength:+g}: {r.think_tokens} think tokens{'' if r.closed else ', never closed'}</small>"
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


def steer(lm: LM, v: Direction, prompt: str, *, most: float | None = None) -> Any:
    """Return a Jupyter widget with controls for steering. It shows the responses at strength 0 and at the chosen strength.

    The controls are prompt, strength, layers, phase (the positions to steer, such as ``think``) and temperature. If ipywidgets is not
    installed (it is in the package's optional dependencies ``notebook``), return the result of ``static`` instead. It has no controls, and
    shows the responses at the strengths ``-most``, 0 and ``most``.

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
    last = lm.layout.n_layers - 1
    controls = {
        "prompt": w.Text(prompt, description="prompt", **wide),
        "strength": w.FloatSlider(0.0, min=least, max=most, step=(most - least) / 60, description="strength", **wide),
        "layers": w.IntRangeSlider(value=(0, last), min=0, max=last, description="layers", **wide),
        "during": w.Dropdown(options=PHASES, description="phase", **{k: wide[k] for k in ("layout", "style")}),
        "temperature": w.FloatSlider(0.0, min=0.0, max=1.5, step=0.1, description="temperature", **wide),
    }
    output = w.HTML()

    def generate(_: Any = None) -> None:
        now = {name: control.value for name, control in controls.items()}
        layers = range(now["layers"][0], now["layers"][1] + 1)
        acts = {a: steering(v, a, layers=layers, during=now["during"]) for a in dict.fromkeys((0.0, now["strength"]))}
        sampling = Sampling(temperature=now["temperature"], max_new_tokens=400)
        output.value = responses_html(lm, jobs.steered_responses(lm, acts, [now["prompt"]], sampling))

    for control in controls.values():
        control.observe(generate, "value")
    generate()
    return w.VBox([*controls.values(), output])


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
