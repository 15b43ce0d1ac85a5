"""What the lessons share: digits that are to be written backward, a policy that has half learned it, and axes."""

import json
import math
import random
from contextlib import contextmanager
from pathlib import Path
from statistics import fmean

from grpo import Session, SftConfig, TrainConfig
from rewards.config.reward import with_rewards

BLUE, ORANGE, GREEN, GREY = "#0072B2", "#E69F00", "#009E73", "#767676"
IMAGES = Path(__file__).parent / "images"


def exact(completions, answer, **columns):
    """1 for the right digits in the right order, else 0."""
    return [float(text.strip() == gold) for text, gold in zip(completions, answer, strict=True)]


def write_problems(file, digits, count=4000):
    """Lines of {"question": "4 0 7 1", "answer": "1 7 0 4"}."""
    dice = random.Random(0)
    rows = [[str(dice.randrange(10)) for _ in range(digits)] for _ in range(count)]
    lines = [json.dumps({"question": " ".join(row), "answer": " ".join(reversed(row))}) for row in rows]
    file.write_text("\n".join(lines), encoding="utf-8")


@contextmanager
def half_taught(folder, digits=4, chance=0.5, **options):
    """A session in its first step of GRPO. Its policy has seen worked solutions until it was right with this chance.

    What is sampled depends on the names of the folder and of the file, which are parts of the problems' names."""
    folder.mkdir(parents=True, exist_ok=True)
    write_problems(folder / "problems.jsonl", digits)
    common = {
        "threads": 1,
        "data": {"name": str(folder / "problems.jsonl")},
        "rollout": {"max_completion_tokens": digits + 4},
        "eval": {"limit": 0},
        "log": {"trackers": []},
    }
    learner = {"learning_rate": 2e-3, "warmup_steps": 20, "schedule": "constant"}
    first = SftConfig(output_dir=folder / "first", model="tiny", steps=1000, learner=learner, **common)
    with Session.open(first) as session:
        for step in session.run.steps():
            session.learn(session.prepare_solutions(session.solutions(32)))
            if step % 10 == 0 and fmean(chances(session, session.prompts(step, count=32))) >= chance:
                break
        session.finish()
        print(f"solutions that the policy has learned from: {32 * step}")
    config = TrainConfig(
        output_dir=folder / "second",
        model=str(folder / "first/policy"),
        loss={"scale_rewards": "none"},  # the advantage is the reward less the mean of the group
        **common,
        **options,
    )
    with Session.open(with_rewards(config, exact)) as session:
        session.run.log.console.quiet = True  # no tables of what was sampled
        next(session.run.steps())
        yield session


def chances(session, prompts):
    """The chance of the right answer to each prompt. There is only one right answer, so nothing is sampled."""
    answers = [session.group(prompt, [prompt.columns["answer"]]) for prompt in prompts]
    logprobs = session.logprobs(prompts, [[group.completions[0].token_ids] for group in answers])
    return [math.exp(float(sum(of_prompt[0]))) for of_prompt in logprobs]


def two_axes():
    """A figure, and its two axes."""
    from matplotlib.figure import Figure  # pip install matplotlib

    figure = Figure(figsize=(8, 3.2), dpi=100, layout="constrained", facecolor="white")
    axes = figure.subplots(1, 2)
    for one in axes:
        one.spines[["top", "right"]].set_visible(False)
        one.grid(axis="y", color="#E6E6E6")
        one.tick_params(colors=GREY)
    return figure, *axes
