"""Which published effects hold on real pretrained weights? Measures them on the smol reasoner and writes ``results/``.

    python data/smol-reasoner/results.py --jobs 2

Goes on where it was when it is stopped and given again. First the dose-response of both length directions, each beside a random one;
then every condition of ``board.py``; then ``results/`` is written: the board (``board.json``, ``table.parquet``), ``doses.json``,
``heads.json``, ``retrieval.json``, scores and directions, and a page (``README.md``) that states each effect with its interval.
"""

from __future__ import annotations

import argparse
import hashlib
import sys
from collections.abc import Sequence
from dataclasses import dataclass, replace
from pathlib import Path

import numpy as np
import pandas as pd
import torch

from toolkit import board as boards
from toolkit import directions, doses, identity, processes, report, stats, store, tasks
from toolkit import lm as lms
from toolkit.board import reading
from toolkit.board.ground import TRAINING
from toolkit.board.spec import BASE
from toolkit.generate import Sampling
from toolkit.jobs import retrieval
from toolkit.jobs.edit import OURS, PUBLISHED, plan_table
from toolkit.phases import Scope
from toolkit.stats import Effect, Estimate

HERE = Path(__file__).parent
FILES = {PUBLISHED: "published", OURS: "ours"}
STRENGTHS = (-2.0, -1.0, 1.0, 2.0)  # at 4 either direction broke the first stage's: 6 % right or less going down
SWEEPS = {
    OURS: doses.Sweep(STRENGTHS),
    "Efficiency Steering": doses.Sweep(STRENGTHS, (15,), Scope.of("newest")),
}
# Smallest effects that matter: points of accuracy, share of the base's length, needles (ours)
POINTS, TOKENS, NEEDLES = 0.03, 0.05, 0.1
POWER = 1.96 + 0.84  # standard errors that are found with 80 % power at 5 %


@dataclass(frozen=True)
class Claim:
    """A published effect, what was found of it here, and from what size on it counts.

    ``found`` is signed so that + is what was claimed.
    """

    text: str
    source: str
    found: Estimate
    smallest: float
    unit: str

    @property
    def note(self) -> str:
        """What the estimate says of itself: that it is of too few seeds, or of what does not vary."""
        return self.found.note if isinstance(self.found, Effect) else ""

    @property
    def verdict(self) -> str:
        """Reproduced: the whole interval is on the claimed side, and reaches what matters. Not reproduced, or real but too small to
        matter: it ends before that. Undecided: neither, or there is no interval. Not judged: too few seeds of what is random or trained."""
        if "seed" in self.note:
            return f"not judged: {self.note}"
        low, high = self.found.low, self.found.high
        if np.isnan(low) or low == high:  # no such response, or no response that differs
            return "undecided"
        if high < self.smallest:
            return "real but too small to matter" if low > 0 else "not reproduced"
        return "reproduced" if low > 0 else "undecided"

    @property
    def row(self) -> list[str]:
        """A line of the page."""
        scale = 100 if self.unit == "points" else 1
        mean, low, high = (scale * v for v in (self.found.mean, self.found.low, self.found.high))
        power = POWER * (high - low) / (2 * 1.96)
        digits = 1 if self.unit in ("points", "tokens") else 2
        return [
            self.text,
            self.source,
            f"{mean:+.{digits}f} [{low:+.{digits}f}, {high:+.{digits}f}] {self.unit}",
            self.verdict,
            f"{power:.{digits}f}" if power > 0 else "unknown",
        ]


def swept(ground: boards.Ground, name: str, problems: int) -> doses.Doses:
    """Dose-response of one direction and of a random one."""
    v = ground.thinkedit if name == OURS else ground.efficiency
    both = {name: v, doses.RANDOM: directions.random_like(v, seed=0)}
    few = replace(ground.study, problems=problems).load("dev", ground.lm)
    where = dose_file(ground, name, problems).with_suffix("")
    return doses.sweep(ground.lm, both, few, Sampling(2, max_new_tokens=200), SWEEPS[name], out=where)


def dose_file(ground: boards.Ground, name: str, problems: int) -> Path:
    """Where a dose-response is kept, under everything it depends on."""
    few = replace(ground.study, problems=problems).load("dev", ground.lm)
    depends = [ground.identity, identity.of_problems(few), identity.of(SWEEPS[name]).body]
    code = store.modules_of("toolkit.doses", "toolkit.board.ground", *tasks.modules(ground.study.task), without=TRAINING)
    return ground.out / "doses" / f"{name}-{store.Basis(depends, code).key}.json"


def measured(ground: boards.Ground, specs: Sequence[boards.Spec], problems: int, *, wait: bool) -> None:
    """Everything that takes long; several processes share it."""
    for name in SWEEPS:
        file = dose_file(ground, name, problems)
        with store.claimed(file) as mine:
            if mine and not file.exists():
                found = swept(ground, name, problems)
                trends = {d: doses.monotone(found, d) for d in (name, doses.RANDOM)}
                trends = {d: None if np.isnan(v) else v for d, v in trends.items()}
                store.write_json({"spearman": trends, "doses": report.records(found.table)}, file)
    boards.run(ground, specs, wait=wait, progress=wait)


# --- claims ------------------------------------------------------------------------------------------------------


def claims(table: reading.Table, tokens: float) -> list[Claim]:
    """Every effect, signed as claimed."""

    def seeded(*names: str) -> bool:
        return any(table.found[n].spec.seeded for n in names)

    def change(metric: str, name: str, other: str = BASE, sign: int = 1) -> Effect:
        gaps = sign * (table.value(name, metric) - table.value(other, metric))  # [seeds, problems]
        kept = gaps[:, ~np.isnan(gaps).any(axis=0)]
        return stats.effect([stats.mean_of(own[:, None]) for own in kept], kept.shape[1], seeded=seeded(name, other))

    def shortest(name: str, other: str = BASE) -> Effect:
        seeds, (base, *_) = (
            [stats.shortest_accuracy(o.correct, o.think_tokens, 0.2) for o in table.outcomes(n)] for n in (name, other)
        )
        return stats.effect([stats.difference(own, base) for own in seeds], len(table.main), seeded=seeded(name, other))

    rows = table.found[BASE].results[0].rows
    both = rows.dropna(subset=["think_entropy", "answer_entropy"])
    phase = stats.over_problems((both["think_entropy"] - both["answer_entropy"]).to_numpy(), both["problem_id"].to_numpy())
    apart = stats.correlation(both["think_entropy"], both["think_tokens"], both["problem_id"], within=True)
    hard = rows[rows["difficulty"] >= 3]
    right = stats.correlation(hard["think_tokens"], hard["correct"].astype(float), hard["problem_id"], within=True)
    stepped = hard[hard["think_tokens"] > 0]
    failed = stats.correlation(stepped["failed"], stepped["correct"].astype(float), stepped["problem_id"], within=True)
    found = [
        Claim("thinking is less certain than answering", "PEAR, 2510.08026", phase, 0.1, "nats"),
        Claim("longer thinking is less certain (within a problem)", "PEAR, 2510.08026", apart, 0.1, "correlation"),
        Claim("short thinking is wrong more often (within a problem, 3+ steps)", "ThinkEdit, 2503.22048", right, 0.1, "correlation"),
        Claim("failed steps go with wrong answers (within a problem, 3+ steps)", "2509.19284",
              Estimate(-failed.mean, -failed.high, -failed.low), 0.1, "correlation"),
    ]  # fmt: skip
    for form in ("ThinkEdit, as published", "ThinkEdit (ours)"):
        for share in (2, 4, 6):
            name = f"{form}, {share} % of heads"
            short = form if share == 4 else f"{form}, {share} %"
            found += [
                Claim(f"{short}: thinks longer", "2503.22048", change("think_tokens", name), TOKENS * tokens, "tokens"),
                Claim(f"{short}: more accurate", "2503.22048", change("accuracy", name), POINTS, "points"),
                Claim(f"{short}: its shortest 20 % more accurate", "2503.22048", shortest(name), POINTS, "points"),
            ]
        name = f"{form}, 4 % of heads"
        heads = "control: random heads edited, as published" if "published" in form else "control: random heads edited (ours)"
        found += [
            Claim(
                f"{form}: longer than with random heads", "control", change("think_tokens", name, heads), TOKENS * tokens, "tokens"
            ),
            Claim(f"{form}: more accurate than with random heads", "control", change("accuracy", name, heads), POINTS, "points"),
        ]
    found.append(
        Claim("ThinkEdit (ours): longer than with a random direction in its heads", "control",
              change("think_tokens", "ThinkEdit (ours), 4 % of heads", "control: random direction edited (ours)"), TOKENS * tokens, "tokens")
    )  # fmt: skip
    noise, ours = "control: steered randomly", "steered"
    found += [
        Claim("steered shorter (our direction): shorter", "2503.22048", change("think_tokens", f"{ours} shorter", sign=-1), TOKENS * tokens, "tokens"),
        Claim("steered shorter (our direction): less accurate", "2503.22048", change("accuracy", f"{ours} shorter", sign=-1), POINTS, "points"),
        Claim("steered longer (our direction): longer", "2503.22048", change("think_tokens", f"{ours} longer"), TOKENS * tokens, "tokens"),
        Claim("steered longer (our direction): longer than steered randomly", "control", change("think_tokens", f"{ours} longer", noise), TOKENS * tokens, "tokens"),
        Claim("Efficiency Steering: shorter", "2506.15647", change("think_tokens", "Efficiency Steering, shorter", sign=-1), TOKENS * tokens, "tokens"),
        Claim(f"Efficiency Steering: loses less than {100 * POINTS:.0f} points", "2506.15647",
              plus(change("accuracy", "Efficiency Steering, shorter"), POINTS), 0.0, "points"),
        Claim("Efficiency Steering: shorter than along a random direction", "control",
              change("think_tokens", "Efficiency Steering, shorter", "control: Efficiency Steering, random direction", sign=-1), TOKENS * tokens, "tokens"),
    ]  # fmt: skip
    masks = ("4 retrieval heads masked", "control: 4 random heads masked")
    found += [
        Claim("4 retrieval heads (our score) masked: needles lost", "2404.15574", change("retrieved", masks[0], sign=-1), NEEDLES, "points"),
        Claim("more needles lost than with random heads", "2404.15574", change("retrieved", *masks, sign=-1), NEEDLES, "points"),
        Claim("word problems lost more than with random heads", "2404.15574", change("accuracy", *masks, sign=-1), POINTS, "points"),
        Claim("GRPO, correctness, 8 steps: more accurate", "2402.03300", change("accuracy", "GRPO: correctness"), POINTS, "points"),
        Claim("GRPO-lambda: shorter than correctness", "2505.18086",
              change("think_tokens", "GRPO-lambda", "GRPO: correctness", sign=-1), TOKENS * tokens, "tokens"),
        Claim("GRPO-lambda: as accurate as correctness (less than 3 points behind)", "2505.18086",
              plus(change("accuracy", "GRPO-lambda", "GRPO: correctness"), POINTS), 0.0, "points"),
    ]  # fmt: skip
    return found


def plus(e: Effect, by: float) -> Effect:
    """An effect moved by a constant; its p-value was against another, so it is dropped."""
    return replace(e, mean=e.mean + by, low=e.low + by, high=e.high + by, p=np.nan)


PAGE = """# What holds on real pretrained weights

Made by `python data/smol-reasoner/results.py` on the smol reasoner (fingerprint {fingerprint}): {problems} test problems x {samples} samples, temperature 1, bf16;
intervals are 95 % bootstraps over problems. Every row is signed so that + is what was claimed. Code: {made_by}.

*Reproduced*: the whole interval is on the claimed side. *Not reproduced*: it ends before the smallest effect that matters ({points:.0f} points of accuracy, {share:.0f} % of the
base's length, 10 points of needles, 0.1 of a correlation, 0.1 nats: ours), or so does one that is real. *Undecided*: neither. The last column is the effect that would have been
found with 80 % power; where it is larger than what matters, "undecided" says little. *Not judged*: what is random or trained was measured from fewer than three seeds, and the interval leaves seeds out.

A policy of GRPO is saved in fp32 with its adapter merged, and judged in bf16, as the base is, which rounds part of a small change away (its note on the board says how much): its {steps} steps are a smoke test of the rewards, not of their papers.

{claims}

Rows are not corrected for their number; `board.json` has Holm-corrected p-values. {seeds}

## The board

{board}

## Dose-response

Mean think tokens by strength, dev problems; Spearman's correlation with strength within the usable range in the last column.

{doses}

## Heads

{heads}

Retrieval heads (share of heads by the published score, beside the published models):

{sparsity}
"""


def dose_table(found: dict[str, dict]) -> pd.DataFrame:
    """Think tokens by direction and strength, and how monotone."""
    rows = {}
    for name, told in found.items():
        rows_of = pd.DataFrame(told["doses"]).query("metric == 'think_tokens'")
        wide = rows_of.pivot(index="direction", columns="strength", values="mean")
        for direction, values in wide.iterrows():
            label = name if direction == name else f"random, norm of {name}'s"
            rows[label] = {**{f"{a:+g}": v for a, v in values.items()}, "Spearman": told["spearman"][direction]}
    return pd.DataFrame.from_dict(rows, orient="index").round(2).rename_axis("direction")


def write(ground: boards.Ground, specs: Sequence[boards.Spec], problems: int, out: Path) -> None:
    """All of ``results/``."""
    found = boards.write(ground, specs, "Smol reasoner: what holds on real pretrained weights", ground.out)
    store.write_json({k: v for k, v in found.items() if k != "figures"}, out / "board.json")
    store.save_table(reading.flat(found), out / "table.parquet")
    swept_ = {name: store.read_json(dose_file(ground, name, problems)) for name in SWEEPS}
    store.write_json(swept_, out / "doses.json")
    adapter = (HERE / "adapter_model.safetensors").read_bytes()
    about = {
        "adapter_sha256": hashlib.sha256(adapter).hexdigest(),
        "made_by": found["provenance"]["made_by"],
        "provenance": ground.lm.provenance(0),
        "sizes": ground.sizes,
    }
    store.write_json(about, out / "about.json")
    heads = {}
    for name in (PUBLISHED, OURS):
        f = ground.findings[name]
        apart = directions.separation(f.moments, f.direction).tolist()
        heads[name] = {"edited": plan_table(f).reset_index().to_dict("records"), "separation": apart}
        store.save(f.scores, out / f"{FILES[name]}-scores.safetensors")
        store.save(f.plan.direction or f.direction, out / f"{FILES[name]}-direction.safetensors")
    store.write_json(heads, out / "heads.json")
    top = retrieval.top_heads(ground.retrieval)
    sparse = retrieval.sparsity(ground.retrieval, "smol-reasoner")
    store.write_json({"heads": report.records(top), "sparsity": report.records(sparse.reset_index())}, out / "retrieval.json")
    table = reading.Table(reading.measured(ground, specs))
    told = claims(table, float(table.value(BASE, "think_tokens").mean()))
    columns = ["effect", "from", "found, + as claimed", "verdict", "80 % power at"]
    store.write_json(
        [
            {
                **dict(zip(columns, c.row, strict=True)),
                "estimate": None if np.isnan(c.found.mean) else {k: getattr(c.found, k) for k in ("mean", "low", "high")},
                "smallest": c.smallest,
            }
            for c in told
        ],
        out / "claims.json",
    )
    shown = boards.shown(found, ("accuracy", "think_tokens", "shortest_20", "retrieved", "think_entropy", "never_closed"))
    seeded = sum(spec.seeded for spec in specs)
    text = PAGE.format(
        fingerprint=ground.lm.fingerprint[:12],
        made_by=found["provenance"]["made_by"],
        problems=len(ground.problems),
        samples=ground.sizes.samples,
        points=100 * POINTS,
        share=100 * TOKENS,
        steps=ground.sizes.training.steps,
        claims=report.markdown(pd.DataFrame([c.row for c in told], columns=columns).set_index("effect")),
        seeds=f"What is random or trained ({seeded} conditions) was measured from {ground.sizes.seeds} seed(s); below {stats.FEW_SEEDS} it is not judged.",
        board=report.markdown(shown),
        doses=report.markdown(dose_table(swept_)),
        heads=report.markdown(pd.concat({name: plan_table(ground.findings[name]) for name in heads}, names=["form"]).reset_index("rank", drop=True).round(3)),
        sparsity=report.markdown(sparse.round(3)),
    )  # fmt: skip
    store.write_text(text, out / "README.md")


def main() -> None:
    """Measure what is missing, then write."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--work", type=Path, default=Path("runs/smol-board"), help="directory of the resumable state")
    parser.add_argument("--out", type=Path, default=HERE / "results")
    parser.add_argument("--jobs", type=int, default=1, help="processes that share the work")
    parser.add_argument("--problems", type=int, default=40, help="dev problems of the dose-response")
    parser.add_argument("--seeds", type=int, default=None, help="seeds of what is random or trained")
    parser.add_argument("--helper", action="store_true", help=argparse.SUPPRESS)
    args = parser.parse_args()
    torch.set_num_threads(max(1, torch.get_num_threads() // args.jobs))
    specs, sizes = boards.read(HERE / "board.py")
    sizes = replace(sizes, seeds=args.seeds or sizes.seeds)
    again = "import runpy, sys; del sys.argv[0]; runpy.run_path(sys.argv[0], run_name='__main__')"
    helpers = [] if args.helper else [processes.helper(again, [*sys.argv, "--helper"]) for _ in range(args.jobs - 1)]
    ground = boards.Ground(lms.load(lms.SMOL_REASONER, dtype=torch.bfloat16), sizes, args.work, print)
    measured(ground, boards.checked(specs), args.problems, wait=not args.helper)
    if args.helper:
        return
    failed = [helper.args for helper in helpers if helper.wait()]
    if failed:
        print(f"{len(failed)} of {len(helpers)} helping processes stopped with an error; this one does what they left.")
    measured(ground, boards.checked(specs), args.problems, wait=True)
    write(ground, boards.checked(specs), args.problems, store.writable(args.out))


if __name__ == "__main__":
    main()
