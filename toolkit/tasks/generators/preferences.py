"""Draw preference data whose true dimensions are known: questions, responses made by rule, and pairs of which an annotator prefers one.

A question asks for one value in a few notes. A response is right or wrong in each of five *dimensions*, independently:

* ``correct``: it states the value in the notes; otherwise another value of the same kind, which the notes do not hold.
* ``concise``: it has no filler; otherwise 1 to 4 sentences that say nothing. Only this dimension changes the length much.
* ``relevant``: its second sentence is about the subject; otherwise about something else.
* ``polite``: it opens with a courtesy; otherwise with a rude sentence of about the same length.
* ``formatted``: each sentence is on a line of its own that begins with ``- ``; otherwise they form a paragraph.

An *annotator* has a utility, and prefers the response of higher utility, or draws by the Bradley-Terry model. A weight on the number of
words makes an annotator with a length bias.

>>> question = questions("train", 1)[0]
>>> print(respond(question, (1, 1, 1, 1, 0)).text)
It is a pleasure. The door of the cellar is grey. The notes say so about the cellar.
"""

from __future__ import annotations

import math
import random
from collections.abc import Sequence
from dataclasses import dataclass

from toolkit.tasks import splits

DIMENSIONS = ("correct", "concise", "relevant", "polite", "formatted")
"""Names of the dimensions, in the order of ``Response.quality``."""

Quality = tuple[int, ...]
"""One 0 (bad) or 1 (good) per dimension, in the order of ``DIMENSIONS``."""

SUBJECTS = (
    "mill", "harbour", "bridge", "orchard", "market", "garden", "tower", "quarry", "ferry", "chapel", "museum", "canal",
    "castle", "school", "prison", "bakery", "stable", "cellar", "palace", "temple", "library", "station", "theatre", "farm",
)  # fmt: skip
_NAMES = (
    "Anna",
    "Boris",
    "Clara",
    "David",
    "Emma",
    "Felix",
    "Greta",
    "Hugo",
    "Ida",
    "Jonas",
    "Karl",
    "Lena",
    "Oscar",
    "Paula",
    "Vera",
)
_COLOURS = ("red", "blue", "green", "yellow", "black", "white", "brown", "grey", "orange", "purple", "pink", "gold")
_HOURS = tuple(f"{hour} o'clock" for hour in ("two", "three", "four", "five", "six", "seven", "eight", "nine", "ten", "eleven"))
# Statement with the places of subject and value, question, values.
_ATTRIBUTES = (
    ("The {subject} is cleaned by {value}.", "Who cleans the {subject}?", _NAMES),
    ("The {subject} is guarded by {value}.", "Who guards the {subject}?", _NAMES),
    ("The {subject} is painted {value}.", "Which colour is the {subject}?", _COLOURS),
    ("The door of the {subject} is {value}.", "Which colour is the door of the {subject}?", _COLOURS),
    ("The {subject} opens at {value}.", "When does the {subject} open?", _HOURS),
    ("The {subject} closes at {value}.", "When does the {subject} close?", _HOURS),
)
_POLITE = (
    "Thank you for asking.",
    "I am happy to help.",
    "That is a good question.",
    "You are very welcome here.",
    "It is a pleasure.",
)
_RUDE = (
    "Read it yourself.",
    "You are wasting my time.",
    "That is a stupid question.",
    "Stop asking me this.",
    "Leave me alone now.",
)
_RELEVANT = (
    "The notes name the {subject} clearly.", "The notes say so about the {subject}.", "This is the note on the {subject}.",
    "One note is about the {subject}.",
)  # fmt: skip
_OFF_TOPIC = (
    "My cousin plays the violin badly.", "Bananas grow in warm countries.", "Some whales sing at night.",
    "A new comet was seen again.", "Chess was played in Persia.", "Wool socks shrink in hot water.",
)  # fmt: skip
_FILLER = (
    "There are many things that one could say here.", "As is well known, questions of this kind have answers.",
    "It is worth taking a moment to think about that.", "All in all, everything has been considered with care.",
    "To put it in other words, this is how things are.", "Needless to say, one should always read with attention.",
    "At the end of the day, it comes down to this.", "In this context, a few more words may be in order.",
)  # fmt: skip
NOTES, MOST_FILLER = 3, 4  # notes per question; largest number of filler sentences


@dataclass(frozen=True)
class Question:
    """A question about one of a few notes.

    Attributes:
        id: Identifier; equal prompts have equal ones.
        prompt: Notes, question, and the request for a polite, brief list.
        subject: What the question is about, such as ``"mill"``.
        answer: The right value.
        wrong: Values of the same kind that the notes do not hold.
        statement: The answer's sentence, with ``{value}`` in place of the value.
    """

    id: str
    prompt: str
    subject: str
    answer: str
    wrong: tuple[str, ...]
    statement: str


@dataclass(frozen=True)
class Segment:
    """A sentence of a response.

    Attributes:
        start: Index of its first character in the response's text.
        stop: Index after its last character.
        role: ``"opening"``, ``"answer"``, ``"support"`` or ``"filler"``.
        error: The dimension that the sentence breaks, such as ``"polite"``; None for a good sentence. ``formatted`` is a property of the
            whole response and never the error of a segment.
    """

    start: int
    stop: int
    role: str
    error: str | None


@dataclass(frozen=True)
class Response:
    """A response made by rule.

    Attributes:
        text: The response.
        quality: Its true quality per dimension, 0 or 1.
        segments: Its sentences, in order. They cover the text except for spaces, line breaks and list markers.
    """

    text: str
    quality: Quality
    segments: tuple[Segment, ...]

    @property
    def words(self) -> int:
        """Number of words; list markers do not count."""
        return sum(len(self.text[s.start : s.stop].split()) for s in self.segments)


@dataclass(frozen=True)
class Annotator:
    """A source of preferences with a stated utility: ``sum_k weights[k] * quality[k] + length * words``.

    Attributes:
        weights: Weight of each dimension, in the order of ``DIMENSIONS``.
        length: Utility per word: above 0 for an annotator who likes long responses.
        temperature: 0: the response of higher utility is preferred. Otherwise response a is preferred to b with probability
            ``sigma((U(a) - U(b)) / temperature)``, sigma the logistic function.
    """

    weights: tuple[float, ...] = (2.0, 1.0, 1.0, 0.5, 0.5)
    length: float = 0.0
    temperature: float = 0.0

    def __post_init__(self) -> None:
        if len(self.weights) != len(DIMENSIONS) or self.temperature < 0:
            raise ValueError(
                f"{len(self.weights)} weights and temperature={self.temperature}: give one weight for each of {', '.join(DIMENSIONS)}, "
                "and a temperature of 0 or more."
            )

    def utility(self, response: Response) -> float:
        """Return the utility of a response. Higher is better.

        >>> round(Annotator().utility(Response("No.", (1, 0, 1, 0, 1), ())), 2)
        3.5
        """
        return sum(w * q for w, q in zip(self.weights, response.quality, strict=True)) + self.length * response.words


@dataclass(frozen=True)
class Pair:
    """Two responses to one question, of which the annotator prefers ``chosen``.

    Attributes:
        question: The question.
        chosen: The preferred response.
        rejected: The other one.
        margin: Utility of ``chosen`` minus that of ``rejected``. It is negative if a draw went against the utility.
    """

    question: Question
    chosen: Response
    rejected: Response
    margin: float


# --- drawing -------------------------------------------------------------------------------------------------


def questions(split: str, n: int, seed: int = 0) -> list[Question]:
    """Return ``n`` questions with different prompts. A hash of the prompt decides the split, so splits are disjoint.

    Args:
        split: ``"train"``, ``"dev"`` or ``"test"``.
        n: Number of questions.
        seed: Seed of the draw.

    Raises:
        ValueError: unknown split.
    """
    splits.check_split(split)
    rng = random.Random(f"preferences-{split}-{seed}")
    drawn: dict[str, Question] = {}
    while len(drawn) < n:
        question = _question(rng)
        if splits.split_of(question.prompt) == split:
            drawn.setdefault(question.id, question)
    return list(drawn.values())


def respond(question: Question, quality: Sequence[int], seed: int = 0) -> Response:
    """Return a response of the given quality. Other seeds give other words.

    Args:
        question: The question.
        quality: 0 or 1 per dimension, in the order of ``DIMENSIONS``.
        seed: Seed of the choice of words.

    Raises:
        ValueError: not one 0 or 1 per dimension.
    """
    if len(quality) != len(DIMENSIONS) or not set(quality) <= {0, 1}:
        raise ValueError(f"quality={tuple(quality)}: give 0 or 1 for each of {', '.join(DIMENSIONS)}.")
    good = dict(zip(DIMENSIONS, map(bool, quality), strict=True))
    rng = random.Random(f"{question.id}-{tuple(quality)}-{seed}")
    sentences = [
        ("opening", rng.choice(_POLITE if good["polite"] else _RUDE), "polite"),
        ("answer", question.statement.format(value=question.answer if good["correct"] else rng.choice(question.wrong)), "correct"),
        ("support", rng.choice(_RELEVANT if good["relevant"] else _OFF_TOPIC).format(subject=question.subject), "relevant"),
    ]
    if not good["concise"]:
        sentences += [("filler", text, "concise") for text in rng.sample(_FILLER, rng.randint(1, MOST_FILLER))]
    before, between = ("- ", "\n- ") if good["formatted"] else ("", " ")
    text, segments = before, []
    for i, (role, sentence, dimension) in enumerate(sentences):
        text += between if i else ""
        segments.append(Segment(len(text), len(text) + len(sentence), role, None if good[dimension] else dimension))
        text += sentence
    return Response(text, tuple(map(int, quality)), tuple(segments))


def sample(question: Question, n: int, seed: int = 0, rates: Sequence[float] | None = None) -> list[Response]:
    """Return ``n`` random responses to one question, as a policy would sample them; dimensions are drawn independently.

    Args:
        question: The question.
        n: Number of responses; two may be equal.
        seed: Seed of the draw.
        rates: Probability of a good response per dimension, in the order of ``DIMENSIONS``. Default: one half each.

    Raises:
        ValueError: not one probability per dimension.
    """
    rates = (0.5,) * len(DIMENSIONS) if rates is None else tuple(rates)
    if len(rates) != len(DIMENSIONS) or not all(0 <= p <= 1 for p in rates):
        raise ValueError(f"rates={rates}: give a probability for each of {', '.join(DIMENSIONS)}.")
    rng = random.Random(f"{question.id}-sample-{seed}")
    return [respond(question, [int(rng.random() < p) for p in rates], rng.randrange(2**32)) for _ in range(n)]


def pairs(
    split: str, n: int, seed: int = 0, annotator: Annotator = Annotator(), rates: Sequence[float] | None = None
) -> list[Pair]:
    """Return ``n`` pairs of responses, each to another question, with the preference of an annotator.

    The two responses of a pair differ in utility.

    Args:
        split: ``"train"``, ``"dev"`` or ``"test"``.
        n: Number of pairs.
        seed: Seed of questions, responses and preferences.
        annotator: Source of the preferences.
        rates: Probability of a good response per dimension, as for ``sample``.

    Raises:
        ValueError: unknown split, or no response to a question differs in utility from another in a thousand draws.
    """
    return [_pair(question, f"{split}-{seed}", annotator, rates) for question in questions(split, n, seed)]


def _pair(question: Question, key: str, annotator: Annotator, rates: Sequence[float] | None) -> Pair:
    rng = random.Random(f"{question.id}-pair-{key}")
    for _ in range(1000):
        a, b = sample(question, 2, rng.randrange(2**32), rates)
        margin = annotator.utility(a) - annotator.utility(b)
        if margin == 0:
            continue
        first = margin > 0 if annotator.temperature == 0 else rng.random() < _sigma(margin / annotator.temperature)
        return Pair(question, a, b, margin) if first else Pair(question, b, a, -margin)
    raise ValueError(
        f"No two responses of different utility in 1000 draws: {annotator} with rates={rates}. Change weights or rates."
    )


def _sigma(x: float) -> float:
    return 1 / (1 + math.exp(-x)) if x >= 0 else math.exp(x) / (1 + math.exp(x))


def _question(rng: random.Random) -> Question:
    statement, question, values = rng.choice(_ATTRIBUTES)
    subjects, held = rng.sample(SUBJECTS, NOTES), rng.sample(values, NOTES)
    at = rng.randrange(NOTES)
    notes = " ".join(statement.format(subject=s, value=v) for s, v in zip(subjects, held, strict=True))
    prompt = (
        f"Notes: {notes}\nQuestion: {question.format(subject=subjects[at])}\n"
        "Answer politely and briefly, as a list with one sentence per line."
    )
    wrong = tuple(v for v in values if v not in held)
    return Question(
        f"preferences-{splits.digest(prompt)}", prompt, subjects[at], held[at], wrong, statement.replace("{subject}", subjects[at])
    )
