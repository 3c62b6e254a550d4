"""Use a model in TransformerLens or nnsight, with the same weights in memory, and translate the names of sites.

The other library gets a copy of the *modules* of ``lm``. It shares all weights and hooks with ``lm``, and ``lm`` itself does not change. No
weights are folded or centred. ``lm`` may be an edited model, and an intervention on ``lm`` also acts in the other library::

    bridge = bridges.to_transformer_lens(lm)
    with edits.steering(direction, 0.05)(lm):
        logits, cache = bridge.run_with_cache(ids)

The places of the toolkit's sites in both libraries (where to read a site, and where to add a vector to it):

==============  ==================  ==================================================  ===============================
site kind       TransformerLens     nnsight: module, and its input or output            where to add a vector
==============  ==================  ==================================================  ===============================
``resid_pre``   hook_resid_pre      block, input                                        same
``z``           attn.hook_z [1]_    output projection, input                            same
``attn_out``    hook_attn_out [2]_  output projection, output                           same
``resid_mid``   hook_resid_mid [3]_ attention or its post-norm, output + block's input  hook_attn_out; module's output
``mlp_out``     hook_mlp_out [2]_   MLP, output                                         same
``resid_post``  hook_resid_post     block, output                                       same
==============  ==================  ==================================================  ===============================

.. [1] Shape ``[batch, seq, heads, head_dim]`` in TransformerLens, ``[batch, seq, heads * head_dim]`` in this toolkit.
.. [2] In post-norm families (a norm follows attention and MLP) these hooks are *after* the norm. There, the hooks of the toolkit's sites
   are ``attn.hook_out`` and ``mlp.hook_out``.
.. [3] Read only: the hook is at the input of the MLP's norm, so a write there does not reach the residual stream. Models in which attention
   and MLP run in parallel have no such hook; for them, ``from_transformer_lens`` computes ``resid_pre + attn_out``.

Limits:

- TransformerLens computes attention itself (eager), so numbers agree only up to rounding.
- For GPT-NeoX, TransformerLens copies the fused query-key-value weights, so later changes of these in ``lm`` do not reach it. All other
  weights are shared.
- With TransformerLens's option ``use_attn_result`` the output projection is never called. Then interventions at ``z`` and ``attn_out`` have
  no effect.
- If an intervention changes a site, the other library may show the value of that site before the change. nnsight does so at every module
  output, TransformerLens at ``resid_pre``, ``z`` and ``mlp_out``. All later sites show the effect of the change.
- In nnsight, read sites in the order in which the model computes them.
- Do not use ``output_hidden_states`` in nnsight. It makes transformers put permanent hooks on the shared layers. ``lm`` then returns every
  hidden state twice.
"""

from toolkit.bridges.activations import from_nnsight, from_transformer_lens, moments
from toolkit.bridges.models import DETECTED, assumed_longest, check_transformer_lens, detect_heads, to_nnsight, to_transformer_lens
from toolkit.bridges.names import (
    NeighbourError,
    Place,
    nnsight_path,
    site_of_nnsight,
    site_of_transformer_lens,
    transformer_lens_name,
)

__all__ = [
    "DETECTED", "NeighbourError", "Place", "assumed_longest", "check_transformer_lens", "detect_heads", "from_nnsight", "from_transformer_lens", "moments",
    "nnsight_path", "site_of_nnsight", "site_of_transformer_lens", "to_nnsight", "to_transformer_lens", "transformer_lens_name",
]  # fmt: skip
