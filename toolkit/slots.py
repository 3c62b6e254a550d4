"""Batched decoding in tensors that keep their size from step to step.

This has two advantages. A decoding step can be captured once and then replayed, on a GPU as a CUDA graph: such a capture is called a
*recording* (see ``recording``). And a new response can begin while others are decoded.

A *row* is one response with its prompt. A *slot* is the place of one row in the batch and in the KV cache. The cache of a slot has
``width`` *columns*, one per token. Rows may have different lengths: each begins at column 0, without padding on the left, and the columns
beyond its last token are masked.

One step (``Slots.step``) appends a token to every row. It changes these tensors in place: tokens, positions, KV cache, and the phase
(prompt, think, answer) of each row. Interventions can act inside a step if their attribute ``recordable`` is True.

``decode.Batch`` decodes rows that begin together, with a cache that grows. It works for every model and every intervention. Slots work for
the conditions for which ``obstacle`` returns ``None``. The logits of both are equal up to rounding.

Cost: attention reads all ``width`` columns of every slot, even if its row is short. With ``grows=True``, ``width`` is a multiple of
``WIDTH_STEP`` that grows with the longest row.

Not tested on a GPU.
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import torch
from jaxtyping import Float, Int
from torch import Tensor, nn
from transformers import DynamicCache
from transformers.cache_utils import DynamicLayer

from toolkit import hooks, phases, tensors
from toolkit.decode import prefill
from toolkit.lm import LM, Condition
from toolkit.recording import Recorder, Repeated
from toolkit.tensors import upload

WIDTH_STEP = 256  # the width of the cache is a multiple of this number of tokens; each new width is recorded anew
CHANGING_FREQUENCIES = ("dynamic", "longrope")  # rotary embeddings whose frequencies depend on the longest row of the batch


def obstacle(condition: Condition) -> str | None:
    """Return the reason why a condition cannot be decoded in slots, as text, or ``None`` if it can.

    Call it outside ``with condition.active()``: inside, the hooks of the condition's own interventions would count as a reason.
    """
    lm = condition.lm
    if unknown := [i for i in condition.during if not getattr(i, "recordable", False)]:
        return f"an intervention may act otherwise at every step: {str(unknown[0])[:80]}"
    if condition.during and not phases.single_tokens(lm):
        return "a think tag is not a single token, so phases are searched in the text of the response"
    if any(_foreign_hooks(m) for m in lm.model.modules()):
        return "hooks are registered on modules of the model"
    if hooks.attention_name(lm.layout) != "sdpa" or not any(m is lm.layout.attention for m in lm.model.modules()):
        return f"its attention is {hooks.attention_name(lm.layout)}, not sdpa"
    if (how := tensors.storage(lm.model)) or len({p.device for p in lm.model.parameters()}) > 1:
        return f"its weights are {how or 'on several devices'}"
    if torch.is_autocast_enabled(lm.device.type):
        return "autocast is on"
    layers = DynamicCache(config=lm.model.config).layers
    if len(layers) != lm.layout.n_layers or any(type(layer) is not DynamicLayer for layer in layers) or not lm.caches_keys:
        return "not every layer attends to all earlier tokens through a cache of keys and values"
    kinds = {str(kind) for m in lm.model.modules() if (kind := getattr(m, "rope_type", None)) is not None}
    if any(name in kind for kind in kinds for name in CHANGING_FREQUENCIES):
        return "the frequencies of its rotary embedding depend on the longest row"
    return None


def _foreign_hooks(module: nn.Module) -> bool:
    """Return True if a module has hooks that are not from transformers. (Those of transformers do nothing during decoding.)"""
    registered = (*module._forward_hooks.values(), *module._forward_pre_hooks.values())
    return any(not str(getattr(hook, "__module__", "")).startswith("transformers.") for hook in registered)


class Slots:
    """Slots in which rows are decoded. ``join`` puts rows into slots, ``step`` appends one token to every row, ``leave`` empties slots.

    Args:
        lm: The model.
        rows: Number of slots.
        width: Number of columns (tokens of a row, prompt included) at the start. With ``grows=True`` it is rounded up to a multiple of
            ``WIDTH_STEP``.
        grows: True to add columns when a row needs them. False never adds columns: no row may become longer than ``width``.
        record: Recorder that captures a step (see ``recording.Recorder``), from ``recording.recorder_for``. ``None`` runs every step
            without a recording.

    Attributes:
        lengths: Number of tokens in each slot, prompt included; 0 in an empty slot.
    """

    def __init__(self, lm: LM, rows: int, width: int, *, grows: bool = True, record: Recorder | None = None) -> None:
        self.lm, self.width, self.grows, self.record = lm, _rounded(width) if grows else width, grows, record
        self.lengths = [0] * rows
        # Inputs of a step, ``[rows, 1]``: the token to append, its position in the row, and 1 in slots that hold a row.
        self.tokens, self.positions, self.held = (torch.zeros(rows, 1, dtype=torch.long, device=lm.device) for _ in range(3))
        self.cache = DynamicCache(config=lm.model.config)
        self.layers: list[_Layer] = []
        self.row_phases: phases.RowPhases | None = None
        self.repeated: Repeated
        self._begin_again()

    @property
    def empty(self) -> list[int]:
        """Slots that hold no row."""
        return [slot for slot, length in enumerate(self.lengths) if not length]

    @property
    def spacious(self) -> bool:
        """True if at most half of the columns are needed by the longest row and its next token."""
        return 2 * _rounded(max(self.lengths) + 1) <= self.width

    def join(self, slots: Sequence[int], prompts: Sequence[list[int]]) -> Float[Tensor, "new vocab"]:
        """Prefill prompts, and put each of them into an empty slot. Return the logits that predict the first token after each prompt.

        The prompts are prefilled in a batch without the rows of other slots. Interventions act in this prefill. Equal prompts are computed
        once.

        Args:
            slots: Index of an empty slot for each prompt.
            prompts: Token ids of each prompt.
        """
        cache, logits, mask = prefill(self.lm, prompts)
        history = phases.history_of(cache)
        if not self.layers:
            self._allocate(cache, history is not None)
        self._make_space(max(map(len, prompts)))
        index, lengths = upload(torch.tensor([list(slots), [len(p) for p in prompts]]), logits.device)
        # The prompts are padded on the left: shift each to column 0. Beyond its end, its last token is repeated; no row attends to it.
        width = mask.shape[1]
        columns = torch.arange(width, device=logits.device) + (width - lengths)[:, None]
        columns = columns.clamp(max=width - 1)[:, None, :, None]
        sources: list[Any] = cache.layers
        for layer, source in zip(self.layers, sources, strict=False):
            layer.begin(index, source, columns)
        self.positions[index], self.held[index] = lengths[:, None], torch.ones_like(lengths)[:, None]
        if self.row_phases is not None and history is not None:
            self.row_phases.begin(index, history)
        for slot, prompt in zip(slots, prompts, strict=True):
            self.lengths[slot] = len(prompt)
        return logits

    def step(self, tokens: Int[Tensor, " rows"]) -> Float[Tensor, "rows vocab"]:
        """Append one token to the row in each slot, and return the logits that predict the token after it.

        The next step may overwrite the returned tensor. Logits of an empty slot have no meaning.

        Args:
            tokens: Token id for each slot; any id of the vocabulary for an empty slot.
        """
        self._make_space(max(self.lengths) + 1)
        self.lengths = [length + (length > 0) for length in self.lengths]
        self.tokens.copy_(tokens[:, None])
        logits = self.repeated()
        self.record = self.repeated.record  # None once a recording has failed: then it is not tried again for another shape
        return logits

    def leave(self, slots: Sequence[int]) -> None:
        """Empty the slots with these indices."""
        for slot in slots:
            self.lengths[slot] = 0
        # An empty slot stays at position 0, where it overwrites its own first column.
        index = upload(torch.tensor(slots), self.held.device)
        self.held.index_fill_(0, index, 0)
        self.positions.index_fill_(0, index, 0)

    def select(self, slots: Sequence[int]) -> None:
        """Keep only the slots with these indices, in this order. Remove the columns that no row needs any more."""
        self.lengths = [self.lengths[slot] for slot in slots]
        index = upload(torch.tensor(slots), self.held.device)
        self.tokens, self.positions, self.held = self.tokens[index], self.positions[index], self.held[index]
        if self.row_phases is not None:
            self.row_phases.select(index)
        self.width = min(self.width, _rounded(max(self.lengths) + 1))
        for layer in self.layers:
            layer.select(index, self.width)
        self._begin_again()

    def forget(self) -> None:
        """Discard the recording of a step.

        Call this method before ``with condition.active()`` ends: the recording uses tensors of the interventions.
        """
        self._begin_again()

    def _make_space(self, needed: int) -> None:
        if needed <= self.width or not self.grows:
            return
        self.width = _rounded(needed)
        for layer in self.layers:
            layer.widen(self.width)
        self._begin_again()

    def _allocate(self, cache: DynamicCache, tracked: bool) -> None:
        sources: list[Any] = cache.layers[: self.lm.layout.n_layers]
        self.layers = [_Layer(self, source) for source in sources]
        if tracked:
            self.row_phases = phases.RowPhases(self.lm, len(self.lengths))
        self.cache.layers = [*self.layers, *([] if self.row_phases is None else [self.row_phases])]
        self._begin_again()

    def _begin_again(self) -> None:
        # A recording holds the addresses of these tensors, so it ends where they are replaced.
        state = [self.positions] + ([] if self.row_phases is None else [self.row_phases.phase, self.row_phases.thought])
        self.columns = torch.arange(self.width, device=self.positions.device)
        self.repeated = Repeated(self._run, state, self.record)

    def _run(self) -> Tensor:
        """Run one step, and return the logits.

        Tensors change in place, and no Python branch depends on their values. Therefore a step can be recorded.
        """
        mask = (self.columns <= self.positions)[:, None, None]  # [rows, 1, 1, width], the form that SDPA needs
        out = self.lm.model(
            input_ids=self.tokens, attention_mask=mask, position_ids=self.positions, past_key_values=self.cache, use_cache=True
        )
        if self.row_phases is not None:
            self.row_phases.advance(self.tokens)
        self.positions += self.held
        return out.logits[:, -1]


def _rounded(width: int) -> int:
    return -(-width // WIDTH_STEP) * WIDTH_STEP


class _Layer(DynamicLayer):
    """One layer of the KV cache of ``Slots``: keys and values ``[rows, KV heads, width, entries per head]``.

    Keys and values of a new token are written into the column of its position in the row. Attention reads all columns, and the mask hides
    those that are not written yet.
    """

    def __init__(self, slots: Slots, like: DynamicLayer) -> None:
        super().__init__()
        assert like.keys is not None and like.values is not None
        self.slots, self.dtype, self.device, self.is_initialized = slots, like.keys.dtype, like.keys.device, True
        self.keys, self.values = (
            part.new_zeros(len(slots.lengths), part.shape[1], slots.width, part.shape[3]) for part in (like.keys, like.values)
        )

    def get_seq_length(self) -> int:
        return self.slots.width

    def update(self, key_states: Tensor, value_states: Tensor, *args: Any, **kwargs: Any) -> tuple[Tensor, Tensor]:
        assert self.keys is not None and self.values is not None
        at = self.slots.positions[:, :, None, None]
        self.keys.scatter_(2, at.expand_as(key_states), key_states)
        self.values.scatter_(2, at.expand_as(value_states), value_states)
        return self.keys, self.values

    def begin(self, rows: Int[Tensor, " new"], source: DynamicLayer, columns: Int[Tensor, "new 1 width 1"]) -> None:
        """Copy prompts from another cache into some rows.

        Args:
            rows: Row of this cache for each prompt.
            source: The same layer of the cache in which the prompts were prefilled.
            columns: For each prompt, and for each of the first columns of this cache (as many as ``source`` has), the column of ``source``
                that is copied into it.
        """
        for mine, theirs in ((self.keys, source.keys), (self.values, source.values)):
            assert mine is not None and theirs is not None
            mine[rows, :, : columns.shape[2]] = theirs.gather(2, columns.expand_as(theirs))
        # Columns beyond the prompt are masked, but 0 times an infinite value of the row that was here before would not be 0.
        assert self.values is not None
        self.values[rows, :, columns.shape[2] :] = 0

    def widen(self, width: int) -> None:
        assert self.keys is not None and self.values is not None
        more = (0, 0, 0, width - self.keys.shape[2])
        self.keys, self.values = (torch.nn.functional.pad(part, more) for part in (self.keys, self.values))

    def select(self, rows: Int[Tensor, " rows"], width: int) -> None:
        """Keep only the rows with these indices, in this order, and of them the first ``width`` columns."""
        assert self.keys is not None and self.values is not None
        self.keys, self.values = (part[:, :, :width].index_select(0, rows) for part in (self.keys, self.values))
