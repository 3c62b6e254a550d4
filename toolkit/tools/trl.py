"""Use a toolbox in TRL: ``for_trl`` makes TRL's own tool loop speak the text protocol of a toolbox.

TRL's ``GRPOTrainer(tools=...)`` runs tools by itself. It finds calls with the tokenizer's response template, and renders results with the
chat template. ``for_trl`` returns functions and a tokenizer with both, so that TRL samples the same episodes as the toolkit's own loop. TRL
is not imported here::

    speaks = for_trl(lm.tokenizer, toolbox)
    lm.model.generation_config.eos_token_id = [*sorted(lm.eos_ids), *speaks.stop_ids]
    GRPOTrainer(model=lm.model, processing_class=speaks.tokenizer, tools=speaks.functions, ...)  # max_tool_calling_iterations=max_calls

TRL ends a turn only at an end-of-sequence token. So the closing mark of every call must be a single token of the vocabulary. There is one
difference: at a closing mark without an opening mark, which is no call, TRL ends the response, while our loop goes on.
"""

from __future__ import annotations

import json
import re
from collections.abc import Callable
from copy import deepcopy
from dataclasses import dataclass
from typing import Any

from transformers import PreTrainedTokenizerBase

from toolkit.tools.base import Tool
from toolkit.tools.marks import Call, Toolbox


@dataclass(frozen=True)
class ForTRL:
    """Functions, tokenizer and stop ids with which ``GRPOTrainer`` answers the calls of a toolbox.

    Attributes:
        functions: Functions for ``tools=``. They have the limits of the tools.
        tokenizer: Copy of the tokenizer for ``processing_class=``, with a chat template that renders results and a response template that
            finds calls.
        stop_ids: Ids of the closing marks of calls. Add them to ``model.generation_config.eos_token_id``.
    """

    functions: list[Callable[..., str]]
    tokenizer: PreTrainedTokenizerBase
    stop_ids: list[int]


def for_trl(tokenizer: PreTrainedTokenizerBase, tools: Toolbox, reserved: tuple[str, ...] = ("<think>", "</think>")) -> ForTRL:
    """Return the functions, tokenizer and stop ids with which TRL answers the calls of a toolbox in its own loop.

    Args:
        tokenizer: Tokenizer of the model, with a chat template.
        tools: The toolbox.
        reserved: Think tags of the model. They and the special tokens are removed from results.

    Raises:
        ValueError: there is no chat template, it is not one text, or a closing mark is not a single token.
    """
    if not isinstance(tokenizer.chat_template, str):
        raise ValueError("The tokenizer needs one chat template, as a text, to use tools in TRL.")
    vocabulary, stop_ids = tokenizer.get_vocab(), []
    for tool in tools.tools:
        close = tools.marks_of(tool).close
        if close not in vocabulary:
            raise ValueError(
                f"TRL cannot stop at {close!r}, the end of a call of {tool.name}, because it is not a single token: add it to the tokenizer, "
                "or pass Toolbox.marks."
            )
        stop_ids.append(vocabulary[close])
    mine = deepcopy(tokenizer)
    mine.chat_template = _chat_template(tokenizer.chat_template, tools)
    mine.response_template = _response_template(tokenizer, tools)  # type: ignore[attr-defined]  # of transformers 5.13 and newer
    words = (*reserved, *map(str, tokenizer.all_special_tokens))
    return ForTRL([_function(tools, tool, words) for tool in tools.tools], mine, stop_ids)


def _function(tools: Toolbox, tool: Tool, reserved: tuple[str, ...]) -> Callable[..., str]:
    def answer(argument: str) -> str:
        text = tools.answer(Call(tool, argument), reserved)[1]
        return text[len(tools.result.open) : len(text) - len(tools.result.close)]

    answer.__name__ = answer.__qualname__ = tool.name
    answer.__doc__ = f"{tool.schema['function']['description']}\n\nArgs:\n    argument: What to pass to the tool."
    return answer


def _chat_template(template: str, tools: Toolbox) -> str:
    """Return a chat template that renders a conversation with tool calls as bare text, and any other as ``template`` does.

    TRL renders a conversation with tool calls only to learn how a result is written after a call.
    """
    marks = {tool.name: [tools.marks_of(tool).open, tools.marks_of(tool).close] for tool in tools.tools}
    opening, closing = json.dumps(tools.result.open), json.dumps(tools.result.close)
    return (
        "{% if messages | selectattr('tool_calls', 'defined') | list %}{% set marks = " + json.dumps(marks) + " %}"
        "{% for m in messages %}"
        "{% if m['role'] == 'tool' %}{{ " + opening + " + m['content'] + " + closing + " }}{% else %}{{ m['content'] }}{% endif %}"
        "{% for call in m['tool_calls'] or [] %}{% set f = call['function'] %}"
        "{% set mark = marks[f['name']] or ['<' + f['name'] + '>', '</' + f['name'] + '>'] %}"
        "{{ mark[0] }}{{ f['arguments']['argument'] or f['arguments'] | tojson }}{{ mark[1] }}"
        "{% endfor %}{% endfor %}{% else %}" + template + "{% endif %}"
    )


def _response_template(tokenizer: PreTrainedTokenizerBase, tools: Toolbox) -> dict[str, Any]:
    question = [{"role": "user", "content": "1"}]
    before, whole = (
        str(tokenizer.apply_chat_template(question, tokenize=False, add_generation_prompt=more)) for more in (False, True)
    )
    header = whole.removeprefix(before)
    opens = "|".join(re.escape(tools.marks_of(tool).open) for tool in tools.tools)
    closes = "|".join(re.escape(tools.marks_of(tool).close) for tool in tools.tools)
    if len(tools.tools) == 1:
        name: str = tools.tools[0].name
    elif any(tool.name in tools.marks for tool in tools.tools):
        raise ValueError(
            "With several tools, TRL can tell their calls apart only by the marks <name> and </name>: leave Toolbox.marks out."
        )
    else:
        name, opens = "{name}", "<(?P<name>" + "|".join(re.escape(tool.name) for tool in tools.tools) + ")>"
    call = {"type": "function", "function": {"name": name, "arguments": {"argument": "{content}"}}}
    return {
        "defaults": {"role": "assistant"},
        # Of a response with results, only what follows the last result is read.
        "start_anchor": [header, tools.result.close],
        "fields": {
            "tool_calls": {"open_pattern": opens, "close_pattern": closes, "repeats": True, "content": "text", "transform": call},
            "content": {"close": str(tokenizer.eos_token), "content": "text", "content_args": {"strip": False}},
        },
    }
