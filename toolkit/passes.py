"""Teacher-forced passes over rollouts, in batches of similar length, that read activations at chosen positions of each rollout."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass
from functools import cached_property

import torch
from jaxtyping import Float, Int
from torch import Tensor
from torch.nn.utils.rnn import pad_sequence

from toolkit import hooks
from toolkit.decode import batches
from toolkit.lm import LM, NoThinkTagsError
from toolkit.memory import FittingSize
from toolkit.positions import By, Positions
from toolkit.progress import stage
from toolkit.sites import Z_OVER_NORM, Norm, Site
from toolkit.types import Rollout

BATCH_TOKENS, CPU_TOKENS = 8192, 1024  # largest number of padded tokens per batch, on a GPU and on a CPU


@dataclass(frozen=True)
class Example:
    """A rollout with its class and its chosen positions.

    Attributes:
        rollout: The rollout.
        label: Class of the rollout, such as "long".
        where: Indices of the chosen positions in the full sequence (prompt and response).
        at: Index of this example in the list that ``examples_of`` returned.
    """

    rollout: Rollout
    label: str
    where: Sequence[int]
    at: int


def examples_of(lm: LM, rollouts: Sequence[Rollout], by: By, positions: Positions) -> list[Example]:
    """Return one ``Example`` for each rollout that has a class and at least one chosen position.

    Args:
        lm: The model of the rollouts; used only in the error message.
        rollouts: The rollouts.
        by: Function from a rollout to its class, such as "long". It returns ``None`` to leave the rollout out.
        positions: Which positions to choose in each rollout (see the module ``positions``).

    Raises:
        NoThinkTagsError: no rollout has both a class and a position.
    """
    labelled = [(r, label, positions.of(r)) for r in rollouts if (label := by(r)) is not None]
    examples = [Example(*e, at) for at, e in enumerate(e for e in labelled if len(e[2]))]
    if not examples:
        raise NoThinkTagsError(
            f"None of the {len(rollouts)} rollouts of {lm.name} has both a class and positions {positions.name!r}. "
            "If the model has think tags, load it with tags=ThinkTags(...); --think 'response' takes the whole response as thinking. "
            "Or choose other classes."
        )
    return examples


def batch_tokens(lm: LM) -> int:
    """Return the largest number of padded tokens per teacher-forced batch on the device of ``lm``.

    It is smaller on a CPU than on a GPU. On a CPU, larger batches would be no faster, because their activations do not fit into its cache.
    """
    return min(BATCH_TOKENS, CPU_TOKENS) if lm.device.type == "cpu" else BATCH_TOKENS


def each_batch(lm: LM, examples: Sequence[Example], what: str, run: Callable[[Sequence[Example]], None]) -> None:
    """Call ``run`` on batches of examples of similar length, until all examples are done. If memory runs out, halve the batch.

    Args:
        lm: The model; its device limits the size of a batch (see ``batch_tokens``).
        examples: All examples, from ``examples_of``.
        what: Label of the progress bar.
        run: Function that processes a batch. If it runs out of memory, it is called again with each half of the batch. So it must store
            its results only at its end.
    """
    with stage(what, len(examples), "rollout", show=len(examples) >= 64) as bar:

        def counted(batch: Sequence[Example]) -> None:
            run(batch)
            bar.update(len(batch))

        ordered = sorted(examples, key=lambda e: len(e.rollout.token_ids))
        # Size: padded tokens. The last example is the longest.
        fitting = FittingSize(lambda batch: len(batch) * len(batch[-1].rollout.token_ids))
        for batch in batches(ordered, lambda e: len(e.rollout.token_ids), batch_tokens(lm), limit=lm.frequency_limit):
            fitting.run(batch, counted)


class Picker:
    """Reads activations at the chosen positions of a batch of examples.

    Its methods take the activations ``[batch, seq, width]`` of a site. ``means`` returns their mean for each example, ``rows`` one row per
    position, both in fp32. Results are on the device of their argument, which is not ``lm.device`` if the layers are on several devices.

    Attributes:
        ids: Right-padded token ids ``[batch, seq]``.
        weights: ``[batch, 1, seq]``. For an example with n chosen positions: 1 / n at each of them, 0 elsewhere.
    """

    def __init__(self, batch: Sequence[Example], lm: LM) -> None:
        self.batch = batch
        self.ids = pad_right([e.rollout.token_ids for e in batch], lm)
        weights = torch.zeros(len(batch), 1, self.ids.shape[1])
        for row, e in zip(weights, batch, strict=True):
            row[0, e.where if not isinstance(e.where, range) else slice(e.where.start, e.where.stop)] = 1 / len(e.where)
        self.weights = weights.to(lm.device)

    @cached_property
    def flat(self) -> Int[Tensor, " positions"]:
        """Indices of all chosen positions of the batch, into its flattened axes ``[batch * seq]``."""
        places = [b * self.ids.shape[1] + t for b, e in enumerate(self.batch) for t in e.where]
        return torch.tensor(places, device=self.ids.device)

    def means(self, value: Float[Tensor, "batch seq width"]) -> Float[Tensor, "batch width"]:
        """Return each example's mean activation over its chosen positions."""
        return torch.bmm(self.weights.to(value.device), value.float()).squeeze(1)

    def rows(self, value: Float[Tensor, "batch seq width"]) -> Float[Tensor, "positions width"]:
        """Return the activations at the chosen positions, one row per position, in the order of the examples."""
        return value.flatten(0, 1)[self.flat.to(value.device)].float()

    @cached_property
    def owner(self) -> Int[Tensor, " positions"]:
        """Index of the example to which each chosen position of the batch belongs."""
        return torch.tensor([b for b, e in enumerate(self.batch) for _ in e.where], device=self.ids.device)

    def weights_of(self, classes: Float[Tensor, "labels batch"]) -> Float[Tensor, "labels positions"]:
        """Return the weight of each chosen position in the sum of activations of each class, one row per class.

        In an example with n chosen positions, each of them has weight 1 / n in the example's class, and 0 in all other classes. So the sum
        of a class is the sum of the means of its examples.

        Args:
            classes: One row per class: 1 if the example belongs to the class, else 0.
        """
        weights = self.weights.flatten()[self.flat].to(classes.device)
        return classes[:, self.owner.to(classes.device)] * weights


@torch.inference_mode()
def forward(
    lm: LM, ids: Int[Tensor, "batch seq"], kinds: Sequence[str], take: Callable[[str, int, Tensor], None]
) -> Float[Tensor, "batch seq d_model"]:
    """Run one pass without the LM head, call ``take`` with activations, and return the last hidden states (after the final norm).

    Args:
        ids: Right-padded token ids.
        kinds: Site kinds to read, such as ``"resid_post"``, in all layers; ``Z_OVER_NORM`` is allowed too (see ``sites``).
        take: Function that is called as ``take(kind, layer, value)`` during the pass, once per site. ``value`` is ``[batch, seq, width]``.
    """
    layout = lm.layout

    def watch(site: Site) -> Callable[[Tensor], None]:
        return lambda value: take(site.kind, site.layer, value)

    def over_norm(layer: int, norm: Norm | None) -> hooks.Rewrite:
        # At attn_out both parts of Z_OVER_NORM are at hand: the site's input is z, and its value gives the divisor of the norm.
        def look(attn_out: Tensor, z: Tensor) -> None:
            take(Z_OVER_NORM, layer, z if norm is None else z.float() / norm.scale(attn_out))

        return hooks.reader(look)

    chosen = [Site(kind, layer) for kind in dict.fromkeys(kinds) if kind != Z_OVER_NORM for layer in layout.layers(kind)]
    watchers = {site: watch(site) for site in chosen}
    scaled = {Site("attn_out", i): over_norm(i, layout.norm(i)) for i in layout.attention_layers} if Z_OVER_NORM in kinds else {}
    with hooks.observe(lm.layout, watchers), hooks.rewrite(lm.layout, scaled):
        # Under a causal mask no real token attends to the right padding, so no attention mask is needed.
        return lm.body(input_ids=ids, use_cache=False).last_hidden_state


def pad_right(rows: Sequence[Sequence[int]], lm: LM) -> Int[Tensor, "batch seq"]:
    """Return token ids as one right-padded tensor on the model's device."""
    tensors = [torch.tensor(row) for row in rows]
    return pad_sequence(tensors, batch_first=True, padding_value=lm.tokenizer.pad_token_id or 0).to(lm.device)
