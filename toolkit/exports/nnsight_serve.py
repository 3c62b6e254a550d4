"""A script that steers through nnsight-serve (nnsight's documentation of its vLLM server, ``docs/vllm/steering.md`` and ``serving.md``).

An nnsight client sends code to the server, so the export is a short program. In vLLM, a block returns ``(hidden, residual)``, whose sum is
the residual stream. So a vector added to either element is added to the residual stream. Rows of these tensors are positions: the whole
prompt in the first step, then one token per step. So ``[:]`` in every step means all positions, and ``[-1:]`` in every step means the
prompt's last position and every later one.

The program collects tokens step by step, because code after the loop does not run if a response ends early.

Module names are those of transformers. vLLM uses the same names for most model families; for others, the program fails.
"""

from __future__ import annotations

from pathlib import Path

from toolkit import store
from toolkit.exports.base import ABOUT, Settings, about, rows, steered
from toolkit.lm import LM
from toolkit.types import Direction

VECTORS, SCRIPT = "direction.safetensors", "steer.py"
WHERE = {"all": ":", "newest": "-1:"}
"""Positions of steering (``Settings.during``) -> slice of the rows that get the vector in every step."""
USE = (
    "Start `nnsight-serve MODEL --port 6677`, then `python steer.py PROMPT`. The server runs the code that clients send: only on a network "
    "that you trust. Not tested on a running server."
)
PROGRAM = '''"""Steer a model through nnsight-serve: python steer.py PROMPT [--url URL] [--strength S] [--max-tokens N]."""

import argparse
from pathlib import Path

from nnsight.modeling.vllm import VLLM
from safetensors.torch import load_file

MODEL = {model!r}
STRENGTH = {strength!r}  # positive lengthens thinking


def main():
    parser = argparse.ArgumentParser()
    parser.add_argument("prompt", help="text of the whole prompt; no chat template is applied")
    parser.add_argument("--url", default="http://127.0.0.1:6677")
    parser.add_argument("--strength", type=float, default=STRENGTH)
    parser.add_argument("--max-tokens", type=int, default=1024)
    given = parser.parse_args()
    vectors = load_file(Path(__file__).parent / {file!r})
    strength = given.strength
    model = VLLM(MODEL)
    with model.trace(given.prompt, temperature=0.0, max_tokens=given.max_tokens, serve=given.url) as tracer:
        ids = list().save()
        for _ in tracer.all():
{steps}
            ids.append(model.samples.item())
    print(model.tokenizer.decode(ids))


if __name__ == "__main__":
    main()
'''
STEP = """            h = model.{block}.output
            h = h[0] if isinstance(h, tuple) else h
            h[{where}] += strength * vectors["direction.{layer}"].to(h)"""


def write(lm: LM, direction: Direction, out: Path, settings: Settings) -> Path:
    """Write the directory ``out`` with ``steer.py``, ``direction.safetensors`` and ``about.json``. For errors see ``base.steered``."""
    chosen = steered(lm, direction, settings, "nnsight-serve")
    vectors = rows(chosen)
    names = {id(module): name for name, module in lm.model.named_modules()}
    where = WHERE[settings.during]
    steps = [STEP.format(block=_path(names[id(lm.layout.blocks[layer].block)]), where=where, layer=layer) for layer in vectors]
    program = PROGRAM.format(model=lm.name, strength=settings.strength, file=VECTORS, steps="\n".join(steps))
    with store.atomic_directory(out) as partial:
        store.write_tensors({f"direction.{layer}": row for layer, row in vectors.items()}, {"format": "pt"}, partial / VECTORS)
        store.write_text(program, partial / SCRIPT)
        store.write_json(about(lm, "nnsight-serve", settings, chosen, USE), partial / ABOUT)
    return out


def _path(name: str) -> str:
    """Return a module's dotted name as a Python expression: ``model.layers.3`` becomes ``model.layers[3]``."""
    first, *parts = name.split(".")
    return first + "".join(f"[{part}]" if part.isdecimal() else f".{part}" for part in parts)
