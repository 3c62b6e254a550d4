"""Collect: directions at two sites and all head scores, beside a bare forward pass (the limit) and the published way."""

from __future__ import annotations

import torch
from clock import QUICK, Row, apart, median, profile, ratio, start, turns, write
from models import LARGE, MIDDLE, by_parity, large, middle, tiny, traces

from toolkit import collect, decode, hooks
from toolkit.collect import ATTN, MLP
from toolkit.lm import LM
from toolkit.methods import thinkedit
from toolkit.sites import Site
from toolkit.types import Rollout


def ours(lm: LM, found: list[Rollout]):
    moments = collect.moments(lm, found, by_parity)
    attn, mlp = (thinkedit.direction(moments, kind) for kind in (ATTN, MLP))
    return attn, mlp, thinkedit.head_scores(moments, attn, lm)


def in_batches(lm: LM, found: list[Rollout], run) -> None:
    """The very batches that collect makes."""
    ordered = sorted(found, key=lambda r: len(r.token_ids))
    for batch in decode.batches(ordered, lambda r: len(r.token_ids), collect.batch_tokens(lm)):
        with torch.inference_mode():
            run(collect.pad_right([r.token_ids for r in batch], lm))


def bare(lm: LM, found: list[Rollout]) -> None:
    in_batches(lm, found, lambda ids: lm.model.base_model(input_ids=ids, use_cache=False))


def with_logits(lm: LM, found: list[Rollout]) -> None:
    in_batches(lm, found, lambda ids: lm.model(input_ids=ids, use_cache=False))


@torch.inference_mode()
def published(lm: LM, found: list[Rollout]):
    """Re-typed from the formulas: one trace at a time, a pass for each site, each head's output formed as [tokens, heads, d_model]."""
    layout, means, contributions = lm.layout, {}, []
    for kind in (ATTN, MLP):
        sites = [Site(kind, layer) for layer in range(layout.n_layers)]
        per_class: dict[str, list[torch.Tensor]] = {"long": [], "short": []}
        for r in found:
            ids, where = torch.tensor([r.token_ids], device=lm.device), r.think.predictors()
            with hooks.record(layout, sites) as values:
                lm.model(input_ids=ids)
            per_class[by_parity(r)].append(
                torch.stack([values[s][0, where.start : where.stop].double().mean(dim=0) for s in sites])
            )
        means[kind] = torch.stack(per_class["long"]).mean(dim=0) - torch.stack(per_class["short"]).mean(dim=0)
    towards = -means[ATTN] / means[ATTN].norm(dim=-1, keepdim=True)
    for r in found:
        if by_parity(r) != "short":
            continue
        ids, where = torch.tensor([r.token_ids], device=lm.device), r.think.predictors()
        sites = [Site("z", layer) for layer in range(layout.n_layers)]
        with hooks.record(layout, sites) as values:
            lm.model(input_ids=ids)
        score = []
        for site in sites:
            z = values[site][0, where.start : where.stop].unflatten(-1, (layout.n_heads, layout.head_dim))
            W = layout.W_O(site.layer).detach().unflatten(1, (layout.n_heads, layout.head_dim))
            written = torch.einsum("thd,mhd->thm", z, W)
            score.append(written.mean(dim=0).double() @ towards[site.layer].to(written.device))
        contributions.append(torch.stack(score))
    return means[ATTN], means[MLP], torch.stack(contributions).mean(dim=0)


def gate(lm: LM, found: list[Rollout]) -> str:
    a, b = ours(lm, found), published(lm, found)
    worst = max(
        ((x - y.cpu()).abs().max() / y.abs().max()).item() for x, y in zip((a[0].vector, a[1].vector, a[2].score), b, strict=True)
    )
    assert worst < 1e-4, worst
    return f"against the published formulas, written again: largest relative difference {worst:.0e}"


def rows_of(name: str, lm: LM, n: int, aim: float) -> list[Row]:
    found = traces(lm, n)
    passed = gate(lm, found[:16])
    seconds = turns({"ours": lambda: ours(lm, found), "bare": lambda: bare(lm, found)})
    limit = ratio(seconds["ours"], seconds["bare"])
    where = profile(lambda: ours(lm, found))
    beside = turns({"ours": lambda: ours(lm, found), "published": lambda: published(lm, found)}, 3)
    faster = ratio(beside["published"], beside["ours"])
    return [
        Row(
            f"collect, {name}: over a bare forward of the same batches", *limit, "<= 1.05", passed,
            f"the forward pass itself ({1 / limit[0]:.0%} of the time); {where}", f"{median(seconds['ours']):.2f} s, {n} traces",
        ),
        Row(
            f"collect, {name}: times faster than the published way", *faster, f">= {aim:g}", passed,
            f"as above; the published way makes {2.5:g} passes per trace, one trace at a time, and forms [tokens, heads, d_model]",
            f"{median(beside['published']):.2f} s",
        ),
    ]  # fmt: skip


def entropies(name: str, lm: LM, n: int) -> Row:
    found = traces(lm, n)
    measured = collect.moments_and_entropies(lm, found[:2], by_parity)[1][0]
    logp = collect.logits(lm, found[0]).double().log_softmax(dim=-1)
    worst = (torch.tensor(measured.entropies, dtype=torch.float64) - -(logp.exp() * logp).sum(dim=-1).cpu()).abs().max().item()
    assert worst < 1e-3, worst

    def both() -> None:
        collect.moments_and_entropies(lm, found, by_parity)

    seconds = turns({"ours": both, "logits": lambda: with_logits(lm, found)})
    return Row(
        f"collect, {name}: with exact entropies, over a forward with logits", *ratio(seconds["ours"], seconds["logits"]), "<= 1.15",
        f"against entropies in fp64: largest difference {worst:.0e} nats",
        f"the forward pass with its LM head; {profile(both)}",
    )  # fmt: skip


def shape_of_today(n: int = 2) -> list[Row]:
    """Time and memory of collect over a bare forward pass in a model of 1.5 G parameters, where the pass itself is most of both."""
    # Before the model is made here, too: both would take 11 GB.
    peaks = {what: apart("memory.py", f"large {what}", str(n))["peak"] for what in ("collect", "bare")}
    lm = large()
    found = traces(lm, n)
    passed = gate(lm, found)
    seconds = turns({"ours": lambda: ours(lm, found), "bare": lambda: bare(lm, found)}, 3)
    limit = ratio(seconds["ours"], seconds["bare"])
    return [
        Row(
            f"collect, {LARGE}: over a bare forward of the same batches", *limit, "<= 1.05", passed,
            f"the forward pass itself ({1 / limit[0]:.0%} of the time)", f"{median(seconds['ours']):.1f} s, {n} traces",
        ),
        Row(
            f"collect, {LARGE}: peak memory over that of a bare forward", peaks["collect"] / peaks["bare"], None, "<= 1.1", passed,
            "weights and one batch of activations", f"{peaks['collect']:.0f} and {peaks['bare']:.0f} MB",
        ),
    ]  # fmt: skip


def main() -> None:
    start()
    small, large = tiny(), middle()
    rows = rows_of("tiny reasoner", small, 16 if QUICK else 64, 20)
    rows += rows_of(MIDDLE, large, 16 if QUICK else 64, 2.5)
    rows.append(entropies("tiny reasoner", small, 16 if QUICK else 64))
    sizes = (64, 128) if QUICK else (64, 256, 1024)
    peaks = [apart("memory.py", "collect", str(n))["peak"] for n in sizes]
    rows.append(
        Row(
            f"collect, tiny reasoner: peak memory at {sizes[-1]} traces over {sizes[0]}", peaks[-1] / peaks[0], None, "<= 1.1",
            "any split gives the same sums (see scale)", "one batch of activations and running sums", f"{peaks[0]:.0f} MB",
        )
    )  # fmt: skip
    if not QUICK:  # last: the peak of a new process is never below the memory of this one
        rows += shape_of_today()
    write("collect", rows)


if __name__ == "__main__":
    main()
