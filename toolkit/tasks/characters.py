"""Questions about the characters of a word. CharBench (arXiv 2508.02591).

There are four kinds of question about a word, each answered by a number. ``count``: how often a character occurs. ``distinct``: how
many different characters there are. ``first`` and ``last``: the index of a character's first or last occurrence. Indices start at 0;
case matters. The paper finds that counting hardly depends on how a word is cut into tokens, and that indexing fails with long tokens.

Deviations: the paper takes words of 4 to 10 letters from a corpus. ``load`` makes words up (alternating consonants and vowels), so that
no word is memorised and letters repeat; ``char_tasks`` takes given words. The tokens of a word are taken from the whole question as the
tokenizer splits it. If a token reaches beyond the word, only its characters inside the word are counted.

Units: lengths of words and tokens are in characters.
"""

from __future__ import annotations

import math
import random
from collections.abc import Sequence
from dataclasses import replace
from itertools import islice

import pandas as pd
from transformers import PreTrainedTokenizerBase

from toolkit import stats
from toolkit.tasks import splits
from toolkit.tasks.haystack import NoOffsetsError
from toolkit.types import Problem

KINDS = ("count", "distinct", "first", "last")
LENGTHS = (4, 10)
FEATURES = ("word_length", "gold", "gold_share", "n_tokens", "chars_per_token", "target_token_len")

_CONSONANTS, _VOWELS = "bdfgklmnprstvz", "aeiou"


def problem(word: str, kind: str, character: str | None = None, *, split: str | None = None) -> Problem:
    """Return one question about a word, graded by the last number of the answer.

    Args:
        kind: One of ``KINDS``.
        character: The character that is counted or searched for; not used by ``distinct``.
        split: Split to record in ``meta``; by default a hash of the word decides.

    Raises:
        ValueError: an unknown kind, an empty word or one with white space, or a character that is not in the word.
    """
    if kind not in KINDS:
        raise ValueError(f"kind={kind!r}: choose one of {', '.join(KINDS)}.")
    if not word or any(c.isspace() for c in word):
        raise ValueError(f"{word!r} is not a word: give text without white space.")
    if kind == "distinct":
        character = None
    elif character is None or len(character) != 1 or character not in word:
        raise ValueError(f"character={character!r} with kind={kind!r}: give one of the characters of {word!r}.")
    content = f"{_question(word, kind, character)} Answer with the number only."
    meta = {
        "task": "characters",
        "split": split or splits.split_of(word),
        "difficulty": len(word),
        "kind": kind,
        "word": word,
        "character": character,
    }
    return Problem(
        f"characters-{kind}-{word}-{character or ''}",
        ({"role": "user", "content": content},),
        str(gold(word, kind, character)),
        meta,
    )


def gold(word: str, kind: str, character: str | None = None) -> int:
    """Return the right answer to a question of this kind about ``word`` and ``character``.

    >>> gold("banana", "last", "a")
    5
    """
    match kind:
        case "count":
            return word.count(character or "")
        case "distinct":
            return len(set(word))
        case "first":
            return word.find(character or "")
    return word.rfind(character or "")


def _question(word: str, kind: str, character: str | None) -> str:
    match kind:
        case "count":
            return f'How many times does the character "{character}" occur in the word "{word}"?'
        case "distinct":
            return f'How many different characters are there in the word "{word}"?'
    return f'What is the index of the {kind} occurrence of the character "{character}" in the word "{word}"? Indices start at 0.'


def char_tasks(
    words: Sequence[str], tokenizer: PreTrainedTokenizerBase | None = None, kind: str = "count", seed: int = 0
) -> list[Problem]:
    """Return one question per word, about a character drawn from that word.

    Args:
        kind: One of ``KINDS``.
        tokenizer: If given, ``meta`` also holds the ``token_tags`` of the word.

    Raises:
        ValueError: unknown kind, or a word that is empty or has white space.
        NoOffsetsError: the tokenizer gives no character offsets.
    """
    rng = random.Random(f"characters-{kind}-{seed}")
    problems = [problem(word, kind, rng.choice(word) if word and kind != "distinct" else None) for word in words]
    return problems if tokenizer is None else [tagged(p, tokenizer) for p in problems]


def load(
    split: str = "test",
    n: int = 200,
    seed: int = 0,
    *,
    kinds: Sequence[str] = KINDS,
    lengths: tuple[int, int] = LENGTHS,
    tokenizer: PreTrainedTokenizerBase | None = None,
) -> list[Problem]:
    """Return ``n`` different questions about made-up words, cycling through ``kinds``. Equal seeds give equal questions.

    All questions about a word are in one split.

    Args:
        kinds: Some of ``KINDS``.
        lengths: Inclusive range of word lengths in characters.
        tokenizer: If given, ``meta`` also holds the ``token_tags`` of the word.

    Raises:
        ValueError: unknown split or kind, a range of lengths that is empty or begins below 2, or fewer than ``n`` different questions.
        NoOffsetsError: the tokenizer gives no character offsets.
    """
    splits.check_split(split)
    low, high = lengths
    if not kinds or set(kinds) - set(KINDS):
        raise ValueError(f"kinds={tuple(kinds)}: choose some of {', '.join(KINDS)}.")
    if not 2 <= low <= high:
        raise ValueError(f"lengths={lengths}: give an inclusive range of word lengths from 2 up, such as {LENGTHS}.")
    rng = random.Random(f"characters-{split}-{seed}")

    def draw(kind: str) -> Problem:
        while splits.split_of(word := made_up(rng, rng.randint(low, high))) != split:
            pass
        return problem(word, kind, None if kind == "distinct" else rng.choice(word))

    share = [len(range(i, n, len(kinds))) for i in range(len(kinds))]
    drawn = [iter(splits.distinct(lambda kind=kind: draw(kind), m)) for kind, m in zip(kinds, share, strict=True)]  # type: ignore[misc]
    problems = [p for _ in range(max(share, default=0)) for questions in drawn for p in islice(questions, 1)]
    return problems if tokenizer is None else [tagged(p, tokenizer) for p in problems]


def made_up(rng: random.Random, length: int) -> str:
    """Return a pronounceable word without meaning: alternating consonants and vowels, from five letters, so that some letters repeat."""
    few = ("".join(rng.sample(_CONSONANTS, 3)), "".join(rng.sample(_VOWELS, 2)))
    first = rng.randrange(2)
    return "".join(rng.choice(few[(first + i) % 2]) for i in range(length))


# --- tokens of the word --------------------------------------------------------------------------------------


def tagged(p: Problem, tokenizer: PreTrainedTokenizerBase) -> Problem:
    """Return the problem with its ``token_tags`` added to ``meta``."""
    return replace(p, meta={**p.meta, **token_tags(p, tokenizer)})


def token_tags(p: Problem, tokenizer: PreTrainedTokenizerBase) -> dict[str, float]:
    """Return numbers that describe how the word of a question is cut into tokens.

    Returns:
        ``n_tokens``: number of tokens that contain a character of the word. ``chars_per_token``: length of the word divided by
        ``n_tokens``. ``target_token_len``: for ``first`` and ``last``, the length of the token that holds the occurrence asked about
        (only its characters inside the word); NaN for the other kinds.

    Raises:
        NoOffsetsError: the tokenizer gives no character offsets.
        ValueError: the problem is not of this task.
    """
    if "word" not in p.meta or p.meta.get("kind") not in KINDS:
        raise ValueError(f"{p.id} is of task {p.meta.get('task')!r}: give a problem of characters.load or char_tasks.")
    if not tokenizer.is_fast:
        raise NoOffsetsError(
            f"{type(tokenizer).__name__} gives no character offsets, so the tokens of a word are unknown: load the fast tokenizer "
            "(a tokenizer.json in the directory)."
        )
    content, word = p.messages[-1]["content"], p.meta["word"]
    start = content.rindex(f'"{word}"') + 1
    offsets = tokenizer(content, add_special_tokens=False, return_offsets_mapping=True, verbose=False)["offset_mapping"]
    held = [(max(a, start), min(b, start + len(word))) for a, b in offsets if a < start + len(word) and b > start]
    target = math.nan
    if p.meta["kind"] in ("first", "last"):
        at = start + int(p.answer)
        target = float(next((b - a for a, b in held if a <= at < b), math.nan))
    return {
        "n_tokens": float(len(held)),
        "chars_per_token": len(word) / len(held) if held else math.nan,
        "target_token_len": target,
    }


def feature_correlations(problems: Sequence[Problem], correct: Sequence[bool], *, seed: int = 0) -> pd.DataFrame:
    """Return how correctness correlates (Pearson's r) with each feature, one row per kind of question and feature.

    Features: ``word_length``; ``gold`` (the right answer); ``gold_share`` (the right answer divided by the word length); and the three
    ``token_tags``, if the problems have them.

    Columns: ``kind, feature, n`` (problems), ``r``, and ``low, high`` (95 % interval from resampling words). A positive ``r`` means that
    answers are right more often if the feature is larger. ``r`` is NaN if the feature or the correctness never varies.

    Args:
        correct: Whether the answer to each problem is right.

    Raises:
        ValueError: no problems, or different numbers of problems and answers.
    """
    if not problems or len(problems) != len(correct):
        raise ValueError(f"{len(correct)} answers to {len(problems)} problems: give one each, and at least one.")
    rows = pd.DataFrame([_features(p) | {"correct": float(c)} for p, c in zip(problems, correct, strict=True)])
    correlations = []
    for kind, part in rows.groupby("kind", sort=False):
        for feature in (f for f in FEATURES if f in part):
            known = part.dropna(subset=[feature])
            e = (math.nan,) * 3
            if len(known):
                x, y = (known[name].to_numpy(float) for name in (feature, "correct"))
                r = stats.correlation(x, y, known["word"].to_numpy(str), seed=seed)
                e = (r.mean, r.low, r.high)
            correlations.append((kind, feature, len(known), *e))
    return pd.DataFrame(correlations, columns=["kind", "feature", "n", "r", "low", "high"])


def _features(p: Problem) -> dict[str, object]:
    n, right = len(p.meta["word"]), int(p.answer)
    features = {"kind": p.meta["kind"], "word": p.meta["word"], "word_length": n, "gold": right, "gold_share": right / n}
    return features | {name: p.meta[name] for name in FEATURES if name in p.meta}
