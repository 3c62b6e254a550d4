"""Helpers of the scripts in ``data/``: keep work, load another script, shuffle rewards, replace a marked part of a page, draw a PNG."""

from __future__ import annotations

import argparse
import importlib.util
import re
import shutil
import subprocess
import sys
import tempfile
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from types import ModuleType
from typing import Any, ClassVar

import numpy as np
import plotly.graph_objects as go
import torch
from tokenizers import Regex, Tokenizer, models, pre_tokenizers
from transformers import PreTrainedTokenizerFast

from toolkit import lm as lms
from toolkit import stats, store
from toolkit.lm import LM
from toolkit.metrics import RANGES
from toolkit.rewards import Reward, RewardBatch, RewardValues

HERE = Path(__file__).parent
ROOT = HERE.parent
README = ROOT / "README.md"


def work_folder(script: str, code: str, depends: Any = None, *, scripts: Sequence[str] = ()) -> Path:
    """Return the folder in ``runs/`` in which a script keeps its work, so that it can be stopped. Another code, setting or model has another folder.

    The text of this file is part of the key, since models and rewards of scripts are made here.

    Args:
        script: Path of the script, ``__file__``. Its text, with the settings in it, is part of the key.
        code: Key of the toolkit's modules that the results depend on, from ``store.code_of``.
        depends: Other facts that they depend on, such as the fingerprint of a model. JSON-serialisable.
        scripts: Other scripts in ``data/`` that the script loads, such as ``tiny-reasoner/train.py``. Their texts are part of the key.
    """
    path = Path(script)
    texts = [text.read_text() for text in (path, HERE / "publish.py", *(ROOT / "data" / other for other in scripts))]
    key = store.key([code, depends, *texts])
    return store.writable(ROOT / "runs" / path.parent.name / key)


def script(path: str) -> ModuleType:
    """Return a script in ``data/``, such as ``tiny-reasoner/train.py``, as a module. Names with hyphens cannot be imported."""
    spec = importlib.util.spec_from_file_location(re.sub(r"\W", "_", path.removesuffix(".py")), ROOT / "data" / path)
    assert spec and spec.loader
    module = sys.modules[spec.name] = importlib.util.module_from_spec(spec)  # data classes look their module up
    spec.loader.exec_module(module)
    return module


@dataclass(frozen=True)
class Shuffled:
    """A reward dealt out at random among the responses of each group: a control that keeps its values and takes away their meaning.

    A response keeps the components of a reward together. Equal seeds and steps give equal orders.

    Attributes:
        inner: The reward, without a state.
        seed: Seed of the orders.
    """

    inner: Reward
    seed: int

    name: ClassVar[str] = "shuffled"

    @property
    def needs(self) -> frozenset[str]:
        return self.inner.needs

    def __call__(self, batch: RewardBatch) -> RewardValues:
        rng, order = np.random.default_rng([self.seed, batch.step]), np.arange(len(batch))
        for group in np.unique(batch.groups):
            rows = np.flatnonzero(batch.groups == group)
            order[rows] = rng.permutation(rows)
        return RewardValues.sum(**{name: values[order] for name, values in self.inner(batch).components.items()})


def small_model(texts: Sequence[str], pieces: str, shape: Mapping[str, int], name: str, *, context: int) -> LM:
    """Return a small model with random weights (seed 0), made like the tiny reasoner, with one token per word, number and sign of the texts.

    A script that keeps work of such a model gives ``scripts=("tiny-reasoner/train.py",)`` to ``work_folder``.

    Args:
        texts: The texts. Tags such as ``<think>`` and ``<|end|>`` are left out: they are tokens of their own.
        pieces: Regular expression of a token.
        shape: Sizes of the model, as in the arguments of ``tiny-reasoner/train.py``: ``layers``, ``d_model``, ``d_mlp``, ``heads``, ``head_dim``.
        name: Name of the model.
        context: Longest sequence in tokens.
    """
    base = script("tiny-reasoner/train.py")
    words = sorted({piece for text in texts for piece in re.findall(pieces, re.sub(r"</?\w+>|<\|\w+\|>", " ", text))})
    backend = Tokenizer(models.WordLevel({token: i for i, token in enumerate([*base.SPECIALS, *words])}, unk_token="<|unk|>"))
    backend.pre_tokenizer = pre_tokenizers.Sequence(
        [pre_tokenizers.Split(Regex(" +"), "removed"), pre_tokenizers.Split(Regex(pieces), "isolated")]
    )
    tokenizer = PreTrainedTokenizerFast(
        tokenizer_object=backend, pad_token="<|pad|>", unk_token="<|unk|>", eos_token="<|end|>", chat_template=base.TEMPLATE,
        additional_special_tokens=["<|user|>", "<|assistant|>", "<think>", "</think>"], padding_side="left",
        clean_up_tokenization_spaces=False, model_max_length=context,
    )  # fmt: skip
    with torch.random.fork_rng():
        torch.manual_seed(0)
        model = base.build_model(argparse.Namespace(**shape), len(tokenizer))
    return lms.wrap(model, tokenizer, name=name)


def estimate(values: Any, minus: Any = None, *, unit: str = "share") -> dict[str, float]:
    """Return the mean over seeds and problems, or over paired differences, with a 95 % interval that ends where the unit does.

    Args:
        values: One number per seed and problem, ``[seeds, problems]``.
        minus: Numbers to subtract, paired; ``None`` for the mean of ``values``.
        unit: Unit of the numbers, such as ``share`` or ``tokens``.
    """
    rows = np.array(values, float)
    low, high = RANGES[unit]
    e = stats.mean_effect(rows, None if minus is None else np.array(minus, float), seeded=len(rows) > 1)
    e = e.within((low, high) if minus is None else (low - high, high - low))
    return {"mean": e.mean, "low": e.low, "high": e.high}


def splice(name: str, text: str, path: Path = README) -> None:
    """Replace the text between ``<!-- NAME: begin -->`` and ``<!-- NAME: end -->``.

    Raises:
        ValueError: the pair of marks does not occur exactly once.
    """
    before, after = f"<!-- {name}: begin -->", f"<!-- {name}: end -->"
    page, count = re.subn(f"{before}.*?{after}", lambda _: f"{before}\n\n{text}\n\n{after}", path.read_text(), flags=re.DOTALL)
    if count != 1:
        raise ValueError(f"{path} has {count} pairs of the marks {before} and {after}: expected one.")
    store.write_text(page, path)


def draw(figure: go.Figure, path: Path, width: int, height: int) -> None:
    """Write a figure as a PNG with Chromium; without Chromium, print that the old file stays."""
    photograph(
        figure.update_layout(width=width, height=height).to_html(config={"displayModeBar": False}), path, width + 20, height + 20
    )


def photograph(page: str, path: Path, width: int, height: int) -> None:
    """Write a web page, given as HTML, as a PNG with Chromium; without Chromium, print that the old file stays."""
    chromium = shutil.which("chromium")
    if chromium is None:
        print(f"Chromium is not installed: {path} is not updated.")
        return
    with tempfile.TemporaryDirectory() as folder:
        store.write_text(page, Path(folder) / "page.html")
        options = [
            "--headless", "--no-sandbox", "--disable-gpu", "--disable-background-networking", "--hide-scrollbars",
            f"--window-size={width},{height}", f"--user-data-dir={folder}/profile", "--virtual-time-budget=5000",
        ]  # fmt: skip
        shot = subprocess.run([chromium, *options, f"--screenshot={path}", f"{folder}/page.html"], capture_output=True, text=True)
        if shot.returncode:  # its output is full of harmless messages about the desktop: shown only here
            raise RuntimeError(f"Chromium could not draw {path}:\n{shot.stderr[-2000:]}")
