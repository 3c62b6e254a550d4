"""Rotary frequencies that depend on the longest row (longrope, dynamic): no response depends on them, whatever shares its batch."""

from __future__ import annotations

import pytest
import torch
from transformers import Phi3Config, Phi3ForCausalLM

from toolkit import attention, collect, entropies, generate
from toolkit import lm as lms
from toolkit.decode import batches
from toolkit.generate import Sampling
from toolkit.lm import LM, UnsupportedModelError
from toolkit.methods import giraffe
from toolkit.positions import Positions
from toolkit.types import Problem, Rollout, Span

LIMIT, GROWN = 48, [1.5, 2.0, 3.0, 5.0, 8.0, 12.0, 16.0, 24.0]


@pytest.fixture(scope="module")
def long(tiny) -> LM:
    """A small Phi-3 whose frequencies change beyond 48 tokens, as those of Phi-3.5-mini do beyond 4,096."""
    torch.manual_seed(0)
    rope = {"rope_type": "longrope", "rope_theta": 1e4, "short_factor": [1.0] * 8, "long_factor": GROWN}
    config = Phi3Config(
        vocab_size=tiny.vocab_size, hidden_size=64, intermediate_size=128, num_hidden_layers=2, num_attention_heads=4,
        num_key_value_heads=2, max_position_embeddings=512, original_max_position_embeddings=LIMIT, pad_token_id=0, bos_token_id=0,
        eos_token_id=tiny.vocab_size - 1, initializer_range=0.25, rope_parameters=rope | {"original_max_position_embeddings": LIMIT},
    )  # fmt: skip
    return lms.wrap(Phi3ForCausalLM(config).eval(), tiny.tokenizer, name="small phi")


def prompt_of(lm: LM, tokens: int) -> tuple[Problem, list[int]]:
    ids = torch.randint(5, lm.vocab_size - 1, (tokens,), generator=torch.Generator().manual_seed(tokens))
    return Problem(f"of {tokens}", ({"role": "user", "content": "x"},), "1"), ids.tolist()


def continued(lm: LM, *lengths: int, tokens: int) -> dict[int, Rollout]:
    sampling = Sampling(temperature=0.0, max_new_tokens=tokens)
    return dict(zip(lengths, generate.continuations(lm, [prompt_of(lm, n) for n in lengths], sampling), strict=True))


def test_only_frequencies_that_depend_on_the_length_have_a_limit(long, tiny):
    assert long.frequency_limit == LIMIT and tiny.frequency_limit is None
    assert giraffe.with_frequencies(tiny, giraffe.power(giraffe.trained(tiny)[0], 0.5)).frequency_limit is None


def test_a_response_that_would_grow_beyond_the_limit_is_refused_before_any_pass(long):
    def fail(module, args):
        raise AssertionError("the model was run")

    handle = long.model.register_forward_pre_hook(fail)
    with pytest.raises(UnsupportedModelError, match=r"beyond 48 tokens.*from 40 to 49 tokens.*at most 48 tokens"):
        continued(long, 12, 40, tokens=9)
    handle.remove()


@pytest.mark.parametrize("length", [12, 60])
def test_a_row_does_not_depend_on_rows_on_the_other_side_of_the_limit(length, long):
    """The model's own generate takes the same tokens."""
    tokens, (_, ids) = 30, prompt_of(long, length)
    expected = long.model.generate(torch.tensor([ids]), max_new_tokens=tokens, do_sample=False, pad_token_id=0)[0].tolist()
    together = continued(long, 12, 16, 60, 70, tokens=tokens)
    assert list(together[length].token_ids) == expected == list(continued(long, length, tokens=tokens)[length].token_ids)


def test_activations_and_entropies_do_not_depend_on_rows_on_the_other_side_of_the_limit(long):
    short, longer = continued(long, 12, 60, tokens=30).values()
    everywhere = Positions("all", lambda r: range(len(r.token_ids)))
    both, *alone = (
        collect.states(long, rs, "resid_post", positions=everywhere).values for rs in ([short, longer], [short], [longer])
    )
    assert torch.allclose(both, torch.cat(alone), atol=1e-5)
    scored = entropies.with_entropies(long, [short, longer], progress=False)
    for r, one in zip((short, longer), scored, strict=True):
        logp = collect.logits(long, r).log_softmax(-1)
        assert one.entropies == pytest.approx((-(logp.exp() * logp).sum(-1)).tolist(), abs=1e-4)


def test_passes_that_cross_the_limit_in_a_cache_are_refused(long):
    (r,) = continued(long, 60, tokens=4).values()
    crossing = generate.rollout_from_tokens(long, *prompt_of(long, 20), list(r.token_ids[:40]))
    for run in (
        lambda: entropies.with_entropies(long, [crossing], progress=False),
        lambda: collect.logits(long, crossing),
        lambda: attention.rows(long, list(r.token_ids), Span(50, 60)),
    ):
        with pytest.raises(UnsupportedModelError, match="beyond 48 tokens"):
            run()


def test_batches_are_cut_at_the_limit_only():
    assert batches([2, 2, 3, 9], lambda n: n, tokens=99, limit=2) == [[2, 2], [3, 9]]
    assert batches([3, 9], lambda n: n, tokens=99, limit=2) == batches([3, 9], lambda n: n, tokens=99, limit=9) == [[3, 9]]
