"""Context managers that read or change activations, attention and logits. No other module of the toolkit registers hooks.

On exit, and also after an error, a context removes the hooks that it registered and leaves all others in place.
"""

from __future__ import annotations

import itertools
import sys
from collections.abc import Callable, Iterable, Iterator, Mapping
from contextlib import ExitStack, contextmanager
from contextvars import ContextVar
from dataclasses import dataclass
from functools import partial
from typing import Any

from torch import Tensor, nn
from transformers.masking_utils import ALL_MASK_ATTENTION_FUNCTIONS
from transformers.modeling_utils import ALL_ATTENTION_FUNCTIONS

from toolkit.sites import KINDS, Block, Layout, Site

Rewrite = Callable[[Tensor, Tensor], Tensor]
"""A function ``(value, inputs) -> new value`` that changes the value at a site. All three tensors are ``[batch, seq, width]``.

If the value is the output of ``W_O`` or the MLP, ``inputs`` is the input of that module: ``z`` at ``attn_out``, the MLP's input at
``mlp_out``. Its width may differ from that of the value. At all other sites ``inputs`` is the value itself."""

_unwatched: ContextVar[bool] = ContextVar("unwatched", default=False)  # see ``unwatched``


class UnknownPastError(ValueError):
    """Raised if a pass goes on from a KV cache that lacks the records of an intervention, such as one begun outside the intervention."""


@contextmanager
def record(layout: Layout, sites: Iterable[Site]) -> Iterator[dict[Site, Tensor]]:
    """Record the activations at some sites in every forward pass that runs inside the context.

    Yields a dict that is empty at first. After a pass it maps each site to a detached copy of its value ``[batch, seq, width]``. Every
    pass overwrites the values of the one before. To process activations during the pass without storing them, use ``observe``.
    """
    values: dict[Site, Tensor] = {}

    def keep(site: Site) -> Rewrite:
        def same(value: Tensor, inputs: Tensor) -> Tensor:
            values[site] = value.detach().clone()
            return value

        return same

    # Also inside ``unwatched``: interventions such as patches act on what is recorded.
    with rewrite(layout, {site: keep(site) for site in sites}):
        yield values


@contextmanager
def record_outputs(modules: Mapping[int, nn.Module]) -> Iterator[dict[int, Tensor]]:
    """Record the output of some modules in every forward pass that runs inside the context.

    Yields a dict that is empty at first. After a pass it holds a detached copy of each module's output, under the same keys as ``modules``.

    Args:
        modules: Key -> module. A key is any whole number, such as the index of a layer.
    """
    values: dict[int, Tensor] = {}

    def keep(key: int) -> Callable[[nn.Module, tuple, Tensor], None]:
        return lambda module, args, output: values.__setitem__(key, output.detach().clone())

    with ExitStack() as handles:
        for key, module in modules.items():
            handles.callback(module.register_forward_hook(keep(key)).remove)
        yield values


@contextmanager
def observe(layout: Layout, watchers: Mapping[Site, Callable[[Tensor], None]]) -> Iterator[None]:
    """Call functions (*watchers*) with the values ``[batch, seq, width]`` at their sites, in every forward pass inside the context.

    Args:
        watchers: Site -> watcher, a function of the site's value. It must not modify the value or keep a reference to it.
    """

    def look(watcher: Callable[[Tensor], None]) -> Rewrite:
        return reader(lambda value, inputs: watcher(value))

    with rewrite(layout, {site: look(watcher) for site, watcher in watchers.items()}):
        yield


def reader(fn: Callable[[Tensor, Tensor], None]) -> Rewrite:
    """Return a ``Rewrite`` that calls ``fn(value, inputs)`` and changes nothing. Inside ``unwatched``, ``fn`` is not called."""

    def same(value: Tensor, inputs: Tensor) -> Tensor:
        if not is_unwatched():
            fn(value, inputs)
        return value

    return same


@contextmanager
def unwatched() -> Iterator[None]:
    """Run passes that nobody reads: inside, functions that only read activations or attention are not called, those that change them are.

    An intervention that runs passes of its own, within the pass of its user, runs them in this context.
    """
    token = _unwatched.set(True)
    try:
        yield
    finally:
        _unwatched.reset(token)


def is_unwatched() -> bool:
    """Return True inside ``unwatched``."""
    return _unwatched.get()


@contextmanager
def rewrite(layout: Layout, rewrites: Mapping[Site, Rewrite]) -> Iterator[None]:
    """Replace the value at each site by the result of the site's function, in every forward pass inside the context.

    If the function returns the same tensor object that it got, nothing is written, and the pass stays bitwise the same.

    Contexts can be nested. If two of them rewrite the same site, the outer context's function is called first. One case does not work: if
    the inner context rewrites ``resid_pre`` and the outer one ``resid_mid``, the outer function gets a value without the inner change.

    Args:
        rewrites: Site -> function ``(value, inputs) -> new value``, see ``Rewrite``.

    Raises:
        IndexError: the model does not have one of the sites.
    """
    for site in rewrites:
        layout.check(site)
    with ExitStack() as handles:
        # PyTorch calls hooks in the order in which they were registered. So register them in the order of the computation: the hook of
        # resid_mid that stores the block's input must run after the hook that rewrites resid_pre.
        for site, fn in sorted(rewrites.items(), key=lambda item: (item[0].layer, KINDS.index(item[0].kind))):
            for handle in _attach(layout, site, fn):
                handles.callback(handle.remove)
        yield


@contextmanager
def rewrite_inputs(rewrites: Mapping[nn.Module, Rewrite]) -> Iterator[None]:
    """Replace the input of each module by the result of its function, in every forward pass inside the context.

    Args:
        rewrites: Module with one input tensor -> function of this input, see ``Rewrite``. Both of its arguments are the input.
    """
    with ExitStack() as handles:
        for module, fn in rewrites.items():
            handles.callback(module.register_forward_pre_hook(_on_input(fn), with_kwargs=True).remove)
        yield


@contextmanager
def around_passes(
    model: nn.Module, before: Callable[[Tensor | None, Any], None], after: Callable[[Tensor, Any], None]
) -> Iterator[None]:
    """Call ``before(input_ids, cache)`` before and ``after(input_ids, cache)`` after every forward pass of a model inside the context.

    Args:
        model: The model without its LM head (``lm.body``).
        before: Gets the token ids and the KV cache that are passed to the model. Each of them is ``None`` if it is not passed.
        after: Gets the same token ids and the KV cache that the model returns, or ``None`` if it returns no cache.
    """

    def enter(module: nn.Module, args: tuple, kwargs: dict) -> None:
        before(args[0] if args else kwargs.get("input_ids"), kwargs.get("past_key_values"))

    def leave(module: nn.Module, args: tuple, kwargs: dict, output: Any) -> None:
        after(args[0] if args else kwargs["input_ids"], output.past_key_values)

    with ExitStack() as handles:
        handles.callback(model.register_forward_pre_hook(enter, with_kwargs=True).remove)
        handles.callback(model.register_forward_hook(leave, with_kwargs=True).remove)
        yield


@contextmanager
def before_passes(model: nn.Module, fn: Callable[[tuple, dict[str, Any]], None]) -> Iterator[None]:
    """Call ``fn(args, kwargs)`` before every forward pass of a model inside the context, with the arguments that the model gets.

    Args:
        model: The model, such as the one without its LM head (``lm.body``).
        fn: Function of the positional and the named arguments. It must not change them.
    """

    def enter(module: nn.Module, args: tuple, kwargs: dict) -> None:
        fn(args, kwargs)

    handle = model.register_forward_pre_hook(enter, with_kwargs=True)
    try:
        yield
    finally:
        handle.remove()


@contextmanager
def rewrite_positions(modules: Iterable[nn.Module], fn: Callable[[Tensor], Tensor]) -> Iterator[None]:
    """Replace the position ids that modules get by ``fn(position_ids)``, in every forward pass inside the context.

    Args:
        modules: Modules whose second argument is ``position_ids``: those that compute rotary position embeddings.
        fn: Function of the position ids ``[batch, seq]``.
    """

    def hook(module: nn.Module, args: tuple, kwargs: dict):
        if "position_ids" in kwargs:
            return args, {**kwargs, "position_ids": fn(kwargs["position_ids"])}
        return (args[0], fn(args[1]), *args[2:]), kwargs

    with ExitStack() as handles:
        for module in modules:
            handles.callback(module.register_forward_pre_hook(hook, with_kwargs=True).remove)
        yield


Attend = Callable[[Tensor, Tensor, Tensor], tuple[Tensor, Tensor | None]]
"""``attend(query, key, value) -> (output, weights)``: the attention function of a layer, with mask and scale already set.

Queries are ``[batch, heads, queries, head_dim]``, after query norm and rotary embedding, if any. Keys and values are ``[batch, KV heads,
keys, head_dim]``. The output is ``[batch, queries, heads, head_dim]``. Weights (attention probabilities) are ``[batch, heads, queries,
keys]``, or ``None`` if the implementation does not return them (SDPA does not)."""

AttentionWrapper = Callable[[int, Attend, Tensor, Tensor, Tensor], tuple[Tensor, Tensor | None]]
"""``wrapper(layer, attend, query, key, value) -> (output, weights)``: called in place of the attention function of a layer.

``attend`` is that attention function. The wrapper may call it, with the same or other arguments. ``Attend`` describes the shapes."""

_numbers = itertools.count()  # make the names of replaced attention implementations unique


@dataclass(frozen=True)
class _WrappedAttention:
    """An attention function to register in transformers: an implementation of transformers with wrappers around it.

    Attributes:
        wrappers: The wrappers, from the innermost to the outermost.
        under: Name of the implementation that they wrap, such as ``"sdpa"``.
        layers: ``id()`` of a layer's attention module -> index of the layer. Other modules call the implementation without wrappers.
    """

    wrappers: tuple[AttentionWrapper, ...]
    under: str
    layers: Mapping[int, int]

    def __call__(
        self, module: nn.Module, query: Tensor, key: Tensor, value: Tensor, attention_mask: Tensor | None, *args: Any, **kwargs: Any
    ):
        # Transformers registers no eager implementation: each model file has its own. For other names ``plain`` is not used.
        plain: Any = getattr(sys.modules[type(module).__module__], "eager_attention_forward", None)
        below = ALL_ATTENTION_FUNCTIONS.get_interface(self.under, plain)

        def attend(q: Tensor, k: Tensor, v: Tensor) -> tuple[Tensor, Tensor | None]:
            return below(module, q, k, v, attention_mask, *args, **kwargs)

        if id(module) in self.layers:
            for wrapper in self.wrappers:
                attend = partial(wrapper, self.layers[id(module)], attend)
        return attend(query, key, value)


@contextmanager
def wrap_attention(layout: Layout, fn: AttentionWrapper, *, eager: bool = False) -> Iterator[None]:
    """Call ``fn(layer, attend, query, key, value)`` instead of the attention function of every layer.

    ``attend`` is the layer's attention function. ``fn`` has to return ``(output, weights)``. If it returns ``attend(query, key, value)``,
    nothing changes. Contexts can be nested: the ``attend`` that the inner context's ``fn`` gets calls the ``fn`` of the outer context.

    Args:
        fn: The function, see ``AttentionWrapper``. ``Attend`` describes the shapes.
        eager: True if ``attend`` is to be the model's eager implementation in transformers, which returns attention weights. False if it is
            to be the implementation that the model is set to use. Most of these return ``None`` instead of weights.
    """
    layers = {id(layout.blocks[layer].attention): layer for layer in layout.attention_layers}
    current = attention_name(layout)
    outer: Any = ALL_ATTENTION_FUNCTIONS.get(current)
    wrappers, under = (outer.wrappers, outer.under) if isinstance(outer, _WrappedAttention) else ((), current)
    under = "eager" if eager else under
    with replace_attention(layout, _WrappedAttention((*wrappers, fn), under, layers), under):
        yield


def attention_name(layout: Layout) -> str:
    """Return the name of the attention implementation that the model is set to use in transformers, e.g. ``sdpa``.

    Inside a context of ``wrap_attention`` or ``replace_attention`` the name has a suffix, as in ``sdpa+toolkit-3``.
    """
    return str(layout.attention.config._attn_implementation)


@contextmanager
def replace_attention(layout: Layout, fn: Callable, under: str = "sdpa") -> Iterator[None]:
    """Make ``fn`` the model's attention implementation inside the context.

    Args:
        fn: Attention function. Transformers calls it with the same arguments as its own implementations.
        under: Name of an attention implementation in transformers. ``fn`` gets masks in the form in which that implementation gets them.
    """
    config, before, name = layout.attention.config, attention_name(layout), f"{under}+toolkit-{next(_numbers)}"
    with ExitStack() as stack:
        # Transformers looks up the mask function under the same name. ``register`` writes to a mapping that all instances share. No method
        # undoes it, so the entry is popped on exit.
        for interface, value in (
            (ALL_ATTENTION_FUNCTIONS, fn),
            (ALL_MASK_ATTENTION_FUNCTIONS, ALL_MASK_ATTENTION_FUNCTIONS[under]),
        ):
            type(interface).register(name, value)
            stack.callback(type(interface)._global_mapping.pop, name)
        stack.callback(setattr, config, "_attn_implementation", before)
        config._attn_implementation = name
        yield


@contextmanager
def rewrite_logits(model: nn.Module, fn: Callable[[Tensor], Tensor]) -> Iterator[None]:
    """Replace the logits of a causal language model by ``fn(logits)``, in every forward pass inside the context.

    Logits are ``[batch, positions, vocab]``. They have only the positions for which the pass computes logits, such as the last one
    (``logits_to_keep`` in transformers).
    """

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
        assert block.out is not None  # checked by the caller
        return [block.out.register_forward_pre_hook(_on_input(fn), with_kwargs=True)]
    if site.kind == "resid_mid":
        return _attach_mid(block, layout.factor, fn)
    module: nn.Module = {"attn_out": block.out or block.attention, "mlp_out": block.mlp, "resid_post": block.block}[site.kind]
    with_inputs = site.kind != "resid_post"
    return [module.register_forward_hook(_on_output(fn, with_inputs=with_inputs), with_kwargs=True)]


def _on_input(fn: Rewrite):
    def hook(module: nn.Module, args: tuple, kwargs: dict):
        value = args[0] if args else kwargs["hidden_states"]
        new = fn(value, value)
        if new is value:
            return None
        return ((new, *args[1:]), kwargs) if args else (args, {**kwargs, "hidden_states": new})

    return hook


def _on_output(fn: Rewrite, *, with_inputs: bool):
    def hook(module: nn.Module, args: tuple, kwargs: dict, output):
        value = output[0] if isinstance(output, tuple) else output
        inputs = value if not with_inputs else args[0] if args else kwargs["hidden_states"]
        new = fn(value, inputs)
        if new is value:
            return None
        return (new, *output[1:]) if isinstance(output, tuple) else new

    return hook


def _attach_mid(block: Block, factor: float, fn: Rewrite) -> Iterator[Any]:
    """Register two hooks that call ``fn`` on ``resid_mid``. Yield their handles.

    ``resid_mid`` is neither the input nor the output of a module, so it is computed here. The first hook stores the block's input. The
    second hook, on attention, adds attention's contribution to this input, and calls ``fn`` on the sum. The new value minus the old one is
    then added to attention's contribution, which the block adds to the residual stream.

    Args:
        block: Modules of the layer.
        fn: Function ``(value, inputs) -> new value``, see ``Rewrite``; it gets ``resid_mid`` twice.
        factor: Number by which the block multiplies attention's output before it adds it (``Layout.factor``).
    """
    resid_pre: list[Tensor] = []

    def remember(module: nn.Module, args: tuple, kwargs: dict) -> None:
        resid_pre[:] = [args[0] if args else kwargs["hidden_states"]]

    def hook(module: nn.Module, args: tuple, output):
        added = output[0] if isinstance(output, tuple) else output
        # accelerate moves the block's input to the block's device only after the first hook.
        value = resid_pre.pop().to(added.device) + factor * added
        new = fn(value, value)
        if new is value:
            return None
        added = added + (new - value) / factor
        return (added, *output[1:]) if isinstance(output, tuple) else added

    # Yield one at a time: if the second fails to register, the caller already holds, and removes, the first.
    yield block.block.register_forward_pre_hook(remember, with_kwargs=True)
    yield block.adds_attention.register_forward_hook(hook)
