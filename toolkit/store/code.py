"""Hashes of the toolkit's own source code. They are part of a result's cache key, so a result is recomputed if its code has changed.

``modules_of("toolkit.generate")`` returns the hashes of ``toolkit.generate`` and of all modules of the toolkit that it imports. Source
files are only read, not imported. Docstrings and comments are not hashed, so rewording them does not make results outdated.
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
"""Field -> type, for the record that is saved beside a result (see ``Basis.record``)."""
BEFORE_HASHES = "toolkit 0.1.0, before code hashes"  # named in messages as the maker of results that have no record
LISTS = frozenset({"toolkit", "toolkit.rewards", "toolkit.tasks", "toolkit.methods", "toolkit.board.spec"})
"""Modules that import every member of a package, such as every task, only to list them.

A result depends only on the members that it uses. So ``modules_of`` does not follow the imports of these modules.
"""
CLASSES_ONLY = frozenset({"toolkit.grpo.recipes"})
"""Modules that define classes and a list of their instances, such as GRPO recipes. Only the classes are hashed.

A result uses one instance, whose fields are part of the result's cache key already. The other instances do not matter.
"""
NO_NUMBERS = (
    "toolkit.figures", "toolkit.report", "toolkit.transcript", "toolkit.pages", "toolkit.verdicts", "toolkit.widgets", "toolkit.cli", "toolkit.processes", "toolkit.identity",
    "toolkit.grpo.code",
    "toolkit.grpo.tracking",
    "toolkit.store.code",
)  # fmt: skip
"""Modules and packages that cannot change a number in a result. They display or send results, compute cache keys or start processes."""


@dataclass(frozen=True)
class Module:
    """The source of one module of the toolkit.

    Attributes:
        name: Dotted name, such as ``"toolkit.generate"``.
        path: File of the module.
        tree: Syntax tree of the source.
    """

    name: str
    path: Path
    tree: ast.Module

    @cached_property
    def digest(self) -> str:
        """Hash of the module's code without docstrings and comments, as 12 hexadecimal digits.

        If the module is in ``CLASSES_ONLY``, only its classes are hashed.
        """
        # counted: the statements to hash.
        counted = [n for n in self.tree.body if isinstance(n, ast.ClassDef)] if self.name in CLASSES_ONLY else self.tree.body
        return _digest(list(counted))

    @cached_property
    def names(self) -> dict[str, tuple[str, str]]:
        """The module's imports from the toolkit: local name -> ``(module, attribute)`` that the name stands for.

        ``from toolkit.store import key as k`` gives ``{"k": ("toolkit.store", "key")}``. The attribute is ``""`` for ``import module``.
        Imports inside functions are included.
        """
        names: dict[str, tuple[str, str]] = {}
        for node in ast.walk(self.tree):
            if isinstance(node, ast.Import):
                names |= {a.asname or a.name: (a.name, "") for a in node.names if a.name.split(".")[0] == "toolkit"}
            elif isinstance(node, ast.ImportFrom) and not node.level and (node.module or "").split(".")[0] == "toolkit":
                names |= {a.asname or a.name: (str(node.module), a.name) for a in node.names}
        return names

    @cached_property
    def attributes(self) -> dict[str, set[str]]:
        """Name in the module's code -> the attributes that the code reads from it. Example: ``store.key`` gives ``{"store": {"key"}}``."""
        attributes: dict[str, set[str]] = {}
        for node in ast.walk(self.tree):
            if isinstance(node, ast.Attribute) and isinstance(node.value, ast.Name):
                attributes.setdefault(node.value.id, set()).add(node.attr)
        return attributes


def shape(node: Any) -> Any:
    """Return a syntax tree as nested tuples, without line numbers, empty fields and docstrings.

    Empty fields are left out because new versions of Python add some. So the tuples are the same in all versions.
    """
    if isinstance(node, ast.AST):
        return (type(node).__name__, *((name, shape(v)) for name, v in ast.iter_fields(node) if v not in (None, [])))
    if isinstance(node, list):
        return tuple(shape(n) for n in node if not _is_text(n))
    return node


def _is_text(node: Any) -> bool:
    return isinstance(node, ast.Expr) and isinstance(node.value, ast.Constant) and isinstance(node.value.value, str)


@cache
def sources() -> Mapping[str, Module]:
    """Return ``{dotted name: Module}`` for every module of the toolkit.

    Files are read once per process, at the first call. A file that changes later is not read again: the process still runs the old code.
    """
    root = Path(toolkit.__file__).parent
    modules = {}
    for path in sorted(root.rglob("*.py")):
        parts = ("toolkit", *path.relative_to(root).with_suffix("").parts)
        name = ".".join(parts[:-1] if parts[-1] == "__init__" else parts)
        modules[name] = Module(name, path, ast.parse(path.read_text(encoding="utf-8")))
    return modules


def modules_of(*roots: str, without: tuple[str, ...] = ()) -> dict[str, str]:
    """Return ``{module: hash of its code}`` for ``roots`` and all modules of the toolkit that they import, directly or indirectly.

    If a name is imported from a package, the module that defines the name is included, not the whole package. Modules that cannot change a
    number in a result (``code.NO_NUMBERS``) are left out, even if they are in ``roots``. Modules that only list the members of a package
    (``code.LISTS``) are left out if another module imports them, and their own imports are not followed.

    Args:
        roots: Dotted names such as ``"toolkit.generate"``. ``"module:function"`` stands for one function and the definitions in the same
            module that it uses; nothing that it imports is included.
        without: Other modules and packages to leave out where they are imported. A root is included even if it is in ``without``.

    Raises:
        ValueError: a root is not a module of the toolkit.
    """
    if unknown := [name for name in roots if name.partition(":")[0] not in sources()]:
        raise ValueError(f"{unknown[0]!r} is not a module of the toolkit: give a dotted name such as 'toolkit.generate'.")
    parts = [name for name in roots if ":" in name]
    # Imports are followed from whole modules. Single functions (``parts``, written "module:function") are hashed on their own.
    reached, todo = set[str](), [name for name in roots if name not in parts and not _below(name, NO_NUMBERS)]
    while todo:
        name = todo.pop()
        if name not in reached:
            reached.add(name)
            todo += [n for n in _imported(name) if not _below(n, (*NO_NUMBERS, *without))]
    return {name: sources()[name].digest for name in sorted(reached)} | {name: _part(name) for name in sorted(parts)}


def code_of(*roots: str, without: tuple[str, ...] = ()) -> str:
    """Return one hash over the code of ``roots`` and all modules that they import. For the arguments see ``modules_of``."""
    return key(modules_of(*roots, without=without))


def _below(name: str, packages: tuple[str, ...]) -> bool:
    # True if ``name`` is one of the packages or inside one. The dots keep "toolkit.report" from matching "toolkit.reports".
    return any(f"{name}.".startswith(f"{package}.") for package in packages)


@cache
def _part(root: str) -> str:
    """Return a hash of the definition ``"module:name"`` and of all definitions in its module that it uses, directly or indirectly."""
    module, _, first = root.partition(":")
    defined = {name: n for n in sources()[module].tree.body for name in _names(n)}
    used, todo = set[str](), [first]
    while todo:
        name = todo.pop()
        if name in defined and name not in used:
            used.add(name)
            todo += [node.id for node in ast.walk(defined[name]) if isinstance(node, ast.Name)]
    return _digest([defined[name] for name in sorted(used)])


def _names(node: ast.stmt) -> list[str]:
    """Return the names that a top-level statement defines: that of a function or class, or those that it assigns."""
    if isinstance(node, ast.FunctionDef | ast.ClassDef):
        return [node.name]
    targets = node.targets if isinstance(node, ast.Assign) else [node.target] if isinstance(node, ast.AnnAssign) else []
    return [part.id for target in targets for part in ast.walk(target) if isinstance(part, ast.Name)]


def _digest(nodes: list[Any]) -> str:
    return hashlib.sha256(repr(shape(nodes)).encode()).hexdigest()[:12]


@cache
def _imported(name: str) -> frozenset[str]:
    """Return the modules of the toolkit that the module ``name`` imports from.

    Modules in ``LISTS`` (they only list the members of a package) are left out. The result is empty if ``name`` itself is in ``LISTS`` or
    ``CLASSES_ONLY``.
    """
    module, targets = sources()[name], set[str]()
    for local, (source, attribute) in module.names.items() if name not in LISTS | CLASSES_ONLY else ():
        target = _defining(source, attribute)
        # ``from toolkit import store`` and ``store.key(...)``: follow the attributes in use to the modules that define them.
        used = module.attributes.get(local)
        targets |= {_defining(target, a) for a in used} if used and _is_package(target) else {target}
    return frozenset(targets - LISTS)


@cache
def _is_package(name: str) -> bool:
    return any(other.startswith(f"{name}.") for other in sources())


def _defining(source: str, attribute: str) -> str:
    """Return the module on which ``from source import attribute`` depends.

    If the attribute is a module, that module is returned. Otherwise it is the module that defines the attribute. This may be another module
    than ``source``, which may only re-export it.
    """
    modules = sources()
    if attribute and f"{source}.{attribute}" in modules:
        return f"{source}.{attribute}"
    if attribute in modules[source].names:
        return _defining(*modules[source].names[attribute])
    return source


@dataclass(frozen=True)
class Basis:
    """The inputs and the code that a saved result depends on. If either changes, the result has to be computed again.

    The property ``key`` is the result's cache key. The property ``record`` is saved beside the result.

    Attributes:
        depends: The inputs, such as settings, model and problems; JSON-serialisable.
        modules: Module -> hash of its code, for all modules that the result depends on (see ``modules_of``).
    """

    depends: Any
    modules: Mapping[str, str]

    @property
    def code(self) -> str:
        """One hash over the code of all modules that the result depends on."""
        return key(dict(self.modules))

    @property
    def key(self) -> str:
        """Cache key of the result: a hash over its inputs and over the code that it depends on."""
        return key([self.depends, self.code])

    @property
    def made_by(self) -> str:
        """Version of the toolkit and hash of the code, as readable text."""
        return made_by(self.code)

    @property
    def record(self) -> dict[str, Any]:
        """The record that is saved beside the result, with four fields.

        - ``made_by``: version of the toolkit and hash of the code, as readable text.
        - ``code``: one hash over the code of all modules that the result depends on.
        - ``modules``: module -> hash of its code.
        - ``depends``: hash of the result's inputs.
        """
        return {"made_by": self.made_by, "code": self.code, "depends": key(self.depends), "modules": dict(self.modules)}

    def write(self, folder: Path) -> None:
        """Write the record (see ``Basis.record``) to ``made_by.json`` in a result's folder."""
        write_json(self.record, folder / MADE_BY)

    def changed(self, earlier: Iterable[Mapping[str, Any]]) -> set[str]:
        """Return the names of the modules whose code has changed since earlier results with the same inputs.

        If this result uses a module that an earlier one did not, or the other way round, the module counts as changed.

        Args:
            earlier: Records of the earlier results, from ``records``. Records of results with other inputs are ignored.
        """
        same = [old["modules"] for old in earlier if old["depends"] == key(self.depends) and old["code"] != self.code]
        return {name for old in same for name in {*old, *self.modules} if old.get(name) != self.modules.get(name)}


def records(parent: Path, names: str = "*") -> list[dict[str, Any]]:
    """Return the records of all results in a directory. A record says which inputs and code made a result (see ``Basis.record``).

    Args:
        parent: Directory with one folder per result.
        names: Glob pattern for the names of the folders.

    Raises:
        DamagedFileError: a record does not have the fields of ``RECORD``.
    """
    remedy = "Remove its folder; the result is then computed again."
    return [read_json(path, RECORD, remedy=remedy) for path in sorted(parent.glob(f"{names}/{MADE_BY}"))]


def made_by(code: str) -> str:
    """Return the text "toolkit VERSION, code HASH", which output files hold in their field ``made_by``.

    Args:
        code: Hash of the code that the file depends on, such as ``Basis.code``.
    """
    return f"toolkit {toolkit.__version__}, code {code}"
