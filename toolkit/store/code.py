"""What kept results were made by: hashes of the toolkit's own source, module by module, and the record beside a result.

``modules_of("toolkit.generate")`` reads no module into Python: it follows the imports in the source. A hash is over the syntax tree
without docstrings and comments, so a reworded docstring makes nothing stale.
"""

from __future__ import annotations

import ast
import hashlib
from collections.abc import Iterable, Mapping
from dataclasses import dataclass
from functools import cache, cached_property
from pathlib import Path
from typing import Any

import toolkit
from toolkit.store.files import key, read_json, write_json

MADE_BY = "made_by.json"
RECORD: Mapping[str, Any] = {"made_by": str, "code": str, "depends": str, "modules": Mapping[str, str]}
"""Fields of the record beside a result, by type."""
BEFORE_HASHES = "toolkit 0.1.0, before code hashes"
LISTS = frozenset({"toolkit", "toolkit.rewards", "toolkit.tasks", "toolkit.methods", "toolkit.board.spec"})
"""Modules that list others: a result passes through the members that it names, not through the list."""
CLASSES_ONLY = frozenset({"toolkit.grpo.recipes"})
"""Modules that list values, such as recipes. A result's key holds the value that was used, so of the module only the classes count."""
NO_NUMBERS = (
    "toolkit.figures", "toolkit.report", "toolkit.transcript", "toolkit.widgets", "toolkit.cli", "toolkit.processes", "toolkit.identity",
    "toolkit.grpo.code",
    "toolkit.store.code",
)  # fmt: skip
"""Modules and packages that draw, print or name numbers, and make none."""


@dataclass(frozen=True)
class Module:
    """The source of one module."""

    name: str
    path: Path
    tree: ast.Module

    @cached_property
    def digest(self) -> str:
        """Twelve hexadecimal digits of its code."""
        counted = [n for n in self.tree.body if isinstance(n, ast.ClassDef)] if self.name in CLASSES_ONLY else self.tree.body
        return _digest(list(counted))

    @cached_property
    def names(self) -> dict[str, tuple[str, str]]:
        """What each imported name stands for: ``(module, attribute)``, wherever in the source the import is."""
        found: dict[str, tuple[str, str]] = {}
        for node in ast.walk(self.tree):
            if isinstance(node, ast.Import):
                found |= {a.asname or a.name: (a.name, "") for a in node.names if a.name.split(".")[0] == "toolkit"}
            elif isinstance(node, ast.ImportFrom) and not node.level and (node.module or "").split(".")[0] == "toolkit":
                found |= {a.asname or a.name: (str(node.module), a.name) for a in node.names}
        return found

    @cached_property
    def attributes(self) -> dict[str, set[str]]:
        """The attributes that are read of each name: ``store.key`` gives ``{"store": {"key"}}``."""
        found: dict[str, set[str]] = {}
        for node in ast.walk(self.tree):
            if isinstance(node, ast.Attribute) and isinstance(node.value, ast.Name):
                found.setdefault(node.value.id, set()).add(node.attr)
        return found


def shape(node: Any) -> Any:
    """A syntax tree as nested tuples, the same in every version of Python: without positions, empty fields and bare strings."""
    if isinstance(node, ast.AST):
        return (type(node).__name__, *((name, shape(v)) for name, v in ast.iter_fields(node) if v not in (None, [])))
    if isinstance(node, list):
        return tuple(shape(n) for n in node if not _is_text(n))
    return node


def _is_text(node: Any) -> bool:
    return isinstance(node, ast.Expr) and isinstance(node.value, ast.Constant) and isinstance(node.value.value, str)


@cache
def sources() -> Mapping[str, Module]:
    """Every module of the package as it was when this was first asked: a file changed later is not the code that runs."""
    root = Path(toolkit.__file__).parent
    found = {}
    for path in sorted(root.rglob("*.py")):
        parts = ("toolkit", *path.relative_to(root).with_suffix("").parts)
        name = ".".join(parts[:-1] if parts[-1] == "__init__" else parts)
        found[name] = Module(name, path, ast.parse(path.read_text(encoding="utf-8")))
    return found


def modules_of(*roots: str, without: tuple[str, ...] = ()) -> dict[str, str]:
    """The modules that results pass through, each with the hash of its code: ``roots`` and what they import, in turn.

    A name that a package only passes on counts as the module that defines it. A list of members (:data:`LISTS`) counts where it is a
    root, and brings none of its members. A root ``module:function`` is that function alone, with what it uses of its own module.

    Args:
        without: Modules and packages not to enter, unless they are roots.

    Raises:
        ValueError: no such module of the toolkit.
    """
    if unknown := [name for name in roots if name.partition(":")[0] not in sources()]:
        raise ValueError(f"{unknown[0]!r} is no module of the toolkit: give a dotted name such as 'toolkit.generate'.")
    parts = [name for name in roots if ":" in name]
    found, todo = set[str](), [name for name in roots if name not in parts and not _below(name, NO_NUMBERS)]
    while todo:
        name = todo.pop()
        if name not in found:
            found.add(name)
            todo += [n for n in _imported(name) if not _below(n, (*NO_NUMBERS, *without))]
    return {name: sources()[name].digest for name in sorted(found)} | {name: _part(name) for name in sorted(parts)}


def code_of(*roots: str, without: tuple[str, ...] = ()) -> str:
    """One hash of :func:`modules_of`."""
    return key(modules_of(*roots, without=without))


def _below(name: str, shut: tuple[str, ...]) -> bool:
    return any(f"{name}.".startswith(f"{other}.") for other in shut)


@cache
def _part(root: str) -> str:
    """Hash of one definition of a module and of the others there that it names, constants among them, in turn."""
    module, _, first = root.partition(":")
    defined = {name: n for n in sources()[module].tree.body for name in _names(n)}
    found, todo = set[str](), [first]
    while todo:
        name = todo.pop()
        if name in defined and name not in found:
            found.add(name)
            todo += [node.id for node in ast.walk(defined[name]) if isinstance(node, ast.Name)]
    return _digest([defined[name] for name in sorted(found)])


def _names(node: ast.stmt) -> list[str]:
    """What a statement of a module defines."""
    if isinstance(node, ast.FunctionDef | ast.ClassDef):
        return [node.name]
    targets = node.targets if isinstance(node, ast.Assign) else [node.target] if isinstance(node, ast.AnnAssign) else []
    return [part.id for target in targets for part in ast.walk(target) if isinstance(part, ast.Name)]


def _digest(nodes: list[Any]) -> str:
    return hashlib.sha256(repr(shape(nodes)).encode()).hexdigest()[:12]


@cache
def _imported(name: str) -> frozenset[str]:
    """The modules that one module takes something from, lists and their members left out."""
    module, found = sources()[name], set[str]()
    for given, (source, attribute) in module.names.items() if name not in LISTS | CLASSES_ONLY else ():
        target = _defining(source, attribute)
        used = module.attributes.get(given)
        found |= {_defining(target, a) for a in used} if used and _is_package(target) else {target}
    return frozenset(found - LISTS)


@cache
def _is_package(name: str) -> bool:
    return any(other.startswith(f"{name}.") for other in sources())


def _defining(source: str, attribute: str) -> str:
    """The module that an imported name is, or is defined in."""
    every = sources()
    if attribute and f"{source}.{attribute}" in every:
        return f"{source}.{attribute}"
    if attribute in every[source].names:
        return _defining(*every[source].names[attribute])
    return source


@dataclass(frozen=True)
class Basis:
    """What a kept result depends on, and the code that makes it: its key, and the record that is kept beside it.

    Attributes:
        depends: Everything it depends on but the code, JSON-serialisable.
        modules: The code: see :func:`modules_of`.
    """

    depends: Any
    modules: Mapping[str, str]

    @property
    def code(self) -> str:
        """Hash of the code."""
        return key(dict(self.modules))

    @property
    def key(self) -> str:
        """Name of what depends on all of it."""
        return key([self.depends, self.code])

    @property
    def made_by(self) -> str:
        """The code in words, for people."""
        return made_by(self.code)

    @property
    def record(self) -> dict[str, Any]:
        """What is written down beside a result."""
        return {"made_by": self.made_by, "code": self.code, "depends": key(self.depends), "modules": dict(self.modules)}

    def write(self, folder: Path) -> None:
        """Write the record into the folder of a result."""
        write_json(self.record, folder / MADE_BY)

    def changed(self, kept: Iterable[Mapping[str, Any]]) -> set[str]:
        """The modules that have changed since results of the same dependencies were made; none if there are none.

        Args:
            kept: Records of results: see :func:`records`.
        """
        same = [old["modules"] for old in kept if old["depends"] == key(self.depends) and old["code"] != self.code]
        return {name for old in same for name in {*old, *self.modules} if old.get(name) != self.modules.get(name)}


def records(parent: Path, names: str = "*") -> list[dict[str, Any]]:
    """The records of the results in a directory whose folders have such names. Raises DamagedFileError naming one that is none."""
    remedy = "Remove the folder that it is in: its result is made again."
    return [read_json(path, RECORD, remedy=remedy) for path in sorted(parent.glob(f"{names}/{MADE_BY}"))]


def made_by(code: str) -> str:
    """How files say what they were made by."""
    return f"toolkit {toolkit.__version__}, code {code}"
