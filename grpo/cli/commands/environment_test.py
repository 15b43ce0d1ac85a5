"""Does an environment do what it should? Scripted episodes are played in it, without a model."""

from __future__ import annotations

import contextlib
import io
import json
import math
import os
import re
from collections import Counter
from collections.abc import Sequence
from dataclasses import dataclass, field
from itertools import chain, repeat, zip_longest
from typing import TYPE_CHECKING, Any, NamedTuple
from unittest.mock import patch

import psutil

from grpo.cli.config.environment_test import EnvironmentTestConfig
from grpo.run.metrics import mean_of
from policies.presets import small_tokenizer
from rewards.data.examples import Example, load_examples
from rewards.finding import Report
from rewards.isolation.environments import load_class, load_function
from rewards.kinds import ERROR, NOTE
from rewards.protocol import RewardError
from rollout.environments.episodes import Arena, Episodes
from rollout.environments.format import BadCall, Turn, TurnFormat
from rollout.environments.protocol import BUILT_IN, MCP, path_of, tools_of
from rollout.group import Completion, Prompt, RolloutGroup, ToolStats
from rollout.sampling import EnvironmentSpec, SamplingParams

if TYPE_CHECKING:
    from transformers import PreTrainedTokenizerBase

LONG = 10_000  # characters of a long argument
GOLD, AFTER_BAD_CALLS, EMPTY, BAD = "demonstration", "after bad calls", "empty turn", "bad calls"
ODD, LONG_TEXTS, ENDLESS = "odd values", "long texts", "endless calls"
BAD_CALLS = ('{"name": "no_such_tool", "arguments": {}}', '{"name": "unread', "<<1 + 1")
VALUES: dict[str, list[Any]] = {
    "string": ["", "\u0000", "\u05d0\U0001f642 <<1=", "-1"],
    "integer": [0, -1, 10**18, 7],
    "number": [0.0, -1.5, 1e300, 7.0],
    "boolean": [False, True],
    "array": [[]],
    "object": [{}],
}
MOST_TOKENS = 1 << 20
MANY, GROWTH_MIB = 200, 32  # after so many episodes the process may be so much larger


class Play(NamedTuple):
    """One script for the environment of one row. After its `turns` it says nothing, or the same again."""

    example: Example
    turns: Sequence[str]
    endless: bool = False


class Outcome(NamedTuple):
    """One episode: its messages, why it ended, and what its tools did."""

    example_id: str
    turns: list[dict[str, Any]]
    ended: str
    tools: ToolStats

    @property
    def failure(self) -> str | None:
        reward, failure = self.tools.reward, self.tools.failure
        if failure:
            return f"{failure['kind']}: {failure['message']}"
        return None if reward is None or math.isfinite(reward) else f"get_reward gives {reward}"


@dataclass(kw_only=True)
class EnvironmentCheck(Report):
    """What `check_environment` found. `scripts` counts what became of the episodes of each script: calls at which the
    tool `raised`, calls that were `refused`, why they `ended`. `differing` counts the episodes that went another way
    when they were played again. `growth_mib` is the process's."""

    tools: list[str]
    max_score: float = 1.0
    scripts: dict[str, dict[str, Any]] = field(default_factory=dict)
    differing: dict[str, int] = field(default_factory=dict)
    growth_mib: float | None = None
    printed: str = ""


class ScriptForm(TurnFormat):
    """Reads the turns of a script: a call is a JSON object, or has the marks of GSM8K's solutions."""

    def read(self, token_ids: Sequence[int]) -> Turn:
        text = str(self._tokenizer.decode(token_ids[:-1]))
        if not text.startswith("{"):
            return super().read(token_ids)
        try:
            call = json.loads(text)
            return Turn("", (self.checked(call["name"], call["arguments"]),))
        except BadCall as error:
            return Turn(text, error=str(error))
        except ValueError as error:
            return Turn(text, error=f"This call cannot be read: {error}.")


class Stage:
    """Plays scripts in an environment that has a process of its own. `hash_seed` orders the sets in there."""

    def __init__(self, spec: EnvironmentSpec, tokenizer: PreTrainedTokenizerBase, hash_seed: int = 0) -> None:
        with patch.dict(os.environ, PYTHONHASHSEED=str(hash_seed)):
            self.arena = Arena(spec, tokenizer, [tokenizer.eos_token_id])
        self.form = self.arena.formats[""] = ScriptForm(tokenizer, tools_of(spec, ""), plain=True)

    def memory_mib(self) -> float:
        """Sums up the memory of the environment's processes and of those that they started."""
        total = 0
        for pid in self.arena.pool.pids:
            with contextlib.suppress(psutil.NoSuchProcess):  # one of them has just ended
                own = psutil.Process(pid)
                total += sum(each.memory_info().rss for each in (own, *own.children(recursive=True)))
        return total / 2**20

    def play(self, plays: Sequence[Play], *, anew: bool = False) -> list[Outcome]:
        """Two episodes of each script, which are of different rows. All episodes take turns. `anew` makes the
        environment again before each turn, from its calls so far."""
        encode, stop = self.arena.tokenizer.encode, self.arena.tokenizer.eos_token_id
        params = SamplingParams(group_size=2, max_completion_tokens=MOST_TOKENS, environment=self.arena.spec)
        rows = [play.example for play in plays]
        episodes = Episodes(self.arena, params)
        begun = episodes.begin_episodes(
            [Prompt(e.example_id, f"{e.question}\n", [0], e.columns, e.messages) for e in rows]
        )
        first = {i: prompt.messages or [] for i, prompt in enumerate(begun) if isinstance(prompt, Prompt)}
        episodes.keep_prompts([i in first for i in range(len(rows))])
        own = [plays[episode.number] for episode in episodes.episodes]
        scripts = [chain(play.turns, repeat(play.turns[-1] if play.endless else "")) for play in own]
        completions = [Completion([], [], "", "stop", 0) for _ in scripts]
        active = list(range(len(scripts)))
        while active:
            for i in active:
                completions[i].token_ids += [*encode(next(scripts[i])), stop]
                episodes.episodes[i].request["episode"] += "'" * anew
            waits = episodes.ask({i: completions[i].token_ids for i in active})
            written = episodes.written()
            active = [i for i, waiting in zip(active, waits, strict=True) if waiting and written[i] is not None]
            for i in active:
                completions[i].token_ids += written[i] or []
        episodes.finish([RolloutGroup(Prompt("", "", []), completions)])
        outcomes = [
            Outcome(rows[e.number].example_id, [*first[e.number], *c.turns], c.finish_reason, c.tools or ToolStats())
            for e, c in zip(episodes.episodes, completions, strict=True)
        ]
        for row, fault in zip(rows, begun, strict=True):
            if isinstance(fault, str):
                tools = ToolStats(failure={"kind": "reset", "message": fault})
                outcomes.append(Outcome(row.example_id, [], "reset", tools))
        return outcomes


def check_environment(environment: str, config: EnvironmentTestConfig) -> EnvironmentCheck:
    """Tries `environment` (a built-in name, `path/to/file.py:Class`, `mcp:SERVER`, or the function of a tool) on the
    data of `config`. Raises RewardError or ValueError for one that cannot be loaded."""
    spec = EnvironmentSpec(
        **_is_of(environment),
        max_turns=config.max_turns,
        timeout_s=config.program_timeout_s,
        memory_mb=config.program_memory_mb,
    )
    data = config.data
    examples = load_examples(data.name, data.split, data, purpose="eval", limit=data.limit)
    tokenizer = small_tokenizer(f"{example.question}\n{example.solution}" for example in examples)
    tools = [tool.__name__ for tool in tools_of(spec, "")]
    title = f"environment {environment}, on {len(examples)} rows of {data.name}; tools: {', '.join(tools)}"
    check, printed = EnvironmentCheck(title, tools=tools), io.StringIO()
    stage = Stage(spec, tokenizer)
    with contextlib.redirect_stderr(printed), contextlib.closing(stage.arena):
        trial = _Trial(check, _plays(spec, stage.form, examples, data.solution_column))
        if trial.play_all(stage):
            trial.play_again(stage, Stage(spec, tokenizer, hash_seed=1))
            trial.play_often(stage)
    check.printed = printed.getvalue()
    trial.judge(config.max_score)
    return check


class _Trial:
    """Plays the scripts of all rows, and tells the `check` what became of them."""

    def __init__(self, check: EnvironmentCheck, plays: dict[str, list[Play]]) -> None:
        self.check, self.plays, self.outcomes = check, plays, dict[str, list[Outcome]]()

    def play_all(self, stage: Stage) -> bool:
        """Plays the scripts of the first row, then those of all rows. Stops at an episode that fails, since what hangs
        once would hang again and again, and returns whether there was none."""
        for rows in (1, None):
            for script, plays in self.plays.items():
                self.outcomes[script] = stage.play(plays[:rows])
                if any(outcome.failure for outcome in self.outcomes[script]):
                    self.check.facts["left out"] = "other scripts and rows, after a failure"
                    return False
        return True

    def play_again(self, stage: Stage, other: Stage) -> None:
        """Compares the same episodes, played in other ways."""
        with contextlib.closing(other.arena):
            for script, plays in self.plays.items():
                alone = [stage.play([play]) for play in reversed(plays)]
                self._compare("one after the other", script, list(chain.from_iterable(reversed(alone))))
                self._compare("made anew for each turn", script, stage.play(plays, anew=True))
                self._compare("in another process with another hash seed", script, other.play(plays))

    def _compare(self, way: str, script: str, again: Sequence[Outcome]) -> None:
        pairs = zip(self.outcomes[script], again, strict=True)
        different = [(before, after) for before, after in pairs if before != after]
        if different and not self.check.differing.get(way):
            before, after = different[0]
            parts = zip_longest([*before.turns, before.tools], [*after.turns, after.tools], fillvalue="nothing")
            one, other = next((pair for pair in parts if pair[0] != pair[1]), (before.ended, after.ended))
            what = f"an episode goes another way {way}: {script}: {one!s:.200}, now {other!s:.200}"
            self.check.add("nondeterministic", what, before.example_id)
        self.check.differing[way] = self.check.differing.get(way, 0) + len(different)

    def play_often(self, stage: Stage) -> None:
        """Looks for what stays in memory of episodes that have ended."""
        before, played = stage.memory_mib(), 0
        while played < MANY:
            played += sum(len(stage.play(plays)) for plays in self.plays.values())
        self.check.growth_mib = stage.memory_mib() - before
        if self.check.growth_mib > GROWTH_MIB:
            self.check.add("memory-leak", f"its process grew by {self.check.growth_mib:,.0f} MiB in {played} episodes")

    def judge(self, max_score: float | None) -> None:
        """Compares what each kind of script got with what it should get."""
        check, rewards = self.check, {script: [o.tools.reward for o in all_] for script, all_ in self.outcomes.items()}
        gold = rewards.get(GOLD, [])
        highest = max((reward for reward in gold if reward is not None), default=1.0)
        check.max_score = max(1.0, highest) if max_score is None else max_score
        full = {script: sum((reward or 0.0) >= check.max_score for reward in all_) for script, all_ in rewards.items()}
        for script, outcomes in self.outcomes.items():
            check.scripts[script] = _counts(outcomes) | {"full": full[script]}
            of_all = f"of {len(outcomes)} episodes"
            if failed := [outcome for outcome in outcomes if outcome.failure]:
                what = f"{script}: {len(failed)} {of_all} fail: {failed[0].failure}"
                check.add("environment-fails", what, [outcome.example_id for outcome in failed])
            if full[script] and script not in (GOLD, AFTER_BAD_CALLS):
                kind = "wrong-accepted" if script in (EMPTY, BAD) else "odd-accepted"
                check.add(kind, f"{script}: {full[script]} {of_all} get full marks")
        if not gold:
            check.add("not-shown", "the class has no _demonstration, and solutions have no marks such as <<48/2=24>>")
        elif all(reward is None for reward in gold):
            check.add("no-reward", "get_reward gives no number")
        elif full[GOLD] < len(gold):
            what = f"{GOLD}: {len(gold) - full[GOLD]} of {len(gold)} episodes miss full marks"
            check.add("gold-refused", what, severity=NOTE if full[GOLD] else ERROR)
        if rewards.get(AFTER_BAD_CALLS, gold) != gold:
            check.add("bad-calls-scored", f"{AFTER_BAD_CALLS}: the rewards are not those of the demonstration alone")
        if check.printed:
            check.add("prints", f"it prints: {check.printed.strip()[:200]!r}", severity=NOTE)
        self.tell()

    def tell(self) -> None:
        """Says what was played, in facts and a table."""
        check = self.check
        for way, count in check.differing.items():
            check.facts[f"played {way}"] = f"{count} differ" if count else "the same"
        if check.growth_mib is not None:
            check.facts["memory"] = f"{check.growth_mib:+,.1f} MiB in {MANY} episodes"
        ended = {
            script: ", ".join(f"{count} {why}" for why, count in row["ended"].items())
            for script, row in check.scripts.items()
        }
        rows = [{"script": script} | row | {"ended": ended[script]} for script, row in check.scripts.items()]
        check.tables["scripts"] = rows


def _is_of(environment: str) -> dict[str, Any]:
    """What is tried: the environment of this name or class, or the tool of this function."""
    if environment not in BUILT_IN and not environment.startswith(MCP):
        try:
            load_class(environment, "environment")
        except RewardError as error:
            with contextlib.suppress(RewardError):
                load_function(environment, "tools")
                return {"tools": (environment,)}
            raise error
    return {"environments": (("", environment),)}


def _plays(
    spec: EnvironmentSpec, form: ScriptForm, examples: Sequence[Example], solution_column: str | None
) -> dict[str, list[Play]]:
    """The plays of each kind of script, one for each row."""
    odd, long = _calls(form, VALUES), _calls(form, VALUES | {"string": ["word " * (LONG // 5)]})
    bad = [_call(form.schemas[0]["function"]["name"], {"no such argument": 1}), *BAD_CALLS]
    shown = [(example, _demonstration(spec, example, solution_column)) for example in examples]
    gold = [Play(example, turns) for example, turns in shown if turns]
    room = spec.max_turns - max((len(play.turns) for play in gold), default=0)
    plays = {GOLD: gold, AFTER_BAD_CALLS: [Play(p.example, [*bad[: max(room, 0)], *p.turns]) for p in gold]}
    scripts = {EMPTY: [""], BAD: bad, ODD: odd, LONG_TEXTS: long}
    plays |= {script: [Play(example, turns) for example in examples] for script, turns in scripts.items()}
    plays[ENDLESS] = [Play(example, odd[-1:], endless=True) for example in examples]
    return {script: several for script, several in plays.items() if several}


def _demonstration(spec: EnvironmentSpec, example: Example, solution_column: str | None) -> list[str]:
    """The turns that the class offers for this row, or those of the marks in its solution; there may be none."""
    offer = getattr(load_class(path_of(spec, ""), "environment"), "_demonstration", None) if spec.environments else None
    if offer is not None:
        try:
            return [_call(tool, arguments) for tool, arguments in offer(**example.columns)]
        except Exception as error:  # it is the user's
            raise ValueError(
                f"_demonstration fails on {example.example_id}: {type(error).__name__}: {error}; it gets the "
                'columns of the row, and gives calls such as [("guess", {"number": 7})]'
            ) from error
    text = str(example.columns.get(solution_column or "", ""))
    pieces = re.split(r"(<<[^<>\n]*=)[^<>\n]*>>", text)  # text and mark in turns
    turns = [before + mark for before, mark in zip_longest(pieces[::2], pieces[1::2], fillvalue="")]
    return turns if len(turns) > 1 else []


def _calls(form: ScriptForm, values: dict[str, list[Any]]) -> list[str]:
    """Calls of each tool, in which each argument has one value of its type after the other."""
    calls = []
    for schema in form.schemas:
        parameters = schema["function"]["parameters"]["properties"]
        choices = {name: values.get(str(parameter.get("type")), [None]) for name, parameter in parameters.items()}
        for i in range(max(map(len, choices.values()), default=1)):
            arguments = {name: several[i % len(several)] for name, several in choices.items()}
            calls.append(_call(schema["function"]["name"], arguments))
    return calls


def _call(tool: str, arguments: dict[str, Any]) -> str:
    return json.dumps({"name": tool, "arguments": arguments})


def _counts(outcomes: Sequence[Outcome]) -> dict[str, Any]:
    tools = [outcome.tools for outcome in outcomes]
    return {
        "episodes": len(outcomes),
        "mean": mean_of(each.reward for each in tools if each.reward is not None and math.isfinite(each.reward)),
        "calls": sum(each.calls for each in tools),
        "raised": sum(each.errors for each in tools),
        "refused": sum(each.bad_calls for each in tools),
        "ended": dict(Counter(outcome.ended for outcome in outcomes)),
    }
