"""The README keeps its word: its commands run, its Python runs, its links lead somewhere."""

from __future__ import annotations

import importlib.util
import json
import re
import shlex
from dataclasses import asdict
from pathlib import Path

import pandas as pd
import pytest
from typer.testing import CliRunner

from toolkit import cli

ROOT = Path(__file__).parent.parent
README = (ROOT / "README.md").read_text()


def test_every_command_of_the_readme_runs(tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    # Blocks without a language are commands to run; "text" marks those that need a hub and a GPU.
    blocks = re.findall(r"^```(\w*)\n(.*?)^```", README, re.DOTALL | re.MULTILINE)
    plain = "".join(body for language, body in blocks if not language)
    commands = re.findall(r"^toolkit .+$", plain, re.MULTILINE)
    assert len(commands) >= 5
    for command in commands:
        result = CliRunner().invoke(cli.app, shlex.split(command)[1:])
        assert result.exit_code == 0, f"{command}\n{result.output}\n{result.exception!r}"
    assert (tmp_path / "runs/edited/model.safetensors").is_file()


def test_the_python_of_the_readme_runs(tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    (block,) = re.findall(r"```python\n(.*?)```", README, re.DOTALL)
    names: dict = {}
    exec(compile(block, "README.md", "exec"), names)
    assert set(names["report"].conditions) == {"base", "edited", "random heads"}


@pytest.mark.parametrize("link", sorted(set(re.findall(r"\]\((?!http)([^)]+)\)", README))))
def test_links_of_the_readme_lead_to_files(link):
    assert (ROOT / link).exists()


@pytest.mark.parametrize("target", sorted(set(re.findall(r"\bmake (\w+)", README)) - {"and"}))
def test_make_targets_of_the_readme_exist(target):
    assert re.search(rf"^{target}:", (ROOT / "Makefile").read_text(), re.MULTILINE)


def test_the_table_of_the_readme_is_the_one_the_demo_wrote():
    update = script(ROOT / "notebooks/figures/update.py")
    board = json.loads((ROOT / "notebooks/figures/demo.json").read_text())
    assert len(board) > 6
    assert update.table(board) in README


def test_numbers_on_retrieval_heads_are_those_of_the_committed_run():
    run = json.loads((ROOT / "data/retrieval-heads/tiny-reasoner.json").read_text())
    rows = {(r["ranking"], r["heads"], r["op"], r["during"]): r for r in run["masking"]}
    ours, published = (rows[name, 4, "uniform", "decode only"] for name in ("write (ours)", "copy, as published"))
    base = 100 * (ours["accuracy"] + ours["lost"])
    shown = [100 * ours[k] for k in ("accuracy", "low", "high")]
    assert "from {:.0f} to {:.0f} % [{:.0f}, {:.0f}]".format(base, *shown) in README
    assert (
        f"leave it at {100 * ours['random']:.0f}, and the four of the published\nranking leave it at {100 * published['accuracy']:.0f}"
        in README
    )
    lost = {(r["mode"], r["masked"]): r for r in run["thinking"] if r["task"] == "lookup"}
    for mode, template in (
        ("thinking", "loses {:.0f} points by it [{:.0f}, {:.0f}]"),
        ("answering directly", "directly {:.0f} [{:.0f}, {:.0f}]"),
    ):
        row = lost[mode, "top"]
        assert template.format(*(100 * row[k] for k in ("lost", "lost_low", "lost_high"))) in README.replace("\n", " ")


def test_numbers_on_the_heads_of_smollm2_are_those_of_the_committed_run():
    run = json.loads((ROOT / "data/retrieval-heads/smollm2.json").read_text())
    published, ours = (
        next(r for r in run["masking"] if r["ranking"] == name and r["heads"] == 5)
        for name in ("copy, as published", "write (ours)")
    )
    assert (
        "from {:.0f} to {:.0f} % (published ranking) or {:.0f} % (ours)".format(
            100 * (published["accuracy"] + published["lost"]), 100 * published["accuracy"], 100 * ours["accuracy"]
        )
        in README
    )
    shown = [f"{100 * r['random']:.0f} [{100 * r['random_low']:.0f}, {100 * r['random_high']:.0f}]" for r in (published, ours)]
    assert f"to {shown[0]} or {shown[1]}" in README


def test_numbers_on_the_head_atlas_are_those_of_the_committed_run():
    run = json.loads((ROOT / "data/heads/tiny-reasoner.json").read_text())
    pair = next(r for r in run["overlaps"] if r["pair"] == "short thinking / write")
    assert pair["shared"] == 0 and f"rank correlation {pair['spearman']:.2f}".replace("0.", ".") in README
    edit = next(r for r in run["conditions"] if r["metric"] == "think_entropy" and r["condition"] == "ThinkEdit (ours)")
    numbers = (f"{edit[k]:.2f}".replace("-0.", "-.") for k in ("difference", "difference_low", "difference_high"))
    assert "({} nats [{}, {}])".format(*numbers) in README


def short(value: float, digits: int = 2, *, sign: bool = False) -> str:
    return re.sub(r"(^|(?<=[+-]))0\.", ".", f"{value:{'+' if sign else ''}.{digits}f}")


def test_numbers_on_phase_entropy_are_those_of_the_committed_runs():
    tiny, smollm2 = (json.loads((ROOT / f"data/entropy/{name}.json").read_text()) for name in ("tiny-reasoner", "smollm2"))
    phases = {r["phase"]: r["mean"] for r in tiny["phases"] if r["responses"] == "all"}
    assert f"{short(phases['think'], 3)} against {short(phases['answer'], 3)} nats" in README
    for run, sign in ((tiny, False), (smollm2, True)):
        wanted = {"scope": "within", "kind": "spearman", "x": "entropy", "y": "response_tokens"}
        row = next(r for r in run["lengths"] if wanted.items() <= r.items())
        assert f"{short(row['r'], sign=sign)} [{short(row['low'])}, {short(row['high'])}]" in README
    row = next(r for r in tiny["effects"] if (r["keep"], r["against"]) == (0.8, "random"))
    numbers = (f"{100 * row[k]:+.1f}" for k in ("difference", "low", "high"))
    assert "({} points [{}, {}])".format(*numbers) in README
    gains = {r["kept"]: [f"{100 * r[k]:.1f}" for k in ("gain", "gain_low", "gain_high")] for r in tiny["choices"]}
    assert "gains {} points [{}, {}]".format(*gains["lowest think entropy"]) in README
    assert "fewest failed steps {} [{}, {}]".format(*gains["lowest failed-step fraction"]) in README


def claimed(pattern: str) -> str:
    """What the README says in the place of the group, line breaks as spaces."""
    found = re.search(pattern, " ".join(README.split()))
    assert found, f"The README no longer says {pattern!r}: say it, or test what it says instead."
    return found[1]


def span(values, form=lambda v: f"{v:.0f}") -> str:
    """``least to greatest`` of some numbers as written, or the one number that they all are."""
    ends = [form(min(values)), form(max(values))]
    return ends[0] if ends[0] == ends[1] else " to ".join(ends)


def seeds(counts) -> str:
    return span(counts, lambda n: ["no", "one", "two", "three", "four", "five"][n]) + (" seed" if max(counts) == 1 else " seeds")


@pytest.fixture(scope="module")
def trained():
    """A row a trained model of ``data/grpo`` and, first, base."""
    curves = pytest.importorskip("toolkit.grpo.curves")
    table = curves.after_training(curves.read(ROOT / "data/grpo")[1]).set_index("name")
    return pd.concat([table.loc[["base"]], table.drop("base")])


def test_numbers_on_correctness_alone_are_those_of_the_committed_curves(trained):
    rows = trained.loc[["correctness"]]
    assert claimed(r"correctness alone gains (\S+(?: to \S+)?) points of accuracy and no length") == span(
        100 * rows["accuracy_difference"]
    )
    assert (rows["think_tokens_difference_high"] > 0).all(), "no length: not shorter than base"


def test_numbers_on_the_naive_prices_are_those_of_the_committed_curves(trained):
    mild, base = trained.loc[["length_penalty_mild"]], trained.loc["base"]
    saved, lost = -100 * mild["think_tokens_difference"] / base["think_tokens"], -100 * mild["accuracy_difference"]
    said = claimed(r"a naive price of 2\.5 % a token takes (.+? \(\w+(?: to \w+)? seeds?\))")
    assert said == f"{span(saved)} % of the think tokens and {span(lost)} points with them ({seeds([len(mild)])})"
    if "5 % a token all of both" in README:
        strong = trained.loc[["length_penalty"]]
        assert (strong["accuracy"] < 0.005).all() and (strong["think_tokens"] < 0.5).all()


def test_numbers_on_the_recipes_that_keep_the_gain_are_those_of_the_committed_curves(trained):
    from toolkit.grpo import curves

    listed = claimed(r"all of both\. (.+?) keep the whole gain")
    names = [name.lower().replace("-", "_") for name in re.split(r", | and ", listed)]
    assert len(names) > 1 and set(names) < set(trained.index)
    mean = trained.groupby(level=0)["think_tokens"].mean()
    shorter = [100 * (1 - mean[name] / mean["correctness"]) for name in names]
    counts = [len(trained.loc[[name]]) for name in names]
    said = claimed(r"keep the whole gain and think (.+? seeds?)(?: each)?\)")
    assert said == f"{span(shorter)} % shorter than correctness alone ({seeds(counts)}"
    against = curves.against(ROOT / "data/grpo").set_index(["name", "metric"]).sort_index()
    assert all((against.loc[(name, "accuracy"), "high"] >= 0).all() for name in names), "a whole gain: not below correctness alone"


def test_no_recipe_halves_thinking_for_free_while_the_readme_says_so(trained):
    if "None halves thinking for free" not in README:
        pytest.skip("the README says something else now")
    base = trained.loc["base"]
    halved = trained[trained["think_tokens"] <= 0.5 * base["think_tokens"]]
    assert (halved["accuracy_difference_high"] < 0).all(), f"{sorted(set(halved.index))} halve it"


def test_the_readme_counts_the_rewards_there_are():
    from toolkit import rewards

    assert f"{len(rewards.ALL)} length rewards" in README


@pytest.fixture(scope="module")
def board():
    return json.loads((ROOT / "data/board/board.json").read_text())


def script(path: Path):
    """A script of the repository as a module."""
    spec = importlib.util.spec_from_file_location(path.stem, path)
    module = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(module)
    return module


def test_the_board_of_the_readme_is_the_committed_one(board):
    assert script(ROOT / "data/board/update.py").readme_table(board) in README


def test_every_number_of_the_committed_board_is_a_row_of_its_table(board):
    table = pd.read_parquet(ROOT / "data/board/table.parquet").set_index(["condition", "metric"])
    assert len(table) == sum(len(c["metrics"]) for c in board["conditions"].values())
    for name, about in board["conditions"].items():
        for metric, e in about["metrics"].items():
            row, d = table.loc[(name, metric)], board["paired"].get(name, {}).get(metric, {})
            for column, value in (
                ("mean", e["mean"]),
                ("low", e["low"]),
                ("difference", d.get("mean")),
                ("p_holm", d.get("p_holm")),
            ):
                assert (value is None and pd.isna(row[column])) or row[column] == pytest.approx(value, rel=1e-9), (
                    name,
                    metric,
                    column,
                )


def test_the_committed_board_is_of_the_shipped_model_and_of_the_conditions_as_they_are(board, tiny):
    from toolkit.board import FULL, default

    assert board["provenance"]["fingerprint"] == tiny.fingerprint
    assert set(board["conditions"]) == {spec.name for spec in default.CONDITIONS}
    assert json.loads(json.dumps(board["provenance"]["sizes"])) == json.loads(json.dumps(asdict(FULL)))
    for spec in default.CONDITIONS:
        assert board["conditions"][spec.name]["note"] == spec.note


def test_sentences_on_the_board_are_those_of_the_committed_one(board):
    paired, conditions = board["paired"], board["conditions"]

    def said(name: str, metric: str, scale: int = 100) -> str:
        mean, low, high = (f"{scale * paired[name][metric][k]:+.1f}" for k in ("mean", "low", "high"))
        return f"{mean} [{low}, {high}]"

    assert claimed(r"ThinkEdit \(ours, strength 1\) gains (.+?) points of accuracy") == said("ThinkEdit 1", "accuracy")
    assert claimed(r"points of accuracy and (\+\S+ \[.+?\]) on lookup") == said("ThinkEdit 1", "accuracy_lookup")
    for what in ("heads", "direction"):
        assert paired[f"control: random {what} edited"]["accuracy"]["p_holm"] > 0.05
    first = ["GRPO: correctness", "GRPO-lambda", "DLER", "LASER", "LASER-D", "HAPO", "DRPO", "SLPO", "SAR", "Efficient Reasoning"]
    gains = [100 * paired[name]["accuracy"]["mean"] for name in first]
    assert claimed(r"asks for correctness first gain (.+?) points") == span(gains, lambda v: f"{v:.1f}")
    both = conditions["ThinkEdit 1, then GRPO-lambda"]["metrics"]
    assert claimed(r"started from the edited model ends at (\S+) %") == f"{100 * both['accuracy']['mean']:.1f}"
    assert claimed(r"on lookup at (\S+) %") == f"{100 * both['accuracy_lookup']['mean']:.1f}"
    assert claimed(r"forbidding re-checks \((.+?) tokens") == said("no re-checks", "think_tokens", 1)
    lost = [
        -100 * paired[name]["accuracy"]["mean"] for name in ("budget of 12", "budget of 24", "budget of 48", "asked to be quick")
    ]
    assert claimed(r"a cue word cost (.+?) points") == span(lost)


def test_numbers_on_the_smol_reasoner_are_those_of_its_card():
    card = (ROOT / "data/smol-reasoner/README.md").read_text()

    def measured(what: str) -> list[float]:
        (row,) = re.findall(rf"^\| {re.escape(what)} \| (.+?) \|$", card, re.MULTILINE)
        return [100 * float(v) for v in re.findall(r"[\d.]+", row)]

    mean, low, high = (f"{v:.1f}" for v in measured("accuracy"))
    assert claimed(r"it is right in (.+?) of its responses") == f"{mean} % [{low}, {high}]"
    assert claimed(r"the shortest fifth is right in (\d+) %") == f"{measured('accuracy on 3+ steps, the shortest 20 %')[0]:.0f}"
    assert claimed(r"right in \d+ %, the rest in (\d+) %") == f"{measured('accuracy on 3+ steps, the rest')[0]:.0f}"


def test_effects_on_the_smol_reasoner_are_those_of_its_results():
    results = ROOT / "data/smol-reasoner/results"
    claims = {row["effect"]: row["estimate"] for row in json.loads((results / "claims.json").read_text())}
    board = json.loads((results / "board.json").read_text())

    def found(effect: str, scale: float = 1.0, sign: str = "") -> str:
        mean, low, high = (f"{scale * claims[effect][k]:{sign}.1f}" for k in ("mean", "low", "high"))
        return f"{mean} [{low}, {high}]"

    told = found("ThinkEdit, as published: thinks longer", sign="+").replace(" [", " tokens [")
    assert claimed(r"does not lengthen thinking: (.+?)\. ") == told
    length = board["conditions"]["base"]["metrics"]["think_tokens"]["mean"]
    told = found("Efficiency Steering: shorter").replace(" [", f" of {length:.0f} tokens [")
    assert claimed(r"Efficiency Steering shortens it by (.+?), a random") == told
    noise = board["paired"]["control: Efficiency Steering, random direction"]["think_tokens"]
    assert noise["low"] < 0 < noise["high"]
    cost = -100 * board["paired"]["Efficiency Steering, shorter"]["accuracy"]["mean"]
    assert claimed(r"but it costs (\S+) points") == f"{cost:.1f}"
    needles = [f"{100 * board['conditions'][c]['metrics']['retrieved']['mean']:.0f}" for c in ("base", "4 retrieval heads masked")]
    assert claimed(r"heads masked take needles from (.+?) %, four random ones none") == " to ".join(needles)
    assert board["paired"]["control: 4 random heads masked"]["retrieved"]["mean"] == 0
    effect = "GRPO, correctness, 8 steps: more accurate"
    assert claimed(r"Eight steps of GRPO gain (.+?), more") == found(effect, 100).replace(" [", " points [")
    others = [p["accuracy"]["mean"] for c, p in board["paired"].items() if board["conditions"][c]["family"] in ("edit", "steer")]
    assert max(others) < claims[effect]["low"]


def test_speeds_are_those_of_the_last_full_table():
    report = json.loads((ROOT / "tests/benchmarks/report.json").read_text())
    ratio = {row["name"]: row["ratio"] for row in report["rows"]}

    def said(name: str) -> str:
        (found,) = (f"{value:.2f}" for key, value in ratio.items() if name in key and value is not None)
        return found

    bare = "over a bare forward of the same batches"
    assert claimed(r"all heads cost (\S+) x the bare forward pass") == said(f"collect, tiny reasoner: {bare}")
    assert claimed(r"on the tiny reasoner and (\S+) x on 47 M weights") == said(f"collect, 47 M: {bare}")
    assert claimed(r"published way takes (\S+) x as long") == said("collect, 47 M: times faster")
    assert claimed(r"with exact entropies (\S+) x") == said("with exact entropies")
    assert claimed(r"every block costs (\S+) x raw hooks") == said("capture, last token: over raw hooks on")
    assert claimed(r"TransformerLens takes (\S+) x and") == said("capture, last token: TransformerLens")
    assert claimed(r"nnsight (\S+) x as long") == said("capture, last token: nnsight")
    assert claimed(r"GRPO step takes (\S+) of TRL") == said("GRPO")
    assert claimed(r"reward makes (\S+) million rows") == said("slowest closed-form reward")
    assert claimed(r"tiny reasoner makes (\S+) x the tokens") == said("512 rows: tokens/s over generate, one batch")
    assert claimed(r"in one batch, (\S+) x in sorted batches") == said("512 rows: tokens/s over generate, sorted")
    assert claimed(r"eight prompts (\S+) x") == said("SmolLM2: tokens/s over generate, one batch")
    assert claimed(r"or (\S+) x with bf16 weights") == said("SmolLM2 in bf16: tokens/s over generate in fp32")
