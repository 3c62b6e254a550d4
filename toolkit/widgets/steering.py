"""Steering in Jupyter: responses at several strengths, with controls for strength, layers and more."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

from toolkit import jobs
from toolkit.directions import random_like
from toolkit.edits import steering
from toolkit.generate import Sampling
from toolkit.lm import LM
from toolkit.types import Direction
from toolkit.widgets.responses import Arm, asked, response_html, show_arms

PHASES = ("all", "prompt", "think", "answer", "think+answer", "newest")
GREEDY = Sampling(temperature=0.0, max_new_tokens=400)


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
    responses = jobs.steered_responses(lm, acts, [prompt], GREEDY)
    return HTML("".join(response_html(lm, f"strength {a:+g}", r) for _, a, r in responses))


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
        arms = [
            Arm(f"{name}strength {a:+g}", (steering(direction, a, layers=layers, during=now["during"]),))
            for name, direction, a in chosen
        ]
        show_arms(lm, arms, asked(now["prompt"]), sampling, busy, output)

    for control in controls.values():
        control.observe(generate, "value")
    generate()
    return w.VBox([*controls.values(), busy, output])
