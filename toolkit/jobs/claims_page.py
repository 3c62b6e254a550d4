"""The command ``toolkit claims``: measure the published claims on one model, and write a page, ``claims.json`` and a text for posting."""

from __future__ import annotations

import math
import time
from collections.abc import Mapping, Sequence
from dataclasses import replace
from pathlib import Path
from typing import Any

import pandas as pd

from toolkit import claims, generate, identity, pages, report, store, verdicts
from toolkit.claims import Claim
from toolkit.generate import Sampling
from toolkit.jobs.claims_ground import ClaimsStudy, Ground, not_measured
from toolkit.jobs.published_claims import CLAIMS, UNMEASURABLE, responses
from toolkit.jobs.study import Say
from toolkit.lm import LM, NoThinkTagsError
from toolkit.pages import Page
from toolkit.stats import Effect
from toolkit.types import Problem

FEW = 20  # with fewer test problems than this, the report says that intervals are too narrow: ours
EARLY = 16  # tokens per response that are decoded to time the model
POWER = "power to detect it, %"  # column of ``posting_table``
MEANING = """\
- *reproduced*: the interval is on the claimed side of 0 (or of the limit in the claim) and includes effects that matter.
- *real but too small to matter*: it is on that side and includes none.
- *contradicted*: it is on the other side and includes opposite effects that matter.
- *not reproduced*: any other interval that includes no effect that matters.
- *undecided*: none of these, so more problems are needed. Look at the power.
- *not judged*: a random control has fewer than three draws; each draw has a seed.
- *not measured*: the reason is below the table."""
"""The verdicts in words, as Markdown."""
KEPT = {"claims": list[Mapping[str, Any]]}


def check_names(names: Sequence[str]) -> tuple[str, ...]:
    """Return names of groups of claims in the order of ``CLAIMS``, without duplicates; no names stand for all groups.

    Raises:
        ValueError: a name is unknown.
    """
    if unknown := [name for name in names if name not in CLAIMS]:
        raise ValueError(f"Unknown claims {', '.join(unknown)}: choose from {', '.join(CLAIMS)}.")
    return tuple(name for name in CLAIMS if name in names or not names)


def claims_report(
    lm: LM, plan: ClaimsStudy, directory: str | Path, *, say: Say = lambda text: None, command: str = ""
) -> list[Claim]:
    """Measure the published claims on a model, write a report, and return the claims.

    After a stop, call it again with the same arguments: finished groups of claims are read, and finished rollouts are reused.

    Args:
        lm: Model to judge. If it does not mark its thinking, its tags must be ``ThinkTags(None, None)``: whole responses count as thinking.
        plan: Task, sizes and groups of claims.
        directory: Directory to write to: ``report.html``, ``claims.json``, ``claims.md`` (the text for posting), ``parts/`` (claims per
            group) and ``rollouts/``.
        say: Function that is called with one line of progress at a time.
        command: Command that makes the report again, to be shown in it.

    Raises:
        NoThinkTagsError: the model has no tags.
    """
    if lm.tags is None:
        raise NoThinkTagsError(
            f"{lm.name} has no think tags: load it with tags=ThinkTags(None, None), so that whole responses count as thinking."
        )
    g = Ground(lm, plan, store.writable(directory), say)
    missing = [name for name in plan.names if not _part(g, name).is_file()]
    if missing:
        say(_estimate(g, missing))
    groups = {name: _measured(g, name) for name in plan.names}
    found = [claim for group in groups.values() for claim in group]
    made = _made(g)
    title = f"Published claims about thinking length on {Path(lm.name).name}"
    page = report.claims_page(title, found, made=f"{made} {_VERDICTS}", command=command)
    shown = report.transcripts({"base": lm}, g.compare({}), g.tests, g.out / "rollouts" / "test")
    pages.write(_with_reasons(replace(page, table=posting_table(found), sections=[shown]), found), g.out / "report.html")
    # A task that is a file is named without its folder, since the report may be published.
    named = {**vars(plan), "study": {**vars(plan.study), "task": Path(plan.study.task).name}}
    about = {"provenance": lm.provenance(plan.study.seed), "plan": named, "made": made, "command": command}
    records = {name: claims.json_records(group) for name, group in groups.items()}
    store.write_json({**about, "claims": records}, g.out / "claims.json")
    store.write_text(posting(title, found, made, command), g.out / "claims.md")
    return found


def posting_table(found: Sequence[Claim]) -> pd.DataFrame:
    """Return the claims as a table of text cells: source, effect with its interval, smallest effect that matters, power and verdict."""
    rows = {}
    for claim in found:
        scale, digits = (100, 1) if claim.unit == "points" else (1, 2 if claim.unit in ("nats", "correlation") else 1)
        limit = f"beyond {scale * claim.beyond:+.{digits}f}" if claim.beyond else f"{scale * claim.smallest:.{digits}f}"
        rows[claim.text] = {
            "from": claim.source,
            "effect (+ as claimed)": claim.row[2] or "-",
            "smallest that matters": f"{limit} {claim.unit}" if claim.unit else "-",
            POWER: "unknown" if math.isnan(claim.power) else f"{100 * claim.power:.0f}",
            "verdict": claim.verdict,
        }
    return pd.DataFrame.from_dict(rows, orient="index").rename_axis("claim")


def posting(title: str, found: Sequence[Claim], made: str, command: str) -> str:
    """Return the report as Markdown, for a post or an issue."""
    said = "\n".join(f"- {sentence}" for sentence in verdicts.of_claims(found))
    reasons = "".join(f"\n- {claim.text}: {claim.missing}" for claim in found if claim.missing)
    left_out = f"\nNot measured:\n{reasons}\n" if reasons else ""
    again = f"\nMade again with `{command}`.\n" if command else ""
    return f"""# {title}

{said}

{report.markdown(posting_table(found))}
{left_out}
{made} + is the direction that the paper claims; intervals are 95 % over problems, and over the random draws for controls. {claims.CONTROLS}
The smallest effects that matter are our choice. The power is the probability to detect an effect of that size at the 5 % level. Nothing is corrected for
the number of claims: of 20 that are false, about one is called real by chance.

{MEANING}
{again}"""


_VERDICTS = "The power is the probability to detect the smallest effect that matters, at the 5 % level. Nothing is corrected for the number of claims."


def _with_reasons(page: Page, found: Sequence[Claim]) -> Page:
    """Return a page whose verdict also says why claims were not measured."""
    reasons = [f"Not measured: {claim.text}. Reason: {claim.missing}" for claim in found if claim.missing]
    return replace(page, verdict=[*page.verdict, *reasons])


def _made(g: Ground) -> str:
    """Return how the claims were measured, in sentences."""
    study, tags = g.plan.study, g.lm.tags
    how = "Whole responses count as thinking, since the model marks none. " if tags is not None and tags.close is None else ""
    cut = sum(not r.closed for r in g.base)
    ends = f"{cut} of {len(g.base)} responses of the unchanged model are cut off at that limit. " if cut else ""
    few = [name for name, group in CLAIMS.items() if name in g.plan.names and group.conditions(1)]
    draws = f"{g.plan.edit.draws} random draws per control. " if few else ""
    directed = any(CLAIMS[name].directed for name in g.plan.names)
    of_train = f"Directions and heads come from {len(g.problems['train'])} train problems. " if directed else ""
    narrow = (
        "With so few problems, bootstrap intervals are too narrow: this is a trial of the command. " if len(g.tests) < FEW else ""
    )
    return (
        f"{Path(g.lm.name).name} (weights {g.lm.fingerprint[:12]}), {str(g.lm.model.dtype).removeprefix('torch.')}. {len(g.tests)} test problems of "
        f"{Path(study.task).name}, {study.samples} samples each, temperature {study.temperature:g}, at most {study.max_new_tokens} tokens, seed {study.seed}. "
        f"{of_train}{ends}{how}{draws}{narrow}"
    ).strip()


# --- what is kept ----------------------------------------------------------------------------------------------


def _part(g: Ground, name: str) -> Path:
    """Return the file that keeps a group of claims, named by a key of all that it depends on: model, settings, problems and code."""
    depends = [identity.of_lm(g.lm), identity.of(replace(g.plan, names=())).body, g.lm.name]
    depends += [identity.of_problems(problems) for problems in g.problems.values()]
    code = store.modules_of("toolkit.jobs.published_claims")
    return g.out / "parts" / f"{name}-{store.Basis(depends, code).key}.json"


def _measured(g: Ground, name: str) -> list[Claim]:
    """Return a group of claims: those that are kept, or measured now and kept."""
    path = _part(g, name)
    if path.is_file():
        kept = store.read_json(path, KEPT, remedy="Remove it; the claims are then measured again.")["claims"]
        return [Claim(**{**row, "estimate": Effect(**_numbers(row["estimate"]))}) for row in kept]
    group = CLAIMS[name]
    g.say(f"claims {name}: {group.text}")
    try:
        found = group.measure(g)
    except UNMEASURABLE as reason:
        found = [not_measured(group.text, group.source, reason)]
        g.say(f"claims {name}: not measured, {reason}")
    rows = [vars(claim) | {"estimate": _record(claim)} for claim in found]
    store.write_json({"claims": rows}, path)
    return found


def _record(claim: Claim) -> dict[str, Any]:
    """Return an estimate for JSON: NaN becomes ``None``."""
    e = claim.estimate
    p, note = (e.p, e.note) if isinstance(e, Effect) else (math.nan, "")
    numbers = {"mean": e.mean, "low": e.low, "high": e.high, "p": p}
    return {**{key: None if math.isnan(value) else value for key, value in numbers.items()}, "note": note}


def _numbers(record: Mapping[str, Any]) -> dict[str, Any]:
    return {key: math.nan if value is None else value for key, value in record.items()}


# --- time ------------------------------------------------------------------------------------------------------


def _estimate(g: Ground, names: Sequence[str]) -> str:
    """Return how many responses the groups need, and how long that takes at most at the speed of a first short batch."""
    counts = responses(replace(g, plan=replace(g.plan, names=tuple(names))))
    total = sum(n for n, _ in counts.values())
    tokens = sum(n * budget for n, budget in counts.values())
    minutes = tokens / speed(g.lm, g.tests, g.plan.study.sampling) / 60
    most = f"{minutes:,.0f} minutes" if minutes >= 1 else "a minute"
    return (
        f"{', '.join(names)}: up to {total:,} responses, {tokens:,} tokens if none ends early; at the speed measured now at most about {most}, "
        "and less if responses end early"
    )


def speed(lm: LM, problems: Sequence[Problem], sampling: Sampling) -> float:
    """Return the tokens per second of a first short batch of responses, sampled twice; the second is timed."""
    rows = max(1, min(sampling.batch_size, 32) // sampling.n)
    short = replace(sampling, max_new_tokens=EARLY)
    for _ in range(2):
        began = time.perf_counter()
        sampled = generate.rollouts(lm, problems[:rows], short, progress=False)
    return sum(r.response_tokens for r in sampled) / (time.perf_counter() - began)
