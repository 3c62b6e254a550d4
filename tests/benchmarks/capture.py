"""Capture: the residual stream after every block, at the last token or as the mean over a span. Each tool by its documented idiom.

Tools of this environment (TransformerLens, nnsight) run here; repeng and steering-vectors in an environment of their own
(``peers.py``), each beside raw hooks *there*: what is reported is always a ratio to raw hooks of the same environment.
"""

from __future__ import annotations

import json

import torch
from clock import DEVICE, OUT, QUICK, Row, apart, median, profile, ratio, start, turns, write
from models import MIDDLE, middle, middle_path, traces

from toolkit import bridges, collect, decode
from toolkit.collect import MLP, Positions
from toolkit.lm import LM
from toolkit.types import Rollout

LAST = Positions("last", lambda r: [len(r.token_ids) - 1])
N, BATCH = (8, 8) if QUICK else (32, 16)
TURNS = 3 if QUICK else 5


def chunks(found: list[Rollout]) -> list[list[Rollout]]:
    ordered = sorted(found, key=lambda r: len(r.token_ids))
    return [ordered[i : i + BATCH] for i in range(0, len(ordered), BATCH)]


def taken(value: torch.Tensor, batch: list[Rollout], mean: bool) -> torch.Tensor:
    """The rows of a batch out of ``[batch, seq, width]``, right padded."""
    if not mean:
        return torch.stack([value[i, len(r.token_ids) - 1] for i, r in enumerate(batch)])
    spans = [r.think.predictors() for r in batch]
    return torch.stack([value[i, s.start : s.stop].mean(dim=0) for i, s in enumerate(spans)])


@torch.inference_mode()
def raw(lm: LM, batches: list[list[Rollout]], mean: bool) -> torch.Tensor:
    """Forward hooks on the blocks, nothing else."""
    found: dict[int, list[torch.Tensor]] = {layer: [] for layer in range(lm.layout.n_layers)}
    for batch in batches:
        ids = collect.pad_right([r.token_ids for r in batch], lm)

        def hook(layer: int, batch=batch):
            return lambda module, args, out: found[layer].append(
                taken(out[0] if isinstance(out, tuple) else out, batch, mean).cpu()
            )

        handles = [b.block.register_forward_hook(hook(i)) for i, b in enumerate(lm.layout.blocks)]
        lm.model.base_model(input_ids=ids, use_cache=False)
        for handle in handles:
            handle.remove()
    return torch.stack([torch.cat(found[layer]) for layer in found], dim=1)


def ours(lm: LM, found: list[Rollout], mean: bool) -> torch.Tensor:
    return collect.states(lm, found, MLP, positions=collect.THINK if mean else LAST).values


@torch.inference_mode()
def transformer_lens(bridge, lm: LM, batches: list[list[Rollout]], mean: bool) -> torch.Tensor:
    names = [f"blocks.{layer}.hook_resid_post" for layer in range(lm.layout.n_layers)]
    rows = []
    for batch in batches:
        ids = collect.pad_right([r.token_ids for r in batch], lm)
        _, cache = bridge.run_with_cache(ids, names_filter=lambda name: name in names, return_type=None)
        rows.append(torch.stack([taken(cache[name], batch, mean) for name in names], dim=1).cpu())
    return torch.cat(rows)


def nnsight(model, lm: LM, batches: list[list[Rollout]], mean: bool) -> torch.Tensor:
    rows = []
    for batch in batches:
        ids = collect.pad_right([r.token_ids for r in batch], lm)
        with torch.no_grad(), model.trace({"input_ids": ids}):
            kept = []
            for block in model.model.layers:
                value = block.output
                kept.append(taken(value, batch, mean))
            kept = torch.stack(kept, dim=1).save()
        rows.append(kept.cpu())
    return torch.cat(rows)


def main() -> None:
    start()
    lm, rows = middle(), []
    found = traces(lm, N)
    bridge, sight = bridges.to_transformer_lens(lm), bridges.to_nnsight(lm)
    theirs = chunks(found)
    same = list(decode.batches(sorted(found, key=lambda r: len(r.token_ids)), lambda r: len(r.token_ids), collect.batch_tokens(lm)))
    order = {id(r): i for i, r in enumerate(found)}
    back = torch.tensor([order[id(r)] for batch in theirs for r in batch])
    for mean in (False, True):
        what = "span mean" if mean else "last token"
        expected = raw(lm, theirs, mean)
        scale = expected.abs().max()
        work = {"raw": lambda mean=mean: raw(lm, same, mean), "ours": lambda mean=mean: ours(lm, found, mean)}
        gates = {"ours": ((ours(lm, found, mean)[back] - expected).abs().max() / scale).item()}
        peers = {"TransformerLens bridge": (transformer_lens, bridge), "nnsight": (nnsight, sight)}
        for name, (run, model) in peers.items():
            gates[name] = ((run(model, lm, theirs, mean) - expected).abs().max() / scale).item()
            if gates[name] < 1e-4:
                work[name] = lambda run=run, model=model, mean=mean: run(model, lm, theirs, mean)
        seconds = turns(work, TURNS)
        assert gates["ours"] < 1e-4, gates
        rows.append(
            Row(
                f"capture, {what}: over raw hooks on the same batches", *ratio(seconds["ours"], seconds["raw"]), "<= 1.05",
                f"largest relative difference to raw hooks {gates['ours']:.0e}",
                f"the forward pass; {profile(lambda mean=mean: ours(lm, found, mean))}", f"{median(seconds['ours']):.2f} s, {N} traces, {MIDDLE}",
            )
        )  # fmt: skip
        for name in peers:
            told = f"largest relative difference to raw hooks {gates[name]:.0e}"
            beside = ratio(seconds[name], seconds["ours"]) if name in seconds else (None, None)
            rows.append(
                Row(f"capture, {what}: {name} over ours", *beside, None, told if name in seconds else f"FAILED: {told}", "")
            )
    rows += venv_rows(lm, found)
    write("capture", rows)


def venv_rows(lm: LM, found: list[Rollout]) -> list[Row]:
    """repeng and steering-vectors, in their environment, over raw hooks there."""
    python = OUT / "venv" / "bin" / "python"
    if not python.exists():
        return [Row("capture, last token: repeng, steering-vectors", None, None, None, "not available: no peers' environment", "")]
    given = OUT / "capture.json"
    # Text, since both tools tokenize: what a tool reads is what its own tokenizer makes of it, and the gate sees that.
    texts = [lm.text(r.token_ids) for r in found]
    given.write_text(json.dumps({"model": str(middle_path()), "texts": texts, "batch": BATCH}))
    try:
        told = apart("peers.py", "capture", str(given), str(DEVICE), python=str(python))
    except RuntimeError as error:
        return [Row("capture, last token: repeng, steering-vectors", None, None, None, f"not available: {str(error)[-160:]}", "")]
    rows = []
    for name, row in told.items():
        passed = row["gate"] is not None and row["gate"] < 1e-4
        gate = row.get("error") or f"largest relative difference to raw hooks {row['gate']:.0e}"
        where = "ratio to raw hooks in its own environment (transformers 4)" + ("" if passed else f"; {row.get('why', '')}")
        value = (row["ratio"], tuple(row["spread"])) if passed else (None, None)
        rows.append(Row(f"capture, last token: {name} over raw hooks", *value, None, gate if passed else f"FAILED: {gate}", where))
    return rows


if __name__ == "__main__":
    main()
