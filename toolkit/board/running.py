"""Measuring a board: every condition from every seed that has no result yet, shared by as many processes as wanted."""

from __future__ import annotations

import time
from collections.abc import Sequence
from pathlib import Path

from tqdm.auto import tqdm

from toolkit import identity, store
from toolkit.board.ground import Ground
from toolkit.board.measure import References, is_measured, measure, place, unrecorded
from toolkit.board.spec import Spec, check_distinct

WAIT = 5.0  # seconds between looks at what other processes are doing
Unit = tuple[Spec, int]


def units(ground: Ground, specs: Sequence[Spec]) -> list[Unit]:
    """Every condition from every one of its seeds: first seeds first, so that a board that was cut short has every condition."""
    seeds = range(ground.sizes.seeds)
    return [(spec, seed) for seed in seeds for spec in specs if seed == 0 or spec.seeded]


def run(ground: Ground, specs: Sequence[Spec], *, wait: bool = True, progress: bool = True) -> None:
    """Measure what is not measured yet. Several processes given the same board share it; each waits for the others unless told not to.

    Results that were made by other code are measured again; which, and what has changed, is said in a line.

    Raises:
        ValueError: two conditions have one key.
        evaluate.OverlapError: a condition was made from problems that it would be judged on.
    """
    todo, references = units(ground, specs), References(ground)
    for spec in specs:
        _ = spec.known  # before any condition is made, which may fill what a function reads
    bases = [spec.basis(ground, seed) for spec, seed in todo]
    check_distinct({f"{spec.name}, seed {seed}": basis.key for (spec, seed), basis in zip(todo, bases, strict=True)})
    places = [ground.out / "results" / basis.key for basis in bases]
    if wait:
        _say_stale(
            ground, [(*unit, basis) for unit, basis, folder in zip(todo, bases, places, strict=True) if not is_measured(folder)]
        )
    with tqdm(total=len(todo), desc="board", unit="condition", disable=not progress) as bar:
        while True:
            open_ = [i for i, folder in enumerate(places) if not is_measured(folder)]
            bar.update(len(todo) - len(open_) - bar.n)
            worked = False
            for i in open_:
                spec, seed = todo[i]
                with store.locked(places[i].with_suffix(".claim")) as mine:
                    if mine and not is_measured(places[i]):
                        bar.set_postfix_str(f"{spec.name}, seed {seed}")
                        places[i] = _measured(ground, spec, seed, references, places[i])
                        worked = True
                        bar.update(1)
            if not open_ or not (worked or wait):
                return
            if not worked:
                time.sleep(WAIT)


def _measured(ground: Ground, spec: Spec, seed: int, references: References, expected: Path) -> Path:
    """Measure a result, in ``expected`` or elsewhere if what its function makes has changed meanwhile, such as a model at a path.

    Raises:
        identity.UnknownIdentityError: the function makes something else at every call, so that its result would never be read back.
    """
    now = place(ground, spec, seed)
    if now != expected and place(ground, spec, seed) != now:
        raise identity.UnknownIdentityError(
            f"Condition {spec.name[:60]!r}: its function makes another model or intervention each time it is called. Give what is random in it "
            f"the seed that the function is given. {identity.REMEDY}"
        )
    return measure(ground, spec, seed, references)


def _say_stale(ground: Ground, open_: Sequence[tuple[Spec, int, store.Basis]]) -> None:
    """Say which of these were measured before by other code."""
    kept = store.records(ground.out / "results")
    changed = {f"{spec.name}, seed {seed}": basis.changed(kept) for spec, seed, basis in open_}
    stale, modules = [name for name, own in changed.items() if own], set[str]().union(*changed.values())
    if stale:
        ground.say(
            f"stale, measured by other code: {len(stale)} results ({_few(stale)}); changed since: {_few(sorted(modules))}. They are measured again, "
            f"the old files stay in {ground.out / 'results'}"
        )
    unknown = len(unrecorded(ground))
    if open_ and unknown:
        ground.say(f"{unknown} results in {ground.out / 'results'} were made by {store.BEFORE_HASHES}: they are not used")


def _few(names: Sequence[str], count: int = 4) -> str:
    return ", ".join(names[:count]) + (f" and {len(names) - count} more" if len(names) > count else "")
