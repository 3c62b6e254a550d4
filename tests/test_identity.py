"""Identities: two things that could give other numbers never share one, and a thing keeps its own from process to process."""

from __future__ import annotations

import functools
import json
import os
import subprocess
import sys
import threading
import types
from contextlib import nullcontext
from dataclasses import dataclass, field, replace

import numpy as np
import pytest
import torch

from toolkit import generate, identity, store
from toolkit.baselines import Budget, Instruction, Suppress
from toolkit.generate import Sampling
from toolkit.identity import UnknownIdentityError
from toolkit.lm import Condition


def body(value) -> str:
    return json.dumps(identity.of(value).body, sort_keys=True)


def executed(source: str, **given):
    """The names that a user's file defines."""
    names = {"__name__": "<run_path>", **given}
    exec(compile(source, "mine.py", "exec", dont_inherit=True), names)
    return names


# --- functions ---------------------------------------------------------------------------------------------------


def closing_over(a):
    return lambda ground, seed: a


def test_functions_of_one_comprehension_differ_by_what_they_close_over():
    by_default = [lambda ground, seed, a=a: a for a in (1, 2)]
    by_closure = [closing_over(a) for a in (1, 2)]
    partials = [functools.partial(lambda ground, seed, a: a, a=a) for a in (1, 2)]
    for one, other in (by_default, by_closure, partials):
        assert body(one) != body(other)
    assert body(by_default[0]) == body(lambda ground, seed, a=1: a)


def test_two_functions_on_one_line_differ():
    one, other = lambda ground, seed: seed + 1, lambda ground, seed: seed + 2
    assert body(one) != body(other)


MINE = """
STRENGTH = 0.5
def half(x):
    return scaled(x)
def scaled(x):
    return STRENGTH * x
class Rule:
    factor = 2
    def __call__(self, x):
        return self.factor * x
def make(ground, seed):
    return [Rule()(half(y)) for y in (1, 2)]
"""


@pytest.mark.parametrize(
    ("old", "new"),
    [("STRENGTH = 0.5", "STRENGTH = 0.6"), ("return STRENGTH * x", "return -STRENGTH * x"), ("factor = 2", "factor = 3"), ("self.factor * x", "self.factor + x"),
     ("in (1, 2)", "in (1, 3)")],
)  # fmt: skip
def test_a_changed_constant_helper_or_class_changes_the_functions_that_use_it(old, new):
    assert body(executed(MINE)["make"]) != body(executed(MINE.replace(old, new))["make"])


KINDS = """
from dataclasses import dataclass, field
from enum import Enum
from typing import NamedTuple
import functools
class Strength(Enum):
    half = 0.5
    def __str__(self): return "half"
@dataclass(frozen=True)
class Words:
    a: int = 1
    b: int = 2
    words: list = field(default_factory=lambda: ["quick"])
    def __call__(self, x): return [self.a, self.words]
class Quick(NamedTuple):
    n: int
    def __call__(self, x): return x + self.n
class Listed(list):
    def __call__(self, x): return x + 1
class Decorated:
    def __init__(self, f, price): functools.update_wrapper(self, f); self.price = price
    def __call__(self, x): return self.price * self.__wrapped__(x)
def enum(x, strength=Strength.half): return strength.value * x
def dataclass_(x): return Words(1, 2)(x)
quick, listed, decorated = Quick(3), Listed([1]), Decorated(lambda x: x, 1.0)
"""


@pytest.mark.parametrize(
    ("name", "old", "new"),
    [("enum", "half = 0.5", "half = 0.6"), ("dataclass_", '["quick"]', '["slow"]'), ("dataclass_", "a: int = 1\n    b: int = 2", "b: int = 2\n    a: int = 1"),
     ("quick", "x + self.n", "x - self.n"), ("listed", "x + 1", "x + 2"), ("decorated", "self.price *", "self.price +"), ("decorated", ", 1.0)", ", 2.0)")],
)  # fmt: skip
def test_a_changed_method_default_or_field_order_changes_what_is_made_of_the_class(name, old, new):
    assert KINDS.count(old) == 1 and body(executed(KINDS)[name]) == body(executed(KINDS)[name])
    assert body(executed(KINDS)[name]) != body(executed(KINDS.replace(old, new))[name])


def test_helpers_that_share_helpers_are_looked_at_once():
    lines = ["def a0(x): return x", "def b0(x): return -x"]
    lines += [f"def {f}{n}(x): return a{n - 1}(x) {op} b{n - 1}(x)" for n in range(1, 40) for f, op in (("a", "+"), ("b", "-"))]
    told = body(executed("\n".join(lines))["a39"])
    assert len(told) < 50_000 and told != body(executed("\n".join([*lines[:-1], lines[-1].replace("-", "*")]))["b39"])


def test_installed_packages_are_named_with_their_version_wherever_they_lie(monkeypatch, tmp_path):
    assert {"class": "torch.nn.modules.linear.Linear", "version": f"torch {torch.__version__}"} == identity.of(torch.nn.Linear).body
    elsewhere = types.ModuleType("lab_package")
    elsewhere.__file__ = str(tmp_path / "dist-packages" / "lab_package" / "__init__.py")
    monkeypatch.setitem(sys.modules, "lab_package", elsewhere)
    assert not identity.is_user_code("lab_package") and identity.is_user_code("test_identity")


def test_comments_docstrings_and_lines_do_not_count():
    told = MINE.replace("def half(x):\n", '\n\n# so\ndef half(x):\n    "Half of it."\n')
    told = told.replace("class Rule:\n", 'class Rule:\n    """A rule."""\n').replace("STRENGTH = 0.5", "STRENGTH = 0.5  # of it")
    assert told != MINE and body(executed(told)["make"]) == body(executed(MINE)["make"])


def test_what_is_read_of_a_module_of_ones_own_counts_and_the_rest_of_it_does_not(monkeypatch):
    helpers = types.ModuleType("my_helpers")
    exec("K = 1\nOTHER = 1\ndef scaled(x): return K * x", helpers.__dict__)
    monkeypatch.setitem(sys.modules, "my_helpers", helpers)
    makes = [
        executed("def make(ground, seed): return helpers.scaled(seed)", helpers=helpers)["make"],
        executed("def make(ground, seed):\n    from my_helpers import scaled\n    return scaled(seed)")["make"],
    ]
    before = [body(make) for make in makes]
    helpers.OTHER = 2
    assert [body(make) for make in makes] == before
    helpers.K = 2
    assert all(body(make) != old for make, old in zip(makes, before, strict=True))


def test_words_of_an_act_are_the_same_in_every_process_and_tell_two_functions_apart():
    one, other = (executed(f"def polite(messages): return [*messages, {n}]")["polite"] for n in (1, 2))
    assert identity.describe(one) == identity.describe(executed("def polite(messages): return [*messages, 1]")["polite"])
    assert identity.describe(one).startswith("polite ") and "0x" not in identity.describe(one) != identity.describe(other)
    assert identity.describe(Hidden(1.0)).startswith("Hidden() ") and identity.describe(Hidden(1.0)) != identity.describe(
        Hidden(2.0)
    )


@dataclass(frozen=True)
class Push:
    by: object


@dataclass(frozen=True)
class Told(Push):
    def __str__(self) -> str:
        return f"pushed by {self.by}"


def nearly_equal() -> dict[str, tuple[object, object]]:
    """Return kinds of values -> two values of the kind that differ in one number, and have the same text."""
    large, other, layer = torch.zeros(40, 40), torch.zeros(40, 40), torch.nn.Linear(2, 2)
    other[20, 20], short = 1.0, torch.tensor([0.123456])
    changed = torch.nn.Linear(2, 2)
    return {
        "large tensor": (large, other),
        "large array": (large.numpy(), other.numpy()),
        "rounded tensor": (short, short + 1e-6),
        "tensors in a list": ([short], [short + 1e-6]),
        "module": (layer, changed),
    }


@pytest.mark.parametrize("kind", nearly_equal())
@pytest.mark.parametrize("act", [Push, Told])
def test_acts_whose_text_leaves_out_where_they_differ_have_different_descriptions(act, kind):
    one, other = map(act, nearly_equal()[kind])
    assert str(one) == str(other) and identity.describe(one) != identity.describe(other)
    assert identity.describe(one).startswith(f"{act.__name__} ") and identity.describe(one) == identity.describe(one)


@pytest.mark.parametrize("act", [Instruction("Hmm... think briefly..."), Budget(3), Suppress(("w",), after="\n")])
def test_a_text_that_tells_all_of_an_act_is_its_description(act):
    assert identity.describe(act) == str(act)


STOPS = """
from dataclasses import dataclass
@dataclass(frozen=True)
class StopAt:
    n: int = 5
    def __call__(self, lm, reader, drawn):
        {}
"""


def test_acts_of_a_class_of_ones_own_are_described_by_its_code_too():
    texts = ("return None", "# nothing\n        return None", "return [7]")
    one, same, other = (executed(STOPS.format(text))["StopAt"] for text in texts)
    assert identity.describe(one()) == identity.describe(same()) != identity.describe(other())
    assert identity.describe(one()).startswith("StopAt(n=5) ") and identity.describe(one()) != identity.describe(one(6))
    # Inside a container, as a method, and inside a partial function, the text does not tell the code either.
    for wrapped in (lambda act: (act,), lambda act: act.__call__, functools.partial):
        texts = [identity.describe(wrapped(cls())) for cls in (one, same, other)]
        assert "0x" not in str(wrapped(one())) and texts[0] == texts[1] != texts[2]


def test_rollouts_that_were_kept_are_not_taken_for_those_of_a_rule_whose_code_changed(tiny, problems_of, tmp_path):
    for text in ("return None", "return [7]"):
        condition = Condition(tiny, rules=(executed(STOPS.format(text))["StopAt"](),))
        with nullcontext() if text == "return None" else pytest.raises(store.WrongModelError, match="interventions"):
            generate.rollouts(condition, problems_of(1), Sampling(max_new_tokens=2), out=tmp_path, progress=False)


def test_functions_that_call_themselves_and_each_other_have_an_identity():
    names = executed("def even(n): return n == 0 or odd(n - 1)\ndef odd(n): return n != 0 and even(n - 1)")
    assert body(names["even"]) != body(names["odd"])


def test_functions_of_the_toolkit_are_named_and_their_modules_listed():
    found = identity.of(executed("from toolkit import edits\ndef make(ground, seed): return edits.steering(ground.v, 1.0)")["make"])
    assert "toolkit.steering" in found.modules and "steering" in json.dumps(found.body)


# --- objects -----------------------------------------------------------------------------------------------------


class Hidden:
    """A reward whose repr tells nothing."""

    def __init__(self, price: float) -> None:
        self.price, self.seen = price, {1, 2}

    def __repr__(self) -> str:
        return "Hidden()"


@dataclass(frozen=True)
class Priced:
    price: float
    weights: dict = field(default_factory=dict)

    @functools.cached_property
    def doubled(self) -> float:
        return 2 * self.price


def test_objects_are_their_class_and_all_that_they_hold():
    assert body(Hidden(1.0)) != body(Hidden(2.0)) and body(Hidden(1.0)) == body(Hidden(1.0))
    assert body(Priced(1.0)) != body(Priced(2.0)) != body(Priced(2.0, {"a": 1}))
    assert body(Priced(1.0)) != body(Hidden(1.0))
    held = Hidden(1.0)
    held.seen.add(3)
    assert body(held) != body(Hidden(1.0))


def test_asking_an_object_for_a_computed_value_does_not_change_it():
    asked = Priced(1.0)
    before = body(asked)
    assert asked.doubled == 2.0 and body(asked) == before


def test_values_that_look_alike_differ():
    values = [
        1,
        1.0,
        True,
        "1",
        [1],
        (1,),
        {1},
        b"1",
        {"1": 1},
        np.float64(1),
        np.ones(1),
        torch.ones(1),
        torch.ones(1, dtype=torch.float64),
        None,
    ]
    assert len({body(v) for v in values}) == len(values)


def test_tensors_and_arrays_are_their_bytes():
    large = torch.arange(5000.0)
    changed = large.clone()
    changed[2500] += 1e-3
    assert repr(large) == repr(changed) and body(large) != body(changed)
    assert body(large.numpy()) != body(changed.numpy())
    assert body(large.to(torch.bfloat16)) != body(large) and body(large[None]) != body(large)


def test_a_model_is_its_weights_template_and_tags_and_not_its_name(tiny):
    named = replace(tiny, name="another")
    assert body(named) == body(tiny) and body(replace(tiny, tags=None)) != body(tiny)
    make = executed("def make(ground, seed): return reached", reached=tiny)["make"]
    assert tiny.fingerprint in body(make)


@pytest.mark.parametrize("value", [threading.Lock(), (x for x in ()), sys.stdout], ids=["lock", "generator", "file"])
def test_what_cannot_be_known_is_an_error_that_names_the_remedy(value):
    with pytest.raises(UnknownIdentityError, match=r"make > inner.*identity=\{\.\.\.\}") as told:
        identity.of(executed("def make(ground, seed, f=None): return inner", inner=value)["make"])
    assert len(str(told.value)) <= 400
    assert identity.of(lambda ground: value, strict=False).body  # to find modules only


ELSEWHERE = """
import json, torch
from toolkit import identity
from toolkit.board import prompted, with_rule, trained
from toolkit.grpo import recipes
from functools import partial
NAMES = {"some", "names", "in", "a", "set"}
def polite(messages): return [*messages, sorted(NAMES)]
class Price:
    def __init__(self): self.names = frozenset(NAMES)
    def __call__(self, batch): return batch
SPECS = [prompted("a", polite), with_rule("b", partial(polite, k=NAMES)), trained("c", recipes.plain("pear"), reward=Price())]
TOLD = json.dumps([spec.known.body for spec in SPECS], sort_keys=True)
"""


def test_identities_are_the_same_in_every_process():
    other = {**os.environ, "PYTHONHASHSEED": "12345"}
    run = subprocess.run([sys.executable, "-c", f"{ELSEWHERE}\nprint(TOLD)"], capture_output=True, text=True, check=True, env=other)
    told = executed(ELSEWHERE)["TOLD"]
    assert run.stdout.strip() == told and "0x" not in told and "some" in told
