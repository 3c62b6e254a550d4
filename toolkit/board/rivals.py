"""Conditions of the board for training-free rivals of steering and edits, each with a random control.

``data/rivals/conditions.py`` lists them at the settings that ``data/rivals`` chose on the tiny reasoner's dev split: ``toolkit board
--conditions data/rivals/conditions.py``. For another model, choose words, ends of steps and strengths on its own dev split.

Everything that a method learns is learnt from ``Ground.sample``, responses of base to problems of the train split. Where a second sample is
needed, such as the exits that a control repeats, the problems are halved.
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import replace
from typing import TypeVar

import numpy as np

from toolkit import collect, directions
from toolkit.baselines import Budget, Suppress
from toolkit.board.ground import Ground
from toolkit.board.spec import Spec, spec_of
from toolkit.collect import MLP
from toolkit.directions import LONG, SHORT, random_like
from toolkit.edits import steering
from toolkit.exits import EarlyExit, RandomExit, candidates, rates
from toolkit.lm import Condition
from toolkit.methods import crest, efficiency_steering, exit_probe, manifold_steering, rebalance, stable_directions
from toolkit.methods.code_stop import CodeStop, Probe
from toolkit.phases import Scope
from toolkit.step_states import starts_with, step_states
from toolkit.types import Problem, Rollout

T = TypeVar("T")
WORDS, LINE = ("wait",), "\n"  # the tiny reasoner's re-checks, and the end of its steps
ANSWERS = CodeStop(skip=(0, 0), probe=Probe(tokens=6))  # its answers have one to three tokens
STARTS = tuple("123456789")  # tokens with which its other steps begin
TAU = 0.2  # its re-checks are less stable than the paper's: of 156, two reach .8, and 31 % this value (data/rivals)
LAST = -1
COUNTED = "as many on responses to the training task as"  # on other tasks, the control may exit more or less often than the method


def _once(ground: Ground, what: str, make: Callable[[], T]) -> T:
    """Return a value that is computed once per ``Ground``."""
    key = ("rivals", what)
    if key not in ground.made:
        ground.made[key] = make()
    return ground.made[key]


def _halves(ground: Ground) -> tuple[list[Problem], list[Rollout], list[Rollout]]:
    """Return the problems of the base responses, and the responses of every second problem and of the others."""
    problems = ground.study.load("train", ground.lm)
    first = {p.id for p in problems[::2]}
    mine = [r for r in ground.sample() if r.problem_id in first]
    return problems, mine, [r for r in ground.sample() if r.problem_id not in first]


# --- directions --------------------------------------------------------------------------------------------------


def stable(name: str, strength: float, *, tau: float = TAU, words: tuple[str, ...] = WORDS, control: bool = False) -> Spec:
    """Return a condition that steers along a stability-filtered direction of re-checking (arXiv 2604.02113).

    Args:
        name: Unique name of the condition.
        strength: Added norm as a share of the typical norm of the activations, in the think span of the last layer. A negative strength makes
            re-checks rarer, so thinking is meant to be shorter.
        tau: Smallest stability of a boundary that is kept.
        words: Words with which a re-check begins, in lower case.
        control: True for a random control: a random direction of the same norm.
    """
    about = {"strength": strength, "tau": tau, "words": words, "control": control}
    note = f"{'a random direction of the norm of ' if control else ''}stable re-checking's, {strength:+g} of the typical norm"
    return spec_of(name, _family(control), _stable, about, seeded=control, paper="2604.02113", note=note)


def _family(control: bool, family: str = "steer") -> str:
    return "control" if control else family


def _stable(ground: Ground, seed: int, *, strength: float, tau: float, words: tuple[str, ...], control: bool) -> Condition:
    def make():
        label, responses = starts_with(*words), ground.sample()
        boundaries = stable_directions.stabilities(ground.lm, responses, ground.study.load("train", ground.lm), label)
        states = stable_directions.keep_stable(step_states(ground.lm, responses, MLP, label), boundaries, tau)
        v = stable_directions.direction(states, stable_directions.question_states(ground.lm, responses, MLP))
        return directions.in_typical_units(v, collect.typical_norm(ground.lm, responses, MLP))

    v = _once(ground, f"stable {tau} {words}", make)
    v = random_like(v, seed=seed) if control else v
    return Condition(ground.lm, (steering(v, strength, layers=(LAST % ground.lm.layout.n_layers,), during="think"),))


def projected(name: str, strength: float, *, components: int = manifold_steering.COMPONENTS, control: bool = False) -> Spec:
    """Return a condition that removes the direction of long thinking on the manifold of activations (arXiv 2505.22411).

    Args:
        name: Unique name of the condition.
        strength: Share of the component that is removed, 1 for all of it, in the think span of the last layer.
        components: Number of principal components that span the manifold.
        control: True for a random control: the direction on the manifold after long and short responses exchanged their classes at random.
    """
    about = {"strength": strength, "components": components, "control": control}
    which = "a direction on the manifold from shuffled classes" if control else "long thinking on the manifold"
    note = f"{strength:g} of the component along {which} removed"
    return spec_of(name, _family(control), _projected, about, seeded=control, paper="2505.22411", note=note)


def _projected(ground: Ground, seed: int, *, strength: float, components: int, control: bool) -> Condition:
    def make():
        responses = ground.sample()
        return collect.states(ground.lm, responses, MLP, by=efficiency_steering.pairs(responses))

    states = _once(ground, "states of long and short responses", make)
    v = manifold_steering.direction(states.shuffled((LONG, SHORT), seed=seed) if control else states, components)
    return Condition(ground.lm, (steering(v, strength, layers=(LAST % ground.lm.layout.n_layers,), during="think", op="ablate"),))


# --- heads and confidence ----------------------------------------------------------------------------------------


def rotated(name: str, count: int, *, words: tuple[str, ...] = WORDS, ends: str = LINE, control: bool = False) -> Spec:
    """Return a condition that turns the outputs of some heads away from re-checking at the ends of steps (CREST, arXiv 2512.24574).

    Args:
        name: Unique name of the condition.
        count: Number of heads, those with the most accurate probes.
        words: Words with which a re-check begins, in lower case.
        ends: Text with which a step ends.
        control: True for a random control: other heads, directions from shuffled classes.
    """
    about = {"count": count, "words": words, "ends": ends, "control": control}
    note = f"{count} {'random heads, directions from shuffled classes' if control else 'heads turned away from re-checking'}"
    return spec_of(name, _family(control), _rotated, about, seeded=control, paper="2512.24574", note=note)


def _rotated(ground: Ground, seed: int, *, count: int, words: tuple[str, ...], ends: str, control: bool) -> Condition:
    def make():
        states = step_states(ground.lm, ground.sample(), "z", starts_with(*words))
        return states, crest.scores(states, ground.lm.layout)

    states, scored = _once(ground, f"crest {words}", make)
    act = crest.rotation(states, ground.lm.layout, scored, count, ends=ends)
    return Condition(ground.lm, (crest.random_turns(act, ground.lm.layout, states, seed=seed) if control else act,))


def confident(name: str, scale: float, *, words: tuple[str, ...] = WORDS, ends: str = LINE, control: bool = False) -> Spec:
    """Return a condition that steers with a strength that follows the confidence of the steps so far (ReBalance, arXiv 2603.12372).

    Args:
        name: Unique name of the condition.
        scale: Factor on the published strengths; 1 is the code's.
        words: Words that make a step overthinking, in lower case.
        ends: Text with which a step ends.
        control: True for a random control: a random direction of the same norm.
    """
    about = {"scale": scale, "words": words, "ends": ends, "control": control}
    note = f"{scale:g} x a strength that follows confidence{', along a random direction' if control else ''}"
    return spec_of(name, _family(control), _confident, about, seeded=control, paper="2603.12372", note=note)


def _confident(ground: Ground, seed: int, *, scale: float, words: tuple[str, ...], ends: str, control: bool) -> Condition:
    def make():
        responses = ground.sample()
        measured = rebalance.confidences(ground.lm, responses, ends)
        limits = rebalance.levels(measured)
        v = rebalance.direction(ground.lm, responses, measured, limits, words=words)
        return v, rebalance.best_layer(ground.lm, responses, measured), limits

    v, layer, limits = _once(ground, f"rebalance {words} {ends!r}", make)
    v = random_like(v, seed=seed) if control else v
    return Condition(ground.lm, (rebalance.Confident(v, layer, limits, scale, ends),))


# --- decoding ----------------------------------------------------------------------------------------------------


def suppressed(name: str, word: str = "w", *, first: int = 0, others: tuple[str, ...] = ()) -> Spec:
    """Return a condition that bans a token in thinking, such as the first token of a re-check (NoWait, arXiv 2506.08343).

    Args:
        name: Unique name of the condition.
        word: The token. A re-check of the tiny reasoner begins with ``w``.
        first: Position in the think span from which on the token is banned.
        others: For a random control: first tokens of other steps. One of them, drawn at random, is banned instead, where a step begins: as
            many seeds as there are tokens draw different ones. Inside steps it stays, as numbers need their digits.
    """
    about = {"word": word, "first": first, "others": others}
    banned = f"one of {', '.join(others)} banned as the beginning of steps: it acts only where steps begin with one"
    note = banned if others else f"{word!r} banned in thinking"
    return spec_of(name, _family(bool(others), "decode"), _suppressed, about, seeded=bool(others), paper="2506.08343", note=note)


def _suppressed(ground: Ground, seed: int, *, word: str, first: int, others: tuple[str, ...]) -> Condition:
    word = others[np.random.default_rng(0).permutation(len(others))[seed % len(others)]] if others else word
    return Condition(ground.lm, (Suppress((word,), Scope(("think",), first=first), LINE if others else ""),))


# --- exits -------------------------------------------------------------------------------------------------------


def answered(name: str, check: CodeStop = ANSWERS, *, ends: str = LINE, control: bool = False) -> Spec:
    """Return a condition that stops thinking where a forced answer is confident, or confidence declines (CoDE-Stop, arXiv 2604.04930).

    The board counts the tokens of forced answers as think tokens: see ``code_stop.probe_tokens``.

    Args:
        name: Unique name of the condition.
        check: Thresholds, and how an answer is forced.
        ends: Text with which a step ends.
        control: True for a random control: as many exits at the same candidates, in responses chosen at random.
    """
    about = {"check": check, "ends": ends, "control": control}
    what = f"random exits, {COUNTED} by confidence" if control else "exits where a forced answer is confident"
    note = f"{what} ({check.low:g} to {check.high:g}){'' if control else '; tokens of forced answers are counted'}"
    return spec_of(name, _family(control, "decode"), _answered, about, seeded=control, paper="2604.04930", note=note)


def _answered(ground: Ground, seed: int, *, check: CodeStop, ends: str, control: bool) -> Condition:
    return _exiting(ground, seed, EarlyExit(check, ends), control)


def probed(name: str, threshold: float = exit_probe.THRESHOLD, *, ends: str = LINE, control: bool = False) -> Spec:
    """Return a condition that stops thinking where a probe on the last hidden state expects a right answer (arXiv 2504.05419).

    Args:
        name: Unique name of the condition.
        threshold: Probability above which thinking stops.
        ends: Text with which a step ends.
        control: True for a random control, as in ``answered``.
    """
    about = {"threshold": threshold, "ends": ends, "control": control}
    note = f"{f'random exits, {COUNTED} by ' if control else 'exits where '}a probe {'' if control else 'is '}over {threshold:g}"
    return spec_of(name, _family(control, "decode"), _probed, about, seeded=control, paper="2504.05419", note=note)


def _probed(ground: Ground, seed: int, *, threshold: float, ends: str, control: bool) -> Condition:
    def make():
        problems, first, _ = _halves(ground)
        # The check is not called: any will do.
        found = exit_probe.chunks(ground.lm, EarlyExit(RandomExit((0.0,), 0), ends), first, problems)
        return exit_probe.fit(ground.lm, found)

    probe = _once(ground, f"probe {ends!r}", make)
    return _exiting(ground, seed, EarlyExit(replace(probe, threshold=threshold), ends), control)


def _exiting(ground: Ground, seed: int, rule: EarlyExit, control: bool) -> Condition:
    """Return the condition with a rule, or with its random control, whose exits are counted on the second half of the responses."""
    if control:
        shares = _once(ground, f"rates {rule}", lambda: rates(ground.lm, rule, _halves(ground)[2]))
        rule = replace(rule, check=RandomExit(shares, seed))
    return Condition(ground.lm, rules=(rule,))


def closed(name: str, budget: int, *, ends: str = LINE) -> Spec:
    """Return the random control of a budget of think tokens: thinking is closed at random ends of steps, in as many responses as the budget closes.

    Args:
        name: Unique name of the condition.
        budget: Number of think tokens of the budget for which this is the control.
        ends: Text with which a step ends.
    """
    about = {"budget": budget, "ends": ends}
    note = f"random exits, {COUNTED} by {Budget(budget)}"
    return spec_of(name, "control", _closed, about, seeded=True, paper="2501.19393", note=note)


def _closed(ground: Ground, seed: int, *, budget: int, ends: str) -> Condition:
    def make() -> tuple[float, ...]:
        # Chance of an exit per candidate, the same at each, so that as many responses are closed as have more tokens than the budget.
        rule = EarlyExit(RandomExit((0.0,), 0), ends)
        counts = [sum(1 for _ in candidates(ground.lm, rule, r)) for r in ground.sample()]
        wanted = sum(r.think_tokens > budget for r in ground.sample())
        low, high = 0.0, 1.0
        for _ in range(40):
            rate = (low + high) / 2
            low, high = (rate, high) if sum(1 - (1 - rate) ** n for n in counts) < wanted else (low, rate)
        return (low,)

    return Condition(ground.lm, rules=(EarlyExit(RandomExit(_once(ground, f"closed {budget} {ends!r}", make), seed), ends),))
