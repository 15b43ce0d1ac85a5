"""The package verifiers 0.1 in form, for tests without it: what verifiers/rubrics/rubric.py (0.1.14) does.

A function gets the fields of the state that it names; an exception is logged and becomes 0.0.
"""

import inspect


class State(dict):
    """Prompt, answer and info are those of the input."""

    def __getitem__(self, key):
        return super().__getitem__("input")[key] if key in ("prompt", "answer", "info") else super().__getitem__(key)


class Rubric:
    has_group_rewards = False

    def __init__(self, funcs=None, weights=None):
        self.funcs = funcs or []
        self.weights = weights or [1.0] * len(self.funcs)

    async def _call_individual_reward_func(self, func, state):
        names = ("prompt", "completion", "answer", "info")
        objects = {**state["input"], "state": state} | {name: state[name] for name in names}
        parameters = inspect.signature(func).parameters
        takes_all = any(parameter.kind is parameter.VAR_KEYWORD for parameter in parameters.values())
        try:
            result = func(**{k: v for k, v in objects.items() if takes_all or k in parameters})
            return float(await result if inspect.isawaitable(result) else result)
        except Exception:
            return 0.0

    async def score_rollout(self, state):
        scores = [await self._call_individual_reward_func(func, state) for func in self.funcs]
        state["reward"] = sum(score * weight for score, weight in zip(scores, self.weights, strict=True))
        state["metrics"] = {func.__name__: score for func, score in zip(self.funcs, scores, strict=True)}


class RubricGroup(Rubric):
    def __init__(self, rubrics):
        super().__init__()
        self.rubrics = rubrics

    async def score_rollout(self, state):
        reward, metrics = 0.0, {}
        for rubric in self.rubrics:
            await rubric.score_rollout(state)
            reward += state["reward"]
            metrics |= state["metrics"]
        state["reward"], state["metrics"] = reward, metrics
