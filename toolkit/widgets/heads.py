"""A map of attention heads in Jupyter: what one head writes and attends to, and the response without it."""

from __future__ import annotations

import html
from collections.abc import Sequence
from dataclasses import dataclass, field
from typing import Any

import plotly.graph_objects as go

from toolkit import edits, figures, masks, one_head, transcript
from toolkit.generate import Sampling
from toolkit.lm import LM
from toolkit.types import Direction, HeadEdit, HeadScores, Plan, Problem, Rollout, Span
from toolkit.widgets.responses import Arm, questions, response_html, show_arms

LONGER, SHORTER = "0,114,178", "213,94,0"  # colours of contributions towards longer and shorter thinking
Head = tuple[int, int]
"""Layer and head."""


def masked(lm: LM, heads: Sequence[Head]) -> Plan:
    """Return a plan that masks heads fully, for ``masks.masking``."""
    name = f"{_named(heads)} off"
    return Plan(tuple(HeadEdit(layer, head, "scale", 1.0) for layer, head in heads), None, name, lm.provenance())


def arms(lm: LM, heads: Sequence[Head], *, control: bool = False, seed: int = 0) -> list[Arm]:
    """Return the responses to sample with heads off (zero ablation at all positions): no arm if there is no head.

    Args:
        lm: The model.
        heads: The heads to turn off, as pairs ``(layer, head)``.
        control: True to add an arm with as many random other heads of the same layers off.
        seed: Seed of their choice.

    Raises:
        ValueError: more than half of all heads are off, so there are too few others.
    """
    if not heads:
        return []
    plan = masked(lm, heads)
    plans = {plan.name: plan}
    if control:
        others = edits.random_heads(plan, lm.layout, seed=seed)
        plans[f"control, {_named(others.heads)} off"] = others
    return [Arm(name, (masks.masking(p, "zero", during="all"),)) for name, p in plans.items()]


def written_html(lm: LM, response: Rollout, v: Direction, head: Head) -> str:
    """Return what a head writes in a response as HTML: tokens that it raises and lowers, and its part in the length direction.

    The tokens are those of its mean contribution over the positions that predict think tokens (all response tokens, if there is no
    thinking). Below, each token of the response is coloured by the head's contribution, at the position that predicts the token, along the
    length direction of the head's layer: blue towards longer, brown towards shorter thinking.

    Args:
        lm: The model.
        response: The response that is read.
        v: Length direction in the residual stream; plus is longer.
        head: Layer and head.
    """
    layer, number = head
    added = one_head.contribution(lm, response.token_ids, layer, number)
    span = response.think if response.think_tokens and response.think else Span(response.prompt_len, len(response.token_ids))
    mean = added[span.start - 1 : span.stop - 1].mean(dim=0)
    unit = v.unit()[layer].float()
    raised, lowered = one_head.token_effects(lm, mean)
    towards = "longer" if float(mean @ unit) > 0 else "shorter"
    along = (added @ unit)[response.prompt_len - 1 : -1].tolist()
    coloured = transcript.coloured(
        lm, response.token_ids[response.prompt_len :], along, unit="along the length direction", hues=(LONGER, SHORTER), signed=True
    )
    return (
        f"<p><b>Writes</b>, mean over thinking. Raises the logits of {_tokens(raised)}; lowers those of {_tokens(lowered)}. Along the "
        f"length direction of layer {layer}: {float(mean @ unit):+.3f}, towards {towards} thinking (the vector's norm is "
        f"{float(mean.norm()):.3f}). Token by token, blue is longer and brown is shorter:</p>{coloured}"
    )


def attended_html(lm: LM, response: Rollout, head: Head, token: int) -> str:
    """Return the attention of a head when one token of a response is predicted, as HTML.

    Args:
        lm: The model.
        response: The response that is read.
        head: Layer and head.
        token: Number of the predicted token in the response, from 1.
    """
    at = response.prompt_len + token - 2  # the position that predicts the token
    ids = response.token_ids[: at + 1]
    (weights,) = one_head.attention_rows(lm, response.token_ids, Span(at, at + 1), *head).tolist()
    top = max(range(len(weights)), key=weights.__getitem__)
    chosen = html.escape(lm.token_text(response.token_ids[at + 1]).replace("\n", "↵"))
    most = html.escape(lm.token_text(ids[top]).replace("\n", "↵"))
    text = transcript.coloured(lm, ids, weights, unit="of its attention")
    return f"<p><b>Attends</b>, when “{chosen}” is predicted: most to “{most}” ({weights[top]:.0%}).</p>{text}"


@dataclass
class _Shown:
    """What the map shows now.

    Attributes:
        response: Response of the unchanged model.
        off: Heads that are off.
        loading: True while controls are set by the program, whose changes must not start anything.
    """

    response: Rollout | None = None
    off: list[Head] = field(default_factory=list)
    loading: bool = False


def head_map(
    lm: LM,
    scores: HeadScores,
    v: Direction,
    problems: Sequence[Problem],
    *,
    temperature: float = 1.0,
    max_new_tokens: int = 400,
) -> Any:
    """Return a Jupyter widget with a map of all heads. A click on a head shows what it writes and attends to; a switch turns it off.

    The unchanged model answers the chosen problem; this response is the transcript in which the head is shown (see ``written_html`` and
    ``attended_html``). With heads off (zero ablation at all positions), the model answers again with the same seed, and the new response
    stands beside the unchanged one. A switch adds a control: as many random other heads of the same layers off. The list of heads does
    what a click does, for keyboards. Needs the optional dependencies ``notebook``.

    Args:
        lm: The model.
        scores: Score of each head, which colours the map.
        v: Length direction in the residual stream, such as a plan's ``direction``; plus is longer.
        problems: Problems to choose from.
        temperature: Sampling temperature; 0 is greedy decoding.
        max_new_tokens: Token budget of a response.
    """
    import ipywidgets as w

    style = {"description_width": "6rem"}
    first, *_ = ranked = scores.ranked()
    picture = go.FigureWidget(figures.head_scores(scores))
    named = [(f"{layer}.{number}: {float(scores.score[layer, number]):.3f}", (layer, number)) for layer, number in ranked]
    head = w.Dropdown(options=named, value=first, description="head", style=style)
    off = w.Checkbox(False, description="this head off", indent=False)
    control = w.Checkbox(False, description="also random other heads off (control)", indent=False)
    problem = w.Dropdown(options=questions(problems), description="problem", style=style, layout=w.Layout(width="28rem"))
    seed = w.BoundedIntText(0, min=0, max=10**6, description="seed", style=style, layout=w.Layout(width="12rem"))
    token = w.IntSlider(1, min=1, max=1, description="token", continuous_update=False, style=style, layout=w.Layout(width="28rem"))
    busy, written, attended, output = w.HTML("ready"), w.HTML(), w.HTML(), w.HTML()
    now = _Shown()

    def sampling() -> Sampling:
        return Sampling(temperature=temperature, max_new_tokens=max_new_tokens, seed=seed.value)

    def draw_attention(_: Any = None) -> None:
        if now.response is not None and not now.loading:
            attended.value = attended_html(lm, now.response, head.value, token.value)

    def draw_head(_: Any = None) -> None:
        assert now.response is not None
        now.loading, off.value = True, head.value in now.off
        now.loading = False
        marks = [(at, "#00C853") for at in [head.value]] + [(at, "#000000") for at in now.off]
        picture.layout.shapes = [_outline(at, colour) for at, colour in marks]
        written.value = written_html(lm, now.response, v, head.value)
        draw_attention()

    def without(_: Any = None) -> None:
        assert now.response is not None
        unchanged = response_html(lm, "unchanged", now.response)
        try:
            chosen = arms(lm, now.off, control=control.value)
        except ValueError as error:
            busy.value = html.escape(str(error))
            return
        output.value = unchanged
        show_arms(lm, chosen, problem.value, sampling(), busy, output, first=unchanged)

    def toggle(_: Any = None) -> None:
        if not now.loading:
            now.off = [*now.off, head.value] if off.value else [at for at in now.off if at != head.value]
            draw_head()
            without()

    def answer(_: Any = None) -> None:
        (now.response,) = show_arms(lm, [Arm("unchanged")], problem.value, sampling(), busy, output)
        now.loading, token.max = True, len(now.response.token_ids) - now.response.prompt_len
        thinks = now.response.think_tokens and now.response.think
        token.value = now.response.think.start - now.response.prompt_len + 1 if thinks and now.response.think else 1
        now.loading = False
        draw_head()
        if now.off:
            without()

    def click(trace: Any, points: Any, state: Any) -> None:
        if points.xs:
            at = (int(points.ys[0]), int(points.xs[0]))
            if at in ranked:
                head.value = at

    picture.data[0].on_click(click)
    for changed, then in (
        (head, draw_head),
        (off, toggle),
        (control, without),
        (problem, answer),
        (seed, answer),
        (token, draw_attention),
    ):
        changed.observe(then, "value")
    answer()
    return w.VBox([picture, w.HBox([head, off, control]), w.HBox([problem, seed]), busy, output, written, token, attended])


def _outline(head: Head, colour: str) -> dict[str, Any]:
    """Return the outline of a head in the map as a shape of plotly; black ones, of heads that are off, are dotted."""
    layer, number = head
    inset = 0.5 if colour != "#000000" else 0.38
    box = {"x0": number - inset, "x1": number + inset, "y0": layer - inset, "y1": layer + inset}
    return {"type": "rect", "line": {"color": colour, "width": 4, "dash": "solid" if inset == 0.5 else "dot"}, **box}


def _tokens(effects: Sequence[tuple[str, float]]) -> str:
    """Return tokens and the changes of their logits as HTML."""
    return ", ".join(f"<code>{html.escape(text.replace(chr(10), '↵'))}</code> {change:+.2f}" for text, change in effects)


def _named(heads: Sequence[Head]) -> str:
    return f"head{'s' * (len(heads) > 1)} {', '.join(f'{layer}.{number}' for layer, number in heads)}"
