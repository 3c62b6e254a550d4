"""The rules of the house, read off the source with ``ast``: who may import whom, and who owns which side effect.

Each rule is a function from a module's name and source to the list of its breaches. Every rule is also shown to fail
on a made-up offending source (the second half of this file), so none of them can be empty.
"""

from __future__ import annotations

import ast
from collections.abc import Iterator
from dataclasses import dataclass
from graphlib import CycleError, TopologicalSorter
from pathlib import Path

import pytest

PACKAGE = Path(__file__).parents[2] / "toolkit"

# From the ground up: a room imports only from rooms before it.
ROOMS = (
    "processes", "progress", "expressions", "origins", "types", "stats", "constraints", "rounding", "store", "versions", "memory", "tensors", "sites", "hooks", "adapters", "shipped", "families", "templates", "repositories", "checkpoints", "qualify",
    "tags", "leaks", "tools", "lm", "identity", "bridges", "spans", "phases", "certainty", "sampling", "decode", "recording", "slots", "steps", "tasks", "engines", "generate", "finetune", "preferences", "positions", "passes", "chunk_attention", "collect", "step_states", "entropies", "needles", "attention", "one_head",
    "directions", "probes", "judging", "merging", "steering", "edits", "patching", "masks", "baselines", "exits", "vectors", "methods", "rewards", "grpo", "metrics", "evaluate", "difficulty", "claims", "verdicts", "figures", "transcript", "pages",
    "report", "doses", "strengths", "jobs", "exports", "board", "widgets", "cli",
)  # fmt: skip
ONLY = {"rewards": {"types", "stats", "constraints", "expressions", "tools"}}  # rooms that may import less than what is above them
ISOLATED = {"methods"}  # rooms whose files may not import one another


@dataclass(frozen=True)
class Effect:
    """A side effect and the rooms that may have it.

    Attributes:
        functions: Forbidden however they are called: ``name(...)`` or ``anything.name(...)``.
        methods: Forbidden as ``anything.name(...)`` only.
        dotted: Forbidden as written, e.g. ``json.dump(...)``.
    """

    name: str
    owners: frozenset[str]
    functions: frozenset[str] = frozenset()
    methods: frozenset[str] = frozenset()
    dotted: frozenset[str] = frozenset()


def words(text: str) -> frozenset[str]:
    return frozenset(text.split())


EFFECTS = (
    Effect(
        "registers hooks",
        words("hooks"),
        methods=words(
            "register_forward_hook register_forward_pre_hook register_full_backward_hook "
            "register_full_backward_pre_hook register_module_forward_hook register_module_forward_pre_hook"
        ),
    ),
    Effect(
        "reads or writes files",
        words("store"),
        functions=words(
            "open safe_open save_file load_file ParquetWriter ParquetFile NamedTemporaryFile TemporaryDirectory mkdtemp"
        ),
        methods=words(
            "read_text write_text read_bytes write_bytes touch unlink write_table read_table to_parquet read_parquet "
            "to_csv read_csv read_json to_pickle read_pickle write_html write_image write_json tofile fromfile"
        ),
        dotted=words(
            "torch.save torch.load np.save np.savez np.load np.savetxt np.loadtxt json.dump json.load pickle.dump "
            "pickle.load os.replace os.rename os.remove os.unlink shutil.copy shutil.copyfile shutil.move"
        ),
    ),
    Effect(
        "makes or removes directories",
        words("store"),
        methods=words("mkdir rmdir makedirs copytree"),
        functions=words("rmtree"),
    ),
    Effect("loads or saves checkpoints", words("checkpoints adapters"), methods=words("from_pretrained save_pretrained")),
    Effect("loads data sets", words("tasks"), functions=words("load_dataset load_from_disk")),
    Effect(
        "samples tokens",
        words("engines sampling"),
        methods=words("generate"),
        functions=words("multinomial gumbel_softmax Categorical"),
    ),
    Effect(
        "prints",
        words("cli"),
        functions=words("print echo secho"),
        dotted=words("sys.stdout.write sys.stderr.write"),
    ),
)


def sources() -> dict[str, str]:
    """Source of every module, by its name below the package: ``""``, ``"lm"``, ``"methods.thinkedit"``."""
    found = {}
    for path in sorted(PACKAGE.rglob("*.py")):
        parts = path.relative_to(PACKAGE).with_suffix("").parts
        found[".".join(parts[:-1] if parts[-1] == "__init__" else parts)] = path.read_text(encoding="utf-8")
    return found


def room_of(module: str) -> str:
    return module.partition(".")[0]


def imports(tree: ast.AST, modules: frozenset[str]) -> Iterator[str]:
    """The toolkit modules a source imports, at the top or inside a function; ``""`` is the bare package."""
    for node in ast.walk(tree):
        if isinstance(node, ast.Import):
            found = [alias.name for alias in node.names]
        elif isinstance(node, ast.ImportFrom) and node.module and not node.level:
            # ``from toolkit import lm`` names a module, ``from toolkit.lm import LM`` a thing in one.
            full = {alias.name: f"{node.module}.{alias.name}" for alias in node.names}
            found = [f if f.removeprefix("toolkit.") in modules else node.module for f in full.values()]
        else:
            continue
        yield from (name.removeprefix("toolkit").removeprefix(".") for name in found if room_of(name) == "toolkit")


def check_rooms(module: str, source: str, modules: frozenset[str] = frozenset()) -> list[str]:
    """Every module belongs to a room."""
    return [] if module == "" or room_of(module) in ROOMS else [f"{module or 'toolkit'} is in no room: add it to ROOMS"]


def check_direction(module: str, source: str, modules: frozenset[str] = frozenset()) -> list[str]:
    """Imports point to rooms above, never sideways between methods."""
    breaches, room = [], room_of(module)
    for name in imports(ast.parse(source), modules):
        other = room_of(name)
        if name in ("", module):
            continue  # the bare package holds only the version
        if module == "":
            breaches.append(f"toolkit/__init__.py imports {name}, but importing the package must be light")
        elif other == room:
            if room in ISOLATED and module != room:
                breaches.append(f"{module} imports {name}, another file of {room}")
        elif other not in ROOMS or room not in ROOMS:
            breaches.append(f"{module} imports {name}, which is in no room")
        elif ROOMS.index(other) > ROOMS.index(room) or other not in ONLY.get(room, {other}):
            breaches.append(f"{module} imports {name}, which is not above it")
    return breaches


def check_absolute(module: str, source: str, modules: frozenset[str] = frozenset()) -> list[str]:
    """``from toolkit.x import y``, never ``from .x import y``."""
    nodes = [n for n in ast.walk(ast.parse(source)) if isinstance(n, ast.ImportFrom) and n.level]
    return [f"{module}:{n.lineno} imports relatively" for n in nodes]


def dotted_name(node: ast.expr) -> str:
    """``a.b.c`` of a name or attribute chain; a leading ``?`` stands for any other expression."""
    if isinstance(node, ast.Name):
        return node.id
    if isinstance(node, ast.Attribute):
        return f"{dotted_name(node.value)}.{node.attr}"
    return "?"


def check_effects(module: str, source: str, modules: frozenset[str] = frozenset()) -> list[str]:
    """Each side effect happens in the room that owns it. Asking that room for it (``store.write_text``) is fine."""
    breaches = []
    for node in ast.walk(ast.parse(source)):
        if not isinstance(node, ast.Call):
            continue
        full = dotted_name(node.func)
        owner, _, last = full.rpartition(".")
        for effect in EFFECTS:
            if room_of(module) in effect.owners or owner in effect.owners:
                continue
            if last in effect.functions or full in effect.dotted or (owner and last in effect.methods):
                breaches.append(f"{module}:{node.lineno} {effect.name} ({full}); only {sorted(effect.owners)} may")
    return breaches


def check_methods(module: str, source: str, modules: frozenset[str] = frozenset()) -> list[str]:
    """A method's docstring names its paper and says where it departs from it."""
    if room_of(module) != "methods" or module == "methods":
        return []
    docstring = ast.get_docstring(ast.parse(source)) or ""
    return [f"{module}: no {word!r} in the module docstring" for word in ("arXiv:", "Deviations:") if word not in docstring]


CHECKS = (check_rooms, check_direction, check_absolute, check_effects, check_methods)


@pytest.mark.parametrize("check", CHECKS, ids=lambda check: check.__name__.removeprefix("check_"))
def test_house_rule(check):
    found = sources()
    assert "lm" in found and "methods.thinkedit" in found, "the package was not found"
    modules = frozenset(found)
    breaches = [breach for module, source in found.items() for breach in check(module, source, modules)]
    assert not breaches, "\n".join(["", *breaches])


def circle(sources: dict[str, str]) -> list[str]:
    """Modules that import one another in a circle, also inside one package; empty if there is none."""
    graph = {m: {name for name in imports(ast.parse(s), frozenset(sources)) if name != m} for m, s in sources.items()}
    try:
        TopologicalSorter(graph).prepare()
    except CycleError as error:
        return error.args[1]
    return []


def test_no_modules_import_one_another_in_a_circle():
    assert circle(sources()) == []


def test_a_circle_inside_a_package_is_caught():
    assert circle({"grpo.a": "from toolkit.grpo import b", "grpo.b": "def f():\n    from toolkit.grpo.a import x"})


MODULES = frozenset({"types", "stats", "store", "lm", "generate", "methods.a", "methods.b", "rewards.a", "evaluate"})

OFFENCES = [
    (check_rooms, "helpers", ""),
    (check_rooms, "utils.text", ""),
    (check_direction, "lm", "from toolkit.generate import rollouts"),
    (check_direction, "lm", "from toolkit import generate as g"),
    (check_direction, "lm", "import toolkit.generate"),
    (check_direction, "lm", "def late():\n    from toolkit import generate"),
    (check_direction, "lm", "from toolkit.helpers import anything"),
    (check_direction, "methods.a", "from toolkit.methods import b"),
    (check_direction, "methods.a", "from toolkit.methods.b import direction"),
    (check_direction, "rewards.a", "from toolkit import lm"),
    (check_direction, "rewards.a", "from toolkit.store import save"),
    (check_direction, "", "from toolkit import lm"),
    (check_absolute, "lm", "from .types import Rollout"),
    (check_absolute, "methods.a", "from ..types import Rollout"),
    (check_effects, "collect", "module.register_forward_hook(f)"),
    (check_effects, "lm", "self.layers[0].register_forward_pre_hook(f, with_kwargs=True)"),
    (check_effects, "figures", "open('x').read()"),
    (check_effects, "figures", "Path('x').open('w')"),
    (check_effects, "report", "(directory / 'x').write_text('')"),
    (check_effects, "report", "figure.write_html('x')"),
    (check_effects, "evaluate", "rows.to_parquet('x')"),
    (check_effects, "tasks.arithmetic", "pd.read_json('x')"),
    (check_effects, "edits", "save_file(tensors, 'x')"),
    (check_effects, "edits", "torch.save(tensors, 'x')"),
    (check_effects, "cli", "json.dump(report, stream)"),
    (check_effects, "cli", "Path('runs').mkdir()"),
    (check_effects, "edits", "lm.model.save_pretrained('x')"),
    (check_effects, "bridges", "AutoModel.from_pretrained('x')"),
    (check_effects, "evaluate", "load_dataset('x')"),
    (check_effects, "evaluate", "model.generate(ids)"),
    (check_effects, "grpo.loss", "torch.multinomial(probs, 1)"),
    (check_effects, "grpo.loss", "torch.distributions.Categorical(probs).sample()"),
    (check_effects, "evaluate", "print('x')"),
    (check_effects, "report", "rich.print('x')"),
    (check_effects, "report", "Console().print('x')"),
    (check_effects, "jobs", "sys.stdout.write('x')"),
    (check_methods, "methods.a", '"""A paper, arXiv:2503.22048."""'),
    (check_methods, "methods.a", '"""Deviations: none."""'),
    (check_methods, "methods.a", "# arXiv: Deviations:"),
]

ALLOWED = [
    (check_rooms, "tasks.arithmetic", ""),
    (
        check_direction,
        "generate",
        "import torch, toolkit\nfrom toolkit import lm, __version__\nfrom toolkit.types import A",
    ),
    (check_direction, "tasks.arithmetic", "from toolkit.tasks import splits"),
    (check_direction, "methods.a", "from toolkit import lm\nfrom toolkit.stats import bootstrap"),
    (check_direction, "rewards.a", "from toolkit import stats\nfrom toolkit.types import Rollout"),
    (check_absolute, "lm", "from toolkit.types import Rollout"),
    (check_effects, "hooks", "module.register_forward_hook(f)"),
    (check_effects, "store", "with open('x') as stream: json.dump(1, stream)"),
    (check_effects, "report", "store.write_text('', 'x')\n'a'.replace('a', 'b')\nlm.load('x')\nfigure.to_html()"),
    (check_effects, "checkpoints", "AutoModel.from_pretrained('x')\nstore.atomic_directory('x')"),
    (check_effects, "evaluate", "generate.rollouts(lm, problems)\ntqdm(rows)\nrows.sample(3)"),
    (check_effects, "cli", "print('x')\nconsole.print('y')"),
    (check_methods, "methods.a", '"""A paper, arXiv:2503.22048.\n\nDeviations: none.\n"""'),
    (check_methods, "methods", ""),
    (check_methods, "lm", ""),
]


@pytest.mark.parametrize(("check", "module", "source"), OFFENCES)
def test_rule_catches(check, module, source):
    assert check(module, source, MODULES)


@pytest.mark.parametrize(("check", "module", "source"), ALLOWED)
def test_rule_lets_pass(check, module, source):
    assert check(module, source, MODULES) == []


def test_every_rule_and_every_effect_is_shown_to_fail():
    assert {check for check, _, _ in OFFENCES} == set(CHECKS)
    caught = " ".join(b for check, module, source in OFFENCES for b in check(module, source, MODULES))
    assert all(effect.name in caught for effect in EFFECTS)
