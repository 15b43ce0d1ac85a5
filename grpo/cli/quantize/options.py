"""Options of `quartet quantize`."""

from __future__ import annotations

from typing import ClassVar, Literal

from pydantic import Field

from grpo.cli.config.inference import MeasuredConfig


class QuantizeConfig(MeasuredConfig):
    """A policy in 4 or 8 bits a weight, in files that transformers and vLLM load. The options of `quartet eval` say how
    accuracy is measured, before and after; it is measured where `data` is given, or where a run folder brings it."""

    common: ClassVar[tuple[str, ...]] = (
        *("method", "bits", "calibrate", "group_size", "calibrate_tokens", "held_out_tokens"),
        *("data.name", "eval.split", "eval.limit", "eval.samples", "eval.greedy", "data.template"),
        *("rollout.max_completion_tokens", "rewards"),
        *("dtype", "device", "threads", "seed"),
    )
    command: ClassVar[str] = "quantize"
    method: Literal["awq", "gptq", "rtn"] = "gptq"
    """`gptq` corrects each column's error in the columns after it, `awq` scales up the inputs that matter most, `rtn`
    rounds to nearest."""
    bits: Literal[4, 8] = 4
    """Bits of a weight. Embedding, LM head, norms, routers and the MTP head keep their precision."""
    calibrate: str
    """Text that gptq and awq measure the model on: a text file, a file with questions and answers (.jsonl, .json,
    .parquet, .csv), or a dataset such as `gsm8k`, of which the training split is read. Its last part is held out for
    perplexity and agreement. Data for evaluation are refused, the share that a run holds out is left out, and problems
    that are read count as trained on."""
    group_size: Literal[32, 64, 128] = 32
    """Neighbouring weights of a row that share a scale. A matrix with rows that it does not divide keeps its
    precision."""
    calibrate_tokens: int = Field(default=16384, ge=1)
    """Tokens that the model is measured on, 512 at a time."""
    held_out_tokens: int = Field(default=8192, ge=1)
    """Tokens held out for the report; at most a fifth of the text."""
