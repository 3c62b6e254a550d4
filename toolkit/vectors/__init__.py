"""Exchange steering vectors and head edits with other tools: write files that they read, and read theirs as directions.

==========================  ===========================  ================================  ===============================
format                      functions                    site                              written for, or read from
==========================  ===========================  ================================  ===============================
safetensors                 save, load                   any                               this toolkit; readers of its header
GGUF control vector         save_gguf, load_gguf         resid_post, layers from 1         llama.cpp, repeng, EasySteer
PEFT adapter (LoRA, r = 1)  save_adapter                 heads                             peft
biases of a checkpoint      bake                         any but resid_pre                 any loader of checkpoints
folder for the hub          save_folder                  any                               readers on the hub
ThinkEdit ``.pt``           load_thinkedit               resid_mid, resid_post             read only
hidden-directions ``.pt``   load_hidden_directions       resid_post                        read only
AISteer360 ``.svec``        load_svec                    resid_post                        read only
steering-vectors object     from_steering_vectors        resid_post, attn_out, mlp_out     read only
==========================  ===========================  ================================  ===============================

``site`` is the place in the model to which the vectors belong (``sites``). Vectors are ``[layers, d_model]``; layer 0 is the first block,
and layers without a vector in the file are zero. In files written here, adding the direction makes thinking **longer**, unless the header
says otherwise; files of other tools do not say what adding theirs does. A file that does not fit the model, or whose header contradicts its
numbers, raises an error: nothing is shifted, transposed or rescaled by guess.
"""

from toolkit.vectors.files import ExportError, load, load_gguf, save, save_folder, save_gguf
from toolkit.vectors.foreign import from_steering_vectors, load_hidden_directions, load_svec, load_thinkedit
from toolkit.vectors.weights import bake, save_adapter

__all__ = [
    "ExportError", "bake", "from_steering_vectors", "load", "load_gguf", "load_hidden_directions", "load_svec",
    "load_thinkedit", "save", "save_adapter", "save_folder", "save_gguf",
]  # fmt: skip
