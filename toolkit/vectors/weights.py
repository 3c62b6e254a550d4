"""Turn interventions into weights: head edits into a PEFT adapter, a steering direction into the biases of a model."""

from __future__ import annotations

import copy
import json
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

import torch
from jaxtyping import Float
from torch import Tensor, nn
from torch.func import functional_call

from toolkit import adapters, checkpoints, edits, origins, store
from toolkit import lm as lms
from toolkit.lm import LM
from toolkit.tensors import is_conv1d
from toolkit.types import Direction, Plan
from toolkit.vectors.files import ExportError


@torch.no_grad()
def save_adapter(lm: LM, planned: Plan, directory: str | Path) -> Path:
    """Save a plan of head edits as a PEFT adapter (LoRA of rank 1), and return its directory.

    Every edit must be a ``project_out``, which removes a direction from a head's output. The model with the adapter computes the same as
    ``edits.apply(lm, planned)``. The adapter adds ``B A`` to ``W_O`` of each edited layer::

        B = -v                                      [d_model, 1]
        A = sum_h strength_h (v^T W_O) mask_h       [1, n_heads * head_dim]

    v is the plan's unit direction at the layer (``edits.unit_at``), a column vector. ``strength_h`` is the strength of the edit of head h.
    Two edits of the same head, of strengths s and t, count as one of strength ``1 - (1 - s) (1 - t)``. ``mask_h`` is 1 at the columns of
    head h in ``W_O`` and 0 elsewhere. It multiplies the row vector ``v^T W_O`` elementwise.

    PEFT can scale an adapter. If the plan edits each head once, a scale c multiplies every strength by c.

    PEFT can also combine several adapters: it adds their changes of ``W_O``. If two adapters edit the same head along directions that are
    not orthogonal, this differs from applying one plan after the other.

    Args:
        lm: The model from which the plan was made.
        planned: The plan.
        directory: The directory to write.

    Raises:
        ExportError: the plan has no edits, or one of them is a ``scale``. (Its change of ``W_O`` has rank head_dim, not 1.)
        WrongModelError: the plan was made from other weights than those of ``lm``.
        FileExistsError: the directory is not empty.
        OSError: the directory cannot be written.
    """
    changes = low_rank(lm, planned)
    names = {id(module): name for name, module in lm.model.named_modules()}
    blocks = lm.layout.blocks
    tensors, config = adapters.as_lora(
        {names[id(blocks[layer].out)]: change for layer, change in changes.items()},
        base=lm.name,
        revision=lm.revision,
        transposed=is_conv1d(blocks[lm.layout.attention_layers[0]].out),
    )
    header = {"format": "pt", "plan": planned.name, "edits": json.dumps(planned.edits, default=store.jsonable)}
    with store.atomic_directory(directory) as partial:
        store.write_tensors(tensors, {**header, "fingerprint": lm.fingerprint}, partial / "adapter_model.safetensors")
        store.write_json(config, partial / "adapter_config.json")
        if made_from := origins.distinct((*lm.made_from, *edits.plan_origins(planned))):
            store.write_json(made_from, partial / checkpoints.MADE_FROM)
    return Path(directory)


@torch.no_grad()
def low_rank(lm: LM, planned: Plan) -> dict[int, tuple[Float[Tensor, "1 width"], Float[Tensor, "d_model 1"]]]:
    """Return the change that a plan of head edits makes to ``W_O``, as a product ``B A`` of rank 1 per edited layer.

    Rank 1 is enough for any number of heads of a layer, since all are edited along the same direction. ``save_adapter`` has the formulas.

    Args:
        lm: The model from which the plan was made.
        planned: The plan. Every edit must be a ``project_out``.

    Returns:
        Layer -> ``(A, B)`` in fp32, lowest layer first.

    Raises:
        ExportError: the plan has no edits, or one of them is a ``scale``. (Its change of ``W_O`` has rank head_dim, not 1.)
        WrongModelError: the plan was made from other weights than those of ``lm``.
    """
    edits.check_plan(lm, planned)
    # Layer -> per head, the factor that remains of the component along v. Two edits of the same head multiply: (1 - s1) (1 - s2).
    kept: dict[int, Tensor] = {}
    for edit in planned.edits:
        if edit.op != "project_out":
            raise ExportError(
                f"Head {edit.layer}.{edit.head} is edited by {edit.op!r}, whose change has rank {lm.layout.head_dims[edit.layer]}: it does not fit into an "
                "adapter of rank 1. Write the whole model instead: edits.apply(lm, plan).save(directory)."
            )
        kept.setdefault(edit.layer, torch.ones(lm.layout.heads[edit.layer], dtype=torch.float64))[edit.head] *= 1 - edit.strength
    if not kept:
        raise ExportError(f"The plan {planned.name!r} edits no head, so its adapter would be empty.")
    changes = {}
    for layer in sorted(kept):
        W = lm.layout.W_O(layer).float()
        v = edits.unit_at(lm.layout, planned, layer, W.device)
        assert v is not None  # a plan that projects out has a direction
        # The strength at each column of W_O; 0 at heads without an edit.
        removed = (1 - kept[layer]).repeat_interleave(lm.layout.head_dims[layer]).to(W)
        changes[layer] = ((removed * (v @ W))[None], -v[:, None])
    return changes


@torch.no_grad()
def bake(lm: LM, direction: Direction, strength: float, *, layers: Sequence[int] | None = None) -> LM:
    """Return a copy of a model that is steered without hooks: changed biases add ``strength * direction`` to the activations.

    The copy behaves like ``lm`` under ``edits.steering(direction, strength, layers=layers)``, which acts at all positions. A direction at
    ``resid_mid`` or ``attn_out`` is added to the bias of attention's output projection. One at ``resid_post`` or ``mlp_out`` is added to
    the bias of the MLP's last projection. All other weights are shared with ``lm``.

    A model without such biases cannot be steered in this way. No bias is created: the model's config would not declare it, so it would be
    lost when the checkpoint is loaded.

    Args:
        lm: The model to steer; it is not changed.
        direction: The direction; adding it lengthens thinking.
        strength: Factor on the direction; negative to shorten thinking.
        layers: Layers to steer at; ``None`` means all.

    Raises:
        ExportError: one of the layers has no such bias, or a norm lies between the bias and the residual stream.
        UnsupportedModelError: the weights are quantised or offloaded.
        WrongModelError: the direction was made from other weights than those of ``lm``, or its shape does not fit ``lm``.
        ValueError: the direction or strength is not finite.
        IndexError: ``layers`` holds a layer that the direction does not have.
    """
    act = edits.steering(direction, strength, layers=layers)
    edits.check_direction(direction, lm)
    lms.check_plain(lm, "writing a direction into the biases", "Steer at run time (edits.steering).")
    chosen = range(lm.layout.n_layers) if act.layers is None else sorted(set(act.layers))
    made_from = (origins.record_in(direction.provenance.notes),)
    biases = {id(_bias(lm, layer, direction.kind)) for layer in chosen}
    shared = [p for p in (*lm.model.parameters(), *lm.model.buffers()) if id(p) not in biases]
    changed = lms.child(lm, copy.deepcopy(lm.model, {id(p): p for p in shared}), f"{lm.name} + {act}", made_from=made_from)
    for layer in chosen:
        bias = _bias(changed, layer, direction.kind)
        # In some families the outputs of attention and MLP, bias included, are multiplied by a factor before they are added to the residual
        # stream. Divide by it, so that the stream shifts by strength * direction.
        factor = lm.layout.factor if direction.kind.startswith("resid") else 1.0
        bias.copy_(bias.float() + strength / factor * direction.vector[layer].to(bias.device, torch.float32))
    return changed


def _bias(lm: LM, layer: int, kind: str) -> Tensor:
    """Return the bias parameter whose change shifts the activation at one site of a layer.

    Args:
        lm: The model.
        layer: The layer.
        kind: Kind of the site, such as ``"resid_post"``.

    Raises:
        ExportError: there is no such bias, or a norm between it and the site would change the shift.
    """
    block = lm.layout.blocks[layer]
    norm = {"resid_mid": block.post_attention_norm, "resid_post": block.post_mlp_norm}.get(kind)
    bias = None
    if kind in ("attn_out", "resid_mid"):
        bias = lm.layout.b_O(layer)
    elif kind in ("mlp_out", "resid_post"):
        bias = _last_bias(block.mlp, lm.layout.d_model)
    if bias is None or norm is not None:
        why = "has no bias there" if norm is None else "normalises the output to which the bias is added"
        raise ExportError(
            f"{lm.name} ({lm.layout.row.family}) {why}, so {kind} of layer {layer} cannot be steered by its weights. Steer at run time "
            "(edits.steering), or write a control vector for llama.cpp (vectors.save_gguf)."
        )
    return bias


def _last_bias(mlp: nn.Module, d_model: int) -> Tensor | None:
    """Return the bias parameter that is added unchanged to the output of an MLP, or ``None`` if there is none.

    Its name differs between model families, so it is found by a test. The test adds a number to one bias of size ``d_model`` and compares
    the outputs. If all of them shift by exactly this number, that bias is the result; otherwise the next one is tested. The bias of an
    expert in a mixture of experts fails the test, because the router multiplies it by a weight.
    """

    def out(biases: Mapping[str, Tensor]) -> Tensor:
        output = functional_call(mlp, dict(biases), (x,))
        return output[0] if isinstance(output, tuple) else output

    for name, module in reversed(list(mlp.named_modules())):
        bias: Any = getattr(module, "bias", None)
        if bias is None or bias.shape != (d_model,):
            continue
        # Shift by the size of the largest output, so that rounding of the difference stays small against the shift.
        x = torch.randn(1, 8, d_model, generator=torch.Generator().manual_seed(0)).to(bias)
        before = out({})
        shift = before.abs().max()
        moved = out({f"{name}.bias": bias + shift}) - before
        if ((moved - shift).abs() <= 8 * torch.finfo(bias.dtype).eps * shift).all():
            return bias
    return None
