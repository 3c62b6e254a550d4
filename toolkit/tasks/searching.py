"""Questions about people that the shipped model ``tiny-searcher`` answers from its weights, by searching a corpus, or not at all.

A prompt reads ``what is the home of tal bor ?``, or ``what is the pet of the teacher of tal bor ?``, which takes two facts (*hops*). ``meta["where"]`` says where the facts are:

- ``"weights"``: in the weights of the model, since they were the same in every world of its training. They are in the corpus too.
- ``"corpus"``: in the corpus, and at least one of them was different in other worlds, so the weights cannot hold it.
- ``"neither"``: nowhere, since one of them does not exist. The gold answer is "unknown".

``toolbox`` returns the search tool over the same corpus. Words are separated by blanks, as in the vocabulary of the model.
"""

from __future__ import annotations

import random
from functools import cache

from toolkit.tasks import splits
from toolkit.tasks.generators import cues
from toolkit.tasks.generators.worlds import FAMILIAR, RELATIONS, TEACHER, WORDS, Where, World
from toolkit.tools import Search, Tool, Toolbox
from toolkit.types import Problem

SHIPPED = World("shipped")  # the world of the problems and of the corpus; the model is trained on others
UNKNOWN = "unknown"  # gold answer of a question that has no answer
SHARES: dict[str, float] = {"weights": 0.35, "corpus": 0.4, "neither": 0.25}
TWO_HOPS = 0.25  # share of questions that take two facts
FAMILIAR_SHARE = 0.35  # of the questions that need the corpus; so a person's name does not tell where a fact is
MAX_CALLS = 5
DOCUMENTS = 2  # per result
QUESTIONS = (
    "what is the {word} of {whom} ?", "{whom} {word} ?", "tell me the {word} of {whom} .",
    "which {word} has {whom} ?", "say the {word} of {whom} .", "the {word} of {whom} is ?",
)  # fmt: skip


def problem(rng: random.Random, split: str, *, world: World = SHIPPED, where: str | None = None) -> Problem:
    """Draw random questions until one belongs to ``split``, and return it as a problem.

    A hash decides the split: of the question's wording if all facts are in the weights, else of the last fact that is not. So the last fact
    that a model learns from the corpus in training is not asked for in the test split. The first fact of a question with two steps may be: in
    41 of 300 test questions, a fact outside the weights also occurs in 1,500 training questions.

    Args:
        rng: Source of every random choice.
        split: ``"train"``, ``"dev"`` or ``"test"``.
        world: World that the question is about.
        where: Wanted value of ``meta["where"]``; ``None`` draws it with the probabilities ``SHARES``.
    """
    wanted = where or rng.choices(list(SHARES), list(SHARES.values()))[0]
    hops = 1 + (rng.random() < TWO_HOPS)
    while True:
        known = wanted == "weights" or rng.random() < FAMILIAR_SHARE
        person = rng.choice(world.people[:FAMILIAR] if known else world.people[FAMILIAR:])
        last = rng.choice([r for r in RELATIONS if hops == 1 or r != TEACHER])
        relations = (last,) if hops == 1 else (TEACHER, last)
        path = _path(world, person, relations)
        words = tuple(rng.choice(WORDS[relation]) for relation in relations)
        whom = person if hops == 1 else f"the {words[0]} of {person}"
        question = rng.choice(QUESTIONS).format(word=words[-1], whom=whom)
        sources = [world.where(*step) for step in path]
        outside = [" ".join(step) for step, source in zip(path, sources, strict=True) if source != "weights"]
        facts = [fact for step in path if (fact := world.facts.get(step))]
        if not world.hidden.isdisjoint(facts):
            continue
        if _worst(sources) == wanted and splits.split_of(outside[-1] if outside else question) == split:
            break
    content, word = cues.with_word(question, rng, cue_share=0.2, neutral_share=0.2)
    meta = {
        "task": "searching",
        "split": split,
        "difficulty": hops,
        "grader": "exact",
        "where": wanted,
        "answerable": wanted != "neither",
        "hops": hops,
        "person": person,
        "relations": relations,
        "words": words,
        "sources": tuple(sources),
        "gold_queries": tuple(fact.query for fact in facts),
        "gold_documents": tuple(fact.document for fact in facts),
        "needed_calls": len(outside),
        "word": word,
        "cue": word in cues.CUES,
    }
    answer = UNKNOWN if wanted == "neither" else facts[-1].value
    return Problem(f"searching-{content}", ({"role": "user", "content": content},), answer, meta)


def load(split: str, n: int = 200, seed: int = 0, *, where: str | None = None) -> list[Problem]:
    """Return ``n`` different problems of ``split`` ("train", "dev" or "test"). Equal seeds give equal problems.

    Args:
        where: Wanted value of ``meta["where"]``: ``"weights"``, ``"corpus"`` or ``"neither"``; ``None`` for all three, in the shares ``SHARES``.

    Raises:
        ValueError: unknown split, unknown ``where``, or fewer than ``n`` different problems.
    """
    splits.check_split(split)
    if where is not None and where not in SHARES:
        raise ValueError(f"where={where!r}: choose one of {', '.join(SHARES)}, or None for all of them.")
    rng = random.Random(f"searching-{split}-{seed}")
    return splits.distinct(lambda: problem(rng, split, where=where), n)


@cache
def corpus(world: World = SHIPPED) -> Search:
    """Return the search over the documents of a world.

    Raises:
        ImportError: bm25s is not installed.
    """
    return Search(world.documents, top=DOCUMENTS)


def toolbox() -> Toolbox:
    """Return the tools of ``tiny-searcher``: ``<search>QUERY</search>``, answered with the best two documents of the corpus.

    Raises:
        ImportError: bm25s is not installed.
    """
    return Toolbox((Tool(corpus().search),), max_calls=MAX_CALLS)


def _path(world: World, person: str, relations: tuple[str, ...]) -> list[tuple[str, str]]:
    """Return the possible facts that a question needs, in order, up to the first that does not exist."""
    path = []
    for relation in relations:
        path.append((person, relation))
        fact = world.facts.get((person, relation))
        if fact is None:
            break
        person = fact.value
    return path


def _worst(sources: list[Where]) -> Where:
    return "neither" if "neither" in sources else "corpus" if "corpus" in sources else "weights"
