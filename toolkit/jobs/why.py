"""Find out why a changed model thinks longer or shorter than its base: which heads changed, along which directions, and in which steps.

The changed model may be edited, steered or trained; base and changed have the same architecture. A change of a head is measured by
activation patching (``patching``): the head's outputs are taken from one model and put into the other.

* ``head_effects``: effect of every head on the preference for long thinking (``length_preference``), teacher-forced.
* ``output_changes``: cosine of the changes of layers and heads with a length direction, beside isotropic random directions.
* ``entropy_changes``: entropies of thinking and answer.
* ``step_changes``: kinds of steps per response that appear or disappear.
* ``undo``: length and accuracy with two heads put back, or with the change of these heads alone, beside random heads of the same layers.

The preference, the kinds of steps and all default numbers are ours. **+ means longer.**
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass, replace
from pathlib import Path

import numpy as np
import pandas as pd
from jaxtyping import Float
from numpy import ndarray
from scipy.stats import beta
from torch import Tensor

from toolkit import collect, edits, entropies, evaluate, generate, one_head, stats
from toolkit.edits import RuntimeEdit
from toolkit.generate import Sampling
from toolkit.jobs.study import Say
from toolkit.lm import LM, Condition
from toolkit.methods import failed_steps, phase_entropy
from toolkit.metrics import share_of
from toolkit.patching import Heads, patch, patched
from toolkit.progress import stage
from toolkit.steering import Steering
from toolkit.types import Direction, HeadEdit, Plan, Problem, Rollout

BASE, CHANGED = "base", "changed"
UNDONE, ALONE = "put back", "alone"
"""In the table of ``undo``: heads put back to base in the changed model, and the change of these heads alone, in base."""
MEASURES = ("think_tokens", "correct")
STEPS = ("step", "re-check", "failed step", "jump to the result")
WHOLE = "whole change"  # name of the row of ``undo`` for the changed model itself


@dataclass(frozen=True, kw_only=True)
class WhySettings:
    """Sizes of the analysis; all defaults are ours.

    Attributes:
        heads: Heads to put back in ``undo``; ``None`` takes the ``top`` heads with the largest effects.
        top: Number of these heads.
        draws: Number of random controls: sets of other heads of the same layers.
        pairs: Largest number of pairs of responses on which the preference for long thinking is measured.
        seed: Seed of controls and bootstrap.
    """

    heads: Heads | None = None
    top: int = 2
    draws: int = 3
    pairs: int = 60
    seed: int = 0


@dataclass(frozen=True)
class Why:
    """Tables of the analysis; the functions of the same names describe their columns.

    Attributes:
        heads: From ``head_effects``.
        outputs: From ``output_changes``.
        entropies: From ``entropy_changes``.
        steps: From ``step_changes``.
        undo: From ``undo``.
        chosen: The heads that were put back.
    """

    heads: pd.DataFrame
    outputs: pd.DataFrame
    entropies: pd.DataFrame
    steps: pd.DataFrame
    undo: pd.DataFrame
    chosen: Heads

    @property
    def tables(self) -> dict[str, pd.DataFrame]:
        """The tables by name."""
        return {name: getattr(self, name) for name in ("heads", "outputs", "entropies", "steps", "undo")}


Pair = tuple[Rollout, Rollout]
"""Two responses to one problem, the one with less thinking first."""


def length_pairs(rollouts: Sequence[Rollout], most: int | None = None) -> list[Pair]:
    """Return the responses with the least and with the most thinking to each problem, as pairs.

    Two kinds are left out: responses that did not close their thinking, and problems whose responses all have the same number of think
    tokens. Of several responses of one length, the first is taken.

    Args:
        rollouts: Responses, several per problem, of one or several models.
        most: Largest number of pairs; ``None`` for all. The first problems are kept.

    Raises:
        ValueError: no problem has two responses of different lengths.
    """
    by_problem: dict[str, list[Rollout]] = {}
    for r in rollouts:
        if r.think is not None and r.answer is not None:
            by_problem.setdefault(r.problem_id, []).append(r)
    ends = [(min(rs, key=lambda r: r.think_tokens), max(rs, key=lambda r: r.think_tokens)) for rs in by_problem.values()]
    pairs = [(short, long) for short, long in ends if short.think_tokens < long.think_tokens]
    if not pairs:
        raise ValueError(
            f"None of {len(by_problem)} problems has two responses whose closed thinking differs in length: sample more responses per problem."
        )
    return pairs[:most]


def length_preference(target: LM | Condition, pairs: Sequence[Pair]) -> Float[ndarray, " pairs"]:
    """Return how much a model prefers long thinking, one number per pair, in nats: positive if it prefers the longer response.

    With y the tokens up to the answer (thinking and closing tag), or the whole response of a model that does not mark its thinking. Results of
    tools are left out::

        preference = log p(y of the longer response) - log p(y of the shorter response)

    Args:
        target: Model or condition that reads the responses.
        pairs: Pairs from ``length_pairs``.
    """
    read = entropies.with_entropies(target, [r for pair in pairs for r in pair])
    sums = np.array([_logprob_of_thinking(r) for r in read])
    return sums[1::2] - sums[::2]


def _logprob_of_thinking(r: Rollout) -> float:
    """Return the log-probability of the tokens that the model wrote before the answer, in nats; see ``length_preference``."""
    assert r.think is not None and r.answer is not None and r.logprobs is not None, r.problem_id  # as in ``length_pairs``
    unmarked = r.think.stop > r.answer.start  # the whole response is both thinking and answer
    stop = (r.answer.stop if unmarked else r.answer.start) - r.prompt_len
    return sum(logprob for logprob, written in zip(r.logprobs[:stop], r.written, strict=False) if written)


def head_effects(base: Condition, changed: Condition, pairs: Sequence[Pair], *, seed: int = 0) -> pd.DataFrame:
    """Return the effect of every head's change on the preference for long thinking (``length_preference``), by patching both ways.

    Args:
        base: The base model.
        changed: The changed model, of the same architecture.
        pairs: Pairs of responses, from ``length_pairs``.
        seed: Seed of the bootstrap over pairs.

    Returns:
        One row per head; heads whose effect has the sign of the whole change come first, the largest first. Columns: ``layer, head``; ``alone``
        (base with the head's outputs from ``changed``, minus base); ``put back`` (changed minus changed with the head's outputs from
        base); ``effect, effect_low, effect_high`` (mean of both, with its 95 % interval over pairs), all in nats; ``share, share_low,
        share_high`` (the effect divided by ``whole``; NaN unless the interval of the whole effect excludes zero); and ``whole, whole_low,
        whole_high`` (changed minus base).
    """
    before, after = length_preference(base, pairs), length_preference(changed, pairs)
    whole, n = after - before, len(pairs)
    total = stats.bootstrap(stats.mean_of(whole[:, None]), n, seed=seed)
    rows, heads = [], base.lm.layout.all_heads
    from_base, from_changed = patch(base, heads), patch(changed, heads)
    with stage("patching heads", len(heads), "head") as bar:
        for layer, head in heads:
            alone = length_preference(patched(base, from_changed.only((layer, head))), pairs) - before
            back = after - length_preference(patched(changed, from_base.only((layer, head))), pairs)
            both = ((alone + back) / 2)[:, None]
            effect, share = stats.bootstrap(stats.mean_of(both), n, seed=seed), share_of(both, whole[:, None], seed=seed)
            sizes = (effect.mean, effect.low, effect.high, share.mean, share.low, share.high, total.mean, total.low, total.high)
            rows.append((layer, head, alone.mean(), back.mean(), *sizes))
            bar.update(1)
    names = [f"{name}{end}" for name in ("effect", "share", "whole") for end in ("", "_low", "_high")]
    table = pd.DataFrame(rows, columns=["layer", "head", ALONE, UNDONE, *names])
    sign = -1.0 if total.mean < 0 else 1.0
    return table.iloc[np.argsort(-sign * table["effect"].to_numpy(), kind="stable")].reset_index(drop=True)


def output_changes(base: Condition, changed: Condition, rollouts: Sequence[Rollout], direction: Direction) -> pd.DataFrame:
    """Return the change of the mean outputs of layers and heads, and its cosine with a length direction, beside random directions.

    Both models read the same responses. Outputs are averaged over the positions that predict think tokens.

    Args:
        base: The base model.
        changed: The changed model, of the same architecture.
        rollouts: Responses to read.
        direction: Length direction; adding it lengthens thinking. Layers are compared with their own vector, at the direction's site.
            Heads are compared with the vector of the last layer, since the output of a head stays in the residual stream to the end.

    Returns:
        One row per layer (``head`` is -1: the residual stream at the direction's site) and per head (its contribution to the stream).
        Columns: ``layer, head``; ``norm`` (length of the change, in units of the residual stream); ``cosine`` (positive: towards longer
        thinking; NaN if nothing changed); and ``random``, which is ``random_cosine`` for the number of layers, or of heads.
    """
    means = []
    for condition in (base, changed):
        with condition.active():
            means.append(collect.moments(condition.lm, rollouts, lambda r: "all", kinds=(direction.kind, "z")))
    changes = {
        (layer, -1): v for layer, v in enumerate(means[1].mean(direction.kind, "all") - means[0].mean(direction.kind, "all"))
    }
    parts = [
        _contributions(c.lm, m.mean(c.lm.layout.contribution_kind, "all")) for c, m in zip((base, changed), means, strict=True)
    ]
    changes |= {at: parts[1][at] - parts[0][at] for at in parts[0]}
    rows, layout = [], base.lm.layout
    largest = {True: random_cosine(layout.d_model, layout.n_layers), False: random_cosine(layout.d_model, len(layout.all_heads))}
    for (layer, head), change in changes.items():
        v, norm = direction.vector[layer if head < 0 else -1].double(), float(change.norm())
        cosine = float(change.double() @ v) / (norm * float(v.norm())) if norm > 0 and v.norm() > 0 else np.nan
        rows.append((layer, head, norm, cosine, largest[head < 0]))
    return pd.DataFrame(rows, columns=["layer", "head", "norm", "cosine", "random"])


def random_cosine(dim: int, count: int) -> float:
    """Return the bound that the largest of several absolute cosines with random directions stays below, with probability 95 %.

    Random directions are isotropic: every orientation is equally likely. Activations are not: most of their variance lies along a few
    directions, so cosines of unrelated differences of activations exceed the bound more often. To exceed it is a weak sign. The directions
    are taken as independent. If all vectors are compared with one direction, as heads are, the bound is a little too large (Sidak).

    Args:
        dim: Number of dimensions, at least 2.
        count: Number of cosines, of which the largest counts.

    >>> round(random_cosine(128, 1), 3), round(random_cosine(128, 4), 3)
    (0.173, 0.219)
    """
    # The square of the cosine of a fixed vector and an isotropic one has this beta distribution.
    return float(np.sqrt(beta.ppf(0.95 ** (1 / count), 0.5, (dim - 1) / 2)))


def _contributions(lm: LM, z: Float[Tensor, "layers z"]) -> dict[tuple[int, int], Float[Tensor, " d_model"]]:
    """Return the mean vector that each head adds to the residual stream, from means of ``Layout.contribution_kind``."""
    found = {}
    for layer, head in lm.layout.all_heads:
        columns = lm.layout.head(layer, head)
        part = lm.layout.W_O(layer).detach()[:, columns].cpu().double() @ z[layer, columns].cpu().double()
        found[layer, head] = one_head.in_stream(lm.layout, layer, part).cpu().double()
    return found


def entropy_changes(before: Sequence[Rollout], after: Sequence[Rollout], *, seed: int = 0) -> pd.DataFrame:
    """Return the entropies of thinking and answer of two models' own responses, and their difference, paired by problem.

    Args:
        before: Responses of the base model with entropies (``Sampling(details=True)``).
        after: Responses of the changed model to the same problems.
        seed: Seed of the bootstrap over problems.

    Returns:
        One row per phase (``think``, ``answer``). Columns: ``phase``; ``base, changed`` (nats per token); ``difference, difference_low,
        difference_high`` (changed minus base, 95 % interval; NaN if no problem has the phase in both).

    Raises:
        entropies.NoEntropiesError: a response has no entropies.
    """
    tables = [
        phase_entropy.table(rollouts).groupby("problem_id")[["think_entropy", "answer_entropy"]].mean()
        for rollouts in (before, after)
    ]
    rows = [(name.removesuffix("_entropy"), *_paired(tables[0][name], tables[1][name], seed)) for name in tables[0]]
    return pd.DataFrame(rows, columns=["phase", BASE, CHANGED, "difference", "difference_low", "difference_high"])


def step_changes(
    lm: LM, before: Sequence[Rollout], after: Sequence[Rollout], problems: Sequence[Problem], *, seed: int = 0
) -> pd.DataFrame:
    """Return how many steps of each kind a response has in two models, and the difference, paired by problem.

    Kinds: ``re-check`` (re-checks an earlier step); else ``failed step`` (wrong or abandoned); else ``jump to the result`` (a line that
    begins with ``=``, with which the tiny reasoner skips the remaining steps); else ``step``.

    Args:
        lm: Model whose tokenizer decodes the responses.
        before: Responses of the base model.
        after: Responses of the changed model.
        problems: Their problems; ``failed_steps.fitting`` chooses how their steps are read.
        seed: Seed of the bootstrap over problems.

    Returns:
        One row per kind. Columns: ``kind``; ``base, changed`` (steps per response); ``difference, difference_low, difference_high``
        (changed minus base, 95 % interval).
    """
    counts = []
    for rollouts in (before, after):
        chains = failed_steps.chains(lm, rollouts, problems, failed_steps.fitting)
        table = pd.DataFrame([_count(c) for c in chains], columns=list(STEPS)).assign(problem=[r.problem_id for r in rollouts])
        counts.append(table.groupby("problem").mean())
    rows = [(kind, *_paired(counts[0][kind], counts[1][kind], seed)) for kind in STEPS]
    return pd.DataFrame(rows, columns=["kind", BASE, CHANGED, "difference", "difference_low", "difference_high"])


def _count(chain: failed_steps.Chain) -> list[int]:
    kinds = [
        "re-check" if review else "failed step" if failed else "jump to the result" if text.lstrip().startswith("=") else "step"
        for text, failed, review in zip(chain.texts, chain.failed, chain.review, strict=True)
    ]
    return [kinds.count(kind) for kind in STEPS]


def _paired(before: pd.Series, after: pd.Series, seed: int) -> tuple[float, ...]:
    """Return the two means and their difference with its interval, over the problems that have both values."""
    both = pd.concat([before, after], axis=1, keys=(BASE, CHANGED)).dropna()
    if both.empty:
        return (np.nan,) * 5
    d = stats.mean_effect((both[CHANGED] - both[BASE]).to_numpy(float)[None], seed=seed)
    return float(both[BASE].mean()), float(both[CHANGED].mean()), d.mean, d.low, d.high


def undo(
    base: Condition, changed: Condition, heads: Heads, problems: Sequence[Problem], sampling: Sampling = Sampling(n=4), *,
    draws: int = 3, seed: int = 0, out: Path | None = None, allow_overlap: bool = False,
) -> pd.DataFrame:  # fmt: skip
    """Measure how much of the change in length and accuracy lies in some heads: put them back to base, or change them alone.

    Every condition answers the same problems with the same random numbers. Random controls are as many other heads of the same layers.

    Args:
        base: The base model.
        changed: The changed model, of the same architecture.
        heads: The heads.
        problems: Held-out problems.
        sampling: Sampling settings.
        draws: Number of random controls, no two of which have the same heads; fewer if not enough other heads are left.
        seed: Seed of the controls and of the bootstrap.
        out: Directory of the rollouts, from which a repeated call resumes; ``None`` stores nothing.
        allow_overlap: True to judge models even on problems that they were made from.

    Returns:
        One row per condition and measure. Columns: ``heads`` (``whole change``, ``top``, or ``random`` with the number of the draw);
        ``which`` (the heads as text); ``way`` (``put back`` or ``alone``); ``measure`` (``think_tokens`` or ``correct``); ``change,
        change_low, change_high`` (the part of the change that these heads make: changed minus "put back", or "alone" minus base, 95 %
        interval over problems); ``share, share_low, share_high`` (divided by the whole change; NaN unless its interval excludes zero).

    Raises:
        evaluate.OverlapError: a model was made from one of the problems, and ``allow_overlap`` is False.
    """
    evaluate.check_held_out({BASE: base, CHANGED: changed}, problems, allow=allow_overlap)
    like = Plan(tuple(HeadEdit(*h, "scale", 1.0) for h in heads), None, "top heads", base.lm.provenance())
    sets: dict[str, Heads] = {"top": tuple(heads)}
    # Two equal sets of heads would count as two draws.
    others = edits.different_draws(lambda at: edits.random_heads(like, base.lm.layout, seed=at), draws, seed=seed)
    sets |= {f"random {d}": tuple(p.heads) for d, p in enumerate(others)}

    def sample(name: str, condition: Condition) -> dict[str, ndarray]:
        sampled = generate.rollouts(condition, problems, sampling, out=out and evaluate.rollout_folder(out, name))
        table = pd.DataFrame({"problem": r.problem_id, **{m: float(getattr(r, m)) for m in MEASURES}} for r in sampled)
        return {m: table[m].to_numpy().reshape(len(problems), -1) for m in MEASURES}

    before, after = sample(BASE, base), sample(CHANGED, changed)
    whole = {m: after[m] - before[m] for m in MEASURES}
    parts: dict[tuple[str, str], dict[str, ndarray]] = {(WHOLE, ""): whole}
    for name, chosen in sets.items():
        back = sample(f"{name} put back", patched(changed, patch(base, chosen)))
        alone = sample(f"{name} alone", patched(base, patch(changed, chosen)))
        parts[name, UNDONE] = {m: after[m] - back[m] for m in MEASURES}
        parts[name, ALONE] = {m: alone[m] - before[m] for m in MEASURES}
    rows = []
    for (name, way), part in parts.items():
        which = ", ".join(f"{layer}.{head}" for layer, head in sets.get(name, ()))
        for m in MEASURES:
            e, s = stats.bootstrap(stats.mean_of(part[m]), len(problems), seed=seed), share_of(part[m], whole[m], seed=seed)
            rows.append((name, which, way, m, e.mean, e.low, e.high, s.mean, s.low, s.high))
    names = [f"{name}{end}" for name in ("change", "share") for end in ("", "_low", "_high")]
    return pd.DataFrame(rows, columns=["heads", "which", "way", "measure", *names])


def check_patchable(changed: Condition) -> None:
    """Raise ValueError if a condition changes outputs of attention after the heads, where patching heads does not see it."""
    for act in changed.during:
        if isinstance(act, RuntimeEdit):
            raise ValueError(f"{act}: patching heads would miss it. Give the edited weights (edits.apply) instead.")
        if isinstance(act, Steering) and act.site == "attn_out":
            raise ValueError(f"{act}: patching heads would miss it. Steer at resid_mid or resid_post instead.")


def find_reasons(
    base: Condition, changed: Condition, direction: Direction, problems: Mapping[str, Sequence[Problem]], sampling: Sampling = Sampling(n=4),
    settings: WhySettings = WhySettings(), *, out: Path | None = None, allow_overlap: bool = False, say: Say = lambda text: None,
) -> Why:  # fmt: skip
    """Run the whole analysis of this module, and return its tables.

    Args:
        base: The base model.
        changed: The changed model, of the same architecture.
        direction: Length direction of the base model; adding it lengthens thinking.
        problems: ``dev``: problems whose responses choose the heads; ``test``: other problems, on which all else is measured.
        sampling: Sampling settings.
        settings: Sizes of the analysis.
        out: Directory of the rollouts, from which a repeated call resumes; ``None`` stores nothing.
        allow_overlap: True to judge models even on problems that they were made from.
        say: Function that is called with one line of progress at a time.

    Raises:
        ValueError: the changed model is edited at run time or steered at the output of attention. Patching heads would miss that change.
        evaluate.OverlapError: a model was made from a test problem, and ``allow_overlap`` is False. Nothing is sampled then.
    """
    check_patchable(changed)
    # Checked here too: ``undo`` comes after the long part.
    evaluate.check_held_out({BASE: base, CHANGED: changed}, problems["test"], allow=allow_overlap)
    detailed = replace(sampling, details=True)

    def own(split: str) -> list[list[Rollout]]:
        folders = [out and out / f"{split}-{name}" for name in (BASE, CHANGED)]
        return [generate.rollouts(c, problems[split], detailed, out=f) for c, f in zip((base, changed), folders, strict=True)]

    say("sampling responses of base and of the changed model")
    chosen_from, (before, after) = own("dev"), own("test")
    pairs = length_pairs([r for rollouts in chosen_from for r in rollouts], settings.pairs)
    say(f"patching every head, on {len(pairs)} pairs of responses")
    effects = head_effects(base, changed, pairs, seed=settings.seed)
    heads = settings.heads or tuple((int(i), int(j)) for i, j in effects[["layer", "head"]].head(settings.top).to_numpy())
    say("putting heads back, and changing them alone")
    return Why(
        effects,
        output_changes(base, changed, before, direction),
        entropy_changes(before, after, seed=settings.seed),
        step_changes(base.lm, before, after, problems["test"], seed=settings.seed),
        undo(
            base,
            changed,
            heads,
            problems["test"],
            sampling,
            draws=settings.draws,
            seed=settings.seed,
            out=out and out / "undo",
            allow_overlap=allow_overlap,
        ),
        heads,
    )
