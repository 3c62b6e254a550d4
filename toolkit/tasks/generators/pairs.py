"""Keys and values in which threads run: what is asked, how a haystack is drawn, how it is solved exactly.

The haystacks of ``tasks.threading`` (Needle Threading, arXiv 2411.05000) before they are text: no model, no tokenizer.
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
MOST = 25  # steps, and threads or needles; the paper's largest
MARKER = "*"
TRIES = 10_000

_HEX, _BASE36 = "0123456789abcdef", "0123456789abcdefghijklmnopqrstuvwxyz"
_MANY_THREADS = ("multi", "conditional", "multithread")
_MANY_STEPS = ("thread", "multithread", "branched")


class ThreadError(ValueError):
    """A question about keys and values that makes no sense, or does not fit its haystack."""


@dataclass(frozen=True)
class Ask:
    """What is asked of a haystack.

    Attributes:
        kind: See ``threading.py``.
        steps: Pairs of a thread, 1 to 25; 1 for the kinds without threads.
        threads: Threads at once, or needles of ``multi`` and ``conditional``, 1 to 25.
        direction: Whether the pairs of a thread come in the order they are followed in, against it, or anywhere.
        depth: Share of the pairs before the needle of ``single``; ``None``: anywhere.
        clustered: Whether the needles of ``multi`` and ``conditional`` stand side by side.
        branches: Pairs that a key of a ``branched`` thread has, the right one included; the last step never branches.
        ids: ``"short"`` (four characters) or ``"uuid"`` (8-4-4-4-12).

    Raises:
        ThreadError: a value out of its range, or one that its kind has no use for.
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
        if broken := [rule for rule, kept in rules.items() if not kept]:
            raise ThreadError(f"kind={self.kind!r} with {'; '.join(broken)}.")


@dataclass(frozen=True)
class Pairs:
    """A haystack of keys and values, and what is asked of it.

    Attributes:
        pairs: ``(key, value)`` in the order of the text.
        needed: Index of each pair that has to be read, in reading order, thread after thread.
        starts: Keys named in the question (none in ``conditional``).
        answer: The values asked for.
    """

    ask: Ask
    pairs: tuple[tuple[str, str], ...]
    needed: tuple[int, ...]
    starts: tuple[str, ...]
    answer: tuple[str, ...]


# --- drawing -------------------------------------------------------------------------------------------------


@dataclass(frozen=True)
class Core:
    """What a question is about: its threads as chains of identifiers, the pairs of false branches, a source of other identifiers."""

    chains: list[list[str]]
    twigs: list[tuple[str, str]]
    new: Callable[[], str]
    key: str

    def __len__(self) -> int:
        return sum(len(chain) - 1 for chain in self.chains) + len(self.twigs)


def core_of(ask: Ask, split: str | None, seed: int, sample: int) -> Core:
    """What :func:`kv_haystack` builds around. Raises ValueError for an unknown split."""
    if split is not None:
        splits.check_split(split)
    key = f"threading-{split}-{seed}-{sample}-{replace(ask, depth=None)}"  # the same needle at every depth and length
    rng = random.Random(key)
    while True:
        new = fresh(rng, ask.ids)
        chains = [_chain(new, ask, rng) for _ in range(ask.threads)]
        if split is None or split_of(identifier for chain in chains for identifier in chain) == split:
            return Core(chains, _twigs(chains[0], ask, rng, new), new, key)


def split_of(identifiers: Iterable[str]) -> str:
    """The split of a haystack, by a hash of the identifiers in its needed pairs."""
    return splits.split_of(" ".join(sorted(set(identifiers))))


def kv_haystack(ask: Ask, n_pairs: int, *, split: str | None = None, seed: int = 0, sample: int = 0) -> Pairs:
    """A haystack of ``n_pairs`` pairs. What is needed depends on seed, sample and split, not on size or depth.

    Args:
        split: The split that the needed pairs fall in, by a hash of their identifiers; default: any.
        sample: Number of the haystack among those of this seed.

    Raises:
        ThreadError: more pairs are needed than there shall be.
        ValueError: unknown split.
    """
    core = core_of(ask, split, seed, sample)
    if len(core) > n_pairs:
        raise ThreadError(f"n_pairs={n_pairs} cannot hold the {len(core)} pairs of {ask}: give {len(core)} at least.")
    rng = random.Random(f"{core.key}-{n_pairs}")
    slots = _slots(ask, n_pairs, rng)
    if ask.kind == "conditional":
        slots.sort()  # its needles are named by no one: they come in the order of the text
    placed = {i: link for at, chain in zip(slots, core.chains, strict=True) for i, link in zip(at, pairwise(chain), strict=True)}
    free = [i for i in range(n_pairs) if i not in placed]
    placed.update(zip(rng.sample(free, len(core.twigs)), core.twigs, strict=True))
    pairs = tuple(placed[i] if i in placed else (core.new(), core.new()) for i in range(n_pairs))
    starts = () if ask.kind == "conditional" else tuple(chain[0] for chain in core.chains)
    return Pairs(ask, pairs, tuple(i for at in slots for i in at), starts, tuple(chain[-1] for chain in core.chains))


def fresh(rng: random.Random, ids: str, used: Iterable[str] = ()) -> Callable[[], str]:
    """A source of identifiers that never repeats; each has a digit, so that ``grading.identifiers`` knows it.

    Raises:
        ThreadError: asked for one more than there are.
    """
    used = set(used)

    def new() -> str:
        for _ in range(TRIES):
            if ids == "uuid":
                found = "-".join("".join(rng.choices(_HEX, k=k)) for k in (8, 4, 4, 4, 12))
            else:
                found = "".join(rng.choices(_BASE36, k=4))
            if found not in used and any(c.isdigit() for c in found):
                used.add(found)
                return found
        raise ThreadError(f"{len(used)} short identifiers are all there are at hand: ask for fewer pairs, or for ids='uuid'.")

    return new


def _chain(new: Callable[[], str], ask: Ask, rng: random.Random) -> list[str]:
    chain = [new() for _ in range(ask.steps + 1)]
    if ask.kind == "conditional":
        at = rng.randrange(1, len(chain[0]))
        chain[0] = chain[0][:at] + MARKER + chain[0][at:]
    return chain


def _twigs(chain: list[str], ask: Ask, rng: random.Random, new: Callable[[], str]) -> list[tuple[str, str]]:
    """Pairs of the false branches of a thread: each leaves it at some key and ends before the thread does."""
    found = []
    for j in range(ask.steps - 1):
        for _ in range(ask.branches - 1):
            false = [chain[j], *(new() for _ in range(rng.randint(1, ask.steps - 1 - j)))]
            found += list(pairwise(false))
    return found


def _slots(ask: Ask, n_pairs: int, rng: random.Random) -> list[list[int]]:
    """Positions of the pairs of each thread."""
    count = ask.threads * ask.steps
    if ask.depth is not None:
        return [[round(ask.depth * (n_pairs - 1))]]
    if ask.clustered:
        start = rng.randint(0, n_pairs - count)
        taken = rng.sample(range(start, start + count), count)
    else:
        taken = rng.sample(range(n_pairs), count)
    found = [taken[i : i + ask.steps] for i in range(0, count, ask.steps)]
    if ask.direction == "random":
        return found
    return [sorted(at, reverse=ask.direction == "backward") for at in found]


# --- solving -------------------------------------------------------------------------------------------------


def solve(pairs: Sequence[tuple[str, str]], kind: Kind, starts: Sequence[str]) -> tuple[str, ...]:
    """The answer read off ``pairs`` alone, by following every branch from each start: the verifier of the generator.

    A start that is no key gives itself. Of several longest branches the first is taken. Raises ThreadError for a thread without end.
    """
    if kind == "conditional":
        return tuple(value for key, value in pairs if MARKER in key)
    after: dict[str, list[str]] = {}
    for key, value in pairs:
        after.setdefault(key, []).append(value)

    def walk(path: tuple[str, ...]) -> tuple[str, ...]:
        if path[-1] in path[:-1]:
            raise ThreadError(f"The thread from {path[0]!r} comes back to {path[-1]!r} after {len(path) - 1} steps: it has no end.")
        return max((walk((*path, value)) for value in after.get(path[-1], [])), key=len, default=path)

    return tuple(walk((start,))[-1] for start in starts)
