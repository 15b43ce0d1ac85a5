"""What the gain of a run means: is it there on problems that were never trained on, and does GRPO account for it?"""

from __future__ import annotations

import math
from collections.abc import Mapping
from pathlib import Path
from typing import Any

from review.readers.gains import Gains, options_of_run
from review.readers.run_folder import read_metrics
from rewards.finding import Finding, found


def evaluation(gains: Gains) -> Finding | None:
    """The training reward rose, and the held-out problems are too few to show such a gain."""
    if not gains.are_apart or not gains.are_too_few or gains.held_out is None:
        return None
    what = f"{gains.words} So few problems cannot show a gain as large as that in training."
    needed = gains.problems_needed
    seeds = math.ceil(needed / gains.held_out.count)
    change = f"raise {gains.option('eval.limit')} to {needed}, or take {seeds} seeds"
    return found("evaluation", what, change=change)


def training_only(gains: Gains) -> Finding | None:
    """The training reward rose, and the held-out problems would show such a gain."""
    if not gains.are_apart or gains.are_too_few or gains.held_out is None:
        return None
    shown = "Held-out problems got worse." if gains.held_out.high < 0 else "No gain on held-out problems is shown."
    return found("training-only", f"{gains.words} {shown}")


def rate_decay(gains: Gains) -> Finding | None:
    """The policy gained while its learning rate decayed for the first time. Weights that were trained at a constant
    rate hold noise, which any training with a decaying rate takes out, supervised steps too."""
    gain = gains.held_out or gains.training
    start, change = _constant_start(gains.options)
    schedule = gains.options.get("learner.schedule") or "constant"
    if not start or schedule == "constant" or gain is None or gain.value <= 0:
        return None
    what = f"{gains.words} GRPO starts from {start}, and learner.schedule={schedule} is the first decay of the rate. "
    what += "The decay alone may account for the gain: it takes noise out of the weights, without any reward."
    return found("rate-decay", what, change=f"{change}, and run again: a gain from there is not from the decay")


def decays_first(warm_steps: int, warm_schedule: str, schedule: str) -> bool:
    """Whether the learning rate is constant in the SFT stage and decays in GRPO."""
    return warm_steps > 0 and warm_schedule == "constant" and schedule != "constant"


def _constant_start(options: Mapping[str, Any]) -> tuple[str, str]:
    """The supervised steps at a constant rate from which GRPO starts, and what to set instead; "" without any."""
    steps, rate = options.get("sft.steps") or 0, options.get("sft.learning_rate")
    if steps:
        if options.get("sft.schedule") != "constant":
            return "", ""
        return f"an SFT stage of {steps} steps at the constant rate {rate}", "set sft.schedule: linear"
    model = Path(str(options.get("model")))
    for folder in (model, model.parent):
        if not (folder / "config.yaml").is_file():
            continue
        command, of_model = options_of_run(folder)
        if command == "sft" and of_model.get("learner.schedule") == "constant":
            change = f"train {folder} again with quartet sft --learner.schedule linear"
            rate = of_model.get("learner.learning_rate")
            return f"{folder}, which quartet sft trained at the constant rate {rate}", change
        return "", ""
    return "", ""


def of_run(gains: Gains) -> list[Finding]:
    """What a run's gain means, or nothing."""
    return [finding for finding in (evaluation(gains), training_only(gains), rate_decay(gains)) if finding]


def told(folder: Path) -> list[str]:
    """What the end of a run says of its gain: a line for each cause, and one for what to change. Empty for runs of
    other commands. The run has ended well, so that a damaged record is told and no error."""
    if not (folder / "metrics.jsonl").is_file():
        return []
    try:
        command, options = options_of_run(folder)
        gains = Gains.of(folder, options, read_metrics(folder))
    except ValueError as fault:
        return [f"what the run has gained is not known: {fault}"]
    findings = of_run(gains) if command == "train" else []
    return [line for finding in findings for line in (finding.evidence, f"  what may help: {finding.change}")]
