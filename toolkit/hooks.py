"""Reading and writing activations and attention: context managers, the only place that registers hooks.

A context removes exactly the handles it created, also when its body or its own entry fails, so nothing leaks
and nobody else's hooks are touched.
"""

from __future__ import annotations

import itertools
import sys
from collections.abc import Callable, Iterable, Iterator, Mapping
from contextlib import ExitStack, contextmanager
from dataclasses import dataclass
from functools import partial
from typing import Any

from torch import Tensor, nn
from transformers.masking_utils import ALL_MASK_ATTENTION_FUNCTIONS
from transformers.modeling_utils import ALL_ATTENTION_FUNCTIONS

from toolkit.sites import KINDS, Block, Layout, Site

Rewrite = Callable[[Tensor, Tensor], Tensor]
"""``(value, inputs) -> new value``, both ``[batch, seq, width]``. ``inputs`` is what the site's module was given:
``z`` at ``attn_out``, the MLP's input at ``mlp_out``; elsewhere the value itself."""


@contextmanager
def record(layout: Layout, sites: Iterable[Site]) -> Iterator[dict[Site, Tensor]]:
    """Record activations of every forward pass run inside the context.

    Yields a dict that holds, after a pass, a detached copy of each site's value ``[batch, seq, width]``; a second
    pass overwrites the first. To reduce on the fly instead of keeping, use :func:`observe`.
    """
    values: dict[Site, Tensor] = {}

    def keep(site: Site) -> Callable[[Tensor], None]:
        return lambda value: values.__setitem__(site, value.detach().clone())

    with observe(layout, {site: keep(site) for site in sites}):
        yield values


@contextmanager
def observe(layout: Layout, watchers: Mapping[Site, Callable[[Tensor], None]]) -> Iterator[None]:
    """Call ``watcher(value)`` at each site on every pass; the value must not be modified or kept."""

    def look(watcher: Callable[[Tensor], None]) -> Rewrite:
        def same(value: Tensor, inputs: Tensor) -> Tensor:
            watcher(value)
            return value

        return same

    with rewrite(layout, {site: look(watcher) for site, watcher in watchers.items()}):
        yield


@contextmanager
def rewrite(layout: Layout, rewrites: Mapping[Site, Rewrite]) -> Iterator[None]:
    """Replace the value at each site by ``fn(value, inputs)`` on every pass, prefill and decode alike.

    A function that returns its argument unchanged leaves the pass bitwise as it was.

    Contexts nest, outer before inner; a nested rewrite of ``resid_pre`` is not seen by an outer one of ``resid_mid``.

    Raises:
        IndexError: a site's layer does not exist.
    """
    for site in rewrites:
        layout.check(site)
    with ExitStack() as handles:
        # In the order of the computation: a resid_mid hook has to see a resid_pre that was rewritten.
        for site, fn in sorted(rewrites.items(), key=lambda item: (item[0].layer, KINDS.index(item[0].kind))):
            for handle in _attach(layout, site, fn):
                handles.callback(handle.remove)
        yield


@contextmanager
def around_passes(
    model: nn.Module, before: Callable[[Tensor | None, Any], None], after: Callable[[Tensor, Any], None]
) -> Iterator[None]:
    """Call ``before(input_ids, cache)`` and ``after(input_ids, cache)`` around every pass of a base model.

    ``before`` sees the cache that the pass was given, ``after`` the one that it returns; ``None`` without one.
    """

    def enter(module: nn.Module, args: tuple, kwargs: dict) -> None:
        before(args[0] if args else kwargs.get("input_ids"), kwargs.get("past_key_values"))

    def leave(module: nn.Module, args: tuple, kwargs: dict, output: Any) -> None:
        after(args[0] if args else kwargs["input_ids"], output.past_key_values)

    with ExitStack() as handles:
        handles.callback(model.register_forward_pre_hook(enter, with_kwargs=True).remove)
        handles.callback(model.register_forward_hook(leave, with_kwargs=True).remove)
        yield


Attend = Callable[[Tensor, Tensor, Tensor], tuple[Tensor, Tensor | None]]
"""``attend(query, key, value) -> (output, weights)``: how a layer attends, its mask and scale already in it. Queries are
``[batch, heads, queries, head_dim]``, after any norm and rotation; keys and values have the heads of the KV cache; weights are
``[batch, heads, queries, keys]``, or ``None`` if they were never formed."""

AttentionWrapper = Callable[[int, Attend, Tensor, Tensor, Tensor], tuple[Tensor, Tensor | None]]

_numbers = itertools.count()


@dataclass(frozen=True)
class _WrappedAttention:
    """What transformers calls where a layer attends: functions, each around those before it, around the implementation ``under``."""

    fns: tuple[AttentionWrapper, ...]
    under: str
    layers: Mapping[int, int]

    def __call__(
        self, module: nn.Module, query: Tensor, key: Tensor, value: Tensor, mask: Tensor | None, *args: Any, **kwargs: Any
    ):
        plain: Any = getattr(sys.modules[type(module).__module__], "eager_attention_forward", None)
        below = ALL_ATTENTION_FUNCTIONS.get_interface(self.under, plain)

        def attend(q: Tensor, k: Tensor, v: Tensor) -> tuple[Tensor, Tensor | None]:
            return below(module, q, k, v, mask, *args, **kwargs)

        if id(module) in self.layers:
            for fn in self.fns:
                attend = partial(fn, self.layers[id(module)], attend)
        return attend(query, key, value)


@contextmanager
def wrap_attention(layout: Layout, fn: AttentionWrapper, *, eager: bool = False) -> Iterator[None]:
    """Let ``fn(layer, attend, query, key, value)`` stand where every layer attends; ``attend(query, key, value)`` changes nothing.

    Contexts nest, an inner function around an outer. The model's own implementation comes back on leaving, also after an error.

    Args:
        eager: Attend with the family's plain implementation, which returns the weights, whatever the model uses.
    """
    layers = {id(block.attention): layer for layer, block in enumerate(layout.blocks)}
    own = attention_name(layout)
    outer: Any = ALL_ATTENTION_FUNCTIONS.get(own)
    inside, under = (outer.fns, outer.under) if isinstance(outer, _WrappedAttention) else ((), own)
    under = "eager" if eager else under
    with replace_attention(layout, _WrappedAttention((*inside, fn), under, layers), under):
        yield


def attention_name(layout: Layout) -> str:
    """What transformers calls the model's implementation of attention; ``sdpa+...`` is SDPA with something around it."""
    attention: Any = layout.blocks[0].attention
    return str(attention.config._attn_implementation)


@contextmanager
def replace_attention(layout: Layout, fn: Callable, under: str = "sdpa") -> Iterator[None]:
    """Let ``fn`` be the implementation of attention, called as transformers calls one; masks are made as for ``under``."""
    attention: Any = layout.blocks[0].attention
    config, own, name = attention.config, attention_name(layout), f"{under}+toolkit-{next(_numbers)}"
    with ExitStack() as stack:
        # Masks are looked up under the same name, in the mapping that all instances share.
        for interface, value in (
            (ALL_ATTENTION_FUNCTIONS, fn),
            (ALL_MASK_ATTENTION_FUNCTIONS, ALL_MASK_ATTENTION_FUNCTIONS[under]),
        ):
            type(interface).register(name, value)
            stack.callback(type(interface)._global_mapping.pop, name)
        stack.callback(setattr, config, "_attn_implementation", own)
        config._attn_implementation = name
        yield


@contextmanager
def rewrite_logits(model: nn.Module, fn: Callable[[Tensor], Tensor]) -> Iterator[None]:
    """Replace the logits ``[batch, kept positions, vocab]`` of every pass of a causal language model by ``fn(logits)``."""

    def hook(module: nn.Module, args: tuple, output: Any) -> None:
        output.logits = fn(output.logits)

    with ExitStack() as handles:
        handles.callback(model.register_forward_hook(hook).remove)
        yield


def _attach(layout: Layout, site: Site, fn: Rewrite) -> Iterable[Any]:
    block = layout.blocks[site.layer]
    if site.kind == "resid_pre":
        return [block.block.register_forward_pre_hook(_on_input(fn), with_kwargs=True)]
    if site.kind == "z":
        return [block.out.register_forward_pre_hook(_on_input(fn), with_kwargs=True)]
    if site.kind == "resid_mid":
        return _attach_mid(block, fn)
    module: nn.Module = {"attn_out": block.out, "mlp_out": block.mlp, "resid_post": block.block}[site.kind]
    own = site.kind == "resid_post"
    return [module.register_forward_hook(_on_output(fn, own=own), with_kwargs=True)]


def _on_input(fn: Rewrite):
    def hook(module: nn.Module, args: tuple, kwargs: dict):
        value = args[0] if args else kwargs["hidden_states"]
        new = fn(value, value)
        if new is value:
            return None
        return ((new, *args[1:]), kwargs) if args else (args, {**kwargs, "hidden_states": new})

    return hook


def _on_output(fn: Rewrite, *, own: bool):
    def hook(module: nn.Module, args: tuple, kwargs: dict, output):
        value = output[0] if isinstance(output, tuple) else output
        inputs = value if own else args[0] if args else kwargs["hidden_states"]
        new = fn(value, inputs)
        if new is value:
            return None
        return (new, *output[1:]) if isinstance(output, tuple) else new

    return hook


def _attach_mid(block: Block, fn: Rewrite) -> Iterator[Any]:
    """``resid_mid`` is a sum no module returns: it is formed, and changed, where attention's share is about to be added."""
    resid_pre: list[Tensor] = []

    def remember(module: nn.Module, args: tuple, kwargs: dict) -> None:
        resid_pre[:] = [args[0] if args else kwargs["hidden_states"]]

    def hook(module: nn.Module, args: tuple, output):
        added = output[0] if isinstance(output, tuple) else output
        value = resid_pre.pop() + added
        new = fn(value, value)
        if new is value:
            return None
        added = added + (new - value)
        return (added, *output[1:]) if isinstance(output, tuple) else added

    # One at a time, so that the first is owned by the context when the second fails to register.
    yield block.block.register_forward_pre_hook(remember, with_kwargs=True)
    yield block.adds_attention.register_forward_hook(hook)
