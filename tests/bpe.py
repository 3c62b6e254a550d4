"""A tiny random model with a byte-level BPE tokenizer of its own: several characters a token, a system prompt, stripped messages."""

from __future__ import annotations

import random
from collections.abc import Callable
from functools import cache
from itertools import islice

import torch
from families import tokenizer as tiny_tokenizer
from tokenizers import Tokenizer, decoders, models, pre_tokenizers, trainers
from transformers import AutoModelForCausalLM, LlamaConfig, PreTrainedTokenizerBase, PreTrainedTokenizerFast

from toolkit import lm as lms
from toolkit.lm import LM
from toolkit.tasks import needle
from toolkit.tasks.haystack import Haystack
from toolkit.types import Span

TEMPLATE = (
    "<|start|>system\nBe brief.<|end|>\n{% for m in messages %}<|start|>{{ m['role'] }}\n{{ m['content'] | trim }}<|end|>\n"
    "{% endfor %}{% if add_generation_prompt %}<|start|>assistant\n{% endif %}"
)


def random_lm(tokenizer: PreTrainedTokenizerBase, *, context: int = 2048, name: str = "tiny bpe") -> LM:
    """A random model of eight dimensions around a tokenizer: what these tests read of a model is its config."""
    config = LlamaConfig(
        vocab_size=len(tokenizer),
        hidden_size=8,
        intermediate_size=8,
        num_hidden_layers=1,
        num_attention_heads=1,
        max_position_embeddings=context,
        bos_token_id=None,
        eos_token_id=0,
        pad_token_id=0,
    )
    torch.manual_seed(0)
    return lms.wrap(AutoModelForCausalLM.from_config(config), tokenizer, name=name)


@cache
def bpe_lm(change: Callable[[str], str] | None = None) -> LM:
    """A model whose BPE was trained on needles and filler; ``change`` changes its chat template."""
    text = [*islice(needle.sentences(random.Random(0)), 200), *(fact.sentence for fact in needle.facts("train", 50))]
    core = Tokenizer(models.BPE())
    core.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False)
    core.decoder = decoders.ByteLevel()
    alphabet = pre_tokenizers.ByteLevel.alphabet()
    trainer = trainers.BpeTrainer(
        vocab_size=600, special_tokens=["<|end|>", "<|start|>"], initial_alphabet=alphabet, show_progress=False
    )
    core.train_from_iterator(text, trainer)
    tokenizer = PreTrainedTokenizerFast(tokenizer_object=core, eos_token="<|end|>", pad_token="<|end|>")
    tokenizer.chat_template = (change or str)(TEMPLATE)
    return random_lm(tokenizer)


def lm_of(kind: str) -> LM:
    """``"bpe"``, or ``"characters"``: the tiny reasoner's tokenizer and template around a random model."""
    return bpe_lm() if kind == "bpe" else random_lm(tiny_tokenizer(), name="tiny characters")


def read(lm: LM, found: Haystack, span: Span) -> str:
    """Text of the tokens of a span."""
    return lm.text(found.prompt_ids[span.start : span.stop])


def about(text: str) -> str:
    """A BPE token may begin with the blank before a word, and end with the mark behind it."""
    return text.strip().rstrip(".;,")
