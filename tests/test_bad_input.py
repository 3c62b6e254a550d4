"""What users get wrong, each tried: the error is named, holds the value, and says what to do. What is tested beside the thing
itself (plans of another model, damaged files, splits, classes too small) is not repeated here."""

from __future__ import annotations

import copy
import json
import math
from dataclasses import replace

import pytest
import torch
from families import COMMON, tokenizer
from safetensors.torch import load_file, save_file
from transformers import AutoModelForCausalLM, LlamaConfig

from toolkit import collect
from toolkit import lm as lms
from toolkit.generate import Sampling, rollouts
from toolkit.lm import LM, NoThinkTagsError
from toolkit.methods import thinkedit
from toolkit.sites import UnsupportedModelError
from toolkit.types import Problem


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
    with pytest.raises(UnsupportedModelError, match=rf"weight {DOWN} holds NaN or infinity; the checkpoint is damaged"):
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
    with pytest.raises(UnsupportedModelError, match=rf"{which[:6]}.* overflow float16, use bfloat16 or float32") as caught:
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
    with pytest.raises(UnsupportedModelError, match=r"no response would end. Set eos_token_id"):
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
        UnsupportedModelError, match="mine: the tokenizer has 103 tokens, the model embeds 50: they do not belong together"
    ):
        lms.wrap(small, tokenizer(), name="mine")


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
    with pytest.raises(ValueError, match=r"trust_remote_code|mine"):
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
