"""The board: conditions as values, results kept by key, the same numbers from the same seeds; small runs of the real thing."""

from __future__ import annotations

import json
import re
import threading
from copy import deepcopy
from dataclasses import replace
from functools import partial

import numpy as np
import pandas as pd
import pytest
import torch
from typer.testing import CliRunner

from toolkit import board, cli, edits, generate, identity, masks, origins, store, tasks
from toolkit import lm as lms
from toolkit.baselines import Budget, Instruction
from toolkit.board import Sizes, Spec, TrainingPlan, default, measure, reading, running
from toolkit.board.spec import PARTS
from toolkit.evaluate import OverlapError
from toolkit.grpo import parts, recipes
from toolkit.identity import UnknownIdentityError
from toolkit.jobs import OURS
from toolkit.lm import Condition, ThinkTags
from toolkit.metrics import METRICS
from toolkit.rewards.correctness import Correctness
from toolkit.types import HeadEdit, Plan

pytestmark = pytest.mark.filterwarnings(
    "ignore::UserWarning", "ignore:.*is_gradient_checkpointing:FutureWarning", "ignore:An input array is constant"
)
MICRO = Sizes(
    main=(("arithmetic", 8), ("lookup", 4)), unseen=(("running_sum", 6), ("countdown", 2)), samples=3, max_new_tokens=200, unseen_tokens=200,
    seeds=2, extraction=(60, 6), haystacks=4, texts=12, training=TrainingPlan(steps=2, pool=16, held_out=8, evaluate_every=1, changes=(("problems", 2), ("samples", 4))),
)  # fmt: skip
FEW = [
    "base",
    "ThinkEdit (ours)",
    "ThinkEdit (ours), adapter",
    "control: random heads edited",
    "steered -0.5",
    "budget of 12",
    "DRPO",
]


def few(names=FEW) -> list[Spec]:
    return board.select_conditions([spec for spec in default.CONDITIONS if spec.name in names])


@pytest.fixture(scope="module")
def ground(tiny, tmp_path_factory):
    return board.Ground(tiny, MICRO, tmp_path_factory.mktemp("board"))


@pytest.fixture(scope="module")
def found(ground):
    board.run(ground, few(), progress=False)
    return board.write(ground, few(), "micro", ground.out)


# --- conditions as values ----------------------------------------------------------------------------------------


def test_the_default_board_holds_every_condition_of_the_mission():
    specs = board.select_conditions(default.CONDITIONS)
    families = pd.Series([s.family for s in specs]).value_counts()
    assert families["trained"] >= 15 and families["control"] >= 4 and families["combined"] >= 3 and families["decode"] >= 5
    assert all(s.note for s in specs) and all(s.seeded == (s.family in ("control", "trained", "combined")) for s in specs)
    trained = {s.recipe.reward for s in specs if s.family == "trained"}
    assert trained >= {
        "correctness", "length_penalty", "grpo_lambda", "dler", "da_dler", "laser", "laser_d", "hapo", "slpo", "sar", "pear",
        "train_long_think_short", "arora_zanette", "surrogate",
    }  # fmt: skip


def test_a_result_depends_on_what_a_condition_is_not_on_its_name(ground):
    a, b = board.edited("a", 1.0), board.edited("b", 1.0)
    assert a.key(ground, 0) == b.key(ground, 0) != a.key(ground, 1)
    assert a.key(ground, 0) != board.edited("a", 0.5).key(ground, 0)
    longer = board.Ground(ground.lm, replace(MICRO, samples=4), ground.out)
    assert a.key(ground, 0) != a.key(longer, 0)
    assert board.trained("t", recipes.drpo()).key(ground, 0) != board.trained("t", recipes.drpo(lam=0.2)).key(ground, 0)


def test_every_default_condition_has_a_key_of_its_own(ground):
    keys = [spec.key(ground, 0) for spec in default.CONDITIONS]
    assert len(set(keys)) == len(keys)


def test_patterns_choose_conditions_and_base_stays():
    assert [s.name for s in board.select_conditions(default.CONDITIONS, "DLER*, budget of 12")] == [
        "base",
        "budget of 12",
        "DLER",
        "DLER, merged",
    ]


@pytest.mark.parametrize(
    ("specs", "pattern", "message"),
    [
        (default.CONDITIONS, "nothing*", "No condition matches 'nothing\\*': choose from 'base', "),
        ([board.base(), board.base()], None, "Two conditions are called 'base'"),
        ([board.edited("ThinkEdit")], None, "No condition is called 'base'"),
    ],
)
def test_a_list_that_cannot_be_a_board_is_refused(specs, pattern, message):
    with pytest.raises(ValueError, match=message):
        board.select_conditions(specs, pattern)


def test_an_unknown_direction_is_refused():
    with pytest.raises(ValueError, match="unknown direction 'up': choose one of thinkedit, efficiency"):
        board.steered("x", 1.0, "up")


def test_an_unknown_family_is_refused():
    with pytest.raises(ValueError, match="unknown family 'edits': choose one of base, edit"):
        Spec("x", "edits", lambda ground, seed: Condition(ground.lm))


OWN = """
from toolkit.board import Spec, default, trained
from toolkit.grpo import recipes
from toolkit.lm import Condition

half = Spec("half strength", "edit", lambda ground, seed: Condition(__import__("toolkit").edits.apply(ground.lm, ground.plan(0.5))), note="mine")
CONDITIONS = [*default.CONDITIONS, half, trained("my price", recipes.plain("length_penalty", alpha=0.2))]
"""


def test_a_file_of_ones_own_extends_the_board_in_a_few_lines(ground, tmp_path):
    (tmp_path / "mine.py").write_text(OWN)
    specs, sizes = board.read_conditions(tmp_path / "mine.py")
    half, price = specs[-2:]
    assert sizes is None
    assert len(specs) == len(default.CONDITIONS) + 2 and len(half.key(ground, 0)) == 12
    assert price.recipe.options == {"alpha": 0.2}
    same = edits.apply(ground.lm, ground.plan(0.5))
    assert half.make(ground, 0).lm.fingerprint == same.fingerprint


COMPREHENSION = """
from toolkit.board import Spec, base
from toolkit.edits import steering
from toolkit.lm import Condition
CONDITIONS = [base(), *(Spec(f"mine {a:+g}", "steer", lambda ground, seed, a=a: Condition(ground.lm, (steering(ground.direction(), a),))) for a in (-3.0, 3.0))]
"""


def test_conditions_of_one_comprehension_have_keys_of_their_own(ground, tmp_path):
    (tmp_path / "mine.py").write_text(COMPREHENSION)
    specs = board.select_conditions(board.read_conditions(tmp_path / "mine.py")[0])
    keys = [spec.key(ground, 0) for spec in specs]
    assert len(set(keys)) == 3 and keys == [spec.key(ground, 0) for spec in board.read_conditions(tmp_path / "mine.py")[0]]


def test_a_model_that_was_trained_again_at_the_same_path_is_another_condition(ground, tmp_path):
    spec = Spec("mine", "trained", lambda ground, seed: Condition(lms.load(tmp_path / "model", device="cpu")))
    ground.lm.save(tmp_path / "model")
    first = spec.key(ground, 0)
    assert spec.key(ground, 0) == first
    changed = replace(ground.lm, model=deepcopy(ground.lm.model))
    with torch.no_grad():
        next(changed.model.parameters()).mul_(1.01)
    store.remove(tmp_path / "model")
    changed.save(tmp_path / "model")
    assert spec.key(ground, 0) != first


def test_a_model_is_known_by_its_template_and_tags_and_not_by_its_name(ground):
    spec = board.base()
    key = spec.key(ground, 0)
    assert replace(ground, lm=replace(ground.lm, name="/elsewhere")).identity == ground.identity
    assert spec.key(replace(ground, lm=replace(ground.lm, tags=ThinkTags("<a>", "</a>"))), 0) != key


def test_a_file_of_problems_is_known_by_what_is_in_it(ground, tmp_path):
    problems, path = tasks.load("arithmetic", "test", 8), tmp_path / "mine.jsonl"
    sizes = replace(MICRO, main=((str(path), 4),))
    keys = set()
    for answer in ("1", "2"):
        store.save_problems([replace(p, answer=answer) for p in problems], path)
        keys.add(board.base().key(board.Ground(ground.lm, sizes, tmp_path), 0))
    assert len(keys) == 2


@pytest.mark.parametrize(
    "pair",
    [
        (board.edited("a", 1.0), board.edited("b", 1.0)),
        (board.with_rule("a", Budget(7)), board.with_rule("b", Budget(7))),
        tuple(Spec(name, "edit", lambda ground, seed: Condition(ground.lm)) for name in "ab"),
        (board.with_rule("a", Budget(7)), replace(board.base(), name="b", identity={"maker": "_with_rule", "rule": Budget(7)})),
    ],
    ids=["edits", "rules", "functions", "given"],
)
def test_one_condition_under_two_names_is_refused(pair):
    with pytest.raises(ValueError, match=r"'a' and 'b' are one condition: .*identity=\{\.\.\.\}") as told:
        board.select_conditions([board.base(), *pair])
    assert len(str(told.value)) <= 400
    apart = [pair[0], replace(pair[1], identity={"mine": "b"})]
    assert len(board.select_conditions([board.base(), *apart])) == 3


@pytest.mark.parametrize(
    "of", [lambda v: board.with_rule("x", v), lambda v: board.prompted("x", v), lambda v: board.with_intervention("x", v)]
)
def test_a_condition_whose_identity_cannot_be_known_is_refused_with_the_remedy(of):
    spec = of(partial(max, threading.Lock()))
    with pytest.raises(UnknownIdentityError, match=r"'x'.*identity=\{\.\.\.\}") as told:
        board.select_conditions([board.base(), spec])
    assert len(str(told.value)) <= 400
    assert board.select_conditions([board.base(), replace(spec, identity={"version": 1})])


class Locked(Correctness):
    """A reward that holds a lock."""

    def __init__(self, price: float) -> None:
        self.price, self.lock = price, threading.Lock()


class Known(Locked):
    """It says what it depends on."""

    def __getstate__(self):
        return {"price": self.price}


def test_a_reward_that_is_not_known_by_its_values_is_refused_at_once_with_a_remedy_that_works(ground):
    with pytest.raises(UnknownIdentityError, match=r"'x': its reward.*lock.*__getstate__") as told:
        board.trained("x", recipes.drpo(), reward=Locked(0.1))
    assert len(str(told.value)) <= 400
    specs = [board.trained("x", recipes.drpo(), reward=Known(price)) for price in (0.1, 0.2, 0.2)]
    folders = [ground.folder_of(recipes.drpo(), 0, spec.reward) for spec in specs]
    assert folders[0] != folders[1] == folders[2]


def test_one_checkpoint_trained_elsewhere_is_one_seed_and_is_not_judged(ground, found):
    mine = Spec("mine", "trained", lambda ground, seed: Condition(ground.lm))
    given = reading.condition_results(ground, few())
    table = reading.AlignedResults({"base": given["base"], "mine": replace(given["steered -0.5"], spec=mine)})
    effects = reading.estimates(table, "mine")[1]
    assert np.isnan(effects["think_tokens"].p) and effects["think_tokens"].note.startswith("1 seed")


def test_a_condition_made_from_problems_that_the_board_judges_on_is_refused(ground, tmp_path):
    ids = [p.id for p in ground.problems[:3]]
    seen = replace(ground.lm, made_from=(origins.record(ids, task="arithmetic"),))
    mine = Spec("mine", "edit", lambda ground, seed: Condition(seen), identity={"mine": 1})
    with pytest.raises(OverlapError, match="'mine' was made from 3 of the"):
        board.run(replace(ground, out=tmp_path), [mine], progress=False)


MAKES = """
import torch
from toolkit.board import Spec, base
from toolkit.lm import Condition
from toolkit.baselines import Budget
MADE = {}
def once(ground, seed):
    return Condition(ground.lm, rules=(MADE.setdefault("budget", Budget(7)),))
def anew(ground, seed):
    return Condition(ground.lm, rules=(Budget(int(torch.randint(1, 10**9, ()))),))
CONDITIONS = [base(), Spec("mine", "decode", FUNCTION)]
"""


def test_what_a_function_fills_when_it_is_called_does_not_change_its_key(ground, tmp_path):
    (tmp_path / "mine.py").write_text(MAKES.replace("FUNCTION", "once"))
    one, other = (board.select_conditions(board.read_conditions(tmp_path / "mine.py")[0])[1] for _ in range(2))
    assert [one.key(ground, 0), one.key(ground, 0)] == [other.key(ground, 0)] * 2


def test_a_function_that_makes_something_else_at_every_call_is_refused_before_it_is_measured(ground, tmp_path):
    (tmp_path / "mine.py").write_text(MAKES.replace("FUNCTION", "anew"))
    specs = board.select_conditions(board.read_conditions(tmp_path / "mine.py")[0])
    with pytest.raises(UnknownIdentityError, match=r"'mine': its function makes another .* each time.*identity=\{\.\.\.\}"):
        running.run(replace(ground, out=tmp_path), specs[1:], progress=False)


class Priced(Correctness):
    """A reward of one's own whose repr hides its price."""

    def __init__(self, price: float) -> None:
        self.price = price

    def __repr__(self) -> str:
        return "Priced()"


def test_what_a_reward_of_ones_own_holds_is_part_of_the_policys_folder(ground):
    folders = [ground.folder_of(recipes.plain("correctness"), 0, Priced(price)) for price in (0.1, 0.2, 0.2)]
    assert folders[0] != folders[1] == folders[2] and "0x" not in str(folders)


@pytest.mark.parametrize(
    ("text", "message"),
    [
        ("x = 1", "defines no CONDITIONS"),
        ("CONDITIONS = ['base']", "'base' in CONDITIONS is not a board.Spec"),
        ("CONDITIONS = []\nSIZES = 20", "SIZES is 20, not a board.Sizes"),
    ],
)
def test_a_file_without_conditions_is_refused(tmp_path, text, message):
    (tmp_path / "mine.py").write_text(text)
    with pytest.raises(ValueError, match=message):
        board.read_conditions(tmp_path / "mine.py")


def test_a_file_may_say_how_much_is_measured(tmp_path):
    text = "from toolkit.board import Sizes, base\nCONDITIONS = [base()]\nSIZES = Sizes(main=(('gsm8k', 9),), haystack='needle')"
    (tmp_path / "mine.py").write_text(text)
    assert board.read_conditions(tmp_path / "mine.py")[1] == Sizes(main=(("gsm8k", 9),), haystack="needle")
    told = CliRunner().invoke(cli.app, ["board", "--conditions", str(tmp_path / "mine.py"), "--quick"])
    assert told.exit_code == 2 and "leave out --quick" in " ".join(told.output.split())


def test_another_share_of_heads_is_planned_from_the_same_scores(ground):
    few, many = ground.plan(fraction=0.04), ground.plan(fraction=0.13)
    assert (len(few.heads), len(many.heads)) == (1, 4) and set(few.heads) < set(many.heads)
    assert ground.plan(fraction=ground.sizes.fraction).edits == ground.plan().edits


def test_a_reward_of_ones_own_is_part_of_the_key(ground):
    plain = board.trained("t", recipes.plain("correctness"))
    own = board.trained("t", recipes.plain("correctness"), reward=Correctness())
    assert plain.key(ground, 0) != own.key(ground, 0)


def test_sizes_follow_the_command_line():
    sizes = board.adjust_sizes(
        board.FULL,
        {"task": "gsm8k", "problems": 30, "seeds": 1, "train": parts.adapter(8), "engine": "trl"},
        {"problems": "32", "use_vllm": "true"},
        tiny=False,
    )
    assert sizes.main == (("gsm8k", 30),) and sizes.seeds == 1
    assert sizes.training.changes == (("problems", 32),) and dict(sizes.training.overrides) == {"use_vllm": True}
    assert (sizes.training.task, sizes.training.train.r, sizes.training.engine, sizes.training.tiny) == ("gsm8k", 8, "trl", False)
    with pytest.raises(ValueError, match="Unknown task 'gsm9k'"):
        board.adjust_sizes(board.FULL, {"task": "gsm9k"}, {}, tiny=True)
    with pytest.raises(ValueError, match="Unknown setting 'stepz'"):
        board.adjust_sizes(board.FULL, {}, {"stepz": "1"}, tiny=True)


def test_the_plan_of_a_file_survives_a_command_line_that_does_not_name_it():
    plan = board.TrainingPlan(changes=(("problems", 6), ("samples", 8)), overrides=(("beta", 0.1),), engine="trl")
    sizes = replace(board.FULL, training=plan)
    assert board.adjust_sizes(sizes, {"engine": None}, {}, tiny=True).training == plan
    changed = board.adjust_sizes(sizes, {}, {"problems": "12", "use_vllm": "true"}, tiny=True).training
    assert dict(changed.changes) == {"problems": 12, "samples": 8} and dict(changed.overrides) == {"beta": 0.1, "use_vllm": True}


def test_an_option_of_one_reward_cannot_be_set_for_a_whole_board():
    with pytest.raises(ValueError, match=r"reward\.alpha cannot be set for all conditions"):
        board.adjust_sizes(board.FULL, {}, {"reward.alpha": "3"}, tiny=True)


def test_the_ground_finds_heads_once_however_the_default_form_is_written(ground):
    assert ground.find_heads() is ground.find_heads(OURS) is ground.find_heads(form=OURS)


# --- measuring ---------------------------------------------------------------------------------------------------


def test_the_adapter_of_an_edit_is_the_edit(ground, ids):
    weights, adapter = (
        next(s for s in default.CONDITIONS if s.name == n).make(ground, 0).lm
        for n in ("ThinkEdit (ours)", "ThinkEdit (ours), adapter")
    )
    assert adapter.made_from == weights.made_from != ()
    with torch.inference_mode():
        a, b = (lm.model(input_ids=ids % 100).logits for lm in (weights, adapter))
    assert torch.allclose(a, b, atol=1e-4) and not torch.equal(a, ground.lm.model(input_ids=ids % 100).logits)


def test_a_policy_of_the_board_trains_the_part_that_it_names(ground, tiny):
    recipe = recipes.plain("length_penalty")
    made = {part: board.trained(part, recipe, part=part, learning_rate=1e-2).make(ground, 1) for part in PARTS}
    (steered,) = made["vector"].during
    assert made["vector"].lm.fingerprint == tiny.fingerprint and steered.direction.norms.gt(0).all()
    plan = ground.plan()
    for part, heads in {"heads": plan.heads, "random heads": edits.random_heads(plan, tiny.layout, seed=1).heads}.items():
        after = made[part].lm.layout
        moved = [
            (layer, head)
            for layer in range(tiny.layout.n_layers)
            for head in range(tiny.layout.heads[layer])
            if not torch.equal(
                after.W_O(layer)[:, after.head(layer, head)], tiny.layout.W_O(layer)[:, tiny.layout.head(layer, head)]
            )
        ]
        assert moved == sorted(set(heads))
    specs = {part: board.trained(part, recipe, part=part, learning_rate=1e-2) for part in PARTS}
    assert specs["random heads"].family == "control"
    folders = {ground.folder_of(recipe, 1, plan=spec.plan(ground, 1)) for spec in specs.values()}
    assert len(folders) == 3 and all((folder / store.MADE_BY).exists() for folder in folders)
    whole = board.trained("every weight", recipe)
    about = measure.Result(pd.DataFrame(), pd.DataFrame(), {"seed": 1})
    kept = {spec.name: reading.ConditionResults(spec, (about,)) for spec in (specs["vector"], whole)}
    curves = reading.curves(ground, kept)
    assert [c["step"] for c in curves["vector"]] == [[0, 1, 2]] and curves["every weight"] == [], "each has its own curve"
    with pytest.raises(ValueError, match="unknown part 'neurons': choose one of vector, heads, random heads"):
        board.trained("x", recipe, part="neurons")


def test_entries_of_vectors_that_steer_count_as_changed_parameters(ground):
    made = [spec.make(ground, 0) for spec in (board.base(), board.steered("steered", 0.5, "efficiency", layers=(0, 2)))]
    assert [measure.parameters_changed(ground.lm, condition) for condition in made] == [0, 2 * 128]


def test_problems_of_a_task_without_difficulties_are_examples_too(tiny, tmp_path):
    ground = board.Ground(tiny, Sizes(main=(("arithmetic", 3),)), tmp_path)
    problems = ground.problems
    rows = pd.DataFrame(
        [
            {
                "problem_id": p.id,
                "sample": 0,
                "task": "mine",
                "difficulty": np.nan,
                "text": "4",
                "answer": "4",
                "closed": True,
                "correct": True,
                "think_tokens": 0,
            }
            for p in problems
        ]
    )
    base = reading.ConditionResults(board.base(), (measure.Result(rows, pd.DataFrame(), {"seed": 0}),))
    found = reading.examples(ground, {"base": base})
    assert [(e["id"], e["difficulty"]) for e in found] == [(p.id, "") for p in problems]


@pytest.mark.parametrize(
    ("tags", "text", "answer", "think_tokens", "parts"),
    [
        (("<think>", "</think>"), "<think>1+1\n</think>2<|end|>", "2", 4, ("1+1\n", "2", False)),
        (("[", "]"), "so [1+1] 2", "2", 3, ("1+1", "2", False)),
        (("[", "]"), "[]2", "2", 0, ("", "2", False)),
        (("[", "]"), "[1+1=", None, 4, ("1+1=", None, True)),
        (("[", "]"), "1+1=", None, 4, ("1+1=", None, True)),  # the prompt opened it
        (("[", "]"), "1+1] 2", "2", 3, ("1+1", "2", False)),
        ((None, "]"), "1+1] 2", "2", 3, ("1+1", "2", False)),
        (("[", "]"), "2", "2", 0, (None, "2", False)),
        (("[", "]"), "[1+1=] [", "[", 4, ("1+1=", "[", False)),
        (None, "[1+1] 2", "[1+1] 2", 0, (None, "[1+1] 2", False)),
        ((None, None), "1+1=2", "1+1=2", 5, ("1+1=2", None, False)),
        ((None, None), "1+1=2", None, 5, ("1+1=2", None, True)),
    ],
)
def test_thinking_and_answer_of_an_example_are_split_by_the_tags_of_its_model(tags, text, answer, think_tokens, parts):
    row = pd.Series({"text": text, "answer": answer, "closed": answer is not None, "think_tokens": think_tokens})
    found = reading.response_parts(tags and ThinkTags(*tags), row)
    assert tuple(found[key] for key in ("think", "answer", "open")) == parts


def test_an_example_that_closes_its_thinking_and_answers_nothing_can_be_written_as_json():
    row = pd.Series(
        {"text": "[1+1]", "answer": float("nan"), "closed": True, "think_tokens": 3}
    )  # pandas turns a missing text into NaN
    assert reading.response_parts(ThinkTags("[", "]"), row) == {"think": "1+1", "answer": None, "open": False}


def test_seeds_that_draw_the_same_control_count_as_one(tiny):
    half = Plan(tuple(HeadEdit(1, head, "scale", 1.0) for head in (0, 2, 3, 5)), None, "half of a layer", tiny.provenance())
    controls = [masks.masking(edits.random_heads(half, tiny.layout, seed=seed), "uniform", during="newest") for seed in range(6)]
    texts = [identity.describe_interventions(Condition(tiny, (control,))) for control in controls]
    results = [
        measure.Result(pd.DataFrame(), pd.DataFrame(), {"seed": seed, "fingerprint": tiny.fingerprint, "interventions": text})
        for seed, text in enumerate([*texts, ["other heads"]])
    ]
    assert [r.about["seed"] for r in reading.distinct(results)] == [0, 6]


@pytest.mark.slow
def test_a_board_is_measured_and_reads_as_json_table_and_page(found, ground):
    assert set(found["conditions"]) == set(FEW) and "base" not in found["paired"]
    base = found["conditions"]["base"]
    assert base["metrics"]["accuracy"]["low"] <= base["metrics"]["accuracy"]["mean"] <= base["metrics"]["accuracy"]["high"]
    assert set(found["metrics"]) <= set(METRICS) and {m for c in found["conditions"].values() for m in c["metrics"]} <= set(METRICS)
    assert found["conditions"]["control: random heads edited"]["seeds"] == [0, 1] == found["conditions"]["DRPO"]["seeds"]
    assert found["conditions"]["DRPO"]["cost"]["training_steps"] == 2 and base["cost"]["parameters_changed"] == 0
    edited = found["conditions"]["ThinkEdit (ours)"]["cost"]["parameters_changed"]
    assert 0 < edited <= 2 * 128 * 32 + 1
    assert found["paired"]["budget of 12"]["think_tokens"]["high"] < 0
    assert [c["seed"] for c in found["curves"]["DRPO"]] == [0, 1] and found["curves"]["DRPO"][0]["step"] == [0, 1, 2]
    assert store.read_json(ground.out / "board.json")["conditions"].keys() == found["conditions"].keys()
    table = store.read_table(ground.out / "table.parquet")
    row = table[(table["condition"] == "budget of 12") & (table["metric"] == "think_tokens")].iloc[0]
    assert row["difference"] == found["paired"]["budget of 12"]["think_tokens"]["mean"]
    assert "budget of 12" in (ground.out / "report.html").read_text()
    assert found["figures"][0]["text"].endswith(" This board trains policies on arithmetic only.")
    assert found["metrics"]["accuracy_lookup"]["label"] == "lookup (never trained on)"


@pytest.mark.parametrize(
    ("task", "trained_on"), [("arithmetic", ["arithmetic"]), ("lookup", ["lookup"]), ("tiny", ["arithmetic", "lookup"])]
)
def test_what_a_board_says_of_a_task_follows_its_own_tasks_and_sizes(tiny, tmp_path, task, trained_on):
    sizes = replace(board.adjust_sizes(MICRO, {"task": task}, {}, tiny=True), main=MICRO.main, horizons=(3, 12))
    assert reading.training_tasks(board.Ground(tiny, sizes, tmp_path)) == trained_on
    for name in ("arithmetic", "lookup"):
        about = reading.metric_texts(f"accuracy_{name}", sizes, trained_on)
        trained = name in trained_on
        assert about["label"] == (name if trained else f"{name} (never trained on)")
        assert about["group"] == ("main" if trained else "damage")
        assert about["help"].endswith("trains no policy on this task.") != trained
    other = reading.metric_texts("accuracy_countdown", sizes, trained_on)
    assert other["label"] == "countdown" and other["help"].endswith("This board trains no policy on this task.")
    assert "chains of 3 to 12 additions" in reading.metric_texts("running_sum_step", sizes, trained_on)["help"]
    assert reading.metric_texts("think_tokens", sizes, trained_on) == METRICS["think_tokens"].about


def test_no_metric_claims_what_only_some_boards_do():
    texts = " ".join(f"{m.label} {m.help}" for m in METRICS.values())
    assert "trained" not in texts and "in training" not in texts and not re.search(r"\d additions", texts)


@pytest.mark.slow
def test_numbers_are_those_of_the_rows(found, ground):
    rows = measure.read_result(ground, few()[0], 0).rows
    assert found["conditions"]["base"]["metrics"]["accuracy"]["mean"] == pytest.approx(rows["correct"].mean(), abs=1e-6)
    assert found["conditions"]["base"]["metrics"]["think_tokens"]["mean"] == pytest.approx(rows["think_tokens"].mean(), rel=1e-5)
    lookup = rows[rows["task"] == "lookup"]
    assert found["conditions"]["base"]["cells"]["lookup"]["all"]["n"] == lookup["problem_id"].nunique() == 4
    assert found["conditions"]["base"]["metrics"]["accuracy_lookup"]["mean"] == pytest.approx(lookup["correct"].mean(), abs=1e-6)
    quantile = np.quantile(rows["think_tokens"], 0.9)
    assert found["conditions"]["base"]["metrics"]["think_tokens_q90"]["mean"] == pytest.approx(quantile)


@pytest.mark.slow
def test_the_adapter_and_the_weights_measure_the_same(found):
    a, b = (found["conditions"][name]["metrics"] for name in ("ThinkEdit (ours)", "ThinkEdit (ours), adapter"))
    assert a["accuracy"] == b["accuracy"] and a["think_tokens"] == b["think_tokens"]


@pytest.mark.slow
def test_a_steered_model_moves_its_states_along_the_direction_and_a_budget_not_at_all(found):
    assert found["conditions"]["steered -0.5"]["shift"]["cosine"] < -0.5
    assert found["conditions"]["budget of 12"]["shift"] == {} == found["conditions"]["base"]["shift"]


@pytest.mark.slow
def test_a_board_goes_on_and_a_new_condition_costs_only_itself(found, ground, monkeypatch):
    measured = []
    original = running.measure
    monkeypatch.setattr(
        running, "measure", lambda ground, spec, seed, refs: measured.append(spec.name) or original(ground, spec, seed, refs)
    )
    board.run(ground, [*few(), board.prompted("quickly", Instruction("quick"))], progress=False)
    assert measured == ["quickly"]


@pytest.mark.slow
def test_two_runs_of_one_board_give_identical_numbers(found, ground, tmp_path):
    again = board.Ground(ground.lm, MICRO, tmp_path)
    names = ["base", "control: random heads edited", "budget of 12", "DRPO"]
    board.run(again, few(names), progress=False)
    other = board.make_board(again, few(names), "again")
    for name in names:
        assert other["conditions"][name]["metrics"] == found["conditions"][name]["metrics"]
        assert other["conditions"][name]["fingerprints"] == found["conditions"][name]["fingerprints"]


@pytest.mark.slow
def test_a_condition_that_another_process_measures_is_left_to_it(ground, found, monkeypatch):
    other = board.with_rule("budget of 7", Budget(7))
    monkeypatch.setattr(running, "measure", lambda *_: pytest.fail("measured by two"))
    with store.locked(measure.result_folder(ground, other, 0).with_suffix(".claim")) as mine:
        assert mine
        board.run(ground, [*few(), other], wait=False, progress=False)


class Killed(BaseException):
    pass


@pytest.mark.parametrize("when", ["measured", "written", "tidied"])
def test_a_board_that_is_killed_while_a_policy_is_written_or_measured_goes_on_and_leaves_no_litter(
    tiny, tmp_path, monkeypatch, when
):
    sizes = replace(
        MICRO, main=(("arithmetic", 5),), unseen=(("running_sum", 2),), samples=2, seeds=1, max_new_tokens=100, unseen_tokens=60
    )
    policy = board.trained("one policy", recipes.plain("correctness"))
    specs, real = [board.base(), policy], (lms.LM.save, store.save_table, store.remove)

    def die(*_):
        raise Killed

    def die_at_rows(table, path):
        return die() if path.name == measure.ROWS else real[1](table, path)

    def die_at_rollouts(path):
        return die() if path.name.startswith(measure.SAMPLED) else real[2](path)

    with monkeypatch.context() as patch, pytest.raises(Killed):
        patch.setattr(lms.LM, "save", die if when == "written" else real[0])
        patch.setattr(store, "save_table", die_at_rows if when == "measured" else real[1])
        patch.setattr(store, "remove", die_at_rollouts if when == "tidied" else real[2])
        board.run(board.Ground(tiny, sizes, tmp_path), specs[1:], progress=False)
    sampled = list(tmp_path.glob("results/*/rollouts-*/part-*"))
    assert bool(sampled) == (when != "written") and bool(list(tmp_path.glob("trained/*/model/*"))) == (when != "written")
    for model in tmp_path.glob("trained/*/model") if when == "measured" else ():
        (model.parent / "checkpoint-2").mkdir()  # as a kill between saving the policy and removing its checkpoints leaves one
        (model.parent / f".checkpoint-1.h{store.files.HOST}.999999999.partial").mkdir()  # as a kill while it removes one
    monkeypatch.setattr("toolkit.generate._sample", count := Counted(generate._sample))
    board.run(board.Ground(tiny, sizes, tmp_path), specs[1:], progress=False)
    assert measure.read_result(board.Ground(tiny, sizes, tmp_path), policy, 0) is not None
    assert not [*tmp_path.glob("results/*/rollouts-*"), *tmp_path.glob("trained/*/checkpoint-*"), *tmp_path.rglob("*.partial")]
    # The 5 x 2 main rollouts are sampled again only if they were not kept; nothing else here samples ten rows.
    assert (10 in count.rows) == (when == "written")


class Counted:
    """A function that remembers how many rows each call was asked for."""

    def __init__(self, f) -> None:
        self.f, self.rows = f, []

    def __call__(self, lm, rows, *more):
        self.rows.append(len(rows))
        return self.f(lm, rows, *more)


def test_an_empty_directory_left_by_a_kill_is_no_policy_and_no_adapter(ground, tmp_path):
    own = board.Ground(ground.lm, MICRO, tmp_path)
    folder = own.folder_of(recipes.plain("correctness"), 0)
    (folder / "model").mkdir(parents=True)
    assert own.train(recipes.plain("correctness"), 0).lm.fingerprint != ground.lm.fingerprint
    assert store.is_whole(folder / "model")


def test_the_help_says_that_a_file_of_conditions_is_executed():
    told = CliRunner().invoke(cli.app, ["board", "--help"], env={"COLUMNS": "300", "NO_COLOR": "1"}).output
    assert "The file is executed, so give only one that you trust." in " ".join(told.replace("│", " ").split())


def test_a_board_without_base_says_what_to_do(ground, tmp_path):
    with pytest.raises(FileNotFoundError, match="no result of 'base': measure the board first"):
        board.make_board(board.Ground(ground.lm, MICRO, tmp_path), few(), "empty")


def test_the_configuration_for_a_hub_model_trains_a_lora_adapter_with_trls_engine(tiny, tmp_path):
    """The plan of data/board/README.md, on the shipped model of the same family (Qwen3), without vLLM."""
    sizes = replace(MICRO, training=replace(MICRO.training, train=parts.adapter(4), engine="trl", overrides=(("use_vllm", False),)))
    ground = board.Ground(tiny, sizes, tmp_path)
    done = ground.train(recipes.grpo_lambda(), 0)
    assert done.lm.fingerprint != tiny.fingerprint and done.lm.parent == tiny.fingerprint
    assert {n for n, _ in done.lm.model.named_parameters()} == {n for n, _ in tiny.model.named_parameters()}
    assert ground.train(recipes.grpo_lambda(), 0).lm.fingerprint == done.lm.fingerprint  # read back


def test_the_command_explains_itself_and_refuses_bad_input_before_any_work(tmp_path):
    result = CliRunner().invoke(cli.app, ["board", "--help"], env={"COLUMNS": "200", "NO_COLOR": "1"})
    assert result.exit_code == 0 and "--quick" in result.output and "--only" in result.output
    for arguments, message in (
        (["--only", "nix"], "No condition matches"),
        (["--task", "nix"], "Unknown task"),
        (["--conditions", "nix.py"], "nix.py"),
    ):
        result = CliRunner().invoke(cli.app, ["board", *arguments, "--out", str(tmp_path / "out")])
        assert result.exit_code == 1 and message in str(result.exception)


@pytest.mark.slow
def test_the_command_prints_the_board_as_json(found, ground, monkeypatch):
    monkeypatch.setattr(board, "QUICK", MICRO)
    result = CliRunner().invoke(cli.app, ["board", "--quick", "--only", "budget of 12", "--out", str(ground.out), "--json"])
    assert result.exit_code == 0, result.output
    printed = json.loads(result.stdout)
    assert (
        set(printed) == {"out", "conditions", "paired", "provenance"}
        and printed["out"] == str(ground.out)
        and set(printed["paired"]) == {"budget of 12"}
    )
    assert printed["provenance"]["fingerprint"] == ground.lm.fingerprint
