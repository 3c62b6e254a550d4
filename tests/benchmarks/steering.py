"""Steering: what a vector added at one block costs for each generated token, everywhere or while thinking only."""

from __future__ import annotations

import json

import torch
from clock import DEVICE, OUT, QUICK, Row, apart, median, profile, ratio, start, turns, write
from models import MIDDLE, middle, middle_path, tiny

from toolkit import bridges, edits
from toolkit import lm as lms
from toolkit.generate import Sampling, rollouts
from toolkit.lm import LM, Condition
from toolkit.types import Direction, Problem

BATCHES = (8,) if QUICK else (1, 8, 64)
NEW = 24 if QUICK else 64
PROMPT = 64
TURNS = 3 if QUICK else 5  # of the longest; shorter ones take more, as noise weighs more in them
CHECKED = 8  # rows of a batch whose tokens are computed by whole passes, which are slow


def direction_of(lm: LM, layer: int) -> Direction:
    vector = torch.zeros(lm.layout.n_layers, lm.layout.d_model)
    vector[layer] = torch.randn(lm.layout.d_model, generator=torch.Generator().manual_seed(0))
    return Direction(vector, "resid_post", "think", "by hand", 1, 1, lm.provenance())


def prompts(lm: LM, rows: int) -> torch.Tensor:
    draws = torch.Generator().manual_seed(1)
    ids = torch.randint(5, lm.vocab_size, (rows, PROMPT), generator=draws)
    ids[:, -1] = lm.tokenizer.convert_tokens_to_ids("<think>")
    return ids.to(lm.device)


def generate(lm: LM, ids: torch.Tensor, new: int = NEW) -> torch.Tensor:
    return lm.model.generate(
        ids, attention_mask=torch.ones_like(ids), do_sample=False, max_new_tokens=new, min_new_tokens=new, pad_token_id=0
    )


def by_hand(lm: LM, ids: torch.Tensor, layer: int, v: torch.Tensor) -> torch.Tensor:
    """Everywhere, by a raw hook."""
    handle = lm.layout.blocks[layer].block.register_forward_hook(
        lambda module, args, out: (out[0] + v, *out[1:]) if isinstance(out, tuple) else out + v
    )
    try:
        return generate(lm, ids)
    finally:
        handle.remove()


def thinking_by_hand(lm: LM, ids: torch.Tensor, layer: int, v: torch.Tensor) -> torch.Tensor:
    """While thinking, by a loop of whole passes: slow, and says where the vector acts in every one of them."""
    close = lm.tokenizer.convert_tokens_to_ids("</think>")
    for _ in range(NEW):
        where = torch.zeros(ids.shape, dtype=torch.bool, device=ids.device)
        where[:, PROMPT - 1 :] = (ids[:, PROMPT - 1 :] == close).cumsum(dim=1) == 0
        handle = lm.layout.blocks[layer].block.register_forward_hook(
            lambda module, args, out, where=where: (out + where[..., None] * v) if torch.is_tensor(out) else out
        )
        try:
            with torch.inference_mode():
                logits = lm.model(input_ids=ids, use_cache=False).logits[:, -1]
        finally:
            handle.remove()
        logits = logits.clone().index_fill_(
            1, torch.tensor(sorted(lm.eos_ids), device=ids.device), -torch.inf
        )  # as min_new_tokens does
        ids = torch.cat([ids, logits.argmax(dim=-1, keepdim=True)], dim=1)
    return ids


def own_decoding(lm: LM, during, rows: int) -> object:
    """Our sampling, every response as long as its budget."""
    endless = lms.wrap(lm.model, lm.tokenizer, name=lm.name, tags=lm.tags)
    endless.__dict__["eos_ids"] = frozenset({10**9})
    endless.__dict__["fingerprint"] = lm.fingerprint
    asked = [Problem("p", ({"role": "user", "content": "17+5-9+23=?"},), "36")]
    return rollouts(Condition(endless, during), asked, Sampling(n=rows, max_new_tokens=NEW), progress=False)


def rows_of(name: str, lm: LM, layer: int, repeats: dict[int, int]) -> list[Row]:
    """``repeats``: turns by batch."""
    vector, rows = direction_of(lm, layer), []
    v = vector.vector[layer].to(lm.device)
    for batch in BATCHES:
        ids, times = prompts(lm, batch), TURNS if QUICK else repeats[batch]
        acts = {during: edits.steering(vector, 1.0, layers=[layer], during=during) for during in ("all", "think")}
        expected = {"all": by_hand(lm, ids, layer, v), "think": thinking_by_hand(lm, ids[:CHECKED], layer, v)}

        def steered(during: str, ids=ids, acts=acts) -> torch.Tensor:
            with acts[during](lm):
                return generate(lm, ids)

        wrong = {during: int((steered(during)[: len(tokens)] != tokens).sum()) for during, tokens in expected.items()}
        seconds = turns(
            {
                "plain": lambda ids=ids: generate(lm, ids),
                "raw hook": lambda ids=ids: by_hand(lm, ids, layer, v),
                **{during: lambda during=during: steered(during) for during in acts},
            },
            times,
        )
        works = {"unsteered": (), **{during: (act,) for during, act in acts.items()}}
        own = turns(
            {key: lambda during=during, batch=batch: own_decoding(lm, during, batch) for key, during in works.items()}, times
        )
        for during in acts:
            # What is beyond a vector added everywhere is knowing where a response thinks.
            more = [1000 * (median(found[during]) - median(found["all"])) / NEW for found in (seconds, own)]
            phases, own_phases = (f"; following phases {ms:.2f} ms per step" if during == "think" else "" for ms in more)
            gate = f"tokens that differ from a raw hook: {wrong[during]} of {len(expected[during]) * NEW}"
            rows.append(
                Row(
                    f"steering, {name}, batch {batch}, {during}: generate, steered over unsteered", *ratio(seconds[during], seconds["plain"]),
                    "<= 1.03", gate, f"the model's pass{phases}; {profile(lambda during=during: steered(during))}",
                    f"raw hook over plain {ratio(seconds['raw hook'], seconds['plain'])[0]:.3f}; {1000 * min(seconds['plain']) / NEW:.1f} ms per step",
                )
            )  # fmt: skip
            rows.append(
                Row(
                    f"steering, {name}, batch {batch}, {during}: our decoding, steered over unsteered", *ratio(own[during], own["unsteered"]),
                    "<= 1.03", gate, f"the model's pass{own_phases}", f"{1000 * min(own['unsteered']) / NEW:.1f} ms per step",
                )
            )  # fmt: skip
    return rows


def peers_here(lm: LM, layer: int) -> list[Row]:
    """TransformerLens and nnsight, steering everywhere, over plain generate."""
    rows, v = [], direction_of(lm, layer).vector[layer].to(lm.device)
    bridge, sight = bridges.to_transformer_lens(lm), bridges.to_nnsight(lm)
    for batch in BATCHES[:2]:
        ids = prompts(lm, batch)
        expected = by_hand(lm, ids, layer, v)

        def lens(ids=ids) -> torch.Tensor:
            with bridge.hooks(fwd_hooks=[(f"blocks.{layer}.hook_resid_post", lambda value, hook: value + v)]):
                return bridge.generate(
                    ids, max_new_tokens=NEW, do_sample=False, stop_at_eos=False, return_type="tokens", verbose=False
                )

        def traced(ids=ids) -> torch.Tensor:
            with sight.generate(
                {"input_ids": ids, "attention_mask": torch.ones_like(ids)}, do_sample=False, max_new_tokens=NEW, min_new_tokens=NEW,
                pad_token_id=0,
            ) as tracer:  # fmt: skip
                with tracer.iter[:NEW]:  # what follows an unbounded tracer.all() is not run
                    block = sight.model.layers[layer]
                    block.output = block.output + v
                out = tracer.result.save()
            return out

        for name, run in (("TransformerLens bridge", lens), ("nnsight", traced)):
            try:
                found = run()
                same = min(found.shape[1], expected.shape[1])
                wrong = int((found[:, :same] != expected[:, :same]).sum())
            except Exception as error:  # noqa: BLE001
                rows.append(
                    Row(
                        f"steering, {MIDDLE}, batch {batch}, all: {name}",
                        None,
                        None,
                        None,
                        f"FAILED: {type(error).__name__}: {str(error)[:120]}",
                        "",
                    )
                )
                continue
            gate = f"tokens that differ from a raw hook: {wrong} of {batch * NEW}"
            if wrong:
                rows.append(Row(f"steering, {MIDDLE}, batch {batch}, all: {name}", None, None, None, f"FAILED: {gate}", ""))
                continue
            seconds = turns({"theirs": run, "plain": lambda ids=ids: generate(lm, ids)}, TURNS)
            rows.append(
                Row(
                    f"steering, {MIDDLE}, batch {batch}, all: {name} over plain generate",
                    *ratio(seconds["theirs"], seconds["plain"]),
                    None,
                    gate,
                    "",
                )
            )
    return rows


def peers_apart(lm: LM, layer: int) -> list[Row]:
    """repeng and steering-vectors, in their own environment."""
    python = OUT / "venv" / "bin" / "python"
    if not python.exists():
        return [Row("steering: repeng, steering-vectors", None, None, None, "not available: no peers' environment", "")]
    given = OUT / "steering.json"
    vector = direction_of(lm, layer).vector[layer].tolist()
    told = {
        "model": str(middle_path()), "layer": layer, "vector": vector, "new": NEW,
        "prompts": prompts(lm, max(BATCHES[:2])).tolist(), "batches": BATCHES[:2],
    }  # fmt: skip
    given.write_text(json.dumps(told))
    rows = []
    try:
        found = apart("peers.py", "steering", str(given), str(DEVICE), python=str(python))
    except RuntimeError as error:
        return [Row("steering: repeng, steering-vectors", None, None, None, f"not available: {str(error)[-160:]}", "")]
    for name, row in found.items():
        peer, batch = name.split("|")
        gate = f"tokens that differ from a raw hook: {row['gate']}"
        value = (row["ratio"], tuple(row["spread"])) if "ratio" in row else (None, None)
        rows.append(
            Row(f"steering, {MIDDLE}, batch {batch}, all: {peer} over plain generate", *value, None, gate if "ratio" in row else f"FAILED: {gate}",
                "plain generate in its own environment (transformers 4)")
        )  # fmt: skip
    return rows


def main() -> None:
    start()
    large = middle()
    rows = rows_of(MIDDLE, large, 6, {1: 15, 8: 9, 64: TURNS}) + rows_of("tiny reasoner", tiny(), 2, {1: 61, 8: 61, 64: 21})
    rows += peers_here(large, 6) + peers_apart(large, 6)
    write("steering", rows)


if __name__ == "__main__":
    main()
