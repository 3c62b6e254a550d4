"""Show a response as HTML: tokens coloured by entropy, numbered steps of thinking, tool results, and marks on failed steps and re-checks.

``fragment`` explains these marks. Use its result in a saved report, or in Jupyter through ``IPython.display.HTML``. ``html_page`` returns a
whole page of fragments. The HTML loads no other file and runs no script. If you hover over a token or click it, its entropy and probability
are shown.
"""

from __future__ import annotations

import html
import math
from collections.abc import Mapping, Sequence
from textwrap import shorten

import numpy as np

from toolkit import steps
from toolkit.entropies import entropies_of
from toolkit.lm import LM
from toolkit.methods.failed_steps import Chain
from toolkit.methods.phase_entropy import phase_means
from toolkit.types import Problem, Rollout, Span

HUE = "230,120,0"  # an orange on which dark text is readable; only its opacity shows entropy, so colour blindness does not matter
NAME = 60  # longest problem id in the heading, in characters
DEEPEST = 0.85  # opacity of the deepest colour, for the highest entropy
_STYLE = f"""<style>
.rl-t{{font:15px/1.7 ui-monospace,SFMono-Regular,Menlo,Consolas,monospace;color:#1a1a1a;background:#fff;border:1px solid #ddd;
border-radius:8px;padding:1rem 1.2rem;margin:1rem 0;max-width:1000px;text-align:left}}
.rl-t *{{box-sizing:border-box}}
.rl-t .head,.rl-t .key{{font:13px/1.5 system-ui,sans-serif;color:#555;display:flex;flex-wrap:wrap;gap:.3rem 1.2rem;align-items:center}}
.rl-t .head b{{color:#1a1a1a}}
.rl-t .key{{border-top:1px solid #eee;margin-top:.8rem;padding-top:.6rem}}
.rl-t .bar{{display:inline-block;width:7rem;height:.8rem;border:1px solid #ccc;vertical-align:-.1rem;margin:0 .4rem;
background:linear-gradient(90deg,rgba({HUE},0),rgba({HUE},{DEEPEST}))}}
.rl-t .part{{border-left:4px solid #bbb;padding:.1rem 0 .1rem .8rem;margin-top:.8rem}}
.rl-t .think{{border-color:#0072B2}}.rl-t .answer{{border-color:#009E73}}
.rl-t .name{{font:600 12px/1.5 system-ui,sans-serif;color:#555}}
.rl-t .think>.name{{color:#00598c}}.rl-t .answer>.name{{color:#00694d}}
.rl-t .text{{white-space:pre-wrap;overflow-wrap:anywhere}}
.rl-t .step{{display:flex}}
.rl-t .no{{flex:0 0 7rem;font:12px/2.1 system-ui,sans-serif;color:#767676;padding-left:.3rem;border-left:4px solid transparent}}
.rl-t .failed{{background:#fdf0ee}}.rl-t .failed .no{{color:#a3200d;font-weight:600;border-color:#c0341d}}
.rl-t .review .no{{color:#00598c;font-weight:600}}.rl-t .failed.review .no{{color:#a3200d}}
.rl-t .prompt{{color:#555}}.rl-t .tag{{color:#555}}
.rl-t i{{font-style:normal;position:relative;border-radius:2px}}
.rl-t i:hover,.rl-t i:focus{{outline:2px solid #1a1a1a}}
.rl-t i:hover::after,.rl-t i:focus::after{{content:attr(data-t);position:absolute;left:0;top:1.7em;z-index:9;background:#1a1a1a;color:#fff;
font:12px/1.5 system-ui,sans-serif;padding:.2rem .5rem;border-radius:4px;white-space:pre;pointer-events:none}}
.rl-t .nl{{opacity:.45}}
.rl-t .got{{background:#e8eef4;border-bottom:2px solid #6b8299}}
</style>"""


def fragment(
    lm: LM, rollout: Rollout, *, chain: Chain | None = None, problem: Problem | None = None, top: float | None = None
) -> str:
    """Return one response as a self-contained HTML fragment.

    Args:
        rollout: The response, with recorded entropies.
        chain: Steps of the response's thinking, from ``methods.failed_steps.chain``. It says which steps failed (are wrong or were
            abandoned) and which re-check an earlier step. If ``None``, each line is a step and no step is marked.
        problem: Problem whose right answer is shown; ``None`` shows none.
        top: Entropy (nats) that gets the deepest colour. To compare responses, pass the same number for all. ``None`` means the highest
            entropy in the response, or 1 if all are 0.

    Raises:
        entropies.NoEntropiesError: the rollout has no recorded entropies.
        ValueError: ``top`` is not positive, or the chain has no token spans. A chain has them if it was made from a rollout, not from text.
    """
    h = entropies_of(rollout)
    if top is not None and not top > 0:
        raise ValueError(f"top={top}: the entropy of the deepest colour must be above 0 nats.")
    scale = (
        top or float(h[np.array(rollout.written, bool)].max(initial=0.0)) or 1.0
    )  # 1 if every entropy is 0, since entropies are divided by it
    tokens = _tokens(lm, rollout, scale)
    start, end = rollout.prompt_len, len(rollout.token_ids)
    think, answer = rollout.think, rollout.answer
    if think is not None and answer is not None and answer.start < think.stop:  # no tag separates them: show both as thinking
        answer = None
    parts = [_part("prompt", "prompt", f"<span class='prompt'>{html.escape(lm.text(rollout.token_ids[:start]))}</span>")]
    if think is not None:
        # ``tokens`` starts after the prompt, spans count from the start of the prompt; hence ``- start``.
        opening, stop = tokens[: think.start - start], answer.start if answer else end
        inside = _steps(lm, rollout, chain, tokens)
        closing = tokens[think.stop - start : stop - start]
        body = f"{_tag(opening)}{inside}{_tag(closing)}"
        parts.append(_part("think", f"thinking · {_tokens_in(think)}" + ("" if rollout.closed else " · never closed"), body))
        start_answer = stop
    else:
        start_answer = start
    if answer is not None:
        inside, rest = "".join(tokens[start_answer - start : answer.stop - start]), tokens[answer.stop - start :]
        parts.append(_part("answer", f"answer · {_tokens_in(answer)}", f"{inside}{_tag(rest)}"))
    return f"{_STYLE}<div class='rl-t'>{_head(rollout, problem)}{''.join(parts)}{_key(rollout, chain, scale)}</div>"


def coloured(
    lm: LM, ids: Sequence[int], values: Sequence[float], *, unit: str, hues: tuple[str, str] = (HUE, HUE), signed: bool = False
) -> str:
    """Return a text as HTML, its tokens coloured by one value each; the largest absolute value gets the deepest colour.

    Args:
        lm: Model whose tokenizer made the tokens.
        ids: Token ids of the text.
        values: One value per token.
        unit: Unit of the values, which is shown beside the value of a token.
        hues: Colours of positive and of negative values, as ``"red,green,blue"``.
        signed: True to show the sign of positive values, too.

    Raises:
        ValueError: the numbers of tokens and of values differ.
    """
    top = max(map(abs, values), default=0.0) or 1.0
    tokens = [
        _token(piece, f"{_named(piece)}  {value:{'+' if signed else ''}.3f} {unit}", hues[value < 0], DEEPEST * abs(value) / top)
        for piece, value in zip(steps.token_texts(lm, ids), values, strict=True)
    ]
    return f"{_STYLE}<div class='rl-t'><div class='text'>{''.join(tokens)}</div></div>"


def compared(fragments: Mapping[str, str]) -> str:
    """Return the responses of two or more conditions side by side as HTML; below one another where there is little room.

    Args:
        fragments: Name of a condition -> HTML of its response, from ``fragment``. Pass the same ``top`` to all, so that colours compare.
    """
    boxes = "".join(
        f"<div style='flex:1 1 22rem;min-width:0'><b style='font:600 14px system-ui,sans-serif'>{html.escape(name)}</b>{text}</div>"
        for name, text in fragments.items()
    )
    return f"<div style='display:flex;flex-wrap:wrap;gap:1rem'>{boxes}</div>"


def html_page(title: str, fragments: Sequence[str]) -> str:
    """Return a whole HTML page with a title and several responses; write it with ``store.write_text``.

    Args:
        fragments: HTML of each response, from ``fragment``.
    """
    head = f"<meta charset='utf-8'><meta name='viewport' content='width=device-width'><title>{html.escape(title)}</title>"
    style = "<style>body{font:16px/1.5 system-ui,sans-serif;color:#222;max-width:1040px;margin:2rem auto;padding:0 1rem}h1{font-size:1.5rem}</style>"
    body = f"<h1>{html.escape(title)}</h1>{''.join(fragments)}"
    return f"<!doctype html><html lang='en'><head>{head}{style}</head><body>{body}</body></html>"


def _tokens(lm: LM, r: Rollout, top: float) -> list[str]:
    """Return the response tokens, each as HTML."""
    tokens = []
    texts, written = steps.token_texts(lm, r.token_ids[r.prompt_len :]), r.written
    for i, (piece, entropy) in enumerate(zip(texts, entropies_of(r).tolist(), strict=True)):
        hover = f"{_named(piece)}  {entropy:.3f} nats"
        if r.logprobs is not None:
            hover += f", p = {_probability(r.logprobs[i])}"
        if written[i]:
            tokens.append(_token(piece, hover, HUE, DEEPEST * min(entropy / top, 1.0)))
        else:
            tokens.append(_token(piece, f"{_named(piece)}  part of a tool result", kind="got"))
    return tokens


def _token(piece: str, hover: str, hue: str = HUE, depth: float = 0.0, kind: str = "") -> str:
    """Return one token as HTML.

    Args:
        piece: Text of the token.
        hover: Text that is shown when the token is hovered over or clicked.
        hue: Colour as ``"red,green,blue"``.
        depth: Opacity of the colour, 0 to 1.
        kind: Class of the HTML element, or "" for none.
    """
    visible = html.escape(piece).replace("\n", "<span class='nl'>↵</span>\n") or "<span class='nl'>·</span>"
    # An opacity below 0.005 is 0.00 in two decimals, which shows no colour: leave the style out.
    colour = f" style='background:rgba({hue},{depth:.2f})'" if depth >= 0.005 else ""
    marked = f" class='{kind}'" if kind else ""
    return f"<i{marked} tabindex='-1' data-t='{html.escape(hover, quote=True)}'{colour}>{visible}</i>"


def _tokens_in(span: Span) -> str:
    return f"{len(span)} token{'s' * (len(span) != 1)}"


def _named(piece: str) -> str:
    """Return a token's text for the hover box; ``"part of a character"`` for a token that holds only some bytes of a UTF-8 character."""
    return "part of a character" if not piece else f"“{piece}”".replace("\n", "↵").replace("\t", "⇥")


def _probability(logprob: float) -> str:
    p = math.exp(logprob)
    return f"{p:.3f}" if p >= 0.001 else f"{p:.1e}"


def _tag(tokens: Sequence[str]) -> str:
    return f"<span class='tag'>{''.join(tokens)}</span>" if tokens else ""


def _part(kind: str, name: str, body: str) -> str:
    return f"<div class='part {kind}'><div class='name'>{name}</div><div class='text'>{body}</div></div>"


def _steps(lm: LM, r: Rollout, chain: Chain | None, tokens: Sequence[str]) -> str:
    """Return the thinking as HTML, one row per step: its number, its marks (failed, re-check), and its tokens."""
    rows = []
    for i, step in enumerate(chain.steps if chain else steps.think_steps(lm, r)):
        failed, review = (chain.failed[i], chain.review[i]) if chain else (False, False)
        # The label is the step's number, then a cross if the step failed, then a word. A re-check that failed has the cross and the word
        # "re-check"; the word "failed" is only for other steps.
        label = f"{i + 1}" + " ✗" * failed + (" re-check" if review else " failed" if failed else "")
        kind = "step" + " failed" * failed + " review" * review
        text = "".join(tokens[step.span.start - r.prompt_len : step.span.stop - r.prompt_len]).rstrip("\n")
        rows.append(f"<div class='{kind}'><div class='no'>{label}</div><div>{text}</div></div>")
    return "".join(rows)


def _head(r: Rollout, problem: Problem | None) -> str:
    """Return the heading of a response as HTML: problem id, sample, right or wrong, right answer, mean entropy of thinking and answer."""
    means = phase_means(r)
    entropies = {"thinking": means.think, "answer": means.answer}
    facts = [
        f"<b>{html.escape(shorten(r.problem_id, NAME, placeholder=' …'))}</b>",
        f"sample {r.sample}",
        f"<b>{'✓ correct' if r.correct else '✗ wrong'}</b>",
    ]
    facts += [f"gold {html.escape(problem.answer)}"] if problem else []
    facts += [f"{len(r.results)} tool call{'s' * (len(r.results) != 1)}"] if r.results else []
    facts += [f"mean entropy, {phase}: {mean:.3f} nats" for phase, mean in entropies.items() if mean is not None]
    return f"<div class='head'>{''.join(f'<span>{fact}</span>' for fact in facts)}</div>"


def _key(r: Rollout, chain: Chain | None, top: float) -> str:
    """Return the legend under a response as HTML: the colour scale, the tokens of tool results, and the number of failed steps."""
    keys = [f"<span>entropy 0<span class='bar'></span>{top:.2f} nats</span>", "<span>hover a token: entropy, probability</span>"]
    if r.results:
        keys.append(f"<span><span class='got'>tool result</span>: {r.result_tokens} tokens that the model did not write</span>")
    if chain and any(chain.failed):
        keys.append(f"<span>✗ failed step: {sum(chain.failed)} of {len(chain.failed)}</span>")
    return f"<div class='key'>{''.join(keys)}</div>"
