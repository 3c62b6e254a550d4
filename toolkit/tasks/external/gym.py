"""Data sets of reasoning-gym (arXiv 2505.24760) as problems, graded by each data set's own ``score_answer``.

reasoning-gym is installed with ``pip install 'reasoning-length-toolkit[tasks]'`` and imported on first use. An *entry* is one question of a
data set, with the data that its grader needs. A problem does not store its entry. It stores only how to draw it: name, settings, seed and
size of the data set, and index of the entry. So problems can be written to files. To grade an answer, the entry is drawn again.

reasoning-gym has no splits. Here a hash of the question decides the split, so a question is in one split only.

Units: scores are from 0 to 1; an answer is right if it gets the full score. ``score`` returns partial scores, for example for a reward.
"""

from __future__ import annotations

import json
from collections.abc import Mapping
from functools import lru_cache
from importlib import metadata
from typing import Any

from toolkit.tasks import splits
from toolkit.types import Problem

INSTALL = "pip install 'reasoning-length-toolkit[tasks]'"
ASK = "\n\nWrite the final answer between <answer> and </answer>."
DRAWS = 60  # entries drawn per requested problem before a data set is said to have too few: our choice
FULL = 1 - 1e-9  # full score, with a tolerance for rounding
UNDRAWN = (ValueError, RuntimeError)  # errors of data sets that fail to draw some entries
NONSENSE = "?~?"  # an answer that every data set must grade as wrong
UNREADABLE = (ValueError, TypeError, SyntaxError, LookupError, AttributeError, ArithmeticError)  # errors of scorers on odd answers


class GymError(ValueError):
    """A data set of reasoning-gym cannot be used as requested.

    For example, the data set or a setting does not exist, the data set has too few problems, or the installed version of reasoning-gym
    draws another question than a stored problem has.
    """


def names() -> tuple[str, ...]:
    """Return the names of all data sets of reasoning-gym. Raise ImportError if it is not installed."""
    return tuple(sorted(_gym().factory.DATASETS))


def check(name: str) -> None:
    """Raise GymError if reasoning-gym has no data set of this name, and ImportError if reasoning-gym is not installed."""
    if name not in (known := names()):
        raise GymError(f"reasoning-gym has no data set {name!r}: choose one of {', '.join(known)}.")


def load(
    name: str,
    split: str = "test",
    n: int = 200,
    seed: int = 0,
    *,
    level: int | None = None,
    settings: Mapping[str, Any] | None = None,
) -> list[Problem]:
    """Return ``n`` different problems from one split of the reasoning-gym data set ``name``.

    Equal seeds give equal problems as long as the version of reasoning-gym is the same.

    Args:
        level: Level of the data set's curriculum, from 0, which becomes ``meta["difficulty"]``. ``None``: the data set's default settings
            instead of a level; ``meta["difficulty"]`` is then 0.
        settings: Fields of the data set's config, such as ``{"min_terms": 3, "max_terms": 3}``. They override the settings of the level.

    Raises:
        ImportError: reasoning-gym is not installed.
        GymError: the data set, level or setting does not exist; fewer than ``n`` different problems of the split were drawn; or the data
            set's grader gives the full score to a nonsense answer, so that it cannot be used.
        ValueError: unknown split.
    """
    splits.check_split(split)
    check(name)
    chosen = json.dumps({**_level(name, level), **(settings or {})}, sort_keys=True)
    size = DRAWS * max(n, 20)
    _dataset(name, chosen, _seed(seed), size)  # raises bad settings once, before any entry is drawn
    problems: dict[str, Problem] = {}
    failures: list[Exception] = []
    for index in range(size):
        if len(problems) >= n:
            break
        recipe = {"name": name, "settings": chosen, "seed": _seed(seed), "size": size, "index": index}
        try:
            entry = _entry(recipe)
        except UNDRAWN as error:
            failures.append(error)
            continue
        if splits.split_of(entry["question"]) == split:
            p = _problem(entry, recipe, split, level or 0)
            problems.setdefault(p.id, p)
            # Checked at the first problem only.
            if len(problems) == 1 and score(p, NONSENSE) >= FULL:
                raise GymError(
                    f"{name} gives {NONSENSE!r} the full score, so its problems cannot be graded: choose another data set."
                )
    if len(problems) < n:
        raise GymError(
            f"{name} gave {len(problems)} different problems of split {split!r} in {size} draws, fewer than n={n}: ask for fewer, or widen its "
            f"settings.{f' {len(failures)} draws failed, the last with {failures[-1]!r}.' if failures else ''}"
        )
    return list(problems.values())


def score(problem: Problem, answer: str) -> float:
    """Return the score, 0 to 1, that the problem's data set gives to an answer.

    Only the text in the last ``<answer>`` tags is scored; if there are no such tags, the whole text. An answer that cannot be parsed scores
    0.

    Raises:
        ImportError: reasoning-gym is not installed.
        GymError: the problem is not from reasoning-gym, or the installed version of reasoning-gym draws another question than the problem
            has.
    """
    recipe = problem.meta.get("gym")
    if recipe is None:
        raise GymError(f"{problem.id} has no meta['gym']: give a problem of gym.load.")
    check(recipe["name"])
    entry = _entry(recipe)
    if not problem.messages[-1]["content"].startswith(entry["question"]):
        raise GymError(
            f"{problem.id} was drawn as entry {recipe['index']} of {recipe['name']} (seed {recipe['seed']}), but reasoning-gym "
            f"{metadata.version('reasoning-gym')} now draws another question there: load the problems again, or install the version they were made with."
        )
    tagged = answer.rpartition("</answer>")[0].rpartition("<answer>")[2] if "</answer>" in answer else answer
    dataset = _dataset(recipe["name"], recipe["settings"], recipe["seed"], recipe["size"])
    try:
        return float(dataset.score_answer(tagged.strip(), entry))
    except UNREADABLE:  # some data sets do not check whether an answer can be parsed
        return 0.0


def verify(problem: Problem, answer: str) -> bool:
    """Return True if the problem's reasoning-gym data set gives an answer the full score (see ``score``).

    Raises:
        ImportError: reasoning-gym is not installed.
        GymError: the problem is not from reasoning-gym, or the installed version of reasoning-gym draws another question than the problem
            has.
    """
    return score(problem, answer) >= FULL


def _problem(entry: Mapping[str, Any], recipe: Mapping[str, Any], split: str, difficulty: int) -> Problem:
    task = f"gym:{recipe['name']}"
    meta = {"task": task, "split": split, "difficulty": difficulty, "grader": "gym", "gym": dict(recipe)}
    gold = entry.get("answer")
    name = f"{task}-{splits.digest(entry['question'])}"
    return Problem(name, ({"role": "user", "content": entry["question"] + ASK},), "" if gold is None else str(gold), meta)


def _seed(seed: int) -> int:
    # Entry i of reasoning-gym is drawn from seed + i, so neighbouring seeds would share all but one of their entries: hash the seed.
    return int(splits.digest(f"gym-{seed}")[:7], 16)


def _level(name: str, level: int | None) -> dict[str, Any]:
    """Return those settings of a curriculum level that differ from the data set's default settings; ``{}`` if ``level`` is ``None``."""
    if level is None:
        return {}
    factory = _gym().factory
    if not factory.has_curriculum(name):
        raise GymError(f"{name} has no curriculum, so no level {level}: give settings={{...}} of its config.")
    curriculum = factory.create_curriculum(name)
    attributes = curriculum.attributes
    most = max((len(a.levels) - 1 for a in attributes.values()), default=0)
    if not 0 <= level <= most:
        raise GymError(f"level={level}: the curriculum of {name} goes from 0 to {most}.")
    for key, attribute in attributes.items():
        curriculum.set_attr_level(key, min(level, len(attribute.levels) - 1))
    plain = factory.DATASETS[name][1]()
    config = vars(curriculum.generate_configuration())
    return {key: value for key, value in config.items() if key not in ("seed", "size") and value != getattr(plain, key, None)}


def _entry(recipe: Mapping[str, Any]) -> dict[str, Any]:
    return dict(_dataset(recipe["name"], recipe["settings"], recipe["seed"], recipe["size"])[recipe["index"]])


@lru_cache(maxsize=32)
def _dataset(name: str, settings: str, seed: int, size: int) -> Any:
    try:
        return _gym().create_dataset(name, seed=seed, size=size, **json.loads(settings))
    except (TypeError, ValueError, AssertionError) as error:  # no JSON, an unknown field, or a value that the config refuses
        raise GymError(f"{name} does not take the settings {settings}: {error}.") from error


def _gym() -> Any:
    try:
        import reasoning_gym
    except ImportError as error:
        raise ImportError(f"The tasks gym:NAME need reasoning-gym (and a C compiler to install it): {INSTALL}.") from error
    return reasoning_gym
