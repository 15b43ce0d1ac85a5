"""A task of the package verifiers, as its users write them: data, a toolset with a state, and rewards."""

import verifiers.v1 as vf

from rollout.environments.verifiers import verifiers


class CountData(vf.TaskData):
    target: int


class CountState(vf.State):
    total: int = 0


class Counter(vf.Toolset[vf.ToolsetConfig, CountState]):
    async def setup_task(self, task):
        self.most = task.target + 5

    @vf.tool
    def add(self, step: int) -> int:
        """Add to the total.

        Args:
            step: What to add.
        """
        if self.state.total + step > self.most:
            raise ValueError("too much")
        self.state.total += step
        return self.state.total

    @vf.tool
    async def read(self) -> str:
        """Read the total."""
        return f"{self.state.total}"


class CountTask(vf.Task[CountData, CountState]):
    @classmethod
    def toolsets(cls, config):
        return [Counter(vf.ToolsetConfig())]

    @vf.reward(weight=2.0)
    async def reached(self, task, trace) -> float:
        return float(trace.state.total == task.target)

    @vf.reward
    async def said(self, trace) -> float:
        assert trace.num_turns == len(trace.assistant_messages)
        assert len(trace.tool_messages) == sum(len(m.tool_calls or []) for m in trace.assistant_messages)
        return float(trace.last_reply == f"It is {trace.state.total}.")


class Bare(vf.Task[CountData]):
    pass


class Prepared(CountTask):
    async def setup(self, trace, runtime):
        await runtime.run(["true"])

    @vf.reward
    async def files(self, trace, runtime) -> float:
        return 0.0


Count = verifiers(CountTask)
