"""What is promised about installing: the wheel carries the tiny reasoner, importing is light, versions are bounded."""

from __future__ import annotations

import ast
import os
import re
import subprocess
import sys
import tomllib
import zipfile
from functools import cache
from importlib.metadata import packages_distributions
from pathlib import Path

import pytest
from packaging.requirements import Requirement
from packaging.utils import canonicalize_name
from packaging.version import Version

import toolkit

REPO = Path(__file__).parents[2]
MODEL = "data/tiny-reasoner"
MODEL_FILES = ("config.json", "model.safetensors", "tokenizer.json")
HEAVY = ("trl", "peft", "datasets", "transformer_lens", "nnsight")


def run(*command: str | Path, cwd: Path = REPO, **env: str) -> str:
    done = subprocess.run(
        [str(c) for c in command],
        cwd=cwd,
        env=os.environ | env,
        capture_output=True,
        text=True,
        stdin=subprocess.DEVNULL,
    )
    assert done.returncode == 0, f"{command} failed:\n{done.stdout}\n{done.stderr}"
    return done.stdout


def tracked(folder: str) -> list[str]:
    """Files of ``folder`` that git tracks, relative to it."""
    return [f.removeprefix(f"{folder}/") for f in run("git", "ls-files", folder).splitlines()]


@cache
def project() -> dict:
    return tomllib.loads((REPO / "pyproject.toml").read_text(encoding="utf-8"))["project"]


def base() -> list[Requirement]:
    return [Requirement(line) for line in project()["dependencies"]]


def extras() -> dict[str, list[Requirement]]:
    return {name: [Requirement(x) for x in lines] for name, lines in project()["optional-dependencies"].items()}


def everything() -> list[Requirement]:
    needs = [*base(), *(need for extra in extras().values() for need in extra)]
    return [need for need in needs if need.name != project()["name"]]


def pins() -> dict[str, str]:
    lines = (REPO / "constraints.txt").read_text(encoding="utf-8").splitlines()
    pairs = [line.split("==") for line in lines if line and not line.startswith("#")]
    return {canonicalize_name(name): version for name, version in pairs}


@pytest.fixture(scope="module")
def wheel(tmp_path_factory) -> Path:
    target = tmp_path_factory.mktemp("wheel")
    run(sys.executable, "-m", "build", "--wheel", "--no-isolation", "--outdir", target)
    (path,) = target.glob("*.whl")
    return path


@pytest.fixture(scope="module")
def installed(wheel, tmp_path_factory) -> Path:
    """A folder with the unpacked wheel, as pip would leave it in site-packages."""
    target = tmp_path_factory.mktemp("installed")
    with zipfile.ZipFile(wheel) as archive:
        archive.extractall(target)
    return target


def test_wheel_is_named_after_the_version_of_the_package(wheel):
    assert wheel.name == f"reasoning_length_toolkit-{toolkit.__version__}-py3-none-any.whl"


ADAPTER_FILES = ("README.md", "adapter_config.json", "adapter_model.safetensors", "chat_template.jinja")


def test_wheel_holds_every_tracked_file_of_the_package_and_the_models(wheel):
    held = set(zipfile.ZipFile(wheel).namelist())
    model = tracked(MODEL)
    assert set(MODEL_FILES) <= set(model), f"{MODEL} is not complete in git: {model}"
    expected = {f"toolkit/{f}" for f in tracked("toolkit")} | {f"toolkit/_data/tiny-reasoner/{f}" for f in model}
    expected |= {f"toolkit/_data/tiny-searcher/{f}" for f in MODEL_FILES}
    expected |= {f"toolkit/_data/smol-reasoner/{f}" for f in ADAPTER_FILES}
    assert not expected - held


def test_wheel_holds_nothing_else_and_stays_small(wheel):
    outside = [n for n in zipfile.ZipFile(wheel).namelist() if not n.startswith(("toolkit/", "reasoning_length_toolkit-"))]
    assert not outside
    assert wheel.stat().st_size < 16e6  # 10 MB of them the adapter


def test_wheel_has_the_command_the_license_and_a_description(wheel):
    archive = zipfile.ZipFile(wheel)
    info = f"reasoning_length_toolkit-{toolkit.__version__}.dist-info"
    assert "toolkit = toolkit.cli:main" in archive.read(f"{info}/entry_points.txt").decode()
    assert "Apache License" in archive.read(f"{info}/licenses/LICENSE").decode()
    metadata = archive.read(f"{info}/METADATA").decode()
    assert "License-Expression: Apache-2.0" in metadata
    assert metadata.partition("\n\n")[2].startswith("# "), "README.md is not the description"


def test_tiny_reasoner_loads_from_the_wheel_in_an_empty_folder(installed, tmp_path):
    code = "from toolkit import lm; lm.load('tiny-reasoner'); print(lm.__file__, lm.tiny_reasoner_path())"
    package, model = run(sys.executable, "-P", "-c", code, cwd=tmp_path, PYTHONPATH=str(installed)).split()
    assert Path(package).is_relative_to(installed) and Path(model).is_relative_to(installed)


def test_command_starts_from_the_wheel_in_an_empty_folder(installed, tmp_path):
    code = "from toolkit.cli import app; app(['--help'])"
    assert "demo" in run(sys.executable, "-P", "-c", code, cwd=tmp_path, PYTHONPATH=str(installed))
    assert not list(tmp_path.iterdir())


def loaded_after(code: str) -> set[str]:
    return set(run(sys.executable, "-c", f"{code}\nimport sys; print(*sys.modules)").split())


def test_importing_the_package_is_light():
    assert not loaded_after("import toolkit") & {*HEAVY, "torch", "transformers", "pandas", "sklearn", "plotly"}


def test_importing_the_base_rooms_needs_no_extra():
    rooms = [p.stem for p in (REPO / "toolkit").iterdir() if not p.stem.startswith("_")]
    assert {"cli", "edits", "tasks"} < set(rooms)
    assert not loaded_after(f"from toolkit import {', '.join(rooms)}") & set(HEAVY)


def imported() -> dict[str, set[str]]:
    """Top-level packages that the toolkit imports, each with the files that do."""
    found: dict[str, set[str]] = {}
    for path in (REPO / "toolkit").rglob("*.py"):
        for node in ast.walk(ast.parse(path.read_text(encoding="utf-8"))):
            names = [a.name for a in node.names] if isinstance(node, ast.Import) else []
            names += [node.module] if isinstance(node, ast.ImportFrom) and node.module else []
            for name in names:
                found.setdefault(name.partition(".")[0], set()).add(path.name)
    return {name: files for name, files in found.items() if name not in {*sys.stdlib_module_names, "toolkit"}}


def test_every_imported_package_is_a_declared_dependency():
    declared = {canonicalize_name(r.name) for r in base()}
    declared |= {canonicalize_name(r.name) for name, needs in extras().items() if name != "dev" for r in needs}
    owners = packages_distributions()
    missing = {
        name: files
        for name, files in imported().items()
        if not {canonicalize_name(owner) for owner in owners.get(name, [name])} & declared
    }
    assert not missing


def test_every_dependency_has_both_bounds_and_its_pin_lies_within():
    for need in everything():
        assert re.search(r">=[\d.]+", str(need.specifier)) and re.search(r"<[\d.]+", str(need.specifier)), need
        assert need.specifier.contains(pins()[canonicalize_name(need.name)]), need


def test_extra_all_is_every_extra_but_dev():
    (need,) = extras()["all"]
    assert need.extras == set(extras()) - {"all", "dev"}


def test_the_oldest_versions_are_the_lower_bounds():
    lines = (REPO / "constraints-oldest.txt").read_text(encoding="utf-8").splitlines()
    oldest = dict(line.split("==") for line in lines if not line.startswith("#"))
    tested = {
        need.name: need for need in [*base(), *(need for name in ("rl", "gguf") for need in extras()[name])] if need.name != "torch"
    }
    assert tested.keys() == oldest.keys() - {"click"}  # that others bring
    for name, need in tested.items():
        (lower,) = [Version(bound.version) for bound in need.specifier if bound.operator == ">="]
        assert lower == Version(oldest[name]), name


def test_constraints_are_plain_public_pins():
    lines = (REPO / "constraints.txt").read_text(encoding="utf-8").splitlines()
    assert all(re.fullmatch(r"#.*|[A-Za-z0-9._-]+==[0-9][0-9A-Za-z.]*", line) for line in lines)
    assert pins()["torch"] == "2.13.0"


def test_the_source_archive_has_every_file_that_tests_and_commands_of_the_repository_read():
    settings = tomllib.loads((REPO / "pyproject.toml").read_text(encoding="utf-8"))
    included = {name.strip("/") for name in settings["tool"]["hatch"]["build"]["targets"]["sdist"]["include"]}
    assert {"plans", "constraints-oldest.txt", "data", "tests"} <= included
    assert all((REPO / name).exists() for name in included)


def test_every_listed_make_target_runs_even_if_a_file_has_its_name():
    text = (REPO / "Makefile").read_text(encoding="utf-8")
    (phony,) = re.findall(r"^\.PHONY: (.+)$", text, re.MULTILINE)
    assert {*re.findall(r"^([a-z-]+):.*##", text, re.MULTILINE)} <= {*phony.split()}
