"""The stage of an engine: what stays from call to call, and what does not."""

from concurrent.futures import Future
from unittest.mock import Mock

from policies.presets import small_tokenizer
from rollout.decoding.stage import Stage
from rollout.environments.episodes import Arena
from rollout.group import Prompt
from rollout.sampling import EnvironmentSpec, SamplingParams


def test_a_turn_is_read_by_the_stop_tokens_of_its_own_call(monkeypatch):
    def ask(arena, requests):
        replies = Future()
        replies.set_result([{"observation": None} for _ in requests])
        return replies

    monkeypatch.setattr("rollout.environments.episodes.open_workers", Mock())
    monkeypatch.setattr(Arena, "ask", ask)
    tokenizer = small_tokenizer(["Each gets <<48/2=24>>24 apples.\n"])
    stage, spec = Stage(tokenizer), EnvironmentSpec(environments=(("", "calculator"),))
    prompts, arenas = [Prompt("a", "How many?\n", [5])], []
    for stop in (tokenizer.eos_token_id, tokenizer.pad_token_id, tokenizer.pad_token_id):
        params = SamplingParams(1, environment=spec, stop_token_ids=(stop,))
        stage.begin_episodes(prompts, params, lambda prompt: None)
        turn = stage.arena.formats[""].read([*tokenizer.encode("<<48/2="), stop])
        assert [call.arguments for call in turn.calls] == [{"expression": "48/2"}]
        arenas.append(stage.arena)
    assert arenas[1] is arenas[2]
    stage.close()
