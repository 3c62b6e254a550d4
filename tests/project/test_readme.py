"""The README keeps its word: its commands run, its Python runs, its links lead somewhere."""

from __future__ import annotations

import importlib.util
import json
import re
import shlex
import sys
from pathlib import Path

import pandas as pd
import pytest
from typer.testing import CliRunner

from toolkit import cli
from toolkit.cli.claims import OF_TINY_REASONER

ROOT = Path(__file__).parents[2]
README = (ROOT / "README.md").read_text()


def test_every_command_of_the_readme_runs(tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    # Blocks without a language are commands to run; "text" marks those that need a hub and a GPU.
    blocks = re.findall(r"^```(\w*)\n(.*?)^```", README, re.DOTALL | re.MULTILINE)
    plain = "".join(body for language, body in blocks if not language)
    commands = re.findall(r"^toolkit .+$", plain, re.MULTILINE)
    assert len(commands) >= 5
    monkeypatch.setattr("toolkit.jobs.heads.FEW", 4)  # rollouts that are sampled again for each ablated head
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


PAGES = [ROOT / "README.md", *sorted(ROOT.glob("data/**/README.md")), ROOT / "CONTRIBUTING.md", ROOT / "tests/gpu/README.md"]


@pytest.mark.parametrize("page", PAGES, ids=lambda page: str(page.relative_to(ROOT)))
def test_links_of_a_page_lead_to_files_and_headings(page):
    for link in set(re.findall(r"\]\((?!http)([^)]+)\)", page.read_text())):
        path, _, heading = link.partition("#")
        target = page.parent / path if path else page
        assert target.exists(), link
        headings = (
            {re.sub(r"[^\w -]", "", h.lower()).replace(" ", "-") for h in re.findall(r"^#+ (.+)$", target.read_text(), re.M)}
            if heading
            else set()
        )
        assert not heading or heading in headings, link


@pytest.mark.parametrize("target", sorted(set(re.findall(r"\bmake ([\w-]+)", README)) - {"and"}))
def test_make_targets_of_the_readme_exist(target):
    assert re.search(rf"^{target}:", (ROOT / "Makefile").read_text(), re.MULTILINE)


def script(path: Path):
    """A script of the repository as a module."""
    spec = importlib.util.spec_from_file_location(path.stem, path)
    module = importlib.util.module_from_spec(spec)
    sys.modules[spec.name] = module  # dataclasses look their module up
    spec.loader.exec_module(module)
    return module


TABLES = script(ROOT / "data/readme.py")


@pytest.mark.parametrize("name", TABLES.BLOCKS)
def test_a_table_of_the_readme_is_made_from_committed_results(name):
    page, table = TABLES.BLOCKS[name]
    (shown,) = re.findall(rf"<!-- {name}: begin -->\n\n(.*?)\n\n<!-- {name}: end -->", page.read_text(), re.DOTALL)
    assert shown == table() and len(shown.splitlines()) > 5


def test_the_readme_lists_fifty_systems_and_every_place_is_a_module():
    systems = TABLES.read("data/systems.json")
    assert len(systems) == 50 == len({s["name"] for s in systems}) == len({s["paper"] for s in systems})
    places = [place for s in systems for place in s["where"]]
    assert all((ROOT / "toolkit" / f"{place}.py").is_file() or (ROOT / "toolkit" / place).is_dir() for place in places), places


def test_methods_beyond_the_fifty_systems_are_other_papers_and_every_place_is_a_module():
    further, papers = TABLES.read("data/further.json"), {s["paper"] for s in TABLES.read("data/systems.json")}
    assert len(further) == len({m["paper"] for m in further}) and papers.isdisjoint(m["paper"] for m in further)
    assert all((ROOT / "toolkit" / f"{place}.py").is_file() for m in further for place in m["where"])
    named = [m["rival"] for m in further if "rival" in m]
    assert {*named, "steering (ours)", "edit (ours)"} == {*TABLES.read("data/rivals/results.json")["methods"]}


def test_a_training_command_of_the_tables_names_a_model_where_the_tiny_reasoner_solves_no_problem_of_the_task():
    rows = [*TABLES.read("data/systems.json"), *TABLES.read("data/further.json")]
    commands = re.findall(r"`(toolkit grpo [^`]+)`", " ".join(row.get("runs", "") for row in rows))
    tasks = {command: re.findall(r"-t (\S+)", command) or ["arithmetic"] for command in commands if " -m " not in command}
    assert tasks and {task for (task,) in tasks.values()} <= {*OF_TINY_REASONER}


def test_a_newcomer_reads_at_most_900_words_before_the_reference():
    assert len(README.split("# Reference")[0].split()) <= 900


# Script of data/ -> its function that returns the tables of the page beside it: a text, or a text by mark.
PAGES_OF_DATA = {
    "board/controls": "tables", "branch-judge/measure": "tables", "chain-length/measure": "page", "dto/measure": "page",
    "engines/measure": "table", "failed-steps/measure": "page", "hypotheses/measure": "tables", "judging/measure": "tables",
    "long-context/measure": "texts", "longrm/measure": "table", "longwriter/measure": "tables",
    "questions/measure": "tables", "ranking/measure": "table", "retrieval-heads/properties": "page",
    "rivals/measure": "tables", "ruler/measure": "tables", "searching/study": "page", "slaq/measure": "page",
    "text-to-sql/study": "page", "tiny-searcher/measure": "tables",
}  # fmt: skip
NAMED = {  # results and marks with other names than results.json and the folder's
    "board": "controls", "engines": "llama-server", "questions": "answers", "retrieval-heads": "properties", "slaq": "smollm2",
}  # fmt: skip


@pytest.mark.parametrize("made_by", PAGES_OF_DATA)
def test_a_table_of_a_page_in_data_is_made_from_the_results_beside_it(made_by):
    path = ROOT / f"data/{made_by}.py"
    folder, page = path.parent.name, (path.parent / "README.md").read_text()
    results = next(f for name in ("results", NAMED.get(folder)) if (f := path.parent / f"{name}.json").is_file())
    made = getattr(script(path), PAGES_OF_DATA[made_by])(TABLES.read(f"data/{folder}/{results.name}"))
    tables = made if isinstance(made, dict) else {NAMED.get(folder, folder): made}
    assert tables
    for mark, text in tables.items():
        assert f"<!-- {mark}: begin -->\n\n{text}\n\n<!-- {mark}: end -->" in page


# --- sentences without numbers: each is a property of committed results -------------------------------------------


def changes(name: str, column: str) -> list[tuple[float, float, float]]:
    """The changes, with intervals, of the demo's conditions whose names begin so."""
    rows = [row for key, row in TABLES.read("notebooks/figures/demo.json").items() if key.startswith(name)]
    return [tuple(map(float, re.findall(r"\((\S+) \[(\S+), (\S+)\]\)", row[column])[0])) for row in rows]


def test_the_same_edit_of_random_heads_makes_no_answers_right_and_thinking_no_longer_in_the_demo():
    longer, right = (changes("ThinkEdit (ours): random heads", column) for column in ("think tokens", "accuracy"))
    assert len(longer) == len(right) == 3
    assert all(low <= 0 <= high for _, low, high in longer) and all(low <= 0 for _, low, _ in right)
    assert sum(high < 0 for *_, high in right) == 1, "one of the three makes more answers wrong"


def test_directions_between_random_groups_do_a_quarter_to_three_quarters_of_the_edit_in_the_demo():
    found = TABLES.read("notebooks/figures/demo.json")["ThinkEdit (ours)"]["think tokens"]
    edit = float(re.findall(r"\((\S+) ", found)[0])
    shares = [mean / edit for mean, low, _ in changes("ThinkEdit (ours): random direction", "think tokens") if low > 0]
    assert len(shares) == 3 and 0.25 <= min(shares) <= max(shares) <= 0.75


def test_the_copy_score_names_the_wrong_heads_and_the_write_score_the_right_ones_on_the_tiny_reasoner():
    rows = {
        (r["ranking"], r["heads"], r["op"], r["during"]): r
        for r in TABLES.read("data/retrieval-heads/tiny-reasoner.json")["masking"]
    }
    ours, published = (rows[name, 4, "uniform", "decode only"] for name in ("write (ours)", "copy, as published"))
    assert ours["more_than_random_low"] > 0.3 and published["more_than_random_high"] < 0


def test_thinking_is_less_certain_than_answering_and_the_sign_within_a_problem_differs_between_models():
    tiny, smollm2 = (TABLES.read(f"data/entropy/{name}.json") for name in ("tiny-reasoner", "smollm2"))
    think, answer = (next(r for r in tiny["phases"] if (r["phase"], r["responses"]) == (p, "all")) for p in ("think", "answer"))
    assert think["low"] > answer["high"]
    wanted = {"scope": "within", "kind": "spearman", "x": "entropy", "y": "response_tokens"}
    here, there = (next(r for r in run["lengths"] if wanted.items() <= r.items()) for run in (tiny, smollm2))
    assert here["high"] < 0 < there["low"]


def test_heads_that_write_short_thinking_are_not_the_retrieval_heads():
    run = TABLES.read("data/heads/tiny-reasoner.json")
    assert next(r for r in run["overlaps"] if r["pair"] == "short thinking / write")["shared"] == 0


def test_no_recipe_halved_thinking_without_losing_accuracy():
    pytest.importorskip("trl")
    from toolkit.grpo import curves

    table = curves.after_training(curves.read(ROOT / "data/grpo")[1]).set_index("name")
    halved = table[table["think_tokens"] <= 0.5 * table.loc["base", "think_tokens"]]
    assert len(halved) and (halved["accuracy_difference_high"] < 0).all(), f"{sorted(set(halved.index))} halve it"


def test_there_are_more_than_thirty_rewards():
    from toolkit import rewards

    assert len(rewards.ALL) > 30


@pytest.fixture(scope="module")
def board():
    return TABLES.read("data/board/board.json")


FIRST_CORRECT = (
    "GRPO: correctness", "GRPO-lambda", "DLER", "LASER", "LASER-D", "HAPO", "DRPO", "SLPO", "SAR", "Efficient Reasoning",
)  # fmt: skip
"""Rewards that put correctness first, in the README's words ten."""


def test_sentences_on_the_board_are_those_of_the_committed_one(board):
    paired = {name: row["accuracy"] for name, row in board["paired"].items()}
    length = {name: row["think_tokens"] for name, row in board["paired"].items()}
    edit = paired["ThinkEdit (ours)"]
    assert edit["low"] > 0 and edit["p_holm"] < 0.05
    untrained = {n for n, c in board["conditions"].items() if c["family"] in ("edit", "steer", "mask", "decode", "prompt")}
    assert max(untrained, key=lambda name: paired[name]["mean"]) == "ThinkEdit (ours), strength 2"
    heads, groups = paired["control: random heads edited"], paired["control: random direction edited"]
    assert abs(heads["mean"]) < 0.005 and groups["p_holm"] > 0.05 and 0.4 < groups["mean"] / edit["mean"] < 0.6, "half of the edit"
    for name in FIRST_CORRECT:
        assert paired[name]["low"] > edit["high"] and length[name]["low"] < 0 < length[name]["high"], name
        assert 0.215 < paired[name]["mean"] < 0.235, name  # 22 to 23 points
    parts = [paired[f"GRPO-lambda, {part}"] for part in ("one vector per layer", "two heads")]
    chance = paired["control: GRPO-lambda, two random heads"]
    assert [round(p["mean"] / paired["GRPO-lambda"]["mean"], 1) for p in (*parts, chance)] == [0.6, 0.8, 0.6]
    assert length["PEAR"]["mean"] > board["conditions"]["base"]["metrics"]["think_tokens"]["mean"]
    long_then_short = board["paired"]["Train Long, Think Short"]
    assert long_then_short["accuracy_arithmetic"]["low"] > 0 and long_then_short["accuracy_lookup"]["mean"] < -0.4
    for name in ("budget of 12", "budget of 24", "budget of 48", "asked to be quick", "CREST, 8 heads", "CoDE-Stop"):
        assert paired[name]["high"] < -0.1, name
    for name, least in (("NoWait", -6.4), ("stable direction -0.2", -4.1), ("exit probe 0.7", -1.6)):
        assert length[name]["p_holm"] < 0.05 and length[name]["mean"] == pytest.approx(least, abs=0.06), name
        assert paired[name]["mean"] > -0.01 and paired[name]["high"] > 0
    masks = [board["paired"][name]["accuracy_lookup"] for name in ("2 retrieval heads masked", "control: 2 random heads masked")]
    assert masks[0]["high"] < -0.5 and masks[1]["low"] < 0 < masks[1]["high"]


def test_sentences_on_random_controls_of_the_board_are_those_of_their_paired_differences(board):
    rows = {(r["condition"], r["control"], r["metric"]): r for r in TABLES.read("data/board/controls.json")}
    controls = {name for name, about in board["conditions"].items() if about["family"] == "control"}
    assert {control for _, control, _ in rows} == controls, "every control of the board is compared"
    accuracy = {(r["condition"], r["control"]): r for r in rows.values() if r["metric"] == "accuracy"}
    tokens = {r["condition"]: r for r in rows.values() if r["metric"] == "think_tokens"}
    edit = accuracy["ThinkEdit (ours)", "control: random direction edited"]
    assert edit["low"] < 0 < edit["high"] and accuracy["ThinkEdit (ours)", "control: random heads edited"]["low"] > 0
    better = {name for (name, _), r in accuracy.items() if r["low"] > 0}
    assert better == {"ThinkEdit (ours)", "steered +0.5", "NoWait", "exit probe 0.7", "ReBalance 0.5", "GRPO-lambda, two heads"}
    assert all(r["p_holm"] > 0.05 for (name, _), r in accuracy.items() if name in better)
    assert {name for name, r in tokens.items() if r["high"] < 0} == {
        "steered -0.5",
        "NoWait",
        "stable direction -0.2",
        "CREST, 8 heads",
    }
    for (name, control), r in accuracy.items():  # the same difference as of the means of the board, which are paired by problem
        means = [board["conditions"][n]["metrics"]["accuracy"]["mean"] for n in (name, control)]
        assert r["mean"] == pytest.approx(means[0] - means[1], abs=1e-5)


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
    assert json.loads(json.dumps(board["provenance"]["sizes"])) == json.loads(json.dumps(FULL.record))
    assert {name: about["note"] for name, about in board["conditions"].items()} == {s.name: s.note for s in default.CONDITIONS}


@pytest.mark.parametrize("name", ["qwen2", "qwen3"])
def test_sizes_computed_from_a_config_are_those_of_the_model(name):
    import torch
    from families import CONFIGS, family

    from toolkit.jobs.check import shape_of

    assert TABLES.shape(CONFIGS[name]) == (shape_of(family(name, dtype=torch.bfloat16)), 3)
