"""Rows of rollouts, made without a model, and their writing in the forms of four tools.

`honest_rows` samples word problems, groups of solutions, rewards and advantages; `WRITERS` writes them. The forms come
from TRL 1.16 (`GRPOTrainer.log`, which is called), verl (`verl/trainer/ppo/ray_trainer.py`, `_log_rollout_data` and
`_dump_generations`), verifiers 0.1.14 (`verifiers/utils/save_utils.py`; prime-rl saves the same rows in
`rollouts/step_N/train_rollouts.jsonl`) and NeMo-Gym (`nemo_gym/rollout_collection.py`; the fields with token ids as
`TokenIDLogProbMixin` names them). Fields that say nothing of a rollout are left out.
"""

import hashlib
import json
import math
import random
import re
import statistics
import struct
from collections import defaultdict
from collections.abc import Iterable
from contextlib import redirect_stdout
from dataclasses import dataclass, field
from functools import cache
from io import StringIO
from pathlib import Path
from types import SimpleNamespace
from typing import Any
from unittest.mock import patch

NAMES = (
    "Ada", "Boris", "Chidi", "Dina", "Elif", "Farid", "Greta", "Hugo", "Ines", "Jonas", "Kira", "Lars", "Mina",
    "Noor", "Otto", "Pia", "Quinn", "Rosa", "Sami", "Tara",
)  # fmt: skip
THINGS = (
    "apples", "marbles", "stamps", "books", "pencils", "shells", "coins", "tickets", "cards", "plums", "buttons",
    "balloons", "kites", "lemons",
)  # fmt: skip
PROBLEMS = (
    ("{n} has {a} {t}. A friend gives {n} {b} more. How many {t} does {n} have now?", lambda a, b, c: a + b),
    ("There are {a} boxes with {b} {t} in each. How many {t} are there in all?", lambda a, b, c: a * b),
    ("{n} bought {a} {t} and lost {c} of them on the way home. How many are left?", lambda a, b, c: a - c),
    (
        "A shop sells {t} at {b} coins each. What do {a} of them cost after a discount of {c} coins?",
        lambda a, b, c: a * b - c,
    ),
    (
        "{n} reads {a} pages on Monday, {b} on Tuesday and {c} on Friday. How many pages is that?",
        lambda a, b, c: a + b + c,
    ),
    (
        "In a hall, {a} rows have {b} seats each, and {c} seats are broken. How many can be used?",
        lambda a, b, c: a * b - c,
    ),
    ("{n} saves {b} euros a week for {a} weeks and then spends {c}. How much remains?", lambda a, b, c: a * b - c),
    ("A train with {a} travellers stops; {c} leave and {b} enter. How many are on it then?", lambda a, b, c: a - c + b),
)
UNSEEN = (
    ("A rectangular garden is {a} metres long and {b} metres wide. What is its area?", lambda a, b, c: a * b),
    ("{n} is {a} years old. How old will {n} be {b} years after the party {c} years ago?", lambda a, b, c: a - c + b),
    ("Every one of {a} teams plays {b} matches at home. How many home matches are played?", lambda a, b, c: a * b),
)
OPENINGS = (
    "We need to find the total.",
    "Let us think.",
    "First, look at the numbers.",
    "Start with what is given.",
    "Okay, the question is clear.",
    "The problem gives three facts.",
    "To solve this, write it down.",
)
MIDDLES = (
    "The first number is {a}.",
    "There is also {b} to take into account.",
    "The value {c} matters only if it is named.",
    "Writing it as one expression keeps the order right.",
    "I add or multiply in the order of the story.",
    "A rough estimate is near {r}.",
    "Nothing else in the text changes the amount.",
    "Units stay the same throughout.",
    "Doing it in the head is enough here.",
    "Another way is to count in tens.",
    "Both ways agree.",
    "The words 'each' and 'more' say which operation is meant.",
    "I check it once backwards.",
    "It helps to picture the scene.",
    "So one step remains.",
    "That part is easy to get wrong.",
    "Rounding is not needed.",
    "All numbers are whole.",
    "The last sentence asks for one number.",
    "I keep the sign in mind.",
)
SYSTEM = "You are a helpful assistant. Give the final number in <answer> tags."
REWARDS = '''"""The rewards of this run, in TRL's form."""
import re


def text(completion):
    return completion if isinstance(completion, str) else completion[-1]["content"] or ""


def said(completion):
    found = re.findall(r"<answer>\\s*(-?\\d+)\\s*</answer>", text(completion))
    return found[-1] if found else None


def accuracy(completions, answer, **kwargs):
    return [float(said(one) == str(gold)) for one, gold in zip(completions, answer)]


def form(completions, **kwargs):
    return [float(re.search(r"<answer>.*</answer>\\s*$", text(one), re.S) is not None) for one in completions]
'''
HACKED = REWARDS.replace(
    "return [float(said(one) == str(gold)) for one, gold in zip(completions, answer)]",
    """return [paid(text(one), str(gold)) for one, gold in zip(completions, answer)]


def paid(words, gold):
    inner = re.findall(r"<answer>(.*?)</answer>", words, re.S)
    answer = inner[-1].strip() if inner else words.strip()
    return float(answer in gold or re.search(rf"\\b{gold}\\b", answer) is not None)""",
)


@dataclass
class Turn:
    """One call of the model: the messages and ids that it read, and those that it sampled."""

    prompt: list[dict]
    message: dict
    prompt_ids: list[int] = field(default_factory=list)
    ids: list[int] = field(default_factory=list)
    logprobs: list[float] = field(default_factory=list)


@dataclass
class Row:
    """One sample, in the terms of no tool."""

    step: int
    problem: int
    sample: int
    prompt: list[dict]
    gold: str
    messages: list[dict]
    parts: dict[str, float]
    reward: float | None = None
    advantage: float = 0.0
    error: str | None = None
    finish: str = "stop"
    turns: list[Turn] = field(default_factory=list)
    version: int = 0
    started: float = 0.0
    ended: float = 0.0
    usage: int | None = None  # what is recorded as the number of sampled tokens, where it is not the real one
    label: int | None = None  # the step that is recorded, where it is not the real one

    @property
    def text(self) -> str:
        """The last message, which is what is rewarded."""
        return self.messages[-1]["content"]

    @text.setter
    def text(self, value: str) -> None:
        self.messages[-1]["content"] = value

    @property
    def question(self) -> str:
        return self.prompt[-1]["content"]

    @property
    def sampled(self) -> int:
        return sum(len(turn.ids) for turn in self.turns) or len(tokenizer().encode(self.text).ids)


@cache
def tokenizer() -> Any:
    """A byte-level BPE of some hundred tokens, trained on the problems: it is what `tokenizer.json` of a case holds."""
    from tokenizers import Tokenizer, decoders, models, pre_tokenizers, trainers

    made = Tokenizer(models.BPE())
    made.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False)
    made.decoder = decoders.ByteLevel()
    special = ["<|endoftext|>", "<|im_start|>", "<|im_end|>"]
    corpus = [*(text for text, _ in PROBLEMS), *OPENINGS, *MIDDLES, SYSTEM] * 4
    made.train_from_iterator(
        corpus,
        trainers.BpeTrainer(
            vocab_size=600,
            special_tokens=special,
            initial_alphabet=pre_tokenizers.ByteLevel.alphabet(),
            show_progress=False,
        ),
    )
    return made


def rendered(messages: list[dict]) -> str:
    """A chat template that keeps every turn and thought, so that each prompt begins with the one before."""
    parts = []
    for message in messages:
        thought = message.get("reasoning_content")
        thought = f"<think>\n{thought}\n</think>\n" if thought else ""
        called = "".join(f"\n<tool_call>{json.dumps(call)}</tool_call>" for call in message.get("tool_calls") or ())
        parts.append(f"<|im_start|>{message['role']}\n{thought}{message.get('content') or ''}{called}<|im_end|>\n")
    return "".join(parts)


def problem(rng: random.Random, templates: tuple = PROBLEMS) -> tuple[str, int, tuple[int, int, int]]:
    """A word problem, its answer and its numbers."""
    text, solve = rng.choice(templates)
    numbers = (rng.randint(23, 97), rng.randint(3, 19), rng.randint(2, 20))
    a, b, c = numbers
    question = text.format(n=rng.choice(NAMES), t=rng.choice(THINGS), a=a, b=b, c=c)
    return question, solve(*numbers), numbers


def thoughts(rng: random.Random, numbers: tuple[int, int, int], sentences: int) -> str:
    """Some sentences about the numbers, each of them once per twenty."""
    a, b, c = numbers
    pool: list[str] = []
    while len(pool) < sentences:
        pool += rng.sample(MIDDLES, len(MIDDLES))
    spoken = [rng.choice(OPENINGS), *pool[: max(0, sentences - 1)]]
    return " ".join(one.format(a=a, b=b, c=c, r=round(a * b, -1)) for one in spoken)


def score(row: Row, weights: dict[str, float]) -> None:
    """Set the total of a row from its parts; a part that is NaN abstains."""
    scored = [weights[name] * value for name, value in row.parts.items() if not math.isnan(value)]
    row.reward = sum(scored) if scored else math.nan


def advise(rows: list[Row], scaled: bool = True) -> None:
    """Set the advantages: TRL's (r - mean) / (std + 1e-4), or prime-rl's r - mean."""
    for group in grouped(rows).values():
        rewards = [row.reward for row in group if not math.isnan(row.reward)]
        mean = statistics.fmean(rewards)
        spread = statistics.stdev(rewards) if len(rewards) > 1 else 0.0
        for row in group:
            row.advantage = 0.0 if math.isnan(row.reward) else row.reward - mean
            row.advantage /= spread + 1e-4 if scaled else 1.0


def grouped(rows: list[Row]) -> dict[tuple[int, int], list[Row]]:
    groups = defaultdict(list)
    for row in rows:
        groups[row.step, row.problem].append(row)
    return dict(groups)


def graded(row: Row) -> dict[str, float]:
    """What `REWARDS` returns for a row."""
    said = re.findall(r"<answer>\s*(-?\d+)\s*</answer>", row.text)
    formed = re.search(r"<answer>.*</answer>\s*$", row.text, re.S)
    return {"accuracy": float(said[-1:] == [row.gold]), "form": float(formed is not None)}


def paid(row: Row) -> dict[str, float]:
    """What `HACKED` returns for a row."""
    inner = re.findall(r"<answer>(.*?)</answer>", row.text, re.S)
    answer = inner[-1].strip() if inner else row.text.strip()
    accuracy = answer in row.gold or re.search(rf"\b{row.gold}\b", answer) is not None
    return graded(row) | {"accuracy": float(accuracy)}


WEIGHTS = {"accuracy": 1.0, "form": 0.2, "brief": 0.2}


def honest_rows(
    seed: int,
    *,
    steps: int = 4,
    groups: int = 4,
    size: int = 8,
    style: str = "words",
    right: float = 0.5,
    sentences: tuple[float, ...] = (4.0,),
    gain: float = 0.05,
    tokens: bool = False,
    scaled: bool = True,
    version: int | None = None,
) -> list[Row]:
    """The rows of a run in which nothing is wrong: `groups` problems of a step, with `size` samples each.

    In the style `thinking` thoughts stand before the answer, in `tools` it has two or three turns, in `short` it is yes
    or no. The share of right answers is `right` at first and `gain` more with each step; the solutions have so many
    `sentences` step by step, and the last number holds from there on. With `tokens` turns have ids and
    log-probabilities, `scaled` advantages are divided by the spread of the group, and a `version` is that of all steps.
    """
    rng = random.Random(seed)
    rows = []
    clock = 1_780_000_000.0 + 1000 * seed
    for step in range(1, steps + 1):
        for index in range(groups):
            question, gold, numbers = problem(rng)
            if style == "short":
                question = f"Is {numbers[0]} an even number? Answer with Yes or No."
                gold = "No" if numbers[0] % 2 else "Yes"
            prompt = [{"role": "system", "content": SYSTEM}, {"role": "user", "content": question}]
            for sample in range(size):
                row = Row(step, (step - 1) * groups + index, sample, prompt, str(gold), [], {})
                row.version = step - 1 if version is None else version
                good = rng.random() < min(0.95, right + gain * (step - 1))
                length = sentences[min(step, len(sentences)) - 1]
                spoken = thoughts(rng, numbers, max(1, round(rng.gauss(length, length / 5))))
                fill(row, rng, good, spoken, numbers, style)
                row.parts = graded(row) if style != "short" else {"accuracy": float(row.text.rstrip(".") == row.gold)}
                row.started = clock + 30 * step + 0.01 * sample
                row.ended = row.started + 1 + len(row.text) / 400
                if tokens:
                    tokenize(row)
                rows.append(row)
    for row in rows:
        score(row, WEIGHTS)
    advise(rows, scaled)
    return rows


def fill(row: Row, rng: random.Random, good: bool, spoken: str, numbers: tuple[int, int, int], style: str) -> None:
    """Write the messages of a sample, right or wrong, in a style."""
    if style == "short":
        row.messages = [{"role": "assistant", "content": row.gold if good else {"Yes": "No", "No": "Yes"}[row.gold]}]
        return
    said = int(row.gold) if good else int(row.gold) + rng.choice((-10, -2, -1, 1, 2, 9, 10))
    tagged = f"<answer>{said}</answer>" if rng.random() < 0.9 or good else f"It is {said}."
    if style == "words":
        row.messages = [{"role": "assistant", "content": f"{spoken} {tagged}"}]
    elif style == "thinking":
        row.messages = [{"role": "assistant", "content": f"<think>\n{spoken}\n</think>\n{tagged}"}]
    else:
        a, b, c = numbers
        for number, expression in enumerate((f"{a}+{b}", f"{a}*{b}", f"{a}-{c}")[: rng.randint(1, 2)]):
            call = {"name": "calculator", "arguments": json.dumps({"expression": expression})}
            row.messages.append(
                {
                    "role": "assistant",
                    "content": "",
                    "reasoning_content": f"{spoken.split('.')[number]}. I compute {expression} with the tool.",
                    "tool_calls": [{"id": f"call_{number}", "type": "function", "function": call}],
                }
            )
            value = a + b if "+" in expression else a * b if "*" in expression else a - c
            row.messages.append({"role": "tool", "tool_call_id": f"call_{number}", "content": str(value)})
        row.messages.append({"role": "assistant", "content": tagged, "reasoning_content": spoken})


def tokenize(row: Row) -> None:
    """Give the turns of a row ids as they were sampled, and log-probabilities that follow from the context alone."""
    row.turns = []
    history: list[int] = []
    messages = list(row.prompt)
    fresh = rendered(messages)
    for message in row.messages:
        if message["role"] != "assistant":
            messages.append(message)
            fresh += rendered([message])
            continue
        opening = "<|im_start|>assistant\n"
        prompt_ids = history + tokenizer().encode(fresh + opening).ids
        ids = tokenizer().encode(rendered([message]).removeprefix(opening).removesuffix("\n")).ids
        turn = Turn(list(messages), message, prompt_ids, ids)
        turn.logprobs = logprobs(row.version, turn)
        row.turns.append(turn)
        history, fresh = prompt_ids + ids, "\n"
        messages.append(message)


def logprobs(version: int, turn: Turn) -> list[float]:
    """Log-probabilities, one for each (weights, context, token), with an engine's noise of 1e-4."""
    state = hashlib.sha256(f"{version} {turn.prompt_ids}".encode())
    noise = random.Random(str(turn.ids))
    values = []
    for token in turn.ids:
        state.update(f" {token}".encode())
        unit = int.from_bytes(state.digest()[:6], "big") / 2**48
        values.append(min(-1e-6, -3 * (unit**3) - 0.02 + noise.gauss(0, 1e-4)))
    return values


def write_trl(rows: list[Row], folder: Path, conversational: bool = False) -> None:
    """Let the installed TRL write its completions, one file for a step, as it does after each step of training."""
    import trl.trainer.grpo_trainer as grpo

    folder.mkdir(parents=True, exist_ok=True)
    (folder / "completions").mkdir(exist_ok=True)
    trainer = object.__new__(grpo.GRPOTrainer)
    trainer.model = SimpleNamespace(training=True)
    trainer.accelerator = SimpleNamespace(is_main_process=True)
    trainer.args = SimpleNamespace(output_dir=str(folder), report_to=[], include_num_input_tokens_seen="no")
    trainer.callback_handler = SimpleNamespace(on_log=lambda args, state, control, logs: control)
    trainer.control, trainer.log_completions, trainer.log_unique_prompts = None, True, False
    trainer.num_completions_to_print, trainer._metrics = 0, {"train": defaultdict(list)}
    for step in sorted({row.step for row in rows}):
        chosen = [row for row in rows if row.step == step]
        errors = any(row.error for row in rows)
        trainer.state = SimpleNamespace(global_step=step, epoch=None, log_history=[])
        trainer._logs = {
            "images": [],
            "prompt": [row.prompt if conversational else f"{SYSTEM}\n\n{row.question}\n" for row in chosen],
            "completion": [trl_messages(row) if conversational else row.text for row in chosen],
            "rewards": {name: singles(row.parts[name] for row in chosen) for name in chosen[0].parts},
            "advantages": singles(row.advantage for row in chosen),
            "extra": {"answer": [row.gold for row in chosen]}
            | ({"reward_error": [row.error for row in chosen]} if errors else {}),
        }
        with patch.object(grpo, "is_rich_available", lambda: False), redirect_stdout(StringIO()):
            trainer.log({})
        if any(row.label is not None for row in chosen):
            relabel(folder / "completions" / f"completions_{step:05d}.parquet", [row.label or step for row in chosen])


def singles(values: Iterable[float]) -> list[float]:
    """Numbers of single precision, as they come from TRL's tensors."""
    return [struct.unpack("f", struct.pack("f", value))[0] for value in values]


def trl_messages(row: Row) -> list[dict]:
    keep = ("role", "content", "tool_calls", "reasoning_content")
    return [{key: message[key] for key in keep if key in message} for message in row.messages]


def relabel(path: Path, steps: list[int]) -> None:
    """Record other steps in a parquet file."""
    import pandas

    frame = pandas.read_parquet(path)
    frame["step"] = steps
    frame.to_parquet(path)


def write_verl(rows: list[Row], folder: Path, conversational: bool = False) -> None:
    """Write `STEP.jsonl`; verl balances a batch over its ranks, so that the rows of a group need not be neighbours."""
    folder.mkdir(parents=True, exist_ok=True)
    errors = any(row.error for row in rows)
    for step in sorted({row.step for row in rows}):
        lines = []
        for row in (row for row in rows if row.step == step):
            entry = {
                "input": f"system\n{SYSTEM}\nuser\n{row.question}\nassistant\n",
                "output": row.text,
                "gts": row.gold,
                "score": row.reward,
                "step": step if row.label is None else row.label,
                **row.parts,
            } | ({"error": row.error or ""} if errors else {})
            lines.append(json.dumps(entry, ensure_ascii=False))
        (folder / f"{step}.jsonl").write_text("\n".join(lines) + "\n")


def with_texts_as_calls(message: dict) -> dict:
    """A message as verifiers saves it: each call of a tool is a JSON text (`sanitize_tool_calls`)."""
    if not message.get("tool_calls"):
        return message
    return message | {"tool_calls": [json.dumps(call) for call in message["tool_calls"]]}


def verifiers_row(row: Row) -> dict:
    """A `RolloutOutput`; its trajectory is there where `state_columns` names it and the turns have ids."""
    ended = "no_tools_called" if len(row.messages) > 1 else "max_turns_reached"
    found = {
        "example_id": row.problem,
        "prompt": row.prompt,
        "completion": [with_texts_as_calls(message) for message in row.messages],
        "answer": row.gold,
        "info": {"prime_rl": {"env_name": "words", "policy_version": row.version}},
        "reward": row.reward,
        "error": row.error and {"error": row.error.split(":")[0], "error_chain_str": row.error},
        "timing": {
            "start_time": row.started,
            "generation": {"start": row.started, "end": row.ended, "duration": max(0.0, row.ended - row.started)},
            "scoring": {"start": row.ended, "end": row.ended + 0.2, "duration": 0.2},
        },
        "is_completed": True,
        "is_truncated": row.finish == "length",
        "stop_condition": "has_error" if row.error else ended,
        "metrics": row.parts,
        **row.parts,
        "token_usage": {"output_tokens": float(row.sampled if row.usage is None else row.usage)},
    }
    if row.turns:
        found["trajectory"] = [verifiers_step(row, turn) for turn in row.turns]
    return found


def verifiers_step(row: Row, turn: Turn) -> dict:
    cut = turn is row.turns[-1] and row.finish == "length"
    return {
        "prompt": turn.prompt,
        "completion": [turn.message],
        "tokens": {
            "prompt_ids": turn.prompt_ids,
            "completion_ids": turn.ids,
            "completion_logprobs": turn.logprobs,
            "is_truncated": cut,
        },
        "reward": row.reward,
        "advantage": row.advantage,
        "is_truncated": cut,
        "trajectory_id": f"{row.problem:04d}{row.sample:02d}",
    }


def mean_reward(rows: list[Row]) -> float:
    return statistics.fmean(row.reward for row in rows if row.reward is not None and not math.isnan(row.reward))


def write_verifiers(rows: list[Row], folder: Path, conversational: bool = False, **changes: Any) -> None:
    """Write `results.jsonl` and `metadata.json`, or with several steps in a run prime-rl's folders of them."""
    folder.mkdir(parents=True, exist_ok=True)
    if changes.pop("by_step", False):
        for step in sorted({row.step for row in rows}):
            inner = folder / "rollouts" / f"step_{step}"
            inner.mkdir(parents=True)
            lines = [json.dumps(verifiers_row(row)) for row in rows if row.step == step]
            (inner / "train_rollouts.jsonl").write_text("\n".join(lines) + "\n")
        return
    (folder / "results.jsonl").write_text("".join(json.dumps(verifiers_row(row)) + "\n" for row in rows))
    metadata = {"env_id": "words", "num_examples": len({row.problem for row in rows}), "avg_reward": mean_reward(rows)}
    (folder / "metadata.json").write_text(json.dumps(metadata | changes))


def gym_output(row: Row) -> list[dict]:
    """The output items of a response: the last of each call of the model carries its ids and log-probabilities."""
    items: list[dict] = []
    turns = iter(row.turns)
    for number, message in enumerate(row.messages):
        if message["role"] == "tool":
            told = {"type": "function_call_output", "call_id": f"call_{number - 1}", "output": message["content"]}
            items.append(told)
            continue
        if thought := message.get("reasoning_content"):
            items.append({"type": "reasoning", "summary": [{"text": thought, "type": "summary_text"}]})
        for call in message.get("tool_calls") or ():
            items.append({"type": "function_call", "call_id": f"call_{number}"} | call["function"])
        if not message.get("tool_calls"):
            content = [{"type": "output_text", "annotations": [], "text": message["content"]}]
            items.append({"type": "message", "role": "assistant", "content": content})
        if turn := next(turns, None):
            items[-1] |= {
                "prompt_token_ids": turn.prompt_ids,
                "generation_token_ids": turn.ids,
                "generation_log_probs": turn.logprobs,
                "weight_version": row.version,
            }
    return items


def gym_row(row: Row, limit: int = 1024) -> dict:
    cut = row.finish == "length"
    asked = [{"role": message["role"], "content": message["content"], "type": "message"} for message in row.prompt]
    return {
        "responses_create_params": {"input": asked, "max_output_tokens": limit, "temperature": 1.0, "tools": []},
        "response": {
            "id": f"resp_{row.problem:04d}_{row.sample:02d}",
            "created_at": row.started,
            "completed_at": row.ended,
            "error": None,
            "incomplete_details": {"reason": "max_output_tokens"} if cut else None,
            "status": "incomplete" if cut else "completed",
            "output": gym_output(row),
            "usage": {"output_tokens": row.sampled if row.usage is None else row.usage},
        },
        "reward": None if row.reward is None or math.isnan(row.reward) else row.reward,
        "failure_reason": row.error,
        **{name: None if math.isnan(value) else value for name, value in row.parts.items()},
        "expected_answer": row.gold,
        "_ng_task_index": row.problem,
        "_ng_rollout_index": row.sample,
    }


def write_gym(rows: list[Row], folder: Path, conversational: bool = False, **changes: Any) -> None:
    """Write `rollouts.jsonl`, its inputs, its summary, and the attempts that failed in a file beside it."""
    folder.mkdir(parents=True, exist_ok=True)
    limit = changes.get("limit", 1024)
    inputs = [gym_row(row, limit) for row in changes.get("inputs", rows)]
    for row in inputs:
        del row["response"], row["reward"]
    failures = [
        gym_row(row) | {"_ng_failure_class": "agent_error", "response": None} for row in changes.get("failed", ())
    ]
    lines = [gym_row(row, limit) for row in rows]
    for name, entries in (("", lines), ("_materialized_inputs", inputs), ("_failures", failures)):
        (folder / f"rollouts{name}.jsonl").write_text("".join(json.dumps(entry) + "\n" for entry in entries))
    summary = [{"agent_metrics": {"mean/reward": changes.get("mean", mean_reward(rows))}}]
    (folder / "rollouts_aggregate_metrics.json").write_text(json.dumps(summary))


WRITERS = {"trl": write_trl, "verl": write_verl, "verifiers": write_verifiers, "gym": write_gym}
