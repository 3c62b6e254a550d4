"""``Ground``: the base model, the sizes of the measurements and other inputs that all conditions of a board share.

Its methods compute the inputs that take time:

* rollouts of the base model;
* directions of thinking length, with one vector per layer; adding the vectors to the residual stream lengthens thinking;
* scores of attention heads: how much each head writes towards short thinking, and how much it copies from the prompt;
* trained policies.

``sample``, ``find_heads``, ``direction`` and ``measure_retrieval`` run once per process for the same arguments. ``train`` loads a policy
that was trained before with the same arguments.

Rollouts and policies are saved in the directory ``Ground.out``. The name of their folder is a hash of all their inputs, code included. If
the folder for the same inputs exists, its files are loaded instead of computed again. A stopped board thus resumes, and a condition that
you add to a finished board is the only one that is computed.

The *tiny reasoner* is the small model that comes with the toolkit. *ThinkEdit* is a weight edit against short thinking (arXiv 2503.22048);
it edits the attention heads that write most towards short thinking.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from dataclasses import asdict, dataclass, field, replace
from functools import cached_property, wraps
from inspect import signature
from pathlib import Path
from types import MappingProxyType
from typing import Any, Concatenate, ParamSpec, TypeVar

from toolkit import identity, store, tasks
from toolkit.engines import OWN_LOOP, CannotSampleError, Engine, OwnLoop
from toolkit.entropies import with_entropies
from toolkit.generate import Sampling, begin_session, rollouts
from toolkit.grpo import recipes
from toolkit.grpo.plan import TrainingPlan
from toolkit.grpo.recipes import Recipe
from toolkit.jobs import retrieval
from toolkit.jobs.finding import DEMO, OURS, DirectionRecipe, EditSettings, Finding, extract_direction, find_heads, replan
from toolkit.jobs.retrieval import Search
from toolkit.jobs.study import Say, Study
from toolkit.lm import LM, Condition
from toolkit.tasks import running_sum
from toolkit.types import Direction, Plan, Problem, Rollout

DIRECTIONS: Mapping[str, str] = MappingProxyType({"thinkedit": "2503.22048", "efficiency": "2506.15647"})
"""Name of a direction of thinking length that ``Ground.direction`` can compute -> arXiv id of its paper."""
TRAINING = ("toolkit.grpo", "toolkit.jobs.grpo")  # modules that train policies
P = ParamSpec("P")
T = TypeVar("T")
Sets = tuple[tuple[str, int], ...]
"""Tasks of a board with their sizes: pairs ``(name of the task, number of problems)``."""


@dataclass(frozen=True, kw_only=True)
class Sizes:
    """Tasks, sizes and training settings of a board.

    Attributes:
        main: Main tasks, on which accuracy and length are measured: pairs ``(task, number of problems)``. Policies are trained on
            ``training.task`` only, so the other tasks measure transfer.
        unseen: Tasks besides ``main``, as pairs ``(task, number of problems)``, to detect damage to other abilities. Accuracy is measured,
            with one greedy response per problem; for ``running_sum`` also the share of right steps. A task shows damage only if base solves
            some of its problems. The accuracy of the unchanged tiny reasoner is near zero on tasks that it was not trained on.
        horizons: Smallest and largest number of steps in a problem of the task ``running_sum``. A step is an addition or subtraction:
            ``17+5-9=?`` has two. The tiny reasoner was trained on up to 7 steps, and fails at about 9 or more.
        samples: Samples per main problem, at temperature 1.
        max_new_tokens: Token budget of a response to a main problem.
        unseen_tokens: Token budget of a response to a problem of ``unseen``.
        seeds: Number of seeds of each random or trained condition. All other conditions have one seed.
        extraction: ``(problems, samples per problem)`` of the rollouts of base from which the head scores and the directions of thinking
            length are computed. The problems are from the train split of ``training.task``.
        haystack: Task on which retrieval is measured. Its prompts, called haystacks, hide facts: ``lookup`` (values of variables),
            ``needle`` (facts in filler text) or ``threading`` (chains of keys).
        haystacks: Number of haystacks per split: dev to find retrieval heads, test to measure retrieval.
        lengths: Prompt lengths of ``needle`` and ``threading`` in tokens; empty means five lengths up to the model's context. Not used by
            ``lookup``.
        texts: Largest number of base responses that every condition reads teacher-forced, to compare hidden states on the same texts.
        fraction: Share of all attention heads that ThinkEdit edits, 0 to 1.
        training: Settings that all trained policies share, such as the task and the number of steps; see ``TrainingPlan``. By the learning
            curves in ``data/grpo``, accuracy and length change little after 60 steps, except where a penalty keeps shortening.
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
    fraction: float = DEMO.fraction
    training: TrainingPlan = TrainingPlan(steps=60)

    @property
    def record(self) -> dict[str, Any]:
        """The sizes as a dict. ``training.track`` is left out: it says where training logs are sent, which changes no result."""
        fields = asdict(self)
        del fields["training"]["track"]
        return fields


FULL = Sizes()
QUICK = Sizes(
    main=(("arithmetic", 40), ("lookup", 20)),
    unseen=(("running_sum", 12), ("threading", 6), ("characters", 6), ("countdown", 6)),
    samples=4,
    seeds=2,
    extraction=(60, 8),
    haystacks=16,
    texts=48,
    training=TrainingPlan(steps=6, pool=48, held_out=16, evaluate_every=3),
)
"""Sizes for a quick trial run of every condition; too small for conclusions."""


def adjust_sizes(sizes: Sizes, options: Mapping[str, Any], settings: Mapping[str, str], *, tiny: bool) -> Sizes:
    """Return a copy of ``sizes``, changed by the options of a command line.

    Args:
        sizes: Sizes to change.
        options: Name of an option -> value; ``None`` changes nothing. Options: ``task`` (replaces all main tasks and the training task),
            ``problems`` (number of test problems of the first main task), the fields ``max_new_tokens`` and ``seeds`` of ``Sizes``, and
            the fields ``steps``, ``train``, ``engine`` and ``track`` of ``TrainingPlan``.
        settings: Name of a hyperparameter -> value as text. Every policy is trained with these values. Names: ``problems`` (per training
            batch), ``samples`` (per problem), ``updates`` (optimizer steps per batch), ``max_tokens`` (per response), ``learning_rate``,
            and the fields of TRL's ``GRPOConfig``.
        tiny: True to scale the hyperparameters of each method to the tiny reasoner, False to keep those of its paper.

    Raises:
        ValueError: the task or a setting is unknown; or a setting is an option of a reward (``reward.NAME``). The policies of a board have
            different rewards, so such an option cannot be set for all of them.
    """
    from toolkit.jobs.grpo import RECIPE_NUMBERS, adjust_recipe  # needs TRL

    if rewards := [name for name in settings if name.startswith("reward.")]:
        raise ValueError(
            f"{rewards[0]} cannot be set for all conditions, which have different rewards: give a condition its own recipe in a file "
            "(--conditions FILE)."
        )
    options = {name: value for name, value in options.items() if value is not None}
    # Any recipe will do: it only serves to check the settings and to convert their texts to numbers.
    recipe, overrides = adjust_recipe(recipes.plain("correctness"), settings)
    changes = tuple((name, getattr(recipe, name)) for name in RECIPE_NUMBERS if name in settings)
    training: dict[str, Any] = {name: options[name] for name in ("task", "steps", "train", "engine", "track") if name in options}
    training |= {
        "tiny": tiny,
        "changes": tuple({**dict(sizes.training.changes), **dict(changes)}.items()),
        "overrides": tuple({**dict(sizes.training.overrides), **overrides}.items()),
    }
    main = sizes.main
    if "task" in options:
        tasks.check(options["task"])
        main = ((options["task"], sizes.main[0][1]),)
    if "problems" in options:
        main = ((main[0][0], options["problems"]), *main[1:])
    others = {name: options[name] for name in ("max_new_tokens", "seeds") if name in options}
    return replace(sizes, main=main, training=replace(sizes.training, **training), **others)


def _once(method: Callable[Concatenate[Ground, P], T]) -> Callable[Concatenate[Ground, P], T]:
    """Decorate a method of ``Ground`` so that it runs once per process for the same arguments. Later calls return the first result."""

    @wraps(method)
    def cached(self: Ground, *args: P.args, **kwargs: P.kwargs) -> T:
        bound = signature(method).bind(self, *args, **kwargs)
        bound.apply_defaults()  # so that a call with a default left out has the same key as a call that passes it
        key = (method.__name__, *list(bound.arguments.values())[1:])
        if key not in self.made:
            self.made[key] = method(self, *args, **kwargs)
        return self.made[key]

    return cached


@dataclass(frozen=True)
class Ground:
    """Inputs that all conditions of a board share: the base model, the sizes and the output directory.

    Its methods compute further inputs, such as the direction of thinking length, head scores and trained policies.

    Attributes:
        lm: The base model.
        sizes: Sizes of the measurements.
        out: Directory of rollouts, policies and results.
        say: Function that is called with one line of progress at a time.
        engine: Program that samples the responses: the toolkit's own loop, or another one such as a server. For conditions that the other
            one does not support, the toolkit's own loop samples the responses.
        made: Cache of the methods that run only once: ``(method name, *arguments)`` -> result.
    """

    lm: LM
    sizes: Sizes
    out: Path
    say: Say = field(default=lambda text: None, compare=False)
    engine: Engine = field(default=OWN_LOOP, compare=False)
    made: dict[tuple[Any, ...], Any] = field(default_factory=dict, init=False, repr=False, compare=False)

    @cached_property
    def identity(self) -> dict[str, Any]:
        """Inputs on which every result of the board depends: a dict that identifies the base model, the sizes and the problems.

        It is part of every result's cache key. The number of seeds is left out, so that results stay valid if seeds are added. The sizes
        are those of ``Sizes.record``. The code is another part of the key: see ``modules``.
        """
        sizes = self.sizes.record
        del sizes["seeds"]
        problems = {"main": self.problems, "unseen": self.unseen, "extraction": self.study.load("train", self.lm)}
        return {
            **identity.of_lm(self.lm),
            **self.engine.header,
            "sizes": sizes,
            **{name: identity.of_problems(p) for name, p in problems.items()},
        }

    @cached_property
    def modules(self) -> dict[str, str]:
        """Module -> hash of its code, for every module that all results depend on.

        Modules that train policies are left out. A trained condition adds them to the cache key of its results (see ``Spec.through``).
        """
        names = [name for name, _ in (*self.sizes.main, *self.sizes.unseen)] + [self.sizes.haystack, self.sizes.training.task]
        task_modules = {module for name in names for module in tasks.modules(name)}
        return store.modules_of("toolkit.board.measure", *sorted(task_modules), without=TRAINING)

    # --- problems ------------------------------------------------------------------------------------------------

    @cached_property
    def problems(self) -> list[Problem]:
        """Problems of the main tasks (test split)."""
        budget = self.sizes.max_new_tokens
        return [p for name, n in self.sizes.main for p in tasks.load(name, "test", n, lm=self.lm, max_new_tokens=budget)]

    @cached_property
    def unseen(self) -> list[Problem]:
        """Problems of the tasks in ``sizes.unseen`` (test split), which measure damage to other abilities."""
        problems: list[Problem] = []
        for name, n in self.sizes.unseen:
            if name == "running_sum":
                problems += running_sum.load("test", n, horizons=self.sizes.horizons)
            else:
                problems += tasks.load(name, "test", n, lm=self.lm, max_new_tokens=self.sizes.unseen_tokens)
        return problems

    @property
    def sampling(self) -> Sampling:
        """Sampling settings for the board's test problems.

        All conditions use these settings, with the same random seed. They thus draw the same random numbers.
        """
        return Sampling(self.sizes.samples, max_new_tokens=self.sizes.max_new_tokens, details=True)

    def respond(
        self,
        condition: Condition,
        problems: Sequence[Problem],
        sampling: Sampling,
        *,
        out: Path | None = None,
        progress: bool = False,
    ) -> list[Rollout]:
        """Return responses of a condition to problems, sampled by ``engine``.

        If ``engine`` does not support the condition, the toolkit's own loop samples the responses.

        Args:
            condition: The condition.
            problems: Problems to answer.
            sampling: Sampling settings. If ``sampling.details`` is set, the responses have token entropies. If ``engine`` is not the
                toolkit's own loop, the toolkit computes the entropies after sampling.
            out: Directory for the rollouts; ``None`` stores nothing.
            progress: True to show a progress bar.
        """
        if isinstance(self.engine, OwnLoop):
            return rollouts(condition, problems, sampling, engine=self.engine, out=out, progress=progress)
        plain = replace(sampling, details=False)
        try:
            begin_session(condition, problems, plain, self.engine)  # raises CannotSampleError before anything is sampled
        except CannotSampleError as why:
            self.say(f"the toolkit's own loop samples {condition.note or condition.lm.name}: {why}")
            return rollouts(condition, problems, sampling, out=out, progress=progress)
        responses = rollouts(condition, problems, plain, engine=self.engine, out=out, progress=progress)
        return with_entropies(condition, responses, temperature=sampling.temperature) if sampling.details else responses

    # --- inputs of conditions ------------------------------------------------------------------------------------

    @cached_property
    def study(self) -> Study:
        """Settings of the rollouts that ``sample`` returns: task, number of problems, samples per problem, and token budget."""
        problems, samples = self.sizes.extraction
        return Study(self.sizes.training.task, problems, samples, self.sizes.max_new_tokens)

    @_once
    def sample(self) -> list[Rollout]:
        """Return rollouts of base on problems of the train split. Saved rollouts are reused.

        ``find_heads`` and ``direction`` compute head scores and directions of thinking length from them.
        """
        self.say(f"sampling {self.study.problems} problems x {self.study.samples} responses, for directions and head scores")
        problems = self.study.load("train", self.lm)
        depends = [identity.of_problems(problems), self.study.sampling.identity, *self.engine.header.items()]
        where = self._place("extraction", depends, "toolkit.jobs.study", self.study.task)
        with store.locked(where, wait=True):  # one process of a board samples, the others read its rollouts
            return self.respond(Condition(self.lm), problems, self.study.sampling, out=where, progress=True)

    def _place(self, kind: str, depends: Any, module: str, task: str) -> Path:
        """Return the folder in which rollouts of base are saved. Its name is a hash of their inputs, code included.

        If rollouts were saved with the same inputs but other code, print that new ones will be sampled.

        Args:
            kind: Name of the parent folder.
            depends: Inputs of the rollouts besides the base model and the code, such as problems and sampling settings.
            module: Name of the module that chooses the problems; its code enters the hash.
            task: Task of the problems; the code of its modules enters the hash.
        """
        code = store.modules_of(module, "toolkit.generate", *tasks.modules(task))
        basis, parent = store.Basis([identity.of_lm(self.lm), depends], code), self.out / kind
        where = parent / basis.key
        if not (where / store.MADE_BY).exists():
            if changed := basis.changed(store.records(parent)):
                self.say(f"{kind}: sampled by other code ({', '.join(sorted(changed))} changed), sampling again")
            basis.write(where)
        return where

    @_once
    def find_heads(self, form: str = OURS) -> Finding:
        """Return the attention heads that ThinkEdit would edit in base, with a score of every head and a direction of thinking length.

        ThinkEdit is a weight edit against short thinking (arXiv 2503.22048). The higher a head's score, the more it writes towards short
        thinking. All values are computed from the rollouts of ``sample``.

        Args:
            form: Name of a form of ThinkEdit: ``"ThinkEdit, as published"`` or ``"ThinkEdit (ours)"``. ``jobs.FORMS`` describes both.
        """
        return find_heads(self.lm, self.sample(), EditSettings(fraction=self.sizes.fraction), form)

    def plan(self, strength: float = 1.0, form: str = OURS, fraction: float | None = None) -> Plan:
        """Return the plan of a ThinkEdit weight edit (arXiv 2503.22048): the heads to edit, a direction of thinking length, and a strength.

        Args:
            strength: How many times the component along the direction is subtracted from the output of each edited head. 1 removes the
                component, 2 reverses its sign.
            form: Name of a form of ThinkEdit: ``"ThinkEdit, as published"`` or ``"ThinkEdit (ours)"``. ``jobs.FORMS`` describes both.
            fraction: Share of all heads to edit, 0 to 1; ``None`` means ``sizes.fraction``.
        """
        finding = self.find_heads(form)
        plan = finding.plan if fraction is None else replan(self.lm, finding, EditSettings(fraction), form)
        return replace(
            plan, edits=tuple(replace(e, strength=strength) for e in plan.edits), name=f"{plan.name}, strength {strength:g}"
        )

    @_once
    def direction(self, name: str = "thinkedit") -> Direction:
        """Return a direction of thinking length. Adding the direction to the residual stream lengthens thinking.

        Args:
            name: One of:

                * ``"thinkedit"``: difference in the summed output of the heads that our form of ThinkEdit edits: mean over long thinking
                  minus mean over short thinking. It is zero in layers without such heads.
                * ``"efficiency"``: the direction of Efficiency Steering (arXiv 2506.15647). For each problem, the mean hidden state of the
                  shortest correct response is subtracted from that of the longest. The direction is the mean of these differences.
        """
        if name not in DIRECTIONS:
            raise ValueError(f"Unknown direction {name!r}: choose one of {', '.join(DIRECTIONS)}.")
        if name == "efficiency":
            return extract_direction(self.lm, self.sample(), recipe=DirectionRecipe(method="efficiency"))[0]
        finding = self.find_heads(OURS)
        return finding.plan.direction or finding.direction  # the plan's holds the outputs of the edited heads alone

    def search(self, seed: int = 0) -> Search:
        """Return the settings of the haystacks (prompts with hidden facts) that measure retrieval: task, number, lengths and seed.

        Task, number and lengths are ``haystack``, ``haystacks`` and ``lengths`` of ``sizes``.

        Args:
            seed: Random seed of the haystacks.
        """
        return Search(self.sizes.haystack, self.sizes.haystacks, self.sizes.lengths, seed=seed)

    @_once
    def measure_retrieval(self) -> retrieval.RetrievalMeasurement:
        """Return retrieval metrics of every head of base, measured on haystacks (prompts with hidden facts) of the dev split.

        Retrieval heads are heads that copy from the prompt. The field ``scores`` of the result holds two scores of every head:

        * ``"copy, as published"``: share of the answer's distinct tokens that the head copies from the haystack (arXiv 2404.15574).
        * ``"write (ours)"``: mean contribution of the head to the logits of retrieved tokens. Only one position is counted per token: that
          position of the hidden fact to which the head attends most.
        """
        search = self.search()
        where = self._place("haystacks", asdict(search), "toolkit.tasks.haystack", search.task)
        with store.locked(where, wait=True):
            return retrieval.measure_retrieval(self.lm, search, out=where)

    def train(
        self, recipe: Recipe, seed: int, *, start: LM | None = None, reward: Any = None, plan: TrainingPlan | None = None
    ) -> Any:
        """Return a policy trained with GRPO. If it was trained before with the same arguments and settings, it is loaded.

        Args:
            recipe: Reward and hyperparameters of the method, such as those of a paper. ``sizes.training`` may change the
                hyperparameters (see ``TrainingPlan.sized``), and adds the task and the number of steps.
            seed: Random seed of the training run.
            start: Model to start from; ``None`` means the base model.
            reward: Reward object to use instead of the recipe's; ``None`` means the recipe's.
            plan: Training settings to use instead of ``sizes.training``.

        Returns:
            A ``grpo.run.Trained``, with the policy and the log of its training.
        """
        from toolkit.grpo import policies  # needs TRL

        return policies.train_policy(
            start or self.lm, recipe, seed, plan or self.sizes.training, self.out / "trained", reward=reward, say=self.say
        )

    def folder_of(self, recipe: Recipe, seed: int, reward: Any = None, *, plan: TrainingPlan | None = None) -> Path:
        """Return the folder in which ``train`` saves the policy that it trains from base. The folder may not exist yet.

        Args:
            recipe: Reward and hyperparameters of the method.
            seed: Random seed of the training run.
            reward: Reward object to use instead of the recipe's; ``None`` means the recipe's.
            plan: Training settings to use instead of ``sizes.training``.
        """
        from toolkit.grpo import policies

        return policies.folder_of(self.lm, recipe, seed, plan or self.sizes.training, self.out / "trained", reward=reward)
