"""Metrics of conditions: the table of all metrics (``METRICS``), comparison of conditions with base (``Judge``), and text of table cells.

A condition is a model together with the interventions under which it runs. Base is the unchanged model. Every comparison, board, demo and
report uses this package.
"""

from toolkit.metrics.effects import Judge, MetricEffect, cell, row_cell, share_of, with_interval
from toolkit.metrics.outcomes import Outcomes, assumed_aes, right_within
from toolkit.metrics.table import METRICS, RANGES, Metric, described

__all__ = [
    "METRICS",
    "RANGES",
    "Judge",
    "Metric",
    "MetricEffect",
    "Outcomes",
    "assumed_aes",
    "cell",
    "described",
    "right_within",
    "row_cell",
    "share_of",
    "with_interval",
]
