"""One run folder as its page shows it: dictionaries made of what the run has written. Nothing in it is changed."""

from __future__ import annotations

import math
from collections.abc import Mapping
from contextlib import suppress
from dataclasses import asdict, fields
from pathlib import Path
from typing import TYPE_CHECKING, Any

from review.page.headline import control_sentences, headline
from review.page.tokens import find_tokenizer, token_texts
from review.readers.control_result import read_control
from review.readers.machine import caption, read_machine
from review.readers.plain_files import check_files, has_prompt, read_step
from review.readers.run_folder import ENVIRONMENT, TURNS, check_run, meaning, read_events, read_metrics
from review.statistics.estimates import wilson_interval
from rewards.group_score import RewardFailure
from rewards.records import recorded_steps, rollout_path, split_groups
from rewards.ties import tied
from rewards.verdicts import ACCURACY, judged_problems

if TYPE_CHECKING:
    from tokenizers import Tokenizer

FAILURE = [field.name for field in fields(RewardFailure)]
PLACES_AT_MOST = 200  # steps of a prompt; to parse their records takes seconds
ACCURACIES = (ACCURACY, f"{ACCURACY}_greedy")


class RunFiles:
    """Reads a run that may still be running. Raises ValueError for a folder that is none.

    >>> RunFiles(Path("runs/demo")).step(3)["groups"][0]["rewards"]
    [1.0, 0.0, 1.0, 1.0, 0.0, 0.0, 1.0, 1.0]
    """

    def __init__(self, folder: Path) -> None:
        self.folder, self.name = check_run(folder), folder.resolve().name
        self._tokenizer: Tokenizer | None = None
        self._step: tuple[int, float, list[list[dict[str, Any]]]] | None = None

    def overview(self, after: int = -1) -> dict[str, Any]:
        """Returns metrics of the steps from `after` on, their meaning, the machine, the steps with recorded
        rollouts, and the controls of `quartet control` if it has been run."""
        options, machine = self.folder / "config.yaml", self.folder / ENVIRONMENT
        check_files(self.folder / "metrics.jsonl", options, machine)
        measured = read_metrics(self.folder)
        control = read_control(self.folder)
        rows = [self._with_interval(row) for row in measured if row["step"] >= after]
        names = sorted({name for row in rows for name in row} - {"step"})
        return {
            "name": self.name,
            "headline": headline(measured) + (control_sentences(control) if control else []),
            "control": asdict(control) if control else None,
            "rows": rows,
            "meanings": {name: meaning(name.removesuffix("/low").removesuffix("/high")) for name in names},
            "recorded": recorded_steps(self.folder),
            "config": options.read_text(encoding="utf-8", errors="replace") if options.is_file() else "",
            "machine": caption(read_machine(machine)) if machine.is_file() else "",
            "ended": next((e for e in reversed(self.events()) if e["event"] in TURNS), None),
        }

    def events(self) -> list[dict[str, Any]]:
        check_files(self.folder / "events.jsonl")
        return read_events(self.folder)

    def step(self, step: int) -> dict[str, Any]:
        """Returns the groups of a step, each in a few numbers. Raises FileNotFoundError without a record."""
        groups = [
            {
                "prompt_id": lines[0]["prompt_id"],
                "prompt": lines[0]["prompt"],
                "rewards": [line.get("reward") for line in lines],
                "advantages": [line.get("advantage") for line in lines],
                "lengths": [len(line["token_ids"]) for line in lines],
                "reasons": [line.get("finish_reason") for line in lines],
                "parts": {name: [line["parts"].get(name) for line in lines] for name in lines[0]["parts"]},
                "tied": tied([line.get("reward") for line in lines]),
            }
            for lines in self._groups(step)
        ]
        events = [event for event in self.events() if event.get("step") == step and "evaluation" not in event]
        failures = [
            event | {"error": event.get("error") or str(RewardFailure(*(event.get(name, 0) for name in FAILURE)))}
            for event in events
            if "error" in event or event["event"] == "reward_error"
        ]
        return {"step": step, "groups": groups, "failures": failures}

    def group(self, step: int, number: int) -> dict[str, Any]:
        """Returns a group with every token: its text and its record. Raises IndexError where there is none."""
        groups = self._groups(step)
        if not 0 <= number < len(groups):
            raise IndexError(f"step {step} has groups 0 to {len(groups) - 1}, and none with the number {number}")
        lines = groups[number]
        return {
            "step": step,
            "number": number,
            "groups": len(groups),
            "prompt_id": lines[0]["prompt_id"],
            "prompt": lines[0]["prompt"],
            "completions": [self._completion(line) for line in lines],
        }

    def places(self, prompt_id: str) -> list[dict[str, int]]:
        """Returns the step and the number of the group wherever this prompt was drawn, ascending, of the newest
        PLACES_AT_MOST steps with it. A record that cannot be read is left out."""
        places: list[dict[str, int]] = []
        steps = 0
        for step in reversed(recorded_steps(self.folder)):
            with suppress(OSError, ValueError):
                if not has_prompt(self.folder, step, prompt_id):
                    continue
                groups = enumerate(split_groups(read_step(self.folder, step)))
                places += [{"step": step, "number": i} for i, lines in groups if lines[0]["prompt_id"] == prompt_id]
                steps += 1
            if steps == PLACES_AT_MOST:
                break
        return sorted(places, key=lambda place: (place["step"], place["number"]))

    def _completion(self, line: Mapping[str, Any]) -> dict[str, Any]:
        plain = ("sample", "text", "reward", "parts", "extras", "advantage", "finish_reason", "policy_version", "turns")
        draft, token_ids = line.get("draft"), line["token_ids"]
        by_token = {name: line.get(name) for name in ("logprobs", "policy_logprobs", "sampled", "versions")}
        by_token["depths"] = draft.get("depths") if isinstance(draft, dict) else None
        for name, values in by_token.items():
            by_token[name] = values if isinstance(values, list) and len(values) == len(token_ids) else None
        if self._tokenizer is None:
            self._tokenizer = find_tokenizer(self.folder)
        content = {name: line.get(name) for name in plain} | by_token
        return content | {"tokens": token_texts(self._tokenizer, token_ids)}

    def _groups(self, step: int) -> list[list[dict[str, Any]]]:
        """Returns the lines of a step, group by group. The last step that was asked for is kept."""
        path = rollout_path(self.folder, step)
        changed = path.stat().st_mtime if path.exists() else 0.0
        known = self._step  # once: another thread may be asked for another step
        if known is None or known[:2] != (step, changed):
            self._step = known = step, changed, split_groups(read_step(self.folder, step))
        return known[2]

    def _with_interval(self, row: dict[str, Any]) -> dict[str, Any]:
        """Add the 95 % intervals of the accuracies of this step."""
        count = judged_problems(row)
        for name in ACCURACIES:
            if (value := row.get(name)) is not None and count:
                row[f"{name}/low"], row[f"{name}/high"] = wilson_interval(value * count, count)
        return row


def finite(value: Any) -> Any:
    """Numbers that JSON does not know, which a damaged record may hold, become null."""
    if isinstance(value, float):
        return value if math.isfinite(value) else None
    if isinstance(value, dict):
        return {key: finite(part) for key, part in value.items()}
    return [finite(part) for part in value] if isinstance(value, list | tuple) else value
