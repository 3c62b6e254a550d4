"""Exchange steering vectors and head edits with other tools: write files that they can read, and read their files.

Vectors are read as a ``Direction``, which has one vector per layer. The table lists the formats. ``site`` is the kind of place in the model
to which the vectors belong (see the module ``sites``).

==========================  ===========================  ================================  ===============================
format                      functions                    site                              read by
==========================  ===========================  ================================  ===============================
safetensors                 save, load                   any                               any reader of safetensors
GGUF control vector         save_gguf, load_gguf         resid_post, layers from 1         llama.cpp, repeng, EasySteer
PEFT adapter (LoRA, r = 1)  save_adapter                 heads (columns of W_O)            peft
biases of a checkpoint      bake                         any but resid_pre                 any loader of checkpoints
folder for a model hub      save_folder                  any                               as safetensors and GGUF
ThinkEdit ``.pt``           load_thinkedit               resid_mid, resid_post             this toolkit (cannot write it)
hidden-directions ``.pt``   load_hidden_directions       resid_post                        this toolkit (cannot write it)
AISteer360 ``.svec``        load_svec                    resid_post                        this toolkit (cannot write it)
steering-vectors object     from_steering_vectors        resid_post, attn_out, mlp_out     this toolkit (cannot write it)
==========================  ===========================  ================================  ===============================

Vectors are ``[layers, d_model]``. Layer 0 is the first block. A layer without a vector in the file is zero.

Sign: in a file that this toolkit wrote, adding the vectors makes thinking **longer**, unless its header says ``+ = shorter``. It says so
if ``save`` or ``save_gguf`` multiplied the vectors by a negative factor, ``scale``. ``load`` and ``load_gguf`` divide by this factor, so
adding the loaded direction always makes thinking longer. Adding the vectors of ThinkEdit's files also makes thinking longer. For files of
other tools the effect is unknown.

A file that does not fit the model, or whose header contradicts its vectors, raises an error. Nothing is shifted, transposed or rescaled to
make a file fit.
"""

from toolkit.vectors.files import ExportError, load, save
from toolkit.vectors.folder import save_folder
from toolkit.vectors.foreign import from_steering_vectors, load_hidden_directions, load_svec, load_thinkedit
from toolkit.vectors.gguf import load_gguf, save_gguf
from toolkit.vectors.weights import bake, low_rank, save_adapter

__all__ = [
    "ExportError", "bake", "from_steering_vectors", "load", "load_gguf", "load_hidden_directions", "load_svec",
    "load_thinkedit", "low_rank", "save", "save_adapter", "save_folder", "save_gguf",
]  # fmt: skip
