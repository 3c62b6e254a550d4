"""Questions about the characters of a word, after CharBench (arXiv 2508.02591).

There are four kinds of question about a word. Each answer is a number:

- ``count``: how often a character occurs;
- ``distinct``: how many different characters there are;
- ``first``, ``last``: the index, from 0, of a character's first or last occurrence.

Upper and lower case count as different characters. The paper finds that accuracy in counting hardly depends on how a word is cut into
tokens, and that accuracy in finding an index falls with longer tokens.

Deviations: the paper takes words of 4 to 10 letters from a corpus. ``load`` makes up words of these lengths instead, so that a model cannot
have memorised them. Consonants and vowels alternate, and each word has at most five different letters, so that letters repeat.
``char_tasks`` takes words of your choice. The tokens of a word are those in the whole question, which may differ from those of the word
alone. If a token reaches beyond the word, only its characters inside the word are counted.

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
    """Return one question about ``word``. An answer is graded by the last number in it.

    Args:
        kind: ``"count"``: how often ``character`` occurs. ``"distinct"``: how many different characters the word has. ``"first"``,
            ``"last"``: position of the first or last occurrence of ``character``, counted from 0 at the start of the word.
        character: One character of the word; required by all kinds except ``distinct``, which ignores it.
        split: Split to record in ``meta``. Default: the split given by a hash of the word.

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
    """Return the right answer to a question of kind ``kind`` about ``word`` and ``character``.

    >>> gold("banana", "last", "a")
    5

    Args:
        kind: ``"count"``: how often the character occurs. ``"distinct"``: how many different characters the word has. ``"first"``,
            ``"last"``: position of the first or last occurrence of the character, counted from 0 at the start of the word.
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
    """Return one question per word, all of the same kind.

    Args:
        words: Words to ask about.
        tokenizer: If given, each question's ``meta`` also tells how the word is cut into tokens (see ``token_tags``).
        kind: ``"count"``: how often a random character of the word occurs. ``"first"``, ``"last"``: index of the first or last occurrence
            of a random character of the word. ``"distinct"``: how many different characters the word has.
        seed: Seed of the random characters.

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
        kinds: Kinds of question, one or several of ``"count"``, ``"distinct"``, ``"first"``, ``"last"``; ``char_tasks`` explains them.
        lengths: Inclusive range of word lengths in characters.
        tokenizer: If given, each question's ``meta`` also tells how the word is cut into tokens (see ``token_tags``).

    Raises:
        ValueError: unknown split or kind, a kind that is given twice, a range of lengths that is empty or begins below 2, or fewer than
            ``n`` different questions.
        NoOffsetsError: the tokenizer gives no character offsets.
    """
    splits.check_split(split)
    low, high = lengths
    if not kinds or set(kinds) - set(KINDS):
        raise ValueError(f"kinds={tuple(kinds)}: choose some of {', '.join(KINDS)}.")
    if len(set(kinds)) < len(kinds):
        raise ValueError(f"kinds={tuple(kinds)}: a kind occurs twice. Give each kind once; every kind gets equally many questions.")
    if not 2 <= low <= high:
        raise ValueError(f"lengths={lengths}: give an inclusive range of word lengths from 2 up, such as {LENGTHS}.")
    rng = random.Random(f"characters-{split}-{seed}")

    def draw(kind: str) -> Problem:
        while splits.split_of(word := made_up(rng, rng.randint(low, high))) != split:
            pass
        return problem(word, kind, None if kind == "distinct" else rng.choice(word))

    # Each kind gets n / len(kinds) questions (earlier kinds one more if this is not whole). Then one question per kind is taken in turn.
    share = [len(range(i, n, len(kinds))) for i in range(len(kinds))]
    drawn = [iter(splits.distinct(lambda kind=kind: draw(kind), m)) for kind, m in zip(kinds, share, strict=True)]  # type: ignore[misc]
    problems = [p for _ in range(max(share, default=0)) for questions in drawn for p in islice(questions, 1)]
    return problems if tokenizer is None else [tagged(p, tokenizer) for p in problems]


def made_up(rng: random.Random, length: int) -> str:
    """Return a made-up word of ``length`` letters, in which consonants and vowels alternate.

    Each word uses at most three different consonants and two different vowels, drawn at random. So letters repeat.
    """
    few = ("".join(rng.sample(_CONSONANTS, 3)), "".join(rng.sample(_VOWELS, 2)))
    first = rng.randrange(2)
    return "".join(rng.choice(few[(first + i) % 2]) for i in range(length))


# --- tokens of the word --------------------------------------------------------------------------------------


def tagged(p: Problem, tokenizer: PreTrainedTokenizerBase) -> Problem:
    """Return a copy of the problem ``p`` with the numbers from ``token_tags`` added to its ``meta``."""
    return replace(p, meta={**p.meta, **token_tags(p, tokenizer)})


def token_tags(p: Problem, tokenizer: PreTrainedTokenizerBase) -> dict[str, float]:
    """Return numbers that describe how the word of a question is cut into tokens.

    Returns:
        Three numbers by name. ``n_tokens``: number of tokens that contain a character of the word. ``chars_per_token``: length of the word
        in characters, divided by ``n_tokens``. ``target_token_len``: for a question that asks for an index (kind ``"first"`` or
        ``"last"``), length in characters of the token that holds the character at this index; NaN for other kinds. Only the token's
        characters inside the word are counted.

    Raises:
        NoOffsetsError: the tokenizer gives no character offsets.
        ValueError: ``p`` is not a problem of ``tasks.characters``.
    """
    if "word" not in p.meta or p.meta.get("kind") not in KINDS:
        raise ValueError(f"{p.id} is of task {p.meta.get('task')!r}: give a problem of characters.load or char_tasks.")
    if not tokenizer.is_fast:
        raise NoOffsetsError(
            f"{type(tokenizer).__name__} gives no character offsets, so the tokens of a word are unknown: load the fast tokenizer "
            "(a tokenizer.json in the directory)."
        )
    content, word = p.messages[-1]["content"], p.meta["word"]
    start = content.rindex(f'"{word}"') + 1  # after the opening quote
    offsets = tokenizer(content, add_special_tokens=False, return_offsets_mapping=True, verbose=False)["offset_mapping"]
    # Character range of each token that overlaps the word, cut to the word.
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
    """Return a table of correlations between the features of problems and correctness, one row per question kind and feature.

    Features: ``word_length`` (characters); ``gold`` (the right answer); ``gold_share`` (the right answer divided by the word length); and
    the three numbers from ``token_tags``, if the problems have them in ``meta``.

    Columns: ``kind, feature, n`` (number of problems), ``r`` (Pearson's correlation), and ``low, high`` (95 % bootstrap interval of ``r``;
    the bootstrap resamples words). If ``r`` is positive, answers are right more often when the feature is larger. ``r`` is NaN if the
    feature has the same value in all problems, if all answers are right, or if all are wrong.

    Args:
        problems: Problems of ``tasks.characters``.
        correct: One flag per problem: True if the model's answer is right.
        seed: Seed of the bootstrap.

    Raises:
        ValueError: there are no problems, or ``correct`` does not have one flag per problem.
    """
    if not problems or len(problems) != len(correct):
        raise ValueError(f"{len(correct)} answers to {len(problems)} problems: give one each, and at least one.")
    rows = pd.DataFrame([_features(p) | {"correct": float(c)} for p, c in zip(problems, correct, strict=True)])
    correlations = []
    for kind, part in rows.groupby("kind", sort=False):
        for feature in (f for f in FEATURES if f in part):
            known = part.dropna(subset=[feature])  # target_token_len is NaN for two of the kinds
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
