"""Work that the scripts in data/ keep is found again only if everything that made it is the same."""

from __future__ import annotations

import ast
import re
from dataclasses import dataclass, replace
from importlib import import_module
from pathlib import Path
from types import SimpleNamespace

import pytest
from test_readme import ROOT, script

from toolkit import rewards, tasks
from toolkit.grpo import recipes
from toolkit.store import code

publish = script(ROOT / "data/publish.py")
KEYED = [path for path in sorted(ROOT.glob("data/*/*.py")) if "CODE = store.code_of(" in path.read_text()]
MEMBERS = ("toolkit.rewards.", "toolkit.tasks.")


def strings(node: ast.AST) -> set[str]:
    return {n.value for n in ast.walk(node) if isinstance(n, ast.Constant) and isinstance(n.value, str)}


def roots(path: Path) -> set[str]:
    """The modules that the script names in its key."""
    (call,) = (
        n.value for n in ast.parse(path.read_text()).body if isinstance(n, ast.Assign) and ast.unparse(n.targets[0]) == "CODE"
    )
    return strings(call)


def imported(module: code.Module) -> set[str]:
    """The modules of rewards and tasks whose names a script imports, also as attributes of the package: ``tasks.searching``."""
    found = set[str]()
    for local, (source, name) in module.names.items():
        whole = source == "toolkit" and name in ("rewards", "tasks")
        parent = f"toolkit.{name}" if whole else source
        for member in module.attributes.get(local, set()) if whole else {name}:
            if f"{parent}.{member}" in code.sources():
                found.add(f"{parent}.{member}")
            elif f"{parent}.".startswith(MEMBERS):
                found.add(getattr(getattr(import_module(parent), member), "__module__", parent))
    return {name for name in found if name.startswith(MEMBERS)}


def named(tree: ast.AST) -> set[str]:
    """The modules of rewards and tasks, and the definitions of recipes, that a script uses by their names in text."""
    found, trained, paid = set[str](), set[str](), set[str]()
    for node in ast.walk(tree):
        match node:
            case ast.Call(func=f, args=args) if ast.unparse(f) in ("recipes.find", "recipes.plain"):
                trained |= {name for arg in args for name in strings(arg)}
            case ast.Call(func=f, args=[first, *_]) if ast.unparse(f) == "tasks.load":
                found |= {module for name in strings(first) for module in tasks.modules(name)}
            case ast.Attribute(value=ast.Name(id="recipes"), attr=name):
                trained.add(name)
            case (
                ast.Assign(targets=[ast.Name(id="ARMS")], value=value)
                | ast.AnnAssign(target=ast.Name(id="ARMS"), value=ast.AST() as value)
            ):
                trained |= strings(value)
            case ast.Subscript(value=ast.Name(id="ALL"), slice=part) | ast.keyword(arg="reward", value=part):
                paid |= strings(part)
    for name in trained & {*recipes.ALL, *rewards.ALL}:
        found.add(f"toolkit.grpo.recipes:{name if name in recipes.ALL else 'plain'}")
        paid.add(recipes.find(name).reward)
    return found | {rewards.ALL[name].make.__module__ for name in paid & {*rewards.ALL}}


def uses(path: Path) -> set[str]:
    """The rewards, recipes and tasks of a script and of the scripts that it loads."""
    text = path.read_text()
    tree = ast.parse(text)
    loaded = [uses(ROOT / "data" / other) for other in re.findall(r'publish\.script\("([^"]+)"\)', text)]
    return imported(code.Module(path.stem, path, tree)).union(named(tree), *loaded)


@pytest.mark.parametrize("path", KEYED, ids=lambda path: path.parent.name)
def test_the_rewards_recipes_and_tasks_of_a_script_are_in_the_key_of_its_work(path):
    assert uses(path) <= {*code.modules_of(*roots(path))}


@pytest.mark.parametrize("path", KEYED, ids=lambda path: path.parent.name)
def test_no_script_keys_its_work_by_a_module_that_only_lists_what_matters(path):
    lists = (code.LISTS | code.CLASSES_ONLY) - {"toolkit.board.spec"}  # which has conditions of its own, and is hashed as a whole
    assert not roots(path) & lists


def test_rewards_recipes_and_tasks_are_found_in_imports_arms_and_calls():
    found = uses(ROOT / "data/searching/study.py")
    wanted = ("mash", "reseek", "re_searcher", "ppr", "toolrl", "search_gen_v", "r3", "correctness", "combine")
    assert {f"toolkit.rewards.{name}" for name in wanted} | {"toolkit.tasks.searching"} <= found
    assert {f"toolkit.grpo.recipes:{name}" for name in ("plain", "mash", "ppr")} <= found
    assert "toolkit.rewards.longwriter_zero" in uses(ROOT / "data/longwriter/measure.py")
    assert "toolkit.rewards.laser" in uses(ROOT / "data/why/measure.py")  # in train.py, which it loads


def test_copy_scores_of_retrieval_heads_are_kept_apart_if_the_code_that_makes_them_changes(monkeypatch):
    properties = script(ROOT / "data/retrieval-heads/properties.py")
    lm, search = SimpleNamespace(fingerprint="a" * 20), properties.LOOKUPS
    before = properties.scores_file(lm, lm, search)
    assert before == properties.scores_file(lm, lm, search)
    monkeypatch.setattr(properties, "CODE", "other")
    assert properties.scores_file(lm, lm, search).parent != before.parent


def test_dose_responses_are_kept_apart_if_their_sampling_changes(monkeypatch, tmp_path):
    results = script(ROOT / "data/smol-reasoner/results.py")

    @dataclass(frozen=True)
    class Study:
        problems: int = 4
        task: str = "arithmetic"

        def load(self, split, lm):
            return tasks.load(self.task, split, self.problems)

    ground = SimpleNamespace(study=Study(), lm=None, identity="ground", out=tmp_path)
    before = results.dose_file(ground, results.OURS, 4)
    assert before == results.dose_file(ground, results.OURS, 4)
    monkeypatch.setattr(results, "DOSED", replace(results.DOSED, max_new_tokens=100))
    assert results.dose_file(ground, results.OURS, 4).name != before.name
