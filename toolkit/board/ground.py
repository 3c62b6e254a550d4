"""What every condition of the board is made from: the model, its rollouts, directions, heads and trained policies, each made once.

Everything that takes long is kept in ``out`` under a key of all it depends on, so that a board goes on after a kill, and one more
condition costs only itself.
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import asdict, dataclass, field, replace
from functools import cached_property
from pathlib import Path
from typing import Any

from toolkit import identity, store, tasks
from toolkit.generate import Sampling, rollouts
from toolkit.grpo import recipes
from toolkit.grpo.recipes import Recipe
from toolkit.jobs import edit, retrieval
from toolkit.jobs.edit import OURS, Finding
from toolkit.jobs.retrieval import Search
from toolkit.jobs.study import Say, Study
from toolkit.lm import LM
from toolkit.tasks import running_sum
from toolkit.types import Direction, Plan, Problem, Rollout

TRAINING = ("toolkit.grpo", "toolkit.jobs.grpo")  # what trains policies
Sets = tuple[tuple[str, int], ...]
"""Task names and how many problems of each."""


@dataclass(frozen=True)
class Training:
    """How policies are trained: see ``jobs.grpo.Sweep``, which this fills.

    Attributes:
        task: Task trained on.
        tiny: Whether recipes are taken in the size of the tiny reasoner (``Recipe.scaled``) or with their papers' numbers.
        changes: Numbers of every recipe that are replaced, such as ``(("problems", 32),)``.
        micro_batch: Rows of a forward and backward pass.
        lora: Rank of a LoRA adapter, or ``None`` to train every weight.
        engine: ``"toolkit"``, or ``"trl"`` (with vLLM: ``overrides=(("use_vllm", True),)``).
        overrides: Fields of TRL's ``GRPOConfig``.
    """

    task: str = "arithmetic"
    steps: int = 100
    pool: int = 256
    judged: int = 64
    every: int = 20
    tiny: bool = True
    changes: tuple[tuple[str, Any], ...] = ()
    micro_batch: int = 16
    lora: int | None = None
    engine: str = "toolkit"
    overrides: tuple[tuple[str, Any], ...] = ()


@dataclass(frozen=True)
class Sizes:
    """How much is measured.

    Attributes:
        main: What accuracy and length are measured on. A task that is not ``training.task`` is one that no policy was trained on.
        unseen: What else may be damaged, greedily sampled once: tasks that the tiny reasoner never saw stand at the floor.
        horizons: Additions in the chains of ``running_sum``: up to 7 the tiny reasoner was trained on, from 9 on it loses the thread.
        samples: Samples of each main problem, at temperature 1.
        seeds: Seeds of whatever is random or trained.
        extraction: Problems, and samples of each, that directions and heads are found on (train split of ``training.task``).
        haystack: Task that retrieval is measured on: ``lookup``, ``needle`` or ``threading`` (see ``jobs.retrieval.Search``).
        haystacks: How many of its problems (and it is found on as many others).
        lengths: Prompt lengths of ``needle`` and ``threading`` in tokens; none: five up to the model's context.
        texts: Base responses that every condition reads, teacher-forced, to see how its states differ.
        fraction: Share of heads edited.
    """

    main: Sets = (("arithmetic", 200), ("lookup", 60))
    unseen: Sets = (("running_sum", 60), ("threading", 24), ("characters", 24), ("countdown", 24))
    horizons: tuple[int, int] = (5, 10)
    samples: int = 8
    max_new_tokens: int = 400
    unseen_tokens: int = 600
    seeds: int = 3
    extraction: tuple[int, int] = (200, 8)
    haystack: str = "lookup"
    haystacks: int = 24
    lengths: tuple[int, ...] = ()
    texts: int = 120
    fraction: float = edit.DEMO.fraction
    training: Training = Training()


FULL = Sizes()
QUICK = Sizes(
    main=(("arithmetic", 40), ("lookup", 20)),
    unseen=(("running_sum", 12), ("threading", 6), ("characters", 6), ("countdown", 6)),
    samples=4,
    seeds=2,
    extraction=(60, 8),
    haystacks=16,
    texts=48,
    training=Training(steps=6, pool=48, judged=16, every=3),
)
"""Every condition, small: to see the machinery and the page, not to conclude anything."""


def sized(sizes: Sizes, given: Mapping[str, Any], settings: Mapping[str, str], *, tiny: bool) -> Sizes:
    """Sizes as a command line asks for them.

    Args:
        given: ``task``, ``problems`` (of the main task), ``max_new_tokens``, ``seeds``, ``steps``, ``lora``, ``engine``; ``None`` keeps what is.
        settings: Numbers of every recipe, or fields of TRL's ``GRPOConfig``, as text: see ``jobs.grpo.adjusted``.
        tiny: Whether recipes are taken in the size of the tiny reasoner.

    Raises:
        ValueError: an unknown task or setting.
    """
    from toolkit.jobs.grpo import RECIPE_NUMBERS, adjusted  # needs TRL

    own = {name: value for name, value in given.items() if value is not None}
    recipe, overrides = adjusted(recipes.plain("correctness"), settings)
    changes = tuple((name, getattr(recipe, name)) for name in RECIPE_NUMBERS if name in settings)
    training: dict[str, Any] = {name: own[name] for name in ("task", "steps", "lora", "engine") if name in own}
    training |= {"tiny": tiny, "changes": changes, "overrides": tuple(overrides.items())}
    main = sizes.main
    if "task" in own:
        tasks.check(own["task"])
        main = ((own["task"], sizes.main[0][1]),)
    if "problems" in own:
        main = ((main[0][0], own["problems"]), *main[1:])
    kept = {name: own[name] for name in ("max_new_tokens", "seeds") if name in own}
    return replace(sizes, main=main, training=replace(sizes.training, **training), **kept)


@dataclass(frozen=True)
class Ground:
    """A model, how much is measured on it, and where results are kept. The rest is made when first asked for."""

    lm: LM
    sizes: Sizes
    out: Path
    say: Say = field(default=lambda text: None, compare=False)

    @cached_property
    def identity(self) -> dict[str, Any]:
        """What every result depends on beside its condition and the code; how many seeds there are is not among it."""
        sizes = asdict(self.sizes)
        del sizes["seeds"]
        given = {"main": self.problems, "unseen": self.unseen, "extraction": self.study.load("train", self.lm)}
        return {**identity.of_lm(self.lm), "sizes": sizes, **{name: identity.of_problems(p) for name, p in given.items()}}

    @cached_property
    def modules(self) -> dict[str, str]:
        """The code that every result passes through, the tasks it is judged on among it: see ``store.modules_of``. How policies are trained is not."""
        names = [name for name, _ in (*self.sizes.main, *self.sizes.unseen)] + [self.sizes.haystack, self.sizes.training.task]
        own = {module for name in names for module in tasks.modules(name)}
        return store.modules_of("toolkit.board.measure", *sorted(own), without=TRAINING)

    # --- problems ------------------------------------------------------------------------------------------------

    @cached_property
    def problems(self) -> list[Problem]:
        """The main problems (test split)."""
        return [p for name, n in self.sizes.main for p in tasks.load(name, "test", n, lm=self.lm)]

    @cached_property
    def unseen(self) -> list[Problem]:
        """Problems of other tasks (test split)."""
        found: list[Problem] = []
        for name, n in self.sizes.unseen:
            chains = name == "running_sum"
            found += (
                running_sum.load("test", n, horizons=self.sizes.horizons) if chains else tasks.load(name, "test", n, lm=self.lm)
            )
        return found

    @property
    def sampling(self) -> Sampling:
        """Of the main problems: the same random numbers for every condition."""
        return Sampling(self.sizes.samples, max_new_tokens=self.sizes.max_new_tokens, details=True)

    # --- what conditions are made from ---------------------------------------------------------------------------

    @cached_property
    def study(self) -> Study:
        """Train problems that directions and heads are found on."""
        problems, samples = self.sizes.extraction
        return Study(self.sizes.training.task, problems, samples, self.sizes.max_new_tokens)

    @cached_property
    def found(self) -> list[Rollout]:
        """The base model's rollouts that directions and heads are found on."""
        self.say(f"sampling {self.study.problems} x {self.study.samples} rollouts that directions and heads are found on")
        problems = self.study.load("train", self.lm)
        depends = [identity.of_problems(problems), self.study.sampling.identity]
        where = self._place("extraction", depends, "toolkit.jobs.study", self.study.task)
        with store.locked(where, wait=True):  # the processes of a board read what the first of them sampled
            return rollouts(self.lm, problems, self.study.sampling, out=where)

    def _place(self, kind: str, depends: Any, module: str, task: str) -> Path:
        """Folder of rollouts that are made once, named by what they depend on and the code they pass through; says if that has changed."""
        code = store.modules_of(module, "toolkit.generate", *tasks.modules(task))
        basis, parent = store.Basis([identity.of_lm(self.lm), depends], code), self.out / kind
        where = parent / basis.key
        if not (where / store.MADE_BY).exists():
            if changed := basis.changed(store.records(parent)):
                self.say(f"{kind}: sampled by other code ({', '.join(sorted(changed))} changed), sampling again")
            basis.write(where)
        return where

    @cached_property
    def findings(self) -> dict[str, Finding]:
        """ThinkEdit's direction, head scores and plan, as published and in our form."""
        settings = edit.Settings(fraction=self.sizes.fraction)
        return {name: edit.find(self.lm, self.found, settings, name) for name in edit.FORMS}

    def plan(self, strength: float = 1.0, form: str = OURS, fraction: float | None = None) -> Plan:
        """ThinkEdit's plan at a strength; ``fraction``: of another share of heads than ``sizes.fraction``."""
        finding = self.findings[form]
        plan = finding.plan if fraction is None else edit.planned(self.lm, finding, edit.Settings(fraction), form)
        return replace(
            plan, edits=tuple(replace(e, strength=strength) for e in plan.edits), name=f"{plan.name}, strength {strength:g}"
        )

    @cached_property
    def thinkedit(self) -> Direction:
        """ThinkEdit's direction as the edited heads write it themselves (ours), + longer."""
        found = self.findings[OURS]
        return found.plan.direction or found.direction

    @cached_property
    def efficiency(self) -> Direction:
        """Efficiency Steering's direction, + longer."""
        return edit.extract(self.lm, self.found, recipe=edit.Recipe(method="efficiency"))[0]

    def search(self, seed: int = 0) -> Search:
        """How retrieval is measured."""
        return Search(self.sizes.haystack, self.sizes.haystacks, self.sizes.lengths, seed=seed)

    @cached_property
    def retrieval(self) -> retrieval.Found:
        """What every head does on haystacks of the dev split."""
        search = self.search()
        where = self._place("haystacks", asdict(search), "toolkit.tasks.haystack", search.task)
        with store.locked(where, wait=True):
            return retrieval.look(self.lm, search, out=where)

    def policy(self, recipe: Recipe, seed: int, *, start: LM | None = None, reward: Any = None) -> Any:
        """A policy trained from ``start`` (default: the base model), a ``grpo.run.Trained``; read back if this was done before.

        Args:
            recipe: With its paper's numbers; sized as ``sizes.training`` says.
            reward: A reward object of one's own instead of the recipe's.
        """
        from toolkit.jobs.grpo import trained

        return trained(start or self.lm, self.sized(recipe), seed, self.sweep, reward=reward, say=self.say)

    def folder_of(self, recipe: Recipe, seed: int, reward: Any = None) -> Path:
        """Where a policy trained from the base model is kept."""
        from toolkit.jobs.grpo import run_of

        return run_of(self.lm, self.sized(recipe), seed, self.sweep, reward=reward)

    def sized(self, recipe: Recipe) -> Recipe:
        """A recipe as it is run here."""
        how = self.sizes.training
        return replace(recipe.scaled() if how.tiny else recipe, **dict(how.changes))

    @property
    def sweep(self) -> Any:
        """How policies are trained, a ``jobs.grpo.Sweep``."""
        from toolkit.jobs.grpo import Sweep

        how = self.sizes.training
        return Sweep(
            self.out / "curves", self.out / "trained", how.steps, how.pool, how.judged, every=how.every, task=how.task,
            micro_batch=how.micro_batch, lora=how.lora, engine=how.engine, overrides=how.overrides,
        )  # fmt: skip
