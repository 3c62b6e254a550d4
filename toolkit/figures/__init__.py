"""Plotly figures of tables and other values; no function here runs a model or reads a file.

Each function returns a plotly ``Figure``, which Jupyter shows and saved pages embed.
"""

from toolkit.figures.atlas import agreement, attention, lenses
from toolkit.figures.axes import axis_effects
from toolkit.figures.base import COLOURS
from toolkit.figures.board import chain_accuracy, head_change, highlighted, metric_differences, pareto, state_shifts
from toolkit.figures.claimed import claimed
from toolkit.figures.entropy import coefficients, correlation, entropy_by_position, entropy_filtering, phase_entropy
from toolkit.figures.heads import head_scores
from toolkit.figures.judges import class_recalls, over_optimisation
from toolkit.figures.length import (
    accuracy_at_budgets,
    accuracy_by_length,
    by_layer,
    by_level,
    differences,
    direction_norms,
    length_accuracy,
    length_distribution,
)
from toolkit.figures.retrieval import masking_curve, masking_forms, recall, recall_by_length, sparsity, stability, thinking_or_not
from toolkit.figures.rewards import reward_by_length, reward_pushes
from toolkit.figures.searching import price_of_accuracy
from toolkit.figures.steering import damage, dose_response, target_lengths
from toolkit.figures.training import learning_curves, length_against_accuracy
from toolkit.figures.why import reasons

__all__ = [
    "COLOURS",
    "accuracy_at_budgets",
    "accuracy_by_length",
    "agreement",
    "attention",
    "axis_effects",
    "by_layer",
    "by_level",
    "chain_accuracy",
    "claimed",
    "class_recalls",
    "coefficients",
    "correlation",
    "damage",
    "differences",
    "direction_norms",
    "dose_response",
    "entropy_by_position",
    "entropy_filtering",
    "head_change",
    "head_scores",
    "highlighted",
    "learning_curves",
    "length_accuracy",
    "length_against_accuracy",
    "length_distribution",
    "lenses",
    "masking_curve",
    "masking_forms",
    "metric_differences",
    "over_optimisation",
    "pareto",
    "phase_entropy",
    "price_of_accuracy",
    "reasons",
    "recall",
    "recall_by_length",
    "reward_by_length",
    "reward_pushes",
    "sparsity",
    "stability",
    "state_shifts",
    "target_lengths",
    "thinking_or_not",
]
