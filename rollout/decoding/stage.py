"""What a call samples: prompts that can be continued, with the episodes of an environment where there is one."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from typing import TYPE_CHECKING

from transformers import PreTrainedTokenizerBase

from rollout.group import Prompt
from rollout.sampling import SamplingParams

if TYPE_CHECKING:
    from rollout.environments.episodes import Arena, Episodes


class Stage:
    """Where the episodes of an engine are begun. The processes of the tools stay from call to call."""

    def __init__(self, tokenizer: PreTrainedTokenizerBase) -> None:
        self.tokenizer = tokenizer
        self.arena: Arena | None = None

    def begin_episodes(
        self, prompts: Sequence[Prompt], params: SamplingParams, fault: Callable[[Prompt], str | None]
    ) -> tuple[Episodes | None, list[Prompt], list[str]]:
        """Begin the episodes, which are None without an environment. Returns them, the prompts that can be continued,
        with what their environments add, and why others cannot; `fault` says why an engine cannot continue a prompt."""
        episodes, begun = None, list[Prompt | str](prompts)
        if params.environment is not None:
            from rollout.environments.episodes import Arena, Episodes

            wanted = params.environment, tuple(params.stop_token_ids)
            if self.arena is None or (self.arena.spec, self.arena.stops) != wanted:
                self.close()
                self.arena = Arena(params.environment, self.tokenizer, params.stop_token_ids)
            episodes = Episodes(self.arena, params)
            begun = episodes.begin_episodes(prompts)
        faults = [prompt if isinstance(prompt, str) else fault(prompt) for prompt in begun]
        if episodes:
            episodes.keep_prompts([not why for why in faults])
        sound = [prompt for prompt, why in zip(begun, faults, strict=True) if isinstance(prompt, Prompt) and not why]
        return episodes, sound, [why for why in faults if why]

    def close(self) -> None:
        """End the processes of the tools, where there are any."""
        if self.arena is not None:
            self.arena.close()
            self.arena = None
