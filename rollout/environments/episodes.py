"""The episodes of a shard: what each turn said, which tools it called, and which tokens they wrote."""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from concurrent.futures import Future, ThreadPoolExecutor, wait
from dataclasses import dataclass, field, replace
from typing import Any

from transformers import PreTrainedTokenizerBase

from rewards.episode import ToolStats
from rewards.isolation.pool import WorkerPool
from rollout.environments.format import Turn, TurnFormat
from rollout.environments.protocol import chosen, columns_of, open_workers, run, seeds, tools_of
from rollout.group import FinishReason, Prompt, RolloutGroup
from rollout.sampling import EnvironmentSpec, SamplingParams

POLL_S = 0.2
CHARACTERS_PER_TOKEN = 64  # no text comes near this as a mean


def first_messages(prompt: Prompt, observation: str | None) -> list[dict[str, Any]]:
    """The messages of a prompt, with what `reset` said at the end of the last one. A text is the user's message.

    >>> first_messages(Prompt("a", "2 + 3 = ?\\n", [5]), " Use the tool.")
    [{'role': 'user', 'content': '2 + 3 = ? Use the tool.'}]
    """
    text = prompt.text.removesuffix("\n")  # the form ends a message itself
    messages = [dict(message) for message in prompt.messages or [{"role": "user", "content": text}]]
    messages[-1]["content"] += observation or ""
    return messages


class Arena:
    """What the episodes of all shards share: the processes of the tools, and the form of turns."""

    def __init__(self, spec: EnvironmentSpec, tokenizer: PreTrainedTokenizerBase, stops: Sequence[int]) -> None:
        names = [name for name, _ in spec.environments] or [""]
        self.spec, self.tokenizer, self.stops = spec, tokenizer, tuple(stops)
        self.formats = {name: TurnFormat(tokenizer, tools_of(spec, name), stop_token_ids=stops) for name in names}
        self.pool: WorkerPool = open_workers(spec)
        self.thread = ThreadPoolExecutor(1, "tools")

    def ask(self, requests: Sequence[dict[str, Any]]) -> Future[list[dict[str, Any]]]:
        return self.thread.submit(run, self.pool, requests)

    def close(self) -> None:
        self.pool.close()
        self.thread.shutdown()


@dataclass
class Episode:
    """One rollout: what its environment was asked, and what has become of it. `prompt` is as the data have it,
    and `number` its place among the prompts."""

    number: int
    prompt: Prompt
    environment: str
    request: dict[str, Any]  # episode, environment, columns and seeds: what makes its environment
    history: list[list[Any]] = field(default_factory=list)
    turns: list[dict[str, Any]] = field(default_factory=list)
    written: list[tuple[int, int]] = field(default_factory=list)  # from, to: tokens of the completion
    begins: int = 0  # the first token of the turn that is sampled
    length: int = 0  # tokens of the completion up to the end of the last turn
    stats: ToolStats = field(default_factory=ToolStats)
    reason: FinishReason | None = None  # why it ended, where not at a stop token or at the length limit

    @property
    def num_turns(self) -> int:
        return sum(message["role"] == "assistant" for message in self.turns)


class Episodes:
    """The episodes of one shard, by `Rows.index`: prompt · G + sample.

    `ask` and `written` take turns: `ask` starts the tools of the turns that have ended, and `written` waits for them.
    """

    def __init__(self, arena: Arena, params: SamplingParams) -> None:
        assert params.environment is not None
        self.arena, self.params, self.spec = arena, params, params.environment
        self.episodes: list[Episode] = []
        self._asked: list[tuple[list[tuple[int, Turn]], Future[list[dict[str, Any]]]]] = []

    def begin_episodes(self, prompts: Sequence[Prompt]) -> list[Prompt | str]:
        """Each prompt as the policy sees it, with the tools and what `reset` said, or why it cannot begin."""
        wrong: dict[int, str] = {}
        for number, prompt in enumerate(prompts):
            try:
                environment, columns = chosen(self.spec, prompt.columns), columns_of(self.spec, prompt.columns)
            except ValueError as error:
                wrong[number] = f"prompt {prompt.prompt_id!r}: {error}"
                continue
            for sample in range(prompt.first_sample, prompt.first_sample + self.params.group_size):
                request = {
                    "episode": f"{self.params.step}/{self.params.draw}/{prompt.prompt_id}/{sample}",
                    "environment": environment,
                    "columns": columns,
                    "seeds": list(seeds(self.params, prompt.prompt_id, sample)),
                }
                self.episodes.append(Episode(number, prompt, environment, request))
        replies = self.arena.ask([self._request(episode, []) for episode in self.episodes]).result()
        by_prompt: dict[int, list[Mapping[str, Any]]] = {}
        for episode, reply in zip(self.episodes, replies, strict=True):
            by_prompt.setdefault(episode.number, []).append(reply)
        first = {episode.number: episode for episode in reversed(self.episodes)}
        return [wrong.get(i) or self._prompt_as_seen(first[i], by_prompt[i]) for i in range(len(prompts))]

    def keep_prompts(self, sampled: Sequence[bool]) -> None:
        """Keeps those of the prompts that are sampled, by their places in `begin_episodes`."""
        self.episodes = [episode for episode in self.episodes if sampled[episode.number]]

    def _prompt_as_seen(self, episode: Episode, replies: Sequence[Mapping[str, Any]]) -> Prompt | str:
        failed = next((reply for reply in replies if "kind" in reply), None)
        if failed is not None:
            why = f"its environment cannot begin: {failed['kind']}: {failed['message']}"
        elif len({reply["observation"] for reply in replies}) > 1:
            why = (
                "reset gave the rollouts of one group different texts, so they cannot be compared; make it depend on "
                "its columns and on `random` alone"
            )
        else:
            return self._prompt(episode, replies[0]["observation"])
        return f"prompt {episode.prompt.prompt_id!r}: {why}"

    def _prompt(self, episode: Episode, observation: str | None) -> Prompt:
        messages = first_messages(episode.prompt, observation)
        ids = self.arena.formats[episode.environment].tools_prompt(messages)
        return replace(episode.prompt, text=str(self.arena.tokenizer.decode(ids)), token_ids=ids, messages=messages)

    def ask(self, ended: Mapping[int, list[int]]) -> list[bool]:
        """Start the tools of turns that have ended, given their completions so far. Returns which rows wait for them;
        the others made no call, so their episodes have ended."""
        asked: list[tuple[int, Turn]] = []
        requests, waits = [], []
        for index, ids in ended.items():
            episode = self.episodes[index]
            turn = self.arena.formats[episode.environment].read(ids[episode.begins :])
            message: dict[str, Any] = {"role": "assistant", "content": turn.content}
            if turn.calls:
                message["tool_calls"] = [
                    {"type": "function", "function": {"name": call.name, "arguments": call.arguments}}
                    for call in turn.calls
                ]
            episode.turns.append(message)
            episode.length = len(ids)
            waits.append(bool(turn.calls or turn.error))
            if waits[-1]:
                asked.append((index, turn))
                requests.append(self._request(episode, [[call.name, call.arguments] for call in turn.calls]))
        if asked:
            self._asked.append((asked, self.arena.ask(requests)))
        return waits

    def written(self, while_waiting: Callable[[], None] = lambda: None) -> dict[int, list[int] | None]:
        """Gives what the tools wrote, as ids that follow the turns; None where the episode has ended. Waits for them,
        and calls `while_waiting` several times a second; an exception that it raises ends the wait."""
        written: dict[int, list[int] | None] = {}
        for asked, replies in self._asked:
            while not wait([replies], POLL_S).done:
                while_waiting()
            for (index, turn), reply in zip(asked, replies.result(), strict=True):
                written[index] = self._written(self.episodes[index], turn, reply)
        self._asked = []
        return written

    def _written(self, episode: Episode, turn: Turn, reply: Mapping[str, Any]) -> list[int] | None:
        stats = episode.stats
        if "kind" in reply:
            stats.failure, episode.reason = {"kind": reply["kind"], "message": reply["message"]}, "environment"
            return None
        results = [("error", turn.error)] if turn.error else []
        for call, (text, raised) in zip(turn.calls, reply["results"], strict=True):
            results.append((call.name, text))
            episode.history.append([call.name, call.arguments])
            stats.errors += raised
        stats.calls, stats.bad_calls = stats.calls + len(turn.calls), stats.bad_calls + (turn.error is not None)
        episode.turns += [{"role": "tool", "name": name, "content": text} for name, text in results]
        if reply["done"]:
            episode.reason = "environment"
            return None
        if episode.num_turns >= self.spec.max_turns:
            episode.reason = "max_turns"
            return None
        ids, room = list[int](), self.params.max_completion_tokens - episode.length
        if fits := sum(len(text) for _, text in results) < CHARACTERS_PER_TOKEN * room:  # else nothing tokenises it
            ids = self.arena.formats[episode.environment].reply(results)
        if not fits or len(ids) >= room:  # no room for another turn
            episode.reason = "length"
            return None
        episode.begins = episode.length + len(ids)
        episode.written.append((episode.length, episode.begins))
        return ids

    def _request(self, episode: Episode, calls: list[list[Any]], ends: bool = False) -> dict[str, Any]:
        request = episode.request | {"history": list(episode.history), "calls": calls, "ends": ends}
        return request | {"turns": episode.turns} if ends else request

    def finish(self, groups: Sequence[RolloutGroup]) -> None:
        """Complete the groups: turns, what was sampled, why the episode ended, and the environment's own reward."""
        completions = [completion for group in groups for completion in group.completions]
        for episode, completion in zip(self.episodes, completions, strict=True):
            if len(completion.token_ids) > max(episode.begins, episode.length):  # a turn that a limit has cut
                rest = completion.token_ids[episode.begins :]
                content = str(self.arena.tokenizer.decode(rest, skip_special_tokens=True))
                episode.turns.append({"role": "assistant", "content": content})
        alive = [episode for episode in self.episodes if episode.stats.failure is None]
        replies = iter(self.arena.ask([self._request(episode, [], ends=True) for episode in alive]).result())
        for episode, completion in zip(self.episodes, completions, strict=True):
            stats = episode.stats
            if stats.failure is None:
                reply = next(replies)
                stats.reward = reply.get("reward")
                if "kind" in reply:
                    stats.failure = {"kind": reply["kind"], "message": reply["message"]}
            completion.finish_reason = episode.reason or completion.finish_reason
            completion.sampled = [True] * len(completion.token_ids)
            for start, end in episode.written:
                completion.sampled[start:end] = [False] * (end - start)
            completion.turns, completion.tools = episode.turns, stats
