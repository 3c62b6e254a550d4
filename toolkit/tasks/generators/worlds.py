"""Worlds of generated facts: some people's facts are the same in every world, all others are drawn anew, and documents state them.

A fact is a person, a relation and a value, such as *the home of tal bor is oslo*. Each relation has two words, such as "home" and "house".
A document uses one of them, so a search with the other word may miss it.

A world has ``FAMILIAR`` people who are the same in all worlds. About 60 % of their possible facts are the same in all worlds too: those are
*lasting*, and a model that was trained on many worlds has them in its weights. All other facts differ between worlds, so only the
documents tell them. Some possible facts do not exist: no document states them.
"""

from __future__ import annotations

import random
from collections.abc import Mapping
from dataclasses import dataclass
from functools import cache, cached_property
from typing import Literal

Where = Literal["weights", "corpus", "neither"]

FIRST = (
    "tal", "mun", "kim", "ros", "vel", "dor", "lin", "sam", "pax", "ivo", "zed", "una",
    "gus", "hal", "nia", "oda", "bel", "cyr", "eli", "fay", "jan", "leo", "wes", "yan",
)  # fmt: skip
LAST = (
    "bor", "dan", "fisk", "gray", "hume", "kent", "lund", "marsh", "nash", "orr", "pike", "quill",
    "reed", "stone", "thorn", "ulm", "vance", "wood", "york", "zane", "ames", "boyd", "crane", "dale",
)  # fmt: skip
WORDS: Mapping[str, tuple[str, str]] = {
    "home": ("home", "house"), "job": ("job", "work"), "food": ("food", "meal"), "pet": ("pet", "animal"),
    "color": ("color", "tint"), "sport": ("sport", "game"), "teacher": ("teacher", "mentor"),
}  # fmt: skip
"""Relation -> its two words. The value of ``teacher`` is a person."""
VALUES: Mapping[str, tuple[str, ...]] = {
    "home": ("oslo", "rome", "paris", "lima", "cairo", "delhi", "quito", "tokyo", "sofia", "riga", "minsk", "dakar"),
    "job": ("baker", "pilot", "nurse", "clerk", "tailor", "miner", "judge", "farmer", "singer", "guard", "cook", "weaver"),
    "food": ("rice", "soup", "bread", "cheese", "beans", "fish", "pasta", "salad", "cake", "corn", "eggs", "plums"),
    "pet": ("cat", "dog", "horse", "goat", "parrot", "rabbit", "turtle", "duck", "snake", "mouse", "sheep", "owl"),
    "color": ("red", "blue", "green", "black", "white", "pink", "brown", "gold", "violet", "orange", "silver", "teal"),
    "sport": ("chess", "tennis", "rugby", "golf", "judo", "hockey", "darts", "polo", "squash", "boxing", "rowing", "skiing"),
}  # fmt: skip
TEACHER = "teacher"
RELATIONS = tuple(WORDS)
FAMILIAR, OTHERS = 40, 160  # people of a world
LASTING = 0.6  # probability that a possible fact of a familiar person is the same in every world
WRITTEN = 0.55  # probability that any other possible fact exists, in a document of the world


@dataclass(frozen=True)
class Fact:
    """A fact of a world and its document.

    Attributes:
        person: First and last name.
        relation: Key of ``WORDS``.
        value: One word, or a person if the relation is ``"teacher"``.
        lasting: True if the fact is the same in every world.
        word: Word of the relation that the document uses.
    """

    person: str
    relation: str
    value: str
    lasting: bool
    word: str

    @property
    def query(self) -> str:
        """The query that matches every distinctive word of the document."""
        return f"{self.person} {self.word}"

    @property
    def document(self) -> str:
        """The document that states the fact."""
        return f"{self.person} {self.word} is {self.value}"


@cache
def familiar() -> Mapping[tuple[str, str], str | None]:
    """Return the possible facts of familiar people, ``(person, relation) -> value``; ``None`` if the fact is not the same in every world."""
    rng = random.Random("searching-familiar")
    people = rng.sample([f"{first} {last}" for first in FIRST for last in LAST], FAMILIAR)
    return {
        (person, relation): _value(relation, people, rng) if rng.random() < LASTING else None
        for person in people
        for relation in RELATIONS
    }


@dataclass(frozen=True)
class World:
    """People, their facts, and documents that state the facts. Worlds of equal names are equal.

    Attributes:
        name: Name of the world, from which all random choices follow.
    """

    name: str

    @cached_property
    def people(self) -> tuple[str, ...]:
        """All people of the world; the familiar ones come first."""
        known = list(dict.fromkeys(person for person, _ in familiar()))
        rest = [person for first in FIRST for last in LAST if (person := f"{first} {last}") not in set(known)]
        return (*known, *random.Random(f"searching-people-{self.name}").sample(rest, OTHERS))

    @cached_property
    def facts(self) -> Mapping[tuple[str, str], Fact]:
        """``(person, relation)`` -> fact, for the facts that exist in this world."""
        rng, lasting, facts = random.Random(f"searching-facts-{self.name}"), familiar(), {}
        for person in self.people:
            for relation in RELATIONS:
                value, word = lasting.get((person, relation)), rng.choice(WORDS[relation])
                if value is not None:
                    facts[person, relation] = Fact(person, relation, value, True, word)
                elif rng.random() < WRITTEN:
                    facts[person, relation] = Fact(person, relation, _value(relation, self.people, rng), False, word)
        return facts

    @cached_property
    def documents(self) -> tuple[str, ...]:
        """The documents of all facts, in a random order."""
        documents = [fact.document for fact in self.facts.values()]
        random.Random(f"searching-order-{self.name}").shuffle(documents)
        return tuple(documents)

    @cached_property
    def hidden(self) -> frozenset[Fact]:
        """Facts that the best two results of ``Fact.query`` may lack, because two other documents match the query as well.

        For the query ``tal bor teacher``, ``lin hume teacher is tal bor`` is such a document.
        """
        facts = [(fact, set(fact.document.split())) for fact in self.facts.values() if fact.relation == TEACHER]
        return frozenset(fact for fact, _ in facts if sum(words.issuperset(fact.query.split()) for _, words in facts) > 2)

    def where(self, person: str, relation: str) -> Where:
        """Return where a possible fact can be found; a lasting fact, which is in the corpus too, counts as ``"weights"``."""
        fact = self.facts.get((person, relation))
        return "neither" if fact is None else "weights" if fact.lasting else "corpus"


def _value(relation: str, people: tuple[str, ...] | list[str], rng: random.Random) -> str:
    return rng.choice(people if relation == TEACHER else VALUES[relation])
