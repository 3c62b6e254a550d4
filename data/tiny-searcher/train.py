"""Train the tiny searcher: a small Qwen3 that thinks, searches a corpus, judges the results and answers.

    python data/tiny-searcher/train.py --out data/tiny-searcher --minutes 50

Model, optimizers, schedule and resuming are those of ``data/tiny-reasoner/train.py``. (seed, chunk index) determines every chunk of data. Each
chunk is about a new world (``toolkit/tasks/generators/worlds.py``): facts that are the same in all worlds are learnt by heart, all others
must be searched for. The world of the task ``searching`` is not among them. The loss covers all that the model writes; results are read only.
Most of the training has two kinds of drills beside episodes: judging results, and recalling facts. The weights are saved in float16.
"""

from __future__ import annotations

import argparse
import random
import sys
from pathlib import Path

import torch
from tokenizers import AddedToken, Regex, Tokenizer, models, pre_tokenizers
from transformers import PreTrainedTokenizerFast

from toolkit.tasks import searching
from toolkit.tasks.generators import cues, searches, worlds
from toolkit.types import Problem

sys.path.insert(0, str(Path(__file__).parents[1]))
import publish

BASE = publish.script("tiny-reasoner/train.py")
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
    return BASE.batched(rows, args.batch_tokens, rng)


def main() -> None:
    parser = BASE.parser_of(__doc__, tokens=6.4e6, minutes=60, chunk=1024)
    parser.add_argument("--judging-share", type=float, default=0.3, help="share of rows that are drills in judging")
    parser.add_argument("--recall-share", type=float, default=0.1, help="share of rows that are drills in recalling facts")
    parser.add_argument("--opening-share", type=float, default=0.25, help="share of rows that are first moves after a question")
    parser.add_argument("--drills-until", type=float, default=0.93, help="share of the tokens at which the drills end")
    BASE.train(parser.parse_args(), build_tokenizer, chunk, context=512, dtype=torch.float16)


if __name__ == "__main__":
    main()
