"""Metrics by which conditions are judged: their table, their comparison with base over problems and seeds (``Judge``), their text format.

A condition is a model with the interventions it runs under; base is the unchanged model. Every comparison, board, demo and report uses
this package.
"""

from toolkit.metrics.effects import Judge, MetricEffect, cell, with_interval
from toolkit.metrics.outcomes import Outcomes, assumed_aes
from toolkit.metrics.table import METRICS, Metric, described

__all__ = ["METRICS", "Judge", "Metric", "MetricEffect", "Outcomes", "assumed_aes", "cell", "described", "with_interval"]
