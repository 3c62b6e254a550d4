"""Grading: ``grade`` compares an answer with the gold answer; the module ``execution`` checks running totals turn by turn."""

from toolkit.tasks.grading.answers import (
    RECALL,
    contains,
    facts_right,
    identifiers,
    last_number,
    numbered_parts,
    same_words,
    word_recall,
)
from toolkit.tasks.grading.graders import READ_OF_META, grade, problems_of

__all__ = [
    "READ_OF_META",
    "RECALL",
    "contains",
    "facts_right",
    "grade",
    "identifiers",
    "last_number",
    "numbered_parts",
    "problems_of",
    "same_words",
    "word_recall",
]
