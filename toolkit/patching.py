"""Activation patching of attention heads: the outputs of some heads are replaced by those of the same heads in another model, the *donor*.

The donor reads the same tokens beside the model, with a KV cache of its own, while tokens are read or sampled. With z_h the output of head h
before ``W_O``, and W_h its columns of ``W_O``, at every position::

    attn_out <- attn_out + sum over the patched heads h of (W_h^donor z_h^donor - W_h z_h)

So a change of a head's weights is patched, and also a change of its inputs. Later layers respond to the patch: the effect of a patch is the
total effect of the head's change, not only its direct path to the logits. A bias of ``W_O`` belongs to no head and is not patched. Neither
is an intervention at ``attn_out`` itself, such as ``edits.RuntimeEdit``: use ``edits.apply``.

Cost: every forward pass runs the donor too.
"""

from __future__ import annotations

from collections import defaultdict
from collections.abc import Iterator, Sequence
from contextlib import AbstractContextManager, ExitStack, contextmanager, nullcontext
from dataclasses import dataclass, replace
from typing import Any

import torch
from jaxtyping import Float
from torch import Tensor
from transformers import Cache, DynamicCache
from transformers.cache_utils import DynamicLayer

from toolkit import edits, hooks, identity
from toolkit.decode import select_rows
from toolkit.lm import LM, Condition
from toolkit.sites import Layout, Site
from toolkit.store import WrongModelError
from toolkit.types import Plan

Heads = tuple[tuple[int, int], ...]
"""Heads as pairs ``(layer, head)``."""


class DonorCache(DynamicLayer):
    """Additional layer of a model's KV cache that holds the donor's whole KV cache.

    Because it is a layer of the cache, rows are reordered, dropped or repeated, and tokens cropped, in both caches alike.

    Args:
        owner: The patch that the donor belongs to: several patches may act at once.
        cache: The donor's KV cache.
    """

    def __init__(self, owner: object, cache: Cache) -> None:
        super().__init__()
        self.owner, self.cache = owner, cache

    def get_seq_length(self) -> int:
        return int(self.cache.get_seq_length())

    def batch_select_indices(self, indices: Tensor) -> None:
        for layer in self.cache.layers:
            select_rows(layer, indices)

    def reorder_cache(self, beam_idx: torch.LongTensor) -> None:
        self.cache.reorder_cache(beam_idx)

    def batch_repeat_interleave(self, repeats: int) -> None:
        self.cache.batch_repeat_interleave(repeats)

    def crop(self, tokens_to_remove: int) -> None:
        self.cache.crop(tokens_to_remove)


@dataclass(frozen=True)
class HeadPatch:
    """Intervention that replaces the outputs of some heads by a donor's, made by ``patch``. Use it in ``Condition(lm, (patch(...),))``.

    Attributes:
        donor: Model whose head outputs are put in, with its interventions.
        heads: The heads, as pairs ``(layer, head)``.
    """

    donor: Condition
    heads: Heads

    def __str__(self) -> str:
        acts = "".join(f", {text}" for text in identity.describe_interventions(self.donor))
        return f"heads {list(self.heads)} from {self.donor.lm.fingerprint}{acts}"

    def only(self, *heads: tuple[int, int]) -> HeadPatch:
        """Return a patch of other heads from the same donor. It is faster than a new patch, since the donor is not prepared again."""
        return replace(self, heads=_checked(self.donor.lm.layout, heads))

    def __call__(self, lm: LM) -> AbstractContextManager[None]:
        """Return a context manager in which the heads of ``lm`` are patched.

        Raises:
            WrongModelError: model and donor differ in their width, or in the number or size of their heads.
        """
        check_shapes(lm, self.donor.lm)
        return self._acting(lm) if self.heads else nullcontext()

    @contextmanager
    def _acting(self, lm: LM) -> Iterator[None]:
        by_layer: dict[int, list[int]] = defaultdict(list)
        for layer, head in self.heads:
            by_layer[layer].append(head)
        beside = _Beside(self.donor.lm)
        with ExitStack() as stack:
            stack.enter_context(self.donor.active())
            outputs = stack.enter_context(hooks.record(self.donor.lm.layout, [Site("z", layer) for layer in by_layer]))
            stack.enter_context(hooks.before_passes(lm.body, beside.run))
            stack.enter_context(hooks.around_passes(lm.body, lambda ids, cache: None, beside.keep))
            rewrites = {
                Site("attn_out", layer): self._rewrite(lm.layout, layer, heads, outputs) for layer, heads in by_layer.items()
            }
            stack.enter_context(hooks.rewrite(lm.layout, rewrites))
            yield

    def _rewrite(self, layout: Layout, layer: int, heads: Sequence[int], outputs: dict[Site, Tensor]) -> hooks.Rewrite:
        columns = torch.cat([torch.arange(s.start, s.stop) for s in (layout.head(layer, head) for head in heads)])
        donor, own = (which.W_O(layer).detach()[:, columns].float() for which in (self.donor.lm.layout, layout))

        def fn(attn_out: Tensor, z: Float[Tensor, "batch seq z"]) -> Tensor:
            theirs = outputs[Site("z", layer)]
            change = theirs[..., columns].float() @ donor.T - z[..., columns].float() @ own.T
            return (attn_out.float() + change).to(attn_out.dtype)

        return fn


class _Beside:
    """Runs a donor before every forward pass of a model, on the same tokens; its KV cache is kept in that of the model.

    Args:
        lm: The donor.
    """

    def __init__(self, lm: LM) -> None:
        self.lm = lm
        self.new: DynamicCache | None = None

    def run(self, args: tuple, kwargs: dict[str, Any]) -> None:
        """Run the donor with the arguments of the model's pass."""
        cache, given = kwargs.get("past_key_values"), {**kwargs, "past_key_values": None, "use_cache": False}
        if cache is not None:
            held = next((x.cache for x in cache.layers if isinstance(x, DonorCache) and x.owner is self), None)
            if held is None and cache.get_seq_length():
                raise hooks.UnknownPastError("This KV cache was begun outside the patch: run the prompt inside the same context.")
            self.new = DynamicCache(config=self.lm.model.config) if held is None else None
            given |= {"past_key_values": self.new if held is None else held, "use_cache": True}
        with torch.no_grad():
            self.lm.body(*args, **given)

    def keep(self, ids: Tensor, cache: Cache | None) -> None:
        """Keep a donor's new KV cache in that of the model, after the model's pass."""
        if self.new is not None and cache is not None:
            cache.layers.append(DonorCache(self, self.new))
            self.new = None


def patch(donor: LM | Condition, heads: Sequence[tuple[int, int]]) -> HeadPatch:
    """Return an intervention that replaces the outputs of some heads by a donor's. Example: ``Condition(edited, (patch(base, [(2, 3)]),))``.

    The donor's modules are copied; the copies share the donor's weights. So the donor may be the same model without its steering. Make the
    patch outside ``with condition.active()``, or the copies keep the interventions that are active.

    Args:
        donor: Model or condition whose head outputs are put in. Its interventions act in it alone.
        heads: The heads, as pairs ``(layer, head)``.

    Raises:
        IndexError: the donor has no such head.
        ValueError: a head is given twice.
        UnsupportedModelError: the donor's weights are quantised or offloaded.
    """
    condition = donor if isinstance(donor, Condition) else Condition(donor)
    chosen = _checked(condition.lm.layout, heads)
    lm = condition.lm
    own_modules = edits.apply(lm, Plan((), None, "unchanged", lm.provenance()))
    return HeadPatch(replace(condition, lm=replace(own_modules, name=lm.name)), chosen)


def patched(target: LM | Condition, act: HeadPatch, note: str = "") -> Condition:
    """Return a condition: ``target`` with one more intervention, a patch from ``patch``. Its other interventions stay.

    Args:
        target: Model or condition into which head outputs are put.
        act: The patch.
        note: Description of the condition in reports.
    """
    condition = target if isinstance(target, Condition) else Condition(target)
    return replace(condition, during=(*condition.during, act), note=note)


def _checked(layout: Layout, heads: Sequence[tuple[int, int]]) -> Heads:
    """Return heads as pairs of whole numbers. Raise IndexError if there is no such head, ValueError if one is given twice."""
    chosen = tuple((int(layer), int(head)) for layer, head in heads)
    if len(set(chosen)) < len(chosen):
        raise ValueError(f"heads={list(chosen)}: a head is given twice; give every head once.")
    for layer, head in chosen:
        layout.head(layer, head)
    return chosen


def check_shapes(lm: LM, donor: LM) -> None:
    """Raise WrongModelError if two models differ in their width, or in the number or size of their heads."""
    shapes = [(layout.d_model, layout.heads, layout.head_dims) for layout in (lm.layout, donor.layout)]
    if shapes[0] != shapes[1]:
        texts = [f"width {width}, heads per layer {list(heads)} of sizes {list(sizes)}" for width, heads, sizes in shapes]
        raise WrongModelError(
            f"{lm.name} has {texts[0]}; the donor {donor.name} has {texts[1]}: patch between models of one architecture."
        )
