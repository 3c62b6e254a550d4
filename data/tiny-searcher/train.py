"""Train the tiny searcher: a small Qwen3 that thinks, searches a corpus, judges the results and answers.

    python data/tiny-searcher/train.py --out data/tiny-searcher --minutes 50

Model, optimizers, schedule and resuming are those of ``data/tiny-reasoner/train.py``. (seed, chunk index) determines every chunk of data. Each
chunk is about a new world (``toolkit/tasks/generators/worlds.py``): facts that are the same in all worlds are learnt by heart, all others
must be searched for. The world of the task ``searching`` is not among them. The loss covers all that the model writes; results are read only.
Most of the training has two kinds of drills beside episodes: judging results, and recalling facts. The weights are saved in float16.
"""

from __future__ import annotations

import argparse
import importlib.util
import json
import random
import time
from pathlib import Path
from types import ModuleType

import torch
from tokenizers import AddedToken, Regex, Tokenizer, models, pre_tokenizers
from transformers import PreTrainedTokenizerFast

from toolkit.tasks import searching
from toolkit.tasks.generators import cues, searches, worlds
from toolkit.types import Problem

HERE = Path(__file__).parent


def reasoner() -> ModuleType:
    """Return the training script of the tiny reasoner as a module."""
    spec = importlib.util.spec_from_file_location("tiny_reasoner_train", HERE.parent / "tiny-reasoner" / "train.py")
    assert spec and spec.loader
    module = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(module)
    return module


BASE = reasoner()
MARKS = ("<search>", "</search>", "<result>", "</result>")
WRITTEN = (
    "asked", "so", "i", "know", "is", "relevant", "irrelevant", "no", "answer", "not", "found", "guess", "nothing", searching.UNKNOWN,
    ".", ":", "?", "\n", *cues.CUES, *cues.NEUTRAL,
)  # fmt: skip


def vocabulary() -> list[str]:
    """Return every word of questions, documents and episodes, in a fixed order."""
    questions = " ".join(searching.QUESTIONS).replace("{word}", "").replace("{whom}", "the of").split()
    words = [*WRITTEN, *questions, *worlds.FIRST, *worlds.LAST]
    words += [word for both in worlds.WORDS.values() for word in both] + [v for values in worlds.VALUES.values() for v in values]
    return list(dict.fromkeys(words))


def build_tokenizer() -> PreTrainedTokenizerFast:
    """Return a tokenizer with one token per word. Blanks separate words; a line break is a word."""
    vocab = {token: i for i, token in enumerate([*BASE.SPECIALS, *MARKS, *vocabulary()])}
    backend = Tokenizer(models.WordLevel(vocab, unk_token="<|unk|>"))
    backend.pre_tokenizer = pre_tokenizers.Sequence(
        [pre_tokenizers.Split(" ", "removed"), pre_tokenizers.Split(Regex("\n"), "isolated")]
    )
    tokenizer = PreTrainedTokenizerFast(
        tokenizer_object=backend,
        pad_token="<|pad|>",
        unk_token="<|unk|>",
        eos_token="<|end|>",
        additional_special_tokens=["<|user|>", "<|assistant|>", "<think>", "</think>"],
        chat_template=BASE.TEMPLATE,
        padding_side="left",
        clean_up_tokenization_spaces=False,
        model_max_length=512,
    )
    tokenizer.add_tokens([AddedToken(mark, normalized=False) for mark in MARKS])
    return tokenizer


def row_of(tokenizer: PreTrainedTokenizerFast, pieces: list[tuple[str, bool]]) -> tuple[list[int], list[bool]]:
    """Return texts, each with True if it is predicted, as a row: token ids, and for each True if it is predicted."""
    ids, predicted = [], []
    for text, own in pieces:
        new = tokenizer.encode(text)
        ids += new
        predicted += [own] * len(new)
    return ids, predicted


def prompt_of(p: Problem) -> str:
    """Return the prompt of a problem as text."""
    return f"<|user|>{p.messages[0]['content']}<|end|><|assistant|>"


def example(tokenizer: PreTrainedTokenizerFast, p: Problem, episode: searches.Episode) -> tuple[list[int], list[bool]]:
    """Return a problem and its episode as a row; all that the model writes is predicted."""
    return row_of(
        tokenizer, [(prompt_of(p), False), ("<think>", True), *episode.pieces, (f"</think> {episode.answer}<|end|>", True)]
    )


def chunk(tokenizer: PreTrainedTokenizerFast, seed: int, index: int, args: argparse.Namespace, done: float) -> list[list]:
    """Return the ``index``-th chunk of training data as batches of rows of similar length, all about one new world.

    Args:
        done: Share of the training that is done. Until ``args.drills_until``, some rows are drills.
    """
    rng, world = random.Random(f"train-{seed}-{index}"), worlds.World(f"train-{seed}-{index}")
    writer = searches.Writer(world, searching.corpus.__wrapped__(world).search)
    drills = (args.judging_share, args.recall_share) if done < args.drills_until else (0.0, 0.0)
    shares, rows = [*drills, 1 - sum(drills)], []
    for _ in range(args.chunk):
        if done < args.drills_until and rng.random() < args.opening_share:
            p = searching.problem(rng, "train", world=world, where=rng.choice(["weights", "corpus"]))
            rows.append(row_of(tokenizer, [(prompt_of(p) + "<think>", False), (writer.opening(p), True)]))
            continue
        drill = rng.choices([writer.judging_drill, writer.recall_drill, None], shares)[0]
        if drill is not None:
            rows.append(row_of(tokenizer, [("<think>", False), *drill(rng).pieces]))
            continue
        p = searching.problem(rng, "train", world=world)
        rows.append(example(tokenizer, p, writer.write(p, rng)))
    rows.sort(key=lambda row: len(row[0]))
    batches, batch = [], []
    for row in rows:
        if batch and (len(batch) + 1) * len(row[0]) > args.batch_tokens:
            batches.append(batch)
            batch = []
        batch.append(row)
    batches.append(batch)
    rng.shuffle(batches)
    return batches


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--out", type=Path, required=True, help="directory of the finished model")
    parser.add_argument("--work", type=Path, default=None, help="directory of the resumable state (default: runs/<out name>)")
    parser.add_argument("--tokens", type=float, default=6.4e6, help="training tokens, padding included")
    parser.add_argument("--minutes", type=float, default=60, help="stop this sitting after so many minutes")
    parser.add_argument("--seed", type=int, default=0)
    parser.add_argument("--layers", type=int, default=4)
    parser.add_argument("--d-model", type=int, default=128)
    parser.add_argument("--d-mlp", type=int, default=256)
    parser.add_argument("--heads", type=int, default=8)
    parser.add_argument("--head-dim", type=int, default=32)
    parser.add_argument("--lr", type=float, default=2.5e-3, help="AdamW: embeddings and norms")
    parser.add_argument("--muon-lr", type=float, default=0.02, help="Muon: the matrices of the layers")
    parser.add_argument("--batch-tokens", type=int, default=2048)
    parser.add_argument("--chunk", type=int, default=1024)
    parser.add_argument("--judging-share", type=float, default=0.3, help="share of rows that are drills in judging")
    parser.add_argument("--recall-share", type=float, default=0.1, help="share of rows that are drills in recalling facts")
    parser.add_argument("--opening-share", type=float, default=0.25, help="share of rows that are first moves after a question")
    parser.add_argument("--drills-until", type=float, default=0.93, help="share of the tokens at which the drills end")
    args = parser.parse_args()
    work = args.work or Path("runs") / args.out.name
    work.mkdir(parents=True, exist_ok=True)

    torch.set_flush_denormal(True)  # denormal gradients make a CPU five times slower
    torch.manual_seed(args.seed)
    tokenizer = build_tokenizer()
    model = BASE.build_model(args, len(tokenizer))
    model.config.max_position_embeddings = 512
    hidden = [p for name, p in model.model.layers.named_parameters() if p.ndim == 2]
    others = [p for p in model.parameters() if not any(p is h for h in hidden)]
    optimizers = [
        torch.optim.Muon(hidden, lr=args.muon_lr, momentum=0.95, weight_decay=0.05),
        torch.optim.AdamW(others, lr=args.lr, betas=(0.9, 0.98), weight_decay=0.0, fused=True),
    ]
    index, tokens, step = 0, 0, 0
    if (work / "state.pt").exists():
        state = torch.load(work / "state.pt", weights_only=True)
        model.load_state_dict(state["model"])
        for optimizer, saved in zip(optimizers, state["optimizers"], strict=True):
            optimizer.load_state_dict(saved)
        index, tokens, step = state["chunk"], state["tokens"], state["step"]
    print(f"{sum(p.numel() for p in model.parameters()) / 1e6:.2f} M parameters, {tokens / 1e6:.1f} M tokens done", flush=True)
    began = time.time()
    with open(work / "sittings.jsonl", "a") as sittings:
        print(json.dumps({"from_tokens": tokens, "arguments": vars(args)}, default=str), file=sittings)
    with open(work / "loss.jsonl", "a") as log:
        while tokens < args.tokens and time.time() - began < 60 * args.minutes:
            total, count, seen, tick = 0.0, 0, 0, time.time()
            for batch in chunk(tokenizer, args.seed, index, args, tokens / args.tokens):
                loss, n = BASE.loss_of(model, batch)
                loss.backward()
                torch.nn.utils.clip_grad_norm_(model.parameters(), 1.0)
                for optimizer, peak in zip(optimizers, (args.muon_lr, args.lr), strict=True):
                    for group in optimizer.param_groups:
                        group["lr"] = peak * BASE.schedule(tokens / args.tokens)
                    optimizer.step()
                    optimizer.zero_grad()
                total, count, tokens, seen, step = total + loss.item(), count + 1, tokens + n, seen + n, step + 1
            index += 1
            row = {"step": step, "tokens": tokens, "loss": total / count, "tokens_per_second": seen / (time.time() - tick)}
            print(json.dumps(row), file=log, flush=True)
            if index % 4 == 0 or tokens >= args.tokens:
                optimizing = [optimizer.state_dict() for optimizer in optimizers]
                kept = {"model": model.state_dict(), "optimizers": optimizing, "chunk": index, "tokens": tokens, "step": step}
                BASE.save(kept, work / "state.pt")
                model.save_pretrained(work / "model")
                tokenizer.save_pretrained(work / "model")
    if tokens >= args.tokens:
        model.to(torch.float16)
        model.save_pretrained(args.out)
        tokenizer.save_pretrained(args.out)


if __name__ == "__main__":
    main()
