"""What cannot share our environment: repeng and steering-vectors, run by the interpreter of ``runs/bench/venv``, nothing of the toolkit.

``peers.py capture|steering GIVEN.json DEVICE`` prints one line of JSON: peer -> ratio to raw hooks (capture) or to plain generate
(steering) in this environment, its quartiles, and the gate.
"""

from __future__ import annotations

import contextlib
import io
import json
import sys

import torch
from clock import ratio, start, turns
from transformers import AutoModelForCausalLM, PreTrainedTokenizerFast


def loaded(path: str, device: str):
    # transformers 5 saves a tokenizer's config in a form that transformers 4 does not know.
    with open(f"{path}/tokenizer_config.json") as stream:
        special = {
            key: value for key, value in json.load(stream).items() if key in ("pad_token", "eos_token", "bos_token", "unk_token")
        }
    tokenizer = PreTrainedTokenizerFast(tokenizer_file=f"{path}/tokenizer.json", **special)
    return AutoModelForCausalLM.from_pretrained(path, dtype=torch.float32).to(device).eval(), tokenizer


def quiet(run):
    """A tool's progress bars are not part of its answer."""
    with contextlib.redirect_stderr(io.StringIO()), contextlib.redirect_stdout(io.StringIO()):
        return run()


def capture(given: dict, device: str) -> dict:
    from repeng.extract import batched_get_hiddens
    from steering_vectors import extract_activations

    model, tokenizer = loaded(given["model"], device)
    batch, layers = given["batch"], list(range(model.config.num_hidden_layers))
    texts = sorted(given["texts"], key=lambda text: len(tokenizer(text)["input_ids"]))

    @torch.inference_mode()
    def raw() -> torch.Tensor:
        rows = []
        for at in range(0, len(texts), batch):
            part = tokenizer(texts[at : at + batch], padding=True, return_tensors="pt").to(device)
            mask = part["attention_mask"]
            last = (mask.cumsum(dim=1) * mask).argmax(dim=1)
            kept: list[torch.Tensor] = []

            def hook(module, args, out, kept=kept, last=last):
                value = out[0] if isinstance(out, tuple) else out
                kept.append(value[torch.arange(len(value)), last].cpu())

            handles = [block.register_forward_hook(hook) for block in model.model.layers]
            model.model(**part, use_cache=False)
            for handle in handles:
                handle.remove()
            rows.append(torch.stack(kept, dim=1))
        return torch.cat(rows)

    def repeng() -> torch.Tensor:
        found = quiet(lambda: batched_get_hiddens(model, tokenizer, texts, layers, batch))
        return torch.stack([torch.from_numpy(found[layer]) for layer in layers], dim=1)

    def vectors() -> torch.Tensor:
        # It reads pairs: half of the texts are the positive, half the negative ones.
        half = len(texts) // 2
        pairs = list(zip(texts[:half], texts[half:], strict=True))
        found = extract_activations(model, tokenizer, pairs, batch_size=batch)
        return torch.cat([torch.stack([torch.cat(side[layer]) for layer in layers], dim=1) for side in found])

    expected, told = raw(), {}
    for name, run in (("repeng", repeng), ("steering-vectors", vectors)):
        found = run()
        per_layer = (found - expected).abs().amax(dim=(0, 2)) / expected.abs().amax(dim=(0, 2))
        told[name] = {"gate": per_layer.max().item()}
        if told[name]["gate"] < 1e-4:
            seconds = turns({"theirs": run, "raw": raw})
            told[name]["ratio"], told[name]["spread"] = ratio(seconds["theirs"], seconds["raw"])
        else:
            wrong = [layer for layer in layers if per_layer[layer] >= 1e-4]
            told[name]["why"] = f"differs at layers {wrong} of {len(layers)}"
    return told


def steering(given: dict, device: str) -> dict:
    import numpy as np
    from repeng import ControlModel, ControlVector
    from steering_vectors import SteeringVector

    model, _ = loaded(given["model"], device)
    layer, vector = given["layer"], torch.tensor(given["vector"])
    told: dict[str, dict] = {}

    def generate(target=model, rows: int = 1):
        ids = torch.tensor(given["prompts"][:rows], device=device)
        more = given["new"]
        return target.generate(
            ids, attention_mask=torch.ones_like(ids), do_sample=False, max_new_tokens=more, min_new_tokens=more, pad_token_id=0
        )

    def raw(rows: int):
        handle = model.model.layers[layer].register_forward_hook(
            lambda module, args, out: (out[0] + vector, *out[1:]) if isinstance(out, tuple) else out + vector
        )
        try:
            return generate(rows=rows)
        finally:
            handle.remove()

    def by_vectors(rows: int):
        with SteeringVector({layer: vector}).apply(model):
            return generate(rows=rows)

    def by_repeng(rows: int):
        return generate(controlled, rows)

    for rows in given["batches"]:
        expected = raw(rows)
        found = {"gate": int((by_vectors(rows) != expected).sum())}
        if not found["gate"]:
            seconds = turns({"theirs": lambda rows=rows: by_vectors(rows), "plain": lambda rows=rows: generate(rows=rows)})
            found["ratio"], found["spread"] = ratio(seconds["theirs"], seconds["plain"])
        told[f"steering-vectors|{rows}"] = found
    expected = {rows: raw(rows) for rows in given["batches"]}
    plain = {rows: turns({"plain": lambda rows=rows: generate(rows=rows)})["plain"] for rows in given["batches"]}
    directions = {i: np.zeros(len(given["vector"]), dtype=np.float32) for i in range(model.config.num_hidden_layers)}
    directions[layer] = vector.numpy()
    kind = model.model.layers[layer].attention_type
    controlled = ControlModel(model, [layer])
    # As shipped it fails on Qwen3: the wrapped block lacks what the model asks it for.
    model.model.layers[layer].attention_type = kind
    controlled.set_control(ControlVector("qwen3", directions), 1.0)
    for rows in given["batches"]:
        found = {"gate": int((by_repeng(rows) != expected[rows]).sum())}
        if not found["gate"]:
            # It stays wrapped around the model, so that plain generate cannot take turns with it.
            found["ratio"], found["spread"] = ratio(turns({"theirs": lambda rows=rows: by_repeng(rows)})["theirs"], plain[rows])
        told[f"repeng|{rows}"] = found
    return told


if __name__ == "__main__":
    start()
    with open(sys.argv[2]) as stream:
        found = {"capture": capture, "steering": steering}[sys.argv[1]](json.load(stream), sys.argv[3])
    print(json.dumps(found))
