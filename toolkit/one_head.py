"""One attention head on one text: the vectors that it adds to the residual stream, the tokens that these favour, and its attention."""

from __future__ import annotations

from collections.abc import Sequence

import torch
from jaxtyping import Float
from torch import Tensor

from toolkit import attention
from toolkit.lm import LM
from toolkit.passes import forward, pad_right
from toolkit.sites import Layout
from toolkit.types import Span


def contribution(lm: LM, ids: Sequence[int], layer: int, head: int) -> Float[Tensor, "seq d_model"]:
    """Return the vector that one attention head adds to the residual stream at each position of a text, fp32, on the CPU.

    The vector at position p is added when token p + 1 is predicted. It is ``W_h z_h``, with the head's columns ``W_h`` of ``W_O`` and its
    output ``z_h``, after a norm that follows ``W_O`` and times the factor of ``Layout.to_end``. The biases of ``W_O`` and of the norm
    belong to no head and are left out.

    Args:
        lm: The model.
        ids: Token ids of the text; the model reads them in one pass.
        layer: Index of the layer.
        head: Index of the query head in the layer.

    Raises:
        IndexError: there is no such head.
    """
    columns, kind = lm.layout.head(layer, head), lm.layout.contribution_kind
    kept: list[Tensor] = []

    def take(kind: str, at: int, value: Tensor) -> None:
        if at == layer:
            kept.append(value[0, :, columns].float())

    forward(lm, pad_right([ids], lm), (kind,), take)
    return in_stream(lm.layout, layer, kept[0] @ lm.layout.W_O(layer).detach()[:, columns].float().mT).cpu()


def in_stream(layout: Layout, layer: int, part: Float[Tensor, "... d_model"]) -> Float[Tensor, "... d_model"]:
    """Return what a part of ``attn_out``, divided by the scale of a norm that follows it, adds to the residual stream.

    It is the transpose of ``Layout.to_attn_out``: ``<v, in_stream(part)> = <to_attn_out(v), part>`` for every direction v of the stream.

    Args:
        layout: Layout of the model.
        layer: Index of the layer.
        part: The part of ``attn_out`` that a head writes; divided by the scale if the model has a norm there (see ``Norm.scale``).
    """
    norm, factor = layout.norm(layer), layout.to_end(layer)
    return factor * (part if norm is None else norm.gain.to(part) * norm.centre(part))


@torch.inference_mode()
def token_effects(lm: LM, vector: Float[Tensor, " d_model"], count: int = 8) -> tuple[list[tuple[str, float]], ...]:
    """Return the tokens whose logits a vector in the residual stream raises most, and those that it lowers most, with the changes.

    The change of a token's logit is the dot product of the vector and the token's unembedding minus the mean unembedding. The final norm is
    left out, as in the metric ``write`` of ``methods.retrieval_heads``. So compare the changes of one vector with one another only.

    Args:
        lm: The model.
        vector: The vector, such as the mean of a head's ``contribution``.
        count: Number of tokens in each of the two lists.

    Returns:
        Two lists of pairs ``(text of the token, change)``: the largest changes first, then the smallest first.
    """
    W_U: Tensor = lm.model.get_output_embeddings().weight
    # <w - mean of all w, vector> is the logit minus the mean logit. Only tokens that the tokenizer has; the matrix may have more rows.
    logits = (W_U @ vector.to(W_U)).float()
    change = (logits - logits.mean())[: len(lm.tokenizer)]

    def best(sign: int) -> list[tuple[str, float]]:
        top = (sign * change).topk(min(count, len(change))).indices.tolist()
        return [(lm.token_text(token), float(change[token])) for token in top]

    return best(1), best(-1)


def attention_rows(lm: LM, ids: Sequence[int], span: Span, layer: int, head: int) -> Float[Tensor, "queries keys"]:
    """Return the attention probabilities of one head for some queries, on the CPU. Its memory does not grow with the number of heads.

    Args:
        lm: The model.
        ids: Token ids of one text.
        span: Positions of the queries. The keys are all positions before ``span.stop``.
        layer: Index of the layer.
        head: Index of the query head in the layer.

    Raises:
        IndexError: there is no such head.
    """
    lm.layout.head(layer, head)  # raises IndexError
    weights = torch.zeros(len(span), span.stop)

    def take(part: attention.Rows) -> None:
        if part.layer == layer:
            at = (part.queries[0] - span.start).cpu()
            weights[at, : part.weights.shape[-1]] = part.weights[0, head].cpu()

    attention.read(lm, [ids], [span], take)
    return weights
