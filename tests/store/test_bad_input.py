"""What users get wrong, each tried: the error is named, holds the value, and says what to do. What is tested beside the thing
itself (plans of another model, damaged files, splits, classes too small) is not repeated here."""

from __future__ import annotations

import copy
import json
import math
import subprocess
import sys
import tomllib
from dataclasses import replace
from pathlib import Path

import pytest
import torch
from families import COMMON, family, tokenizer
from safetensors import safe_open
from safetensors.torch import load_file, save_file
from transformers import AutoModelForCausalLM, LlamaConfig

from toolkit import cli, collect, edits, store
from toolkit import lm as lms
from toolkit.generate import Sampling, rollouts
from toolkit.lm import LM, NoThinkTagsError
from toolkit.methods import thinkedit
from toolkit.sites import UnsupportedModelError
from toolkit.types import Direction, HeadEdit, HeadScores, Plan, Problem


def ask(content: str, name: str = "p") -> Problem:
    return Problem(name, ({"role": "user", "content": content},), "3")


def sample(lm: LM, problems, **sampling):
    return rollouts(lm, problems, Sampling(**{"max_new_tokens": 8, **sampling}), progress=False)


# --- problems ------------------------------------------------------------------------------------------------


def test_an_empty_list_of_problems(llama):
    with pytest.raises(ValueError, match="No problems to sample from: the list is empty"):
        sample(llama, [])


def test_two_problems_with_one_id(llama):
    with pytest.raises(ValueError, match="1 problems share an id with another, such as 'p': ids must be unique"):
        sample(llama, [ask("1+1=?"), ask("2+2=?"), ask("3+3=?", "q")])


@pytest.mark.parametrize(("length", "budget"), [(600, 8), (300, 300), (505, 8)])
def test_a_prompt_longer_than_the_context(llama, length, budget):
    with pytest.raises(ValueError) as caught:
        sample(llama, [ask("1+1=?", "short"), ask("1" * length)], max_new_tokens=budget)
    for part in (f"{length + 3} tokens", f"max_new_tokens={budget}", "context of 512 tokens", "Lower max_new_tokens"):
        assert part in str(caught.value), part


def test_a_prompt_that_just_fits_is_sampled(llama):
    assert sample(llama, [ask("1" * 501)])[0].prompt_len == 504


# --- sampling ------------------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("field", "value"),
    [
        *((name, value) for name in ("n", "max_new_tokens", "batch_size") for value in (0, -1)),
        *(("temperature", value) for value in (-0.1, math.nan)),
        *(("top_p", value) for value in (0.0, 1.1, -1.0, math.nan)),
        ("top_k", -1),
    ],
)
def test_a_sampling_value_outside_its_range(field, value):
    with pytest.raises(ValueError, match=rf"{field}={value}.*(at least 1|need temperature >= 0, 0 < top_p <= 1, top_k >= 0)"):
        Sampling(**{field: value})


# --- models without what is needed ---------------------------------------------------------------------------


def test_a_model_without_a_chat_template(llama):
    bare = copy.deepcopy(tokenizer())
    bare.chat_template = None
    lm = replace(llama, tokenizer=bare, name="some/base-model")
    with pytest.raises(ValueError) as caught:
        sample(lm, [ask("1+1=?")])
    for part in ("some/base-model has no chat template", "tokenizer.chat_template", "chat_template.jinja"):
        assert part in str(caught.value), part


def test_a_model_without_think_tags(llama, problems_of):
    """It can be sampled and graded; ThinkEdit on it is an error that names the way out."""
    lm = replace(llama, tags=None)
    found = sample(lm, problems_of(3))
    assert all(r.think is None and r.think_tokens == 0 for r in found)
    with pytest.raises(NoThinkTagsError) as caught:
        collect.moments(lm, found, lambda r: "short")
    for part in ("None of the 3 rollouts of tiny llama", "'think'", "tags=ThinkTags(...)", "--think 'response'"):
        assert part in str(caught.value), part
    with pytest.raises(thinkedit.ClassTooSmallError, match="None of the 3 rollouts has a closed think span"):
        thinkedit.quantile_classes(found)


def test_tags_are_found_in_the_vocabulary_or_the_template_and_else_are_none(llama):
    assert llama.tags == lms.ThinkTags()
    plain = copy.deepcopy(tokenizer())
    plain.get_vocab = lambda: {"a": 0}
    assert lms.wrap(llama.model, plain, name="x").tags is None
    plain.chat_template = "... {{ content.split('</think>')[-1] }}"
    assert lms.wrap(llama.model, plain, name="x").tags == lms.ThinkTags()


# --- checkpoints ---------------------------------------------------------------------------------------------


@pytest.fixture
def checkpoint(llama, tmp_path):
    return llama.save(tmp_path / "model")


def rewrite_weights(path, change) -> None:
    weights = load_file(path / "model.safetensors")
    change(weights)
    save_file(weights, path / "model.safetensors", metadata={"format": "pt"})


DOWN = "model.layers.1.mlp.down_proj.weight"


@pytest.mark.parametrize("bad", [math.nan, math.inf])
def test_weights_that_are_not_finite(checkpoint, bad):
    rewrite_weights(checkpoint, lambda weights: weights[DOWN].__setitem__((3, 4), bad))
    with pytest.raises(UnsupportedModelError, match=rf"weight {DOWN} holds NaN or infinity: the checkpoint is damaged"):
        lms.load(checkpoint, device="cpu")


@pytest.mark.parametrize("which", ["weights", "activations"])
def test_what_overflows_half_precision_is_told_to_take_another_type(checkpoint, which):
    """Values past 65,504: the same directory loads in fp32 and bf16, so it is not the family's fault."""

    def grow(weights):
        for name in weights:
            if name.endswith(("o_proj.weight", "down_proj.weight")):
                weights[name].mul_(1e6 if which == "weights" else 6e4 / weights[name].abs().max())

    rewrite_weights(checkpoint, grow)
    for dtype in (torch.float32, torch.bfloat16):
        assert lms.load(checkpoint, dtype=dtype, device="cpu")
    with pytest.raises(UnsupportedModelError, match=rf"{which[:6]}.* overflow float16. Use bfloat16 or float32") as caught:
        lms.load(checkpoint, dtype=torch.float16, device="cpu")
    assert len(str(caught.value)) <= 400


def test_a_tokenizer_without_end_and_padding_is_sampled_as_with_them(checkpoint):
    """The end is in generation_config.json alone; padding is masked, so that any token will do."""
    usual = sample(lms.load(checkpoint, device="cpu"), [ask("1+1=?"), ask("12+3+4=?", "q")])
    config = json.loads((checkpoint / "tokenizer_config.json").read_text())
    bare = {k: v for k, v in config.items() if k not in ("eos_token", "pad_token")}
    (checkpoint / "tokenizer_config.json").write_text(json.dumps(bare))
    lm = lms.load(checkpoint, device="cpu")
    assert lm.tokenizer.eos_token_id is None and lm.tokenizer.pad_token_id is not None
    assert sample(lm, [ask("1+1=?"), ask("12+3+4=?", "q")]) == usual


def test_a_model_that_could_never_end_is_refused(llama):
    endless = copy.deepcopy(tokenizer())
    endless.eos_token = None
    model = copy.deepcopy(llama.model)
    model.generation_config.eos_token_id = None
    with pytest.raises(UnsupportedModelError, match=r"else no response ends. Set eos_token_id"):
        lms.wrap(model, endless, name="endless")


def test_a_weight_that_is_missing(checkpoint):
    """Transformers fills it with random numbers and a warning; every result would be noise."""
    rewrite_weights(checkpoint, lambda weights: weights.pop(DOWN))
    with pytest.raises((UnsupportedModelError, OSError, ValueError), match="down_proj"):
        lms.load(checkpoint, device="cpu")


@pytest.mark.parametrize("share", [0.0, 0.3, 0.99])
def test_a_truncated_checkpoint(checkpoint, share):
    """An error of the kinds that the command line turns into one line, with the path."""
    content = (checkpoint / "model.safetensors").read_bytes()
    (checkpoint / "model.safetensors").write_bytes(content[: int(share * len(content))])
    with pytest.raises((ValueError, OSError), match=str(checkpoint)):
        lms.load(checkpoint, device="cpu")


def test_a_vocabulary_larger_than_the_models():
    small = AutoModelForCausalLM.from_config(LlamaConfig(**{**COMMON, "vocab_size": 50}))
    with pytest.raises(
        UnsupportedModelError, match=r"mine: the tokenizer has 103 tokens, the model embeds only 50\. Use the model's tokenizer"
    ):
        lms.wrap(small, tokenizer(), name="mine")


def with_image_token(**changes):
    """The tiny tokenizer with one special token more than the models of ``families`` embed, as that of Gemma 3."""
    larger = copy.deepcopy(tokenizer())
    larger.add_special_tokens({"additional_special_tokens": ["<image_soft_token>"]})
    for name, value in changes.items():
        setattr(larger, name, value)
    return larger


def test_a_special_token_that_the_model_does_not_embed_is_refused_only_in_prompts():
    lm = lms.wrap(family("gemma3").model, with_image_token(pad_token="<image_soft_token>"), name="text only")
    assert len(lm.tokenizer) == lm.vocab_size + 1 and lm.tokenizer.pad_token_id < lm.vocab_size
    assert lms.qualify(lm)
    assert all(max(r.token_ids) < lm.vocab_size for r in sample(lm, [ask("1+1=?"), ask("1+22=?", "q")], max_new_tokens=20))
    with pytest.raises(ValueError, match=r"'<image_soft_token>' with id 103, but text only embeds only the ids 0\.\.102: leave"):
        lm.prompt_ids([{"role": "user", "content": "<image_soft_token>"}])


def test_a_token_without_an_embedding_that_text_may_contain_is_refused_at_once():
    template = tokenizer().chat_template
    for larger in (
        with_image_token(chat_template=template + "<image_soft_token>"),
        with_image_token(eos_token="<image_soft_token>", chat_template=template),
    ):
        with pytest.raises(UnsupportedModelError, match=r"embeds only 103|expected ids in 0"):
            lms.wrap(family("gemma3").model, larger, name="mine")
    ordinary = copy.deepcopy(tokenizer())
    ordinary.add_tokens(["word"])
    with pytest.raises(UnsupportedModelError, match="such as 'word', are allowed only if they are special tokens"):
        lms.wrap(family("gemma3").model, ordinary, name="mine")


def test_an_embedding_padded_beyond_the_vocabulary_is_fine():
    padded = AutoModelForCausalLM.from_config(LlamaConfig(**{**COMMON, "vocab_size": 128}))
    lm = lms.wrap(padded, tokenizer(), name="padded")
    assert lms.qualify(lm)
    assert sample(lm, [ask("1+1=?")], max_new_tokens=40)


@pytest.mark.parametrize("source", ["/no/such/directory", "./nothing", "a/b/c"])
def test_a_path_that_does_not_exist(source):
    with pytest.raises(FileNotFoundError, match=f"{source.removeprefix('./')} is neither a directory nor a GGUF file"):
        lms.load(source)


def test_a_gguf_file_that_does_not_exist(tmp_path):
    with pytest.raises(FileNotFoundError, match=r"No GGUF file at .*none\.gguf"):
        lms.load(tmp_path / "none.gguf")


def test_a_directory_that_is_no_checkpoint(tmp_path):
    (tmp_path / "empty").mkdir()
    with pytest.raises((OSError, ValueError), match="empty"):
        lms.load(tmp_path / "empty")


def test_a_config_that_contradicts_the_weights(checkpoint):
    config = json.loads((checkpoint / "config.json").read_text())
    (checkpoint / "config.json").write_text(json.dumps({**config, "num_attention_heads": 8, "head_dim": 8}))
    with pytest.raises((ValueError, RuntimeError, OSError)):
        lms.load(checkpoint, device="cpu")


def test_code_from_the_hub_does_not_run_unless_asked_for(checkpoint):
    config = json.loads((checkpoint / "config.json").read_text())
    own = {"model_type": "mine", "auto_map": {"AutoConfig": "evil.C", "AutoModelForCausalLM": "evil.M"}}
    (checkpoint / "config.json").write_text(json.dumps({**config, **own}))
    (checkpoint / "evil.py").write_text(f"open({str(checkpoint / 'ran')!r}, 'w')\nclass C: pass\nclass M: pass\n")
    with pytest.raises(UnsupportedModelError, match=r"--trust-remote-code, or lm\.load\(\.\.\., trust_remote_code=True\)"):
        lms.load(checkpoint, device="cpu")
    assert not (checkpoint / "ran").exists()


def test_the_tiny_reasoner_missing_from_an_installation(tmp_path, monkeypatch):
    monkeypatch.setattr(lms.toolkit, "__file__", str(tmp_path / "toolkit" / "__init__.py"))
    with pytest.raises(
        FileNotFoundError, match=r"tiny-reasoner is not in this installation; reinstall, or run data/tiny-reasoner/train\.py"
    ):
        lms.tiny_reasoner_path()


# --- what makes one model another ----------------------------------------------------------------------------


def test_the_fingerprint_sees_every_single_weight(llama):
    """One bit of one weight, anywhere: each parameter in turn."""
    model = copy.deepcopy(llama.model)
    seen = {llama.fingerprint}
    for value in model.parameters():
        flat = value.data.view(-1)
        kept = flat[-1].clone()
        flat[-1] = torch.nextafter(kept, torch.tensor(torch.inf))
        seen.add(replace(llama, model=model).fingerprint)
        flat[-1] = kept
    assert len(seen) == 1 + len(list(model.parameters()))
    assert replace(llama, model=model).fingerprint == llama.fingerprint


def test_the_fingerprint_sees_what_the_config_computes(model_of):
    """The tiny Llama and Mistral have equal weights; a sliding window tells them apart."""
    assert model_of("llama").fingerprint != model_of("mistral").fingerprint


def test_the_fingerprint_sees_the_weight_type(model_of):
    assert len({model_of("llama", dtype).fingerprint for dtype in (torch.float32, torch.bfloat16, torch.float16)}) == 3


def test_provenance_names_model_weights_template_version_and_seed(tiny):
    import toolkit

    p = tiny.provenance(5, split="dev")
    assert (p.model, p.fingerprint, p.toolkit_version, p.seed) == ("tiny-reasoner", tiny.fingerprint, toolkit.__version__, 5)
    assert p.notes == {"split": "dev"}
    other = copy.deepcopy(tiny.tokenizer)
    other.chat_template += " "
    assert replace(tiny, tokenizer=other).provenance().template_hash != p.template_hash


# --- values that an edit or a command is given ---------------------------------------------------------------


def direction_of(lm: LM) -> Direction:
    vector = torch.randn(lm.layout.n_layers, lm.layout.d_model, generator=torch.Generator().manual_seed(0))
    return Direction(vector, "resid_mid", "think", "by hand", 1, 1, lm.provenance())


def test_an_edit_with_a_direction_that_is_not_finite_is_refused_and_writes_nothing(llama):
    v = direction_of(llama)
    v.vector[1, 3] = math.nan
    plan = Plan((HeadEdit(1, 2, "project_out", 1.0),), v, "bad", llama.provenance())
    for act in (lambda: edits.apply(llama, plan), lambda: edits.RuntimeEdit(plan)(llama)):
        with pytest.raises(ValueError, match="plan 'bad' holds NaN or infinity"):
            act()


def test_a_plan_for_another_shape_is_refused_before_anything_is_written(llama):
    about = llama.provenance()
    with pytest.raises(IndexError, match=r"Head 0\.4 does not exist: layer 0 has heads 0\.\.3"):
        edits.apply(llama, Plan((HeadEdit(0, 4, "scale", 1.0),), None, "bad", about))
    with pytest.raises(IndexError, match=r"layers 0\.\.2"):
        edits.apply(llama, Plan((HeadEdit(9, 0, "scale", 1.0),), None, "bad", about))
    wide = replace(direction_of(llama), vector=torch.ones(llama.layout.n_layers, 7))
    with pytest.raises(edits.WrongModelError, match=r"The direction is \(3, 7\)"):
        edits.apply(llama, Plan((HeadEdit(0, 0, "project_out", 1.0),), wide, "bad", about))


def test_scores_that_are_not_finite_rank_no_heads(llama):
    scores = HeadScores(torch.full((3, 4), math.nan), "by hand", "none", llama.provenance())
    with pytest.raises(ValueError, match="scores of 'by hand' hold NaN"):
        edits.plan(scores, direction_of(llama))


def altered(path: Path, change) -> Path:
    """A value file whose header was changed."""
    with safe_open(path, framework="pt") as file:
        header, tensors = dict(file.metadata()), {name: file.get_tensor(name) for name in file.keys()}  # noqa: SIM118
    body = json.loads(header["value"])
    change(body, tensors)
    save_file(tensors, path, metadata={**header, "value": json.dumps(body)})
    return path


VECTORS = {
    "NaN": lambda body, tensors: tensors["vector"].fill_(math.nan),
    "a field missing": lambda body, tensors: body["fields"].pop("kind"),
    "an unknown type": lambda body, tensors: body.update(type="Directoin"),
    "a list": lambda body, tensors: body.update(fields=[1]),
}
READS_A_VECTOR = {
    "steer": ("-p", "1+1=?"),
    "dose": ("-o", "out"),
    "export": ("--to", "gguf", "-o", "out"),
}
PROBLEMS = {
    "null": '{"question": "1+1=?", "answer": null}',
    "half a line": '{"question": "1+1=?", ',
    "list": '["1+1=?", "2"]',
    "no number": '{"question": "1+1=?", "answer": "two"}',
    "two numbers": '{"question": "3:4=?", "answer": "3/4"}',
    "a misplaced grader": '{"question": "1+1=?", "answer": "2", "grader": "contains"}',
    "unknown grader": '{"question": "1+1=?", "answer": "2", "meta": {"grader": "maths"}}',
    "half a grader": '{"question": "1+1=?", "answer": "2", "meta": {"grader": "countdown", "numbers": "12"}}',
    "UTF-16": '{"question": "1+1=?", "answer": "2"}'.encode("utf-16"),
}
READS_PROBLEMS = {
    "rollouts": ("-o", "out"),
    "compare": ("base=tiny-reasoner",),
    "thinkedit": ("-m", "tiny-reasoner", "-o", "out"),
    "demo": ("-o", "out"),
    "dose": ("-v", "v.safetensors", "-o", "out"),
    "grpo": ("-o", "out"),
    "entropy": ("-o", "out"),
    "heads": ("-o", "out"),
}


@pytest.fixture
def command(tmp_path, monkeypatch, capsys):
    """``command(*words)``: what the command line prints, which must be one line of an error, before any model is loaded."""
    monkeypatch.chdir(tmp_path)

    def refuse(*args, **kwargs):
        raise AssertionError("a model was loaded before the files were looked at")

    monkeypatch.setattr(lms, "load", refuse)

    def run(*words: str) -> str:
        monkeypatch.setattr(sys, "argv", ["toolkit", *words])
        with pytest.raises(SystemExit) as stopped:
            cli.main()
        said = capsys.readouterr().err
        assert stopped.value.code in (1, 2)
        assert "Traceback" not in said and said.count("\n") == 1 and len(said) <= 420, said
        return said

    return run


@pytest.mark.parametrize("case", VECTORS)
@pytest.mark.parametrize("name", READS_A_VECTOR)
def test_a_vector_that_is_damaged_is_one_line_before_a_model_is_loaded(llama, tmp_path, command, name, case):
    path = altered(store.save(direction_of(llama), tmp_path / "v.safetensors"), VECTORS[case])
    assert "v.safetensors" in command(name, "-v", str(path), *READS_A_VECTOR[name])


@pytest.mark.parametrize("case", PROBLEMS)
@pytest.mark.parametrize("name", READS_PROBLEMS)
def test_a_file_of_problems_that_is_wrong_is_one_line_before_a_model_is_loaded(llama, tmp_path, command, name, case):
    store.save(direction_of(llama), tmp_path / "v.safetensors")
    content = PROBLEMS[case]
    (tmp_path / "p.jsonl").write_bytes(content if isinstance(content, bytes) else content.encode())
    assert "p.jsonl" in command(name, *READS_PROBLEMS[name], "-t", "p.jsonl")


@pytest.mark.parametrize(
    ("words", "content"),
    [
        (("import", "bad", "--from", "gguf", "-o", "out"), b"GGUF" + bytes(20)),
        (("import", "bad", "--from", "safetensors", "-o", "out"), b"\xff" * 90),
        (("import", "bad", "--from", "thinkedit", "-o", "out"), b"PK" + bytes(90)),
        (("import", "bad", "--from", "hidden-directions", "-o", "out"), b"\x80\x02}q"),
        (("import", "bad", "--from", "svec", "-o", "out"), b'{"directions": '),
        (("direction", "-r", "bad", "-o", "out"), b"PAR1"),
        (("thinkedit", "-m", "tiny-reasoner", "--rollouts", "bad", "-o", "out"), b"PAR1"),
        (("heads", "--rollouts", "bad", "-o", "out"), b"PAR1"),
        (("board", "--conditions", "bad", "-o", "out"), b"CONDITIONS = ["),
        (("board", "--conditions", "bad", "-o", "out"), b"CONDITIONS = 3"),
        (("steer", "-v", ".", "-p", "x"), b""),
        (("rollouts", "-t", ".", "-o", "out"), b""),
    ],
    ids=lambda value: " ".join(value[:4]) if isinstance(value, tuple) else "",
)
def test_any_other_file_that_is_damaged_is_one_line_before_a_model_is_loaded(tmp_path, command, words, content):
    (tmp_path / "bad").write_bytes(content)
    said = command(*words)
    assert "bad" in said or " ." in said or "'.'" in said, said


@pytest.mark.parametrize("content", ['{"doses": [{"direction": "x"}]}', '{"doses": []}', "[1]", '{"doses": 3}'])
def test_doses_that_are_damaged_are_one_line_before_a_model_is_loaded(llama, tmp_path, command, content):
    path = store.save(direction_of(llama), tmp_path / "v.safetensors")
    (tmp_path / "doses.json").write_text(content)
    said = command("export", "-v", str(path), "--to", "folder", "-o", "hub", "--doses", str(tmp_path))
    assert "doses.json" in said and "toolkit dose" in said
    assert not (tmp_path / "hub").exists()


# --- names that are not there --------------------------------------------------------------------------------


def test_names_that_are_not_defined_fail_the_gates(tmp_path):
    """Both gates look for them in annotations too, where Python itself does not; the shapes of jaxtyping do not set them off."""
    settings = tomllib.loads((Path(__file__).parents[2] / "pyproject.toml").read_text())["tool"]
    assert "F821" not in settings["ruff"]["lint"]["ignore"] and "name-defined" not in settings["mypy"].get("disable_error_code", [])
    source = (
        "from __future__ import annotations\n\nfrom jaxtyping import Float\nfrom torch import Tensor\n\n\n"
        'def f(x: Float[Tensor, "layers d_model"], y: Float[Tensor, " rows"]) -> None: ...\n'
    )
    for text, wanted in ((source, 0), (source + "\n\ndef g(x: Missing) -> None: ...\n", 1)):
        (tmp_path / "x.py").write_text(text)
        config = Path(__file__).parents[2] / "pyproject.toml"
        found = subprocess.run(
            [sys.executable, "-m", "ruff", "check", "--no-cache", "--config", str(config), str(tmp_path / "x.py")],
            capture_output=True, text=True,
        )  # fmt: skip
        assert found.returncode == wanted and ("F821" in found.stdout) == bool(wanted), found.stdout
