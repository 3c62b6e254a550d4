"""Conditions of the board as values: a name, a family, and a function that makes the condition from the ground and a seed.

Your own list is a Python file that defines ``CONDITIONS``; copy ``default.py`` beside this file, or write::

    from toolkit.board import Spec, default, trained
    from toolkit.grpo import recipes

    mine = Spec("half of head 3.1", "edit", lambda ground, seed: Condition(edits.apply(ground.lm, my_plan(ground.lm))))
    CONDITIONS = [*default.CONDITIONS, mine, trained("my price", recipes.plain("length_penalty", alpha=0.2))]

``toolkit board --conditions FILE`` executes the file, measures its new conditions and reads the other results back. The file may also set
the sizes: ``SIZES = Sizes(main=(("gsm8k", 200),), ...)``.

Results are saved under a key. For a condition with your own function, such as ``mine``, the key covers the code of the function with all
values, globals and functions it uses, and the condition that it makes (its model's fingerprint, its interventions). So the function is
also called to read a result back, and a model that was retrained at the same path is measured again. ``identity={...}`` replaces all of
that; use it if the function is slow, or if its values do not determine what it does. It must then hold everything that the numbers
depend on, such as a model's fingerprint.
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
from toolkit.board.ground import DIRECTIONS, Ground, Sizes
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
Make = Callable[[Ground, int], Condition]
"""Makes a condition from the ground and a seed (0 if nothing is random)."""


@dataclass(frozen=True)
class Spec:
    """One condition of the board.

    Attributes:
        name: Unique name.
        family: One of ``FAMILIES``; sets the colour.
        make: ``make(ground, seed) -> Condition``.
        seeded: True if it is random or trained, so that several seeds are measured.
        paper: arXiv id, or "".
        note: Description in one line.
        identity: Everything that the made condition depends on, for the key of its results. Default: derived from ``make`` and from the
            condition it makes.
        recipe: Recipe of a trained policy, or ``None``.
        reward: Reward object that replaces the recipe's, or ``None``.
        steps: Function of the ground that returns the number of training steps, for the cost table.
        through: Function that returns further modules that results depend on, as ``store.modules_of`` does.
    """

    name: str
    family: str
    make: Make
    seeded: bool = False
    paper: str = ""
    note: str = ""
    identity: Mapping[str, Any] = field(default_factory=dict)
    recipe: Recipe | None = None
    reward: Any = None
    steps: Callable[[Ground], int] = field(default=lambda ground: 0)
    through: Callable[[], Mapping[str, str]] = dict

    def __post_init__(self) -> None:
        if self.family not in FAMILIES:
            raise ValueError(f"{self.name!r}: unknown family {self.family!r}: choose one of {', '.join(FAMILIES)}.")

    @property
    def varies(self) -> bool:
        """True if another seed could give another result. A model that was trained elsewhere counts as one seed of many."""
        return self.seeded or self.family in ("trained", "combined", "control")

    @cached_property
    def known(self) -> Identity:
        """Identity of the condition without the ground; computed once, before ``make`` can change values that it reads.

        Raises:
            identity.UnknownIdentityError: the identity cannot be computed; says what to do.
        """
        try:
            known = identity.of(dict(self.identity) if self.identity else self.make)
        except identity.UnknownIdentityError as error:
            raise identity.UnknownIdentityError(f"Condition {self.name[:60]!r}: {error}") from error
        return Identity(known.body, known.modules | identity.of(self.make, strict=False).modules)

    def basis(self, ground: Ground, seed: int, *, made: Condition | None = None) -> store.Basis:
        """Return everything that the result depends on, code included; excludes the name.

        Args:
            made: The condition, if it was made already. Without it, a spec without ``identity`` makes the condition here.
        """
        about, condition = self.known, Identity(None, frozenset())
        if not self.identity:
            condition = identity.of(made or self.make(ground, seed))
        depends = {"condition": about.body, "made": condition.body, "seed": seed, **ground.identity}
        modules = store.modules_of(*(about.modules | condition.modules))
        return store.Basis(depends, {**ground.modules, **modules, **self.through()})

    def key(self, ground: Ground, seed: int) -> str:
        """Return the cache key of the result: see ``basis``."""
        return self.basis(ground, seed).key


def _spec(name: str, family: str, make: Callable[..., Condition], about: Mapping[str, Any], **more: Any) -> Spec:
    """Return a spec whose identity is the name of the maker and its arguments."""
    return Spec(name, family, partial(make, **about), identity={"maker": make.__name__, **about}, **more)


def read_conditions(path: str | Path) -> tuple[list[Spec], Sizes | None]:
    """Execute a Python file; return its ``CONDITIONS``, and its ``SIZES`` or ``None``.

    Raises:
        ValueError: the file is not Python or defines no conditions, an entry of the list is not a ``Spec``, or ``SIZES`` is not a
            ``Sizes``.
    """
    try:
        defined = runpy.run_path(str(store.existing_file(path)))
    except SyntaxError as error:
        raise ValueError(
            f"{path}, line {error.lineno}: not Python: {error.msg}. Copy toolkit/board/default.py and change the copy."
        ) from error
    specs, sizes = defined.get("CONDITIONS"), defined.get("SIZES")
    if not isinstance(specs, list | tuple):
        raise ValueError(f"{path} defines no CONDITIONS: add a list of conditions (see toolkit/board/default.py).")
    if wrong := [value for value in specs if not isinstance(value, Spec)]:
        raise ValueError(f"{path}: {wrong[0]!r} in CONDITIONS is not a board.Spec.")
    if not isinstance(sizes, Sizes | None):
        raise ValueError(f"{path}: SIZES is {sizes!r}, not a board.Sizes.")
    return list(specs), sizes


def select_conditions(specs: Sequence[Spec], pattern: str | None = None) -> list[Spec]:
    """Return the conditions to measure: base first, then those whose names match ``pattern``.

    >>> from toolkit.board import default
    >>> [spec.name for spec in select_conditions(default.CONDITIONS, "DLER*")]
    ['base', 'DLER', 'DLER, merged']

    Args:
        pattern: Patterns as for file names, separated by commas, such as ``"GRPO*,steered*"``; ``None`` selects all.

    Raises:
        ValueError: there is no base, two conditions have the same name or the same key, or no name matches; lists the names.
        identity.UnknownIdentityError: the identity of a condition cannot be computed; says what to do.
    """
    names = [spec.name for spec in specs]
    if len(set(names)) < len(names):
        raise ValueError(f"Two conditions are called {next(n for n in names if names.count(n) > 1)!r}: names must be unique.")
    if BASE not in names:
        raise ValueError(f"No condition is called {BASE!r}: add board.base(), to which differences are taken.")
    check_distinct({spec.name: store.key(spec.known.body) for spec in specs})
    patterns = [part.strip() for part in (pattern or "*").split(",")]
    chosen = [spec for spec in specs if any(fnmatch(spec.name, part) for part in patterns)]
    if not chosen:
        raise ValueError(f"No condition matches {pattern!r}: choose from {', '.join(names)}.")
    base = next(spec for spec in specs if spec.name == BASE)
    return [base, *(spec for spec in chosen if spec.name != BASE)]


def check_distinct(keys: Mapping[str, str]) -> None:
    """Raise ValueError if two conditions have the same key, since they would share one result."""
    first: dict[str, str] = {}
    for name, key in keys.items():
        other = first.setdefault(key, name)
        if other != name:
            raise ValueError(
                f"{other[:60]!r} and {name[:60]!r} are one condition: their keys are equal, so both would show the same result. Leave one out, "
                "or give each a different identity={...} (dataclasses.replace(condition, identity={...}))."
            )


# --- makers ------------------------------------------------------------------------------------------------------


def base() -> Spec:
    """Return a condition: the unchanged base model, to which all differences are taken."""
    return _spec(BASE, "base", _base, {}, note="as it is")


def _base(ground: Ground, seed: int) -> Condition:
    return Condition(ground.lm)


def edited(
    name: str, strength: float = 1.0, form: str = OURS, *, fraction: float | None = None, control: str = "", adapter: bool = False
) -> Spec:
    """Return a condition: ThinkEdit's edit (arXiv 2503.22048), a direction projected out of the heads that write short thinking.

    Args:
        strength: lambda; 1 removes the component, 2 reverses it.
        form: Key in ``jobs.FORMS``.
        fraction: Share of heads; ``None`` means that of the board's sizes.
        control: ``"heads"``: equally many random heads of the same layers. ``"direction"``: the same heads, and a random direction that
            they can write. ``""``: no control.
        adapter: True to write the edit as a rank-1 PEFT adapter and merge it with peft, instead of editing the weights.
    """
    about = {"strength": strength, "form": form, "fraction": fraction, "control": control, "adapter": adapter}
    controls = {"heads": "random heads of the same layers", "direction": "the same heads, a random direction they can write"}
    note = controls.get(control, "rank-1 PEFT adapter, merged" if adapter else "written into the weights")
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
    """Return a condition: the base model steered along a length direction, + longer.

    Args:
        direction: ``"thinkedit"`` (the direction that the edited heads write; strength 1 is the difference between long and short
            thinking) or ``"efficiency"`` (Efficiency Steering, arXiv 2506.15647).
        layers: Layers to steer, negative numbers from the end; ``None`` means all.
        during: Phase, such as ``"think"``.
        control: True to steer along a random direction of equal norm instead.
    """
    about = {"strength": strength, "direction": direction, "layers": layers, "during": during, "control": control}
    if direction not in DIRECTIONS:
        raise ValueError(f"{name!r}: unknown direction {direction!r}: choose one of {', '.join(DIRECTIONS)}.")
    paper = DIRECTIONS[direction]
    where = "all layers" if layers is None else f"layers {', '.join(map(str, layers))}"
    note = f"{'a random direction of the norm of ' if control else ''}{direction}'s, {strength:+g}, {where}, {during}"
    return _spec(name, "control" if control else "steer", _steered, about, seeded=control, paper=paper, note=note)


def _steered(
    ground: Ground, seed: int, *, strength: float, direction: str, layers: tuple[int, ...] | None, during: str, control: bool
) -> Condition:
    v = ground.direction(direction)
    v = random_like(v, seed=seed) if control else v
    chosen = None if layers is None else [layer % ground.lm.layout.n_layers for layer in layers]
    return Condition(ground.lm, (steering(v, strength, layers=chosen, during=during),))


def masked(name: str, count: int, *, control: bool = False) -> Spec:
    """Return a condition: the base model with its top retrieval heads masked (arXiv 2404.15574): uniform attention while decoding.

    Heads are ranked by what they write towards the retrieved token (ours).

    Args:
        count: Number of heads.
        control: True to mask equally many random heads of the same layers instead.
    """
    note = f"{count} {'random heads of the same layers' if control else 'retrieval heads'}, uniform attention in decode"
    about = {"count": count, "control": control}
    return _spec(name, "control" if control else "mask", _masked, about, seeded=control, paper="2404.15574", note=note)


def _masked(ground: Ground, seed: int, *, count: int, control: bool) -> Condition:
    plan = retrieval_heads.mask_plan(ground.measure_retrieval().scores["write (ours)"], count)
    plan = edits.random_heads(plan, ground.lm.layout, seed=seed) if control else plan
    return Condition(ground.lm, (masks.masking(plan, "uniform", during="newest"),))


def with_rule(name: str, rule: Rule, paper: str = "") -> Spec:
    """Return a condition: the base model with a decoding rule that replaces sampled tokens, such as ``baselines.Budget(20)``."""
    return _spec(name, "decode", _with_rule, {"rule": rule}, paper=paper, note=identity.describe(rule))


def _with_rule(ground: Ground, seed: int, *, rule: Rule) -> Condition:
    return Condition(ground.lm, rules=(rule,))


def with_intervention(name: str, act: Intervention, family: str = "decode", paper: str = "") -> Spec:
    """Return a condition: the base model with an intervention that needs nothing from the ground, such as ``baselines.Suppress(("w",))``."""
    return _spec(name, family, _with_intervention, {"act": act}, paper=paper, note=identity.describe(act))


def _with_intervention(ground: Ground, seed: int, *, act: Intervention) -> Condition:
    return Condition(ground.lm, (act,))


def prompted(name: str, ask: Ask, paper: str = "") -> Spec:
    """Return a condition: the base model with a change of the prompt, such as ``baselines.Instruction("quick")``."""
    return _spec(name, "prompt", _prompted, {"ask": ask}, paper=paper, note=identity.describe(ask))


def _prompted(ground: Ground, seed: int, *, ask: Ask) -> Condition:
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
    """Return a condition: a policy trained with GRPO, alone or combined with an edit before training or steering after it.

    Args:
        recipe: Recipe with its paper's numbers; the ground's training plan scales it.
        reward: Reward object to use instead of the recipe's; its class and fields are part of the key.
        merged: True to merge only the largest changes of training into the base model (DLER's update-selective merging, arXiv 2510.15110).
        edit: Strength of ThinkEdit's edit (ours) before training; 0 for none.
        steer: Strength of steering along ThinkEdit's direction while thinking, after training; 0 for none.
        note: Replaces the generated description.

    Raises:
        identity.UnknownIdentityError: the reward holds something whose identity cannot be computed, such as a lock or an open file.
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
        recipe=recipe,
        reward=reward,
        steps=lambda ground: ground.sizes.training.steps,
        through=lambda: code.modules(recipe, reward=reward),
    )


def _check_known(name: str, reward: Any) -> None:
    """Raise UnknownIdentityError if the reward's identity cannot be computed: the policy's folder needs it, whatever the condition's identity."""
    try:
        identity.of(reward)
    except identity.UnknownIdentityError as error:
        raise identity.UnknownIdentityError(
            f"Condition {name[:60]!r}: its reward's identity cannot be computed ({str(error).partition(': its values')[0][:150]}). Give the "
            "reward's class a __getstate__ that leaves this part out and returns everything that the reward depends on."
        ) from error


def _trained(ground: Ground, seed: int, *, recipe: Recipe, reward: Any, merged: bool, edit: float, steer: float) -> Condition:
    start = edits.apply(ground.lm, ground.plan(edit)) if edit else None
    policy = ground.train(recipe, seed, start=start, reward=reward).lm
    # In the base's number type, so that the paired difference does not include a difference of number types.
    dtype = ground.lm.model.dtype
    lm = merging.selective_merge(ground.lm, policy, dtype=dtype) if merged else merging.in_type_of(start or ground.lm, policy)
    acts = (steering(ground.direction("thinkedit"), steer, during="think"),) if steer else ()
    # A policy that was trained with a budget in the prompt is evaluated with the last budget of its training.
    curriculum = ground.sizes.training.sized(recipe).curriculum
    return Condition(lm, acts, ask=curriculum.ask(ground.sizes.training.steps - 1) if curriculum else None)
