"""Steering vectors and head edits as files that other tools read, and theirs as directions here.

==========================  ===========================  ================================  ===============================
what                        by                           site                              for
==========================  ===========================  ================================  ===============================
safetensors                 save, load                   any                               anyone who reads its header
GGUF control vector         save_gguf, load_gguf         resid_post, layers from 1         llama.cpp, repeng, EasySteer
PEFT adapter (LoRA, r = 1)  adapter                      heads                             peft
biases of a checkpoint      baked                        any but resid_pre                 whatever loads checkpoints
folder for the hub          folder                       any                               people
ThinkEdit ``.pt``           load_thinkedit               resid_mid, resid_post             from there
hidden-directions ``.pt``   load_hidden_directions       resid_post                        from there
AISteer360 ``.svec``        load_svec                    resid_post                        from there
steering-vectors object     from_steering_vectors        resid_post, attn_out, mlp_out     from there
==========================  ===========================  ================================  ===============================

Vectors are ``[layers, d_model]``, layer 0 the first block; a layer that a file does not name is zero. What is saved here is
**+ longer**; a foreign file does not say what its + is. A file that does not fit the model, or that says another site or
another normalisation than it has, is an error: nothing is shifted, transposed or rescaled by guess.
"""

from toolkit.vectors.files import ExportError, load, load_gguf, save, save_folder, save_gguf
from toolkit.vectors.foreign import from_steering_vectors, load_hidden_directions, load_svec, load_thinkedit
from toolkit.vectors.weights import bake, save_adapter

__all__ = [
    "ExportError", "bake", "from_steering_vectors", "load", "load_gguf", "load_hidden_directions", "load_svec",
    "load_thinkedit", "save", "save_adapter", "save_folder", "save_gguf",
]  # fmt: skip
