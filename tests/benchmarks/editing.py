"""Edit: apply a plan and save the model, over saving alone; size of the adapter that holds the same edit."""

from __future__ import annotations

import tempfile
from pathlib import Path

import torch
from clock import QUICK, Row, median, profile, ratio, start, turns, write
from models import smol, tiny

from toolkit import edits, vectors
from toolkit.lm import LM, load
from toolkit.types import Direction, HeadEdit, Plan


def plan_of(lm: LM) -> Plan:
    """4 % of the heads, one direction."""
    vector = torch.randn(lm.layout.n_layers, lm.layout.d_model, generator=torch.Generator().manual_seed(0))
    direction = Direction(vector, "resid_mid", "think", "by hand", 1, 1, lm.provenance())
    every = [(layer, head) for layer in range(lm.layout.n_layers) for head in range(lm.layout.n_heads)]
    count = max(1, round(0.04 * len(every)))
    chosen = [every[i] for i in torch.randperm(len(every), generator=torch.Generator().manual_seed(1))[:count].tolist()]
    return Plan(tuple(HeadEdit(*at, "project_out", 1.0) for at in chosen), direction, f"{count} heads", lm.provenance())


def rows_of(name: str, lm: LM) -> list[Row]:
    plan = plan_of(lm)
    with tempfile.TemporaryDirectory() as folder:
        places = iter(Path(folder) / str(i) for i in range(1000))
        saved = edits.apply(lm, plan).save(next(places))
        again = load(saved, device=lm.device, tags=lm.tags)
        ids = torch.arange(5, 25, device=lm.device)[None]
        with torch.inference_mode(), edits.RuntimeEdit(plan)(lm):
            expected = lm.model(ids).logits
        with torch.inference_mode():
            far = (again.model(ids).logits - expected).abs().max().item()
        assert far < 1e-3, far
        size = sum(f.stat().st_size for f in vectors.save_adapter(lm, plan, next(places)).rglob("*") if f.is_file())
        weights = sum(f.stat().st_size for f in Path(folder).rglob("adapter*.safetensors"))

        def ours() -> None:
            edits.apply(lm, plan).save(next(places))

        def theirs() -> None:
            where = next(places)
            lm.model.save_pretrained(where)
            lm.tokenizer.save_pretrained(where)

        seconds = turns({"ours": ours, "theirs": theirs})
        where = profile(ours)
    told = f"after saving and loading, largest logit difference to the run-time edit {far:.0e}"
    return [
        Row(f"edit, {name}: edit and save over save_pretrained", *ratio(seconds["ours"], seconds["theirs"]), "<= 1.2", told,
            f"writing the weights ({median(seconds['theirs']) / median(seconds['ours']):.0%} of the time); {where}", f"{median(seconds['ours']):.3f} s"),
        Row(f"edit, {name}: adapter, KB", weights / 1024, None, "<= 20", told,
            f"rank 1 in every layer with an edited head: width + heads x head size numbers per layer; {size / 1024:.1f} KB with its config"),
    ]  # fmt: skip


def main() -> None:
    start()
    rows = rows_of("tiny reasoner", tiny())
    rows += rows_of("SmolLM2", smol()) if not QUICK else []
    write("edit", rows)


if __name__ == "__main__":
    main()
