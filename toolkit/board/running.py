"""Measuring a board: every condition from every seed that has no result yet, shared by as many processes as wanted."""

from __future__ import annotations

import time
from collections.abc import Sequence

from tqdm.auto import tqdm

from toolkit import store
from toolkit.board.ground import Ground
from toolkit.board.measure import References, measure, place, result
from toolkit.board.spec import Spec

WAIT = 5.0  # seconds between looks at what other processes are doing
Unit = tuple[Spec, int]


def units(ground: Ground, specs: Sequence[Spec]) -> list[Unit]:
    """Every condition from every one of its seeds: first seeds first, so that a board that was cut short has every condition."""
    seeds = range(ground.sizes.seeds)
    return [(spec, seed) for seed in seeds for spec in specs if seed == 0 or spec.seeded]


def run(ground: Ground, specs: Sequence[Spec], *, wait: bool = True, progress: bool = True) -> None:
    """Measure what is not measured yet. Several processes given the same board share it; each waits for the others unless told not to."""
    todo, references = units(ground, specs), References(ground)
    with tqdm(total=len(todo), desc="board", unit="condition", disable=not progress) as bar:
        while True:
            open_ = [u for u in todo if result(ground, *u) is None]
            bar.update(len(todo) - len(open_) - bar.n)
            worked = False
            for spec, seed in open_:
                with store.claimed(place(ground, spec, seed).with_suffix(".claim")) as mine:
                    if mine and result(ground, spec, seed) is None:
                        bar.set_postfix_str(f"{spec.name}, seed {seed}")
                        measure(ground, spec, seed, references)
                        worked = True
                        bar.update(1)
            if not open_ or not (worked or wait):
                return
            if not worked:
                time.sleep(WAIT)
