"""Running sums turn by turn, for language models: a dictionary, K keys a turn, a conversation (arXiv 2509.09677).

The user gives a dictionary of five-letter words and integers in [-99, 99]. Each turn names K keys (drawn with replacement); the model
adds their values to its total and answers ``<answer>total</answer>``. With wrong answers put into the history of a conversation
(:func:`inject_history_errors`) one sees whether a model's mistakes make more of them: *self-conditioning*.

Deviations: the wording and the words are ours. The released code's noise may be 0, so that 1 in 21 of its errors is none; here it
never is. After wrong answers a problem asks for what follows from the last one, as if it were the model's own (``meta["truth"]``
holds the true total).

Units: a horizon is a number of turns, ``keys`` are additions a turn.
"""

from __future__ import annotations

import random
import re
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, replace
from itertools import accumulate

from toolkit.tasks import splits
from toolkit.tasks.grading.execution import Execution, judge, kept
from toolkit.types import Problem

VALUES = (-99, 99)
SIZE = 100  # words in a dictionary, the paper's
NOISE = 10  # a wrong answer is off by 1 to this much: the paper's range
ERROR_RATE = 0.1  # the paper's default

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
    """One conversation before it is held.

    Attributes:
        values: ``(word, integer)`` of the dictionary, in the order shown.
        turns: The keys of each turn.
    """

    id: str
    split: str
    values: tuple[tuple[str, int], ...]
    turns: tuple[tuple[str, ...], ...]

    @property
    def deltas(self) -> list[int]:
        """What each turn adds."""
        known = dict(self.values)
        return [sum(known[key] for key in keys) for keys in self.turns]

    @property
    def totals(self) -> list[int]:
        """The true total after each turn."""
        return list(accumulate(self.deltas))


def running_sum_episodes(
    n: int, horizon: int, keys_per_turn: int = 1, seed: int = 0, *, split: str = "test", size: int = SIZE
) -> list[Episode]:
    """``n`` episodes of ``horizon`` turns, the same ones for the same seed; splits are disjoint by dictionary and keys together.

    Args:
        size: Words in the dictionary.

    Raises:
        ValueError: unknown split, nothing to draw, or a dictionary larger than there are words.
    """
    splits.check_split(split)
    if n < 1 or horizon < 1 or keys_per_turn < 1 or not 1 <= size <= len(WORDS):
        raise ValueError(
            f"n={n}, horizon={horizon}, keys_per_turn={keys_per_turn}, size={size}: need 1 or more of each, and a dictionary of "
            f"{len(WORDS)} words at most."
        )
    rng = random.Random(f"running_sum-episodes-{split}-{seed}")
    found: list[Episode] = []
    while len(found) < n:
        known = tuple((word, rng.randint(*VALUES)) for word in rng.sample(WORDS, size))
        turns = tuple(tuple(rng.choice(known)[0] for _ in range(keys_per_turn)) for _ in range(horizon))
        if splits.split_of(f"{known}{turns}") == split:
            found.append(Episode(f"running_sum-{splits.digest(f'{known}{turns}')}", split, known, turns))
    return found


def problem(episode: Episode, said: Sequence[str] | None = None) -> Problem:
    """The next turn of an episode, as a conversation.

    Args:
        said: What the model answered on the turns before; default: the right answer on every turn but the last, which is then asked.

    Returns:
        A problem graded by its last number. The gold answer follows from the last answer *said* that can be read; ``meta["truth"]`` is
        the true total.

    Raises:
        ValueError: every turn was answered already.
    """
    said = [answer(total) for total in episode.totals[:-1]] if said is None else list(said)
    if len(said) >= len(episode.turns):
        raise ValueError(
            f"{len(said)} answers were given, and {episode.id} has {len(episode.turns)} turns: there is none left to ask."
        )
    messages: list[Message] = []
    for t, keys in enumerate(episode.turns[: len(said) + 1]):
        messages.append({"role": "user", "content": (_rules(episode) if t == 0 else "") + f"Keys: {', '.join(keys)}"})
        if t < len(said):
            messages.append({"role": "assistant", "content": said[t]})
    turn, keys_per_turn = len(said) + 1, len(episode.turns[0])
    before = kept([read_answer(text) for text in said])
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
    """A total in the form asked for."""
    return f"<answer>{total}</answer>"


def read_answer(text: str) -> int | None:
    """The last total in answer tags, or ``None``."""
    found = _ANSWER.findall(text)
    return int(found[-1]) if found else None


def play(episodes: Sequence[Episode], ask: Callable[[list[Problem]], list[str]]) -> list[Execution]:
    """Hold the conversations, all a turn at a time, each over the model's own answers.

    Args:
        ask: The answer text (without thinking) to each problem, such as of a batch of rollouts.

    Raises:
        ValueError: ``ask`` does not answer every problem.
    """
    said: list[list[str]] = [[] for _ in episodes]
    for t in range(max((len(e.turns) for e in episodes), default=0)):
        here = [i for i, e in enumerate(episodes) if t < len(e.turns)]
        texts = ask([problem(episodes[i], said[i]) for i in here])
        if len(texts) != len(here):
            raise ValueError(f"ask gave {len(texts)} answers to {len(here)} problems: it has to give one each, in order.")
        for i, text in zip(here, texts, strict=True):
            said[i].append(text)
    return [judge(kept([read_answer(text) for text in own]), e.deltas) for own, e in zip(said, episodes, strict=True)]


# --- self-conditioning ---------------------------------------------------------------------------------------


def inject_history_errors(
    messages: Sequence[Message], rate: float = ERROR_RATE, seed: int | str = 0, *, noise: int = NOISE
) -> tuple[Message, ...]:
    """The conversation with each past answer made wrong with probability ``rate``: off by 1 to ``noise``, never by 0.

    Raises:
        ValueError: a rate outside 0..1, no noise, or no answer in the history.
    """
    if not 0 <= rate <= 1 or noise < 1:
        raise ValueError(f"rate={rate}, noise={noise}: need a rate from 0 to 1, and noise of 1 at least.")
    if not any(m["role"] == "assistant" and _ANSWER.search(m["content"]) for m in messages):
        raise ValueError(
            f"None of the {len(messages)} messages is an answer <answer>total</answer> of the assistant: nothing to make wrong."
        )
    rng = random.Random(f"history-errors-{seed}")

    def wrong(m: Message) -> Message:
        total = read_answer(m["content"]) if m["role"] == "assistant" else None
        # Both draws are made whether used or not: with one seed, the errors at a low rate are among those at a higher one.
        hit, off = rng.random() < rate, rng.choice((-1, 1)) * rng.randint(1, noise)
        return {**m, "content": answer(total + off)} if total is not None and hit else m

    return tuple(wrong(m) for m in messages)


def with_history_errors(p: Problem, rate: float = ERROR_RATE, seed: int = 0) -> Problem:
    """A turn of an episode after wrong answers, other ones for each problem; its gold answer is what follows from the last of them.

    Raises:
        ValueError: as :func:`inject_history_errors`, or not a turn of an episode.
    """
    if "delta" not in p.meta:
        raise ValueError(f"{p.id} is of task {p.meta.get('task')!r} and has no turns: give a problem of episodes.problem(episode).")
    messages = inject_history_errors(p.messages, rate, f"{seed}-{p.id}")
    before = kept([read_answer(m["content"]) for m in messages if m["role"] == "assistant"])
    meta = {**p.meta, "error_rate": rate}
    return replace(p, id=f"{p.id}-errors{rate:g}-{seed}", messages=messages, answer=str(before[-1] + p.meta["delta"]), meta=meta)
