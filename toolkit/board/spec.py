"""Conditions of the board as values: what each is called and how it is made from the common ground.

A list of one's own is a Python file that defines ``CONDITIONS``; ``default.py`` beside this file is one to copy. In five lines::

    from toolkit.board import Spec, default, trained
    from toolkit.grpo import recipes

    mine = Spec("half of head 3.1", "edit", lambda ground, seed: Condition(edits.apply(ground.lm, my_plan(ground.lm))))
    CONDITIONS = [*default.CONDITIONS, mine, trained("my price", recipes.plain("length_penalty", alpha=0.2))]

``toolkit board --conditions FILE`` executes the file, measures what is new in it and reads the rest back. The file may also say how much
is measured: ``SIZES = Sizes(main=(("gsm8k", 200),), ...)``.

Results are kept under a key. For a condition written by hand, such as ``mine``, the key holds the code of its function with every
value, global and function that this uses, and the condition that the function makes: its model's fingerprint, its interventions. So
the function is called also to read a result back: a model that was retrained at the same path is measured again. ``identity={...}``
replaces all that, for a function whose values do not say what it does, or that takes too long to call: it must then hold everything
the numbers depend on, such as a model's fingerprint.
"""

from __future__ import annotations

import copy
import runpy
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, field
from fnmatch import fnmatch
from functools import cached_property, partial
from pathlib import Path
from typing import Any

from toolkit import edits, identity, masks, merging, shipped, store, vectors
from toolkit import lm as lms
from toolkit.board.ground import Ground, Sizes
from toolkit.directions import random_like
from toolkit.edits import steering
from toolkit.grpo import code
from toolkit.grpo.recipes import Recipe
from toolkit.identity import Identity
from toolkit.jobs.edit import OURS
from toolkit.lm import LM, Ask, Condition, Intervention, Rule
from toolkit.methods import retrieval_heads

FAMILIES = ("base", "edit", "steer", "mask", "decode", "prompt", "trained", "combined", "control")
BASE = "base"
PAPERS = {"thinkedit": "2503.22048", "efficiency": "2506.15647"}  # directions that the ground has
Make = Callable[[Ground, int], Condition]
"""Makes a condition from the common ground and a seed (0 where nothing is random)."""


@dataclass(frozen=True)
class Spec:
    """One condition of the board.

    Attributes:
        name: What it is called; unique.
        family: One of ``FAMILIES``: its colour.
        make: ``make(ground, seed) -> Condition``.
        seeded: Whether it is random or trained, so that several seeds are measured.
        paper: arXiv id, or "".
        note: One line on what it is.
        identity: Everything that what ``make`` makes depends on; results are kept under it. Default: found in ``make`` and in what it makes.
        steps: Training steps behind it: a function of the ground, for the cost table.
        through: Code that results pass through beside what ``make`` names, as of ``store.modules_of``.
    """

    name: str
    family: str
    make: Make
    seeded: bool = False
    paper: str = ""
    note: str = ""
    identity: Mapping[str, Any] = field(default_factory=dict)
    steps: Callable[[Ground], int] = field(default=lambda ground: 0)
    through: Callable[[], Mapping[str, str]] = dict

    def __post_init__(self) -> None:
        if self.family not in FAMILIES:
            raise ValueError(f"{self.name!r}: unknown family {self.family!r}, choose one of {', '.join(FAMILIES)}.")

    @property
    def varies(self) -> bool:
        """Whether another seed could give another result, so that what was measured is one seed of many. A model that was trained
        somewhere else is one seed, even if no other can be measured here."""
        return self.seeded or self.family in ("trained", "combined", "control")

    @cached_property
    def known(self) -> Identity:
        """What it is as far as that is known without the ground: found once, before ``make`` can change what it reads.

        Raises:
            identity.UnknownIdentityError: that cannot be known; says what to do.
        """
        try:
            found = identity.of(dict(self.identity) if self.identity else self.make)
        except identity.UnknownIdentityError as error:
            raise identity.UnknownIdentityError(f"Condition {self.name[:60]!r}: {error}") from error
        return Identity(found.body, found.modules | identity.of(self.make, strict=False).modules)

    def basis(self, ground: Ground, seed: int, *, made: Condition | None = None) -> store.Basis:
        """What its result depends on, the name not among it, and the code it passes through.

        Args:
            made: The condition, if it was made already; one without ``identity`` is made here otherwise.
        """
        about, found = self.known, Identity(None, frozenset())
        if not self.identity:
            found = identity.of(made or self.make(ground, seed))
        depends = {"condition": about.body, "made": found.body, "seed": seed, **ground.identity}
        return store.Basis(depends, {**ground.modules, **store.modules_of(*(about.modules | found.modules)), **self.through()})

    def key(self, ground: Ground, seed: int) -> str:
        """Key of everything its result depends on: see :meth:`basis`."""
        return self.basis(ground, seed).key


def _spec(name: str, family: str, make: Callable[..., Condition], about: Mapping[str, Any], **more: Any) -> Spec:
    """A spec whose identity is the maker and its arguments."""
    return Spec(name, family, partial(make, **about), identity={"maker": make.__name__, **about}, **more)


def read(path: str | Path) -> tuple[list[Spec], Sizes | None]:
    """The ``CONDITIONS`` of a Python file, and its ``SIZES`` if it says how much is to be measured.

    Raises:
        ValueError: the file is not Python or defines no conditions, something in the list is not a :class:`Spec`, or ``SIZES`` is no :class:`Sizes`.
    """
    try:
        defined = runpy.run_path(str(store.existing_file(path)))
    except SyntaxError as error:
        raise ValueError(
            f"{path}, line {error.lineno}: not Python: {error.msg}. Copy toolkit/board/default.py and change that."
        ) from error
    found, sizes = defined.get("CONDITIONS"), defined.get("SIZES")
    if not isinstance(found, list | tuple):
        raise ValueError(f"{path} defines no CONDITIONS: a list of conditions (see toolkit/board/default.py).")
    if wrong := [value for value in found if not isinstance(value, Spec)]:
        raise ValueError(f"{path}: {wrong[0]!r} in CONDITIONS is not a board.Spec.")
    if not isinstance(sizes, Sizes | None):
        raise ValueError(f"{path}: SIZES is {sizes!r}, not a board.Sizes.")
    return list(found), sizes


def checked(specs: Sequence[Spec], pattern: str | None = None) -> list[Spec]:
    """The conditions to measure: base first, then those whose name matches ``pattern`` (as file names do; commas between several).

    Raises:
        ValueError: no base, a name twice, one condition under two names, or a pattern that nothing matches; lists the names.
        identity.UnknownIdentityError: what a condition is cannot be known; says what to do.
    """
    names = [spec.name for spec in specs]
    if len(set(names)) < len(names):
        raise ValueError(f"Two conditions are called {next(n for n in names if names.count(n) > 1)!r}: names must be unique.")
    if BASE not in names:
        raise ValueError(f"No condition is called {BASE!r}: differences are taken to it.")
    check_distinct({spec.name: store.key(spec.known.body) for spec in specs})
    wanted = [part.strip() for part in (pattern or "*").split(",")]
    kept = [spec for spec in specs if any(fnmatch(spec.name, part) for part in wanted)]
    if not kept:
        raise ValueError(f"No condition matches {pattern!r}: there are {', '.join(names)}.")
    base = next(spec for spec in specs if spec.name == BASE)
    return [base, *(spec for spec in kept if spec.name != BASE)]


def check_distinct(keys: Mapping[str, str]) -> None:
    """Raises ValueError where two conditions have one key: the board could not tell their results apart."""
    seen: dict[str, str] = {}
    for name, key in keys.items():
        other = seen.setdefault(key, name)
        if other != name:
            raise ValueError(
                f"{other[:60]!r} and {name[:60]!r} are one condition (equal keys), so that both would show the same result. Leave one out, or give "
                "each an identity={...} that tells them apart (dataclasses.replace(condition, identity={...}))."
            )


# --- makers ------------------------------------------------------------------------------------------------------


def base() -> Spec:
    """The model as it is."""
    return _spec(BASE, "base", _base, {}, note="as it is")


def _base(ground: Ground, seed: int) -> Condition:
    return Condition(ground.lm)


def edited(
    name: str, strength: float = 1.0, form: str = OURS, *, fraction: float | None = None, control: str = "", adapter: bool = False
) -> Spec:
    """ThinkEdit (arXiv 2503.22048): a direction projected out of the heads that write towards short thinking, in the weights.

    Args:
        strength: lambda; 1 removes the component, 2 mirrors it.
        fraction: Share of heads; default: that of the board's sizes.
        control: ``"heads"``: as many random heads of the same layers; ``"direction"``: the same heads, a random direction they can write.
        adapter: Written as a rank-1 PEFT adapter and merged by peft, instead of into the weights.
    """
    about = {"strength": strength, "form": form, "fraction": fraction, "control": control, "adapter": adapter}
    what = {"heads": "random heads of the same layers", "direction": "the same heads, a random direction they can write"}
    note = what.get(control, "rank-1 PEFT adapter, merged" if adapter else "written into the weights")
    family = "control" if control else "edit"
    share = "" if fraction is None else f", {100 * fraction:g} % of heads"
    note = f"{form}, strength {strength:g}{share}: {note}"
    return _spec(name, family, _edited, about, seeded=bool(control), paper="2503.22048", note=note)


def _edited(
    ground: Ground, seed: int, *, strength: float, form: str, fraction: float | None, control: str, adapter: bool
) -> Condition:
    plan = ground.plan(strength, form, fraction)
    if control == "heads":
        plan = edits.random_heads(plan, ground.lm.layout, seed=seed)
    elif control == "direction":
        plan = edits.with_direction(plan, edits.random_written(plan, ground.lm.layout, seed=seed))
    return Condition(_adapted(ground, plan) if adapter else edits.apply(ground.lm, plan))


def _adapted(ground: Ground, plan: Any) -> LM:
    code = store.modules_of("toolkit.vectors.weights")
    folder = ground.out / "adapters" / store.Basis([ground.lm.fingerprint, identity.of(plan).body], code).key
    with store.locked(folder, wait=True):
        if not store.is_whole(folder):
            vectors.save_adapter(ground.lm, plan, folder)
    model = shipped.merge(copy.deepcopy(ground.lm.model), folder, ground.lm.model.dtype)
    return lms.child(ground.lm, model, f"{ground.lm.name} + adapter of {plan.name}", made_from=edits.plan_origins(plan))


def steered(
    name: str,
    strength: float,
    direction: str = "thinkedit",
    *,
    layers: tuple[int, ...] | None = None,
    during: str = "all",
    control: bool = False,
) -> Spec:
    """Steering along a length direction of the ground, + longer.

    Args:
        direction: ``"thinkedit"`` (what the edited heads write; strength 1 is the difference between long and short thinking) or
            ``"efficiency"`` (Efficiency Steering, arXiv 2506.15647).
        layers: Layers to act at, negative ones from the end; ``None``: all.
        during: Phase, such as ``"think"``.
        control: A random direction of equal norm instead.
    """
    about = {"strength": strength, "direction": direction, "layers": layers, "during": during, "control": control}
    if direction not in PAPERS:
        raise ValueError(f"{name!r}: unknown direction {direction!r}, choose one of {', '.join(PAPERS)}.")
    paper = PAPERS[direction]
    where = "all layers" if layers is None else f"layers {', '.join(map(str, layers))}"
    what = f"{'a random direction of the norm of ' if control else ''}{direction}'s, {strength:+g}, {where}, {during}"
    return _spec(name, "control" if control else "steer", _steered, about, seeded=control, paper=paper, note=what)


def _steered(
    ground: Ground, seed: int, *, strength: float, direction: str, layers: tuple[int, ...] | None, during: str, control: bool
) -> Condition:
    return Condition(ground.lm, (_steering(ground, seed, strength, direction, layers, during, control),))


def _steering(
    ground: Ground, seed: int, strength: float, direction: str, layers: tuple[int, ...] | None, during: str, control: bool = False
) -> Intervention:
    v = ground.thinkedit if direction == "thinkedit" else ground.efficiency
    v = random_like(v, seed=seed) if control else v
    chosen = None if layers is None else [layer % ground.lm.layout.n_layers for layer in layers]
    return steering(v, strength, layers=chosen, during=during)


def masked(name: str, count: int, *, control: bool = False) -> Spec:
    """Retrieval heads (arXiv 2404.15574) masked in decode (uniform attention), ranked by what they write towards the token (ours).

    Args:
        control: As many random heads of the same layers instead.
    """
    note = f"{count} {'random heads of the same layers' if control else 'retrieval heads'}, uniform attention in decode"
    about = {"count": count, "control": control}
    return _spec(name, "control" if control else "mask", _masked, about, seeded=control, paper="2404.15574", note=note)


def _masked(ground: Ground, seed: int, *, count: int, control: bool) -> Condition:
    plan = retrieval_heads.mask_plan(ground.retrieval.scores["write (ours)"], count)
    plan = edits.random_heads(plan, ground.lm.layout, seed=seed) if control else plan
    return Condition(ground.lm, (masks.masking(plan, "uniform", during="newest"),))


def ruled(name: str, rule: Rule, paper: str = "") -> Spec:
    """A rule that replaces drawn tokens, such as ``baselines.Budget(20)``."""
    return _spec(name, "decode", _ruled, {"rule": rule}, paper=paper, note=identity.describe(rule))


def _ruled(ground: Ground, seed: int, *, rule: Rule) -> Condition:
    return Condition(ground.lm, rules=(rule,))


def during(name: str, act: Intervention, family: str = "decode", paper: str = "") -> Spec:
    """An intervention that needs nothing from the ground, such as ``baselines.Suppress(("w",))``."""
    return _spec(name, family, _during, {"act": act}, paper=paper, note=identity.describe(act))


def _during(ground: Ground, seed: int, *, act: Intervention) -> Condition:
    return Condition(ground.lm, (act,))


def asked(name: str, ask: Ask, paper: str = "") -> Spec:
    """A change of the prompt, such as ``baselines.Instruction("quick")``."""
    return _spec(name, "prompt", _asked, {"ask": ask}, paper=paper, note=identity.describe(ask))


def _asked(ground: Ground, seed: int, *, ask: Ask) -> Condition:
    return Condition(ground.lm, ask=ask)


def trained(
    name: str,
    recipe: Recipe,
    *,
    reward: Any = None,
    merged: bool = False,
    edit: float = 0.0,
    steer: float = 0.0,
    note: str = "",
) -> Spec:
    """A policy trained with GRPO; alone, or combined with an edit before or steering after.

    Args:
        recipe: With its paper's numbers; the ground sizes it.
        reward: A reward object of one's own instead of the recipe's; its class and fields are part of the key.

    Raises:
        identity.UnknownIdentityError: the reward holds something (a lock, an open file) that is not known by its values.
        merged: Update-selective merging of what training changed (DLER, arXiv 2510.15110).
        edit: Strength of ThinkEdit's edit (ours) of the model that is trained; 0: none.
        steer: Strength of steering along ThinkEdit's direction while thinking, after training; 0: none.
    """
    if reward is not None:
        _check_known(name, reward)
    about = {"recipe": recipe, "reward": reward, "merged": merged, "edit": edit, "steer": steer}
    how = [f"{recipe.name}, arXiv {recipe.paper}" if recipe.paper else recipe.name]
    how += ["the largest 25 % of its changes, x 0.7"] * merged + [f"of the edited model (strength {edit:g})"] * bool(edit)
    how += [f"then steered by {steer:+g}"] * bool(steer)
    return _spec(
        name,
        "combined" if merged or edit or steer else "trained",
        _trained,
        about,
        seeded=True,
        paper=recipe.paper,
        note=note or ", ".join(how),
        steps=lambda ground: ground.sizes.training.steps,
        through=lambda: code.modules(recipe, reward=reward),
    )


def _check_known(name: str, reward: Any) -> None:
    """A policy is kept under what its reward is, which an identity of the condition does not replace."""
    try:
        identity.of(reward)
    except identity.UnknownIdentityError as error:
        raise identity.UnknownIdentityError(
            f"Condition {name[:60]!r}: its reward cannot be known by its values ({str(error).partition(': its values')[0][:150]}). Give the "
            "reward's class a __getstate__ that leaves this out and returns all that the reward pays by."
        ) from error


def _trained(ground: Ground, seed: int, *, recipe: Recipe, reward: Any, merged: bool, edit: float, steer: float) -> Condition:
    from toolkit.jobs.grpo import beside

    start = edits.apply(ground.lm, ground.plan(edit)) if edit else None
    policy = ground.policy(recipe, seed, start=start, reward=reward).lm
    # In the base's number type: else the paired difference would hold that of the types.
    dtype = ground.lm.model.dtype
    lm = merging.selective_merge(ground.lm, policy, dtype=dtype) if merged else beside(start or ground.lm, policy)
    acts = (_steering(ground, seed, steer, "thinkedit", None, "think"),) if steer else ()
    # A policy that learned to meet a budget in its prompt is judged with the last budget it saw.
    curriculum = (recipe.scaled() if ground.sizes.training.tiny else recipe).curriculum
    return Condition(lm, acts, ask=curriculum.ask(ground.sizes.training.steps - 1) if curriculum else None)
