"""What `make gpu` asks of a device, one check a process; the last line of each is its figures as JSON.

    python benchmarks/on_device.py kernels cuda runs/policy      # and flex, decoding, learning, recorded, publication,
                                                                 # memory, sleep, resume; with --small on a CPU

A check raises where the device computes something else than it must. Seconds and counts are for the reader.
"""

from __future__ import annotations

import json
import sys
import tempfile
import time
from collections.abc import Callable
from dataclasses import replace
from functools import partial
from itertools import product
from pathlib import Path
from typing import Any

HERE = Path(__file__).resolve().parent
sys.path[:] = [path for path in sys.path if Path(path).resolve() != HERE]  # else `rollout` would be a file here

import torch  # noqa: E402
from torch import Tensor  # noqa: E402

LAUNCHES = ("cudaLaunchKernel", "cudaLaunchKernelExC", "cuLaunchKernel", "cuLaunchKernelEx", "cudaGraphLaunch")
WAITS = ("cudaStreamSynchronize", "cudaDeviceSynchronize", "cudaEventSynchronize")
MIB = 2**20


class Check:
    """The device and the folder of the policy that a check is for."""

    def __init__(self, device: str, policy: str, small: bool) -> None:
        self.device, self.folder, self.small = torch.device(device), Path(policy), small

    def seconds(self, work: Callable[[], Any]) -> float:
        """Times `work` once, after all that the device had to do and until it is done."""
        self.wait()
        started = time.perf_counter()
        work()
        self.wait()
        return round(time.perf_counter() - started, 5)

    def wait(self) -> None:
        if self.device.type != "cpu":
            torch.accelerator.synchronize()

    def profile(self, work: Callable[[], Any]) -> dict[str, Any]:
        """Tells seconds of `work` without a profiler; then with it kernels, waits and what takes longest."""
        work()
        seconds = self.seconds(work)
        with torch.profiler.profile() as profiler:  # of all devices that there are
            work()
            self.wait()
        events = profiler.key_averages()
        longest = sorted(events, key=lambda event: -(event.self_device_time_total or event.self_cpu_time_total))[:8]
        return {
            "seconds": seconds,
            "launches": sum(event.count for event in events if event.key in LAUNCHES),
            "waits": {event.key: event.count for event in events if event.key in WAITS},
            "operators": sum(event.count for event in events if event.key.startswith("aten::")),
            "longest_us": {event.key: event.self_device_time_total or event.self_cpu_time_total for event in longest},
        }

    # ---- what a sampler and a learner are made of --------------------------------------------------------------------

    def policy(self) -> Any:
        from policies.policy import Policy

        return Policy.load(self.folder, self.dtype).to(self.device)

    @property
    def dtype(self) -> torch.dtype:
        return torch.float32 if self.small else torch.bfloat16

    def engine(self) -> Any:
        from rollout.decoding.engine import Engine

        return Engine(self.policy(), self.dtype)

    def prompts(self, count: int) -> list[Any]:
        from rollout.group import Prompt

        return [Prompt(f"p/{i}", "", [5 + (7 * i + j) % 50 for j in range(6 + i % 5)]) for i in range(count)]

    def params(self, group_size: int, **more: Any) -> Any:
        from rollout.sampling import SamplingParams

        return SamplingParams(group_size, 1.0, 8 if self.small else 64, draft_tokens=0, **more)

    def options(self, **more: Any) -> Any:
        from grpo.config.run import TrainConfig
        from rewards.config.options import load

        given = {"model": str(self.folder), "output_dir": "x", "device": self.device.type, "steps": 4}
        given |= {"dtype": str(self.dtype).removeprefix("torch."), "data.name": "word_problems", "prompts_per_step": 4}
        given |= {"rollout.group_size": 4, "rollout.max_completion_tokens": 8 if self.small else 64}
        given |= {"rollout.draft_tokens": 0}  # else what drafts cost decides how often the draft head learns
        given |= {"learner.tokens_per_micro_batch": 4096, "learner.learning_rate": 1e-4, "log.trackers": []}
        given |= {"rewards": [{"function": f"{HERE / 'learner.py'}:reward"}]}
        return load(TrainConfig, None, given | more)

    def learner(self, policy: Any) -> Any:
        from grpo.learner.build import make

        return make(policy, self.options(), reward_weights={"r": 1.0})

    def step(self, learner: Any, groups: list[Any], number: int = 1) -> dict[str, Any]:
        from rewards.group_score import GroupScore

        rewards = [[(i + 3 * g) % 5 / 4 for i in range(len(group.completions))] for g, group in enumerate(groups)]
        scores = [GroupScore(list(each), {"r": list(each)}) for each in rewards]
        metrics = learner.step(learner.prepare(groups, scores), number)
        learner.update.zero()
        return metrics


# ---- the checks, the riskiest first ---------------------------------------------------------------------------------


def kernels(check: Check) -> dict[str, Any]:
    """Attention to latents and grouped products, beside plain products, for the widths of known policies."""
    from policies.decoding import experts
    from policies.decoding import kernels as attention
    from rollout.compiled.graph import run_few_experts

    result: dict[str, Any] = {}
    for dtype in (torch.float32, torch.bfloat16):

        def normal(*shape: int, dtype: torch.dtype = dtype) -> Tensor:
            return (torch.randn(shape) / 8).to(check.device, dtype)

        for widths in ((144, 144, 128), (288, 288, 256), (576, 576, 512)):
            inputs = normal(8, 16, widths[0]), normal(8, 256, widths[1]), widths[2], normal(8, 1, 256)
            agrees = check.device.type != "cuda" or attention.cuda_attention_agrees(check.device, dtype, widths)
            result[f"attention, {dtype}, {widths}"] = {"agrees": agrees} | {
                each.__name__: [check.seconds(partial(each, *inputs)) for _ in range(2)]
                for each in (attention.attention, attention.plain_attention)
            }
        chosen = torch.rand(64, 8).topk(2).indices.to(check.device)
        x, weights, gate_up, down = normal(64, 128), normal(64, 2), normal(8, 128, 128), normal(8, 128, 64)
        computed = experts.run_experts(x, weights, chosen, gate_up, down)
        exact = run_few_experts(
            *(each.double() if each is not chosen else each for each in (x, weights, chosen, gate_up, down))
        )
        error = relative(computed, exact)
        assert error < attention.CLOSE[dtype], f"grouped products in {dtype} are {error:.2g} from exact ones"
        seconds = check.seconds(partial(experts.run_experts, x, weights, chosen, gate_up, down))
        result[f"grouped products, {dtype}"] = {"error": error, "seconds": seconds}
    return result


def flex(check: Check) -> dict[str, Any]:
    """Attention of packed rows and its gradients beside a dense softmax in float64 on the CPU, and graphs compiled."""
    from torch._dynamo.utils import counters

    torch._dynamo.config.fail_on_recompile_limit_hit = True  # else every score is computed without a word
    result: dict[str, Any] = {}
    widths = [(16, 12)] if check.small else [(64, 64), (96, 64), (128, 128), (192, 128)]
    for dtype, of_heads, length in product(
        (torch.bfloat16, torch.float32), widths, (40, 72) if check.small else (200, 384, 700)
    ):
        name = f"{dtype}, {of_heads}, {length} tokens"
        try:
            started = time.perf_counter()
            errors = packed_errors(check, dtype, *of_heads, length)
            result[name] = {"errors": errors, "seconds": round(time.perf_counter() - started, 3)}
            if max(errors) > (1e-3 if dtype == torch.float32 else 3e-2):
                result[name]["failed"] = "too far from float64"
        except RuntimeError as error:  # among them a kernel that this device has not enough memory for
            result[name] = {"failed": str(error)[:500]}
        result[name]["graphs_so_far"] = counters["stats"]["unique_graphs"]
        print(name, result[name], flush=True)
    failed = [name for name, figures in result.items() if "failed" in figures]
    assert not failed, f"failed: {failed}"
    return result


def packed_errors(check: Check, dtype: torch.dtype, key_width: int, value_width: int, length: int) -> list[float]:
    """Compares what is attended to, and the gradients of queries, keys and values, but for padding."""
    from policies.attention import Packing, packed_attention

    third = length // 3
    segment = torch.tensor([[0] * third + [1] * third + [2] * (third - 5) + [-1] * (length - 3 * third + 5)] * 2)
    real = (segment >= 0)[..., None, None]
    made = [torch.randn(2, 4, length, width).to(dtype) for width in (key_width, key_width, value_width)]
    push, scale = torch.randn(2, length, 4, value_width) * real, key_width**-0.5
    heads = [part.to(check.device, copy=True).requires_grad_() for part in made]
    out, _ = packed_attention(*heads, Packing(segment.to(check.device)), scale)
    out.backward(push.to(out.device, out.dtype))
    query, key, value = exact = [part.double().requires_grad_() for part in made]
    hidden = ~Packing(segment).visible[:, None]
    scores = (query @ key.transpose(2, 3) * scale).masked_fill(hidden, -torch.inf)
    dense = (scores.softmax(-1) @ value).transpose(1, 2)
    dense.backward(push.double())
    gradients = [relative(mine.grad, theirs.grad) for mine, theirs in zip(heads, exact, strict=True)]
    return [relative(out * real.to(out.device), dense * real), *gradients]


def relative(mine: Tensor, theirs: Tensor) -> float:
    theirs = theirs.detach().cpu()
    return float((mine.detach().cpu().double() - theirs).norm() / theirs.norm())


def decoding(check: Check) -> dict[str, Any]:
    """A call for 1, 8 and 256 rows, by operators: kernels and waits of a round are those of the call by its tokens."""
    engine, result = check.engine(), {}
    for rows in (1, 8, 16 if check.small else 256):
        params = replace(check.params(1), max_completion_tokens=8)
        result[f"{rows} rows, 8 tokens"] = check.profile(
            lambda rows=rows, params=params: engine.sample(check.prompts(rows), params)
        )
    return result


def learning(check: Check) -> dict[str, Any]:
    engine = check.engine()
    groups = engine.sample(check.prompts(4), check.params(4))
    learner = check.learner(engine.policy)
    return check.profile(lambda: check.step(learner, groups))


def recorded(check: Check) -> dict[str, Any]:
    """Rounds that are recorded choose the tokens of those that are not. A CPU calls what a GPU replays."""
    from rollout.compiled import rounds
    from rollout.compiled.recorded import RecordedRound

    if check.device.type == "cpu":
        rounds.find = lambda *_: RecordedRound()
    engine, result = check.engine(), {}
    for rows in (1, 8):
        prompts, params = check.prompts(rows), check.params(1)
        tokens, seconds = {}, {}
        for name, compiled in (("eager", False), ("recorded", True)):
            each = replace(params, compiled=compiled)
            tokens[name] = [group.completions[0].token_ids for group in engine.sample(prompts, each)]
            seconds[name] = check.seconds(lambda each=each, prompts=prompts: engine.sample(prompts, each))
        assert engine.graphs[0].loaded, "no round was recorded"
        same = sum(a == b for a, b in zip(tokens["eager"], tokens["recorded"], strict=True))
        assert same == rows or check.dtype != torch.float32, f"{same} of {rows} rows have the same tokens"
        result[f"{rows} rows"] = {"seconds": seconds, "rows_with_the_same_tokens": same}
    return result


def publication(check: Check) -> dict[str, Any]:
    """New weights reach a sampler with a copy of its own: all digests, and it samples what the learner says."""
    from rollout.weight_sync.checksums import first_difference

    engine, policy = check.engine(), check.policy()
    learner = check.learner(policy)
    check.step(learner, engine.sample(check.prompts(2), check.params(4)))
    weights = learner.weights()
    seconds = check.seconds(lambda: engine.sync_weights(weights, 1))
    different = first_difference(dict(weights.items()), engine.held())
    assert different is None, f"{different} is not what was published"
    metrics = check.step(learner, engine.sample(check.prompts(2), check.params(4, step=2)), 2)
    far = metrics["mismatch/logprob_abs_max"]
    assert far < (1e-3 if check.dtype == torch.float32 else 1.0), f"log-probabilities differ by {far:.2g}"
    size = sum(tensor.nbytes for tensor in weights.values())
    return {"bytes": size, "seconds": seconds, "logprob_abs_max": far}


def memory(check: Check) -> dict[str, Any]:
    """MiB of a learner and of its sampler, beside what `--dry_run` says of them."""
    from grpo.cli.commands.memory import MemoryOfRun
    from policies.policy import read_config

    on_gpu = check.device.type != "cpu"
    said = MemoryOfRun(read_config(check.folder), False, check.options()).learner()
    held = sum((said.weights, said.masters, said.gradients, said.moments, said.buffers)) / MIB
    engine = check.engine()
    learner, groups = check.learner(engine.policy), engine.sample(check.prompts(4), check.params(4))
    engine.forget()
    result = {"said_held": held, "said_learning": said.phases["learning"] / MIB}
    for number in (1, 2):
        if on_gpu:
            torch.cuda.reset_peak_memory_stats()
        check.step(learner, groups, number)
    if on_gpu:
        result |= {"held": torch.cuda.memory_allocated() / MIB, "learning": torch.cuda.max_memory_allocated() / MIB}
        ratio = result["learning"] / result["said_learning"]
        assert 0.5 < ratio < 1.5, f"{ratio:.2f} of what --dry_run says is held while it learns"
    return result


def sleep(check: Check) -> dict[str, Any]:
    """A worker leaves the device and comes back: what the device holds meanwhile, seconds, and the same tokens."""
    from policies.synced_weights import SyncedWeights
    from rollout.weight_sync.message import everything
    from rollout.workers.worker import Worker

    policy, name = check.policy(), str(check.dtype).removeprefix("torch.")
    messages = list(everything(SyncedWeights(policy.weights()), 0))
    worker = Worker(policy.skeleton(), name, name, str(check.device), torch.get_num_threads())
    del policy

    def allocated() -> float:
        return torch.cuda.memory_allocated() / MIB if check.device.type == "cuda" else 0.0

    def wake() -> None:
        for message in messages:
            worker.sync_weights(message)

    result = {"wake": check.seconds(wake)}
    ask = check.prompts(2), check.params(2), 0
    before, result["awake_mib"] = worker.sample(*ask), allocated()
    result["sleep"], result["asleep_mib"] = check.seconds(worker.sleep), allocated()
    assert result["asleep_mib"] <= 0.05 * result["awake_mib"], f"asleep it holds {result['asleep_mib']:.0f} MiB"
    result["wake_again"] = check.seconds(wake)
    tokens = [[c.token_ids for group in groups for c in group.completions] for groups in (before, worker.sample(*ask))]
    assert tokens[0] == tokens[1], "after its sleep it samples other tokens"
    return result


def resume(check: Check) -> dict[str, Any]:
    """Two steps, and one that goes on from the first checkpoint: how far their weights are from each other."""
    from grpo.run import checkpoint
    from grpo.train import train

    options: dict[str, Any] = {"checkpoint.every": 1, "steps": 2, "prompts_per_step": 2, "rollout.group_size": 2}
    with tempfile.TemporaryDirectory() as folder:
        whole, parts = Path(folder, "whole"), Path(folder, "parts")
        seconds = check.seconds(lambda: train(check.options(output_dir=whole, **options)))
        train(check.options(output_dir=parts, **options), resume=str(whole / "checkpoints/step_000001"))
        ends = [checkpoint.load(run / "checkpoints/step_000002").tensors["policy"] for run in (whole, parts)]
    differences = {name: float((ends[0][name].double() - ends[1][name]).abs().max()) for name in ends[0]}
    name, far = max(differences.items(), key=lambda pair: pair[1])
    assert far <= (0.0 if check.device.type == "cpu" else 1e-3), f"{name} differs by {far:.2g}"
    return {"seconds": seconds, "largest_difference": far}


CHECKS = {f.__name__: f for f in (kernels, flex, decoding, learning, recorded, publication, memory, sleep, resume)}

if __name__ == "__main__":
    torch.manual_seed(0)
    figures = CHECKS[sys.argv[1]](Check(sys.argv[2], sys.argv[3], "--small" in sys.argv))
    print(json.dumps(figures))
