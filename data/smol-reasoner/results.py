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
from dataclasses import replace
from pathlib import Path

import numpy as np
import pandas as pd
import torch

from toolkit import board as boards
from toolkit import claims, directions, doses, identity, processes, report, stats, store, tasks
from toolkit import lm as lms
from toolkit.board import reading
from toolkit.board.ground import TRAINING
from toolkit.board.spec import BASE
from toolkit.claims import Claim
from toolkit.generate import Sampling
from toolkit.jobs import retrieval
from toolkit.jobs.edit import FORMS, OURS, plan_table
from toolkit.phases import Scope
from toolkit.stats import Estimate

HERE = Path(__file__).parent
STRENGTHS = (-2.0, -1.0, 1.0, 2.0)  # at 4 either direction broke the first stage's: 6 % right or less going down
SWEEPS = {
    OURS: doses.Sweep(STRENGTHS),
    "Efficiency Steering": doses.Sweep(STRENGTHS, (15,), Scope.of("newest")),
}
# Smallest effects that matter: points of accuracy, share of base's length, needles, correlations and nats (ours)
POINTS, TOKENS, NEEDLES, SMALL = 0.03, 0.05, 0.1, 0.1
OF_METRIC = {
    "think_tokens": ("tokens", TOKENS), "accuracy": ("points", POINTS), "shortest_20": ("points", POINTS), "retrieved": ("points", NEEDLES),
}  # fmt: skip
"""Metric -> unit of a claim about it, and the smallest effect that matters; of tokens a share of base's."""


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
        with store.locked(file) as mine:
            if mine and not file.exists():
                found = swept(ground, name, problems)
                trends = {d: doses.monotone(found, d) for d in (name, doses.RANDOM)}
                trends = {d: None if np.isnan(v) else v for d, v in trends.items()}
                store.write_json({"spearman": trends, "doses": report.records(found.table)}, file)
    boards.run(ground, specs, wait=wait, progress=wait)


# --- claims ------------------------------------------------------------------------------------------------------


def every_claim(table: reading.Table, tokens: float) -> list[Claim]:
    """Return every effect, signed as claimed."""

    def changed(text: str, source: str, metric: str, name: str, other: str = BASE, *, sign: int = 1, slack: float = 0.0) -> Claim:
        unit, smallest = OF_METRIC[metric]
        e = table.change(metric, name, other)
        e = e if sign > 0 else replace(e, mean=-e.mean, low=-e.high, high=-e.low)
        # "Loses less than" is met by an effect above 0 once what may be lost was added.
        estimate, smallest = (claims.plus(e, slack), 0.0) if slack else (e, smallest * (tokens if unit == "tokens" else 1.0))
        return Claim(text=text, source=source, estimate=estimate, smallest=smallest, unit=unit)

    rows = table.found[BASE].results[0].rows
    both = rows.dropna(subset=["think_entropy", "answer_entropy"])
    phase = stats.over_problems((both["think_entropy"] - both["answer_entropy"]).to_numpy(), both["problem_id"].to_numpy())
    apart = stats.correlation(both["think_entropy"], both["think_tokens"], both["problem_id"], within=True)
    hard = rows[rows["difficulty"] >= 3]
    right = stats.correlation(hard["think_tokens"], hard["correct"].astype(float), hard["problem_id"], within=True)
    stepped = hard[hard["think_tokens"] > 0]
    failed = stats.correlation(stepped["failed"], stepped["correct"].astype(float), stepped["problem_id"], within=True)
    observed = [
        ("thinking is less certain than answering", "PEAR, 2510.08026", phase, "nats"),
        ("longer thinking is less certain (within a problem)", "PEAR, 2510.08026", apart, "correlation"),
        ("short thinking is wrong more often (within a problem, 3+ steps)", "ThinkEdit, 2503.22048", right, "correlation"),
        ("failed steps go with wrong answers (within a problem, 3+ steps)", "2509.19284", Estimate(-failed.mean, -failed.high, -failed.low), "correlation"),
    ]  # fmt: skip
    found = [Claim(text=t, source=s, estimate=e, smallest=SMALL, unit=unit) for t, s, e, unit in observed]
    for form in ("ThinkEdit, as published", "ThinkEdit (ours)"):
        for share in (2, 4, 6):
            name = f"{form}, {share} % of heads"
            short = form if share == 4 else f"{form}, {share} %"
            found += [
                changed(f"{short}: thinks longer", "2503.22048", "think_tokens", name),
                changed(f"{short}: more accurate", "2503.22048", "accuracy", name),
                changed(f"{short}: its shortest 20 % more accurate", "2503.22048", "shortest_20", name),
            ]
        name = f"{form}, 4 % of heads"
        heads = "control: random heads edited, as published" if "published" in form else "control: random heads edited (ours)"
        found += [
            changed(f"{form}: longer than with random heads", "control", "think_tokens", name, heads),
            changed(f"{form}: more accurate than with random heads", "control", "accuracy", name, heads),
        ]
    noise, shorter = "control: steered randomly", "Efficiency Steering, shorter"
    masks = ("4 retrieval heads masked", "control: 4 random heads masked")
    return [
        *found,
        changed("ThinkEdit (ours): longer than with a random direction in its heads", "control", "think_tokens", "ThinkEdit (ours), 4 % of heads", "control: random direction edited (ours)"),
        changed("steered shorter (our direction): shorter", "2503.22048", "think_tokens", "steered shorter", sign=-1),
        changed("steered shorter (our direction): less accurate", "2503.22048", "accuracy", "steered shorter", sign=-1),
        changed("steered longer (our direction): longer", "2503.22048", "think_tokens", "steered longer"),
        changed("steered longer (our direction): longer than steered randomly", "control", "think_tokens", "steered longer", noise),
        changed("Efficiency Steering: shorter", "2506.15647", "think_tokens", shorter, sign=-1),
        changed(f"Efficiency Steering: loses less than {100 * POINTS:.0f} points", "2506.15647", "accuracy", shorter, slack=POINTS),
        changed("Efficiency Steering: shorter than along a random direction", "control", "think_tokens", shorter, "control: Efficiency Steering, random direction", sign=-1),
        changed("4 retrieval heads (our score) masked: needles lost", "2404.15574", "retrieved", masks[0], sign=-1),
        changed("more needles lost than with random heads", "2404.15574", "retrieved", *masks, sign=-1),
        changed("word problems lost more than with random heads", "2404.15574", "accuracy", *masks, sign=-1),
        changed("GRPO, correctness, 8 steps: more accurate", "2402.03300", "accuracy", "GRPO: correctness"),
        changed("GRPO-lambda: shorter than correctness", "2505.18086", "think_tokens", "GRPO-lambda", "GRPO: correctness", sign=-1),
        changed("GRPO-lambda: as accurate as correctness (less than 3 points behind)", "2505.18086", "accuracy", "GRPO-lambda", "GRPO: correctness", slack=POINTS),
    ]  # fmt: skip


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
    for name, form in FORMS.items():
        f = ground.findings[name]
        apart = directions.separation(f.moments, f.direction).tolist()
        heads[name] = {"edited": plan_table(f).reset_index().to_dict("records"), "separation": apart}
        store.save(f.scores, out / f"{form.short}-scores.safetensors")
        store.save(f.plan.direction or f.direction, out / f"{form.short}-direction.safetensors")
    store.write_json(heads, out / "heads.json")
    top = retrieval.top_heads(ground.retrieval)
    sparse = retrieval.sparsity(ground.retrieval, "smol-reasoner")
    store.write_json({"heads": report.records(top), "sparsity": report.records(sparse.reset_index())}, out / "retrieval.json")
    table = reading.Table(reading.measured(ground, specs))
    told = every_claim(table, float(table.value(BASE, "think_tokens").mean()))
    store.write_json(claims.records(told), out / "claims.json")
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
        claims=report.markdown(claims.table(told)),
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
    helpers = [] if args.helper else [processes.start_helper(again, [*sys.argv, "--helper"]) for _ in range(args.jobs - 1)]
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
