"""Measure which published effects hold on the smol reasoner, which has real pretrained weights, and write ``results/``.

    python data/smol-reasoner/results.py --jobs 2

It measures the dose-response of both length directions, each beside a random one, and then every condition of ``board.py``. Then it writes
``results/``: the board (``board.json``, ``table.parquet``), ``doses.json``, ``heads.json``, ``retrieval.json``, scores and directions, and
a page (``README.md``) with each effect and its interval. After a stop, the same command resumes.
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
from toolkit import claims, directions, doses, identity, jobs, pages, processes, report, stats, store, tasks
from toolkit import lm as lms
from toolkit.board import reading
from toolkit.board.ground import TRAINING
from toolkit.board.spec import BASE
from toolkit.claims import Claim
from toolkit.generate import Sampling
from toolkit.jobs import retrieval
from toolkit.jobs.finding import FORMS, OURS, plan_table
from toolkit.phases import Scope
from toolkit.stats import Estimate

HERE = Path(__file__).parent
STRENGTHS = (-2.0, -1.0, 1.0, 2.0)  # at 4, both directions broke the first stage's model: at most 6 % correct when steered shorter
SWEEPS = {
    OURS: doses.DoseSweep(STRENGTHS),
    "Efficiency Steering": doses.DoseSweep(STRENGTHS, (15,), Scope.parse("newest")),
}
DOSED = Sampling(2, max_new_tokens=200)  # of the dose-responses
# Smallest effects that matter: points of accuracy, share of base's length, needles, correlations and nats (ours)
POINTS, TOKENS, NEEDLES, SMALL = 0.03, 0.05, 0.1, 0.1
OF_METRIC = {
    "think_tokens": ("tokens", TOKENS), "accuracy": ("points", POINTS), "shortest_20": ("points", POINTS), "retrieved": ("points", NEEDLES),
}  # fmt: skip
"""Metric -> unit of its claims, and the smallest effect that matters (for tokens a share of base's mean)."""


def dose_response(ground: boards.Ground, name: str, problems: int) -> doses.Doses:
    """Measure the dose-response of one direction and of a random one."""
    v = ground.direction("thinkedit" if name == OURS else "efficiency")
    both = {name: v, doses.RANDOM: directions.random_like(v, seed=0)}
    few = replace(ground.study, problems=problems).load("dev", ground.lm)
    where = dose_file(ground, name, problems).with_suffix("")
    return doses.sweep(ground.lm, both, few, DOSED, SWEEPS[name], out=where)


def dose_file(ground: boards.Ground, name: str, problems: int) -> Path:
    """Return the file of a dose-response, named by a key of everything it depends on."""
    few = replace(ground.study, problems=problems).load("dev", ground.lm)
    depends = [ground.identity, identity.of_problems(few), identity.of(SWEEPS[name]).body, identity.of(DOSED).body]
    code = store.modules_of("toolkit.doses", "toolkit.board.ground", *tasks.modules(ground.study.task), without=TRAINING)
    return ground.out / "doses" / f"{name}-{store.Basis(depends, code).key}.json"


def measure(ground: boards.Ground, specs: Sequence[boards.Spec], problems: int, *, wait: bool) -> None:
    """Measure every dose-response and condition that has no result yet; several processes share the work."""
    for name in SWEEPS:
        file = dose_file(ground, name, problems)
        with store.locked(file) as mine:
            if mine and not file.exists():
                response = dose_response(ground, name, problems)
                trends = {d: doses.monotonicity(response, d) for d in (name, doses.RANDOM)}
                trends = {d: None if np.isnan(v) else v for d, v in trends.items()}
                store.write_json({"spearman": trends, "doses": report.json_records(response.table)}, file)
    boards.run(ground, specs, wait=wait, progress=wait)


# --- claims ------------------------------------------------------------------------------------------------------


def every_claim(table: reading.AlignedResults, tokens: float) -> list[Claim]:
    """Return every claim with its measured effect; + is the claimed direction.

    Args:
        tokens: Base's mean think tokens, the unit of the smallest effect on length.
    """

    def changed(text: str, source: str, metric: str, name: str, other: str = BASE, *, sign: int = 1, beyond: float = 0.0) -> Claim:
        unit, smallest = OF_METRIC[metric]
        e = table.change(metric, name, other)
        e = e if sign > 0 else replace(e, mean=-e.mean, low=-e.high, high=-e.low)
        smallest = 0.0 if beyond else smallest * (tokens if unit == "tokens" else 1.0)
        return Claim(text=text, source=source, estimate=e, smallest=smallest, unit=unit, beyond=beyond)

    rows = table.by_name[BASE].results[0].rows
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
    of_forms = [Claim(text=t, source=s, estimate=e, smallest=SMALL, unit=unit) for t, s, e, unit in observed]
    for form in ("ThinkEdit, as published", "ThinkEdit (ours)"):
        for share in (2, 4, 6):
            name = f"{form}, {share} % of heads"
            short = form if share == 4 else f"{form}, {share} %"
            of_forms += [
                changed(f"{short}: thinks longer", "2503.22048", "think_tokens", name),
                changed(f"{short}: more accurate", "2503.22048", "accuracy", name),
                changed(f"{short}: its shortest 20 % more accurate", "2503.22048", "shortest_20", name),
            ]
        name = f"{form}, 4 % of heads"
        heads = "control: random heads edited, as published" if "published" in form else "control: random heads edited (ours)"
        of_forms += [
            changed(f"{form}: longer than with random heads", "control", "think_tokens", name, heads),
            changed(f"{form}: more accurate than with random heads", "control", "accuracy", name, heads),
        ]
    noise, shorter = "control: steered randomly", "Efficiency Steering, shorter"
    masks = ("4 retrieval heads masked", "control: 4 random heads masked")
    return [
        *of_forms,
        changed("ThinkEdit (ours): longer than with a random direction in its heads", "control", "think_tokens", "ThinkEdit (ours), 4 % of heads", "control: random direction edited (ours)"),
        changed("steered shorter (our direction): shorter", "2503.22048", "think_tokens", "steered shorter", sign=-1),
        changed("steered shorter (our direction): less accurate", "2503.22048", "accuracy", "steered shorter", sign=-1),
        changed("steered shorter (our direction): shorter than steered randomly", "control", "think_tokens", "steered shorter", "control: steered randomly, shorter", sign=-1),
        changed("steered longer (our direction): longer", "2503.22048", "think_tokens", "steered longer"),
        changed("steered longer (our direction): longer than steered randomly", "control", "think_tokens", "steered longer", noise),
        changed("Efficiency Steering: shorter", "2506.15647", "think_tokens", shorter, sign=-1),
        changed(f"Efficiency Steering: loses less than {100 * POINTS:.0f} points", "2506.15647", "accuracy", shorter, beyond=-POINTS),
        changed("Efficiency Steering: shorter than along a random direction", "control", "think_tokens", shorter, "control: Efficiency Steering, random direction", sign=-1),
        changed("4 retrieval heads (our score) masked: needles lost", "2404.15574", "retrieved", masks[0], sign=-1),
        changed("more needles lost than with random heads", "2404.15574", "retrieved", *masks, sign=-1),
        changed("word problems lost more than with random heads", "2404.15574", "accuracy", *masks, sign=-1),
        changed("GRPO, correctness, 8 steps: more accurate", "2402.03300", "accuracy", "GRPO: correctness"),
        changed("GRPO-lambda: shorter than correctness", "2505.18086", "think_tokens", "GRPO-lambda", "GRPO: correctness", sign=-1),
        changed("GRPO-lambda: as accurate as correctness (less than 3 points behind)", "2505.18086", "accuracy", "GRPO-lambda", "GRPO: correctness", beyond=-POINTS),
    ]  # fmt: skip


PAGE = """# What holds on real pretrained weights

Made by `python data/smol-reasoner/results.py` on the smol reasoner (fingerprint {fingerprint}): {problems} test
problems x {samples} samples, temperature 1, bf16. Intervals are 95 % bootstraps over problems; those of random and trained conditions also
include the variation over seeds. Every row is signed so that + is what was claimed. Code: {made_by}.

The verdicts depend on the smallest effect that matters, which is our choice: {points:.0f} points of accuracy,
{share:.0f} % of the base's length, 10 points of needles, 0.1 of a correlation, 0.1 nats.

- *Reproduced*: the interval is on the claimed side of 0 and includes effects that matter.
- *Real but too small to matter*: it is on that side and includes none.
- *Contradicted*: it is on the other side of 0 and includes opposite effects that matter.
- *Not reproduced*: any other interval that includes no effect that matters.
- *Undecided*: none of these.

For "loses less than 3 points" the limit is -3 points instead of 0.

A random or trained condition with fewer than three seeds is not judged.

The last column is the smallest effect that would have been detected with 80 % power. Where it is larger than the
smallest effect that matters, "undecided" says little.

A GRPO policy is saved in fp32 with its adapter merged. It is judged in bf16, as the base is, which rounds part of a
small change away (its note on the board says how much). Its {steps} steps are a smoke test of the rewards, not of
their papers.

{claims}

The rows are not corrected for multiple comparisons; `board.json` has Holm-corrected p-values. The
{seeded} random or trained conditions were measured from {seeds} seeds each.

## The board

{board}

## Dose-response

The table shows mean think tokens by strength on dev problems. The last column is Spearman's correlation with strength
within the usable range. With five strengths a random direction can be as monotone as ours: compare the lengths.

{doses}

## Heads

{heads}

Retrieval heads: the share of heads by the published score, beside the published models.

{sparsity}
"""


def dose_table(responses: dict[str, dict]) -> pd.DataFrame:
    """Return think tokens by direction and strength, with Spearman's correlation in the last column."""
    rows = {}
    for name, response in responses.items():
        lengths = pd.DataFrame(response["doses"]).query("metric == 'think_tokens'")
        wide = lengths.pivot(index="direction", columns="strength", values="mean")
        for direction, values in wide.iterrows():
            label = name if direction == name else f"random, norm of {name}'s"
            rows[label] = {**{f"{a:+g}": v for a, v in values.items()}, "Spearman": response["spearman"][direction]}
    return (
        pd.DataFrame.from_dict(rows, orient="index")
        .round({**{f"{a:+g}": 1 for a in (*STRENGTHS, 0.0)}, "Spearman": 2})
        .rename_axis("direction")
    )


def write(ground: boards.Ground, specs: Sequence[boards.Spec], problems: int, out: Path) -> None:
    """Write all of ``results/``."""
    board = boards.write(ground, specs, "Smol reasoner: what holds on real pretrained weights", ground.out)
    store.write_json({k: v for k, v in board.items() if k != "figures"}, out / "board.json")
    store.save_table(reading.long_table(board), out / "table.parquet")
    responses = {name: store.read_json(dose_file(ground, name, problems)) for name in SWEEPS}
    store.write_json(responses, out / "doses.json")
    adapter = (HERE / "adapter_model.safetensors").read_bytes()
    about = {
        "adapter_sha256": hashlib.sha256(adapter).hexdigest(),
        "made_by": board["provenance"]["made_by"],
        "provenance": ground.lm.provenance(0),
        "sizes": ground.sizes,
    }
    store.write_json(about, out / "about.json")
    heads = {}
    for name, form in FORMS.items():
        f = ground.find_heads(name)
        apart = jobs.separation(ground.lm, ground.sample(), jobs.EditSettings(), f, name).tolist()
        heads[name] = {"edited": plan_table(f).reset_index().to_dict("records"), "separation": apart}
        store.save(f.scores, out / f"{form.short}-scores.safetensors")
        store.save(f.plan.direction or f.direction, out / f"{form.short}-direction.safetensors")
    store.write_json(heads, out / "heads.json")
    top = retrieval.top_heads(ground.measure_retrieval())
    sparse = retrieval.sparsity(ground.measure_retrieval(), "smol-reasoner")
    store.write_json(
        {"heads": report.json_records(top), "sparsity": report.json_records(sparse.reset_index())}, out / "retrieval.json"
    )
    table = reading.AlignedResults(reading.condition_results(ground, specs))
    effects = every_claim(table, float(table.value(BASE, "think_tokens").mean()))
    store.write_json(claims.json_records(effects), out / "claims.json")
    made = (
        f"{ground.lm.name}, {len(ground.problems)} problems, {ground.sizes.samples} samples each. {board['provenance']['made_by']}."
    )
    command = "python data/smol-reasoner/results.py"
    pages.write(
        report.claims_page("Published effects on real weights", effects, made=made, command=command), ground.out / "claims.html"
    )
    cells = boards.text_table(board, ("accuracy", "think_tokens", "shortest_20", "retrieved", "think_entropy", "never_closed"))
    text = PAGE.format(
        fingerprint=ground.lm.fingerprint[:12],
        made_by=board["provenance"]["made_by"],
        problems=len(ground.problems),
        samples=ground.sizes.samples,
        points=100 * POINTS,
        share=100 * TOKENS,
        steps=ground.sizes.training.steps,
        claims=report.markdown(claims.verdict_table(effects)),
        seeded=sum(spec.seeded for spec in specs),
        seeds=ground.sizes.seeds,
        board=report.markdown(cells),
        doses=report.markdown(dose_table(responses)),
        heads=report.markdown(pd.concat({name: plan_table(ground.find_heads(name)) for name in heads}, names=["form"]).reset_index("rank", drop=True).round(3)),
        sparsity=report.markdown(sparse.round(3)),
    )  # fmt: skip
    store.write_text(text, out / "README.md")


def main() -> None:
    """Measure what has no result yet, then write."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--work", type=Path, default=Path("runs/smol-board"), help="directory of the resumable state")
    parser.add_argument("--out", type=Path, default=HERE / "results")
    parser.add_argument("--jobs", type=int, default=1, help="processes that share the work")
    parser.add_argument("--problems", type=int, default=40, help="number of dev problems for the dose-response")
    parser.add_argument("--seeds", type=int, default=None, help="number of seeds for conditions that are random or trained")
    parser.add_argument("--helper", action="store_true", help=argparse.SUPPRESS)
    args = parser.parse_args()
    torch.set_num_threads(max(1, torch.get_num_threads() // args.jobs))
    specs, sizes = boards.read_conditions(HERE / "board.py")
    sizes = replace(sizes, seeds=args.seeds or sizes.seeds)
    again = "import runpy, sys; del sys.argv[0]; runpy.run_path(sys.argv[0], run_name='__main__')"
    helpers = [] if args.helper else [processes.start_helper(again, [*sys.argv, "--helper"]) for _ in range(args.jobs - 1)]
    ground = boards.Ground(lms.load(lms.SMOL_REASONER, dtype=torch.bfloat16), sizes, args.work, print)
    measure(ground, boards.select_conditions(specs), args.problems, wait=not args.helper)
    if args.helper:
        return
    failed = [helper.args for helper in helpers if helper.wait()]
    if failed:
        print(f"{len(failed)} of {len(helpers)} helper processes stopped with an error; this process finishes their work.")
    measure(ground, boards.select_conditions(specs), args.problems, wait=True)
    write(ground, boards.select_conditions(specs), args.problems, store.writable(args.out))


if __name__ == "__main__":
    main()
