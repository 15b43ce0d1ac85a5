"""A chat template, as it runs in a worker process: it is a program that came with a model."""

from __future__ import annotations

import json
import os
from collections.abc import Mapping
from typing import Any

from rewards.isolation.environments import Nothing

MORE, TIMES = 1_000_000, 10  # letters that a text may have beside those of its messages, so many times


class LoadedTemplate:
    """Answers requests for texts, see `call`. `function` is a name for errors."""

    def __init__(self, function: str) -> None:
        os.environ |= {"OMP_NUM_THREADS": "1", "OPENBLAS_NUM_THREADS": "1"}  # the stacks of numpy's threads are memory
        from transformers.utils.chat_template_utils import render_jinja_template  # it loads no torch

        self.signature = Nothing()
        self.render = render_jinja_template

    def call(self, request: Mapping[str, Any]) -> dict[str, Any]:
        """The `text` that `template` makes of `messages`, `tools` and `options`, or why it makes none: {"kind",
        "message"}."""
        messages, options = request["messages"], request["options"]
        try:
            [text], _ = self.render([messages], request["tools"], chat_template=request["template"], **options)
        except MemoryError:
            return {"kind": "memory", "message": "it needs more memory than its process may have"}
        except BaseException as error:
            return {"kind": "raised", "message": f"{type(error).__name__}: {error!s:.2000}"}
        most = MORE + TIMES * len(json.dumps([messages, request["tools"]]))
        if len(text) > most:
            return {"kind": "too_long", "message": f"it makes {len(text):,} letters of them; {most:,} is the most"}
        return {"text": text}
