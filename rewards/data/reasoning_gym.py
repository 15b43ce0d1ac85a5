"""Problems of reasoning-gym (optional extra `reasoning-gym`): about a hundred procedural tasks, by name."""

from __future__ import annotations

import dataclasses
import difflib
import hashlib
import json
from collections.abc import Iterator, Mapping
from itertools import islice
from typing import TYPE_CHECKING, Any

from rewards.data.source import REASONING_GYM as PREFIX
from rewards.protocol import RewardError

if TYPE_CHECKING:
    from reasoning_gym.dataset import ProceduralDataset

SPLITS = ("train", "held_out")
JUNK = ("I do not know.", "lorem ipsum dolor sit amet", "?!")  # texts without an answer
HELD_OUT = 4  # one question in this many
COUNT = 2_000  # some tasks take 0.1 s and more to make one


def reasoning_gym_problems(
    task: str, split: str, seed: int = 0, *, count: int = COUNT, options: Mapping[str, Any] | None = None
) -> list[dict[str, Any]]:
    r"""Distinct problems with the keys `question`, `answer`, `metadata` (what the task's scorer reads) and `id`.

    A hash of the question decides its split, so that no question is in both, whatever the seed. The list is shorter
    than `count` where the task repeats itself. A few tasks (such as `word_ladder` and `knight_swap`) give the same
    problems in the next process only with PYTHONHASHSEED set; without it a run on them cannot be resumed. `answer` is
    None in a task that has a scorer and no reference answers, such as `graph_color`. Raises ValueError where package,
    task, split or options do not exist, and for a scorer that takes junk or refuses the task's own answer.

    >>> problem = reasoning_gym_problems("leg_counting", "train", count=1)[0]
    >>> problem["question"][-32:], problem["answer"]
    ('mantiss, 9 crabs, 3 woodlouses?\n', '500')
    """
    if split not in SPLITS:
        raise ValueError(f"{PREFIX}{task} has no split {split!r}; use one of {', '.join(SPLITS)}")
    dataset = _dataset(task, seed, size=2 * HELD_OUT * count + 100, options=dict(options or {}))
    problems = list(islice(_problems(dataset, task, split, seed), count))
    if not problems:
        raise ValueError(f"{PREFIX}{task} has no {split} problems: all of its few questions are in the other split")
    _check_gradable(task, problems[0])
    return problems


def _problems(dataset: ProceduralDataset, task: str, split: str, seed: int) -> Iterator[dict[str, Any]]:
    met = set()
    for index in range(len(dataset)):
        entry = dataset[index]
        question = entry["question"]
        key = hashlib.sha256(question.encode()).digest()
        if key in met or (key[0] % HELD_OUT == 0) != (split == "held_out"):
            continue
        met.add(key)
        metadata = json.loads(json.dumps(entry["metadata"], default=str))  # the scorer's processes exchange JSON
        identity = {"id": f"reasoning_gym/{task}/{seed}/{index}"}
        yield identity | {"question": question, "answer": entry["answer"], "metadata": metadata}


def _dataset(task: str, seed: int, size: int, options: dict[str, Any]) -> ProceduralDataset:
    try:
        import reasoning_gym
        from reasoning_gym.factory import DATASETS
    except ImportError as error:
        raise ValueError(
            f"{PREFIX}{task} requires reasoning-gym: pip install 'quartet-rewards[reasoning-gym]'"
        ) from error
    if task not in DATASETS:
        near = difflib.get_close_matches(task, DATASETS, n=1, cutoff=0.5)
        hint = f"did you mean {PREFIX}{near[0]}?" if near else f"tasks are {', '.join(sorted(DATASETS))}"
        raise ValueError(f"there is no task {PREFIX}{task}; {hint}")
    try:
        return reasoning_gym.create_dataset(task, **{"seed": seed, "size": size} | options)
    except (AssertionError, TypeError, ValueError) as error:
        names = [field.name for field in dataclasses.fields(DATASETS[task][1])]
        there = ", ".join(name for name in names if name not in ("seed", "size"))
        raise ValueError(
            f"data.task_options={options}: {PREFIX}{task} refuses them: {error}; its options are {there}"
        ) from error


def _check_gradable(task: str, problem: Mapping[str, Any]) -> None:
    """Refuse a scorer that cannot tell the task's own answers, where it has any, from junk.

    Some scorers compare with what JSON cannot carry (tuples); `game_of_life_halting` takes any text for "True".
    """
    from rewards.built_in.reasoning import reasoning_gym as score

    known = [] if problem["answer"] is None else [problem["answer"]]
    texts = [*known, *JUNK]
    question, answer, metadata = ([problem[name]] * len(texts) for name in ("question", "answer", "metadata"))
    try:
        marks = score(None, texts, question=question, answer=answer, metadata=metadata)
    except RewardError:  # we cannot call this scorer; the user may have a reward of their own
        return
    fault = ""
    wrongly_right = [text for text, mark in zip(texts, marks, strict=True) if text in JUNK and mark >= 1.0]
    if known and marks[0] != 1.0:
        fault = "does not give its own gold answer full marks"
    elif wrongly_right:
        fault = f"gives full marks to a text that answers nothing ({wrongly_right[0]!r})"
    if fault:
        raise ValueError(f"{PREFIX}{task} {fault}, so accuracy cannot be measured on it; choose another task")
