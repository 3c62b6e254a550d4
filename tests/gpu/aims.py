"""What is measured on a GPU, and what is to be reached: one line per row of the report."""

from __future__ import annotations

from dataclasses import dataclass

STAGES = {"right": 90, "fast": 200, "train": 280}
"""Stages in the order in which they run, and the seconds that each may take."""


@dataclass(frozen=True)
class Aim:
    """One row of the report.

    Attributes:
        stage: ``"right"``, ``"fast"`` or ``"train"``.
        check: Name of the function in the stage's module that measures the row.
        row: What is measured, with its unit.
        reach: What is to be reached, such as ``"<= 1.05"``; ``None`` for a row that only informs.
        on_card: True if the reach holds for a GPU and full size only. Then small runs and runs on a CPU are not judged by it.
    """

    stage: str
    check: str
    row: str
    reach: str | None = None
    on_card: bool = False

    def met(self, value: float) -> bool:
        """Return whether a value reaches the aim. NaN never does."""
        sign, number = (self.reach or "").split()
        return {"<=": value <= float(number), ">=": value >= float(number), "==": value == float(number)}[sign]


def _aims(stage: str, check: str, *rows: tuple[str, str | None], on_card: bool = False) -> tuple[Aim, ...]:
    return tuple(Aim(stage, check, row, reach, on_card) for row, reach in rows)


AIMS = (
    # --- right: the numbers of a CPU, within rounding; "card" is the GPU, or the same CPU where there is none ---
    *_aims("right", "precision", ("TF32 allowed in fp32 products (0: no)", "== 0"),
           ("fp32 product against fp64, relative error", "<= 1e-5")),
    *_aims("right", "identities_fp32", ("families refused in fp32", "== 0"), ("largest deviation in fp32", "<= 1e-4")),
    *_aims("right", "identities_bf16", ("families refused in bf16", "== 0"), ("largest deviation in bf16", None)),
    *_aims("right", "rollouts", ("share of responses equal, CPU and card", None), ("first differences that are no tie", "== 0"),
           ("log-probabilities up to there, largest difference (nats)", "<= 1e-3")),
    *_aims("right", "batches", ("share equal, batch 16 against 256", None), ("share equal, batch 1 against 256", None),
           ("first differences that are no tie, batches", "== 0"), ("share equal in a fixed shape, a part against all", ">= 1"),
           ("bf16: share equal, batch 16 against 256", None)),
    *_aims("right", "slots", ("share equal, slots against batches", None), ("first differences that are no tie, slots", "== 0"),
           ("recordings that failed", "== 0")),
    *_aims("right", "slots", ("steps recorded as CUDA graphs", ">= 1"), on_card=True),
    *_aims("right", "moments", ("sums, relative difference", "<= 1e-4"), ("outer products, relative difference", "<= 1e-4")),
    *_aims("right", "entropies", ("entropies, largest difference (nats)", "<= 1e-3")),
    *_aims("right", "attention_rows", ("attention rows, largest difference", "<= 1e-4")),
    *_aims("right", "edited", ("edited weights, logits, relative difference", "<= 1e-4"),
           ("edit at run time against edit in weights, relative difference", "<= 1e-4"), ("saved and loaded: weights that differ", "== 0")),
    *_aims("right", "steered", *((f"steered in {phase}, logits, relative difference", "<= 1e-4")
                                 for phase in ("all", "prompt", "think", "answer", "newest", "a ramp")),
           ("steered while thinking: share of responses equal", None), ("steered: first differences that are no tie", "== 0")),
    *_aims("right", "masked", *((f"masked ({op}), logits, relative difference", "<= 1e-4") for op in ("zero", "mean", "uniform"))),
    *_aims("right", "grpo_gradient", ("gradient of one step, 1 - cosine", "<= 1e-4"), ("gradient, ratio of norms less 1", "<= 1e-3")),
    *_aims("right", "grpo_resumed", ("stopped and resumed, relative difference of weights", "<= 1e-4")),
    # --- fast: real sizes, bf16, random weights ---
    *_aims("fast", "machine", ("memory bandwidth, read and written (TB/s)", None), ("bf16 products (TFLOP/s)", None)),
    *_aims("fast", "decoding", ("1.5B, 64 rows, in batches (ms per step)", None), ("1.5B, 64 rows, in slots (ms per step)", None),
           ("1.5B, 64 rows, captured (ms per step)", None), ("1.5B, 64 rows, memory-bound limit (ms per step)", None)),
    *_aims("fast", "decoding", ("1.5B, captured step over the limit", "<= 2"), ("1.5B, captured tokens/s over generate", ">= 8"),
           on_card=True),
    *_aims("fast", "steering", ("1.5B, steered over plain, time", "<= 1.03"), on_card=True),
    *_aims("fast", "waits", ("waits for the card per decoded token", "<= 0.2"), ("waits for the card per layer of collect", "<= 0.2"),
           on_card=True),
    *_aims("fast", "collecting", ("collect over a bare forward, time", "<= 1.05"),
           ("collect with entropies over a forward with logits, time", "<= 1.05"), on_card=True),
    *_aims("fast", "grpo_step", ("GRPO step, 16 x 8, LoRA, over TRL's, time", "<= 0.5"), on_card=True),
    *_aims("fast", "grpo_step", ("GRPO step (s)", None), ("GRPO step, peak memory (GB)", None), ("TRL's step, peak memory (GB)", None)),
    *_aims("fast", "long_completions", ("8k-token completions, 1.5B, one step's peak memory (GB)", "<= 24"), on_card=True),
    *_aims("fast", "retrieval", ("retrieval scores at 32k tokens (s)", None), ("retrieval at 32k, peak memory (GB)", None),
           ("retrieval at 8k over eager, time", None)),
    *_aims("fast", "retrieval", ("retrieval at 32k over eager, time", "<= 0.2"), on_card=True),
    *_aims("fast", "larger", ("4B, 64 rows, captured (ms per step)", None)),
    *_aims("fast", "larger", ("4B, captured step over the limit", "<= 2"), ("4B, captured tokens/s over generate", ">= 8"), on_card=True),
    *_aims("fast", "editing", ("plan, edit and save 1.5B (s)", None), ("saved 1.5B: weights that differ", "== 0")),
    *_aims("fast", "skewed", ("skewed lengths, ours (tokens/s)", None), ("skewed lengths, over generate", None),
           ("skewed lengths, over generate_batch", None)),
    # --- train: the mid reasoner ---
    *_aims("train", "training", ("weights (millions)", ">= 20"), ("attention heads", ">= 100"), ("d_model", ">= 512"),
           ("tokens (millions)", ">= 200"), on_card=True),
    *_aims("train", "training", ("tokens per second", None), ("share of time spent waiting for data", "<= 0.1"),
           ("loss at the end (nats)", None)),
    *_aims("train", "pieces", ("largest piece (MiB)", "<= 16"), ("pieces joined: weights that differ", "== 0")),
    *_aims("train", "sampled", ("accuracy on test problems", None), ("think spans closed", None), ("think tokens, mean", None)),
)  # fmt: skip
