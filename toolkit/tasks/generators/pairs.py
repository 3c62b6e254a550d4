"""Draw haystacks: lists of random pairs of key and value, each with a question and its answer. No model or tokenizer is needed.

``tasks.threading`` turns these haystacks into prompts (Needle Threading, arXiv 2411.05000).
"""

from __future__ import annotations

import random
from collections.abc import Callable, Iterable, Sequence
from dataclasses import dataclass, replace
from itertools import pairwise
from typing import Literal

from toolkit.tasks import splits

Kind = Literal["single", "multi", "conditional", "thread", "multithread", "branched"]
Direction = Literal["forward", "backward", "random"]
MOST = 25  # largest number of steps, threads or needles, as in the paper
MARKER = "*"  # marks the keys that a question of kind "conditional" asks about
TRIES = 10_000  # draws before identifiers are said to be used up

_HEX, _BASE36 = "0123456789abcdef", "0123456789abcdefghijklmnopqrstuvwxyz"
_MANY_THREADS = ("multi", "conditional", "multithread")
_MANY_STEPS = ("thread", "multithread", "branched")


class ThreadError(ValueError):
    """A question about keys and values is not possible with the given arguments.

    Examples: an ``Ask`` (kind of question, with its settings) has a setting that its kind does not use; the JSON object has too few pairs
    for the question; a chain of pairs, in which each value is the next key, leads back to one of its own keys.
    """


@dataclass(frozen=True)
class Ask:
    """A kind of question about a haystack of keys and values, with its settings.

    A *thread* is a chain of pairs in which the value of each pair is the key of the next.

    Attributes:
        kind: ``"single"``: the value of one key. ``"multi"``: the values of several keys. ``"conditional"``: the values of all keys that
            contain the marker ``*``. ``"thread"``: the last value of one thread, given its first key. ``"multithread"``: the last values of
            several threads. ``"branched"``: the last value of the longest branch of a thread.
        steps: Pairs per thread, at most 25. At least 2 for ``branched``; 1 for the kinds without threads.
        threads: Number of threads, 1 to 25; 1 for ``thread`` and ``branched``. For the kinds without threads, number of pairs asked about
            (*needles*); 1 for ``single``.
        direction: Order of a thread's pairs in the text. ``"forward"``: the order in which the thread is followed; ``"backward"``: the
            reverse; ``"random"``: any order.
        depth: Only for ``single``: place of the needle in the text, from 0 (first pair) to 1 (last pair); ``None``: a random place.
        clustered: Only for ``multi`` and ``conditional``: if True, the needles are next to each other.
        branches: Only for ``branched``, at least 2: number of pairs that have the same key, for each key of the thread except the last. One
            of them continues the thread; each of the others begins a false branch. 1 for the other kinds.
        ids: Format of keys and values: ``"short"`` (four characters) or ``"uuid"`` (32 hexadecimal digits in groups of 8-4-4-4-12).

    Raises:
        ThreadError: a value is out of its range, or set although its kind does not use it.
    """

    kind: Kind = "thread"
    steps: int = 1
    threads: int = 1
    direction: Direction = "forward"
    depth: float | None = None
    clustered: bool = False
    branches: int = 1
    ids: Literal["short", "uuid"] = "short"

    def __post_init__(self) -> None:
        rules = {
            f"steps={self.steps}: 1 to {MOST}": 1 <= self.steps <= MOST,
            f"threads={self.threads}: 1 to {MOST}": 1 <= self.threads <= MOST,
            f"steps={self.steps}: more than one only with {', '.join(_MANY_STEPS)}": self.steps == 1 or self.kind in _MANY_STEPS,
            f"threads={self.threads}: more than one only with {', '.join(_MANY_THREADS)}": self.threads == 1
            or self.kind in _MANY_THREADS,
            f"depth={self.depth}: from 0 to 1, only with single": self.depth is None
            or (self.kind == "single" and 0 <= self.depth <= 1),
            "clustered: only with multi, conditional": not self.clustered or self.kind in ("multi", "conditional"),
            f"branches={self.branches}, steps={self.steps}: 2 or more of each with branched, otherwise one branch": (
                min(self.branches, self.steps) >= 2 if self.kind == "branched" else self.branches == 1
            ),
        }
        if broken := [rule for rule, holds in rules.items() if not holds]:
            raise ThreadError(f"kind={self.kind!r} with {'; '.join(broken)}.")


@dataclass(frozen=True)
class Pairs:
    """A haystack (a list of random pairs of key and value), and a question about it.

    Some questions follow a *thread*: a chain of pairs in which each value is the key of the next pair.

    Attributes:
        ask: Kind of question, with its settings.
        pairs: All pairs ``(key, value)``, in the order of the text.
        needed: Indices in ``pairs`` of the pairs that the answer depends on. All pairs of one thread, in the order in which they are
            followed, come before those of the next.
        starts: Keys that the question names: the first key of each thread, or each key whose value is asked for. Empty for ``conditional``.
        answer: The values that answer the question, one per thread or per pair asked about.
    """

    ask: Ask
    pairs: tuple[tuple[str, str], ...]
    needed: tuple[int, ...]
    starts: tuple[str, ...]
    answer: tuple[str, ...]


# --- drawing -------------------------------------------------------------------------------------------------


@dataclass(frozen=True)
class Core:
    """The pairs of key and value that a question is about; ``kv_haystack`` puts them among random pairs.

    Attributes:
        chains: The threads that lead to the answer, one list per thread. In a thread, each value is the key of the next pair, so the list
            holds the first key and then the values. For the kinds without threads, there is one list per key asked about: the key and its
            value.
        twigs: Pairs that lead away from the answer (false branches). Only for the kind ``branched``, in which a key occurs several times.
        new: Function that returns a new random key or value, different from all others.
        key: Seed text. ``kv_haystack`` seeds its random numbers with it, to draw where these pairs stand in the haystack.
    """

    chains: list[list[str]]
    twigs: list[tuple[str, str]]
    new: Callable[[], str]
    key: str

    def __len__(self) -> int:
        return sum(len(chain) - 1 for chain in self.chains) + len(self.twigs)


def core_of(ask: Ask, split: str | None, seed: int, sample: int) -> Core:
    """Draw the pairs of key and value that a question is about, and return them as a Core. ``kv_haystack`` puts them among random pairs.

    Args:
        ask: Kind of question, with its settings.
        split: ``"train"``, ``"dev"`` or ``"test"``; ``None``: any. A hash of the keys and values that the answer depends on decides it.
        seed: Seed of the draw.
        sample: Index of the draw, from 0. With the other arguments equal, each index gives different pairs.

    Raises:
        ValueError: unknown split.
    """
    if split is not None:
        splits.check_split(split)
    key = f"threading-{split}-{seed}-{sample}-{replace(ask, depth=None)}"  # the same needle at every depth and length
    rng = random.Random(key)
    while True:
        new = new_identifiers(rng, ask.ids)
        chains = [_chain(new, ask, rng) for _ in range(ask.threads)]
        if split is None or split_of(identifier for chain in chains for identifier in chain) == split:
            return Core(chains, _twigs(chains[0], ask, rng, new), new, key)


def split_of(identifiers: Iterable[str]) -> str:
    """Return the split (train, dev or test) of a question about keys and values, by a hash of ``identifiers``.

    Args:
        identifiers: The keys and values of the pairs that the answer depends on.
    """
    return splits.split_of(" ".join(sorted(set(identifiers))))


def kv_haystack(ask: Ask, n_pairs: int, *, split: str | None = None, seed: int = 0, sample: int = 0) -> Pairs:
    """Return a random haystack: ``n_pairs`` pairs of key and value, with a question and its answer.

    The pairs that the answer depends on are the same for every ``n_pairs`` and ``ask.depth``; only their places differ.

    Args:
        ask: Kind of question, with its settings.
        split: ``"train"``, ``"dev"`` or ``"test"``. A hash of the keys and values that the answer depends on decides it. Default: any.
        seed: Seed of the draw.
        sample: Index of the draw, from 0. With the other arguments equal, each index gives a different haystack.

    Raises:
        ThreadError: the question needs more than ``n_pairs`` pairs.
        ValueError: unknown split.
    """
    core = core_of(ask, split, seed, sample)
    if len(core) > n_pairs:
        raise ThreadError(f"n_pairs={n_pairs} cannot hold the {len(core)} pairs of {ask}: give at least {len(core)}.")
    rng = random.Random(f"{core.key}-{n_pairs}")
    slots = _slots(ask, n_pairs, rng)
    if ask.kind == "conditional":
        slots.sort()  # the question names no needle, so the answer follows the order of the text
    # Index in the haystack -> pair. The needed pairs are placed first, then the false branches; random pairs fill the rest.
    placed = {i: link for at, chain in zip(slots, core.chains, strict=True) for i, link in zip(at, pairwise(chain), strict=True)}
    free = [i for i in range(n_pairs) if i not in placed]
    placed.update(zip(rng.sample(free, len(core.twigs)), core.twigs, strict=True))
    pairs = tuple(placed[i] if i in placed else (core.new(), core.new()) for i in range(n_pairs))
    starts = () if ask.kind == "conditional" else tuple(chain[0] for chain in core.chains)
    return Pairs(ask, pairs, tuple(i for at in slots for i in at), starts, tuple(chain[-1] for chain in core.chains))


def new_identifiers(rng: random.Random, ids: str, used: Iterable[str] = ()) -> Callable[[], str]:
    """Return a function that draws one new random identifier (a key or a value of a JSON object) per call.

    An identifier always contains a digit, so that ``grading.identifiers`` recognises it in an answer. The returned function raises
    ThreadError if it finds no unused identifier.

    Args:
        ids: Format: ``"short"`` (four characters) or ``"uuid"``.
        used: Identifiers that must not be drawn.
    """
    used = set(used)

    def new() -> str:
        for _ in range(TRIES):
            if ids == "uuid":
                identifier = "-".join("".join(rng.choices(_HEX, k=k)) for k in (8, 4, 4, 4, 12))
            else:
                identifier = "".join(rng.choices(_BASE36, k=4))
            if identifier not in used and any(c.isdigit() for c in identifier):
                used.add(identifier)
                return identifier
        raise ThreadError(f"No new short identifier after {len(used)}: ask for fewer pairs, or for ids='uuid'.")

    return new


def _chain(new: Callable[[], str], ask: Ask, rng: random.Random) -> list[str]:
    chain = [new() for _ in range(ask.steps + 1)]
    if ask.kind == "conditional":
        at = rng.randrange(1, len(chain[0]))  # the marker goes inside the key, not at its ends
        chain[0] = chain[0][:at] + MARKER + chain[0][at:]
    return chain


def _twigs(chain: list[str], ask: Ask, rng: random.Random, new: Callable[[], str]) -> list[tuple[str, str]]:
    """Draw the pairs of false branches: chains that leave a thread at one of its keys and end before the thread does.

    A thread is a chain of pairs in which each value is the key of the next pair. At every key of the thread except the last,
    ``ask.branches - 1`` false branches begin. Each is shorter than the rest of the thread from there.

    Args:
        chain: The thread: its first key, and then the value of each pair.
        ask: Kind of question, with its settings.
        rng: Source of every random choice.
        new: Function that returns a new random key or value.
    """
    twigs = []
    for j in range(ask.steps - 1):
        for _ in range(ask.branches - 1):
            false = [chain[j], *(new() for _ in range(rng.randint(1, ask.steps - 1 - j)))]
            twigs += list(pairwise(false))
    return twigs


def _slots(ask: Ask, n_pairs: int, rng: random.Random) -> list[list[int]]:
    """Draw the places, in a haystack of ``n_pairs`` pairs, of those pairs that the answer depends on.

    Return one list per thread (a chain of pairs in which each value is the next key): the indices of its pairs, from 0, in the order in
    which they are followed. For kinds of question without threads, there is one list per key asked about.
    """
    count = ask.threads * ask.steps
    if ask.depth is not None:
        return [[round(ask.depth * (n_pairs - 1))]]
    if ask.clustered:
        start = rng.randint(0, n_pairs - count)
        taken = rng.sample(range(start, start + count), count)
    else:
        taken = rng.sample(range(n_pairs), count)
    slots = [taken[i : i + ask.steps] for i in range(0, count, ask.steps)]
    if ask.direction == "random":
        return slots
    return [sorted(at, reverse=ask.direction == "backward") for at in slots]


# --- solving -------------------------------------------------------------------------------------------------


def solve(pairs: Sequence[tuple[str, str]], kind: Kind, starts: Sequence[str]) -> tuple[str, ...]:
    """Return the answer to a question about ``pairs``: for each key in ``starts``, the last value of the longest chain that begins there.

    In a chain, each value is the key of the next pair. If a key occurs several times, the chain branches. If several branches are longest,
    the one counts whose first pair stands first in ``pairs``. An element of ``starts`` that is not a key is returned as its own answer. For
    the kind ``conditional``, the answer is the values of all keys that contain the marker ``*``.

    The tests compare the answers of random haystacks with those of this function.

    Args:
        pairs: All pairs ``(key, value)`` of the haystack.
        kind: Kind of question, as in ``Ask``.
        starts: Keys named in the question; not used by ``conditional``.

    Raises:
        ThreadError: a chain leads back to one of its own keys.

    >>> solve([("a1", "b2"), ("b2", "c3")], "thread", ["a1"])
    ('c3',)
    """
    if kind == "conditional":
        return tuple(value for key, value in pairs if MARKER in key)
    after: dict[str, list[str]] = {}
    for key, value in pairs:
        after.setdefault(key, []).append(value)

    def longest(path: tuple[str, ...]) -> tuple[str, ...]:
        if path[-1] in path[:-1]:
            raise ThreadError(f"The thread from {path[0]!r} comes back to {path[-1]!r} after {len(path) - 1} steps: it has no end.")
        return max((longest((*path, value)) for value in after.get(path[-1], [])), key=len, default=path)

    return tuple(longest((start,))[-1] for start in starts)
