"""`quartet rehearse`: what would end or spoil a run, found before its expensive hours and without its weights.

Data, template, tokenizer, rewards, tools and limits are the run's own. The policy is a random one of the same
architecture with two layers of each kind, which takes two steps (rehearse_steps.py).
"""

from __future__ import annotations

import math
import re
import time
from collections.abc import Callable, Iterator, Sequence
from contextlib import closing
from dataclasses import replace
from statistics import fmean, median
from typing import TYPE_CHECKING, Any, cast

from grpo.cli.commands import machine
from grpo.cli.commands.check import TRANSFORMERS, examine_text
from grpo.cli.commands.memory import MemoryOfRun
from grpo.cli.commands.rehearsal import Rehearsal, key_of, with_options
from grpo.cli.commands.rehearse_steps import take_steps
from grpo.cli.commands.summary import DryRun
from grpo.config.environment import rewards_of
from grpo.config.run import TrainConfig
from grpo.run import trackers
from grpo.task.check import open_task
from grpo.task.parts import tokenizer_of
from grpo.task.plan import REFUSALS, Plan
from grpo.task.table import contradictions
from grpo.task.task import Task, reward_specs
from policies import presets
from policies.anatomy import count_parameters
from policies.devices import device_of
from policies.policy import Policy, PolicyError
from rewards.commands.check import check_reward
from rewards.commands.options import RewardTestConfig
from rewards.commands.probes import misprint
from rewards.config.data import is_chat
from rewards.data.examples import Example
from rewards.kinds import ERROR, NOTE, WARNING
from rewards.scorer import BATCH
from rewards.ties import tied
from rollout.environments.thoughts import TOOL, dropping
from rollout.group import Completion, Prompt, RolloutGroup

if TYPE_CHECKING:
    from transformers import PreTrainedTokenizerBase

SAMPLED, TRIED = 400, 20  # examples whose tokens are counted, and those that rewards are tried on
MANY = 0.1  # a share of examples that is no accident
THOUGHTS = 1024  # tokens that a model which thinks needs at least
EPOCHS = 20  # above it a policy learns its problems by heart
RATES = {False: (1e-8, 1e-4), True: (1e-7, 1e-3)}  # learning rates that have been seen to learn; True: of adapters
FLOPS, BYTES_S = 3e14, 2.5e12  # of one H100 in a second, used well
OF_OTHERS = ("environment", "agent", "column", "judge", "remote")  # rewards whose marks come from elsewhere
# How a right answer may have to be written for a reward to see it.
FORMS = {
    "as it is": "{}",
    "####": "#### {}",
    r"\boxed": r"\boxed{{{}}}",
    "answer is": "The answer is {}.",
    "<answer>": "<answer>{}</answer>",
    "<think>": "<think>\nI count.\n</think>\n{}",
    r"<think>, \boxed": "<think>\nI count.\n</think>\n\\boxed{{{}}}",
    "<think>, <answer>": "<think>\nI count.\n</think>\n<answer>\n{}\n</answer>\n",
    "<reasoning>, <answer>": "<reasoning>\nI count.\n</reasoning>\n<answer>\n{}\n</answer>\n",
}


def rehearse(config: TrainConfig, *, faults: bool = False, device_gib: float | None = None) -> Rehearsal:
    """Looks at all that a run of `config` needs but its weights, and takes two steps. `device_gib`: see `DryRun`."""
    result = Rehearsal(f"rehearsal of {config.model}")
    try:
        run = DryRun(as_planned(config, result), device_gib)
        sampled = {name: getattr(config.rollout, name) for name in ("backend", "vllm")}
        rollout = run.config.rollout.model_copy(update=sampled)
        run.memory = MemoryOfRun(run.plan.shape, run.head, run.config.model_copy(update={"rollout": rollout}))
        with open_task(run.config) as task:
            tokenizer = tokenizer_of(run.plan, task)
            if tokenizer is None:
                raise PolicyError(f"model={config.model!r} has no tokenizer; put its files beside config.json")
            policy = run.plan.bare_policy(tokenizer)
            sizes = count_parameters(policy.trunk, policy.config.get_text_config(decoder=True))
            prompts = look_at_lengths(result, config, task, tokenizer)
            look_at_template(result, config, policy, prompts)
            look_at_repetition(result, config, prompts)
            run.check(task)
            look_at_options(result, config, task, fresh=run.plan.source.base in presets.PRESETS)
            result.facts["plan"] = dict(run.rows(task))
            look_at_machine(result, run, here=config.device == "cpu")
            seconds = 0.0, 0.0
            if task.scores and rewards_of(config)[0].function not in OF_OTHERS:
                # Rewards of several turns may read calls, which no text here has; scores of a model have no scale.
                if not (config.has_tools or task.models) and all(source.solution_column for source in config.data):
                    try_forms(result, task, prompts, tokenizer)
                times = [try_functions(result, alone, part) for alone, part in sources_of(config, task)]
                seconds = max(slowest for slowest, _ in times), max(whole for _, whole in times)
            try_tools(result, task)
            look_at_time(result, config, sizes, prompts, seconds)
    except REFUSALS as error:
        result.refuse(error)
        return result
    take_steps(result, run.plan, config, tokenizer, faults)
    return result


# ---- options --------------------------------------------------------------------------------------------------------


def as_planned(config: TrainConfig, result: Rehearsal) -> TrainConfig:
    """The configuration as this machine can look at it: on a device that is here, and without vLLM and trackers that
    are not. What does not go together is found before."""
    changes: dict[str, Any] = {}
    try:
        device_of(config.device)
    except ValueError:
        changes["device"] = "cpu"
    for line in contradictions(Plan(with_options(config, changes))):
        result.refuse(line)
    if config.rollout.backend == "vllm":
        changes |= {"rollout.backend": None, "rollout.vllm": {}}
    try:
        trackers.installed(config.log.trackers)
    except ValueError as error:
        changes["log.trackers"] = []
        result.add("tracker-missing", str(error), "log.trackers")
    return with_options(config, changes)


def look_at_options(result: Rehearsal, config: TrainConfig, task: Task, *, fresh: bool) -> None:
    """Finds numbers that fit no run of so many steps over so many examples. `fresh`: the policy begins with random
    weights, which learn at other rates."""
    steps, rate, examples = config.steps, config.learner.learning_rate, len(task.train)
    epochs = steps * config.prompts_per_step / examples
    result.facts["data"] = {"examples": examples, "held out": len(task.held_out), "epochs": epochs}
    if epochs > EPOCHS:
        most = max(1, EPOCHS * examples // config.prompts_per_step)
        what = f"{steps} steps read the data {epochs:.0f} times"
        result.add("too-many-epochs", what, "steps", change=f"take {most} at most")
    if config.learner.warmup_steps >= steps:
        what = f"{config.learner.warmup_steps} steps of warm-up in a run of {steps} never end at {rate:g}"
        result.add("warmup-too-long", what, "learner.warmup_steps", change=f"take {steps // 20}")
    low, high = RATES[config.lora is not None]
    if not (fresh or low <= rate <= high):
        what = f"{rate:g} is outside of {low:g} to {high:g}, where GRPO has been seen to learn"
        take = f"take {1e-5 if config.lora else 1e-6:g}"
        result.add("rate-unusual", what, "learner.learning_rate", change=take)
    if config.rollout.temperature < 0.2:
        what = f"at {config.rollout.temperature:g} a group has zero variance, and teaches nothing"
        result.add("temperature", what, "rollout.temperature")
    if config.eval.every and config.eval.every > steps:
        result.add("not-evaluated", f"{config.eval.every} is after the last of {steps} steps", "eval.every")
    if config.checkpoint.every > steps > 1:
        what = f"{config.checkpoint.every} is after the last of {steps} steps: what ends the run loses all of it"
        result.add("not-saved", what, "checkpoint.every", change=f"take {max(1, steps // 10)}")
    if not task.held_out:
        result.add("not-evaluated", "nothing is evaluated", "eval.limit")


def look_at_machine(result: Rehearsal, run: DryRun, *, here: bool) -> None:
    """Compares memory and disk with those of this machine, where the run will be `here` or there is an accelerator, or
    with the devices that were asked about."""
    there = machine.Memory.there(device_of(run.config.device), run.device_gib)
    devices = run.memory.devices(there.gpus or math.inf)
    result.facts["memory"] = {device.name: f"{device.peak / 2**30:.1f} GiB" for device in devices}
    if not (there.gpus or here):
        result.add("no-device", "no accelerator is here to compare memory with", "device")
        there = there._replace(total=math.inf, free=math.inf)
    for verdict in run.verdicts(there):
        if not verdict.fits:
            disk = verdict.line.startswith("disk")
            result.add("memory", verdict.line, "checkpoint.keep" if disk else key_of(verdict.line))


def look_at_time(
    result: Rehearsal,
    config: TrainConfig,
    sizes: tuple[int, int],
    prompts: Sequence[Prompt],
    seconds: tuple[float, float],
) -> None:
    """Plans the time of a step with whole completions, from what rewards took here (`seconds` of the slowest, and of
    all, for one of them) and from the `sizes` of the real model: all parameters, and those that a token uses."""
    rollout, completions = config.rollout, config.prompts_per_step * config.rollout.group_size
    tokens = completions * (rollout.max_completion_tokens + fmean(len(prompt.token_ids) for prompt in prompts))
    total, active = sizes
    forward, shards = 2 * active * tokens / FLOPS, -(-config.prompts_per_step // rollout.prompts_per_shard)
    reading = shards * rollout.max_completion_tokens * 2 * total / BYTES_S
    forwards = (4 if config.loss.beta > 0 else 3) * config.learner.updates_per_batch + 1
    times = {
        "sampling s": (forward + reading) / max(1, rollout.samplers),
        "learning s": forward * forwards / max(1, config.learner.workers),
        "rewards s": seconds[1] * completions,
    }
    step = sum(times.values())
    result.facts["time on H100s, of a step"] = {**times, "of the run h": step * config.steps / 3600}
    late = seconds[0] * min(BATCH, completions)
    if late > config.reward.timeout_s / 2:
        what = f"a batch takes {late:.1f} s of the {config.reward.timeout_s:g} s that it may take, and then runs again"
        result.add("slow-reward", what, "reward.timeout_s", change=f"take {math.ceil(4 * late)}")
    if times["rewards s"] > max(1.0, step / 2):
        what = f"rewards take {times['rewards s']:.1f} s of a step of about {step:.1f} s"
        result.add("slow-reward", what, "rewards", change="make them faster, such as by threads of their own")


# ---- texts ----------------------------------------------------------------------------------------------------------


def look_at_lengths(
    result: Rehearsal, config: TrainConfig, task: Task, tokenizer: PreTrainedTokenizerBase
) -> list[Prompt]:
    """Counts the tokens of prompts and gold solutions, against the limits of the run. Returns some prompts."""
    examples = task.train[:: max(1, len(task.train) // SAMPLED)]
    prompts = [task.prompt(example, tokenizer) for example in examples]
    lengths = [len(prompt.token_ids) for prompt in prompts]
    golds = sorted(len(tokenizer.encode(e.solution, add_special_tokens=False)) + 1 for e in examples)
    most, allowed = config.rollout.max_completion_tokens, config.rollout.vllm.engine.get("max_model_len")
    counts = {"prompts": lengths, "gold solutions": golds}
    result.facts["tokens"] = {name: f"{min(n)} to {max(n)}, median {median(n):g}" for name, n in counts.items()}
    result.facts["tokens"] |= {"completions at most": most}
    if cut := sum(length > most for length in golds):
        enough = 1 << (golds[int(0.99 * (len(golds) - 1))] - 1).bit_length()
        what = f"{cut} of {len(golds)} gold solutions have more than {most} tokens (the longest {golds[-1]})"
        many = cut > MANY * len(golds)
        how = {"severity": WARNING if many else NOTE, "change": f"raise it to {enough}"}
        result.add("gold-truncated", what, "rollout.max_completion_tokens", **how)
    if allowed and (longest := max(lengths) + most) > allowed:
        what = f"max_model_len={allowed} holds no prompt of {max(lengths)} tokens and a completion of {most}"
        result.add("context-too-short", what, "rollout.vllm.engine", change=f"raise it to {longest}")
    copies = len(task.train) - len(task.fingerprints(task.train))
    if copies:
        what = f"{copies} of {len(task.train)} problems are shown like another one"
        severity = WARNING if copies > MANY * len(task.train) else NOTE
        result.add("copies", what, "data.template", severity=severity)
    return prompts


def look_at_template(result: Rehearsal, config: TrainConfig, policy: Policy, prompts: Sequence[Prompt]) -> None:
    """Asks what `quartet check` asks of tokenizer and template, and reads the prompts as the policy gets them."""
    chat, tokenizer, shape = is_chat(config.data[0].template), policy.tokenizer, policy.config.get_text_config()
    result.facts["template"] = {}
    for row in examine_text(tokenizer, policy.stop_token_ids, getattr(shape, "vocab_size", None)):
        words = str(row.values.get(TRANSFORMERS, ""))
        result.facts["template"][row.name] = words
        finding, severity = row.finding, NOTE
        if "not in the embedding" in words or "Error" in words:
            severity = ERROR
        elif row.wrong and (row.name == "stop and pad" or (row.name == "template" and "turns" not in words)):
            severity = WARNING if chat or words == "no stop token" else NOTE
        of_turns = row.name == "template" and severity == NOTE and not config.has_tools and "encode" not in row.note
        if finding and not of_turns:
            key = "data.template" if row.name == "template" else "model"
            result.findings.append(replace(finding, severity=severity, where=(key,)))
    if config.has_tools and TOOL in dropping(tokenizer):
        what = f"the template drops what stood before {TOOL}, and the environment goes on with it"
        result.add("thoughts-dropped", what, "environment", severity=NOTE, change="let an agent call the tools")
    first, bos, template = prompts[0], tokenizer.bos_token_id, str(tokenizer.chat_template or "")
    if bos is not None and first.token_ids[:2] == [bos, bos]:
        what = f"every prompt begins twice with {tokenizer.bos_token!r}"
        result.add("begins-twice", what, "data.template")
    marks = [token for token in tokenizer.all_special_tokens if token in template]
    twice = sum(any(mark in str(prompt.columns.get("question")) for mark in marks) for prompt in prompts)
    most = config.rollout.max_completion_tokens
    if chat and twice:
        what = f"{twice} of {len(prompts)} questions hold marks of the chat template ({', '.join(marks[:3])}) already"
        result.add("template-twice", what, "data.prompt_column")
    if chat and "<think>" in template and "</think>" not in first.text[-40:] and most < THOUGHTS:
        what = f"the model thinks before it answers, and {most} tokens cut it before its answer"
        advice = f"raise it to {4 * THOUGHTS}, or set data.chat_template_kwargs: {{enable_thinking: false}}"
        result.add("thought-truncated", what, "rollout.max_completion_tokens", change=advice)
    if template and not chat:
        what = "the model has a chat template, and prompts are not written with it"
        result.add("template-not-used", what, "data.template")


def look_at_repetition(result: Rehearsal, config: TrainConfig, prompts: Sequence[Prompt]) -> None:
    """Finds a sentence that every prompt says twice, as where system prompt and data both have it."""
    for sentence in re.findall(r"[^.!?\n]{24,}[.!?]", prompts[0].text):
        if not config.data[0].few_shot and all(prompt.text.count(sentence) > 1 for prompt in prompts):
            result.add("said-twice", f"every prompt says twice {sentence.strip()!r}", "data.template")
            break


# ---- rewards --------------------------------------------------------------------------------------------------------


def try_forms(result: Rehearsal, task: Task, prompts: Sequence[Prompt], tokenizer: PreTrainedTokenizerBase) -> None:
    """Finds the form in which right answers score most, and compares it with wrong ones and with nothing at all. A form
    that the model's chat template has needs no prompt that asks for it."""
    whole = [example.solution for example in task.train[:TRIED]]
    answers = [solution.rpartition("####")[2].strip() for solution in whole]
    others = [misprint(answer) or next((other for other in answers if other != answer), "") for answer in answers]
    score = mean_score(task, tokenizer, task.train[:TRIED])
    right = {name: score([form.format(answer) for answer in answers]) for name, form in FORMS.items()}
    right["as it is"] = score(whole)
    name = max(FORMS, key=lambda name: right[name])  # the first of equals
    best, wrong, empty = right[name], score([FORMS[name].format(other) for other in others]), score([""] * len(answers))
    result.facts["scores"] = {"right": best, "wrong": wrong, "empty": empty, "written": name}
    if best <= max(wrong, empty):
        what = f"a right answer scores {best:.3g} in the best of {len(FORMS)} forms"
        what += f", a wrong one {wrong:.3g}, an empty one {empty:.3g}"
        result.add("reward-constant", what, "rewards")
        return
    texts = [str(tokenizer.chat_template), *(prompt.text for prompt in prompts)]
    asked = [mark for mark in re.split(", ", name.strip("\\")) if not any(mark in text for text in texts)]
    if wrong > 0.8 * best > 0:
        what = f"a wrong answer in the right form scores {wrong:.3g}, a right one {best:.3g}"
        result.add("form-rewarded", what, "rewards", change="give the rewards of form less weight")
    elif name != "as it is" and asked and best > 1.2 * right["as it is"]:
        what = f"right answers score {best:.3g} with {name} and {right['as it is']:.3g} as the data have them, and no "
        what += f"prompt asks for {' and '.join(asked)}"
        severity = NOTE if asked == ["boxed"] else WARNING  # which models of mathematics write unasked
        result.add("form-not-asked", what, "data.template", severity=severity)
    if "<think>" in name and prompts[0].text.rstrip().endswith("<think>"):
        without = score([FORMS[name].format(answer).removeprefix("<think>") for answer in answers])
        if without < best:
            what = f"prompts end with <think>, which completions then lack: they score {without:.3g}, with it "
            change = "let the reward do without <think>"
            result.add("form-not-asked", f"{what}{best:.3g}", "rewards", change=change)


def mean_score(
    task: Task, tokenizer: PreTrainedTokenizerBase, examples: Sequence[Example]
) -> Callable[[Sequence[str]], float]:
    """Gives the mean score of a text for each of these examples, by all rewards of the run with their weights."""
    prompts = [task.prompt(example, tokenizer) for example in examples]

    def score(texts: Sequence[str]) -> float:
        groups = []
        for prompt, text in zip(prompts, texts, strict=True):
            token_ids = tokenizer.encode(text, add_special_tokens=False)
            groups.append(RolloutGroup(prompt, [Completion(token_ids, [], text, "stop", 0)]))
        marks = [group.rewards[0] for group in task.score(groups)]
        return fmean([mark for mark in marks if mark is not None] or [0.0])

    return score


def sources_of(config: TrainConfig, task: Task) -> Iterator[tuple[TrainConfig, Task]]:
    """The configuration and the task of each source of data, or those of the run where there is one."""
    if len(config.data) == 1:
        yield config, task
        return
    from grpo.task.mix import options_of_source

    for source in config.data:
        yield cast(TrainConfig, options_of_source(config, source)), task.parts[str(source.label)]


def try_functions(result: Rehearsal, config: TrainConfig, task: Task) -> tuple[float, float]:
    """Tries each function as `quartet reward test` does. Returns the seconds for a completion of the slowest, and of
    all."""
    seconds, as_it_is = list[float](), result.facts.get("scores", {}).get("written") == "as it is"
    data = {name: getattr(config.data[0], name) for name in RewardTestConfig().data.model_dump()} | {"limit": TRIED}
    scoring = {name: getattr(config.reward, name) for name in ("timeout_s", "pass_variables")}
    scoring["on_error"] = "abort" if config.reward.on_error == "abort" else "drop_sample"
    for i, (reward, spec) in enumerate(zip(config.rewards, reward_specs(config.rewards), strict=True)):
        label = spec.label
        if reward.function in OF_OTHERS or task.models or label not in task.reward_weights:
            continue
        key, declared = f"rewards[{i}].function", task.scorer.right_at(label)
        options: dict[str, Any] = {name: getattr(reward, name) for name in ("arguments",)}
        options |= {"data": data, "reward": scoring, "shaping": declared is None or i > 0 or not as_it_is}
        try:
            check = check_reward(reward.function, RewardTestConfig(**options))
        except REFUSALS as error:
            result.add("reward-fails", str(error), key)
            continue
        seconds.append(1 / check.completions_per_second)
        result.facts[f"reward {label}"] = {kind.kind: kind.mean for kind in check.kinds if kind.count}
        if as_it_is and tied([kind.mean for kind in check.kinds]):
            check.add("reward-constant", "all kinds of completions score the same, and a constant teaches nothing")
        result.findings += [replace(finding, where=(key,)) for finding in check.findings]
    return max(seconds, default=0.0), sum(seconds)


def try_tools(result: Rehearsal, task: Task) -> None:
    """Calls each tool with words of the data and with small numbers, in the environment of the first example."""
    spec, first = task.actor.environment, task.train[0]
    if spec is None:
        return
    from rollout.environments.format import schema_of
    from rollout.environments.protocol import chosen, columns_of, open_workers, run, tools_of

    facts: dict[str, Any] = {}
    name = chosen(spec, first.columns)
    values: dict[str, tuple[Any, ...]] = {
        "string": (first.question, first.solution, "1 + 1"),
        "boolean": (True, False),
        "array": ([],),
    }
    begin = {"environment": name, "columns": columns_of(spec, first.columns), "seeds": [0, 0], "history": []}
    with closing(open_workers(spec)) as pool:
        for tool in tools_of(spec, name):
            takes = schema_of(tool)["function"]["parameters"].get("properties", {})
            choices = [entry.get("enum") or values.get(str(entry.get("type")), (0, 1, 7)) for entry in takes.values()]
            calls = [[tool.__name__, {p: c[i % len(c)] for p, c in zip(takes, choices, strict=True)}] for i in range(3)]
            request = begin | {"episode": f"rehearsal/{tool.__name__}", "calls": calls, "turns": [], "ends": False}
            started = time.perf_counter()
            [reply] = run(pool, [request])
            raised = [text for text, failed in reply.get("results", []) if failed]
            facts[tool.__name__] = f"raised {len(raised)} of 3, {(time.perf_counter() - started) / 3:.3f} s a call"
            if "kind" in reply:
                result.add("tool-fails", f"{tool.__name__}: {reply['kind']}: {reply['message']}", "tools")
            elif len(raised) == len(calls):
                what = f"{tool.__name__} raised at every one of {len(calls)} calls: {raised[0][:200]}"
                change = "call it by hand, unless it knows none of these values"
                result.add("tool-fails", what, "tools", severity=NOTE, change=change)
    result.facts["tools"] = facts
