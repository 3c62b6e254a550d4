"""Code hashes: what was changed makes stale what passes through it, and nothing else."""

from __future__ import annotations

import ast
from dataclasses import replace

import pytest

from toolkit import baselines, board, store
from toolkit.board import Sizes, Spec, default
from toolkit.grpo import code as policies
from toolkit.grpo import recipes
from toolkit.grpo.plan import TrainingPlan
from toolkit.jobs import grpo as jobs
from toolkit.lm import Condition
from toolkit.store import code

POLICIES = {name: recipes.find(name) for name in ("correctness", "pear", "hapo", "laser_d", "crf", "self_rewarded_efficiency")}


@pytest.fixture
def change(monkeypatch):
    """``change(module, old, new)``: the toolkit as if the source of a module were another."""
    made = code.sources()

    def forget() -> None:
        for cached in (code._imported, code._part, code._is_package):
            cached.cache_clear()

    def act(name: str, old: str, new: str) -> None:
        source = made[name].path.read_text()
        assert old in source, f"{name} no longer has {old!r}"
        changed = {**code.sources(), name: replace(made[name], tree=ast.parse(source.replace(old, new, 1)))}
        monkeypatch.setattr(code, "sources", lambda: changed)
        forget()

    yield act
    monkeypatch.undo()
    forget()


def policy_codes(task: str = "arithmetic") -> dict[str, str]:
    return {name: store.key(policies.modules(recipe, task)) for name, recipe in POLICIES.items()}


def point_codes(
    names=("base", "ThinkEdit (ours)", "steered -0.5", "budget of 12", "PEAR", "HAPO"), task: str = "arithmetic"
) -> dict[str, str]:
    """Hashes of the code of board points that are judged on one task."""
    sizes = Sizes(main=((task, 4),), unseen=())
    ground = board.Ground.modules.func(_OnlySizes(sizes))
    by_name = {spec.name: spec for spec in default.CONDITIONS}
    return {
        name: store.key({**ground, **store.modules_of(*by_name[name].known.modules), **by_name[name].through()}) for name in names
    }


class _OnlySizes:
    def __init__(self, sizes: Sizes) -> None:
        self.sizes = sizes


def stale(before: dict[str, str], after: dict[str, str]) -> set[str]:
    return {name for name in before if before[name] != after[name]}


@pytest.mark.parametrize(
    ("module", "old", "new", "of"),
    [
        ("toolkit.rewards.pear", "import numpy", "import math\nimport numpy", {"pear"}),
        ("toolkit.rewards.hapo", "import numpy", "import math\nimport numpy", {"hapo"}),
        ("toolkit.rewards.slpo", "import numpy", "import math\nimport numpy", {"self_rewarded_efficiency"}),
        ("toolkit.rewards.conciseness", "import numpy", "import math\nimport numpy", {"crf"}),
        ("toolkit.rewards.batch", "from typing", "import math\nfrom typing", set(POLICIES)),
        ("toolkit.grpo.losses", "import torch", "import math\nimport torch", set(POLICIES)),
        ("toolkit.tasks.arithmetic", "import random", "import math\nimport random", set(POLICIES)),
        ("toolkit.tasks.grading.graders", "from __future__", "import math\nfrom __future__", set(POLICIES)),
        ("toolkit.tasks.lookup", "import random", "import math\nimport random", set()),
    ],
)
def test_a_changed_reward_makes_its_own_policies_stale_and_a_changed_trainer_or_task_all(change, module, old, new, of):
    before = policy_codes()
    change(module, old, new) if "__future__" not in old else change(module, '"""', 'import math\n"""')
    assert stale(before, policy_codes()) == of


def test_a_constant_that_a_function_reads_is_part_of_its_code(change):
    before = store.modules_of("toolkit.jobs.grpo:_curve")
    change("toolkit.jobs.grpo", "HARD = (6, 7, 8)", "HARD = (7, 8)")
    assert store.modules_of("toolkit.jobs.grpo:_curve") != before


def test_a_curve_depends_on_the_rows_it_keeps_and_the_number_type_it_is_judged_in(tiny):
    modules = jobs._curve_basis(tiny, recipes.find("pear"), 0, TrainingPlan(pool=4, held_out=2), 8).modules
    assert {"toolkit.grpo.curves:steps", "toolkit.merging:in_type_of"} <= set(modules)


def test_a_recipe_that_is_added_or_changed_makes_no_other_policy_stale(change):
    before = policy_codes()
    change("toolkit.grpo.recipes", "def length_penalty_mild", "def another():\n    return 1\n\n\ndef length_penalty_mild")
    change("toolkit.rewards", '"1 for a right answer', '"One for a right answer')
    assert not stale(before, policy_codes())


def test_a_point_of_the_board_passes_through_its_own_reward_only(change):
    before = point_codes()
    change("toolkit.rewards.pear", "import numpy", "import math\nimport numpy")
    assert stale(before, point_codes()) == {"PEAR"}
    change("toolkit.grpo.trainer", "import math\n", "import math\nimport cmath\n")
    assert stale(before, point_codes()) == {"PEAR", "HAPO"}


@pytest.mark.parametrize(
    "module",
    [
        "toolkit.tasks.arithmetic",
        "toolkit.tasks.grading.graders",
        "toolkit.generate",
        "toolkit.board.measure",
        "toolkit.stats.estimates",
    ],
)
def test_a_changed_task_judge_or_measurement_makes_everything_judged_by_it_stale(change, module):
    before = point_codes()
    change(module, '"""', 'import math\n"""')
    after = point_codes()
    assert stale(before, after) == set(before)


def test_a_task_that_nothing_is_judged_on_makes_nothing_stale(change):
    before = point_codes()
    change("toolkit.tasks.wordproblems", '"""', 'import math\n"""')
    assert not stale(before, point_codes())
    assert stale(before, point_codes(task="wordproblems")) == set(before)


@pytest.mark.parametrize(
    "module", ["toolkit.figures.board", "toolkit.board.page", "toolkit.board.reading", "toolkit.board.running", "toolkit.cli.board", "toolkit.report", "toolkit.widgets",
               "toolkit.identity", "toolkit.store.code", "toolkit"],
)  # fmt: skip
def test_figures_pages_and_commands_make_nothing_stale(change, module):
    before = {**point_codes(), **policy_codes()}
    change(module, '"""', 'import math\n"""')
    assert not stale(before, {**point_codes(), **policy_codes()})


def test_docstrings_comments_and_line_breaks_do_not_count(change):
    before = {**point_codes(), **policy_codes()}
    change("toolkit.tasks.grading.graders", '"""', '"""Another word. ')
    change("toolkit.generate", "from __future__", "\n\n# a comment\nfrom __future__")
    assert not stale(before, {**point_codes(), **policy_codes()})


def test_a_changed_maker_makes_its_own_conditions_stale(change):
    before = point_codes()
    change(
        "toolkit.board.spec",
        "    plan = ground.plan(strength, form, fraction)\n",
        "    plan = ground.plan(strength, form, fraction, )\n    del seed\n",
    )
    assert stale(before, point_codes()) == {"ThinkEdit (ours)"}


def test_code_is_followed_without_importing_anything():
    assert "toolkit.grpo.trainer" in store.modules_of("toolkit.grpo.run")
    assert not [m for m in store.modules_of("toolkit.grpo.run", without=("toolkit.rewards",)) if "rewards" in m]
    with pytest.raises(ValueError, match=r"'toolkit\.nothing' is not a module of the toolkit"):
        store.code_of("toolkit.nothing")


def test_what_a_package_passes_on_counts_as_the_module_that_defines_it():
    found = store.modules_of("toolkit.grpo.log")
    assert "toolkit.rewards.batch" in found and "toolkit.rewards" not in found and "toolkit.rewards.pear" not in found


# --- the board says what is stale ------------------------------------------------------------------------------------


def test_results_of_other_code_are_said_in_one_line_measured_again_and_kept(change, tiny, tmp_path, monkeypatch):
    measured: list[str] = []

    def measure(ground, spec, seed):
        basis = spec.basis(ground, seed)
        folder = ground.out / "results" / basis.key
        basis.write(folder)
        store.write_json({"name": spec.name}, folder / "about.json")
        measured.append(spec.name)
        return folder

    monkeypatch.setattr(board.running, "_measured", lambda ground, spec, seed, references, expected: measure(ground, spec, seed))
    monkeypatch.setattr(board.running, "measure_references", lambda ground: None)
    sizes = Sizes(main=(("arithmetic", 4),), unseen=(), seeds=1, extraction=(4, 1))
    specs = board.select_conditions([s for s in default.CONDITIONS if s.name in ("base", "PEAR", "budget of 12")])
    said: list[str] = []

    def again():
        said.clear()
        measured.clear()
        board.run(board.Ground(tiny, sizes, tmp_path, said.append), specs, progress=False)
        return sorted(measured)

    assert again() == ["PEAR", "base", "budget of 12"] and not said
    assert again() == [] and not said
    change("toolkit.rewards.pear", "import numpy", "import math\nimport numpy")
    old = {path.name for path in (tmp_path / "results").iterdir()}
    assert again() == ["PEAR"]
    (line,) = said
    assert "PEAR, seed 0" in line and "changed since: toolkit.rewards.pear." in line and "\n" not in line and len(line) <= 400
    assert old < {path.name for path in (tmp_path / "results").iterdir()}
    assert again() == [] and not said
    change("toolkit.tasks.grading.graders", '"""', 'import math\n"""')
    assert again() == ["PEAR", "base", "budget of 12"] and "toolkit.tasks.grading.graders" in said[0]


def test_results_from_before_code_hashes_are_said_not_to_be_used(tiny, tmp_path, monkeypatch):
    store.write_json({"name": "base", "seed": 0}, store.writable(tmp_path / "results" / "0123456789ab") / "about.json")
    said: list[str] = []
    ground = board.Ground(tiny, Sizes(main=(("arithmetic", 4),), unseen=(), extraction=(4, 1)), tmp_path, said.append)
    monkeypatch.setattr(board.running, "_measured", lambda *_: pytest.fail("measured"))
    monkeypatch.setattr(board.running, "measure_references", lambda ground: None)
    with pytest.raises(pytest.fail.Exception):
        board.run(ground, [board.base()], progress=False)
    assert said == [f"1 results in {tmp_path / 'results'} were made by toolkit 0.1.0, before code hashes: they are not used"]


def test_a_condition_of_ones_own_passes_through_what_it_uses(change, tiny, tmp_path):
    ground = board.Ground(tiny, Sizes(main=(("arithmetic", 4),), unseen=(), extraction=(4, 1)), tmp_path)
    mine = Spec("mine", "decode", lambda ground, seed: Condition(ground.lm, rules=(baselines.Budget(7),)))
    told = replace(mine, identity={"budget": 7})
    before = mine.key(ground, 0), told.key(ground, 0)
    change("toolkit.baselines", '"""', 'import math\n"""')
    assert mine.key(ground, 0) != before[0] and told.key(ground, 0) != before[1]
