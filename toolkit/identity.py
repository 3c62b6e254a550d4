"""Identities: JSON descriptions of functions, objects, models and conditions. They are part of the cache keys of saved results.

The identity of a value is the same in every process. It changes whenever the value's behaviour may have changed, so that a saved result is
computed again if the code or data behind it has changed. ``of(value)`` returns the identity, which contains

- for a function that the user wrote: its bytecode (without docstring, comments and line numbers), closure, defaults, and the globals that
  it reads. So a changed helper or constant changes the identity;
- for a class that the user wrote: its bases, methods and attributes;
- for a function or class of the toolkit: its name. ``Identity.modules`` lists its module, whose code is hashed separately. (A function that
  cannot be looked up by its name, such as a lambda, is described like a function of the user);
- for a function or class of an installed package: its name and the version of the package;
- for an object its class and fields, for a tensor its bytes, for a model its fingerprint. Memory addresses are never included.

An identity does not cover files that a function reads, attributes that it looks up with ``getattr`` and a computed name, and the versions
of torch and transformers. Bytecode depends on the version of Python: under another version, results that depend on user code are computed
again.
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
from types import BuiltinFunctionType, CellType, CodeType, FunctionType, MappingProxyType, MethodType, ModuleType
from types import GetSetDescriptorType as GetSet
from types import MethodDescriptorType as MethodDescriptor
from types import WrapperDescriptorType as WrapperDescriptor
from typing import Any

import numpy as np
import torch

from toolkit import store
from toolkit.lm import LM, Condition
from toolkit.tools import Tool, Toolbox
from toolkit.types import Problem, Provenance

FLAGS = inspect.CO_VARARGS | inspect.CO_VARKEYWORDS | inspect.CO_GENERATOR | inspect.CO_COROUTINE | inspect.CO_ASYNC_GENERATOR
"""Mask of the flags of a code object that are part of a function's identity. Others, such as those of future imports, are ignored."""
READ_IN_PART = frozenset({"toolkit.board.spec"})
"""Modules of the toolkit that are hashed in part: only the functions that a value uses. Other modules are hashed as a whole."""
HOUSEKEEPING = frozenset((
    "__module__", "__dict__", "__weakref__", "__doc__", "__annotations__", "__annotate__", "__annotate_func__", "__annotations_cache__",
    "__qualname__", "__slots__", "__abstractmethods__", "_abc_impl", "__parameters__", "__orig_bases__", "__match_args__",
    "__firstlineno__", "__static_attributes__", "__dataclass_fields__", "__dataclass_params__", "__hash__", "__protocol_attrs__",
    "_is_protocol", "_is_runtime_protocol", "__non_callable_proto_members__",
))  # fmt: skip
"""Attributes that Python adds to a class by itself; they are not part of its identity."""
INCOMPLETE = re.compile(r" at 0x[0-9a-fA-F]+|\b(tensor|array)\(|(?<![\w.])\.\.\.(?![\w.])")
"""Pattern of what a text holds if it does not tell all of a value: a memory address, rounded numbers of a tensor, or ``...`` for a part."""
PACKAGES = frozenset({"site-packages", "dist-packages"})
CONTAINERS = (list, tuple, set, frozenset, dict, MappingProxyType)
WRAPPERS: Mapping[type, tuple[str, ...]] = {
    MethodType: ("__func__", "__self__"), functools.partial: ("func", "args", "keywords"), property: ("fget", "fset"),
    functools.cached_property: ("func",), classmethod: ("__func__",), staticmethod: ("__func__",),
}  # fmt: skip
"""Type of an object that wraps a function -> its attributes that are part of its identity."""
LOADS = ("LOAD_GLOBAL", "LOAD_NAME")
REMEDY = "Pass identity={...} to the condition, with everything its numbers depend on (after a constructor function: dataclasses.replace(condition, identity={...}))."


class UnknownIdentityError(ValueError):
    """A value, such as an open file, has no identity, because its class and fields do not determine its behaviour."""


@dataclass(frozen=True)
class Identity:
    """The identity of a value: a description that changes if the value's behaviour may have changed.

    Attributes:
        body: The description, JSON-serialisable.
        modules: Names of the toolkit's modules that the value uses. Their code, hashed by ``store.modules_of``, is part of cache keys too.
    """

    body: Any
    modules: frozenset[str]


def of(value: Any, *, strict: bool = True) -> Identity:
    """Return the identity of a value: a description that changes if the value's behaviour may have changed.

    The description (``body``) is the same in every process, so it can be part of the cache key of a result that depends on the value.

    Args:
        value: A function, class, object, model or plain value.
        strict: True to raise an error if a part of the value has no identity; False to leave such parts out.

    Raises:
        UnknownIdentityError: a part of the value (an open file, a lock, a generator) has no identity. The message names the part.

    >>> of((1, "a", [2.5])).body
    {'tuple': [1, 'a', {'list': [2.5]}]}
    """
    inspector = _Inspector(strict)
    return Identity(inspector.of(value), frozenset(inspector.modules))


def of_lm(lm: LM) -> dict[str, Any]:
    """Return the identity of a model as a JSON-serialisable dict. The name of the model is not part of it.

    Keys: ``fingerprint`` (hash of weights and config), ``template`` (hash of the chat template and the variables set in it), ``tags``
    (opening and closing think tag, or ``None``), ``eos`` (end-of-sequence ids) and ``vocabulary`` (hash of the tokenizer's vocabulary).
    """
    vocabulary = json.dumps(lm.tokenizer.get_vocab(), sort_keys=True)
    return {
        "fingerprint": lm.fingerprint,
        "template": lm.provenance().template_hash,
        "tags": dataclasses.astuple(lm.tags) if lm.tags else None,
        "eos": sorted(lm.eos_ids),
        "vocabulary": hashlib.sha256(vocabulary.encode()).hexdigest(),
    }


def describe(act: Any) -> str:
    """Return a text that describes an intervention, a decoding rule or a prompt change of a condition.

    The text is ``str(act)``. But if that contains a memory address, a tensor, an array or a ``...`` that stands alone, it does not tell all
    of the intervention. Then the text is the name of the function or class and a hash of its identity. So it is if a field of the
    intervention is a module of torch, whose text does not hold the weights. If the intervention has code of the user, such as its class or
    that of a value in its fields, the hash follows ``str(act)``, which does not tell the code.

    Args:
        act: The intervention, decoding rule or prompt change.
    """
    words = str(act)
    incomplete = INCOMPLETE.search(words) or any(
        isinstance(part, torch.nn.Module) for part in getattr(act, "__dict__", {}).values()
    )
    if not incomplete and not _has_user_code(act):
        return words
    name = getattr(act, "__qualname__", type(act).__qualname__) if incomplete else words
    return f"{name} {store.key(of(act, strict=False).body)}"


def _has_user_code(value: Any) -> bool:
    """Return True if a value is code of the user or an object of a user's class, or holds one: in a container or a field of a dataclass."""
    named = value if isinstance(value, type | FunctionType) else type(value)
    if is_user_code(named.__module__):
        return True
    if type(value) in CONTAINERS:
        parts = [*value, *value.values()] if isinstance(value, Mapping) else value
    elif names := next((names for kind, names in WRAPPERS.items() if isinstance(value, kind)), ()):
        parts = [getattr(value, name) for name in names]
    elif dataclasses.is_dataclass(value) and not isinstance(value, LM | type):
        parts = [getattr(value, field.name, None) for field in dataclasses.fields(value)]
    else:
        return False
    return any(map(_has_user_code, parts))


def describe_interventions(condition: Condition) -> list[str]:
    """Return one text for each intervention, each decoding rule, the prompt change and the tools of a condition, in this order.

    Reports show these texts. They are also stored with rollouts, and stored rollouts are reused only if these texts are the same. So the
    ``str()`` of an intervention of the toolkit has to contain all its settings.
    """
    texts = [describe(act) for act in (*condition.during, *condition.rules, *([condition.ask] if condition.ask else []))]
    return [*texts, describe_tools(condition.tools)] if condition.tools else texts


def describe_tools(tools: Toolbox) -> str:
    """Return a text that names the tools of a toolbox, with a hash of all that their results depend on: settings, data and code.

    Raises:
        UnknownIdentityError: a part of a tool, such as an open file, has no identity, and ``Tool.identity`` is not set.
    """
    try:
        identity = of(tools)
    except UnknownIdentityError as error:
        cause = str(error).removesuffix(f" {REMEDY}")
        raise UnknownIdentityError(f"{cause} Pass Tool(..., identity=...) with everything the tool's results depend on.") from error
    return f"tools {', '.join(tool.name for tool in tools.tools)} {store.key([identity.body, store.modules_of(*sorted(identity.modules))])}"


def of_problems(problems: Sequence[Problem]) -> str:
    """Return a hash over all fields of some problems, for cache keys. It depends on their order."""
    return store.key(of(list(problems)).body)


def is_user_code(module: str | None) -> bool:
    """Return True if a module is the user's code: not in the standard library, an installed package or the toolkit.

    Args:
        module: Dotted name of the module, or ``None`` (which counts as user code).
    """
    top = (module or "").partition(".")[0]
    if (top in sys.stdlib_module_names and top != "__main__") or top in ("toolkit", "builtins"):
        return False
    file = Path(getattr(sys.modules.get(top), "__file__", None) or "")
    # Packages are in a directory of a name in PACKAGES: in this environment, or one of the system or the user. The paths of sysconfig cover
    # environments in which that directory has another name.
    return not (PACKAGES & {*file.parts}) and not any(
        file.is_relative_to(sysconfig.get_path(name)) for name in ("purelib", "platlib")
    )


@functools.cache
def _version(module: str) -> str:
    """Return name and version of the package that a module belongs to, such as "numpy 2.1.0".

    The result is "" for modules of the standard library and of the toolkit. (The toolkit's own code is hashed instead.)
    """
    top = module.partition(".")[0]
    if top in sys.stdlib_module_names or top in ("toolkit", "builtins"):
        return ""
    return ", ".join(f"{name} {metadata.version(name)}" for name in sorted({*_distributions().get(top, ())}))


_distributions = functools.cache(metadata.packages_distributions)


class _Inspector:
    """Builds the identity of one value, and collects in ``modules`` the toolkit's modules that the value uses.

    It describes everything that the value refers to as well, directly or indirectly.
    """

    def __init__(self, strict: bool) -> None:
        self.strict, self.modules = strict, set[str]()
        self.open: dict[int, int] = {}  # id of each value that is being described now -> its depth: a value may refer to itself
        self.seen: dict[int, int] = {}  # id of each function and class described so far -> its number, in the order of description
        self.where: list[str] = []  # names that lead from the value to the part that is being described, for errors

    def of(self, value: Any) -> Any:
        """Return the description of a value."""
        if value is None or type(value) in (bool, int, float, str):
            return value
        if id(value) in self.seen:  # describe a shared helper only once, however many functions refer to it
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
        """Return the description of a value. If a part of it has no identity, the error message mentions ``name``."""
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
                # Without tools, the identity is that of conditions from before tools existed.
                names = ("during", "rules", "ask", *(("tools",) if value.tools else ()))
                parts = {name: self.of(getattr(value, name)) for name in names}
                return {"lm": of_lm(value.lm), **parts}
            case Tool() if value.identity is not None:
                limits = (value.name, value.seconds, value.characters, value.longest_argument)
                return {"tool": [*limits, self.of(value.identity)]}
            case Provenance():  # it records where a value comes from, and does not change its behaviour
                return {"provenance": value.fingerprint}
            case torch.Tensor() | np.ndarray() | bytes() | bytearray():
                return _numbers(value)
            case Enum():
                return {"enum": self.of(type(value)), "name": value.name, "value": self.of(value.value)}
            case torch.dtype() | torch.device() | PurePath() | range() | complex():
                return {type(value).__name__: str(value)}
        if names := next((names for kind, names in WRAPPERS.items() if isinstance(value, kind)), ()):
            return {type(value).__name__: [self.of(getattr(value, name)) for name in names]}
        if type(value) in CONTAINERS:  # exact types: a subclass, such as a named tuple, may have methods
            return self._container(value)
        if isinstance(value, BuiltinFunctionType | MethodDescriptor | WrapperDescriptor | GetSet):
            bound = getattr(value, "__self__", None)
            owner = None if bound is None or isinstance(bound, ModuleType) else self.of(bound)
            return {"builtin": f"{getattr(value, '__module__', '')}.{value.__qualname__}", "of": owner}
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
        for v in value:  # describe each as if it were the first, since the order of a set differs between processes
            self.seen = dict(before)
            parts.append(self.of(v))
        self.seen = before
        return {kind: sorted(parts, key=lambda part: json.dumps(part, sort_keys=True))}

    # --- code ----------------------------------------------------------------------------------------------------

    def _function(self, f: FunctionType) -> Any:
        name = f"{f.__module__}.{f.__qualname__}"
        if f.__module__ in READ_IN_PART:
            self.modules.add(f"{f.__module__}:{f.__qualname__}")
            bare = inspect.unwrap(f)
            self._code(bare.__code__, bare.__globals__)  # to collect the modules that it uses
        elif f.__module__ in store.sources():
            self.modules.add(f.__module__)
        is_user = is_user_code(f.__module__)
        # A function of a library or the toolkit that can be found under its name is described by it.
        if not is_user and _by_name(f) is f:
            return {"function": name, "version": _version(f.__module__)}
        self.where.append(f.__name__)
        cells = dict(zip(f.__code__.co_freevars, f.__closure__ or (), strict=True))
        description = {
            "function": None if is_user else name,
            "code": self._code(f.__code__, f.__globals__) if is_user else None,
            "closure": {k: self.named(k, _content(cell)) for k, cell in cells.items()},
            "defaults": self.of(f.__defaults__),
            "keywords": self.of(f.__kwdefaults__),
            "attributes": {k: self.named(k, v) for k, v in sorted(vars(f).items())},
        }
        self.where.pop()
        return description

    def _code(self, code: CodeType, scope: Mapping[str, Any]) -> Any:
        """Return a hash of a function's bytecode, and the descriptions of the globals that it reads, by name.

        Args:
            code: Code object of the function.
            scope: Global variables of the function's module.
        """
        # Constants are described by value, other arguments by name. Functions inside the function are code objects among the constants.
        steps = list(dis.get_instructions(code))
        inner = [self._code(step.argval, scope) if isinstance(step.argval, CodeType) else self._argument(step) for step in steps]
        plain = [[step.opname, argument] for step, argument in zip(steps, inner, strict=True)]
        shape = [code.co_argcount, code.co_kwonlyargcount, code.co_posonlyargcount, code.co_flags & FLAGS, list(code.co_varnames)]
        digest = hashlib.sha256(json.dumps([shape, plain], sort_keys=True).encode()).hexdigest()
        return {"code": digest, "reads": {name: self.named(name, value) for name, value in self._reads(steps, scope)}}

    def _argument(self, step: dis.Instruction) -> Any:
        return self.of(step.argval) if step.opcode in dis.hasconst else str(step.argval)

    def _reads(self, steps: Sequence[dis.Instruction], scope: Mapping[str, Any]) -> Iterator[tuple[str, Any]]:
        """Yield the name and value of each global that a function's code reads or imports.

        If the code reads an attribute of a module, the name is ``"module.attribute"``, and the value is that of the attribute.

        Args:
            steps: Instructions of the function.
            scope: Global variables of the function's module.
        """
        for at, step in enumerate(steps):
            if step.opname in LOADS and isinstance(scope, Mapping):
                name, value = step.argval, scope.get(step.argval, getattr(builtins, step.argval, "no such name"))
                for later in steps[at + 1 :]:  # follow attributes of modules: only the last value counts
                    if not isinstance(value, ModuleType) or later.opname not in ("LOAD_ATTR", "LOAD_METHOD"):
                        break
                    name, value = f"{name}.{later.argval}", getattr(value, later.argval, "no such name")
                yield name, value
            elif step.opname == "IMPORT_NAME":
                yield from self._imports(steps, at, scope)

    def _imports(self, steps: Sequence[dis.Instruction], at: int, scope: Mapping[str, Any]) -> Iterator[tuple[str, Any]]:
        # Two instructions before IMPORT_NAME load its arguments: the level (number of leading dots), then the list of names.
        name, level = steps[at].argval, steps[at - 2].argval
        try:
            module = importlib.import_module("." * level + name, scope.get("__package__"))
        except ImportError as error:
            if self.strict:
                raise self._unknown(f"the module {name!r}, which cannot be imported ({error})") from error
            return
        attributes = []
        for step in steps[at + 1 :]:
            if step.opname == "IMPORT_FROM":
                attributes.append(step.argval)
            elif not step.opname.startswith("STORE"):
                break
        yield from [(f"{name}.{a}", getattr(module, a, "no such name")) for a in attributes] or [(name, module)]

    def _module(self, module: ModuleType) -> Any:
        name = module.__name__
        if name in store.sources():
            self.modules.add(name)
        if not is_user_code(name):
            return {"module": name, "version": _version(name)}
        values = {k: v for k, v in sorted(vars(module).items()) if not k.startswith("__") and not isinstance(v, ModuleType)}
        return {"module": name, "holds": {k: self.named(f"{name}.{k}", v) for k, v in values.items()}}

    def _class(self, cls: type) -> Any:
        name = f"{cls.__module__}.{cls.__qualname__}"
        if cls.__module__ in store.sources():
            self.modules.add(cls.__module__)
        if not is_user_code(cls.__module__):
            return {"class": name, "version": _version(cls.__module__)}
        is_data = dataclasses.is_dataclass(cls)
        fields = [(f.name, f.default, f.default_factory, f.init, f.kw_only) for f in dataclasses.fields(cls)] if is_data else []
        attributes = {
            k: self.named(f"{cls.__qualname__}.{k}", v)
            for k, v in sorted(vars(cls).items())
            if k not in HOUSEKEEPING
            and not isinstance(v, GetSet)  # Python's access to the attributes of an instance, and to its slots (next line)
            and type(v).__name__ != "member_descriptor"
            and not (is_data and isinstance(v, FunctionType) and v.__code__.co_filename == "<string>")  # generated by dataclass
        }
        bases = [self.of(base) for base in cls.__bases__]
        return {"class": cls.__qualname__, "bases": bases, "fields": self.of(fields), "holds": attributes}

    # --- objects -------------------------------------------------------------------------------------------------

    def _object(self, value: Any) -> Any:
        """Return the description of an object: its class and its state.

        The state of a dataclass is its fields. That of any other object is the state that pickle would save.
        """
        cls = type(value)
        if dataclasses.is_dataclass(cls) and cls.__getstate__ is object.__getstate__:
            fields = {f.name: getattr(value, f.name, None) for f in dataclasses.fields(cls)}
            state = _without_cached(cls, {**getattr(value, "__dict__", {}), **fields})
            return {"object": self.of(cls), "holds": {k: self.named(f"{cls.__name__}.{k}", v) for k, v in state.items()}}
        try:
            reduced = value.__reduce_ex__(2)
        except Exception as error:  # a class that cannot be pickled may raise anything
            if self.strict:
                raise self._unknown(f"{value!r}, a {cls.__name__}") from error
            return None
        if isinstance(reduced, str):
            return {"object": self.of(cls), "name": reduced}
        # As pickle does: the object is make(*arguments), to which the state and then list or dict items are added.
        make, arguments, *more = reduced
        pickled, *items = more or [None]
        pickled = _without_cached(cls, pickled) if isinstance(pickled, dict) else pickled
        parts = [arguments, pickled, *(None if part is None else list(part) for part in items)]
        return {"object": self.of(make), "holds": [self.named(cls.__name__, part) for part in parts]}

    def _unknown(self, what: str) -> UnknownIdentityError:
        where = " > ".join(self.where[-4:]) or "here"
        return UnknownIdentityError(
            f"{where}: no key can be made for {what[:120]}: its behaviour cannot be known from its values. {REMEDY}"
        )


def _without_cached(cls: type, state: Mapping[str, Any]) -> dict[str, Any]:
    """Return an object's state without its cached properties. Their values are stored only after a first access, so they may be absent."""
    return {k: v for k, v in state.items() if not isinstance(getattr(cls, str(k), None), functools.cached_property)}


def _numbers(value: Any) -> Any:
    """Return the description of a tensor, an array or bytes: type, dtype, shape and a hash of the content."""
    if isinstance(value, torch.Tensor):
        data = value.detach().contiguous().cpu().flatten().view(torch.uint8).numpy().tobytes()
        about: list[Any] = ["tensor", str(value.dtype), list(value.shape)]
    elif isinstance(value, np.ndarray):
        data = repr(value.tolist()).encode() if value.dtype.hasobject else np.ascontiguousarray(value).tobytes()
        about = ["array", str(value.dtype), list(value.shape)]
    else:
        data, about = bytes(value), [type(value).__name__]
    return [*about, hashlib.sha256(data).hexdigest()]


def _by_name(f: FunctionType) -> Any:
    """Look up a function's qualified name in its module. Return the object that has this name there, or ``None`` if there is none.

    It is not always ``f`` itself: another function may have been assigned to the name.
    """
    value: Any = sys.modules.get(f.__module__)
    for part in f.__qualname__.split("."):
        value = getattr(value, part, None)
    return value


def _content(cell: CellType) -> Any:
    try:
        return cell.cell_contents
    except ValueError:  # not assigned yet
        return "nothing"


def hash_of(values: torch.Tensor) -> str:
    """Return a hash of a tensor's values (as fp64) as 12 hexadecimal digits, for texts that describe interventions."""
    return hashlib.sha256(values.double().cpu().numpy().tobytes()).hexdigest()[:12]


def format_exact(value: float, sign: str = "") -> str:
    """Return a number as text with all its digits, for cache keys. Whole numbers are written without decimal point.

    Args:
        sign: ``"+"`` to write a sign before positive numbers too; ``""`` to write only minus signs.

    >>> format_exact(0.1), format_exact(2.0, "+")
    ('0.1', '+2')
    """
    return f"{float(value):{sign}}".removesuffix(".0")
