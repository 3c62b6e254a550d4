"""Train the mid reasoner on a GPU: the tiny reasoner's recipe, with 25 million weights and 128 attention heads.

    python data/mid-reasoner/train.py --out runs/mid-reasoner --seconds 280

It stops after ``--seconds`` or ``--tokens``, whatever comes first. Lessons and learning rate follow the share of whichever is further on, so a
slow machine also ends with a small learning rate. Every minute the weights are saved, in pieces of at most 16 MiB: a borrowed machine returns
few and small files. ``join.py`` beside this file makes a model directory of them.

Worker processes make the data: (seed, chunk index, lesson) determines a chunk, while its lesson depends on the machine's speed. So a second
run gives a similar model with other weights.

Not run on a GPU yet; the tests rehearse it on a CPU for some seconds. How the size was chosen. 64 MiB come back from a borrowed machine, so at most 30 million weights in bf16. An H100 multiplies bf16 matrices at
800 TFLOP/s and copies 3.0 TB/s, both measured on such a machine. A token takes 6 operations per weight, 0.15 GFLOP here, and attention over
100 tokens adds little: at 60 % of the peak, 3 million tokens per second. The operations between the products move an estimated 4 MB per token
in eager mode, forward and backward: 0.75 million tokens per second. Muon takes an estimated 10 ms per step, whatever its size. In all, 0.45
million tokens per second in eager mode, 0.7 million compiled: 100 to 140 million tokens in 240 s, in 4,000 to 6,000 steps. A core makes 1.2
million tokens per second (measured), so four processes suffice. All but the three measured numbers are estimates.
"""

from __future__ import annotations

import argparse
import importlib.util
import json
import math
import os
import re
import tempfile
import time
from collections import deque
from collections.abc import Callable, Iterator
from concurrent.futures import Future, ProcessPoolExecutor
from dataclasses import asdict, dataclass
from functools import cache
from multiprocessing import get_context
from pathlib import Path
from typing import Any

import numpy as np
import torch
import torch.nn.functional as F
from safetensors.torch import load_file, save_file
from torch import Tensor
from transformers import Qwen3ForCausalLM
from transformers.models.qwen3.modeling_qwen3 import Qwen3RMSNorm

HERE = Path(__file__).parent
NAME = "mid-reasoner"
REST = f"{NAME}.json"  # everything that is not weights, in one file: few files come back
AHEAD = 6  # chunks of data that are made ahead of the training; each belongs to the lesson of the time when it was ordered
SAME = 0.05  # difference of the logits of compiled layers that is taken for rounding (bf16), relative to the largest


@cache
def recipe() -> Any:
    """Return the tiny reasoner's training script as a module: tokenizer, model, data and schedule are its own."""
    spec = importlib.util.spec_from_file_location("tiny_reasoner_train", HERE.parent / "tiny-reasoner" / "train.py")
    assert spec and spec.loader
    module = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(module)
    return module


@dataclass(frozen=True)
class Settings:
    """Size of the model, its data and its training. The defaults are the mid reasoner's.

    Attributes:
        tokens: Training tokens after which the training ends, padding included.
        seconds: Seconds after which it ends, counted from the second step (the first sets libraries up, after the layers are compiled).
        lr: Peak learning rate of AdamW, for embeddings and norms.
        muon_lr: Peak learning rate of Muon, for the matrices of the layers.
        batch_tokens: Tokens per step, padding included.
        chunk: Rows per chunk of data.
        copying_until: Share of the training for the first lesson (copying).
        steps_until: Share of the training at which the second lesson (steps) ends.
        lookup_share: Share of the rows that are lookup problems, after the first lesson.
        brief_share: Share of the lookup problems with a short context.
        drill_share: Share of the lookup problems that are drills, after the first lesson.
        workers: Processes that make data.
        save_every: Seconds between savings.
        piece: Largest piece of the saved weights. A borrowed machine returns files of at most 16 MiB.
        compile: True to compile the layers with ``torch.compile``; if that fails or changes the logits, they run as they are. The default
            is True on a GPU.
    """

    layers: int = 8
    d_model: int = 512
    d_mlp: int = 1024
    heads: int = 16
    head_dim: int = 64
    tokens: float = 400e6
    seconds: float = 240
    seed: int = 0
    lr: float = 2.5e-3
    muon_lr: float = 0.02
    batch_tokens: int = 24576
    chunk: int = 4096
    copying_until: float = 0.10
    steps_until: float = 0.16
    lookup_share: float = 0.3
    brief_share: float = 0.6
    drill_share: float = 0.3
    workers: int = max(1, min(4, (os.cpu_count() or 1) - 1))
    save_every: float = 60
    piece: str = "15MB"
    compile: bool = torch.cuda.is_available()


# --- data ----------------------------------------------------------------------------------------------------


class Characters:
    """Encodes text as the tiny reasoner's tokenizer does, three times faster: one token per special word or character."""

    def __init__(self) -> None:
        tiny = recipe()
        self.vocabulary = tiny.build_tokenizer().get_vocab()
        self.words = re.compile("|".join(map(re.escape, tiny.SPECIALS)) + r"|[\s\S]")
        self.unknown = self.vocabulary["<|unk|>"]

    def encode(self, text: str) -> list[int]:
        return [self.vocabulary.get(word, self.unknown) for word in self.words.findall(text)]


characters = cache(Characters)


Packed = tuple[np.ndarray, np.ndarray]  # token ids [rows, width], padded on the right with 0, and 1 where a token is predicted


def make(settings: Settings, index: int, done: float) -> list[Packed]:
    """Return a chunk of data, packed for the way between processes.

    Args:
        index: Number of the chunk.
        done: Share of the training that is done, which selects the lesson.
    """
    chunk = recipe().chunk(characters(), settings.seed, index, argparse.Namespace(**asdict(settings)), done)
    return [pack(batch) for batch in chunk]


def pack(batch: list[tuple[list[int], list[bool]]]) -> Packed:
    """Pad rows to a common width, a multiple of 8."""
    width = -(-max(len(ids) for ids, _ in batch) // 8) * 8
    ids, predicted = (np.zeros((len(batch), width), np.uint8) for _ in range(2))
    for row, (tokens, flags) in enumerate(batch):
        ids[row, : len(tokens)], predicted[row, : len(tokens)] = tokens, flags
    return ids, predicted


class Data:
    """Iterates over batches that worker processes make ahead.

    Args:
        settings: Settings of the training.
        done: Function that returns the share of the training that is done.

    Attributes:
        waited: Seconds spent waiting for data.
    """

    def __init__(self, settings: Settings, done: Callable[[], float]) -> None:
        self.settings, self.done, self.waited = settings, done, 0.0
        # Not forked: a forked process must not use a GPU, and threads of the parent may hold locks.
        self.pool = ProcessPoolExecutor(settings.workers, mp_context=get_context("spawn"))
        self.made: deque[Future[list[Packed]]] = deque()
        self.index = 0
        self._fill()

    def _fill(self) -> None:
        while len(self.made) < AHEAD:
            self.made.append(self.pool.submit(make, self.settings, self.index, self.done()))
            self.index += 1

    def __iter__(self) -> Iterator[Packed]:
        while True:
            began = time.monotonic()
            batches = self.made.popleft().result()
            self.waited += time.monotonic() - began
            self._fill()
            yield from batches

    def close(self) -> None:
        self.pool.shutdown(wait=False, cancel_futures=True)


# --- training ------------------------------------------------------------------------------------------------


@dataclass
class Progress:
    """How far a training is. ``seconds`` counts from the second step, and ``allowed`` of them may pass."""

    settings: Settings
    tokens: int = 0
    steps: int = 0
    began: float | None = None
    allowed: float = math.inf

    def begin(self, deadline: float) -> None:
        """Start the clock. The training ends at ``deadline`` (``time.monotonic()``), or earlier, after ``Settings.seconds``."""
        self.began = time.monotonic()
        self.allowed = max(1e-3, min(self.settings.seconds, deadline - self.began))

    @property
    def seconds(self) -> float:
        return 0.0 if self.began is None else time.monotonic() - self.began

    @property
    def done(self) -> float:
        """Share of the tokens or of the time, whatever is larger; 1 at the end."""
        return min(1.0, max(self.tokens / self.settings.tokens, self.seconds / self.allowed))


class FusedNorm(Qwen3RMSNorm):
    """The model's norm as one operation of PyTorch, which reads its input once and not five times."""

    def forward(self, x: Tensor) -> Tensor:
        return F.rms_norm(x, self.weight.shape, self.weight.to(x.dtype), self.variance_epsilon)


def build(settings: Settings, device: torch.device) -> Qwen3ForCausalLM:
    """Return an untrained model."""
    torch.manual_seed(settings.seed)
    tiny = recipe()
    model = tiny.build_model(argparse.Namespace(**asdict(settings)), len(tiny.build_tokenizer())).to(device)
    for module in model.modules():
        if type(module) is Qwen3RMSNorm:
            module.__class__ = FusedNorm
    return model


def logits_of(model: Qwen3ForCausalLM, ids: Tensor, half: bool | None = None) -> Tensor:
    """Return the logits for every token but the first, fp32.

    Args:
        half: True to compute under autocast to bfloat16; ``None`` for a GPU only.
    """
    with torch.autocast(ids.device.type, torch.bfloat16, enabled=ids.device.type == "cuda" if half is None else half):
        return model(input_ids=ids[:, :-1], use_cache=False).logits.float()


def loss_of(model: Qwen3ForCausalLM, ids: Tensor, predicted: Tensor, *, half: bool | None = None) -> Tensor:
    """Return the mean loss in nats per predicted token, as ``loss_of`` of the tiny reasoner does, without waiting for the device."""
    loss = F.cross_entropy(logits_of(model, ids, half).flatten(0, 1), ids[:, 1:].flatten(), reduction="none")
    weight = predicted[:, 1:].flatten().float()
    return (loss * weight).sum() / weight.sum()


def optimizers_of(model: Qwen3ForCausalLM, settings: Settings) -> list[tuple[torch.optim.Optimizer, float]]:
    """Return each optimizer with its peak learning rate: Muon for the matrices of the layers, AdamW for everything else."""
    hidden = [p for p in model.model.layers.parameters() if p.ndim == 2]
    inside = {id(p) for p in hidden}
    others = [p for p in model.parameters() if id(p) not in inside]
    muon = torch.optim.Muon(hidden, lr=settings.muon_lr, momentum=0.95, weight_decay=0.05)
    adam = torch.optim.AdamW(others, lr=settings.lr, betas=(0.9, 0.98), weight_decay=0.0, fused=True)
    return [(muon, settings.muon_lr), (adam, settings.lr)]


def compiled(model: Qwen3ForCausalLM, first: tuple[Tensor, Tensor]) -> str:
    """Compile the layers of a model, in place, and run one batch. Return what happened; if it failed, the layers are as they were."""
    layers, began = model.model.layers, time.monotonic()
    try:
        expected = logits_of(model, first[0]).detach()
        for layer in layers:
            layer.compile(dynamic=True)
        loss_of(model, *first).backward()
        # With gradients, as in training: without, the layers would be compiled once more.
        apart = ((logits_of(model, first[0]).detach() - expected).abs().max() / expected.abs().max()).item()
        if not apart <= SAME:
            raise ValueError(f"the logits differ by {apart:.2g}, relative to the largest")
        return f"yes, in {time.monotonic() - began:.0f} s"
    except Exception as error:  # noqa: BLE001
        for layer in layers:
            layer._compiled_call_impl = None
        return f"no: {type(error).__name__}: {str(error)[:300]}"
    finally:
        model.zero_grad()


def train(
    settings: Settings,
    out: Path,
    *,
    device: torch.device,
    deadline: float = math.inf,
    say: Callable[[str], None] = lambda text: None,
) -> dict[str, Any]:
    """Train, save, and return the facts of the training, which are also in ``REST``.

    Args:
        out: Directory of the pieces.
        deadline: Time (``time.monotonic()``) at which the last saving begins at the latest, if ``settings.seconds`` are not over before.
        say: Function that is called with a line at every saving.
    """
    torch.set_flush_denormal(True)  # denormal gradients make a CPU five times slower
    model, progress = build(settings, device), Progress(settings)
    data = Data(settings, lambda: progress.done)
    optimizers = optimizers_of(model, settings)
    facts: dict[str, Any] = {"settings": asdict(settings), "weights": model.num_parameters(), "losses": [], "compiled": "no"}

    def on_device(batch: Packed) -> tuple[Tensor, Tensor]:
        pair = [torch.from_numpy(part) for part in batch]
        pair = [part.pin_memory() for part in pair] if device.type == "cuda" else pair
        return pair[0].to(device, non_blocking=True).long(), pair[1].to(device, non_blocking=True)

    def save() -> None:
        facts.update(tokens=progress.tokens, steps=progress.steps, seconds=progress.seconds, waited=data.waited)
        save_pieces(model, facts, out)
        loss = facts["losses"][-1]["loss"] if facts["losses"] else math.nan
        say(f"{progress.tokens / 1e6:.1f} M tokens in {progress.seconds:.0f} s, loss {loss:.3f}")

    try:
        batches = iter(data)
        first = on_device(next(batches))
        if settings.compile:
            facts["compiled"] = compiled(model, first)
        step(model, optimizers, first, 0.0)  # libraries set themselves up, which takes seconds
        data.waited, saved = 0.0, 0.0
        progress.begin(deadline)
        losses: list[Tensor] = []
        while progress.done < 1 or not losses:
            ids, predicted = on_device(next(batches))
            losses.append(step(model, optimizers, (ids, predicted), progress.done))
            progress.tokens, progress.steps = progress.tokens + ids.numel(), progress.steps + 1
            if len(losses) % 50 == 0 or progress.done >= 1:  # reading the losses waits for the device
                mean = torch.stack(losses[-50:]).mean().item()
                facts["losses"].append({"tokens": progress.tokens, "seconds": progress.seconds, "loss": mean})
                if progress.seconds - saved > settings.save_every:
                    saved = progress.seconds
                    save()
        facts["final_loss"] = torch.stack(losses[-50:]).mean().item()
        save()
    finally:
        data.close()
    return facts


def step(model: Qwen3ForCausalLM, optimizers: list[tuple[torch.optim.Optimizer, float]], batch: tuple[Tensor, Tensor], done: float):
    """Take one step of every optimizer, and return the loss, on the device."""
    loss = loss_of(model, *batch)
    loss.backward()
    torch.nn.utils.clip_grad_norm_(model.parameters(), 1.0)
    for optimizer, peak in optimizers:
        for group in optimizer.param_groups:
            group["lr"] = peak * recipe().schedule(done)
        optimizer.step()
        optimizer.zero_grad()
    return loss.detach()


def save_pieces(model: Qwen3ForCausalLM, facts: dict[str, Any], out: Path) -> None:
    """Write the weights in bf16, in pieces, and every other file of the model directory in one (``REST``).

    Each piece names its saving by the number of steps: after a kill, ``join`` finds pieces of two savings.
    """
    out.mkdir(parents=True, exist_ok=True)
    with tempfile.TemporaryDirectory() as folder:
        half = {name: value.detach().to(torch.bfloat16) for name, value in model.state_dict().items()}
        model.save_pretrained(folder, state_dict=half, max_shard_size=facts["settings"]["piece"])
        recipe().build_tokenizer().save_pretrained(folder)
        files = sorted(Path(folder).iterdir())
        config = Path(folder) / "config.json"
        config.write_text(json.dumps({**json.loads(config.read_text()), "dtype": "bfloat16"}, indent=2) + "\n")
        rest = {file.name: file.read_text() for file in files if file.suffix != ".safetensors"}
        for file in files:
            if file.suffix == ".safetensors":
                about = {"format": "pt", "saving": str(facts.get("steps", 0))}
                put(out / f"{NAME}-{file.name}", lambda to, file=file, about=about: save_file(load_file(file), to, about))
        text = json.dumps({"files": rest, "training": facts}) + "\n"
        put(out / REST, lambda to: to.write_text(text))


def put(path: Path, write: Callable[[Path], Any]) -> None:
    """Write a file beside its place, then move it there."""
    part = path.with_name(f".{path.name}")
    write(part)
    part.replace(path)


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--out", type=Path, required=True, help="directory of the pieces")
    parser.add_argument("--device", default="cuda" if torch.cuda.is_available() else "cpu")
    for name, value in asdict(Settings()).items():
        option = f"--{name.replace('_', '-')}"
        if isinstance(value, bool):
            parser.add_argument(option, action=argparse.BooleanOptionalAction, default=value)
        else:
            parser.add_argument(option, type=type(value), default=value)
    asked = vars(parser.parse_args())
    out, device = asked.pop("out"), torch.device(asked.pop("device"))
    facts = train(Settings(**asked), out, device=device, say=lambda text: print(text, flush=True))
    print(f"{facts['steps']} steps; join the pieces: python {HERE / 'join.py'} {out} DIRECTORY")


if __name__ == "__main__":
    main()
