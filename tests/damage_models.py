"""Damages of a model directory, and what loading one may do: refuse in a sentence, or compute what the undamaged model computes.

``python tests/damage_models.py --all --report models.json`` (``make torture``) makes a hundred of them, each in a process of its own,
prints what became of each, and exits with 1 if anything is wrong.
"""

from __future__ import annotations

import argparse
import json
import random
import shutil
import struct
import tempfile
import time
from collections import Counter
from collections.abc import Callable
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

import torch
import torture
from safetensors.torch import load_file, save_file

from toolkit import lm as lms
from toolkit.lm import LM

SLOWEST, LONGEST = 20.0, 400  # seconds until a refusal, and its characters
HANGS = 90.0  # seconds after which a process is ended
MESSAGES = ({"role": "user", "content": "12+3=?"},)
Damage = Callable[[Path, random.Random], None]


# --- how files are damaged -----------------------------------------------------------------------------------


def edit_json(name: str, change: Callable[[dict], Any]) -> Damage:
    def damage(path: Path, rng: random.Random) -> None:
        value = json.loads((path / name).read_text())
        value = change(value) or value
        (path / name).write_text(json.dumps(value))

    return damage


def put(name: str, key: str, value: Any) -> Damage:
    return edit_json(name, lambda found: {**found, key: value})


def drop(name: str, key: str) -> Damage:
    return edit_json(name, lambda found: {k: v for k, v in found.items() if k != key})


def write(name: str, content: str | bytes) -> Damage:
    def damage(path: Path, rng: random.Random) -> None:
        (path / name).write_bytes(content.encode() if isinstance(content, str) else content)

    return damage


def remove(name: str) -> Damage:
    return lambda path, rng: (path / name).unlink()


def truncate(name: str) -> Damage:
    def damage(path: Path, rng: random.Random) -> None:
        content = (path / name).read_bytes()
        (path / name).write_bytes(content[: rng.randrange(1, len(content) - 1)])

    return damage


def garble(name: str) -> Damage:
    def damage(path: Path, rng: random.Random) -> None:
        content = (path / name).read_bytes()
        (path / name).write_bytes(bytes(rng.randrange(256) for _ in content))

    return damage


def tensors(change: Callable[[dict[str, torch.Tensor], str, random.Random], None]) -> Damage:
    def damage(path: Path, rng: random.Random) -> None:
        found = load_file(path / "model.safetensors")
        change(found, rng.choice(sorted(found)), rng)
        save_file(found, path / "model.safetensors", metadata={"format": "pt"})

    return damage


def header(change: Callable[[dict], Any], *, length: int | None = None, size: int | None = None) -> Damage:
    """Change the header of the weights' file; ``size`` makes the file that long without writing it (sparse)."""

    def damage(path: Path, rng: random.Random) -> None:
        content = (path / "model.safetensors").read_bytes()
        end = 8 + struct.unpack("<Q", content[:8])[0]
        found = json.loads(content[8:end])
        text = json.dumps(change(found) or found).encode()
        start = struct.pack("<Q", len(text) if length is None else length)
        (path / "model.safetensors").write_bytes(start + text + content[end:])
        if size is not None:
            with (path / "model.safetensors").open("r+b") as file:
                file.truncate(size)

    return damage


def sharded(change: Callable[[dict[str, str], Path], Any]) -> Damage:
    """The weights in two files with an index, whose ``weight_map`` is changed; the file with all of them is moved out of the directory,
    and ``change`` is told where to."""

    def damage(path: Path, rng: random.Random) -> None:
        found = load_file(path / "model.safetensors")
        names = sorted(found)
        halves = {
            "model-00001-of-00002.safetensors": names[: len(names) // 2],
            "model-00002-of-00002.safetensors": names[len(names) // 2 :],
        }
        for name, keys in halves.items():
            save_file({key: found[key] for key in keys}, path / name, metadata={"format": "pt"})
        moved = path.parent / f"{path.name}-outside.safetensors"
        shutil.move(path / "model.safetensors", moved)
        weight_map = {key: name for name, keys in halves.items() for key in keys}
        new = change(weight_map, moved)
        (path / "model.safetensors.index.json").write_text(
            json.dumps({"metadata": {}, "weight_map": weight_map if new is None else new})
        )

    return damage


def _first(found: dict, value: Any) -> dict:
    return {**found, min(found): value}


def _tensor_of(found: dict) -> dict:
    return found[min(key for key in found if key != "__metadata__")]


TEMPLATE = "chat_template.jinja"
CONFIG, GENERATION, TOKENIZER, TOKENS = "config.json", "generation_config.json", "tokenizer_config.json", "tokenizer.json"
LOOP = "{% for a in range(99999) %}{% for b in range(99999) %}{% endfor %}{% endfor %}"
DOUBLING = "{% set n = namespace(s='x') %}{% for i in range(40) %}{% set n.s = n.s ~ n.s %}{% endfor %}{{ n.s }}"
ODD = (None, "32", -1, 0, 3.5, [], {}, True, 10**9)


def damages() -> dict[str, Damage]:
    """Every kind of damage, by a name that says what it is."""
    found: dict[str, Damage] = {}
    for name in (CONFIG, GENERATION, TOKENIZER, TOKENS, TEMPLATE, "model.safetensors"):
        found |= {f"{name} truncated": truncate(name), f"{name} garbled": garble(name), f"{name} empty": write(name, "")}
    for name in (CONFIG, TOKENS, "model.safetensors"):
        found[f"{name} missing"] = remove(name)
    for name in (CONFIG, GENERATION, TOKENIZER, TOKENS):
        found |= {
            f"{name} is a list": write(name, "[]"),
            f"{name} is a text": write(name, '"x"'),
            f"{name} is {{}}": write(name, "{}"),
        }
    for key in ("hidden_size", "num_hidden_layers", "num_attention_heads", "vocab_size", "max_position_embeddings", "rms_norm_eps"):
        for value in ODD:
            if not (key == "max_position_embeddings" and value in (None, 10**9)) and not (
                key == "rms_norm_eps" and value in (0, True, 3.5, 10**9, -1)
            ):
                found[f"{key} = {value!r}"] = put(CONFIG, key, value)
    for key, value in (
        ("hidden_act", "nonsense"), ("hidden_act", 5), ("model_type", "nonsense"), ("model_type", None), ("rope_parameters", "x"),
        ("rope_parameters", {"rope_type": "nonsense"}), ("tie_word_embeddings", "x"), ("quantization_config", {"quant_method": "nonsense"}),
        ("num_key_value_heads", 3), ("head_dim", 7), ("intermediate_size", 1), ("torch_dtype", "nonsense"), ("layer_types", ["x"]),
        ("auto_map", {"AutoModelForCausalLM": "evil.M"}), ("eos_token_id", "x"), ("attention_bias", True),
    ):  # fmt: skip
        found[f"{key} = {value!r}"] = put(CONFIG, key, value)
    found |= {f"no {key}": drop(CONFIG, key) for key in ("model_type", "vocab_size", "hidden_size", "num_hidden_layers")}
    for value in ("x", 10**6, -1, [], [4, "x"]):
        found[f"generation eos_token_id = {value!r}"] = put(GENERATION, "eos_token_id", value)
    for key, value in (
        ("eos_token", 17),
        ("tokenizer_class", "Nonsense"),
        ("pad_token", "never seen"),
        ("added_tokens_decoder", []),
    ):
        found[f"tokenizer {key} = {value!r}"] = put(TOKENIZER, key, value)
    for key in ("model", "added_tokens", "decoder", "version"):
        found[f"tokenizer.json: {key} = 5"] = put(TOKENS, key, 5)
    found["tokenizer.json of many tokens"] = edit_json(TOKENS, _more_tokens)
    for name, text in (
        ("loops", LOOP), ("doubles", DOUBLING), ("asks for gigabytes", "{{ 'x' * 10**10 }}{{ messages[0].content }}"), ("no user", "hello"),
        ("unclosed", "{% if x %}"), ("unknown filter", "{{ messages | nonsense }}"), ("refuses", "{{ raise_exception('no') }}"),
        ("of another language", "<?php echo 1 ?>"), ("endless macro", "{% macro f() %}{{ f() }}{% endmacro %}{{ f() }}"),
        ("looks into Python", "{{ messages.__class__.__mro__ }}{{ ''.__class__.__mro__[1].__subclasses__() }}"),
    ):  # fmt: skip
        found[f"template {name}"] = write(TEMPLATE, text)
    found |= {
        "weight missing": tensors(lambda t, k, rng: t.pop(k)),
        "weight too many": tensors(lambda t, k, rng: t.update({"model.layers.9.mlp.down_proj.weight": torch.ones(3)})),
        "weight renamed": tensors(lambda t, k, rng: t.update({k + "x": t.pop(k)})),
        "weight reshaped": tensors(lambda t, k, rng: t.update({k: t[k].flatten()[:-1].clone()})),
        "weight of integers": tensors(lambda t, k, rng: t.update({k: t[k].to(torch.int8)})),
        "weight of booleans": tensors(lambda t, k, rng: t.update({k: t[k] > 0})),
        "weight empty": tensors(lambda t, k, rng: t.update({k: t[k].flatten()[:0].clone()})),
        "weight of NaN": tensors(lambda t, k, rng: t[k].flatten().__setitem__(0, torch.nan)),
        "weight infinite": tensors(lambda t, k, rng: t[k].flatten().__setitem__(0, torch.inf)),
        "weight huge": tensors(lambda t, k, rng: t[k].fill_(3e38)),
        "weight in double": tensors(lambda t, k, rng: t.update({k: t[k].double()})),
        "no weight at all": tensors(lambda t, k, rng: t.clear()),
        "header longer than the file": header(lambda h: h, length=10**15),
        "header cut": header(lambda h: h, length=20),
        "header in a sparse file": header(lambda h: h, size=2**36),
        "header of terabytes": header(lambda h: _tensor_of(h).update(data_offsets=[0, 2**42])),
        "header with a huge shape": header(lambda h: _tensor_of(h).update(shape=[2**40])),
        "header with a negative offset": header(lambda h: _tensor_of(h).update(data_offsets=[-8, 8])),
        "header with an unknown type": header(lambda h: _tensor_of(h).update(dtype="F12")),
        "header is a list": header(lambda h: [1]),
        "shards": sharded(lambda m, moved: None),
        "shard missing": sharded(lambda m, moved: _first(m, "model-00003-of-00002.safetensors")),
        "shard outside, relative": sharded(lambda m, moved: _first(m, f"../{moved.name}")),
        "shard outside, absolute": sharded(lambda m, moved: _first(m, str(moved))),
        "shard is a number": sharded(lambda m, moved: _first(m, 5)),
        "shard is the directory": sharded(lambda m, moved: _first(m, ".")),
        "index is empty": sharded(lambda m, moved: {}),
        "index is a list": sharded(lambda m, moved: list(m)),
        "index leaves a file out": sharded(lambda m, moved: {k: v for k, v in m.items() if "00001" in v}),
    }
    return found


def _more_tokens(found: dict) -> dict:
    vocab = found["model"].get("vocab")
    if isinstance(vocab, dict):
        vocab |= {f"extra {i}": len(vocab) + i for i in range(500)}
    found["added_tokens"] += [{**found["added_tokens"][0], "id": 5000, "content": "<extra>"}]
    return found


# --- what loading one may do ---------------------------------------------------------------------------------


@dataclass(frozen=True)
class Outcome:
    """What became of a damaged directory: ``refused`` or ``harmless``, else what is wrong with it."""

    name: str
    verdict: str
    said: str
    seconds: float

    @property
    def right(self) -> bool:
        return self.verdict in ("refused", "harmless")


SAYS = {name: "a file outside its directory" for name in ("shard outside, relative", "shard outside, absolute")}
"""What a refusal has to say, where another reason would hide that the damage was not seen."""


@torch.inference_mode()
def computed(lm: LM) -> tuple[torch.Tensor, list[int], frozenset[int], str]:
    """What must stay as it is: logits, a prompt, the tokens that end a response, and the text of all tokens."""
    ids = lm.prompt_ids(MESSAGES)
    return lm.model(input_ids=torch.tensor([ids])).logits, ids, lm.eos_ids, lm.text(range(lm.vocab_size))


def judged(name: str, damage: Damage, source: Path, folder: Path, wanted: tuple, seed: int = 0) -> Outcome:
    """Damage a copy of a directory, load it, and judge by the oracle."""
    path = folder / "".join(c if c.isalnum() else "-" for c in name)[:60]
    shutil.copytree(source, path)
    damage(path, random.Random(f"{seed}-{name}"))
    began = time.perf_counter()
    verdict, said = "harmless", ""
    try:
        found = computed(lms.load(path, device="cpu"))
        if found[1:] != wanted[1:] or not torch.equal(found[0], wanted[0]):
            verdict = "accepted, and computes something else"
    except (ValueError, OSError, ImportError) as error:  # what the command line prints as one line
        said, verdict = str(error), "refused"
        if SAYS.get(name, "") not in said:
            verdict = "refused for another reason"
        elif not isinstance(error, lms.UnsupportedModelError | lms.checkpoints.store.StoreError | FileNotFoundError):
            verdict = f"refused with {type(error).__name__}"
        elif len(said) > LONGEST or "\n" in said:
            verdict = f"refused in {len(said)} characters"
    except BaseException as error:  # noqa: BLE001  # whatever comes is an outcome
        said, verdict = str(error)[:300], f"traceback: {type(error).__name__}"
    finally:
        shutil.rmtree(path, ignore_errors=True)
    seconds = time.perf_counter() - began
    return Outcome(name, verdict if seconds < SLOWEST else f"{verdict}, after {seconds:.0f} s", said, seconds)


def alone(name: str, damage: Damage, source: Path, folder: Path, wanted: tuple, seed: int = 0) -> Outcome:
    """:func:`judged` in a process of its own, which is ended if it hangs."""
    answer, log = folder / "outcome.json", folder / "log"
    answer.unlink(missing_ok=True)

    def work() -> int:
        answer.write_text(json.dumps(asdict(judged(name, damage, source, folder, wanted, seed))))
        return 0

    status, seconds = torture.forked(work, log, timeout=HANGS)
    if answer.exists():
        return Outcome(**json.loads(answer.read_text()))
    return Outcome(
        name, f"hangs for {seconds:.0f} s" if status == 1000 else f"the process ends with {status}", log.read_text()[-300:], seconds
    )


def run(source: Path, folder: Path, names: list[str], seed: int = 0) -> list[Outcome]:
    """Judge some damages of an undamaged directory."""
    torch.set_num_threads(1)  # a process is forked for each of them: this one must stay free of threads
    wanted, kinds = computed(lms.load(source, device="cpu")), damages()
    return [alone(name, kinds[name], source, folder, wanted, seed) for name in names]


def figures(outcomes: list[Outcome]) -> dict[str, Any]:
    """What a report says."""
    wrong = [asdict(outcome) for outcome in outcomes if not outcome.right]
    return {
        "damages": len(outcomes),
        "verdicts": dict(Counter(o.verdict for o in outcomes)),
        "slowest": max(o.seconds for o in outcomes),
        "wrong": wrong,
    }


def main() -> None:
    """Judge, print, and exit with 1 if anything was wrong."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--all", action="store_true", help="all of them, not twelve")
    parser.add_argument("--report", type=Path, help="file for the figures, as JSON")
    given = parser.parse_args()
    every = list(damages())
    with tempfile.TemporaryDirectory() as folder:
        outcomes = run(lms.tiny_reasoner_path(), Path(folder), every if given.all else random.Random(0).sample(every, 12))
    for outcome in outcomes:
        print(f"{'' if outcome.right else 'WRONG '}{outcome.name}: {outcome.verdict} ({outcome.seconds:.1f} s) {outcome.said}")
    found = figures(outcomes)
    print({name: value for name, value in found.items() if name != "wrong"})
    if given.report:
        given.report.write_text(json.dumps(found, indent=1) + "\n")
    raise SystemExit(bool(found["wrong"]))


if __name__ == "__main__":
    main()
