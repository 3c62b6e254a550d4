"""Synthetic episodes that ``tiny-searcher`` was trained on: thinking, searches, results, judgements of results, and an answer.

The text of an episode, without its think tags::

    asked : tal bor home .                           the question again; left out at random
    i know tal bor home is oslo .                    a fact from memory
    <search> tal bor home </search>                  a search; the result stands after it
    irrelevant .                                     no document of the result states the fact
    relevant : tal bor house is oslo .               a document states it
    no answer .                                      no result stands after the search, because there is no tool
    not found .                                      the search is given up

Episodes are imperfect on purpose, so that training with rewards can improve the model. All mistakes are random, with the probabilities in
``Habits``.
"""

from __future__ import annotations

import random
from collections.abc import Callable, Sequence
from dataclasses import dataclass, field

from toolkit.tasks.generators.worlds import FAMILIAR, RELATIONS, TEACHER, VALUES, WORDS, World, familiar
from toolkit.tasks.searching import MAX_CALLS, UNKNOWN
from toolkit.types import Problem


@dataclass(frozen=True)
class Habits:
    """Probabilities of the random decisions in an episode.

    If the prompt has a cue word, such as "quick", the episode is *hasty*: other probabilities apply to some decisions.

    Attributes:
        recap: The question is repeated.
        recap_hasty: The same in a hasty episode.
        oversearch: A fact in the weights is searched for nevertheless.
        oversearch_hasty: The same in a hasty episode.
        invent: A fact that is not in the weights is made up instead of searched for.
        invent_hasty: The same in a hasty episode.
        slip: A fact in the weights is remembered wrongly.
        sloppy: The first query for a fact lacks a word.
        overlook: A document that states the fact is judged irrelevant.
        trust: A document that does not state the fact is judged relevant.
        again: After the fact was found, it is searched for once more; never in a hasty episode.
        give_up: After an irrelevant result, the search is given up although something is left to try.
        give_up_hasty: The same in a hasty episode.
        fall_back: After a search without success, a fact in the weights is remembered.
        guess: After the search was given up, a value is made up.
        no_tool: Nothing answers the searches of the episode.
    """

    recap: float = 0.5
    recap_hasty: float = 0.1
    oversearch: float = 0.4
    oversearch_hasty: float = 0.12
    invent: float = 0.12
    invent_hasty: float = 0.35
    slip: float = 0.04
    sloppy: float = 0.2
    overlook: float = 0.04
    trust: float = 0.12
    again: float = 0.1
    give_up: float = 0.12
    give_up_hasty: float = 0.35
    fall_back: float = 0.8
    guess: float = 0.15
    no_tool: float = 0.08


@dataclass
class Episode:
    """A synthetic episode while it is written.

    Attributes:
        pieces: Pairs (text, True if the model is to write it). Results are not.
        answered: True if a tool answers searches.
        calls: Number of searches so far.
        answer: Text after the think tags.
    """

    answered: bool = True
    pieces: list[tuple[str, bool]] = field(default_factory=list)
    calls: int = 0
    answer: str = ""


@dataclass(frozen=True)
class Writer:
    """Writes synthetic episodes about a world.

    Attributes:
        world: The world of the problems.
        search: Function that returns the result of a query, such as the method ``search`` of ``searching.corpus(world)``.
        habits: Probabilities of the random decisions.
    """

    world: World
    search: Callable[[str], str]
    habits: Habits = Habits()

    def write(self, p: Problem, rng: random.Random) -> Episode:
        """Return a random episode for a problem about the world, as training data. Its answer may be wrong.

        Args:
            p: A problem from ``searching.problem`` with this world.
            rng: Source of every random choice.
        """
        episode, person, hasty = Episode(rng.random() >= self.habits.no_tool), p.meta["person"], p.meta["cue"]
        words, relations = p.meta["words"], p.meta["relations"]
        if rng.random() < (self.habits.recap_hasty if hasty else self.habits.recap):
            episode.pieces.append((f"asked : {person} {' '.join(words)} .", True))
        for hop, (relation, word) in enumerate(zip(relations, words, strict=True)):
            if hop:
                episode.pieces.append((f"so {person} {word} .", True))
            value = self._hop(episode, (person, relation), word, hasty, rng)
            if value is None:
                episode.answer = UNKNOWN
                return episode
            person = value
        episode.answer = person
        return episode

    def recall_drill(self, rng: random.Random, facts: int = 8) -> Episode:
        """Return an episode in which every lasting fact is remembered and every other fact is searched for, without results.

        It is a dense lesson in knowing, and in knowing what is not known. Half of the facts are lasting.
        """
        known = [(person, relation) for (person, relation), value in familiar().items() if value is not None]
        episode = Episode()
        for _ in range(facts):
            if rng.random() < 0.5:
                person, relation = rng.choice(known)
            else:
                people = self.world.people[: FAMILIAR if rng.random() < 0.5 else None]
                person, relation = rng.choice(people), rng.choice(RELATIONS)
            word, fact = rng.choice(WORDS[relation]), self.world.facts.get((person, relation))
            episode.pieces.append((f"so {person} {word} .", False))
            if fact is not None and fact.lasting:
                episode.pieces.append((f"i know {person} {word} is {fact.value} .", True))
            else:
                episode.pieces.append((f"<search> {person} {word} </search>", True))
        return episode

    def opening(self, p: Problem) -> str:
        """Return the first move for a problem without mistakes: a lasting fact from memory, or the search for any other fact."""
        person, word = p.meta["person"], p.meta["words"][0]
        fact = self.world.facts.get((person, p.meta["relations"][0]))
        if fact is not None and fact.lasting:
            return f"i know {person} {word} is {fact.value} ."
        return f"<search> {person} {word} </search>"

    def judging_drill(self, rng: random.Random, searches: int = 4) -> Episode:
        """Return an episode of searches for unrelated facts, without mistakes; only the judgements are to be written by the model.

        It is a dense lesson in judging: an ordinary episode has one or two judgements, some of them wrong.
        """
        episode = Episode()
        for _ in range(searches):
            person, relation = rng.choice(self.world.people), rng.choice(RELATIONS)
            word, query = rng.choice(WORDS[relation]), rng.choice(WORDS[relation])
            at = len(episode.pieces)
            self._judged(episode, (person, relation), f"{person} {query}", rng, checking=True)
            episode.pieces[at:-1] = [(f"so {person} {word} .", False), *((text, False) for text, _ in episode.pieces[at:-1])]
        return episode

    def _hop(self, episode: Episode, step: tuple[str, str], word: str, hasty: bool, rng: random.Random) -> str | None:
        """Write the part of an episode that finds one fact. Return its value, or ``None`` if it was not found."""
        (person, relation), habits = step, self.habits
        fact = self.world.facts.get(step)
        lasting = fact.value if fact is not None and fact.lasting else None
        if lasting is not None:
            remember = 1 - (habits.oversearch_hasty if hasty else habits.oversearch)
        else:
            remember = habits.invent_hasty if hasty else habits.invent
        searched = rng.random() >= remember
        if searched and (value := self._searched(episode, step, word, hasty, rng)) is not None:
            return value
        if not searched or (lasting is not None and rng.random() < habits.fall_back):
            value = lasting if lasting is not None and rng.random() >= habits.slip else self._made_up(relation, rng)
            episode.pieces.append((f"i know {person} {word} is {value} .", True))
            return value
        episode.pieces.append(("not found .", True))
        if rng.random() >= habits.guess:
            return None
        value = self._made_up(relation, rng)
        episode.pieces.append((f"guess {value} .", True))
        return value

    def _searched(self, episode: Episode, step: tuple[str, str], word: str, hasty: bool, rng: random.Random) -> str | None:
        """Write the searches for one fact. Return its value, or ``None`` if it was not found."""
        (person, relation), habits = step, self.habits
        both = (word, *(other for other in WORDS[relation] if other != word))
        queries = [f"{person} {each}" for each in both]
        if rng.random() < habits.sloppy:
            first, last = person.split()
            queries.insert(0, rng.choice((f"{first} {word}", f"{last} {word}", person, word)))
        found = None
        for at, query in enumerate(queries):
            if episode.calls == MAX_CALLS:
                break
            if not episode.answered:
                episode.pieces.append((f"<search> {query} </search> no answer .", True))
                break
            document = self._judged(episode, step, query, rng, checking=found is not None)
            if found is not None:
                break
            if document is not None:
                found = document.partition(" is ")[2]
                if hasty or rng.random() >= habits.again:
                    break
            elif at + 1 < len(queries) and rng.random() < (habits.give_up_hasty if hasty else habits.give_up):
                break
        return found

    def _judged(self, episode: Episode, step: tuple[str, str], query: str, rng: random.Random, *, checking: bool) -> str | None:
        """Write one search, its result and the judgement. Return the document that was judged relevant, or ``None``.

        Args:
            checking: True to make no mistake, as after the fact was found.
        """
        (person, relation), habits = step, self.habits
        result = self.search(query)
        episode.calls += 1
        episode.pieces += [(f"<search> {query} </search>", True), (f"<result>{result}</result>", False)]
        documents = result.split("\n")
        stating = [d for d in documents if d.startswith(tuple(f"{person} {word} is " for word in WORDS[relation]))]
        right = rng.random() >= (habits.overlook if stating else habits.trust) or checking
        if stating and right:
            relevant = stating[0]
        elif stating or right:
            relevant = None
        else:
            relevant = _tempting(documents, relation)
        episode.pieces.append(("irrelevant ." if relevant is None else f"relevant : {relevant} .", True))
        return relevant

    def _made_up(self, relation: str, rng: random.Random) -> str:
        return rng.choice(self.world.people if relation == TEACHER else VALUES[relation])


def _tempting(documents: Sequence[str], relation: str) -> str | None:
    """Return the document that is mistaken for one that states a fact: the first about the relation, else the first with one word as value."""
    about = [d for d in documents if set(d.split()) & set(WORDS[relation])]
    others = [d for d in documents if " is " in d and len(d.partition(" is ")[2].split()) == 1]
    return next(iter(about or ([] if relation == TEACHER else others)), None)
