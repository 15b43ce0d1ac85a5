"""verl's `compute_score(data_source, solution_str, ground_truth, extra_info=None)` as a reward, and ours as one there.

verl passes by keyword the columns `data_source` and `extra_info` of a row, `reward_model["ground_truth"]` and the
response as text. It gets a number, or a dict with the number as `score` (verl/workers/reward_manager/naive.py).
"""

from __future__ import annotations

import functools
import inspect
from collections.abc import Callable
from typing import Any

from rewards.forms.ours import Isolated
from rewards.protocol import Reward, per_completion, text_of
from rewards.registry import OF_VERL

PASSED = ("data_source", "solution_str", "ground_truth", "extra_info")
_KEYWORD = inspect.Parameter.KEYWORD_ONLY


def reward_of(compute_score: Callable[..., Any]) -> Reward:
    """The reward of a `compute_score`, sync or async. Its other parameters are options, as verl's `reward_kwargs`.

    The ground truth is the column `ground_truth`, that in the column `reward_model`, or the column `answer`. What a
    dict holds beside `score` is logged for the completion.

    >>> def compute_score(data_source, solution_str, ground_truth, extra_info=None):
    ...     return {"score": float(solution_str == ground_truth), "form": data_source}
    >>> row = {"data_source": ["math"] * 2, "reward_model": [{"style": "rule", "ground_truth": "42"}] * 2}
    >>> reward_of(compute_score)(prompts=["6 * 7?"] * 2, completions=["42", "41"], **row)
    [1.0, 0.0]
    """
    every = inspect.signature(compute_score).parameters
    parameters = {name: p.replace(kind=_KEYWORD) for name, p in every.items() if p.kind is not p.VAR_KEYWORD}
    known = PASSED if len(parameters) < len(every) else ()

    def passed(completion: Any, row: dict[str, Any]) -> dict[str, Any]:
        stored = row.get("reward_model")
        if "ground_truth" not in row and isinstance(stored, dict) and "ground_truth" in stored:
            row["ground_truth"] = stored["ground_truth"]
        if "ground_truth" not in row and row.get("answer") is not None:
            row["ground_truth"] = row["answer"]
        if "ground_truth" not in row:
            raise ValueError(
                "verl's ground truth is reward_model['ground_truth'] of a row; this row has none, and no column "
                "`ground_truth` or `answer`. Name the column that holds it in data.solution_column"
            )
        row = {"extra_info": None, **row, "solution_str": text_of(completion)}
        return {name: value for name, value in row.items() if name in parameters or name in known}

    async def of_async(completion, log_extra=None, **row):
        return _mark(await compute_score(**passed(completion, row)), log_extra)

    def of_sync(completion, log_extra=None, **row):
        return _mark(compute_score(**passed(completion, row)), log_extra)

    one: Any = of_async if inspect.iscoroutinefunction(compute_score) else of_sync
    ours = {name: inspect.Parameter(name, _KEYWORD, default=None) for name in ("log_extra", *OF_VERL)}
    ours["completion"] = inspect.Parameter("completion", _KEYWORD)
    theirs = {name: p for name, p in parameters.items() if name not in ("solution_str", "ground_truth", "extra_info")}
    one.__signature__ = inspect.Signature([*(ours | theirs).values()])
    return per_completion(one)


def _mark(result: object, log_extra: Callable[[str, Any], None] | None) -> Any:
    if isinstance(result, dict):
        for name, value in result.items():
            if log_extra and name != "score":
                log_extra(name, value)
        result = result["score"]
    if result is None:
        raise ValueError("compute_score returned None, where verl asks for a number or a dict with `score`")
    return result


def as_verl(function: str, **options: Any) -> Callable[..., float]:
    """A `compute_score` for verl of a reward of ours. Raises RewardError where it fails, in place of a 0.

    The reward's columns are the fields of `extra_info`, `data_source`, and the ground truth as `ground_truth` and
    `answer`; verl tells no prompt but that in `extra_info["question"]`. For the options see `rewards.forms.ours`.

    >>> compute_score = as_verl("gsm8k")
    >>> compute_score("openai/gsm8k", "so #### 42", "42")  # doctest: +SKIP
    1.0
    """
    return functools.partial(_compute_score, Isolated(function, **options))  # which verl can send to its workers


def _compute_score(
    reward: Isolated, data_source: Any, solution_str: str, ground_truth: Any, extra_info: Any = None, **_: object
) -> float:
    extra = dict(extra_info or {})
    columns = extra | {"data_source": data_source, "ground_truth": ground_truth, "answer": ground_truth}
    return reward.mark(str(extra.get("question", "")), solution_str, columns)
