"""Use rewards in any TRL ``GRPOTrainer`` script: ``as_trl`` wraps a reward for ``reward_funcs=[as_trl(HAPO(), ...)]``.

TRL calls ``f(prompts, completions, completion_ids, **dataset columns, trainer_state, log_metric)``. The columns ``tokens``, ``token_ids``,
``text``, ``answer_text``, ``calls``, ``result_tokens``, ``written_tokens`` and, with ``stop_ids``, ``finish`` are computed from these
arguments. All other columns that a reward needs come from dataset columns of the same name, or from functions passed as ``columns``.

Rows with the same problem id form a group; the ids are a dataset column. Two problems with the same text but different ids are two groups.
If the dataset has no ids, every ``generations`` consecutive rows form a group (``generations`` is an argument of ``as_trl``).

In a run of several processes, TRL gives each process a slice of the rows, and a group may be split between two processes. Pass
``gather=accelerate.utils.gather_object``: every process then scores all rows and returns the rewards of its slice. In this way statistics
cover whole groups, and the state of a reward is the same in all processes.

For a stateful reward, pass ``callbacks=[toolkit.grpo.kept.Kept(wrapped)]`` to the trainer, where ``wrapped`` is the result of ``as_trl``.
This callback saves the state of the reward in the checkpoints. TRL is not imported here.

The column ``answer_text`` holds the text after the closing think tag, or "" if thinking was opened but never closed. Two steps find the
tags:

- The text of a completion is decoded from its token ids. TRL's completions lack special tokens, and a tag may be a special token.
- The prompt is rendered by the chat template, because the template may open thinking at the end of the prompt.

Both steps need the tokenizer of the trainer. The trainer is taken from TRL's argument ``log_metric``, a bound method of the trainer.
If a TRL version does not pass this argument, completions are taken as TRL passes them, and a prompt that is a list of messages counts as
one that does not open thinking.
"""

from __future__ import annotations

import re
import uuid
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from itertools import groupby
from typing import Any

import numpy as np
from numpy import ndarray

from toolkit.rewards.answers import CLOSE, OPEN, answer_text, closed_answer_text
from toolkit.rewards.batch import Reward, RewardBatch, has_state_by_problem
from toolkit.rewards.columns import column, object_array

TAIL = 32  # the closing mark of a call is searched in this number of tokens before a result
Column = Callable[..., Sequence[Any]]
"""A function that computes a column: it takes TRL's keyword arguments and returns one value per completion."""


def as_trl(
    reward: Reward,
    *,
    columns: Mapping[str, Column] | None = None,
    group: str = "problem_id",
    generations: int | tuple[int, int] | None = None,
    stop_ids: Sequence[int] = (),
    gather: Callable[[list], list] | None = None,
    close: str | None = CLOSE,
    open: str | None = OPEN,
) -> TRLReward:
    """Return a reward wrapped as a function for TRL's ``reward_funcs``.

    >>> from toolkit.rewards.slpo import SLPO
    >>> reward = as_trl(SLPO(alpha=0.5), columns={"correct": lambda completions, answer, **_: [c == a for c, a in zip(completions, answer)]})
    >>> reward(["1+2=?"] * 2, ["3", "3"], [[8], [8, 8]], answer=["3", "3"], problem_id=["p", "p"])
    [1.5, 1.0]

    Args:
        reward: Any reward of ``rewards.ALL``, or one of your own.
        columns: Column name -> function that computes the column. It replaces a dataset column of the same name. Example:
            ``{"correct": lambda completions, answer, **_: [...]}``.
        group: Name of the dataset column with problem ids.
        generations: Number of completions per problem, needed only if the dataset has no problem ids: TRL's ``num_generations``, or the
            pair ``(num_generations, num_generations_eval)`` if they differ. A reward that stores a state by problem id needs a dataset
            with ids.
        stop_ids: End-of-sequence token ids, for rewards that need the column ``finish``.
        gather: ``accelerate.utils.gather_object`` in a run of several processes; ``None`` in a run of one process.
        close: Closing think tag of the model, for rewards that need ``answer_text``; ``None`` if the model has none.
        open: Opening think tag of the model, for rewards that need ``answer_text``. ``None`` if the model has none: every response then
            begins with thinking.
    """
    both = generations if isinstance(generations, tuple) or generations is None else (generations, generations)
    return TRLReward(reward, dict(columns or {}), group, both, frozenset(stop_ids), gather, close, open)


@dataclass(frozen=True)
class TRLReward:
    """A reward as a function for TRL, returned by ``as_trl``. Its fields are the arguments of ``as_trl``.

    It has no state besides that of the reward. It can be pickled if the reward and the functions in ``columns`` can be pickled.
    """

    reward: Reward
    columns: Mapping[str, Column]
    group: str
    generations: tuple[int, int] | None
    stop_ids: frozenset[int]
    gather: Callable[[list], list] | None
    close: str | None
    open: str | None

    @property
    def __name__(self) -> str:
        """Name of the reward in TRL's logs."""
        return self.reward.name

    def __call__(
        self, prompts: Sequence[Any], completions: Sequence[Any], completion_ids: Sequence[Sequence[int]], **extra: Any
    ) -> list[float]:
        """Return the reward of each completion. The arguments are those with which TRL calls a reward function.

        Args:
            prompts: Prompt of each completion: a string or a list of messages.
            completions: The completions: strings or lists of messages.
            completion_ids: Token ids of each completion.
            **extra: Dataset columns by name, and TRL's ``trainer_state`` and ``log_metric``.

        Raises:
            MissingColumnError: A column that the reward needs is neither in the dataset nor in ``columns``, and cannot be computed from
                the completions.
            ValueError: The problem ids are missing and cannot be made (see ``as_trl``), the splits of the rows differ, or a reward is not
                finite.
        """
        arguments = dict(prompts=prompts, completions=completions, completion_ids=completion_ids, **extra)
        split, step = batch_split(extra), getattr(extra.get("trainer_state"), "global_step", 0)
        columns = self._columns(arguments, split)
        local = slice(0, len(completion_ids))  # rows of this process
        if self.gather is not None:
            columns, local = gather_columns(columns, self.gather)
        scored = self.reward(RewardBatch(columns, step, split))
        if not np.isfinite(scored.values).all():
            at = int(np.flatnonzero(~np.isfinite(scored.values))[0])
            raise ValueError(
                f"The reward {self.reward.name!r} is {scored.values[at]} at step {step} for problem {columns['problem_id'][at]!r}."
            )
        if (log := extra.get("log_metric")) is not None:
            for name, values in scored.components.items():
                log(f"{self.reward.name}/{name}", float(values[local].mean()))
        return scored.values[local].tolist()

    def _columns(self, arguments: Mapping[str, Any], split: str) -> dict[str, ndarray]:
        """Return the columns that the reward needs, and ``problem_id``: column name -> values.

        A column comes from a function in ``self.columns``, else from the dataset, else from a computation on TRL's completions. A column
        with none of these sources is left out.

        Args:
            arguments: The keyword arguments with which TRL calls a reward function, dataset columns included.
            split: ``"train"`` or ``"eval"``.
        """
        ids = arguments["completion_ids"]
        # Functions, so that only the columns that the reward needs are computed.
        computed: dict[str, Callable[[], ndarray]] = {
            "tokens": lambda: np.array([len(i) for i in ids], np.int64),
            "token_ids": lambda: object_array(tuple(i) for i in ids),
            "text": lambda: object_array(response_texts(arguments)),
            "answer_text": lambda: object_array(answer_texts(arguments, self.open, self.close)),
            "calls": lambda: np.array([len(tool_results(c)) for c in arguments["completions"]], np.int64),
            "result_tokens": lambda: np.array([mask.count(0) for mask in written_masks(arguments)], np.int64),
            "written_tokens": lambda: np.array([mask.count(1) for mask in written_masks(arguments)], np.int64),
        }
        if self.stop_ids:
            computed["finish"] = lambda: object_array("stop" if len(i) and i[-1] in self.stop_ids else "length" for i in ids)
        columns = {"problem_id": self._problem_ids(arguments, split)}
        for name in self.reward.needs - {"problem_id"}:
            if name in self.columns:
                columns[name] = column(self.columns[name](**arguments), len(ids))
            elif name in arguments:
                columns[name] = column(arguments[name], len(ids))
            elif name in computed:
                columns[name] = computed[name]()
        return columns

    def _problem_ids(self, arguments: Mapping[str, Any], split: str) -> ndarray:
        """Return the problem id of each completion.

        If the dataset has no ids, each run of ``generations`` consecutive completions gets one new id.

        Args:
            arguments: The keyword arguments with which TRL calls a reward function, dataset columns included.
            split: ``"train"`` or ``"eval"``; the two may differ in the number of completions per problem.

        Raises:
            ValueError: The dataset has no ids, and either the completions cannot be divided into groups of ``generations``, or the reward
                stores a state by problem id, for which new ids would not do.
        """
        if self.group in arguments:
            return object_array(arguments[self.group])
        n = len(arguments["completion_ids"])
        # generations is the pair (training, evaluation); False and True are its indices 0 and 1.
        size = self.generations[split == "eval"] if self.generations else 0
        if not size or n % size:
            raise ValueError(
                f"No column {self.group!r} in the dataset, and {n} completions do not split into groups of generations={size or None}: "
                "add a column of problem ids, or pass generations=num_generations."
            )
        if has_state_by_problem([self.reward]):  # its ids must stay the same from step to step
            raise ValueError(
                f"The reward {self.reward.name!r} remembers problems between steps: add a column {self.group!r} of problem ids to the dataset."
            )
        marker = uuid.uuid4().hex  # unique, so that chunks of two processes are different groups
        return object_array(f"{marker}-{i // size}" for i in range(n))


def gather_columns(columns: Mapping[str, ndarray], gather: Callable[[list], list]) -> tuple[dict[str, ndarray], slice]:
    """Collect the rows of all processes. Return ``(columns, rows)``.

    The columns have the rows of all processes, in the order of the processes. The slice ``rows`` selects those of this process.

    Args:
        columns: Column name -> values of the rows of this process.
        gather: ``accelerate.utils.gather_object``.
    """
    marker = uuid.uuid4().hex  # tells this process which of the gathered parts is its own
    parts = gather([(marker, dict(columns))])
    sizes = [len(part["problem_id"]) for _, part in parts]
    here = [m for m, _ in parts].index(marker)
    start = sum(sizes[:here])
    return {name: np.concatenate([part[name] for _, part in parts]) for name in columns}, slice(start, start + sizes[here])


def trainer_of(arguments: Mapping[str, Any]) -> Any:
    """Return the trainer that calls a reward function; ``None`` if TRL does not pass the argument ``log_metric``.

    ``log_metric`` is a bound method of the trainer, so the trainer is its ``__self__``.

    Args:
        arguments: The keyword arguments with which TRL calls a reward function.
    """
    return getattr(arguments.get("log_metric"), "__self__", None)  # TRL passes a bound method of the trainer


def response_texts(arguments: Mapping[str, Any]) -> list[str]:
    """Return the text of each completion, with special tokens: decoded from its token ids by the trainer's tokenizer.

    If the trainer is unknown (see ``trainer_of``), the text is the completion as TRL passes it, without special tokens.

    Args:
        arguments: The keyword arguments with which TRL calls a reward function.
    """
    tokenizer = getattr(trainer_of(arguments), "processing_class", None)
    if tokenizer is None:
        return [completion_text(c) for c in arguments["completions"]]
    return tokenizer.batch_decode([list(ids) for ids in arguments["completion_ids"]], skip_special_tokens=False)


def tool_results(completion: Any) -> list[list[Mapping[str, Any]]]:
    """Return the tool results in a completion: for each turn with calls that were answered, the list of its tool messages."""
    if isinstance(completion, str):
        return []
    return [list(run) for is_tool, run in groupby(completion, lambda message: message["role"] == "tool") if is_tool]


def written_masks(arguments: Mapping[str, Any]) -> list[list[int]]:
    """Return for each completion a list with one number per token: 1 if the model wrote the token, 0 if it belongs to a tool result.

    TRL does not pass its ``tool_mask`` to reward functions. But the trainer says which tokens it puts after a call, and they are found again
    in the completion, in order. Results that the environment of a ``rollout_func`` adds are not messages, and count as written.

    Args:
        arguments: The keyword arguments with which TRL calls a reward function.

    Raises:
        ValueError: A completion has tool messages, but the trainer is unknown, or a result is not found among the tokens.
    """
    masks = []
    for completion, ids in zip(arguments["completions"], arguments["completion_ids"], strict=True):
        mask, start = [1] * len(ids), 0
        for messages in tool_results(completion):
            suffix = _suffix(arguments, messages)
            start = _find(list(ids), suffix, start, trainer_of(arguments))
            mask[start : start + len(suffix)] = [0] * len(suffix)
            start += len(suffix)
        masks.append(mask)
    return masks


def _suffix(arguments: Mapping[str, Any], messages: list[Mapping[str, Any]]) -> list[int]:
    """Return the token ids that the trainer puts after a turn for these tool messages."""
    trainer = trainer_of(arguments)
    if not hasattr(trainer, "_get_tool_suffix_ids"):  # a private method, in TRL 1.16
        raise ValueError(
            "The tokens of tool results are counted by TRL's trainer, but this TRL does not pass it: use TRL 1.16 or newer."
        )
    return list(trainer._get_tool_suffix_ids(messages))


def _find(ids: list[int], part: list[int], start: int, trainer: Any) -> int:
    """Return the first index, from ``start`` on, at which a tool result begins: directly after the end of a turn.

    The same tokens elsewhere are text of the model, which may write what looks like a result before it calls a tool.

    Args:
        ids: Token ids of the completion.
        part: Token ids of the result.
        start: End of the result before, or 0.
        trainer: The trainer.
    """
    for at in range(start + 1, len(ids) - len(part) + 1):
        if ids[at : at + len(part)] == part and _ends_a_turn(ids[start:at], trainer):
            return at
    raise ValueError(f"A tool result of {len(part)} tokens follows no call in the completion of {len(ids)} tokens.")


def _ends_a_turn(ids: list[int], trainer: Any) -> bool:
    """Return True if TRL's sampling stops after these tokens: at an end-of-sequence token, or at the closing mark of a call."""
    tokenizer = trainer.processing_class
    if ids[-1] in trainer.eos_token_ids:
        return True
    # vLLM may stop at a mark of several tokens. The response template of ``tools.trl.for_trl`` names the marks.
    template = getattr(tokenizer, "response_template", None) or {}
    close = template.get("fields", {}).get("tool_calls", {}).get("close_pattern")
    return close is not None and re.search(f"(?:{close})$", tokenizer.decode(ids[-TAIL:], skip_special_tokens=False)) is not None


def answer_texts(arguments: Mapping[str, Any], open: str | None, close: str | None) -> list[str]:
    """Return the answer in each completion: the text after the closing think tag and after the last tool result.

    A result is not the model's answer, even if it holds the right one.

    Args:
        arguments: The keyword arguments with which TRL calls a reward function.
        open: Opening think tag, or ``None``.
        close: Closing think tag, or ``None``.
    """
    pairs = zip(response_texts(arguments), prompt_texts(arguments), strict=True)
    answers = [closed_answer_text(text, prompt, open=open, close=close) for text, prompt in pairs]
    if not any(map(tool_results, arguments["completions"])):
        return answers
    for i, (ids, mask) in enumerate(zip(arguments["completion_ids"], written_masks(arguments), strict=True)):
        if 0 in mask:  # both texts end where the completion ends, so the shorter one begins later
            after = trainer_of(arguments).processing_class.decode(
                list(ids)[len(mask) - mask[::-1].index(0) :], skip_special_tokens=False
            )
            answers[i] = min(answers[i], answer_text(after, None), key=len)
    return answers


def prompt_texts(arguments: Mapping[str, Any]) -> list[str]:
    """Return the text of each prompt as the model reads it.

    A prompt that is a string stays as it is. A list of messages is rendered by the trainer's chat template; if the trainer is unknown (see
    ``trainer_of``), the text of such a prompt is "".

    Args:
        arguments: The keyword arguments with which TRL calls a reward function.
    """
    trainer = trainer_of(arguments)
    tokenizer: Any = getattr(trainer, "processing_class", None)

    def rendered(messages: Any) -> str:
        switches = {
            "chat_template": getattr(trainer, "chat_template", None),
            **(getattr(trainer, "chat_template_kwargs", None) or {}),
        }
        return tokenizer.apply_chat_template(messages, add_generation_prompt=True, tokenize=False, **switches)

    return [p if isinstance(p, str) else "" if tokenizer is None else rendered(p) for p in arguments["prompts"]]


def completion_text(completion: Any) -> str:
    """Return a completion as text: the string itself, or the joined contents of its chat messages."""
    return completion if isinstance(completion, str) else "".join(str(m["content"]) for m in completion)


def batch_split(arguments: Mapping[str, Any]) -> str:
    """Return the split of a batch, ``"train"`` or ``"eval"``.

    If the dataset has a column ``split``, the result is ``"train"`` if this column holds ``"train"``, else ``"eval"``. Without such a
    column, the result is ``"train"`` if the trainer's model is in training mode, else ``"eval"``. If the trainer is also unknown (see
    ``trainer_of``), the result is ``"train"``.

    Args:
        arguments: The keyword arguments with which TRL calls a reward function.

    Raises:
        ValueError: The rows of the batch have different values of ``split``.
    """
    if "split" in arguments:
        splits = set(arguments["split"])
        if len(splits) > 1:
            raise ValueError(
                f"This batch mixes the splits {', '.join(sorted(map(str, splits)))}: train and evaluate on one split at a time."
            )
        return "train" if splits == {"train"} else "eval"
    training = getattr(getattr(trainer_of(arguments), "model", None), "training", True)
    return "train" if training else "eval"
