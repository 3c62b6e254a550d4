"""What a value is, in a form that is the same in every process: the identity of functions, objects, models and conditions.

``of(value)`` holds everything that what the value does depends on. A function is its code (docstring, comments and line numbers do not
count), the values it closes over, its defaults, and every global it reads, so that a changed helper or constant changes it. Objects are
their class and fields, tensors their bytes, models their fingerprint. A memory address is never part of it. Functions and classes of
the toolkit are named, and their modules listed, for :func:`store.modules_of`; those of installed packages are named with their version.

Known limits: a file that a function reads, an attribute that it looks up by a computed name, the versions of torch and transformers, and
the version of Python (bytecode differs between versions: what is kept under it is made again).
"""

from __future__ import annotations

import builtins
import dataclasses
import dis
import functools
import hashlib
import importlib
import inspect
import json
import re
import sys
import sysconfig
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass
from enum import Enum
from importlib import metadata
from pathlib import Path, PurePath
from types import (
    BuiltinFunctionType,
    CellType,
    CodeType,
    FunctionType,
    GetSetDescriptorType,
    MappingProxyType,
    MethodDescriptorType,
    MethodType,
    ModuleType,
    WrapperDescriptorType,
)
from typing import Any

import numpy as np
import torch

from toolkit import store
from toolkit.lm import LM, Condition
from toolkit.types import Problem, Provenance

MEANT = inspect.CO_VARARGS | inspect.CO_VARKEYWORDS | inspect.CO_GENERATOR | inspect.CO_COROUTINE | inspect.CO_ASYNC_GENERATOR
"""Flags of a function that change what it does; those of the file it stands in, such as future imports, do not."""
READ_IN_PART = frozenset({"toolkit.board.spec"})
"""Modules of the toolkit whose functions count one by one."""
HOUSEKEEPING = frozenset(
    [
        "__module__",
        "__dict__",
        "__weakref__",
        "__doc__",
        "__annotations__",
        "__annotate__",
        "__annotate_func__",
        "__annotations_cache__",
        "__qualname__",
        "__slots__",
        "__abstractmethods__",
        "_abc_impl",
        "__parameters__",
        "__orig_bases__",
        "__match_args__",
        "__firstlineno__",
        "__static_attributes__",
        "__dataclass_fields__",
        "__dataclass_params__",
        "__hash__",
        "__protocol_attrs__",
        "_is_protocol",
        "_is_runtime_protocol",
        "__non_callable_proto_members__",
    ]
)
ADDRESS = re.compile(r" at 0x[0-9a-fA-F]+")
PACKAGES = frozenset({"site-packages", "dist-packages"})
CONTAINERS = (list, tuple, set, frozenset, dict, MappingProxyType)
LOADS = ("LOAD_GLOBAL", "LOAD_NAME")
REMEDY = "Give the condition identity={...}: everything its numbers depend on (for one made by a function: dataclasses.replace(condition, identity={...}))."


class UnknownIdentityError(ValueError):
    """Something that a key has to hold cannot be told from its values."""


@dataclass(frozen=True)
class Identity:
    """What a value is.

    Attributes:
        body: JSON-serialisable, the same in every process.
        modules: Modules of the toolkit that it uses.
    """

    body: Any
    modules: frozenset[str]


def of(value: Any, *, strict: bool = True) -> Identity:
    """The identity of a value.

    Args:
        strict: Whether something unknown is an error; otherwise it is left out, to find what modules are used.

    Raises:
        UnknownIdentityError: it holds something (an open file, a lock, a generator) that is not known by its values; says where.
    """
    walk = _Walk(strict)
    return Identity(walk.of(value), frozenset(walk.modules))


def of_lm(lm: LM) -> dict[str, Any]:
    """What a model's responses depend on: weights and config, chat template, think tags, what ends a response, vocabulary. Not its name."""
    vocabulary = json.dumps(lm.tokenizer.get_vocab(), sort_keys=True)
    return {
        "fingerprint": lm.fingerprint,
        "template": lm.provenance().template_hash,
        "tags": dataclasses.astuple(lm.tags) if lm.tags else None,
        "eos": sorted(lm.eos_ids),
        "vocabulary": hashlib.sha256(vocabulary.encode()).hexdigest(),
    }


def describe(act: Any) -> str:
    """What a rule, an intervention or a change of the prompt says of itself; one that has no words of its own, such as a plain function,
    by its name and a key of what is known of it. The same in every process."""
    words = str(act)
    if not ADDRESS.search(words):
        return words
    return f"{getattr(act, '__qualname__', type(act).__qualname__)} {store.key(of(act, strict=False).body)}"


def describe_interventions(condition: Condition) -> list[str]:
    """What is done to a condition's model, in words that tell conditions of one model apart."""
    return [describe(act) for act in (*condition.during, *condition.rules, *([condition.ask] if condition.ask else []))]


def of_problems(problems: Sequence[Problem]) -> str:
    """A hash of problems, everything about each, in their order."""
    return store.key(of(list(problems)).body)


def is_user_code(module: str | None) -> bool:
    """Whether a module is a user's own code: neither of Python, nor installed, nor the toolkit's."""
    top = (module or "").partition(".")[0]
    if (top in sys.stdlib_module_names and top != "__main__") or top in ("toolkit", "builtins"):
        return False
    file = Path(getattr(sys.modules.get(top), "__file__", None) or "")
    # Environments that see the system's packages, and users', install in further places of these names.
    return not (PACKAGES & {*file.parts}) and not any(
        file.is_relative_to(sysconfig.get_path(name)) for name in ("purelib", "platlib")
    )


@functools.cache
def _version(module: str) -> str:
    """Version of the installed package that a module is of; "" for those of Python and the toolkit, which has hashes of its own."""
    top = module.partition(".")[0]
    if top in sys.stdlib_module_names or top in ("toolkit", "builtins"):
        return ""
    return ", ".join(f"{name} {metadata.version(name)}" for name in sorted({*_distributions().get(top, ())}))


_distributions = functools.cache(metadata.packages_distributions)


class _Walk:
    """One look at a value and all it refers to."""

    def __init__(self, strict: bool) -> None:
        self.strict, self.modules = strict, set[str]()
        self.open: dict[int, int] = {}  # what is being looked at now -> how deep: a value may refer to itself
        self.seen: dict[int, int] = {}  # functions and classes that were looked at -> how many were before
        self.where: list[str] = []

    def of(self, value: Any) -> Any:
        """The body of a value."""
        if value is None or type(value) in (bool, int, float, str):
            return value
        if id(value) in self.seen:  # helpers that call common helpers would be walked as often as there are ways to them
            return {"seen": self.seen[id(value)]}
        if isinstance(value, FunctionType | type):
            self.seen[id(value)] = len(self.seen)
        if id(value) in self.open:
            return {"again": self.open[id(value)]}
        self.open[id(value)] = len(self.open)
        try:
            return self._of(value)
        finally:
            del self.open[id(value)]

    def named(self, name: str, value: Any) -> Any:
        """The body of a value, with its name in errors."""
        self.where.append(name)
        try:
            return self.of(value)
        finally:
            self.where.pop()

    def _of(self, value: Any) -> Any:
        match value:
            case FunctionType():
                return self._function(value)
            case type():
                return self._class(value)
            case ModuleType():
                return self._module(value)
            case CodeType():
                return self._code(value, {})
            case LM():
                return {"lm": of_lm(value)}
            case Condition():
                parts = {name: self.of(getattr(value, name)) for name in ("during", "rules", "ask")}
                return {"lm": of_lm(value.lm), **parts}
            case Provenance():  # says where a value comes from, and does nothing
                return {"provenance": value.fingerprint}
            case torch.Tensor() | np.ndarray() | bytes() | bytearray():
                return _numbers(value)
            case Enum():
                return {"enum": self.of(type(value)), "name": value.name, "value": self.of(value.value)}
            case torch.dtype() | torch.device() | PurePath() | range() | complex():
                return {type(value).__name__: str(value)}
            case MethodType() | functools.partial() | property() | classmethod() | staticmethod() | functools.cached_property():
                return self._wrapper(value)
        if type(value) in CONTAINERS:  # a class of one's own that is a list or a named tuple may have methods
            return self._container(value)
        if isinstance(value, BuiltinFunctionType | MethodDescriptorType | WrapperDescriptorType | GetSetDescriptorType):
            bound = getattr(value, "__self__", None)
            own = None if bound is None or isinstance(bound, ModuleType) else self.of(bound)
            return {"builtin": f"{getattr(value, '__module__', '')}.{value.__qualname__}", "of": own}
        if isinstance(value, functools._lru_cache_wrapper):
            return {"wrapper": type(value).__qualname__, "of": self.of(value.__wrapped__)}
        return self._object(value)

    def _container(self, value: Any) -> Any:
        kind = type(value).__name__
        if isinstance(value, Mapping):
            return {kind: [[self.of(k), self.named(str(k), v)] for k, v in value.items()]}
        if not isinstance(value, set | frozenset):
            return {kind: [self.of(v) for v in value]}
        parts, before = [], self.seen
        for v in value:  # each as if it were the first: the order of a set is not the same in every process
            self.seen = dict(before)
            parts.append(self.of(v))
        self.seen = before
        return {kind: sorted(parts, key=lambda part: json.dumps(part, sort_keys=True))}

    def _wrapper(self, value: Any) -> Any:
        match value:
            case MethodType():
                parts: Sequence[Any] = (value.__func__, value.__self__)
            case functools.partial():
                parts = (value.func, value.args, value.keywords)
            case property():
                parts = (value.fget, value.fset)
            case functools.cached_property():
                parts = (value.func,)
            case _:
                parts = (value.__func__,)
        return {type(value).__name__: [self.of(part) for part in parts]}

    # --- code ----------------------------------------------------------------------------------------------------

    def _function(self, f: FunctionType) -> Any:
        name = f"{f.__module__}.{f.__qualname__}"
        if f.__module__ in READ_IN_PART:
            self.modules.add(f"{f.__module__}:{f.__qualname__}")
            bare = inspect.unwrap(f)
            self._code(bare.__code__, bare.__globals__)  # for the modules that it uses
        elif f.__module__ in store.sources():
            self.modules.add(f.__module__)
        own = is_user_code(f.__module__)
        if not own and _reached(f) is f:
            return {"function": name, "version": _version(f.__module__)}
        self.where.append(f.__name__)
        closed = dict(zip(f.__code__.co_freevars, f.__closure__ or (), strict=True))
        filled = {k: self.named(k, _content(cell)) for k, cell in closed.items()}
        told = {
            "function": None if own else name,
            "code": self._code(f.__code__, f.__globals__) if own else None,
            "closure": filled,
            "defaults": self.of(f.__defaults__),
            "keywords": self.of(f.__kwdefaults__),
            "attributes": {k: self.named(k, v) for k, v in sorted(vars(f).items())},
        }
        self.where.pop()
        return told

    def _code(self, code: CodeType, scope: Mapping[str, Any]) -> Any:
        """What a function does, and the globals that it reads. Line numbers, comments and docstring do not count."""
        steps = list(dis.get_instructions(code))
        inner = [self._code(step.argval, scope) if isinstance(step.argval, CodeType) else self._argument(step) for step in steps]
        plain = [[step.opname, argument] for step, argument in zip(steps, inner, strict=True)]
        shape = [code.co_argcount, code.co_kwonlyargcount, code.co_posonlyargcount, code.co_flags & MEANT, list(code.co_varnames)]
        digest = hashlib.sha256(json.dumps([shape, plain], sort_keys=True).encode()).hexdigest()
        return {"code": digest, "reads": {name: self.named(name, value) for name, value in self._reads(steps, scope)}}

    def _argument(self, step: dis.Instruction) -> Any:
        return self.of(step.argval) if step.opcode in dis.hasconst else str(step.argval)

    def _reads(self, steps: Sequence[dis.Instruction], scope: Mapping[str, Any]) -> Iterator[tuple[str, Any]]:
        """Globals that are read, and what is imported, by name; an attribute of a module by itself: ``module.name``."""
        for at, step in enumerate(steps):
            if step.opname in LOADS and isinstance(scope, Mapping):
                name, value = step.argval, scope.get(step.argval, getattr(builtins, step.argval, "no such name"))
                for later in steps[at + 1 :]:
                    if not isinstance(value, ModuleType) or later.opname not in ("LOAD_ATTR", "LOAD_METHOD"):
                        break
                    name, value = f"{name}.{later.argval}", getattr(value, later.argval, "no such name")
                yield name, value
            elif step.opname == "IMPORT_NAME":
                yield from self._imports(steps, at, scope)

    def _imports(self, steps: Sequence[dis.Instruction], at: int, scope: Mapping[str, Any]) -> Iterator[tuple[str, Any]]:
        name, level = steps[at].argval, steps[at - 2].argval
        try:
            module = importlib.import_module("." * level + name, scope.get("__package__"))
        except ImportError as error:
            if self.strict:
                raise self._unknown(f"the module {name!r}, which cannot be imported ({error})") from error
            return
        wanted = []
        for step in steps[at + 1 :]:
            if step.opname == "IMPORT_FROM":
                wanted.append(step.argval)
            elif not step.opname.startswith("STORE"):
                break
        yield from [(f"{name}.{w}", getattr(module, w, "no such name")) for w in wanted] or [(name, module)]

    def _module(self, module: ModuleType) -> Any:
        name = module.__name__
        if name in store.sources():
            self.modules.add(name)
        if not is_user_code(name):
            return {"module": name, "version": _version(name)}
        kept = {k: v for k, v in sorted(vars(module).items()) if not k.startswith("__") and not isinstance(v, ModuleType)}
        return {"module": name, "holds": {k: self.named(f"{name}.{k}", v) for k, v in kept.items()}}

    def _class(self, cls: type) -> Any:
        name = f"{cls.__module__}.{cls.__qualname__}"
        if cls.__module__ in store.sources():
            self.modules.add(cls.__module__)
        if not is_user_code(cls.__module__):
            return {"class": name, "version": _version(cls.__module__)}
        made = dataclasses.is_dataclass(cls)
        fields = [(f.name, f.default, f.default_factory, f.init, f.kw_only) for f in dataclasses.fields(cls)] if made else []
        own = {
            k: self.named(f"{cls.__qualname__}.{k}", v)
            for k, v in sorted(vars(cls).items())
            if k not in HOUSEKEEPING
            and not isinstance(v, GetSetDescriptorType)
            and type(v).__name__ != "member_descriptor"
            and not (made and isinstance(v, FunctionType) and v.__code__.co_filename == "<string>")
        }
        bases = [self.of(base) for base in cls.__bases__]
        return {"class": cls.__qualname__, "bases": bases, "fields": self.of(fields), "holds": own}

    # --- objects -------------------------------------------------------------------------------------------------

    def _object(self, value: Any) -> Any:
        """An object by its class and what it holds: the fields of a dataclass, else what pickle would keep."""
        cls = type(value)
        if dataclasses.is_dataclass(cls) and cls.__getstate__ is object.__getstate__:
            fields = {f.name: getattr(value, f.name, None) for f in dataclasses.fields(cls)}
            held = _held(cls, {**getattr(value, "__dict__", {}), **fields})
            return {"object": self.of(cls), "holds": {k: self.named(f"{cls.__name__}.{k}", v) for k, v in held.items()}}
        try:
            reduced = value.__reduce_ex__(2)
        except Exception as error:  # whatever a class raises where it cannot be pickled
            if self.strict:
                raise self._unknown(f"{value!r}, a {cls.__name__}") from error
            return None
        if isinstance(reduced, str):
            return {"object": self.of(cls), "name": reduced}
        make, arguments, *more = reduced
        state, *items = more or [None]
        state = _held(cls, state) if isinstance(state, dict) else state
        parts = [arguments, state, *(None if part is None else list(part) for part in items)]
        return {"object": self.of(make), "holds": [self.named(cls.__name__, part) for part in parts]}

    def _unknown(self, what: str) -> UnknownIdentityError:
        where = " > ".join(self.where[-4:]) or "here"
        return UnknownIdentityError(f"{where}: a key cannot be made of {what[:120]}: its values do not say what it does. {REMEDY}")


def _held(cls: type, state: Mapping[str, Any]) -> dict[str, Any]:
    """What an object holds, without what it computed when first asked."""
    return {k: v for k, v in state.items() if not isinstance(getattr(cls, str(k), None), functools.cached_property)}


def _numbers(value: Any) -> Any:
    """Tensors, arrays and bytes by a hash."""
    if isinstance(value, torch.Tensor):
        data = value.detach().contiguous().cpu().flatten().view(torch.uint8).numpy().tobytes()
        about: list[Any] = ["tensor", str(value.dtype), list(value.shape)]
    elif isinstance(value, np.ndarray):
        data = repr(value.tolist()).encode() if value.dtype.hasobject else np.ascontiguousarray(value).tobytes()
        about = ["array", str(value.dtype), list(value.shape)]
    else:
        data, about = bytes(value), [type(value).__name__]
    return [*about, hashlib.sha256(data).hexdigest()]


def _reached(f: FunctionType) -> Any:
    """What stands where a function says it is."""
    value: Any = sys.modules.get(f.__module__)
    for part in f.__qualname__.split("."):
        value = getattr(value, part, None)
    return value


def _content(cell: CellType) -> Any:
    try:
        return cell.cell_contents
    except ValueError:  # filled later
        return "nothing"


def hash_of(values: torch.Tensor) -> str:
    """Twelve hexadecimal digits of some numbers, for the words that tell interventions apart."""
    return hashlib.sha256(values.double().cpu().numpy().tobytes()).hexdigest()[:12]


def format_exact(value: float, sign: str = "") -> str:
    """A number with all its digits, whole ones without a point: kept results are told apart by it."""
    return f"{float(value):{sign}}".removesuffix(".0")
