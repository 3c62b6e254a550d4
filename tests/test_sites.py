"""Sites, hooks and qualify: one table of places, right in every family, for reading and for writing.

Where a test needs a model's true inner values it takes them with raw torch hooks on modules named here by hand, or
computes them from the weights; nothing of ``toolkit.hooks`` is used on that side.
"""

from __future__ import annotations

import copy
from contextlib import ExitStack, contextmanager
from dataclasses import replace

import pytest
import torch
from families import COMMON, CONFIGS, FAMILIES, tokenizer
from torch import Tensor, nn
from transformers import AutoModelForCausalLM, PreTrainedModel
from transformers.models.gemma3.modeling_gemma3 import Gemma3RMSNorm
from transformers.models.olmo2.modeling_olmo2 import Olmo2RMSNorm

from toolkit import hooks, sites
from toolkit import lm as lms
from toolkit.lm import LM
from toolkit.sites import KINDS, Row, Site, UnsupportedModelError

PRE_NORM = ("llama", "mistral", "qwen2", "qwen3", "phi3")
POST_NORM = ("gemma2", "gemma3", "olmo2")
DTYPES = (torch.float32, torch.bfloat16, torch.float16)


@torch.no_grad()
def run(lm: LM, ids: Tensor) -> Tensor:
    return lm.model(input_ids=ids, attention_mask=torch.ones_like(ids)).logits


def recorded(lm: LM, ids: Tensor, kinds=KINDS) -> dict[Site, Tensor]:
    wanted = [Site(kind, layer) for kind in kinds for layer in range(lm.layout.n_layers)]
    with hooks.record(lm.layout, wanted) as values:
        run(lm, ids)
    return values


def hook_counts(model: nn.Module) -> int:
    return sum(len(m._forward_hooks) + len(m._forward_pre_hooks) for m in model.modules())


# --- the truth, by hand --------------------------------------------------------------------------------------


def true_blocks(lm: LM) -> list[nn.Module]:
    inner = lm.model.base_model
    for name in ("layers", "h"):
        if hasattr(inner, name):
            return list(getattr(inner, name))
    raise AssertionError(f"{type(inner)} keeps its blocks elsewhere")


# family -> (attention, its output projection, the module whose output is added to the residual stream, the MLP)
BY_HAND = {
    **dict.fromkeys(("llama", "mistral", "qwen2", "qwen3", "phi3"), ("self_attn", "self_attn.o_proj", "self_attn", "mlp")),
    **dict.fromkeys(POST_NORM, ("self_attn", "self_attn.o_proj", "post_attention_layernorm", "mlp")),
    "gpt2": ("attn", "attn.c_proj", "attn", "mlp"),
    **dict.fromkeys(("gpt_neox", "gpt_neox_sequential"), ("attention", "attention.dense", "attention", "mlp")),
}


@contextmanager
def raw_hooks(lm: LM, family: str):
    """Inputs and outputs of a family's modules, by raw torch hooks: ``{(what, layer): tensor}``."""
    seen: dict[tuple[str, int], Tensor] = {}

    def out(key):
        def hook(module, args, output):
            seen[key] = (output[0] if isinstance(output, tuple) else output).clone()

        return hook

    def into(key):
        def hook(module, args, kwargs):
            seen[key] = (args[0] if args else kwargs["hidden_states"]).clone()

        return hook

    _, proj, adds, mlp = BY_HAND[family]
    with ExitStack() as stack:
        for layer, block in enumerate(true_blocks(lm)):
            for handle in (
                block.register_forward_pre_hook(into(("block in", layer)), with_kwargs=True),
                block.register_forward_hook(out(("block out", layer))),
                block.get_submodule(proj).register_forward_pre_hook(into(("z", layer)), with_kwargs=True),
                block.get_submodule(proj).register_forward_hook(out(("attn_out", layer))),
                block.get_submodule(adds).register_forward_hook(out(("added", layer))),
                block.get_submodule(mlp).register_forward_hook(out(("mlp_out", layer))),
            ):
                stack.callback(handle.remove)
        yield seen


# --- reading -------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("family", FAMILIES)
def test_every_site_is_the_tensor_that_its_name_says(family, model_of, ids):
    lm = model_of(family)
    with raw_hooks(lm, family) as truth:
        run(lm, ids)
    values = recorded(lm, ids)
    for layer in range(lm.layout.n_layers):
        true = {kind: truth[kind, layer] for kind in ("z", "attn_out", "mlp_out")}
        true["resid_pre"], true["resid_post"] = truth["block in", layer], truth["block out", layer]
        true["resid_mid"] = truth["block in", layer] + truth["added", layer]
        for kind in KINDS:
            assert torch.equal(values[Site(kind, layer)], true[kind]), (kind, layer)


@pytest.mark.parametrize("family", [f for f in FAMILIES if f != "gpt_neox"])
def test_resid_mid_is_what_the_norm_before_the_mlp_reads(family, model_of, ids):
    """In sequential blocks the MLP's side of the block begins by reading resid_mid: the best proof of its place."""
    lm = model_of(family)
    # The module that reads the residual stream inside the block; OLMo 2 has no norm there, the MLP itself reads.
    reader = {
        "gpt2": "ln_2",
        "gpt_neox_sequential": "post_attention_layernorm",
        "olmo2": "mlp",
        "gemma2": "pre_feedforward_layernorm",
        "gemma3": "pre_feedforward_layernorm",
    }.get(family, "post_attention_layernorm")
    seen = []
    handles = [
        block.get_submodule(reader).register_forward_pre_hook(lambda m, args: seen.append(args[0].clone()))
        for block in true_blocks(lm)
    ]
    values = recorded(lm, ids, ("resid_mid",))
    for handle in handles:
        handle.remove()
    assert len(seen) == lm.layout.n_layers
    for layer, value in enumerate(seen):
        assert torch.equal(values[Site("resid_mid", layer)], value), layer


def test_resid_post_is_the_next_layers_resid_pre(lm, ids):
    values = recorded(lm, ids)
    for layer in range(lm.layout.n_layers - 1):
        assert torch.equal(values[Site("resid_post", layer)], values[Site("resid_pre", layer + 1)])


def test_the_last_resid_post_is_before_the_final_norm(lm, ids):
    """Norm and unembedding by hand turn it into the logits; the norm is not the identity on it."""
    value = recorded(lm, ids, ("resid_post",))[Site("resid_post", lm.layout.n_layers - 1)]
    inner = lm.model.base_model
    norm = next(getattr(inner, n) for n in ("norm", "ln_f", "final_layer_norm") if hasattr(inner, n))
    with torch.no_grad():
        logits = lm.model.get_output_embeddings()(norm(value))
        cap = getattr(lm.model.config, "final_logit_softcapping", None)
        if cap:
            logits = torch.tanh(logits / cap) * cap
        assert torch.equal(logits, run(lm, ids))
        assert not torch.allclose(norm(value), value, atol=0.1)


def test_record_keeps_a_copy_that_later_passes_do_not_change(llama, ids):
    site = Site("resid_post", 0)
    with hooks.record(llama.layout, [site]) as values:
        run(llama, ids)
        first = values[site]
        kept = first.clone()
        run(llama, ids.flip(1))
        assert not torch.equal(values[site], kept)
        assert torch.equal(first, kept)


def test_record_keeps_the_value_of_the_moment_whoever_changes_it_in_place_later(llama, ids):
    """A user's own hook that runs after ours and doubles the MLP's output in place."""
    site, mlp = Site("mlp_out", 1), llama.layout.blocks[1].mlp
    expected = recorded(llama, ids, ("mlp_out",))[site]
    with hooks.record(llama.layout, [site]) as values:
        handle = mlp.register_forward_hook(lambda module, args, output: output.mul_(2))
        try:
            run(llama, ids)
        finally:
            handle.remove()
    assert torch.equal(values[site], expected)


# --- writing -------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("kind", KINDS)
@pytest.mark.parametrize("dtype", DTYPES, ids=lambda d: str(d).split(".")[1])
def test_a_recorded_value_written_back_is_a_bitwise_no_op(lm_name, dtype, kind, model_of, ids):
    lm = model_of(lm_name, dtype)
    base = run(lm, ids)
    values = recorded(lm, ids, (kind,))
    for layer in range(lm.layout.n_layers):
        site, wrote = Site(kind, layer), []

        def write(value, inputs, site=site, wrote=wrote):
            wrote.append(True)
            return values[site].clone()

        with hooks.rewrite(lm.layout, {site: write}):
            assert torch.equal(run(lm, ids), base), layer
        assert wrote == [True]


@pytest.fixture(params=FAMILIES)
def lm_name(request) -> str:
    return request.param


@pytest.mark.parametrize("kind", KINDS)
def test_a_foreign_value_written_is_what_everything_after_sees(lm_name, kind, model_of, ids):
    """Patch one site with its value on another input; read the nearest later site with raw hooks, by hand."""
    lm, layer = model_of(lm_name), 1
    other = recorded(lm, ids.flip(1), (kind,))[Site(kind, layer)]
    with hooks.rewrite(lm.layout, {Site(kind, layer): lambda value, inputs: other}), raw_hooks(lm, lm_name) as seen:
        run(lm, ids)
    _, proj, _, _ = BY_HAND[lm_name]
    block = true_blocks(lm)[layer]
    match kind:
        case "z":
            with torch.no_grad():
                assert torch.equal(seen["attn_out", layer], block.get_submodule(proj)(other))
        case "resid_mid":
            assert torch.allclose(seen["block in", layer] + seen["added", layer], other, atol=2e-5, rtol=1e-5)
        case "resid_pre":
            assert torch.equal(seen["block in", layer], other)
        case "resid_post":
            assert torch.equal(seen["block in", layer + 1], other)
        case "attn_out" | "mlp_out":
            assert not torch.equal(seen["block out", layer], recorded(lm, ids, ("resid_post",))[Site("resid_post", layer)])
            assert torch.equal(seen[kind, layer], other)


def test_a_rewrite_of_resid_pre_is_seen_by_resid_mid_whatever_the_order_given(lm, ids):
    shift = torch.linspace(-1, 1, lm.layout.d_model)
    seen = {}

    def add(value, inputs):
        return value + shift

    def look(name):
        def fn(value, inputs):
            seen[name] = value.clone()
            return value

        return fn

    pre, mid = Site("resid_pre", 1), Site("resid_mid", 1)
    with hooks.record(lm.layout, [Site("attn_out", 1)]), hooks.rewrite(lm.layout, {mid: look("a"), pre: add}):
        run(lm, ids)
    with hooks.rewrite(lm.layout, {pre: add, mid: look("b")}):
        run(lm, ids)
    with hooks.rewrite(lm.layout, {mid: look("none")}):
        run(lm, ids)
    assert torch.equal(seen["a"], seen["b"])
    assert not torch.allclose(seen["a"], seen["none"], atol=1e-3)


def test_the_second_argument_at_attn_out_is_z(lm, ids):
    z = recorded(lm, ids, ("z",))[Site("z", 0)]
    seen = []
    with hooks.rewrite(lm.layout, {Site("attn_out", 0): lambda value, inputs: (seen.append(inputs.clone()), value)[1]}):
        run(lm, ids)
    assert torch.equal(seen[0], z)


# --- nothing leaks -------------------------------------------------------------------------------------------


def test_no_hook_survives_the_body_raising(lm, ids):
    before, base = hook_counts(lm.model), run(lm, ids)
    every = {Site(kind, layer): lambda value, inputs: value * 2 for kind in KINDS for layer in range(lm.layout.n_layers)}
    with pytest.raises(KeyError, match="mine"), hooks.rewrite(lm.layout, every):
        assert hook_counts(lm.model) > before
        raise KeyError("mine")
    assert hook_counts(lm.model) == before
    assert torch.equal(run(lm, ids), base)


def test_no_hook_survives_a_rewrite_function_raising_mid_pass(lm, ids):
    before, base = hook_counts(lm.model), run(lm, ids)

    def fail(value, inputs):
        raise RuntimeError("inside the pass")

    with pytest.raises(RuntimeError, match="inside the pass"), hooks.rewrite(lm.layout, {Site("resid_mid", 1): fail}):
        run(lm, ids)
    assert hook_counts(lm.model) == before
    assert torch.equal(run(lm, ids), base)


@pytest.mark.parametrize("kind", KINDS)
def test_no_hook_survives_entry_raising(lm, kind, monkeypatch):
    """The last of several registrations fails: the earlier ones must be taken back."""
    before = hook_counts(lm.model)
    block = lm.layout.blocks[-1]
    last = {"resid_pre": block.block, "z": block.out, "attn_out": block.out, "resid_mid": block.adds_attention}
    last |= {"mlp_out": block.mlp, "resid_post": block.block}

    def refuse(*args, **kwargs):
        raise RuntimeError("no more hooks")

    name = "register_forward_pre_hook" if kind in ("resid_pre", "z") else "register_forward_hook"
    monkeypatch.setattr(last[kind], name, refuse)
    with (
        pytest.raises(RuntimeError, match="no more hooks"),
        hooks.record(lm.layout, [Site(kind, layer) for layer in range(lm.layout.n_layers)]),
    ):
        pytest.fail("entered")
    monkeypatch.undo()
    assert hook_counts(lm.model) == before


def test_a_layer_that_does_not_exist_is_refused_before_any_hook(llama):
    before = hook_counts(llama.model)
    wanted = [Site("z", 0), Site("z", 3)]
    with pytest.raises(IndexError, match=r"layer=3.*layers 0\.\.2"), hooks.record(llama.layout, wanted):
        pytest.fail("entered")
    with pytest.raises(IndexError, match="layer=-1"), hooks.record(llama.layout, [Site("z", -1)]):
        pytest.fail("entered")
    assert hook_counts(llama.model) == before


def test_a_users_own_hooks_stay_and_keep_working(lm, ids):
    calls = []
    block = true_blocks(lm)[0]
    mine = [
        block.register_forward_hook(lambda *_: calls.append("out")),
        block.register_forward_pre_hook(lambda *_: calls.append("in")),
    ]
    try:
        with hooks.record(lm.layout, [Site(kind, 0) for kind in KINDS]):
            run(lm, ids)
            late = block.register_forward_hook(lambda *_: calls.append("late"))
        calls.clear()
        run(lm, ids)
        assert sorted(calls) == ["in", "late", "out"]
    finally:
        for handle in (*mine, late):
            handle.remove()


def test_nested_contexts_of_one_site_act_outer_first_and_leave_separately(llama, ids):
    site, base = Site("mlp_out", 1), run(llama, ids)
    double, halve = (lambda value, inputs: value * 2), (lambda value, inputs: value / 2)
    with hooks.rewrite(llama.layout, {site: double}):
        once = run(llama, ids)
        with hooks.rewrite(llama.layout, {site: halve}):
            assert torch.equal(run(llama, ids), base)
        assert torch.equal(run(llama, ids), once)
    assert torch.equal(run(llama, ids), base)


# --- head geometry -------------------------------------------------------------------------------------------


def test_head_contributions_and_bias_sum_to_attn_out(any_lm, ids):
    layout, values = any_lm.layout, recorded(any_lm, ids, ("z", "attn_out"))
    for layer in range(layout.n_layers):
        z, W, b = values[Site("z", layer)].double(), layout.W_O(layer).double(), layout.b_O(layer)
        total = torch.zeros_like(values[Site("attn_out", layer)]).double()
        for h in range(layout.n_heads):
            for j in range(h * layout.head_dim, (h + 1) * layout.head_dim):
                total += z[..., j, None] * W[:, j]
        if b is not None:
            total += b.double()
        assert (total - values[Site("attn_out", layer)]).abs().max() <= 1e-5 * total.abs().max()


def test_a_slice_of_z_is_one_head(lm_name, model_of, ids):
    """Attention weights times values by hand, head by head: head h of z is head h of the model, also under GQA."""
    lm = model_of(lm_name)
    config = copy.deepcopy(lm.model.config)
    model = AutoModelForCausalLM.from_config(config, attn_implementation="eager", dtype=torch.float32).eval()
    model.load_state_dict(lm.model.state_dict())
    eager = lms.wrap(model, tokenizer(), name="eager")
    z = recorded(eager, ids, ("z",))[Site("z", 1)]
    pre = recorded(eager, ids, ("resid_pre",))[Site("resid_pre", 1)]
    with torch.no_grad():
        rows = model(input_ids=ids, output_attentions=True).attentions[1]
        values = _values(model, lm_name, pre)
    groups = eager.layout.n_heads // values.shape[2]
    for h in range(eager.layout.n_heads):
        expected = rows[:, h] @ values[:, :, h // groups]
        assert torch.allclose(z[..., eager.layout.head(0, h)], expected, atol=1e-4, rtol=1e-4), h


def _values(model, family: str, pre: Tensor) -> Tensor:
    """Value vectors ``[batch, seq, kv heads, head_dim]`` of block 1, from the weights."""
    inner, config = model.base_model, model.config
    block = inner.h[1] if family == "gpt2" else inner.layers[1]
    dim = getattr(config, "head_dim", None) or config.hidden_size // config.num_attention_heads
    if family == "gpt2":
        return block.attn.c_attn(block.ln_1(pre)).split(config.n_embd, dim=-1)[2].unflatten(-1, (-1, dim))
    if family.startswith("gpt_neox"):
        qkv = block.attention.query_key_value(block.input_layernorm(pre))
        return qkv.unflatten(-1, (config.num_attention_heads, 3 * dim))[..., 2 * dim :]
    reads = pre if family == "olmo2" else block.input_layernorm(pre)
    if family == "phi3":
        return block.self_attn.qkv_proj(reads)[..., -2 * dim :].unflatten(-1, (2, dim))
    return block.self_attn.v_proj(reads).unflatten(-1, (-1, dim))


@pytest.mark.parametrize("family", ["qwen3", "gemma2", "gemma3"])
def test_explicit_head_dim_is_used_and_not_hidden_over_heads(family, model_of):
    layout = model_of(family).layout
    assert layout.head_dim == 12 != layout.d_model // layout.n_heads
    assert layout.width("z") == 48 and layout.width("attn_out") == 32
    assert layout.head(0, 3) == slice(36, 48)


def test_the_tiny_reasoner_has_explicit_head_dim_and_gqa(tiny):
    layout, config = tiny.layout, tiny.model.config
    assert layout.n_heads * layout.head_dim != layout.d_model
    assert config.num_key_value_heads < config.num_attention_heads == layout.n_heads


def test_conv1d_weights_are_turned_so_that_columns_are_heads(model_of, ids):
    lm = model_of("gpt2")
    out = lm.layout.blocks[0].out
    assert torch.equal(lm.layout.W_O(0), out.weight.T)
    values = recorded(lm, ids, ("z", "attn_out"))
    z, attn_out = values[Site("z", 0)], values[Site("attn_out", 0)]
    # W_O is square here, so its shape would not betray the wrong orientation; its action does.
    assert torch.allclose(z @ lm.layout.W_O(0).T + out.bias, attn_out, atol=1e-5)
    assert not torch.allclose(z @ lm.layout.W_O(0) + out.bias, attn_out, atol=1e-2)


def test_W_O_is_a_view_of_the_models_weight(lm):
    assert lm.layout.W_O(0).data_ptr() == lm.layout.blocks[0].out.weight.data_ptr()
    assert lm.layout.W_O(0).shape == (lm.layout.d_model, lm.layout.n_heads * lm.layout.head_dim)


def test_a_head_that_does_not_exist_is_refused(llama):
    with pytest.raises(IndexError, match=r"Head 0\.4 .* heads 0\.\.3"):
        llama.layout.head(0, 4)
    with pytest.raises(IndexError, match=r"Head 0\.-1"):
        llama.layout.head(0, -1)


def test_a_site_of_an_unknown_kind_is_refused():
    with pytest.raises(ValueError, match=r"'hidden'.*resid_pre, z, attn_out, resid_mid, mlp_out, resid_post"):
        Site("hidden", 0)


@pytest.mark.parametrize("family", FAMILIES)
def test_to_attn_out_carries_a_direction_through_the_post_norm(family, model_of, ids):
    """<v, what attention adds> and <to_attn_out(v), attn_out> are the same up to one positive factor a position."""
    lm = model_of(family)
    v = torch.randn(lm.layout.d_model, generator=torch.Generator().manual_seed(2))
    with raw_hooks(lm, family) as seen:
        run(lm, ids)
    for layer in range(lm.layout.n_layers):
        added, attn_out = seen["added", layer], seen["attn_out", layer]
        carried = lm.layout.to_attn_out(layer, v).detach()
        left, right = added @ v, attn_out @ carried
        if family in POST_NORM:
            eps = getattr(lm.layout.blocks[layer].post_attention_norm, "variance_epsilon", 1e-6)
            right = right / (attn_out.pow(2).mean(-1) + eps).sqrt()
            assert not torch.allclose(carried, v)
        assert torch.allclose(left, right, atol=1e-4, rtol=1e-4)


NORMS = {
    "LayerNorm": lambda width: torch.nn.LayerNorm(width, eps=1e-3),
    "LayerNorm without a shift": lambda width: torch.nn.LayerNorm(width, bias=False),
    "RMSNorm": lambda width: torch.nn.RMSNorm(width, eps=1e-2),
    "Olmo2RMSNorm": Olmo2RMSNorm,
    "Gemma3RMSNorm": Gemma3RMSNorm,
}


@pytest.mark.parametrize("dtype", DTYPES, ids=lambda d: str(d).split(".")[1])
@pytest.mark.parametrize("width", [32, 33])
@pytest.mark.parametrize("name", NORMS)
@torch.no_grad()
def test_a_norm_is_read_off_its_behaviour(name, width, dtype):
    """<v, norm(x)> is <back(v), x> / scale(x), and what a shift adds: with a mean subtracted or not, large input or small."""
    generator = torch.Generator().manual_seed(0)
    module = NORMS[name](width)
    for parameter in module.parameters():
        parameter.add_(torch.randn(width, generator=generator))
    module.to(dtype)
    norm = sites.read_norm(module, torch.zeros(width, 8, dtype=dtype))
    v = torch.randn(width, generator=generator)
    for size in (1e-2, 1.0, 30.0):
        x = (size * (torch.randn(50, width, generator=generator) + 1)).to(dtype)
        expected = (module(x).float() - module(torch.zeros_like(x)).float()) @ v
        found = (x.float() / norm.scale(x)) @ norm.back(v)
        assert (found - expected).abs().max() <= (1e-5 if dtype == torch.float32 else 3e-2) * expected.abs().max(), size
    assert norm.centred == ("LayerNorm" in name)


def test_a_layer_after_attention_that_is_no_norm_is_refused():
    class DyT(torch.nn.Module):
        def forward(self, x):
            return torch.tanh(x)

    with pytest.raises(UnsupportedModelError, match="DyT follows attention's output projection and is neither"):
        sites.read_norm(DyT(), torch.zeros(32, 8))


# --- qualify -------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("dtype", DTYPES, ids=lambda d: str(d).split(".")[1])
def test_qualify_passes(lm_name, dtype, model_of):
    checks = lms.qualify(model_of(lm_name, dtype))
    assert checks and all(check.passed for check in checks)
    names = " ".join(check.name for check in checks)
    assert all(kind in names for kind in KINDS)


def test_qualify_passes_on_the_tiny_reasoner(tiny):
    assert all(check.passed for check in lms.qualify(tiny))


LLAMA_ROW = Row("sabotaged", attention="self_attn", out="o_proj", mlp="mlp")
SABOTAGED = {
    "the output projection is another projection": ("llama", replace(LLAMA_ROW, out="q_proj")),
    "a post-norm model read as pre-norm": ("gemma2", LLAMA_ROW),
    "a post-norm model read as pre-norm (OLMo 2)": ("olmo2", LLAMA_ROW),
    "the norm after the MLP taken for the one after attention": (
        "gemma3",
        replace(LLAMA_ROW, post_attention_norm="post_feedforward_layernorm", post_mlp_norm="post_attention_layernorm"),
    ),
    "the norm before the MLP taken for a post-norm": (
        "llama",
        replace(LLAMA_ROW, post_attention_norm="post_attention_layernorm", post_mlp_norm="input_layernorm"),
    ),
    "the MLP is a norm": ("llama", replace(LLAMA_ROW, mlp="post_attention_layernorm")),
    "attention and MLP swapped": ("llama", Row("sabotaged", attention="mlp", out="down_proj", mlp="self_attn")),
}


@pytest.mark.parametrize("what", SABOTAGED)
def test_a_sabotaged_layout_row_is_refused(what, model_of, monkeypatch):
    family, row = SABOTAGED[what]
    lm = model_of(family)
    monkeypatch.setattr(sites, "ROWS", (row,))
    with pytest.raises(UnsupportedModelError):
        lms.qualify(replace(lm, layout=sites.find(lm.model)))


def _tiny(name: str, **more) -> LM:
    from transformers import CONFIG_MAPPING

    return lms.wrap(_random(CONFIG_MAPPING[name](**{**COMMON, **more})), tokenizer(), name=f"tiny {name}")


def test_a_family_that_attends_twice_a_layer_is_refused():
    """DiffLlama passes every check of its sites, and is sampled wrongly where attention is replaced."""
    lm = _tiny("diffllama")
    with pytest.raises(UnsupportedModelError, match="attends once, through transformers' interface"):
        lms.qualify(lm)


def test_attention_that_is_not_made_of_its_rows_is_refused(model_of):
    """Something is added to what the heads read, past the interface that masks and rows stand in."""
    lm = model_of("llama")
    model, given = copy.deepcopy(lm.model), []
    for block in model.model.layers:
        block.register_forward_pre_hook(lambda module, args: given.append(args[0]))
        block.self_attn.o_proj.register_forward_pre_hook(lambda module, args: (args[0] + 0.1 * given[-1],))
    with pytest.raises(UnsupportedModelError, match="heads depend on nothing else"):
        lms.qualify(replace(lm, model=model, layout=sites.find(model)))


@pytest.mark.parametrize("dtype", DTYPES, ids=str)
def test_a_model_that_reads_its_padding_is_refused(dtype, model_of):
    lm = model_of("llama", dtype)
    model = copy.deepcopy(lm.model)
    own = model.forward
    model.forward = lambda *args, attention_mask=None, **kwargs: own(*args, **kwargs)
    with pytest.raises(UnsupportedModelError, match="cached, padded, batched steps equal one pass"):
        lms.qualify(replace(lm, model=model, layout=sites.find(model)))


@pytest.mark.parametrize("dtype", DTYPES, ids=str)
def test_a_model_that_forgets_its_cache_is_refused(dtype, model_of):
    lm = model_of("llama", dtype)
    model = copy.deepcopy(lm.model)
    own = model.forward

    def forward(*args, past_key_values=None, attention_mask=None, **kwargs):
        return own(*args, **kwargs)

    model.forward = forward
    with pytest.raises(UnsupportedModelError, match="cached, padded, batched steps equal one pass"):
        lms.qualify(replace(lm, model=model, layout=sites.find(model)))


def _random(config) -> nn.Module:
    torch.manual_seed(0)
    model = AutoModelForCausalLM.from_config(config, dtype=torch.float32)
    with torch.no_grad():
        for value in model.parameters():
            value.add_(torch.randn(value.shape) * 0.2)
    return model


def test_qualify_names_the_site_and_the_row(model_of, monkeypatch):
    """A site whose write is not a no-op is named with its deviation."""
    lm = model_of("llama")
    attach = hooks._attach

    def wrong(layout, site, fn):
        skewed = (lambda value, inputs: fn(value, inputs) * 1.001) if site.kind == "mlp_out" else fn
        return attach(layout, site, skewed)

    monkeypatch.setattr(hooks, "_attach", wrong)
    with pytest.raises(UnsupportedModelError, match=r"mlp_out: written back is a no-op \(deviation .*ROWS|sites\.py"):
        lms.qualify(lm)


def test_qualify_refuses_heads_that_do_not_sum_to_attn_out(model_of):
    """The same weights with a layout that cuts W_O into too few heads."""
    lm = model_of("qwen3")
    wrong = replace(lm.layout, heads=tuple(n - 1 for n in lm.layout.heads))
    with pytest.raises(UnsupportedModelError, match="heads \\+ bias sum to it"):
        lms.qualify(replace(lm, layout=wrong))


def test_a_model_without_a_row_is_an_error_that_says_what_was_looked_for():
    from transformers import BloomConfig

    model = AutoModelForCausalLM.from_config(BloomConfig(vocab_size=103, hidden_size=32, n_layer=2, n_head=4))
    with pytest.raises(UnsupportedModelError) as caught:
        sites.find(model)
    message = str(caught.value)
    for part in (
        "BloomForCausalLM",
        "2 blocks",
        "self_attention",
        "ROWS",
    ):
        assert part in message, part


def test_a_config_that_contradicts_W_O_is_an_error_with_both_numbers():
    torch.manual_seed(0)
    model = AutoModelForCausalLM.from_config(copy.deepcopy(CONFIGS["llama"]))
    model.config.num_attention_heads = 5
    with pytest.raises(UnsupportedModelError, match=r"W_O of layer 0 takes 32 inputs, which 5 heads"):
        sites.find(model)


def test_the_layout_is_found_by_structure_not_by_class_name(model_of):
    """The same modules under a class and a path nobody has heard of."""
    lm = model_of("qwen3")

    class Unheard(PreTrainedModel):
        _supports_sdpa = True

        def __init__(self, model):
            super().__init__(model.config)
            self.wrapped = nn.ModuleDict({"anything": model})

    found = sites.find(Unheard(lm.model))
    assert found.blocks[0].block is true_blocks(lm)[0]
    assert (found.n_heads, found.head_dim, found.d_model) == (4, 12, 32)


def test_fp32_on_a_gpu_is_refused_while_tf32_is_on(llama, monkeypatch):
    from toolkit import qualify

    assert not qualify.tf32()
    before = torch.backends.cuda.matmul.fp32_precision
    try:
        for switch, on in (("high", True), ("highest", False)):
            torch.set_float32_matmul_precision(switch)
            assert qualify.tf32() == on
        torch.set_float32_matmul_precision("high")
        lms.qualify(llama)  # on a CPU it makes no difference
        monkeypatch.setattr(type(llama.model), "device", torch.device("cuda"))
        with pytest.raises(UnsupportedModelError, match=r"TF32 is on.*set_float32_matmul_precision\('highest'\)"):
            lms.qualify(llama)
    finally:
        torch.set_float32_matmul_precision("highest")
        torch.backends.cuda.matmul.fp32_precision = before
