"""How a policy writes calls of tools and reads their results, in token ids that are never tokenised again.

There are two forms. A model whose chat template writes calls and results keeps that form: transformers' response
parsing reads it, and the chat template writes the rest. Every other model uses the marks of GSM8K's solutions, which
need no chat template: a turn that ends in `<<48/2=` is a call, and its result is written as `24>>`.
"""

from __future__ import annotations

import inspect
import json
import re
import typing
from collections.abc import Callable, Mapping, Sequence
from contextlib import suppress
from dataclasses import dataclass
from functools import cached_property
from typing import Any

import regex
from pydantic import BaseModel, BeforeValidator, ConfigDict, Field, ValidationError, create_model
from transformers import PreTrainedTokenizerBase
from transformers.utils import get_json_schema
from transformers.utils.chat_parsing.response_templates import load_response_template

from rewards.isolation.chat_template import render
from rollout.environments.response import response_template, with_tools_template

Answers = Callable[[str, Mapping[str, Any]], str]
LONGEST_CALL = 20_000  # characters; a longer call is refused before it is parsed


def _not_bool(value: object) -> object:
    if isinstance(value, bool):
        raise ValueError(f"a number is expected, not {value}")
    return value


# The plain types of a JSON schema. A whole number stays one: as a float a long one would lose digits.
_INTEGER = typing.Annotated[int, BeforeValidator(_not_bool)]
_NUMBER = typing.Annotated[int | float, BeforeValidator(_not_bool)]
_TYPES: dict[str, Any] = {
    "string": str,
    "integer": _INTEGER,
    "number": _NUMBER,
    "boolean": bool,
    "array": list,
    "object": dict,
}
UNREADABLE = (ValueError, TypeError, LookupError, AttributeError, ArithmeticError, RecursionError)  # of a bad call
# Marks that have a meaning in calls alone, so that in a turn's text they are the rest of a bad one.
_STRAY = re.compile(
    r"</?tool_call>|<\|tool_call>|<tool_call\|>|<(?:start|end)_function_call>|<｜tool▁calls?▁(?:begin|end)｜>"
    r"|<\|tool_call_(?:start|end)\|>"
)
_CLOSED_MARK = re.compile(r"<<[^<>\n]*=[^<>\n]*>>")  # the model wrote call and result itself, so nothing is called
_OPEN_MARK = re.compile(r"<<(.*)=", re.DOTALL)


@dataclass(frozen=True)
class Call:
    """One call of a tool. The arguments are checked: they have the names and types of the tool's parameters."""

    name: str
    arguments: dict[str, Any]


@dataclass(frozen=True)
class Turn:
    """What one sampled turn says. `content` is its text without calls.

    If a call is bad, then `error` is what the model is told, and none of the calls is in `calls`. Answer such a turn
    with `reply([("error", turn.error)])`.
    """

    content: str
    calls: tuple[Call, ...] = ()
    error: str | None = None


class BadCall(ValueError):
    """A call that cannot be made. The message is for the model: it says what is wrong and how it should be."""


class TurnFormat:
    """Reads turns and writes results, for one tokenizer and one list of tools.

    A tool is a function or a bound method with type hints and a docstring that describes each argument; `schemas` holds
    its JSON schema. A tool of somebody else is its schema alone, as in OpenAI's API, and `cut` reads its calls. `plain`
    chooses the form: True for the marks of GSM8K's solutions, False for the model's own form, and None for the model's
    own one if its chat template has calls. `stop_token_ids` are the policy's, and by default the tokenizer's eos.
    Raises ValueError for a tool without such a docstring, for two tools of one name, and for a chat template whose
    calls cannot be parsed.

    >>> form = TurnFormat(tokenizer, [calculate])        # a tokenizer without a chat template
    >>> form.read(tokenizer.encode("Each gets <<48/2=<|end|>"))
    Turn(content='Each gets ', calls=(Call(name='calculate', arguments={'expression': '48/2'}),), error=None)
    >>> tokenizer.decode(form.reply([("calculate", "24")]))
    '24>>'
    """

    def __init__(
        self,
        tokenizer: PreTrainedTokenizerBase,
        tools: Sequence[Callable[..., Any] | dict[str, Any]],
        *,
        plain: bool | None = None,
        stop_token_ids: Sequence[int] = (),
    ) -> None:
        self.schemas = [tool if isinstance(tool, dict) else schema_of(tool) for tool in tools]
        names = [str(schema["function"]["name"]) for schema in self.schemas]
        if len(set(names)) < len(names):
            raise ValueError(f"two tools have one name: {', '.join(names)}; rename one")
        self._parameters = {name: _parameters_of(schema) for name, schema in zip(names, self.schemas, strict=True)}
        self._arguments = {tool.__name__: _arguments_of(tool) for tool in tools if not isinstance(tool, dict)}
        # One of several chat templates is for tools, and may not be able to do without.
        needs_tools = isinstance(tokenizer.chat_template, dict)
        self._tokenizer = tokenizer if plain else with_tools_template(tokenizer)
        template = None if plain else response_template(self._tokenizer, needs_tools)
        if template is None and plain is False:
            raise ValueError(
                f"the chat template of {tokenizer.name_or_path!r} has no form for calls of tools; use the plain form"
            )
        self.is_plain = template is None
        self._tokenizer = tokenizer if self.is_plain else self._tokenizer
        self._shown = {"tools": self.schemas} if needs_tools and not self.is_plain else {}
        added = {i: str(token) for i, token in tokenizer.added_tokens_decoder.items() if token.special}
        # Without those that a tokenizer_config.json sets to "": such a text is found between any two characters.
        self._special = [token for token in (*added.values(), *tokenizer.all_special_tokens) if token]
        self._stops = {tokenizer.eos_token_id, *stop_token_ids}
        self._response_template = template
        if not self.is_plain:
            self._opening = self._render([_USER], add_generation_prompt=True)
            answer = self._up_to_the_stop_token(self._render([_USER, {"role": "assistant", "content": "."}]))
            # What the chat template ends an answer with; nothing where only another message does, as with GLM's.
            self._end = next((token for token in self._special if answer.endswith(token)), "")

    @cached_property
    def opening(self) -> regex.Pattern[str]:
        """A pattern of how a call begins, of the package regex."""
        if self._response_template is None:
            return regex.compile("<<")
        calls = load_response_template(self._response_template).fields.get("tool_calls")
        return regex.compile("(?!)") if calls is None else calls.open_re

    def tools_prompt(self, messages: Sequence[dict[str, Any]]) -> list[int]:
        """The ids of the first prompt, with what the tools are, up to and with the generation prompt.

        The plain form describes the tools in the system message. Without a chat template it describes nothing, since a
        base model must have learned the marks, and the prompt is one line for each message.
        """
        if not self.is_plain:
            return self._encode(self._render(messages, add_generation_prompt=True, tools=self.schemas))
        if not self._tokenizer.chat_template:
            ids = self._tokenizer.encode("".join(f"{message['content']}\n" for message in messages))
            return ids[:-1] if ids[-1:] == [self._tokenizer.eos_token_id] else ids
        system = [message for message in messages[:1] if message["role"] == "system"]
        about = "\n\n".join([*(message["content"] for message in system), self._about()])
        asked = [{"role": "system", "content": about}, *messages[len(system) :]]
        return self._encode(self._render(asked, add_generation_prompt=True))

    def read(self, token_ids: Sequence[int]) -> Turn:
        """Reads a sampled turn; `token_ids` may end with its stop token. It never raises for what a model wrote."""
        ids = list(token_ids)
        try:
            if self.is_plain:
                ids = ids[:-1] if ids[-1:] and ids[-1] in self._stops else ids
                content, calls = self._read_marks(str(self._tokenizer.decode(ids)))
            else:
                content, calls = self._read_own(ids)
            return Turn(content, tuple(self.checked(name, arguments) for name, arguments in calls))
        except BadCall as error:
            return Turn(str(self._tokenizer.decode(ids, skip_special_tokens=True)), error=str(error))

    def cut(self, token_ids: Sequence[int]) -> tuple[str, list[tuple[str, dict[str, Any]]]]:
        """Cuts the calls of whatever tools out of a sampled turn: its other text, as it stands, and names and arguments
        as the policy wrote them. Raises BadCall where one of them cannot be read."""
        ids = list(token_ids)
        try:
            if self.is_plain:
                ids = ids[:-1] if ids[-1:] and ids[-1] in self._stops else ids
                text, calls = self._read_marks(str(self._tokenizer.decode(ids)))
            else:
                text, calls = self._cut_own(ids)
            for name, arguments in calls:
                if not (isinstance(name, str) and name and isinstance(arguments, dict)):
                    raise BadCall("A call has a name, and a JSON object of arguments.")
                json.dumps(arguments, allow_nan=False)
        except BadCall:
            raise
        except UNREADABLE as error:
            raise BadCall(f"This call cannot be read: {error!s:.200}.") from error
        return text, calls

    def after(self, turn: Sequence[int], calls: Sequence[dict[str, Any]], messages: list[dict[str, Any]]) -> list[int]:
        """The ids that follow a sampled turn with these calls, in OpenAI's form: the messages, up to and with the
        generation prompt. A turn that a limit has cut is ended first. Raises ValueError where the template writes the
        call in another way then."""
        bare = [{**call, "function": {**call["function"], "arguments": {}}} for call in calls]
        end, text = self._follow({"role": "assistant", "content": "", "tool_calls": bare}, messages)
        ids, closing = self._encode(text), self._encode(end)[-1:]
        if turn[-1] in self._stops:
            return ids[1:] if ids[:1] and ids[0] in self._stops else ids
        return [*closing, *ids] if closing[0] in self._stops else ids

    def lines(self, messages: Sequence[dict[str, Any]]) -> str:
        """A conversation as a base model without a chat template reads it: a line for each message, and the marks of
        calls and results inside the answers."""
        text, results = "", list[str]()
        for message, following in zip(messages, [*messages[1:], {"role": ""}], strict=True):
            calls = [call["function"] for call in message.get("tool_calls") or []]
            if message["role"] == "tool":
                results.append(self._without_special_tokens(message["content"]))
                if following["role"] != "tool":
                    text, results = text + "\n".join(results) + ">>", []
            elif message["role"] == "assistant":
                marks = "".join(f"<<{self._mark(Call(call['name'], call.get('arguments')))}=" for call in calls)
                text += f"{message['content']}{marks}{self._tokenizer.eos_token}" + ("" if calls else "\n")
            else:
                text += f"{message['content']}\n"
        return text

    def reply(self, results: Sequence[tuple[str, str]]) -> list[int]:
        """The ids that follow a sampled turn: the results of its calls, up to and with the generation prompt.

        `results` are (tool, text), in the order of the calls. The ids depend on them alone. A special token that a text
        spells out, such as `<|im_end|>`, is broken by a blank, so that a tool cannot end its own message.
        """
        texts = [(name, self._without_special_tokens(text)) for name, text in results]
        if self.is_plain:
            return self._encode("\n".join(text for _, text in texts) + ">>")
        ids = self._encode(self._results(texts))
        return ids[1:] if ids[0] in self._stops else ids  # the sampled turn already ends with it

    def _results(self, texts: Sequence[tuple[str, str]]) -> str:
        """What the chat template writes for results. Some templates take their names from the calls, by id."""
        if len({name for name, _ in texts}) > 1:
            answer = _calls([Call(name, {}) for name, _ in texts])
            answers = []
            for number, (name, text) in enumerate(texts):
                answer["tool_calls"][number]["id"] = f"call_{number}"
                answers.append({"role": "tool", "name": name, "tool_call_id": f"call_{number}", "content": text})
            with suppress(ValueError):  # of a template that has one call in a turn, as Llama's
                return self._follow(answer, answers)[1]
        answers = [{"role": "tool", "name": name, "content": text} for name, text in texts]
        return self._follow(_calls([Call(texts[0][0], {})]), answers)[1]

    def _follow(self, answer: dict[str, Any], messages: list[dict[str, Any]]) -> tuple[str, str]:
        """How the chat template ends an answer with calls, and what it writes after that for the messages."""
        before = self._up_to_the_stop_token(self._render([_USER, answer]))
        after = self._render([_USER, answer, *messages], add_generation_prompt=True)
        # A template may drop thoughts once a result follows. The end of the call stays as it is.
        end_of_call = next((before[i:] for i in range(len(before)) if before[i:] in after), "")
        if answer["tool_calls"][0]["function"]["name"] not in end_of_call:
            raise ValueError(
                f"the chat template of {self._tokenizer.name_or_path!r} writes a call in another way once its result "
                "follows, so results cannot be appended to sampled tokens; use the plain form"
            )
        return end_of_call, after.partition(end_of_call)[2]

    def write(self, turn: Turn) -> list[int]:
        """The ids of a turn as the model should write it, with its stop token: `read` in reverse, to make SFT data."""
        if not self.is_plain:
            written = self._up_to_the_stop_token(self._render([_USER, {**_calls(turn.calls), "content": turn.content}]))
            if not written.startswith(self._opening):
                raise ValueError(
                    f"the chat template of {self._tokenizer.name_or_path!r} writes a turn in another way than it asks "
                    "for one, so it cannot make examples of turns"
                )
            ids = self._encode(written[len(self._opening) :])
            return ids if self._end or turn.calls else [*ids, self._tokenizer.eos_token_id]
        if len(turn.calls) > 1:
            raise ValueError(f"the plain form has one call in a turn, not {len(turn.calls)}")
        marks = "".join(f"<<{self._mark(call)}=" for call in turn.calls)
        return [*self._encode(turn.content + marks), self._tokenizer.eos_token_id]

    def demonstration(self, solution: str, answers: Answers | None = None) -> tuple[list[int], list[bool]]:
        """A solution whose marks are calls, as an episode to learn from: its ids, and which of them the policy writes.

        A mark in one line such as `<<48/2=24>>` is a call and its result, in whatever form the model has. A mark that
        is no call of one of the tools stays text. With `answers` the result is what the tool gives (tool and arguments
        to text), as in a rollout, and not the solution's; where the tool raises, it stays the solution's. In the plain
        form the episode is otherwise the solution, word by word.
        """
        ids: list[int] = []
        sampled: list[bool] = []
        start = 0
        for mark in _CLOSED_MARK.finditer(solution):
            text, _, result = mark.group()[2:-2].rpartition("=")
            try:
                call = self.checked(*self._from_mark(text))
            except BadCall:
                continue
            if answers is not None:
                with suppress(Exception):
                    result = answers(call.name, call.arguments)
            turn = self.write(Turn(solution[start : mark.start()], (call,)))
            written = self.reply([(call.name, result)])
            ids += turn + written
            sampled += [True] * len(turn) + [False] * len(written)
            start = mark.end()
        last = self.write(Turn(solution[start:]))
        return ids + last, sampled + [True] * len(last)

    def checked(self, name: str, arguments: object) -> Call:
        """The call with its arguments in the types of the tool, "7" as 7 for an int. Raises BadCall."""
        if name not in self._parameters:
            raise BadCall(f"There is no tool {name!r}. Tools: {', '.join(self._parameters)}.")
        if not isinstance(arguments, dict):
            raise BadCall(f"The arguments of {name} must be a JSON object, not {json.dumps(arguments)[:80]}.")
        try:
            json.dumps(arguments, allow_nan=False)  # which Python reads, and pydantic makes null inside of an object
            checked = self._arguments[name].model_validate(arguments)
            values = checked.model_dump(mode="json", exclude_unset=True)  # of an Enum its value, as with TRL
            json.dumps(values, allow_nan=False)  # the text "nan" is a float for pydantic
        except ValidationError as error:
            faults = [f"{'.'.join(map(str, e['loc']))}: {e['msg']}" for e in error.errors(include_url=False)]
            raise BadCall(f"Wrong arguments of {name}: {'; '.join(faults)[:500]}.") from error
        except (ValueError, RecursionError) as error:  # JSON cannot hold them
            raise BadCall(f"Wrong arguments of {name}: {error!s:.500}.") from error
        fields = sorted(checked.model_fields_set, key=list(type(checked).model_fields).index)
        return Call(name, {self._parameters[name][int(field[1:])]: values[field] for field in fields})

    def _read_marks(self, text: str) -> tuple[str, list[tuple[str, Any]]]:
        """The plain form. A call ends its turn and goes from `<<` to `=`; marks that the model has closed are text."""
        hidden = _CLOSED_MARK.sub(lambda mark: "." * len(mark.group()), text)
        start, inside = hidden.find("<<"), _OPEN_MARK.search(hidden.rstrip())
        if start < 0:
            return text, []
        if inside is None or inside.end() < len(hidden.rstrip()):
            if "\n" in hidden[start:] or ">>" in hidden[start:]:
                return text, []
            raise BadCall("A call begins with << and ends with = at the end of a turn.")
        call = text[start + 2 : inside.end() - 1]
        if len(call) > LONGEST_CALL:
            raise BadCall(f"A call may have {LONGEST_CALL} characters; this one has {len(call)}.")
        return text[:start], [self._from_mark(call)]

    def _from_mark(self, call: str) -> tuple[str, Any]:
        """A tool's name, which may be left out if there is one tool, and its arguments: a JSON object, or the text
        itself for a tool with one parameter."""
        name, _, rest = call.strip().partition(" ")
        if name not in self._parameters:
            if len(self._parameters) > 1:
                raise BadCall(f"There is no tool {name!r}. Tools: {', '.join(self._parameters)}.")
            name, rest = next(iter(self._parameters), ""), call
        text, fields = rest.strip(), self._parameters.get(name, [])
        try:
            arguments = json.loads(text) if text else {}
        except (ValueError, RecursionError):
            arguments = None
        if isinstance(arguments, dict) and (set(arguments) <= set(fields) or len(fields) != 1):
            return name, arguments
        if len(fields) == 1:
            return name, {fields[0]: text}
        raise BadCall(f"The arguments of {name} must be a JSON object with the keys {', '.join(fields)}.")

    def _mark(self, call: Call) -> str:
        fields = self._parameters.get(call.name, [])
        values = list(call.arguments.values()) if isinstance(call.arguments, dict) else []  # what a client sends back
        alone = len(fields) == len(values) == 1 and isinstance(values[0], str)
        arguments = values[0] if alone else json.dumps(call.arguments)
        return arguments if len(self._parameters) == 1 else f"{call.name} {arguments}"

    def _stop_of(self, ids: list[int]) -> str:
        """The text of the stop token that has ended a turn; empty where none has."""
        return str(self._tokenizer.decode(ids[-1:])) if ids[-1:] and ids[-1] in self._stops else ""

    def _read_own(self, ids: list[int]) -> tuple[str, list[tuple[str, Any]]]:
        """The model's own form. A stop token that the chat template does not write, such as a base model's, is text to
        its parser: then the turn is parsed with the template's own in its place."""
        stop, ended = self._stop_of(ids), [*ids[:-1], *self._encode(self._end)]
        try:
            content, calls = self._parsed(ids)
        except BadCall:
            if not self._end or stop in ("", self._end):
                raise
            return self._parsed(ended)
        if stop not in ("", self._end) and content.endswith(stop):
            return self._parsed(ended)
        return content, calls

    def _parsed(self, ids: list[int]) -> tuple[str, list[tuple[str, Any]]]:
        """The content and the calls, by transformers' response parsing."""
        try:
            turn = self._tokenizer.parse_response(
                ids, self._response_template, prefix=self._opening, tools=self.schemas
            )
            functions = [call.get("function", call) for call in turn.get("tool_calls") or []]
            calls = [(str(call["name"]), call.get("arguments") or {}) for call in functions]
        except UNREADABLE as error:
            raise BadCall(f"This call cannot be read: {error!s:.200}.") from error
        if any(len(json.dumps(arguments)) > LONGEST_CALL for _, arguments in calls):
            raise BadCall(f"A call may have {LONGEST_CALL} characters.")
        return str(turn.get("content") or ""), calls

    def _cut_own(self, ids: list[int]) -> tuple[str, list[tuple[Any, Any]]]:
        """Does what `cut` does in the model's own form; for other stop tokens see `_read_own`."""
        text, stop = str(self._tokenizer.decode(ids)), self._stop_of(ids)
        try:
            text, calls = self._cut_text(text)
        except UNREADABLE:
            if not self._end or stop in ("", self._end):
                raise
            text, calls = self._cut_text(text.removesuffix(stop) + self._end)
            stop = self._end
        return text.removesuffix(stop), calls

    def _cut_text(self, text: str) -> tuple[str, list[tuple[Any, Any]]]:
        """Cuts the calls out of a text, by transformers' response parsing. Text after the first call is kept, too."""
        parser = self._tokenizer.get_response_parser(self._response_template, prefix=self._opening, tools=self.schemas)
        events = parser.feed(text)
        message, last = parser.finalize()
        first, position, parts = len(text), 0, list[str]()
        for event in [*events, *last]:
            in_call = event["field"] == "tool_calls"
            if event["type"] == "region_open" and in_call:
                first = min(first, self.opening.search(text, position).start())
            if event["type"] == "region_chunk":
                start = text.find(event["text"], position)  # none of what the prompt had begun
                position = start + len(event["text"]) if start >= 0 else position
                if event["field"] == "content" and _STRAY.search(event["text"]):
                    raise BadCall("A call has no beginning or no end.")
                parts += [event["text"]] if first < position and not in_call else []
        functions = [call.get("function", call) for call in message.get("tool_calls") or []]
        calls = [(f["name"], {} if f.get("arguments") is None else f["arguments"]) for f in functions]
        return text[:first].rstrip() + "".join(parts) if calls else text, calls

    def _about(self) -> str:
        """The tools and the marks, for the system message of a chat in the plain form."""
        lines = ["You can call tools. Write a call in marks and end your turn after =; the result follows:"]
        for schema in self.schemas:
            function = schema["function"]
            fields = list(function["parameters"]["properties"])
            arguments = fields[0] if len(fields) == 1 else json.dumps(dict.fromkeys(fields, "..."))
            name = f"{function['name']} " if len(self.schemas) > 1 else ""
            lines.append(f"<<{name}{arguments}=result>> {function['description']}")
        return "\n".join(lines)

    def _up_to_the_stop_token(self, text: str) -> str:
        """Templates write a line break after the token that ends a turn; the model does not sample it."""
        ends = [text.rfind(token) + len(token) for token in self._special if token in text]
        end = max(ends, default=len(text))
        return text[:end] if not text[end:].strip() else text

    def _without_special_tokens(self, text: str) -> str:
        for token in self._special:
            text = text.replace(token, f"{token[:1]} {token[1:]}")
        return text

    def _encode(self, text: str) -> list[int]:
        return self._tokenizer.encode(text, add_special_tokens=False)

    def _render(self, messages: Sequence[dict[str, Any]], **options: Any) -> str:
        try:
            return render(self._tokenizer, messages, **{**self._shown, **options})
        except Exception as error:  # a template is a program
            raise ValueError(
                f"the chat template of {self._tokenizer.name_or_path!r} fails on the roles "
                f"{', '.join(message['role'] for message in messages)}: {error}"
            ) from error


_USER = {"role": "user", "content": "."}


def _calls(calls: Sequence[Call]) -> dict[str, Any]:
    functions = [{"type": "function", "function": {"name": c.name, "arguments": c.arguments}} for c in calls]
    return {"role": "assistant", "content": ""} | ({"tool_calls": functions} if functions else {})


def _parameters_of(schema: Mapping[str, Any]) -> list[str]:
    parameters = schema["function"].get("parameters")
    properties = parameters.get("properties") if isinstance(parameters, dict) else None
    return list(properties) if isinstance(properties, dict) else []


def schema_of(tool: Callable[..., Any]) -> dict[str, Any]:
    """The JSON schema of a tool for chat templates: its own `json_schema`, or that of its hints and its docstring."""
    if hasattr(tool, "json_schema"):
        return {"type": "function", "function": tool.json_schema}
    try:
        return get_json_schema(tool)
    except Exception as error:  # transformers has an exception for each of many faults
        raise ValueError(
            f"tool {tool.__name__!r}: {error} A tool needs a type hint for each parameter, and a docstring with "
            "'Args:' that describes each one"
        ) from error


def _fields_of(tool: Callable[..., Any]) -> dict[str, tuple[Any, Any]]:
    """The type and the default of each argument; `...` is none. Of a `json_schema` only plain types are checked."""
    if hasattr(tool, "json_schema"):
        parameters = tool.json_schema["parameters"]
        types = {name: _TYPES.get(str(part.get("type")), Any) for name, part in parameters["properties"].items()}
        return {name: (kind, ... if name in parameters.get("required", ()) else None) for name, kind in types.items()}
    hints, defaults = typing.get_type_hints(tool), {}
    for name, parameter in inspect.signature(tool).parameters.items():
        defaults[name] = ... if parameter.default is parameter.empty else parameter.default
    return {name: (hints[name], default) for name, default in defaults.items()}


def _arguments_of(tool: Callable[..., Any]) -> type[BaseModel]:
    """Checks arguments by the types of the tool's parameters, and refuses any other. Its fields are p0, p1, ..."""
    fields: dict[str, Any] = {}
    for i, (name, (kind, default)) in enumerate(_fields_of(tool).items()):
        fields[f"p{i}"] = (kind, Field(default, alias=name))
    options = ConfigDict(extra="forbid", coerce_numbers_to_str=True)
    return create_model(tool.__name__, __config__=options, **fields)
