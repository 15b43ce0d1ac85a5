"""One reward for both sides, which takes a wrong turn in the step that the file `mistake` names, such as `hang 5`.

It writes down how many steps were done whenever it is called, so that what a run lost can be counted.
"""

import time
from pathlib import Path


def reward(completions, trainer_state, **columns):
    with open("steps.log", "a") as log:
        log.write(f"{trainer_state.global_step}\n")
    mistake = Path("mistake")
    kind, at = mistake.read_text().split() if mistake.exists() else ("none", "-1")
    if trainer_state.global_step == int(at):
        if kind == "nan":
            return [float("nan")] * len(completions)
        if kind in ("hang", "wait"):
            Path("reached").touch()
            while kind == "hang" or not Path("go").exists():
                time.sleep(0.1)
    return [len(str(completion)) % 7 / 7 for completion in completions]


def needs_a_label(completions, label, **columns):
    return [float(len(str(completion)) > len(gold)) for completion, gold in zip(completions, label, strict=True)]
