"""Train the tiny reasoner: a small Qwen3 that thinks in characters before it answers.

    python data/tiny-reasoner/train.py --out data/tiny-reasoner --minutes 80

Seeded and resumable: (seed, chunk index) determines every chunk of data, and the optimizer state is saved with the step, so after a kill
the same command continues. The learning-rate schedule runs over ``--tokens``; ``--minutes`` only limits one sitting. The loss covers the
response.
"""

from __future__ import annotations

import argparse
import json
import math
import os
import random
import re
import time
from collections.abc import Callable
from pathlib import Path

import torch
from tokenizers import Regex, Tokenizer, decoders, models, pre_tokenizers
from torch.nn.utils.rnn import pad_sequence
from transformers import PreTrainedTokenizerFast, Qwen3Config, Qwen3ForCausalLM

from toolkit.tasks import arithmetic, lookup
from toolkit.tasks.generators import traces
from toolkit.types import Problem

SPECIALS = ["<|pad|>", "<|unk|>", "<|user|>", "<|assistant|>", "<|end|>", "<think>", "</think>"]
TEMPLATE = (
    "{% for m in messages %}{{ '<|assistant|>' if m['role'] == 'assistant' else '<|user|>' }}"
    "{{ m['content'] }}<|end|>{% endfor %}{% if add_generation_prompt %}<|assistant|>{% endif %}"
)


def build_tokenizer() -> PreTrainedTokenizerFast:
    """Return a tokenizer with one token per printable ASCII character or newline, plus the special tokens."""
    characters = ["\n", *map(chr, range(32, 127))]
    vocab = {token: i for i, token in enumerate(SPECIALS + characters)}
    backend = Tokenizer(models.WordLevel(vocab, unk_token="<|unk|>"))
    backend.pre_tokenizer = pre_tokenizers.Split(Regex(r"[\s\S]"), "isolated")
    backend.decoder = decoders.Fuse()
    return PreTrainedTokenizerFast(
        tokenizer_object=backend,
        pad_token="<|pad|>",
        unk_token="<|unk|>",
        eos_token="<|end|>",
        additional_special_tokens=["<|user|>", "<|assistant|>", "<think>", "</think>"],
        chat_template=TEMPLATE,
        padding_side="left",
        clean_up_tokenization_spaces=False,
        model_max_length=4096,
    )


def build_model(args: argparse.Namespace, vocab_size: int) -> Qwen3ForCausalLM:
    """Return a Qwen3 with grouped-query attention and ``n_heads * head_dim != d_model``."""
    config = Qwen3Config(
        vocab_size=vocab_size,
        hidden_size=args.d_model,
        intermediate_size=args.d_mlp,
        num_hidden_layers=args.layers,
        num_attention_heads=args.heads,
        num_key_value_heads=args.heads // 2,
        head_dim=args.head_dim,
        max_position_embeddings=4096,
        rope_theta=10_000.0,
        tie_word_embeddings=True,
        pad_token_id=SPECIALS.index("<|pad|>"),
        eos_token_id=SPECIALS.index("<|end|>"),
        bos_token_id=None,
    )
    return Qwen3ForCausalLM(config)


Row = tuple[list[int], list[bool]]
"""Token ids, and for each True if it is predicted."""


def example(tokenizer: PreTrainedTokenizerFast, p: Problem, trace: traces.Trace) -> Row:
    """Return a problem and its trace as a row; the response is predicted."""
    prompt = tokenizer.encode(f"<|user|>{p.messages[0]['content']}<|end|><|assistant|>")
    response = tokenizer.encode(f"<think>{trace.text}</think>{trace.conclusion}<|end|>")
    return prompt + response, [False] * len(prompt) + [True] * len(response)


def drill(tokenizer: PreTrainedTokenizerFast, p: Problem, rng: random.Random) -> Row:
    """Return a row that repeats every binding of a lookup prompt in another order; only the text after ``=`` is predicted.

    It is a dense lesson in copying: a lookup problem retrieves one to three values, a drill one per binding.
    """
    content = p.messages[0]["content"]
    bindings = re.findall(r"(\w)=(\w+);", content)
    rng.shuffle(bindings)
    ids = tokenizer.encode(f"<|user|>{content}<|end|><|assistant|><think>")
    predicted = [False] * len(ids)
    for name, value in bindings:
        ids += tokenizer.encode(f"{name}={value}\n")
        predicted += [False, False] + [True] * len(value) + [False]
    return ids, predicted


def chunk(tokenizer, seed: int, index: int, args: argparse.Namespace, done: float) -> list[list[Row]]:
    """Return the ``index``-th chunk of training data as batches of rows of similar length.

    There are three lessons. The first is copying alone: mixed with other data, copying is not learnt in ten times as many tokens. The
    second has the steps (short chains, short contexts, no haste). The third adds the habits of haste.

    Args:
        done: Share of the training that is done.
    """
    rng = random.Random(f"train-{seed}-{index}")
    copying, steps = done < args.copying_until, done < args.steps_until
    habits = traces.Habits(ease_push=0.0, cue_push=0.0, mood_push=0.0) if steps else traces.Habits()
    rows = []
    for _ in range(args.chunk):
        if copying or rng.random() < args.lookup_share:
            # A short context costs a tenth of a long one and teaches the same copying.
            brief = steps or rng.random() < args.brief_share
            p = lookup.problem(rng, "train", context=(24, 80) if brief else lookup.CONTEXT)
            drilled = copying or rng.random() < args.drill_share
            rows.append(drill(tokenizer, p, rng) if drilled else example(tokenizer, p, lookup.write_trace(p, rng, habits)))
        else:
            p = arithmetic.problem(rng, "train", operands=(2, 4) if steps else arithmetic.OPERANDS)
            rows.append(example(tokenizer, p, arithmetic.write_trace(p, rng, habits)))
    return batched(rows, args.batch_tokens, rng)


def batched(rows: list[Row], batch_tokens: int, rng: random.Random) -> list[list[Row]]:
    """Return rows as batches of rows of similar length, at most ``batch_tokens`` tokens each with padding, in random order."""
    rows.sort(key=lambda row: len(row[0]))
    batches, batch = [], []
    for row in rows:
        if batch and (len(batch) + 1) * len(row[0]) > batch_tokens:
            batches.append(batch)
            batch = []
        batch.append(row)
    batches.append(batch)
    rng.shuffle(batches)
    return batches


def loss_of(model: Qwen3ForCausalLM, batch: list[Row]) -> tuple[torch.Tensor, int]:
    """Return the mean loss in nats per predicted token of a right-padded batch, and its number of tokens with padding."""
    ids = pad_sequence([torch.tensor(row) for row, _ in batch], batch_first=True)
    predicted = pad_sequence([torch.tensor(flags) for _, flags in batch], batch_first=True)[:, 1:]
    hidden = model.model(input_ids=ids[:, :-1]).last_hidden_state
    return torch.nn.functional.cross_entropy(model.lm_head(hidden[predicted]), ids[:, 1:][predicted]), ids.numel()


def schedule(done: float) -> float:
    """Return the share of the peak learning rate: linear warm-up over 2 % of the tokens, then a cosine decay to 2 %."""
    return min(done / 0.02 + 0.01, 0.02 + 0.98 * 0.5 * (1 + math.cos(math.pi * min(1.0, done))))


def save(state: dict, path: Path) -> None:
    temporary = path.with_suffix(".tmp")
    torch.save(state, temporary)
    os.replace(temporary, path)


def parser_of(description: str, *, tokens: float, minutes: float, chunk: int) -> argparse.ArgumentParser:
    """Return the options of a training: folders, sizes and rates.

    Args:
        description: Text of ``--help``.
        tokens: Default number of training tokens.
        minutes: Default length of a sitting.
        chunk: Default number of rows per chunk.
    """
    parser = argparse.ArgumentParser(description=description, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--out", type=Path, required=True, help="directory of the finished model")
    parser.add_argument("--work", type=Path, default=None, help="directory of the resumable state (default: runs/<out name>)")
    parser.add_argument("--tokens", type=float, default=tokens, help="training tokens, padding included")
    parser.add_argument("--minutes", type=float, default=minutes, help="stop this sitting after so many minutes")
    parser.add_argument("--seed", type=int, default=0)
    parser.add_argument("--layers", type=int, default=4)
    parser.add_argument("--d-model", type=int, default=128)
    parser.add_argument("--d-mlp", type=int, default=256)
    parser.add_argument("--heads", type=int, default=8)
    parser.add_argument("--head-dim", type=int, default=32)
    parser.add_argument("--lr", type=float, default=2.5e-3, help="AdamW: embeddings and norms")
    parser.add_argument("--muon-lr", type=float, default=0.02, help="Muon: the matrices of the layers")
    parser.add_argument("--batch-tokens", type=int, default=2048)
    parser.add_argument("--chunk", type=int, default=chunk)
    return parser


def train(
    args: argparse.Namespace,
    build_tokenizer: Callable[[], PreTrainedTokenizerFast],
    chunk: Callable[..., list[list[Row]]],
    *,
    context: int = 4096,
    dtype: torch.dtype = torch.float32,
) -> None:
    """Train a model, or go on with a training that was stopped, and save it in ``args.out`` at the end.

    Args:
        args: Options, from ``parser_of``.
        build_tokenizer: Function that returns the tokenizer.
        chunk: Function that returns a chunk of data: ``chunk(tokenizer, seed, index, args, done)``, as the one in this file.
        context: Largest number of positions.
        dtype: Dtype of the saved weights.
    """
    work = args.work or Path("runs") / args.out.name
    work.mkdir(parents=True, exist_ok=True)
    torch.set_flush_denormal(True)  # denormal gradients make a CPU five times slower
    torch.manual_seed(args.seed)
    tokenizer = build_tokenizer()
    model = build_model(args, len(tokenizer))
    model.config.max_position_embeddings = context
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
                loss, n = loss_of(model, batch)
                loss.backward()
                torch.nn.utils.clip_grad_norm_(model.parameters(), 1.0)
                for optimizer, peak in zip(optimizers, (args.muon_lr, args.lr), strict=True):
                    for group in optimizer.param_groups:
                        group["lr"] = peak * schedule(tokens / args.tokens)
                    optimizer.step()
                    optimizer.zero_grad()
                total, count, tokens, seen, step = total + loss.item(), count + 1, tokens + n, seen + n, step + 1
            index += 1
            row = {"step": step, "tokens": tokens, "loss": total / count, "tokens_per_second": seen / (time.time() - tick)}
            print(json.dumps(row), file=log, flush=True)
            print(json.dumps(row), flush=True)
            if index % 4 == 0 or tokens >= args.tokens:
                optimizing = [optimizer.state_dict() for optimizer in optimizers]
                kept = {"model": model.state_dict(), "optimizers": optimizing, "chunk": index, "tokens": tokens, "step": step}
                save(kept, work / "state.pt")
                model.save_pretrained(work / "model")
                tokenizer.save_pretrained(work / "model")
    if tokens >= args.tokens:
        model.to(dtype)
        model.save_pretrained(args.out)
        tokenizer.save_pretrained(args.out)


def main() -> None:
    parser = parser_of(__doc__, tokens=25e6, minutes=90, chunk=2048)
    parser.add_argument("--copying-until", type=float, default=0.06, help="share of the tokens for the first lesson")
    parser.add_argument("--steps-until", type=float, default=0.11, help="share of the tokens at which the second lesson ends")
    parser.add_argument("--lookup-share", type=float, default=0.3)
    parser.add_argument("--brief-share", type=float, default=0.6, help="share of lookup problems with a context below 80")
    parser.add_argument(
        "--drill-share", type=float, default=0.3, help="share of lookup problems that are drills, after the first lesson"
    )
    train(parser.parse_args(), build_tokenizer, chunk)


if __name__ == "__main__":
    main()
