"""Numbers are spliced into pages between marks, and nowhere else; shuffled rewards stay in their group."""

from __future__ import annotations

import re

import numpy as np
import pytest
from test_readme import ROOT, script

from toolkit.rewards import RewardBatch
from toolkit.rewards.correctness import LengthPenalty

publish = script(ROOT / "data/publish.py")


def test_a_text_replaces_what_is_between_its_marks_and_nothing_else(tmp_path):
    page = tmp_path / "page.md"
    page.write_text("a\n<!-- x: begin -->\nold \\1\n<!-- x: end -->\nb\n<!-- y: begin -->\nstays\n<!-- y: end -->\n")
    publish.splice("x", "new \\1", page)
    assert page.read_text() == "a\n<!-- x: begin -->\n\nnew \\1\n\n<!-- x: end -->\nb\n<!-- y: begin -->\nstays\n<!-- y: end -->\n"
    with pytest.raises(ValueError, match="0 pairs of the marks <!-- z: begin -->"):
        publish.splice("z", "new", page)


def test_work_is_kept_apart_if_a_script_that_is_loaded_or_the_helpers_of_all_scripts_change(tmp_path, monkeypatch):
    monkeypatch.setattr(publish, "ROOT", tmp_path)
    monkeypatch.setattr(publish, "HERE", tmp_path)
    (tmp_path / "publish.py").write_text("seed = 0\n")
    (tmp_path / "data" / "study").mkdir(parents=True)
    own, other = tmp_path / "data" / "study" / "measure.py", tmp_path / "data" / "train.py"
    own.write_text("a = 1\n")
    other.write_text("steps = 1\n")
    folder = publish.work_folder(str(own), "code", scripts=("train.py",))
    assert folder == publish.work_folder(str(own), "code", scripts=("train.py",))
    other.write_text("steps = 2\n")
    changed = publish.work_folder(str(own), "code", scripts=("train.py",))
    assert changed != folder
    (tmp_path / "publish.py").write_text("seed = 1\n")
    assert publish.work_folder(str(own), "code", scripts=("train.py",)) not in (folder, changed)


LOADS = re.compile(r'publish\.(?:script\("([^"]+/train\.py)"\)|(small_model)\()')
KEEPS = [
    path for path in sorted(ROOT.glob("data/*/*.py")) if "publish.work_folder(" in (text := path.read_text()) and LOADS.search(text)
]


@pytest.mark.parametrize("path", KEEPS, ids=lambda path: path.parent.name)
def test_a_script_that_keeps_work_names_the_training_script_that_it_loads(path):
    text = path.read_text()
    for loaded, _ in LOADS.findall(text):
        assert re.search(rf'work_folder\(.*scripts=\(.*"{loaded or "tiny-reasoner/train.py"}"', text)


def test_scripts_that_load_a_training_script_are_found():
    assert {"why", "ruler", "backtracking"} <= {path.parent.name for path in KEEPS}


def test_shuffled_rewards_stay_in_their_group_with_their_components_and_change_with_step_and_seed():
    rng = np.random.default_rng(0)
    ids, tokens, correct = rng.permutation(["a"] * 16 + ["b"] * 16), rng.permutation(np.arange(1, 33)), rng.integers(0, 2, 32)

    def rows(seed, step):
        batch = RewardBatch.from_columns(problem_id=ids, tokens=tokens, correct=correct, step=step)
        inner = LengthPenalty(longest=100)
        plain, mixed = (np.stack(list(r(batch).components.values()), axis=1) for r in (inner, publish.Shuffled(inner, seed)))
        for group in ("a", "b"):  # the same rewards, component beside component, in another order
            assert sorted(mixed[ids == group].tolist()) == sorted(plain[ids == group].tolist())
            assert mixed[ids == group].tolist() != plain[ids == group].tolist()
        return mixed.tolist()

    assert rows(0, 1) == rows(0, 1)
    assert rows(0, 1) != rows(0, 2) and rows(0, 1) != rows(1, 1)


KEEPING = [
    path
    for path in sorted(ROOT.glob("data/*/*.py"))
    if "publish.work_folder(" in path.read_text() and re.search(r"\blms?\.load\(", path.read_text())
]
"""Scripts that load a model and keep work."""


@pytest.mark.parametrize("path", KEEPING, ids=lambda path: f"{path.parent.name}/{path.name}")
def test_a_script_that_loads_a_model_and_keeps_work_keys_it_by_the_fingerprint_of_the_model(path):
    assert re.search(r"publish\.work_folder\(.*fingerprint", path.read_text())


def test_some_scripts_load_a_model_and_keep_work():
    assert len(KEEPING) > 1
