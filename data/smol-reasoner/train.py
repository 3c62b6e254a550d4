"""Train the smol reasoner: a LoRA adapter that makes SmolLM2-135M-Instruct think in ``<think>`` tags before it answers.

    python data/smol-reasoner/train.py --out data/smol-reasoner --minutes 150

It uses TRL's SFTTrainer with PEFT. Seeded and resumable: the seed determines the batches, a checkpoint is saved in ``--work`` every
``--save-every`` steps, and the same command continues from the newest. The learning rate is warmed up, stays constant, and decays over the
last ``--decay`` steps of ``--steps``; ``--steps`` may be raised later. At the end of every sitting, the adapter is written to ``--out``
(``--minutes 0`` only does that). The loss covers the response; digits weigh more than words. ``reinforce.py`` continues from the last
checkpoint.
"""

from __future__ import annotations

import argparse
import json
import signal
import time
from concurrent.futures import ThreadPoolExecutor
from itertools import islice
from pathlib import Path

import torch
from datasets import Dataset
from generate import Row, batches
from peft import LoraConfig, get_peft_model
from transformers import TrainerCallback, set_seed
from transformers.trainer_utils import get_last_checkpoint
from trl import SFTConfig, SFTTrainer

from toolkit import lm as lms
from toolkit import store

HERE = Path(__file__).parent
BASE = "HuggingFaceTB/SmolLM2-135M-Instruct"


def load_base(source: str | None, dtype: torch.dtype) -> lms.LM:
    """Load the base model with this folder's chat template; default: SmolLM2-135M-Instruct from its package."""
    base = lms.load(source or lms.smollm2_path(), dtype=dtype, tags=lms.ThinkTags(), device="cpu")
    base.tokenizer.chat_template = (HERE / "chat_template.jinja").read_text(encoding="utf-8")
    return base


def columns(batch: list[Row], pad: int) -> dict[str, list[list[int]]]:
    """Return a right-padded batch with the label -100 for tokens that are not predicted."""
    width = max(len(ids) for ids, _ in batch)
    return {
        "input_ids": [ids + [pad] * (width - len(ids)) for ids, _ in batch],
        "labels": [[-100] * prompt + ids[prompt:] + [-100] * (width - len(ids)) for ids, prompt in batch],
    }


class ResponseTrainer(SFTTrainer):
    """SFTTrainer whose rows are whole batches and whose loss is computed at predicted positions only.

    Without Triton, TRL's fused head scores every position in fp32, which is half of the work with a vocabulary of 49,152. Each of
    ``workers`` threads runs forward and backward on a slice of the batch's rows, with one thread per operation. That is faster than several
    threads per operation, and the result does not depend on the order in which threads finish.
    """

    tokens, began = 0, 0.0

    def __init__(self, *args, workers: int, digits: float, **kwargs) -> None:
        super().__init__(*args, **kwargs)
        pieces = self.processing_class.batch_decode(torch.arange(len(self.processing_class))[:, None])
        # Wordings are random and cannot be learnt. The digits hold what can be learnt: the numbers and the results.
        self.weights = torch.tensor([digits if piece.strip().isdigit() else 1.0 for piece in pieces])
        torch.set_num_threads(1)
        # Denormal gradients make a CPU several times slower. The setting is per thread, so every worker makes it.
        self.workers, self.pool = workers, ThreadPoolExecutor(workers, initializer=torch.set_flush_denormal, initargs=(True,))

    def nats(self, model, inputs) -> tuple[torch.Tensor, torch.Tensor]:
        """Return the cross-entropy of every predicted token, and these tokens. Padding is on the right, where the causal mask hides it."""
        ids, labels = inputs["input_ids"], inputs["labels"][:, 1:]
        inner = model.get_base_model()
        hidden = inner.model(input_ids=ids, use_cache=False).last_hidden_state[:, :-1]
        logits = inner.lm_head(hidden[labels != -100]).float()
        targets = labels[labels != -100]
        return torch.nn.functional.cross_entropy(logits, targets, reduction="none"), targets

    def training_step(self, model, inputs, num_items_in_batch=None):
        """Set ``.grad`` to the gradients of the weighted loss; return the unweighted loss in nats per predicted token."""
        model.train()
        inputs = self._prepare_inputs(inputs)
        self.began = self.began or time.time()
        self.tokens += inputs["input_ids"].numel()
        weights = [p for p in model.parameters() if p.requires_grad]
        labels = inputs["labels"][:, 1:]
        total = self.weights[labels[labels != -100]].sum()

        def share(first: int) -> tuple[torch.Tensor, tuple[torch.Tensor, ...]]:
            rows = {name: value[first :: self.workers] for name, value in inputs.items()}
            nats, targets = self.nats(model, rows)
            return nats.detach(), torch.autograd.grad((nats * self.weights[targets]).sum() / total, weights)

        parts = list(self.pool.map(share, range(min(len(inputs["input_ids"]), self.workers))))
        for weight, *grads in zip(weights, *(grads for _, grads in parts), strict=True):
            weight.grad = torch.stack(grads).sum(0)
        return torch.cat([nats for nats, _ in parts]).mean()

    def log(self, logs, *args, **kwargs):
        """Add the training speed in tokens per second, padding included."""
        if "loss" in logs:
            logs = {**logs, "tokens_per_second": round(self.tokens / max(time.time() - self.began, 1e-9), 1)}
        super().log(logs, *args, **kwargs)


class Sitting(TrainerCallback):
    """End a sitting with a checkpoint, after so many minutes or on SIGTERM."""

    def __init__(self, minutes: float) -> None:
        self.until = time.time() + 60 * minutes

    def on_train_begin(self, args, state, control, **kwargs):
        self.before = signal.signal(signal.SIGTERM, lambda *_: setattr(self, "until", 0.0))

    def on_train_end(self, args, state, control, **kwargs):
        signal.signal(signal.SIGTERM, self.before)

    def on_step_end(self, args, state, control, **kwargs):
        if time.time() > self.until:
            control.should_save = control.should_training_stop = True


def config(args: argparse.Namespace, work: Path) -> SFTConfig:
    """Return the trainer's config. The base weights stay in bf16, as loaded; the adapter is fp32."""
    return SFTConfig(
        output_dir=str(work),
        max_steps=args.steps,
        per_device_train_batch_size=1,
        learning_rate=args.lr,
        lr_scheduler_type="warmup_stable_decay",
        lr_scheduler_kwargs={"num_decay_steps": args.decay, "min_lr_ratio": 0.02},
        warmup_steps=args.warmup,
        weight_decay=0.0,
        max_grad_norm=1.0,
        logging_steps=5,
        save_steps=args.save_every,
        save_total_limit=2,
        seed=args.seed,
        train_sampling_strategy="sequential",
        dataset_kwargs={"skip_prepare_dataset": True},
        max_length=None,
        bf16=False,
        gradient_checkpointing=False,
        use_cpu=True,
        report_to="none",
        disable_tqdm=True,
        dataloader_pin_memory=False,
    )


def publish(checkpoint: Path, args: argparse.Namespace) -> None:
    """Write the adapter of a checkpoint to ``--out`` in fp16, with its loss log and the arguments of its training."""
    tensors, _ = store.read_tensors(checkpoint / "adapter_model.safetensors")
    store.write_tensors({k: v.half() for k, v in tensors.items()}, {"format": "pt"}, args.out / "adapter_model.safetensors")
    store.write_json(store.read_json(checkpoint / "adapter_config.json"), args.out / "adapter_config.json")
    state = store.read_json(checkpoint / "trainer_state.json")
    fields = ("step", "loss", "learning_rate", "grad_norm", "tokens_per_second")
    log = [{k: row[k] for k in fields if k in row} for row in state["log_history"] if "loss" in row]
    store.write_text("".join(json.dumps(row) + "\n" for row in log), args.out / "loss.jsonl")
    sittings = [json.loads(line) for line in store.read_lines(args.work / "sittings.jsonl")]
    store.write_json({"step": state["global_step"], "sittings": sittings}, args.out / "training.json")


def record(args: argparse.Namespace, newest: str | None) -> None:
    """Record in ``--work`` the first step and the arguments of this sitting."""
    arguments = {k: v for k, v in vars(args).items() if k not in ("out", "work", "minutes")}
    row = {"from_step": int(newest.rpartition("-")[2]) if newest else 0, "arguments": arguments}
    with open(args.work / "sittings.jsonl", "a") as file:
        print(json.dumps(row), file=file)


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--out", type=Path, required=True, help="directory of the adapter")
    parser.add_argument("--work", type=Path, default=Path("runs/smol"), help="directory of the resumable state")
    parser.add_argument("--steps", type=int, default=2000)
    parser.add_argument("--first", type=int, default=1000, help="steps of the first lesson")
    parser.add_argument("--decay", type=int, default=400, help="steps at the end over which the learning rate decays")
    parser.add_argument("--warmup", type=int, default=20)
    parser.add_argument("--minutes", type=float, default=150, help="stop this sitting after so many minutes")
    parser.add_argument("--batch-tokens", type=int, default=1024, help="padded tokens per batch")
    parser.add_argument("--lr", type=float, default=8e-4)
    parser.add_argument("--rank", type=int, default=16)
    parser.add_argument("--seed", type=int, default=0)
    parser.add_argument("--digits", type=float, default=4.0, help="weight of a digit in the loss; other tokens have weight 1")
    parser.add_argument("--workers", type=int, default=2, help="threads that share a batch")
    parser.add_argument("--save-every", type=int, default=25)
    parser.add_argument("--base", default=None, help="another base model for toolkit.lm.load, to test the script")
    parser.add_argument("--dtype", choices=("bfloat16", "float32"), default="bfloat16")
    args = parser.parse_args()
    args.work.mkdir(parents=True, exist_ok=True)
    set_seed(args.seed)
    newest = get_last_checkpoint(str(args.work))
    if args.minutes > 0:
        record(args, newest)
        base = load_base(args.base, getattr(torch, args.dtype))
        pad = base.tokenizer.pad_token_id
        lessons = [(True, min(args.first, args.steps)), (False, max(args.steps - args.first, 0))]
        data = [
            columns(batch, pad)
            for first, steps in lessons
            for batch in islice(batches(base, args.seed, args.batch_tokens, first=first), steps)
        ]
        lora = LoraConfig(
            r=args.rank, lora_alpha=2 * args.rank, target_modules="all-linear", task_type="CAUSAL_LM", base_model_name_or_path=BASE
        )
        model = get_peft_model(base.model, lora)
        model.peft_config["default"].base_model_name_or_path = BASE
        trainer = ResponseTrainer(
            model=model,
            args=config(args, args.work),
            train_dataset=Dataset.from_list(data),
            processing_class=base.tokenizer,
            data_collator=lambda rows: {k: torch.tensor(v) for k, v in rows[0].items()},
            callbacks=[Sitting(args.minutes)],
            workers=args.workers,
            digits=args.digits,
        )
        trainer.train(resume_from_checkpoint=newest)
        newest = get_last_checkpoint(str(args.work))
    if newest is None:
        parser.error(f"{args.work} holds no checkpoint yet: train first, without --minutes 0")
    publish(Path(newest), args)


if __name__ == "__main__":
    main()
