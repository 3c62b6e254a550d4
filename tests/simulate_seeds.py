"""False alarms and coverage of the seeds' rule (``toolkit.stats.seeds``) on boards where nothing is true.

    python tests/simulate_seeds.py

prints a row per setting: the chance of any star over ``CONDITIONS`` null conditions after Holm's correction, and how often a 95 % interval
covers, each beside Satterthwaite's approximation. Outcomes are right or wrong, 8 samples per problem; seeds spread by a multiple of
the problems' error. ``tests/board/test_board_statistics.py`` runs it small.
"""

from __future__ import annotations

import itertools
from dataclasses import dataclass

import numpy as np
from numpy import ndarray
from scipy import stats as scipy_stats

from toolkit import stats

CONDITIONS, SAMPLES, LEVEL = 40, 8, 0.05


@dataclass(frozen=True)
class Boards:
    """Differences to base whose truth is 0, ``[boards, conditions]``: estimates and the two variances of the rule."""

    mean: ndarray
    by_problem: ndarray
    by_seed: ndarray
    problems: int
    seeds: int

    def reach(self, alpha: float) -> ndarray:
        """Half the interval by the rule."""
        return np.asarray(stats.half_width(alpha, self.by_problem, self.by_seed, self.problems, self.seeds))

    def satterthwaite(self, alpha: float) -> ndarray:
        """Half the interval with estimated degrees of freedom."""
        both = self.by_problem + self.by_seed
        df = both**2 / (self.by_problem**2 / (self.problems - 1) + self.by_seed**2 / (self.seeds - 1))
        return scipy_stats.t.isf(alpha / 2, df) * np.sqrt(both)


def null_boards(rng: np.random.Generator, boards: int, *, seeds: int, problems: int, spread: float) -> Boards:
    """Boards on which no condition differs from base but by chance.

    A response is right with the problem's chance, moved by what the condition does to that problem (the same for its seeds), and by
    what a seed does to all problems: ``spread`` times the problems' error.
    """
    moved, noise = 0.06, 0.24 / SAMPLES
    error = np.sqrt((moved**2 + noise * (1 + 1 / seeds)) / problems)
    true = rng.uniform(0.3, 0.7, (boards, 1, 1, problems))
    base = rng.binomial(SAMPLES, true) / SAMPLES
    own = (
        true
        + rng.normal(0, moved, (boards, CONDITIONS, 1, problems))
        + rng.normal(0, spread * error, (boards, CONDITIONS, seeds, 1))
    )
    change = rng.binomial(SAMPLES, np.clip(own, 0, 1)) / SAMPLES - base
    by_problem = change.mean(axis=2).var(axis=-1, ddof=1) / problems
    return Boards(change.mean(axis=(2, 3)), by_problem, change.mean(axis=3).var(axis=2, ddof=1) / seeds, problems, seeds)


def family_wise(found: Boards, reach: str = "reach") -> float:
    """Share of boards with a star: Holm's first step compares the smallest p of all with the level over their number."""
    return float((np.abs(found.mean) > getattr(found, reach)(LEVEL / CONDITIONS)).any(axis=1).mean())


def coverage(found: Boards, reach: str = "reach") -> float:
    """Share of 95 % intervals that hold 0."""
    return float((np.abs(found.mean) <= getattr(found, reach)(LEVEL)).mean())


def main(boards: int = 2000, block: int = 20) -> None:
    """Print the table."""
    print("seeds problems spread | family-wise: rule, Satterthwaite | coverage: rule, Satterthwaite")
    rng = np.random.default_rng(0)
    for seeds, problems, spread in itertools.product((2, 3, 5), (40, 120, 260), (0.0, 0.5, 1.0, 2.0, 3.0)):
        rows = []
        for _ in range(boards // block):
            found = null_boards(rng, block, seeds=seeds, problems=problems, spread=spread)
            rows.append([f(found, way) for f in (family_wise, coverage) for way in ("reach", "satterthwaite")])
        alarm, old_alarm, covered, old_covered = np.mean(rows, axis=0)
        print(f"{seeds} {problems:4d} {spread:3.1f} | {alarm:.3f} {old_alarm:.3f} | {covered:.3f} {old_covered:.3f}", flush=True)


if __name__ == "__main__":
    main()
