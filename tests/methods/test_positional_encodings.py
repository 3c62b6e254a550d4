"""Positional encodings against naive formulas and against transformers' own; what each can and cannot know about positions."""

from __future__ import annotations

import math

import pytest
import torch
from transformers.models.bloom.modeling_bloom import build_alibi_tensor
from transformers.models.llama.modeling_llama import apply_rotary_pos_emb
from transformers.models.t5.modeling_t5 import T5Attention

from toolkit.methods import positional_encodings as pe
from toolkit.methods.positional_encodings import ENCODINGS, Decoder


@pytest.fixture(autouse=True)
def _seeded():
    torch.manual_seed(0)


def decoder(encoding: str, layers: int = 2) -> Decoder:
    model = Decoder(encoding, 11, width=16, heads=2, layers=layers)
    if model.t5_bias is not None:
        torch.nn.init.normal_(model.t5_bias)  # they begin at 0, where no error would show
    return model.eval()


def test_the_absolute_encoding_is_the_formula_written_out():
    vectors = pe.sinusoid(torch.arange(30), 8)
    for i in range(30):
        for m in range(4):
            angle = i * 10000 ** (-2 * m / 8)
            assert vectors[i, 2 * m].item() == pytest.approx(math.sin(angle), abs=1e-5)
            assert vectors[i, 2 * m + 1].item() == pytest.approx(math.cos(angle), abs=1e-5)


def test_alibi_is_blooms_up_to_a_number_per_row_that_the_softmax_cancels():
    theirs = build_alibi_tensor(torch.ones(1, 7, dtype=torch.long), 4, torch.float32).view(4, 1, 7)
    hidden = torch.ones(7, 7).triu(1).bool()
    scores = torch.randn(4, 7, 7)
    rows = [(scores + bias).masked_fill(hidden, -math.inf).softmax(-1) for bias in (pe.alibi_bias(4, 7), theirs)]
    torch.testing.assert_close(*rows)


def test_alibi_refuses_a_number_of_heads_for_which_slopes_are_not_defined():
    with pytest.raises(ValueError, match="power of two"):
        pe.alibi_slopes(6)


@pytest.mark.parametrize(("buckets", "furthest"), [(32, 128), (8, 20)])
def test_buckets_are_those_of_transformers_t5(buckets, furthest):
    distance = torch.arange(300)
    theirs = T5Attention._relative_position_bucket(-distance, False, buckets, furthest)
    assert torch.equal(pe.t5_buckets(distance, buckets, furthest), theirs)


def test_rotation_is_that_of_transformers_llama():
    x, positions = torch.randn(2, 3, 9, 8), torch.arange(9) + 5
    theta = 10000.0 ** -(torch.arange(0, 8, 2) / 8)
    angles = torch.cat([positions[:, None] * theta] * 2, dim=-1)[None]
    theirs, _ = apply_rotary_pos_emb(x, x, angles.cos(), angles.sin())
    torch.testing.assert_close(pe.rotate(x, positions), theirs)


def test_rotated_products_depend_on_the_distance_only():
    q, k = torch.randn(8), torch.randn(8)
    positions = torch.arange(40)
    products = pe.rotate(q.expand(40, 8), positions) @ pe.rotate(k.expand(40, 8), positions).T
    for distance in (0, 1, 7, 20):
        diagonal = products.diagonal(-distance)
        torch.testing.assert_close(diagonal, diagonal[:1].expand_as(diagonal), atol=1e-4, rtol=1e-4)
    assert products[20, 0] != pytest.approx(products[0, 0].item(), abs=1e-3), "it does depend on that"


def first_attention(model: Decoder, ids: torch.Tensor) -> torch.Tensor:
    return model(ids).attention[0]


@pytest.mark.parametrize("encoding", ENCODINGS)
def test_attention_of_the_first_layer_is_shift_invariant_unless_positions_are_absolute(encoding):
    model, tail = decoder(encoding), torch.randint(11, (1, 6))
    with torch.inference_mode():
        alone = first_attention(model, tail)[..., -1, :]
        shifted = first_attention(model, torch.cat([torch.randint(11, (1, 5)), tail], 1))[..., -1, 5:]
    # The same query over the same keys, as shares of these keys.
    same = torch.allclose(alone, shifted / shifted.sum(-1, keepdim=True), atol=1e-5)
    assert same == (encoding != "absolute")


@pytest.mark.parametrize("encoding", ENCODINGS)
def test_only_without_encoding_one_layer_is_blind_to_the_order_of_what_came_before(encoding):
    model = decoder(encoding, layers=1)
    ids = torch.tensor([[1, 2, 3, 4, 5, 6, 7]])
    swapped = ids[:, [4, 0, 3, 1, 5, 2, 6]]
    with torch.inference_mode():
        moved = float((model(ids).logits[0, -1] - model(swapped).logits[0, -1]).abs().max())
    assert moved < 1e-5 if encoding == "none" else moved > 1e-4


def test_the_causal_mask_tells_two_layers_the_order_even_without_encoding():
    model = decoder("none", layers=2)
    ids = torch.tensor([[1, 2, 3, 4, 5, 6, 7]])
    with torch.inference_mode():
        assert float((model(ids).logits[0, -1] - model(ids[:, [4, 0, 3, 1, 5, 2, 6]]).logits[0, -1]).abs().max()) > 1e-4


@pytest.mark.parametrize("encoding", ENCODINGS)
def test_no_position_sees_a_later_one_and_padding_on_the_right_changes_nothing(encoding):
    model, ids = decoder(encoding), torch.randint(11, (3, 8))
    with torch.inference_mode():
        torch.testing.assert_close(model(ids).logits[:, :5], model(ids[:, :5]).logits)


@pytest.mark.parametrize("encoding", ENCODINGS)
def test_attention_of_the_decoder_is_the_formula_written_out(encoding):
    model, ids = decoder(encoding, layers=1), torch.randint(11, (1, 6))
    block = model.blocks[0]
    with torch.inference_mode():
        x = model.embedding(ids[0])
        if encoding == "absolute":
            x = x + pe.sinusoid(torch.arange(6), 16)
        q, k, _ = block.qkv(block.before_attention(x)).chunk(3, -1)
        weights = model(ids).attention[0][0]
        for h in range(2):
            for i in range(6):
                scores = []
                for j in range(i + 1):
                    a, b = q[i, 8 * h : 8 * h + 8], k[j, 8 * h : 8 * h + 8]
                    if encoding == "rope":
                        a, b = turned(a, i), turned(b, j)
                    bias = {"alibi": -(2.0 ** (-4 * (h + 1))) * (i - j)}.get(encoding, 0.0)
                    if encoding == "t5":
                        bias = model.t5_bias[h, i - j].item()  # short distances have a bucket each
                    scores.append(float(a @ b) / math.sqrt(8) + bias)
                torch.testing.assert_close(weights[h, i, : i + 1], torch.tensor(scores).softmax(0), atol=1e-5, rtol=1e-4)


def turned(x: torch.Tensor, position: int) -> torch.Tensor:
    """Rotate each pair as a complex number."""
    pairs = torch.complex(x[:4], x[4:])
    turned = torch.stack([z * torch.exp(torch.tensor(1j * position * 10000 ** (-2 * m / 8))) for m, z in enumerate(pairs)])
    return torch.cat([turned.real, turned.imag])


def test_decoders_of_one_seed_begin_equal_whatever_their_encoding():
    weights = []
    for encoding in ENCODINGS:
        torch.manual_seed(3)
        weights.append({name: p for name, p in Decoder(encoding, 11).named_parameters() if name != "t5_bias"})
    for other in weights[1:]:
        assert all(torch.equal(weights[0][name], p) for name, p in other.items()) and set(other) == set(weights[0])


def test_bad_arguments_are_refused():
    with pytest.raises(ValueError, match="Unknown encoding 'learned'"):
        Decoder("learned", 11)
    with pytest.raises(ValueError, match="width=18"):
        Decoder("rope", 11, width=18, heads=4)


def test_divergence_is_that_of_jensen_and_shannon_and_not_the_swapped_form():
    pair = torch.tensor([[[0.9, 0.1]]]), torch.tensor([[[0.5, 0.5]]])
    assert pe.attention_js(*pair).item() == pytest.approx(0.101749, abs=1e-6)  # the swapped form gives .117973


def test_divergence_is_averaged_over_rows_for_each_pair_of_heads_zeros_included():
    a, c = torch.rand(3, 4, 5).softmax(-1), torch.rand(2, 4, 5).tril().add(1e-9)
    c = c.where(c > 1e-8, torch.zeros_like(c)) / c.where(c > 1e-8, torch.zeros_like(c)).sum(-1, keepdim=True)
    got = pe.attention_js(a, c)
    for x in range(3):
        for y in range(2):
            rows = []
            for i in range(4):
                total = 0.0
                for p, q in zip(a[x, i].tolist(), c[y, i].tolist(), strict=True):
                    m = (p + q) / 2
                    total += 0.5 * sum(z * math.log(z / m) for z in (p, q) if z > 0)
                rows.append(total)
            assert got[x, y].item() == pytest.approx(sum(rows) / 4, abs=1e-6)
    assert torch.allclose(pe.attention_js(c, c).diagonal(), torch.zeros(2), atol=1e-7)


def test_attention_distance_is_zero_on_the_diagonal_and_known_for_uniform_attention():
    assert pe.attention_distance(torch.eye(6)).item() == 0
    uniform = torch.ones(7, 7).tril() / torch.arange(1, 8)[:, None]
    assert pe.attention_distance(uniform).item() == pytest.approx((7 - 1) / 4)
