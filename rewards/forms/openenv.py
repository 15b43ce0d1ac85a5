"""The reward of an OpenEnv server: the completion is the one action of an episode."""

from __future__ import annotations

import json
from typing import Any

from rewards.protocol import PROVIDED, Completions, RewardError, text_of


def openenv(
    prompts: list | None,
    completions: Completions,
    url: str,
    action: dict[str, Any],
    request_timeout_s: float = 10.0,
    **columns,
) -> list[float | Exception]:
    """The reward that the server at `url` gives the step with each completion, or the exception that it failed with.

    `action` is what is sent, with "{completion}" where the text belongs, such as `{message: "{completion}"}`. `reset`
    gets the columns of the row, of which the server takes those that it knows. A step without a reward is a failure.
    Every completion has a session of its own, one after the other, since a server may have no more than one. Raises
    RewardError without the package openenv.

    >>> openenv(None, ["42"], "http://127.0.0.1:8000", {"message": "{completion}"})  # doctest: +SKIP
    [1.0]
    """
    try:
        from openenv.core.generic_client import GenericEnvClient
    except ImportError as error:
        raise RewardError("the reward openenv needs the package: pip install 'quartet-rl[openenv]'") from error
    form = json.dumps(action)
    if '"{completion}"' not in form:
        raise ValueError(f'action={form} has no "{{completion}}", so every completion would get the same reward')
    rewards: list[float | Exception] = []
    for i, completion in enumerate(completions):
        row = {name: values[i] for name, values in columns.items() if name not in PROVIDED}
        sent = json.loads(form.replace('"{completion}"', json.dumps(text_of(completion))))
        try:
            with GenericEnvClient(base_url=url, message_timeout_s=request_timeout_s).sync() as session:
                session.reset(**row)
                reward = session.step(sent).reward
            rewards.append(ValueError("the step had no reward") if reward is None else float(reward))
        except Exception as error:  # what the client raises, of websockets too
            rewards.append(error)
    return rewards
