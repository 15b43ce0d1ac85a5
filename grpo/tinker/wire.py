"""The protobuf messages of Tinker's API, whose definitions the `tinker` package brings, to and from tensors.

Axes: N tokens of a datum, K targets of each token where there are several.
"""

from __future__ import annotations

import math
from collections.abc import Sequence
from dataclasses import dataclass
from typing import TypeVar

import numpy as np
import torch
from google.protobuf.message import DecodeError
from pydantic import BaseModel
from tinker.proto import tinker_public_pb2 as messages
from torch import Tensor

from grpo.endpoint.api_error import ApiError
from grpo.endpoint.body import read, refuse_infinite
from rollout.group import ENDED, Completion

Asked = TypeVar("Asked", bound=BaseModel)
DTYPES: dict[int, type[np.number]] = {
    messages.DTYPE_FLOAT32: np.float32,
    messages.DTYPE_INT64: np.int64,
    messages.DTYPE_INT32: np.int32,
}
MOST_NUMBERS = 1 << 20  # of a tensor
SCHEME = "tinker://"
PICTURES = "this server trains on text: a datum has a chunk of pictures or sound; send encoded_text chunks alone"


class Refused(ApiError):
    """What the caller has to change; it reaches him as an error of category `user`."""


@dataclass(frozen=True)
class Datum:
    """A sequence of tokens [N], and what the loss reads at each of them, such as `target_tokens` [N] or [N, K]."""

    tokens: list[int]
    inputs: dict[str, Tensor]


@dataclass(frozen=True)
class ForwardBackward:
    """A request for the loss of some data, and with `backward` for its gradient."""

    loss: str
    settings: dict[str, float | str]
    data: list[Datum]
    backward: bool


@dataclass(frozen=True)
class Outputs:
    """What came out, by datum in the order of the request, and metrics whose names end in how chunks are reduced."""

    by_datum: list[dict[str, Tensor]]
    metrics: dict[str, float]


def understood(kind: type[Asked], body: bytes) -> Asked:
    """Returns the request in a body of JSON. Raises ApiError, also for a number in a text that is not finite."""
    asked = read(kind, body)
    refuse_infinite(asked.model_dump())
    return asked


def message_of(body: bytes) -> messages.ForwardBackwardRequest:
    """Returns the message, whose data are not looked at yet. Raises Refused for what is none."""
    message = messages.ForwardBackwardRequest()
    try:
        message.ParseFromString(body)
    except DecodeError as error:
        raise Refused(f"forward_backward: the body is no ForwardBackwardRequest ({error})") from None
    return message


def read_forward_backward(body: bytes) -> ForwardBackward:
    """Raises Refused for what is no such message, or has tensors that cannot be read."""
    message = message_of(body)
    settings: dict[str, float | str] = dict(message.loss_fn_config)
    for name, value in message.loss_fn_config_v2.items():
        settings[name] = value.number if value.WhichOneof("value") == "number" else value.text
    data = [_datum(datum, place) for place, datum in enumerate(message.data)]
    return ForwardBackward(message.loss_fn, settings, data, backward=not message.forward_only)


def _datum(message: messages.Datum, place: int) -> Datum:
    tokens: list[int] = []
    for chunk in message.model_input:
        if not chunk.HasField("encoded_text"):
            raise Refused(f"data[{place}]: {PICTURES}")
        tokens += _numbers(chunk.encoded_text.tokens, np.int32, f"data[{place}].model_input").tolist()
    inputs = {
        name: _tensor(tensor, f"data[{place}].loss_fn_inputs[{name!r:.80}]")
        for name, tensor in message.loss_fn_inputs.items()
    }
    return Datum(tokens, inputs)


def _numbers(content: bytes, dtype: type[np.number], place: str) -> np.ndarray:
    try:
        return np.frombuffer(content, dtype=dtype)
    except ValueError as error:
        raise Refused(f"{place}: {error}") from None


def _tensor(message: messages.Tensor, place: str) -> Tensor:
    if message.dtype not in DTYPES:
        raise Refused(f"{place}: its dtype is number {message.dtype}; send float32 or int64")
    if message.HasField("sparse_csr"):
        raise Refused(f"{place}: a sparse tensor; send a dense one")
    values = _numbers(message.dense, DTYPES[message.dtype], place)
    shape = list(message.shape) or [values.size]
    if values.size > MOST_NUMBERS:
        raise Refused(f"{place}: {values.size:,} numbers; send at most {MOST_NUMBERS:,}")
    if any(size < 0 for size in shape) or math.prod(shape) != values.size:
        raise Refused(f"{place}: its shape is {shape!s:.80}, and it has {values.size} numbers")
    return torch.from_numpy(values.copy()).view(shape)


def write_outputs(outputs: Outputs) -> bytes:
    """Outputs as a ForwardBackwardOutput, with a record for each datum."""
    message = messages.ForwardBackwardOutput(loss_fn_output_type="ArrayRecord", metrics=outputs.metrics)
    for datum in outputs.by_datum:
        record = message.loss_fn_outputs.add(num_datums=1, type_tag="ArrayRecord")
        for name, tensor in datum.items():
            values = tensor.float().contiguous().numpy()
            record.fields[name].CopyFrom(
                messages.BatchedTensor(
                    data=values.tobytes(),
                    offsets=np.array([0, values.nbytes], dtype=np.int64).tobytes(),
                    dtype=messages.DTYPE_FLOAT32,
                    trailing_shape=values.shape[1:],
                )
            )
    return message.SerializeToString(deterministic=True)


def write_samples(sequences: Sequence[Completion], prompt_logprobs: Sequence[float] | None) -> bytes:
    """Sampled sequences as a SampleResponse; a prompt's log-probabilities are NaN where none was asked for."""
    message = messages.SampleResponse()
    for each in sequences:
        message.sequences.add(
            stop_reason=messages.STOP_REASON_STOP if each.finish_reason in ENDED else messages.STOP_REASON_LENGTH,
            tokens=np.array(each.token_ids, dtype=np.int32).tobytes(),
            logprobs=np.array(each.logprobs, dtype=np.float32).tobytes(),
        )
    if prompt_logprobs is not None:
        message.prompt_logprobs = np.array(prompt_logprobs, dtype=np.float32).tobytes()
    return message.SerializeToString(deterministic=True)
