"""From an example to its prompt, and the order in which training takes the prompts."""

from __future__ import annotations

import hashlib
import json
import random
import string
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any, Literal

from rewards.config.data import is_chat
from rewards.data.examples import Example
from rewards.data.leakage import problem_fingerprint
from rollout.group import Prompt

if TYPE_CHECKING:
    from transformers import PreTrainedTokenizerBase


@dataclass(frozen=True)
class PromptTemplate:
    """How an example becomes the text of its prompt.

    `format` is a format string over the columns, in which `{question}` is the prompt column, or "chat": the
    tokenizer's chat template around the question as the user's message. A mapping in place of "chat" has the `system`
    message, a format string for the `user`'s message, or both. `few_shot` examples go first, with their solutions; if
    the user's message has {examples}, they are in that message, each in the form of the text after it.

    Raises ValueError for a format without fields, with broken braces, or with a field that the example does not have.

    >>> PromptTemplate("Question: {question} Answer: ").render(Example("0", "2 + 3 = ?", "5"))
    'Question: 2 + 3 = ? Answer: '
    """

    format: str | Mapping[Any, str] = "{question}\n"
    few_shot: Sequence[Example] = ()

    def __post_init__(self) -> None:
        if isinstance(self.format, str):
            if not self.is_chat and not _fields(self.format):
                raise ValueError(f"template={self.format!r} makes every prompt the same; put {{question}} into it")
        elif self.user_form is not None and not set(_fields(self.user_form.rpartition("{examples}")[2])):
            raise ValueError(f"template: {self.user_form!r} needs {{question}}, after {{examples}} if it has that")

    @property
    def is_chat(self) -> bool:
        return is_chat(self.format)

    @property
    def user_form(self) -> str | None:
        """The format string of the user's message of a chat."""
        return None if isinstance(self.format, str) else self.format.get("user")

    def render(self, example: Example, tokenizer: PreTrainedTokenizerBase | None = None) -> str:
        """The text of the prompt. Only "chat" needs the tokenizer."""
        if not self.is_chat:
            if example.messages and [message["role"] for message in example.messages] != ["user"]:
                raise ValueError(
                    f"template={self.format!r}: the prompt of {example.example_id} is a chat of several messages; use "
                    "template: chat"
                )
            form = str(self.format)
            shots = [f"{_fill(form, shot)}{shot.solution}\n\n" for shot in self.few_shot]
            return "".join([*shots, _fill(form, example)])
        if tokenizer is None or not tokenizer.chat_template:
            raise ValueError("template=chat: the tokenizer has no chat template; use a format string instead")
        messages = self.messages(example) or []
        return apply_chat_template(tokenizer, messages, add_generation_prompt=True, tokenize=False)

    def messages(self, example: Example) -> list[dict[str, Any]] | None:
        """The messages for the chat template: system message, worked examples as turns, the prompt.

        None for a format string. Raises ValueError where both the template and the data bring a system message.
        """
        if not self.is_chat:
            return None
        messages: list[dict[str, Any]] = []
        if system := "" if isinstance(self.format, str) else self.format.get("system"):
            messages.append({"role": "system", "content": system})
            if example.messages and example.messages[0]["role"] == "system":
                raise ValueError(
                    f"template has a system message, {system!r}, and the prompt of {example.example_id} begins with a "
                    "system message of its own; leave one of them out"
                )
        asked = self._turns(example)
        if asked[0]["role"] == "system":  # it stays before the worked examples
            messages.append(asked.pop(0))
        for shot in () if self._gathers_examples else self.few_shot:
            messages += [turn for turn in self._turns(shot) if turn["role"] != "system"]
            messages.append({"role": "assistant", "content": shot.solution})
        return [*messages, *asked]

    def content(self, example: Example) -> str:
        """The columns that the prompt shows, without the words of the template. They tell one problem from another.

        >>> PromptTemplate("Context: {context} Question: {question}").content(
        ...     Example("0", "Who?", "Ada", {"context": "Ada wrote it.", "page": 3}))
        'Ada wrote it.\\nWho?'
        """
        form = self.user_form if self.is_chat else str(self.format)
        if form is None:
            turns = example.messages or [{"role": "user", "content": example.question}]
            return "\n".join(turn["content"] for turn in turns if turn["role"] != "system")
        shown = _shown(form.replace("{examples}", ""), example)
        return "\n".join(map(str, shown.values()))

    @property
    def _gathers_examples(self) -> bool:
        return "{examples}" in (self.user_form or "")

    def _turns(self, example: Example) -> list[dict[str, Any]]:
        """The messages of one problem; the last one, the user's, in the form of the template."""
        turns = list(example.messages or [{"role": "user", "content": example.question}])
        if self.user_form is not None:
            head, gathers, ask = self.user_form.rpartition("{examples}")
            parts = [_fill(head, example)]
            for shot in self.few_shot if gathers else ():
                asked = _fill(ask, shot)
                parts.append(f"{asked}{'' if asked[-1:].isspace() else ' '}{shot.solution}\n\n")
            turns[-1] = turns[-1] | {"content": "".join([*parts, _fill(ask, example)])}
        return turns


def shown_columns(template: str | Mapping[Any, str]) -> list[str] | None:
    """The columns that prompts show, in their order; None for the question or the turns of a chat alone.

    >>> shown_columns("{context} {question}"), shown_columns("chat")
    (['context', 'question'], None)
    """
    form = PromptTemplate(template).user_form if is_chat(template) else str(template)
    return None if form is None else list(dict.fromkeys(_fields(form.replace("{examples}", ""))))


def _fields(form: str) -> list[str]:
    try:
        return [name for _, name, _, _ in string.Formatter().parse(form) if name is not None]
    except ValueError as error:
        raise ValueError(f"template={form!r}: {error}; write {{{{ or }}}} for a plain brace") from error


def _fill(form: str, example: Example) -> str:
    columns = _shown(form, example)
    try:
        return form.format_map(columns)
    except (KeyError, TypeError, ValueError) as error:  # such as {year:d} of a text
        raise ValueError(f"template={form!r}: {example.example_id} cannot be written so: {error}") from error


def _shown(form: str, example: Example) -> dict[str, Any]:
    """The columns that a format string asks for. Raises ValueError for one that the example does not have."""
    columns = {**example.columns, "question": example.question}
    names = dict.fromkeys(_fields(form))
    if unknown := [name for name in names if name not in columns]:
        raise ValueError(f"template={form!r} asks for {{{unknown[0]}}}; the columns are {', '.join(columns)}")
    return {name: columns[name] for name in names}


def apply_chat_template(
    tokenizer: PreTrainedTokenizerBase, messages: list[dict[str, Any]], *, tokenize: Literal[False], **options: Any
) -> str:
    """The function of transformers, in a process with limits of time and memory. Whatever a template raises becomes a
    ValueError that names the tokenizer."""
    from rewards.isolation.chat_template import render

    try:
        return render(tokenizer, messages, **options)
    except Exception as error:  # a template is a program
        raise ValueError(
            f"the chat template of {tokenizer.name_or_path!r} (chat_template.jinja, or tokenizer_config.json) fails on "
            f"the roles {', '.join(message['role'] for message in messages)}: {error}; correct it, or use a format "
            "string as template"
        ) from error


def encode_prompt(example: Example, tokenizer: PreTrainedTokenizerBase, template: PromptTemplate) -> Prompt:
    """The prompt with the token ids that are sampled from and trained on. It is never tokenised again.

    The text of a format string gets the special tokens that the tokenizer puts first (bos); a chat template writes
    its own. Raises ValueError for a prompt without tokens.
    """
    text = template.render(example, tokenizer)
    if template.is_chat:
        token_ids = tokenizer.encode(text, add_special_tokens=False)
    else:
        token_ids = encode_open(text, tokenizer)
    if not token_ids:
        raise ValueError(f"the prompt of {example.example_id} has no tokens: {text!r}")
    fingerprint = problem_fingerprint(template.content(example))
    messages = template.messages(example)
    return Prompt(example.example_id, text, token_ids, example.columns, messages, fingerprint=fingerprint)


def encode_open(text: str, tokenizer: PreTrainedTokenizerBase) -> list[int]:
    """The token ids of a text that is to be continued, with the special tokens that the tokenizer puts first (bos).
    Some tokenizers end every text with eos, too, which is left out."""
    token_ids, plain = tokenizer.encode(text), tokenizer.encode(text, add_special_tokens=False)
    return token_ids[:-1] if token_ids[-1:] == [tokenizer.eos_token_id] != plain[-1:] else token_ids


class PromptStream:
    """Examples without end, in an order that a stopped run resumes (contract 9).

    Every epoch is shuffled anew, by a key of (seed, epoch). One `take_examples` never holds an example twice: where it
    runs from one epoch into the next, those that it has from the old one move to the end of the new one.

    >>> stream = PromptStream([Example(str(i), f"{i} + 1 = ?", str(i + 1)) for i in range(3)])
    >>> [example.example_id for example in stream.take_examples(2) + stream.take_examples(2)]
    ['1', '0', '2', '0']
    """

    def __init__(self, examples: Sequence[Example], seed: int = 0):
        if not examples:
            raise ValueError("a PromptStream needs at least one example")
        content = json.dumps([[e.example_id, e.question, e.solution] for e in examples])
        self._fingerprint = hashlib.sha256(content.encode()).hexdigest()
        columns = json.dumps([e.columns for e in examples], default=lambda value: type(value).__name__, skipkeys=True)
        self._columns = hashlib.sha256(columns.encode()).hexdigest()  # rewards and environments read them
        self._examples, self._seed = examples, seed
        self._go_to(epoch=0, position=0, carried=[])

    def take_examples(self, n: int) -> list[Example]:
        """The next n examples, all different. Raises ValueError where the data set has fewer than n."""
        self.refuse_too_many(n)
        chosen = self._order[self._position : self._position + n]
        self._position += len(chosen)
        if len(chosen) < n:
            self._go_to(self._epoch + 1, position=n - len(chosen), carried=chosen)
            chosen = chosen + self._order[: self._position]
        return [self._examples[index] for index in chosen]

    def refuse_too_many(self, n: int) -> None:
        """Raises ValueError if `take_examples(n)` would."""
        if not 1 <= n <= len(self._examples):
            raise ValueError(
                f"a step cannot take {n} different prompts from {len(self._examples)} examples; "
                f"use 1 to {len(self._examples)} prompts per step, or more data"
            )

    def state_dict(self) -> dict[str, Any]:
        """The position of the stream, for JSON."""
        return {
            "seed": self._seed,
            "fingerprint": self._fingerprint,
            "columns": self._columns,
            "epoch": self._epoch,
            "position": self._position,
            "carried": self._carried,
        }

    def load_state_dict(self, state: dict[str, Any]) -> None:
        """Go on where `state` was taken. Raises ValueError if the seed or the data are others."""
        if len(state.get("streams", ())) == 1:  # as version 0.2 recorded a list of one source
            [state] = state["streams"].values()
        if state["seed"] != self._seed:
            raise ValueError(
                f"the run began with the data order of seed={state['seed']}, not of seed={self._seed}; "
                "resume with the seed that it began with"
            )
        columns = state.get("columns", self._columns)  # version 0.2.0 recorded none
        if state["fingerprint"] != self._fingerprint or columns != self._columns:
            raise ValueError(
                "the training data have changed since the checkpoint; resume with the same, or start a new run"
            )
        self._go_to(state["epoch"], state["position"], state["carried"])

    def _go_to(self, epoch: int, position: int, carried: list[int]) -> None:
        order = list(range(len(self._examples)))
        random.Random(f"prompts/{self._seed}/{epoch}").shuffle(order)
        order.sort(key=set(carried).__contains__)  # stable: as shuffled, but the carried ones last
        self._order, self._epoch, self._position, self._carried = order, epoch, position, carried
