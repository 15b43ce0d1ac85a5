"""The scorer of each reasoning-gym task (optional extra `reasoning-gym`), on the columns of its problems."""

from __future__ import annotations

import ast
import functools
import inspect
import re
import textwrap
from collections.abc import Callable
from typing import Any

from rewards.protocol import Completions, RewardError, right_at, text_of

try:
    from reasoning_gym import get_score_answer_fn
    from reasoning_gym.factory import DATASETS
except ImportError as error:
    raise RewardError(
        "reward reasoning_gym needs reasoning-gym: pip install 'quartet-rewards[reasoning-gym]'"
    ) from error

RUNS_CODE = {"eval", "exec", "compile", "parse_expr", "sympify"}  # sympy's two call eval()
_ANSWER = re.compile(r"<answer>((?:(?!<answer>).)*?)</answer>", re.DOTALL)


@right_at(1.0)
def reasoning_gym(
    prompts: list | None,
    completions: Completions,
    question: list[str],
    answer: list[str | None],
    metadata: list[dict[str, Any]],
    log_metric: Callable[[str, float], None] | None = None,
    **_,
) -> list[float]:
    """The mark of the task's own scorer, mostly 1.0 for a right answer and less for a close one.

    The answer of a completion is the text in its last `<answer>` tags, else after its last `####`, else all of it. If
    the scorer raises on a completion (most expect a form, such as numbers), the completion gets 0.0, and the share of
    these is logged as `reasoning_gym/unreadable`. If the scorer raises on the gold answer of the row too, the row is
    broken and the exception goes on. Raises RewardError for a task whose scorer would run the completion as code.

    >>> metadata = {"source_dataset": "leg_counting"}
    >>> reasoning_gym(None, ["<answer>8</answer>", "7"], question=["?"] * 2, answer=["8"] * 2, metadata=[metadata] * 2)
    [1.0, 0.0]
    """
    rows = zip(completions, question, answer, metadata, strict=True)
    marks = [
        _mark(_answer(text_of(text)), {"question": q, "answer": a, "metadata": about}) for text, q, a, about in rows
    ]
    if log_metric and marks:
        log_metric("reasoning_gym/unreadable", marks.count(None) / len(marks))
    return [mark or 0.0 for mark in marks]


def _mark(answer: str, entry: dict[str, Any]) -> float | None:
    """The mark of the scorer, or None if it raises because of the completion."""
    scorer = _scorer(entry["metadata"]["source_dataset"])
    try:
        return float(scorer(answer, entry))
    except MemoryError:
        raise
    except Exception:  # scorers may raise anything, but not on the gold answer of a sound row
        if entry["answer"] is not None:  # a task may have a scorer and no reference answer
            scorer(entry["answer"], entry)
        return None


def _answer(text: str) -> str:
    tagged = _ANSWER.findall(text)
    return (tagged[-1] if tagged else text.rpartition("####")[2]).strip()


@functools.lru_cache(maxsize=64)
def _scorer(task: str) -> Callable[[str, dict[str, Any]], float]:
    tree = ast.parse(textwrap.dedent(inspect.getsource(DATASETS[task][0].score_answer)))
    names = {ast.unparse(node.func) for node in ast.walk(tree) if isinstance(node, ast.Call)}
    if calls := sorted(name for name in names if name.rpartition(".")[2] in RUNS_CODE):
        raise RewardError(
            f"reasoning_gym:{task} scores a completion by running it as code ({', '.join(calls)}), which we never do "
            "with a model's text; choose another task, or write a reward for it"
        )
    return get_score_answer_fn(task)
