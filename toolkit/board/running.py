"""Measure all conditions of a board with all their seeds. Saved results are skipped, and several processes can share the work."""

from __future__ import annotations

import time
from collections.abc import Sequence
from pathlib import Path

from toolkit import identity, store
from toolkit.board.ground import Ground
from toolkit.board.measure import (
    References,
    is_measured,
    measure,
    measure_references,
    result_folder,
    rollouts_of_result,
    without_code_record,
)
from toolkit.board.spec import Spec, check_distinct
from toolkit.progress import stage

WAIT = 5.0  # seconds between two checks whether other processes have finished
Unit = tuple[Spec, int]
"""A condition and a seed."""


def units(ground: Ground, specs: Sequence[Spec]) -> list[Unit]:
    """Return all pairs ``(condition, seed)`` of a board, in the order in which they are measured.

    Seed 0 of every condition comes first. So a board that is stopped during the other seeds has a result of every condition. Conditions
    that are neither random nor trained have seed 0 only.
    """
    seeds = range(ground.sizes.seeds)
    return [(spec, seed) for seed in seeds for spec in specs if seed == 0 or spec.seeded]


def run(ground: Ground, specs: Sequence[Spec], *, wait: bool = True, progress: bool = True) -> None:
    """Measure every condition with every seed that has no saved result yet. Several processes that run the same board share the work.

    A condition whose result comes from a different version of the code is measured again. Rollouts that a killed process left behind are
    removed.

    Args:
        ground: Base model, sizes and output directory of the board.
        specs: Conditions to measure.
        wait: What to do when other processes are measuring all remaining results. True waits until all results exist; False returns at
            once. Pass True in the main process, and False in its helper processes. Only with True, the function prints which results are
            measured again because the code changed.
        progress: True to show a progress bar.

    Raises:
        ValueError: two conditions have the same cache key.
        evaluate.OverlapError: some of the board's test problems were used to edit, steer or train a condition.
    """
    todo, references = units(ground, specs), None
    for spec in specs:
        # Computed and cached now, because making a condition may change variables that another condition's function reads.
        _ = spec.known
    bases = [spec.basis(ground, seed) for spec, seed in todo]
    check_distinct({f"{spec.name}, seed {seed}": basis.key for (spec, seed), basis in zip(todo, bases, strict=True)})
    places = [ground.out / "results" / basis.key for basis in bases]
    if wait:  # a helper process would say the same again
        _say_stale(
            ground, [(*unit, basis) for unit, basis, folder in zip(todo, bases, places, strict=True) if not is_measured(folder)]
        )
    for folder in places:
        _remove_leftover_rollouts(folder)
    with stage("board", len(todo), "condition", show=progress) as bar:
        while True:
            open_ = [i for i, folder in enumerate(places) if not is_measured(folder)]
            bar.update(len(todo) - len(open_) - bar.n)
            worked = False
            for i in open_:
                spec, seed = todo[i]
                # The lock tells other processes that this one measures the result. Another may have finished it since ``open_`` was made.
                with store.locked(places[i].with_suffix(".claim")) as mine:
                    if mine and not is_measured(places[i]):
                        bar.set_postfix_str(f"{spec.name}, seed {seed}")
                        references = references or measure_references(ground)
                        places[i] = _measured(ground, spec, seed, references, places[i])
                        worked = True
                        bar.update(1)
            if not open_ or not (worked or wait):
                return
            if not worked:
                time.sleep(WAIT)


def _remove_leftover_rollouts(folder: Path) -> None:
    """Remove the rollouts in the folder of a complete result. They are there if the measuring process was killed before it removed them."""
    if is_measured(folder) and (leftover := rollouts_of_result(folder)):
        with store.locked(folder.with_suffix(".claim")) as mine:
            if mine:
                for sampled in leftover:
                    store.remove(sampled)


def _measured(ground: Ground, spec: Spec, seed: int, references: References, expected: Path) -> Path:
    """Measure one condition with one seed, and return the folder of the result.

    Args:
        ground: Base model, sizes and output directory of the board.
        spec: The condition.
        seed: Random seed of the condition.
        references: Responses, hidden states and heads of base, from ``measure_references``.
        expected: Folder of the result, as computed when ``run`` was called. If the condition has changed since then, for example because a
            model file was replaced, the result gets another folder.

    Raises:
        identity.UnknownIdentityError: the condition's function returns a different condition at every call, so its result could never be
            read back.
    """
    # A condition that changed once has the same folder at the second call; one that differs at every call has not.
    now = result_folder(ground, spec, seed)
    if now != expected and result_folder(ground, spec, seed) != now:
        raise identity.UnknownIdentityError(
            f"Condition {spec.name[:60]!r}: its function makes another model or intervention each time it is called. Use the seed that the "
            f"function gets for everything random in it. {identity.REMEDY}"
        )
    return measure(ground, spec, seed, references)


def _say_stale(ground: Ground, open_: Sequence[tuple[Spec, int, store.Basis]]) -> None:
    """Print which results will be measured again because they were measured with a different version of the code.

    Args:
        ground: Base model, sizes and output directory of the board.
        open_: Results that remain to be measured: condition, seed, and the record of everything that the result depends on.
    """
    records = store.records(ground.out / "results")
    changed = {f"{spec.name}, seed {seed}": basis.changed(records) for spec, seed, basis in open_}
    stale, modules = [name for name, names in changed.items() if names], set[str]().union(*changed.values())
    if stale:
        ground.say(
            f"stale, measured with a different version of the code: {len(stale)} results ({_few(stale)}); changed since: {_few(sorted(modules))}. They are measured "
            f"again; the old files stay in {ground.out / 'results'}"
        )
    unknown = len(without_code_record(ground))
    if open_ and unknown:
        ground.say(f"{unknown} results in {ground.out / 'results'} were made by {store.BEFORE_HASHES}: they are not used")


def _few(names: Sequence[str], count: int = 4) -> str:
    """Return the first ``count`` names as text, and how many more there are."""
    return ", ".join(names[:count]) + (f" and {len(names) - count} more" if len(names) > count else "")
