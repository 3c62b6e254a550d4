"""The part of a model that a run trains: every weight, an adapter, one vector per layer, or some attention heads.

``Extras.train`` and ``TrainingPlan.train`` take a part:

* ``None``: every weight.
* A config of peft, such as ``adapter(16)``: an adapter.
* ``Vectors()``: one vector per layer, added to the residual stream at every position.
* ``Heads(heads)``: the columns of ``W_O`` that belong to these heads, or one factor per head.

Sources: Steering LLM Reasoning Through Bias-Only Adaptation (arXiv:2505.18706) and Small Vectors, Big Effects (arXiv:2509.06608) train one
vector per layer with reinforcement learning, and freeze all weights. ``Heads`` is ours.

Deviations: we did not find the papers' site within the block, the initial value or the learning rate. The site (``assumed_site``) and the
initial value, zero, are ours. The rate has no default: it is that of the recipe, which is meant for all weights. So give another.

Vectors and heads are extra parameters. Hooks add their effect to a forward pass, as ``steering.Steering`` and ``edits.RuntimeEdit`` do. They
start at zero, so training begins with the outputs of the initial model. Checkpoints hold these parameters only. Weight decay, if the recipe
has any, pulls them to zero, that is, to the initial model.
"""

from __future__ import annotations

from collections.abc import Iterator, Mapping, Sequence
from contextlib import ExitStack
from dataclasses import dataclass
from functools import partial
from typing import Any

import torch
from jaxtyping import Float
from peft import LoraConfig, PeftConfig
from torch import Tensor, nn

from toolkit import edits, hooks, origins, sites
from toolkit.lm import LM
from toolkit.sites import Layout, Site
from toolkit.store import WrongModelError
from toolkit.types import Plan

NAME = "trained_part"  # name of the submodule that holds the parameters


@dataclass(frozen=True)
class Vectors:
    """Train one vector per layer; all weights stay as they are.

    Attributes:
        layers: Layers that get a vector; ``None`` means all. Control vectors of llama.cpp have none for layer 0.
        assumed_site: Site in each layer to which the vector is added. The default is the output of the block (ours).

    Raises:
        ValueError: the site is unknown, or it is ``z`` (head outputs before W_O), whose width is not that of the residual stream; or
            ``layers`` is empty or names a layer twice.
    """

    layers: tuple[int, ...] | None = None
    assumed_site: str = "resid_post"

    def __post_init__(self) -> None:
        if Site(self.assumed_site, 0).kind == "z":
            raise ValueError("assumed_site='z': a vector has the width of the residual stream; choose another site.")
        if self.layers is not None and (not self.layers or len(set(self.layers)) < len(self.layers)):
            raise ValueError(f"layers={self.layers}: give at least one layer, and none twice.")

    def parameters(self, layout: Layout) -> nn.ParameterDict:
        """Return the new parameters: for each layer a vector of zeros, ``[d_model]``, under the name of the layer's number."""
        layers = range(layout.n_layers) if self.layers is None else self.layers
        return nn.ParameterDict({str(layer): torch.zeros(layout.d_model) for layer in layers})

    def rewrites(self, values: nn.ParameterDict, layout: Layout) -> dict[Site, hooks.Rewrite]:
        """Return the hooks that add the vectors ``values`` to the activations."""
        return {Site(self.assumed_site, int(layer)): partial(_shifted, v) for layer, v in values.items()}


@dataclass(frozen=True)
class Heads:
    """Train some attention heads only: their columns of ``W_O``, or one factor per head. All other weights stay as they are.

    With ``W_h`` the columns of a head, ``D_h`` and ``s_h`` trained, both 0 at the start::

        scale=False   W_h <- W_h + D_h
        scale=True    W_h <- (1 + s_h) W_h

    Attributes:
        heads: Pairs ``(layer, head)``.
        scale: True to train only one factor per head.
        made_from: Records of the problems with which the heads were chosen (see ``origins.record``). A trained model may not be evaluated
            on them.
        fingerprint: Fingerprint of the model for which the heads were chosen: no other is trained. ``None`` if any model may be trained.

    Raises:
        ValueError: ``heads`` is empty or names a head twice.
    """

    heads: tuple[tuple[int, int], ...]
    scale: bool = False
    made_from: tuple[origins.Record, ...] = ()
    fingerprint: str | None = None

    def __post_init__(self) -> None:
        if not self.heads or len(set(self.heads)) < len(self.heads):
            raise ValueError(f"heads={self.heads}: give at least one head as (layer, head), and none twice.")

    def parameters(self, layout: Layout) -> nn.ParameterDict:
        """Return the new parameters, zeros: for each head ``D_h [d_model, head_dim]`` or ``s_h [1]``, under the name ``LAYER-HEAD``.

        Raises:
            IndexError: the model does not have one of the heads.
        """
        for layer, head in self.heads:
            layout.head(layer, head)  # raises IndexError
        shapes = {f"{layer}-{h}": (1,) if self.scale else (layout.d_model, layout.head_dims[layer]) for layer, h in self.heads}
        return nn.ParameterDict({name: torch.zeros(shape) for name, shape in shapes.items()})

    def rewrites(self, values: nn.ParameterDict, layout: Layout) -> dict[Site, hooks.Rewrite]:
        """Return the hooks that add the effect of the trained ``values`` to the outputs of attention."""
        return {Site("attn_out", layer): partial(self._add, values, layout, layer) for layer in {layer for layer, _ in self.heads}}

    def _add(self, values: nn.ParameterDict, layout: Layout, layer: int, attn_out: Tensor, z: Tensor) -> Tensor:
        added = torch.zeros_like(attn_out, dtype=torch.float32)
        for columns, change in self.changes(values, layout, layer):
            added = added + z[..., columns].float() @ change.T
        return (attn_out.float() + added).to(attn_out.dtype)

    def changes(self, values: nn.ParameterDict, layout: Layout, layer: int) -> Iterator[tuple[slice, Tensor]]:
        """Yield the columns of each trained head of a layer, and the change of ``W_O`` there, ``[d_model, head_dim]`` in fp32.

        Args:
            values: The trained parameters.
            layout: Layout of the model.
            layer: The layer.
        """
        for _, head in (pair for pair in self.heads if pair[0] == layer):
            columns, value = layout.head(layer, head), values[f"{layer}-{head}"]
            yield columns, value * layout.W_O(layer)[:, columns].detach().float() if self.scale else value


def _shifted(vector: Float[Tensor, " d_model"], value: Tensor, inputs: Tensor) -> Tensor:
    # The same operations as in ``steering.Steering``, so that steering along the saved vector gives the same outputs bit for bit.
    return (value + vector.to(value.device)).to(value.dtype)


def plan_heads(plan: Plan, *, scale: bool = False) -> Heads:
    """Return the heads of a plan as a part to train. The direction and the strengths of the plan are not used.

    As with ``edits.apply``, the model must be the one that the plan was made from (see ``check_model``).

    Args:
        plan: The plan. A random control has other heads of the same layers: ``plan_heads(edits.random_heads(plan, lm.layout, seed=0))``.
        scale: True to train only one factor per head.
    """
    return Heads(tuple(dict.fromkeys(plan.heads)), scale, edits.plan_origins(plan), plan.provenance.fingerprint)


def adapter(rank: int = 16) -> LoraConfig:
    """Return peft's config of a LoRA adapter on every linear layer except the output layer. ``alpha`` is twice the rank (our choice)."""
    return LoraConfig(r=rank, lora_alpha=2 * rank, target_modules="all-linear", task_type="CAUSAL_LM")


def check(part: Any) -> None:
    """Raise ValueError unless ``part`` is ``None``, a config of peft, ``Vectors`` or ``Heads``.

    Configs of peft that train virtual tokens of the prompt are refused too: such an adapter cannot be merged into the weights.
    """
    if isinstance(part, PeftConfig) and part.is_prompt_learning:
        raise ValueError(
            f"train={type(part).__name__}: an adapter of virtual tokens cannot be merged into the weights, so the trained model could not be "
            "saved. Give a config that changes weights, such as adapter(16)."
        )
    if not isinstance(part, PeftConfig | Vectors | Heads | None):
        raise ValueError(f"train={part!r}: give None (every weight), a peft config such as adapter(16), Vectors() or Heads(...).")


def check_model(part: Any, lm: LM) -> None:
    """Raise WrongModelError if a part was chosen for another model than ``lm``, as the heads of another model's plan are."""
    if isinstance(part, Heads) and part.fingerprint not in (None, lm.fingerprint):
        raise WrongModelError(
            f"The heads to train were chosen for another model: its fingerprint is {part.fingerprint[:12]}, that of {lm.name} is "
            f"{lm.fingerprint[:12]}. Make a plan from this model's rollouts, or give the heads themselves, parts.Heads(plan.heads)."
        )


def is_adapter(part: Any) -> bool:
    """Return True if a part is an adapter, that is, a config of peft."""
    return isinstance(part, PeftConfig)


def describe(part: Any) -> dict[str, Any]:
    """Return a dict that describes a part, for ``grpo.json``: its kind under ``part``, and its settings."""
    if part is None:
        return {"part": "all"}
    if isinstance(part, Vectors):
        return {"part": "vector", "layers": part.layers, "site": part.assumed_site}
    if isinstance(part, Heads):
        return {"part": "head-scales" if part.scale else "heads", "heads": part.heads}
    settings = {name: getattr(part, name, None) for name in ("r", "lora_alpha", "target_modules")}
    return {"part": "adapter", **{k: sorted(v) if isinstance(v, set) else v for k, v in settings.items()}}


@dataclass(frozen=True)
class Attached:
    """New parameters of a model, with the hooks through which they act.

    Attributes:
        part: What is trained.
        values: The parameters by name, in fp32.
        layout: Layout of the model.
        stack: Holds the hooks; closing it removes them.
    """

    part: Vectors | Heads
    values: nn.ParameterDict
    layout: Layout
    stack: ExitStack

    def vectors(self) -> Float[Tensor, "layers d_model"]:
        """Return the trained vectors in fp32 on the CPU; layers without a vector are zero. Only for ``Vectors``."""
        stacked = torch.zeros(self.layout.n_layers, self.layout.d_model)
        for layer, vector in self.values.items():
            stacked[int(layer)] = vector.detach().float().cpu()
        return stacked

    @torch.no_grad()
    def merge(self, model: Any) -> None:
        """Write the trained change of the heads into ``W_O``, in place, and remove hooks and parameters. Only for ``Heads``.

        Args:
            model: The model that ``attach`` changed. Its weights should be fp32, so that the change is not rounded.
        """
        assert isinstance(self.part, Heads)
        for layer in sorted({layer for layer, _ in self.part.heads}):
            for columns, change in list(self.part.changes(self.values, self.layout, layer)):
                W = self.layout.W_O(layer)
                W[:, columns] += change.to(W)
        self.detach(model)

    def detach(self, model: Any) -> None:
        """Remove hooks and parameters from ``model``, which then has its own weights only, all of them trainable."""
        self.stack.close()
        if hasattr(model, NAME):
            delattr(model, NAME)
        model._keys_to_ignore_on_save = None
        model.requires_grad_(True)


def attach(part: Any, lm: LM) -> Attached | None:
    """Freeze ``lm.model`` in place, add the parameters of a part to it, and return them. ``None`` for other parts than vectors and heads.

    From then on, every forward pass of the model includes the effect of the parameters.

    Args:
        part: The part to train.
        lm: The model in training. Its ``layout`` is not used: it may belong to the model of which ``lm.model`` is a copy.

    Raises:
        IndexError: the model does not have one of the layers or heads.
    """
    if not isinstance(part, Vectors | Heads):
        return None
    model: Any = lm.model
    layout, stack = sites.find(model), ExitStack()
    values = part.parameters(layout).to(lm.device)
    model.requires_grad_(False)
    stack.enter_context(hooks.rewrite(layout, part.rewrites(values, layout)))
    # transformers leaves these out of checkpoints: they never change, and would take gigabytes.
    model._keys_to_ignore_on_save = set(model.state_dict())
    model.add_module(NAME, values)
    return Attached(part, values, layout, stack)


def trained_parameters(model: nn.Module) -> int:
    """Return the number of parameters of a model that training may change."""
    return sum(weight.numel() for weight in model.parameters() if weight.requires_grad)


def length_change(rows: Sequence[Mapping[str, Any]]) -> float | None:
    """Return by how many tokens thinking became longer during training, from the rows of a log; negative if it became shorter.

    The value is the mean of the second half of the rows minus that of the first half. Held-out evaluations are used if there are two, else
    training batches. Lengths of responses are used if no response has thinking, as without think tags or with thinking switched off.
    ``None`` if no row has a length above 0.
    """
    for name in ("held_out/think_tokens", "held_out/tokens", "think_tokens", "tokens"):
        lengths = [float(row[name]) for row in rows if row.get(name) is not None]
        if (half := len(lengths) // 2) and any(lengths):
            return sum(lengths[-half:]) / half - sum(lengths[:half]) / half
    return None
