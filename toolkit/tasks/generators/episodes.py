"""Running sums as conversations (*episodes*) for language models, after arXiv 2509.09677.

The user gives a dictionary from five-letter words (*keys*) to integers from -99 to 99. Each turn names K keys, drawn with replacement; the
model adds their values to its running total and answers ``<answer>total</answer>``. Wrong answers in the history of a conversation
(``inject_history_errors``) test whether a model's mistakes cause further mistakes (*self-conditioning*).

Gold answers follow the history: the gold answer of a turn is the last total in the history, right or wrong, plus the values of the keys
that the turn names. ``meta["truth"]`` holds the true total.

Deviations: the prompts and the list of words are ours. To make an answer wrong, the released code adds a random number, which is 0 in 1 of
21 cases; here it is never 0.

Units: a horizon is a number of turns; ``meta["keys"]`` is K, the number of keys per turn.
"""

from __future__ import annotations

import random
import re
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, replace
from itertools import accumulate

from toolkit.tasks import splits
from toolkit.tasks.grading.execution import Execution, carry_forward, judge
from toolkit.types import Problem

VALUES = (-99, 99)
SIZE = 100  # words per dictionary, as in the paper
NOISE = 10  # largest error of a wrong answer, as in the paper
ERROR_RATE = 0.1  # default of the paper

_WORDS = (
    "apple beach brick bread brush cabin camel candy chair chalk cloud coral crane crown daisy dance eagle earth elbow fence field "
    "flame flour flute fruit ghost giant glass glove grape grass green heart honey horse hotel house ivory jelly judge juice "
    "knife label lemon light linen lunar maple march metal model money month motor mouse music night north novel ocean olive onion "
    "opera paint panel paper party peach pearl phone piano pilot plant plate point pound queen quilt radio ranch river robin salad "
    "scale sheep shelf shell shirt skirt smoke snake spice spoon stage steel stone storm sugar table tiger toast tower track train "
    "trout truck tulip uncle urban valve voice wagon watch water whale wheat wheel world"
)
WORDS = tuple(_WORDS.split())

_ANSWER = re.compile(r"<answer>\s*([+-]?\d+)\s*</answer>")

Message = Mapping[str, str]


@dataclass(frozen=True)
class Episode:
    """The user's part of a conversation about a running sum: a dictionary from words (*keys*) to integers, and the keys of each turn.

    In each turn, the user names some keys, and the model adds their values to its running total.

    Attributes:
        id: Identifier, from a hash of the dictionary and the keys.
        split: Split that the episode belongs to.
        values: The dictionary, as pairs ``(key, integer)`` in the order of the prompt.
        turns: For each turn, the keys whose values are to be added.
    """

    id: str
    split: str
    values: tuple[tuple[str, int], ...]
    turns: tuple[tuple[str, ...], ...]

    @property
    def deltas(self) -> list[int]:
        """One number per turn: the sum of the values of the keys that the turn names."""
        known = dict(self.values)
        return [sum(known[key] for key in keys) for keys in self.turns]

    @property
    def totals(self) -> list[int]:
        """The true running total after each turn."""
        return list(accumulate(self.deltas))


def running_sum_episodes(
    n: int, horizon: int, keys_per_turn: int = 1, seed: int = 0, *, split: str = "test", size: int = SIZE
) -> list[Episode]:
    """Return ``n`` random running-sum conversations (Episodes) of ``horizon`` turns each. Equal seeds give equal episodes.

    The user first gives a dictionary from words (keys) to integers. In each turn, the user names some keys, and the model is to add their
    values to its running total.

    Args:
        horizon: Number of turns.
        keys_per_turn: K, the number of keys that each turn names.
        split: ``"train"``, ``"dev"`` or ``"test"``. A hash of an episode's dictionary and keys decides its split.
        size: Number of keys in the dictionary.

    Raises:
        ValueError: unknown split; ``n``, ``horizon``, ``keys_per_turn`` or ``size`` below 1; or ``size`` above the number of words in our
            list.
    """
    splits.check_split(split)
    if n < 1 or horizon < 1 or keys_per_turn < 1 or not 1 <= size <= len(WORDS):
        raise ValueError(
            f"n={n}, horizon={horizon}, keys_per_turn={keys_per_turn}, size={size}: need 1 or more of each, and a dictionary of "
            f"at most {len(WORDS)} words."
        )
    rng = random.Random(f"running_sum-episodes-{split}-{seed}")
    episodes: list[Episode] = []
    while len(episodes) < n:
        known = tuple((word, rng.randint(*VALUES)) for word in rng.sample(WORDS, size))
        turns = tuple(tuple(rng.choice(known)[0] for _ in range(keys_per_turn)) for _ in range(horizon))
        if splits.split_of(f"{known}{turns}") == split:
            episodes.append(Episode(f"running_sum-{splits.digest(f'{known}{turns}')}", split, known, turns))
    return episodes


def problem(episode: Episode, answers: Sequence[str] | None = None) -> Problem:
    """Return the next turn of an episode as a problem: the conversation so far, which ends with the user's message.

    Args:
        answers: The model's answers to the turns so far, as texts. Default: right answers to all turns except the last one, so that the
            problem is the last turn.

    Returns:
        A problem that is graded by the last number of the answer. Its gold answer is the last readable total in ``answers`` (0 if there is
        none) plus the values of the turn's keys. ``meta["truth"]`` is the true total.

    Raises:
        ValueError: every turn has an answer already.
    """
    answers = [answer(total) for total in episode.totals[:-1]] if answers is None else list(answers)
    if len(answers) >= len(episode.turns):
        raise ValueError(
            f"{len(answers)} answers were given, and {episode.id} has {len(episode.turns)} turns: give fewer answers than turns."
        )
    messages: list[Message] = []
    for t, keys in enumerate(episode.turns[: len(answers) + 1]):
        messages.append({"role": "user", "content": (_rules(episode) if t == 0 else "") + f"Keys: {', '.join(keys)}"})
        if t < len(answers):
            messages.append({"role": "assistant", "content": answers[t]})
    turn, keys_per_turn = len(answers) + 1, len(episode.turns[0])
    before = carry_forward([read_answer(text) for text in answers])
    gold = (before[-1] if before else 0) + episode.deltas[turn - 1]
    meta = {
        "task": "running_sum",
        "split": episode.split,
        "difficulty": turn,
        "keys": keys_per_turn,
        "delta": episode.deltas[turn - 1],
        "truth": episode.totals[turn - 1],
    }
    return Problem(f"{episode.id}-{turn}", tuple(messages), str(gold), meta)


def _rules(episode: Episode) -> str:
    known = ", ".join(f"{word}: {value}" for word, value in episode.values)
    return (
        f"Here is a dictionary of integers.\n{known}\n\nKeep a running sum, which starts at 0. Each message names keys: add their values "
        "to the sum, and answer with the new sum only, as <answer>sum</answer>.\n\n"
    )


def answer(total: int) -> str:
    """Return the text ``<answer>total</answer>``."""
    return f"<answer>{total}</answer>"


def read_answer(text: str) -> int | None:
    """Return the last total that stands in answer tags, or ``None`` if the text has no such total.

    >>> read_answer("<answer>-12</answer>")
    -12
    """
    totals = _ANSWER.findall(text)
    return int(totals[-1]) if totals else None


def play(episodes: Sequence[Episode], ask: Callable[[list[Problem]], list[str]]) -> list[Execution]:
    """Run each episode as a conversation with a model, whose own answers form the history.

    Return one ``Execution`` per episode: the total that the model gave in each turn, and whether it is right. An answer without a readable
    total counts as a repetition of the total before it (``carry_forward``).

    Args:
        episodes: Episodes to run. The current turns of all episodes are passed to ``ask`` together.
        ask: Function that returns one answer text (without thinking) per problem, in order, for example by sampling a batch of rollouts.

    Raises:
        ValueError: ``ask`` does not return one answer per problem.
    """
    answers: list[list[str]] = [[] for _ in episodes]
    for t in range(max((len(e.turns) for e in episodes), default=0)):
        active = [i for i, e in enumerate(episodes) if t < len(e.turns)]
        texts = ask([problem(episodes[i], answers[i]) for i in active])
        if len(texts) != len(active):
            raise ValueError(f"ask gave {len(texts)} answers to {len(active)} problems: it must give one each, in order.")
        for i, text in zip(active, texts, strict=True):
            answers[i].append(text)
    totals = [carry_forward([read_answer(text) for text in texts]) for texts in answers]
    return [judge(outputs, e.deltas) for outputs, e in zip(totals, episodes, strict=True)]


# --- self-conditioning ---------------------------------------------------------------------------------------


def inject_history_errors(
    messages: Sequence[Message], rate: float = ERROR_RATE, seed: int | str = 0, *, noise: int = NOISE
) -> tuple[Message, ...]:
    """Return a copy of a conversation in which each answer of the assistant is made wrong with probability ``rate``.

    Args:
        seed: Seed of the random errors.
        noise: Largest error: a wrong total is 1 to ``noise`` too high or too low.

    Raises:
        ValueError: ``rate`` is outside 0..1, ``noise`` is below 1, or no message of the assistant holds a total in answer tags.
    """
    if not 0 <= rate <= 1 or noise < 1:
        raise ValueError(f"rate={rate}, noise={noise}: need a rate from 0 to 1, and noise of at least 1.")
    if not any(m["role"] == "assistant" and _ANSWER.search(m["content"]) for m in messages):
        raise ValueError(
            f"None of the {len(messages)} messages is an answer <answer>total</answer> of the assistant: nothing to make wrong."
        )
    rng = random.Random(f"history-errors-{seed}")

    def wrong(m: Message) -> Message:
        total = read_answer(m["content"]) if m["role"] == "assistant" else None
        # Both numbers are drawn even if unused. So for equal seeds, the errors at a low rate are a subset of those at a higher rate.
        hit, off = rng.random() < rate, rng.choice((-1, 1)) * rng.randint(1, noise)
        return {**m, "content": answer(total + off)} if total is not None and hit else m

    return tuple(wrong(m) for m in messages)


def with_history_errors(p: Problem, rate: float = ERROR_RATE, seed: int = 0) -> Problem:
    """Return a copy of ``p``, one turn of an episode, in which each answer in the history is made wrong with probability ``rate``.

    The random errors differ between problems. The gold answer is the last total in the history, right or wrong, plus the values of the keys
    that the turn names.

    Raises:
        ValueError: the problem is not a turn of an episode, its history has no answer, or ``rate`` is outside 0..1.
    """
    if "delta" not in p.meta:
        raise ValueError(f"{p.id} is of task {p.meta.get('task')!r} and has no turns: give a problem of episodes.problem(episode).")
    messages = inject_history_errors(p.messages, rate, f"{seed}-{p.id}")
    before = carry_forward([read_answer(m["content"]) for m in messages if m["role"] == "assistant"])
    meta = {**p.meta, "error_rate": rate}
    return replace(p, id=f"{p.id}-errors{rate:g}-{seed}", messages=messages, answer=str(before[-1] + p.meta["delta"]), meta=meta)
