"""Descriptions of the conditions of a board. Each is a ``Spec``: a name, a family, and a function that returns the condition.

The arguments of the function are a ``Ground`` (the base model, the sizes, and methods that compute, for example, a direction of thinking
length) and a seed. The result is a ``Condition``: a model together with its interventions.

To list your own conditions, write a Python file that defines ``CONDITIONS``. Copy ``toolkit/board/default.py``, or write a file such as the
following. ``my_plan`` stands for your own function, which returns the ``Plan`` of a weight edit::

    from toolkit import edits
    from toolkit.board import Spec, default, trained
    from toolkit.grpo import recipes
    from toolkit.lm import Condition

    mine = Spec("my edit", "edit", lambda ground, seed: Condition(edits.apply(ground.lm, my_plan(ground.lm))))
    CONDITIONS = [*default.CONDITIONS, mine, trained("mild penalty", recipes.plain("length_penalty", alpha=0.2))]

``toolkit board --conditions FILE`` executes the file, measures conditions without a saved result, and loads the other results. The file
may also set the sizes: ``SIZES = Sizes(main=(("gsm8k", 200),), ...)``.

Results are saved under a cache key. For a condition with your own function, such as ``mine``, the key is computed from

* the code of the function, with all values, globals and functions that it uses;
* the condition that the function returns: the fingerprint of the model, and the interventions.

The second part is needed because a model may be retrained and saved at the same path: it then has another fingerprint, and is measured
again. So the function is called to compute the key, even if the result is only loaded.

If you pass ``identity={...}`` to ``Spec``, the key is computed from this mapping, and the function is not called. Pass a mapping if the
function is slow, or if the condition depends on something outside the function's code and values, such as the content of a file. The
mapping must hold everything that the measured numbers depend on, such as the fingerprint of a model.
"""

from __future__ import annotations

import copy
import runpy
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, field, replace
from fnmatch import fnmatchcase
from functools import cached_property, partial
from pathlib import Path
from types import MappingProxyType
from typing import Any

from toolkit import edits, identity, masks, merging, shipped, store, vectors
from toolkit import lm as lms
from toolkit.board.ground import DIRECTIONS, Ground, Sizes
from toolkit.directions import random_like
from toolkit.edits import steering
from toolkit.grpo import code
from toolkit.grpo.plan import TrainingPlan
from toolkit.grpo.recipes import Recipe
from toolkit.identity import Identity
from toolkit.jobs.controls import random_groups, random_heads
from toolkit.jobs.finding import OURS
from toolkit.lm import LM, Condition, Intervention, Rule
from toolkit.methods import retrieval_heads
from toolkit.types import Ask

FAMILIES = ("base", "edit", "steer", "mask", "decode", "prompt", "trained", "combined", "control")
PARTS: Mapping[str, str] = MappingProxyType({
    "vector": "one vector per layer is trained",
    "heads": "W_O of the heads that ThinkEdit (ours) edits is trained",
    "random heads": "W_O of as many random heads of the same layers is trained",
})  # fmt: skip
"""Part of the model that a single policy of a board may train -> what is trained, in words."""
BASE = "base"
Make = Callable[[Ground, int], Condition]
"""Function ``(ground, seed) -> condition``. The seed is 0 if nothing in the condition is random."""


@dataclass(frozen=True)
class Spec:
    """Description of one condition of the board, with the function that returns the condition.

    Attributes:
        name: Unique name.
        family: One of ``FAMILIES``; sets colour and symbol in figures.
        make: Function ``(ground, seed) -> Condition``.
        seeded: True to measure several seeds, because the condition is random or trained.
        paper: arXiv id of the method's paper, or "".
        note: Description in one line, for the web page.
        identity: Values that determine the condition, for the cache key of its results. If empty, the key is computed from ``make`` and
            from the condition that ``make`` returns.
        recipe: Reward and hyperparameters of a policy that the board trains; ``None`` for a condition that the board does not train.
        reward: Reward object that replaces the reward of ``recipe``; ``None`` keeps the recipe's.
        plan: Function ``(ground, seed) -> settings`` with which the board trains the policy.
        steps: Function ``(ground) -> number of training steps``, for the cost table. It returns 0 for a condition without training.
        through: Function without arguments that returns a mapping from module to hash of its code, such as one from ``store.modules_of``.
            It lists the modules on which this condition's results depend, beyond those of every condition: for example the modules that
            train a policy. Their code enters the cache key.
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
    plan: Callable[[Ground, int], TrainingPlan] = field(default=lambda ground, seed: ground.sizes.training)
    steps: Callable[[Ground], int] = field(default=lambda ground: 0)
    through: Callable[[], Mapping[str, str]] = dict

    def __post_init__(self) -> None:
        if self.family not in FAMILIES:
            raise ValueError(f"{self.name!r}: unknown family {self.family!r}: choose one of {', '.join(FAMILIES)}.")

    @property
    def varies(self) -> bool:
        """True if another seed could give another result.

        This includes a trained model that is only loaded (``seeded=False``), since training with another seed gives another model.
        """
        return self.seeded or self.family in ("trained", "combined", "control")

    @cached_property
    def known(self) -> Identity:
        """Part of the cache key that can be computed without calling ``make``: a description, and the toolkit modules that ``make`` uses.

        If the field ``identity`` is set, the description holds its values. Otherwise it holds the code of the function ``make`` and the
        values that this code reads (see the module ``identity``).

        The property is computed only once. A call of ``make`` may change values that ``make`` reads, such as a global list. The cache key
        must not change with them.

        Raises:
            identity.UnknownIdentityError: the description cannot be computed; the message says what to do.
        """
        try:
            known = identity.of(dict(self.identity) if self.identity else self.make)
        except identity.UnknownIdentityError as error:
            raise identity.UnknownIdentityError(f"Condition {self.name[:60]!r}: {error}") from error
        return Identity(known.body, known.modules | identity.of(self.make, strict=False).modules)

    def basis(self, ground: Ground, seed: int, *, made: Condition | None = None) -> store.Basis:
        """Return a record of everything that one result depends on. Its hash is the cache key of the result.

        The record covers the condition, the seed, the base model, the problems, the sizes of the board, and the code. The name of the
        condition is not part of it.

        Args:
            ground: Base model and sizes of the board.
            seed: Random seed of the condition.
            made: The condition that ``make`` returned for this seed, if it was called before. If ``made`` is ``None`` and ``identity`` is
                empty, ``make`` is called here.
        """
        about, condition = self.known, Identity(None, frozenset())
        if not self.identity:
            condition = identity.of(made or self.make(ground, seed))
        depends = {"condition": about.body, "made": condition.body, "seed": seed, **ground.identity}
        modules = store.modules_of(*(about.modules | condition.modules))
        return store.Basis(depends, {**ground.modules, **modules, **self.through()})

    def key(self, ground: Ground, seed: int) -> str:
        """Return the cache key of the result for a seed: a hash of the record that ``basis`` returns."""
        return self.basis(ground, seed).key


def spec_of(name: str, family: str, make: Callable[..., Condition], about: Mapping[str, Any], **more: Any) -> Spec:
    """Return a spec whose function is ``make`` with the keyword arguments ``about`` filled in.

    The spec's ``identity`` is the name of ``make`` and these arguments, so the cache key needs no call of ``make``.

    Args:
        name: Name of the condition.
        family: One of ``FAMILIES``.
        make: Function that returns the condition, with the arguments ``ground``, ``seed`` and those in ``about``.
        about: Keyword arguments of ``make``.
        more: Further fields of ``Spec``, by name.
    """
    return Spec(name, family, partial(make, **about), identity={"maker": make.__name__, **about}, **more)


def read_conditions(path: str | Path) -> tuple[list[Spec], Sizes | None]:
    """Execute a Python file, and return its variables ``CONDITIONS`` and ``SIZES`` (``None`` if it does not set ``SIZES``).

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
    """Return the conditions to measure: base first, then those whose names match a pattern.

    >>> from toolkit.board import default
    >>> [spec.name for spec in select_conditions(default.CONDITIONS, "DLER*")]
    ['base', 'DLER', 'DLER, merged']

    Args:
        pattern: Names, or patterns with ``*`` and ``?`` as for file names, separated by commas, such as ``"GRPO*,steered*"``. A name that
            holds a comma is given as it is, such as ``"base,DLER, merged"``. ``None`` selects all.

    Raises:
        ValueError: there is no base, two conditions have the same name or the same cache key, or no name matches.
        identity.UnknownIdentityError: the cache key of a condition cannot be computed; the message says what to do.
    """
    names = [spec.name for spec in specs]
    if len(set(names)) < len(names):
        raise ValueError(f"Two conditions are called {next(n for n in names if names.count(n) > 1)!r}: names must be unique.")
    if BASE not in names:
        raise ValueError(f"No condition is called {BASE!r}: add board.base(), to which differences are taken.")
    check_distinct({spec.name: store.key(spec.known.body) for spec in specs})
    patterns = _patterns("*" if pattern is None else pattern, names)
    chosen = [spec for spec in specs if any(part == spec.name or fnmatchcase(spec.name, part) for part in patterns)]
    useless = [part for part in patterns if not any(part == name or fnmatchcase(name, part) for name in names)]
    if useless:
        raise ValueError(f"No condition matches {', '.join(map(repr, useless))}: choose from {', '.join(map(repr, names))}.")
    base = next(spec for spec in specs if spec.name == BASE)
    return [base, *(spec for spec in chosen if spec.name != BASE)]


def _patterns(text: str, names: Sequence[str]) -> list[str]:
    """Return the names and patterns in a text, separated by commas. Parts that together are the name of a condition stay together.

    >>> _patterns("DLER, merged,steered*", ["DLER", "DLER, merged"])
    ['DLER, merged', 'steered*']
    """
    parts, patterns = text.split(","), []
    while parts:
        joined = (",".join(parts[:n]).strip() for n in range(len(parts), 0, -1))  # longest first
        chosen = next((name for name in joined if name in names), parts[0].strip())
        del parts[: chosen.count(",") + 1]
        patterns += [chosen] if chosen else []
    return patterns or ["*"]


def check_distinct(keys: Mapping[str, str]) -> None:
    """Raise ValueError if two conditions have the same cache key, since they would share one result.

    Args:
        keys: Name of a condition -> its cache key.
    """
    first: dict[str, str] = {}
    for name, key in keys.items():
        other = first.setdefault(key, name)
        if other != name:
            raise ValueError(
                f"{other[:60]!r} and {name[:60]!r} are one condition: their keys are equal, so both would show the same result. Leave one out, "
                "or give each a different identity={...} (dataclasses.replace(condition, identity={...}))."
            )


# --- functions that return a Spec; for each, the private function of the same name makes the condition ---------------


def base() -> Spec:
    """Return the condition ``base``: the unchanged model, from which all differences are computed."""
    return spec_of(BASE, "base", _base, {}, note="as it is")


def _base(ground: Ground, seed: int) -> Condition:
    return Condition(ground.lm)


def edited(
    name: str, strength: float = 1.0, form: str = OURS, *, fraction: float | None = None, control: str = "", adapter: bool = False
) -> Spec:
    """Return a condition that edits weights with ThinkEdit (arXiv 2503.22048).

    The edit takes the heads that write most towards short thinking, and changes the component of their output along the direction of
    thinking length.

    Args:
        name: Unique name of the condition.
        strength: How many times the component is subtracted: 1 removes the component, 2 reverses its sign.
        form: Name of a form of ThinkEdit: ``"ThinkEdit, as published"`` or ``"ThinkEdit (ours)"``. ``jobs.FORMS`` describes both.
        fraction: Share of all heads to edit, 0 to 1; ``None`` means ``Sizes.fraction`` of the board.
        control: Random control to return instead of the edit; ``""`` returns the edit.

            * ``"heads"``: make the same edit on equally many other heads of the same layers, chosen at random (``jobs.random_heads``).
            * ``"direction"``: edit the same heads along the direction between two random groups of responses (``jobs.random_groups``).
        adapter: True to write the edit as a rank-1 PEFT adapter and merge it with peft, instead of editing the weights.
    """
    about = {"strength": strength, "form": form, "fraction": fraction, "control": control, "adapter": adapter}
    controls = {
        "heads": "random heads of the same layers, from which what they write themselves is removed",
        "direction": "the same heads, the direction between random groups of responses",
    }
    note = controls.get(control, "rank-1 PEFT adapter, merged" if adapter else "written into the weights")
    family = "control" if control else "edit"
    share = "" if fraction is None else f", {100 * fraction:g} % of heads"
    note = f"{form}, strength {strength:g}{share}: {note}"
    return spec_of(name, family, _edited, about, seeded=bool(control), paper="2503.22048", note=note)


def _edited(
    ground: Ground, seed: int, *, strength: float, form: str, fraction: float | None, control: str, adapter: bool
) -> Condition:
    plan = ground.plan(strength, form, fraction)
    if control:
        draw = random_heads if control == "heads" else random_groups
        plan = draw(ground.lm, ground.find_heads(form), plan, seed=seed)
    return Condition(_adapted(ground, plan) if adapter else edits.apply(ground.lm, plan))


def _adapted(ground: Ground, plan: Any) -> LM:
    """Return a copy of base with the edit of ``plan``. The edit is saved as a PEFT adapter, then merged. A saved adapter is reused."""
    code = store.modules_of("toolkit.vectors.weights")
    folder = ground.out / "adapters" / store.Basis([ground.lm.fingerprint, identity.of(plan).body], code).key
    with store.locked(folder, wait=True):
        if not store.is_whole(folder):
            vectors.save_adapter(ground.lm, plan, folder)
    # A copy, because merging changes the model in place.
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
    """Return a condition that steers the base model along a direction of thinking length.

    The direction is a difference of means, long minus short thinking, and is not normalised. At strength 1, this difference is added.

    Args:
        name: Unique name of the condition.
        strength: Factor by which the direction is multiplied before it is added to the residual stream; + lengthens thinking, - shortens
            it.
        direction: One of:

            * ``"thinkedit"``: difference in the summed output of the heads that our form of ThinkEdit edits: mean over long thinking minus
              mean over short thinking. It is zero in layers without such heads.
            * ``"efficiency"``: the direction of Efficiency Steering (arXiv 2506.15647). For each problem, the mean hidden state of the
              shortest correct response is subtracted from that of the longest. The direction is the mean of these differences.
        layers: Layers to steer; negative numbers count from the last layer. ``None`` means all layers.
        during: Positions to steer: ``"all"``, or a phase of the response, such as ``"think"``; see ``edits.steering``.
        control: True for a random control: steer along a random direction of equal norm instead.
    """
    about = {"strength": strength, "direction": direction, "layers": layers, "during": during, "control": control}
    if direction not in DIRECTIONS:
        raise ValueError(f"{name!r}: unknown direction {direction!r}: choose one of {', '.join(DIRECTIONS)}.")
    paper = DIRECTIONS[direction]
    where = "all layers" if layers is None else f"layers {', '.join(map(str, layers))}"
    note = f"{'a random direction of the norm of ' if control else ''}{direction}'s, {strength:+g}, {where}, {during}"
    return spec_of(name, "control" if control else "steer", _steered, about, seeded=control, paper=paper, note=note)


def _steered(
    ground: Ground, seed: int, *, strength: float, direction: str, layers: tuple[int, ...] | None, during: str, control: bool
) -> Condition:
    v = ground.direction(direction)
    v = random_like(v, seed=seed) if control else v
    chosen = None if layers is None else [layer % ground.lm.layout.n_layers for layer in layers]  # -1 becomes the last layer
    return Condition(ground.lm, (steering(v, strength, layers=chosen, during=during),))


def masked(name: str, count: int, *, control: bool = False) -> Spec:
    """Return a condition that masks the top retrieval heads of the base model: heads that copy from the prompt (arXiv 2404.15574).

    While the model decodes, a masked head attends uniformly to all earlier tokens. Heads are ranked by how much they add to the logit of a
    token that is copied from the prompt. This ranking is ours; the paper ranks heads by how often they copy.

    Args:
        name: Unique name of the condition.
        count: Number of heads to mask.
        control: True for a random control: mask equally many other heads of the same layers instead, chosen at random.
    """
    note = f"{count} {'random heads of the same layers' if control else 'retrieval heads'}, uniform attention in decode"
    about = {"count": count, "control": control}
    return spec_of(name, "control" if control else "mask", _masked, about, seeded=control, paper="2404.15574", note=note)


def _masked(ground: Ground, seed: int, *, count: int, control: bool) -> Condition:
    plan = retrieval_heads.mask_plan(ground.measure_retrieval().scores["write (ours)"], count)
    plan = edits.random_heads(plan, ground.lm.layout, seed=seed) if control else plan
    # "newest": the token that is decoded, so the prompt is read without a mask, except its last token.
    return Condition(ground.lm, (masks.masking(plan, "uniform", during="newest"),))


def with_rule(name: str, rule: Rule, paper: str = "") -> Spec:
    """Return a condition that decodes from the base model with a rule that replaces sampled tokens.

    Args:
        name: Unique name of the condition.
        rule: Decoding rule, such as ``baselines.Budget(20)``, which closes thinking after 20 tokens.
        paper: arXiv id, or "".
    """
    return spec_of(name, "decode", _with_rule, {"rule": rule}, paper=paper, note=identity.describe(rule))


def _with_rule(ground: Ground, seed: int, *, rule: Rule) -> Condition:
    return Condition(ground.lm, rules=(rule,))


def with_intervention(name: str, act: Intervention, family: str = "decode", paper: str = "") -> Spec:
    """Return a condition that runs the base model under an intervention.

    Args:
        name: Unique name of the condition.
        act: Intervention, such as ``baselines.Suppress(("w",))``, which bans the token ``w`` in thinking. For an intervention that is
            computed from the base model, such as a steering vector, write a ``Spec`` with your own function instead.
        family: One of ``FAMILIES``; sets colour and symbol in figures.
        paper: arXiv id, or "".
    """
    return spec_of(name, family, _with_intervention, {"act": act}, paper=paper, note=identity.describe(act))


def _with_intervention(ground: Ground, seed: int, *, act: Intervention) -> Condition:
    return Condition(ground.lm, (act,))


def prompted(name: str, ask: Ask, paper: str = "") -> Spec:
    """Return a condition that changes the prompt of the base model.

    Args:
        name: Unique name of the condition.
        ask: Function that changes the messages of a prompt, such as ``baselines.Instruction("quick")``.
        paper: arXiv id, or "".
    """
    return spec_of(name, "prompt", _prompted, {"ask": ask}, paper=paper, note=identity.describe(ask))


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
    part: str | None = None,
    learning_rate: float | None = None,
    note: str = "",
) -> Spec:
    """Return a condition that is a policy trained with GRPO. The model can be edited before training, and the policy steered after it.

    Args:
        name: Unique name of the condition.
        recipe: Reward and hyperparameters of the method, such as those of a paper. ``Sizes.training`` of the board may change the
            hyperparameters (see ``TrainingPlan.sized``).
        reward: Reward object to use instead of the recipe's; ``None`` keeps the recipe's. The object's class and fields are part of the
            cache key.
        merged: True to add only part of the policy's weight changes to the base model: in each weight tensor, the 25 % of the entries with
            the largest absolute change. These changes are multiplied by 0.7. This is DLER's update-selective merging (arXiv 2510.15110).
        edit: Strength of an edit before training, with our form of ThinkEdit (see ``edited``); 0 for none.
        steer: Strength of steering the trained policy while it thinks, along the direction ``"thinkedit"`` (see ``steered``). + lengthens
            thinking; 0 for no steering.
        part: Part of the model to train, one of ``PARTS``; ``None`` trains the part of ``Sizes.training``, which is every weight by
            default.
        learning_rate: Learning rate of this policy; ``None`` keeps the recipe's. A vector or a head needs a larger one than every weight.
        note: Description of the condition in one line; "" generates one.

    Raises:
        ValueError: ``part`` is unknown.
        identity.UnknownIdentityError: the reward holds something that cannot be described in a cache key, such as a lock or an open file.
    """
    if reward is not None:
        _check_known(name, reward)
    if part is not None and part not in PARTS:
        raise ValueError(f"{name!r}: unknown part {part!r}: choose one of {', '.join(PARTS)}.")
    own: dict[str, Any] = {"part": part, "learning_rate": learning_rate}
    about = {"recipe": recipe, "reward": reward, "merged": merged, "edit": edit, "steer": steer, "own": own}
    how = [f"{recipe.name}, arXiv {recipe.paper}" if recipe.paper else recipe.name]
    how += ["the largest 25 % of its changes, x 0.7"] * merged + [f"of the edited model (strength {edit:g})"] * bool(edit)
    how += [f"then steered by {steer:+g}"] * bool(steer)
    how += [PARTS[part]] if part else []
    family = "combined" if merged or edit or steer else "control" if part == "random heads" else "trained"
    return spec_of(
        name,
        family,
        _trained,
        about,
        seeded=True,
        paper=recipe.paper,
        note=note or ", ".join(how),
        recipe=recipe,
        reward=reward,
        plan=partial(_own_plan, **own),
        steps=lambda ground: ground.sizes.training.steps,
        through=lambda: code.modules(recipe, reward=reward),
    )


def _check_known(name: str, reward: Any) -> None:
    """Raise UnknownIdentityError if the reward holds a value that cannot be described in a cache key, such as an open file.

    The name of the trained policy's folder is a hash that includes the reward. So the reward must have a description even if the
    condition's own cache key is computed from the field ``identity`` of ``Spec``.

    Args:
        name: Name of the condition, for the error message.
        reward: Reward object.
    """
    try:
        identity.of(reward)
    except identity.UnknownIdentityError as error:
        raise identity.UnknownIdentityError(
            f"Condition {name[:60]!r}: its reward's identity cannot be computed ({str(error).partition(': its values')[0][:150]}). Give the "
            "reward's class a __getstate__ that leaves this part out and returns everything that the reward depends on."
        ) from error


def _own_plan(ground: Ground, seed: int, *, part: str | None, learning_rate: float | None) -> TrainingPlan:
    """Return the training settings of one policy: those of the board, with the part and the learning rate of the condition."""
    plan = ground.sizes.training
    if learning_rate is not None:
        plan = replace(plan, changes=(*plan.changes, ("learning_rate", learning_rate)))
    if part is None:
        return plan
    from toolkit.grpo import parts  # needs TRL

    if part == "vector":
        return replace(plan, train=parts.Vectors())
    heads = ground.plan()
    heads = edits.random_heads(heads, ground.lm.layout, seed=seed) if part == "random heads" else heads
    return replace(plan, train=parts.plan_heads(heads))


def _trained(
    ground: Ground, seed: int, *, recipe: Recipe, reward: Any, merged: bool, edit: float, steer: float, own: Mapping[str, Any]
) -> Condition:
    start = edits.apply(ground.lm, ground.plan(edit)) if edit else None
    policy = ground.train(recipe, seed, start=start, reward=reward, plan=_own_plan(ground, seed, **own)).policy
    if merged and policy.during:
        raise ValueError(
            "merged=True takes the largest changes of weights, but vectors were trained: leave merged out, or train weights."
        )
    # The policy gets the dtype of base, so that the difference from base does not include an effect of rounding.
    dtype = ground.lm.model.dtype
    lm = merging.selective_merge(ground.lm, policy.lm, dtype=dtype) if merged else merging.in_type_of(start or ground.lm, policy.lm)
    acts = (steering(ground.direction("thinkedit"), steer, during="think"),) if steer else ()
    # A policy that was trained with a budget in the prompt is evaluated with the last budget of its training.
    curriculum = ground.sizes.training.sized(recipe).curriculum
    # Steps count from 0, so the last one is ``steps - 1``.
    return Condition(lm, (*policy.during, *acts), ask=curriculum.ask(ground.sizes.training.steps - 1) if curriculum else None)
