"""Memory of each rank of a learner, measured, beside what `--dry_run` says: SmolLM2-135M's shape in the MLA form.

    python -m benchmarks.memory --ranks 1 2 4

The policy has random weights. Each number of ranks learns in gloo processes on this machine. What is measured is the
resident set of a process as the kernel counts it, less what it was before the policy was loaded: that is what a machine
runs out of, and it sees the buffers of gloo and of FSDP, whose storages torch's own accounting misses. The kernel's
high-water mark is set back before each phase. malloc returns what is freed at once, so the mark is not that of an
earlier phase. Weights of one process are read from the file's pages, which count only when they are touched.
"""

from __future__ import annotations

import argparse
import json
import os
import platform
import subprocess
import sys
import tempfile
from pathlib import Path
from typing import Any

import torch
import transformers
from torch.distributed import TCPStore
from transformers import LlamaConfig, LlamaForCausalLM

from grpo.cli.commands.memory import MemoryOfRun
from grpo.config.learner import ParallelOptions
from grpo.config.run import TrainConfig
from grpo.learner.build import make
from grpo.learner.parallel import join
from policies.conversion.dense import convert_dense
from policies.mtp import MTPHead
from policies.policy import Policy, read_config
from policies.presets import small_tokenizer
from policies.sharding import release, whole
from rewards.config.options import load
from rewards.group_score import GroupScore
from rollout.group import Completion, Prompt, RolloutGroup

SMOLLM2 = {
    **{"vocab_size": 49152, "hidden_size": 576, "intermediate_size": 1536, "num_hidden_layers": 30},
    **{"num_attention_heads": 9, "num_key_value_heads": 3, "tie_word_embeddings": True, "rms_norm_eps": 1e-5},
    **{"max_position_embeddings": 8192, "rope_parameters": {"rope_type": "default", "rope_theta": 1e5}},
}
MIB = 2**20


def write_policy(folder: Path, head: bool) -> None:
    torch.manual_seed(0)
    trunk = convert_dense(LlamaForCausalLM(LlamaConfig(**SMOLLM2, bos_token_id=None, eos_token_id=0)).eval())
    mtp = MTPHead(trunk.config) if head else None
    Policy(trunk, mtp, small_tokenizer(["3 + 4 = 7\n"])).save(folder)


def groups_of(count: int, row: int) -> tuple[list[RolloutGroup], list[GroupScore]]:
    """`count` rows of `row` tokens: a prompt and four completions."""
    length = row * 7 // 32
    prompt, groups = list(range(1, 1 + row - 4 * length)), []
    for number in range(count):
        tokens = [[(7 * i + c + number) % 40000 + 1 for i in range(length)] for c in range(4)]
        completions = [Completion(ids, [-9.0] * length, "", "stop", 0) for ids in tokens]
        groups.append(RolloutGroup(Prompt(str(number), "", prompt, {}), completions))
    return groups, [GroupScore([0.0, 1.0, 0.5, 0.2], {}) for _ in groups]


def resident(peak: bool = False) -> float:
    """MiB that this process has in memory, or has had since `forget_peak`."""
    for line in Path("/proc/self/status").read_text().splitlines():
        if line.startswith("VmHWM:" if peak else "VmRSS:"):
            return int(line.split()[1]) / 1024
    raise OSError("/proc/self/status has no VmRSS: this needs Linux")


def forget_peak() -> None:
    Path("/proc/self/clear_refs").write_text("5")


def measure(config: TrainConfig, source: str, row: int) -> dict[str, float]:
    """MiB above the start: the peak of each phase, by name."""
    torch.set_num_threads(1)
    ranks = join(True, config.learner.parallel)
    if ranks.size > 1:
        ranks.sum_tensors(torch.zeros(1))
    begin, found = resident(), {}

    def phase_ends(name: str) -> None:
        found[name] = resident(peak=True) - begin
        forget_peak()

    forget_peak()
    policy = Policy.load(source, layout=ranks.layout)
    found["loaded"] = resident() - begin
    phase_ends("loading")
    learner = make(policy, config, ranks=ranks)
    rows = 2 * ranks.readers * config.learner.tokens_per_micro_batch // row
    for step in (1, 2):
        learner.step(learner.prepare(*groups_of(rows, row)), step)
    found["held"] = resident() - begin
    phase_ends("learning")
    weights = learner.weights()
    gathered = map(whole, weights.values())  # every rank takes part, and rank 0 keeps copies
    copies = [tensor.clone() if ranks.first else None for tensor in gathered]
    del copies, weights
    phase_ends("publishing")
    release(policy)
    tensors, _ = learner.state()
    for mapping in tensors.values():
        for tensor in mapping.values():
            whole(tensor)
    phase_ends("saving")
    return found


def start(words: list[str], size: int) -> list[dict[str, Any]]:
    """What each of `size` ranks has printed last, as JSON, of the module and its arguments in `words`."""
    store = TCPStore("127.0.0.1", 0, is_master=True, wait_for_workers=False)  # on a port that nobody else can have
    shared = {"MASTER_ADDR": "127.0.0.1", "MASTER_PORT": str(store.port), "TORCHELASTIC_USE_AGENT_STORE": "True"}
    shared |= {"WORLD_SIZE": str(size), "LOCAL_WORLD_SIZE": str(size)}
    shared |= {"OMP_NUM_THREADS": "1", "ACCELERATE_USE_CPU": "true"}
    shared |= {"MALLOC_MMAP_THRESHOLD_": "65536", "MALLOC_TRIM_THRESHOLD_": "65536"}
    processes = [
        subprocess.Popen(
            [sys.executable, "-m", *words],
            env=os.environ | shared | {"RANK": str(rank), "LOCAL_RANK": str(rank)},
            stdout=subprocess.PIPE,
            text=True,
        )
        for rank in range(size)
    ]
    try:
        outs = [process.communicate(timeout=3600)[0] for process in processes]
    finally:
        for process in processes:
            if process.poll() is None:
                process.kill()
    return [json.loads(out.splitlines()[-1]) for out in outs]


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--ranks", type=int, nargs="+", default=[1, 2, 4])
    parser.add_argument("--tokens", type=int, default=512, help="of a micro-batch")
    parser.add_argument("--row", type=int, default=256, help="tokens of a row")
    parser.add_argument("--head", action="store_true", help="with a draft head that learns")
    parser.add_argument("--optimizer", default="adamw")
    parser.add_argument("--measure", help=argparse.SUPPRESS)
    given = parser.parse_args()
    options = {
        **{"model": given.measure or "x", "output_dir": "x", "rollout.max_completion_tokens": given.row * 7 // 32},
        **{"learner.tokens_per_micro_batch": given.tokens, "learner.optimizer": given.optimizer},
        **{"rollout.group_size": 4, "prompts_per_step": 64, "mtp.depth": 2, "rollout.workers": 1},
    }
    config = load(TrainConfig, None, options)
    if given.measure:
        print(json.dumps(measure(config, given.measure, given.row)))
        return
    print(
        f"{platform.processor() or platform.machine()}, torch {torch.__version__}, transformers "
        f"{transformers.__version__}: {' '.join(sys.argv[1:])}"
    )
    print("| ranks | rank | measured held | `--dry_run` | ratio | measured peak | `--dry_run` | ratio |")
    print("|---|---|---|---|---|---|---|---|")
    with tempfile.TemporaryDirectory() as folder:
        write_policy(Path(folder), given.head)
        shape = read_config(folder)
        for size in given.ranks:
            words = ["benchmarks.memory", "--measure", folder, "--tokens", str(given.tokens), "--row", str(given.row)]
            words += ["--optimizer", given.optimizer]
            wide = config.model_copy(
                update={"learner": config.learner.model_copy(update={"parallel": ParallelOptions(fsdp=size)})}
            )
            said = MemoryOfRun(shape, given.head, wide).learner()
            held = sum((said.weights, said.masters, said.gradients, said.moments, said.buffers)) / MIB
            learning = said.phases["learning"] / MIB
            for rank, found in enumerate(start(words, size)):
                cells = [found["held"], held, found["held"] / held]
                cells += [found["learning"], learning, found["learning"] / learning]
                shown = (f"{cell:.2f}" if i % 3 == 2 else f"{cell:,.0f}" for i, cell in enumerate(cells))
                print(f"| {size} | {rank} | {' | '.join(shown)} |", flush=True)
                print(f"  {found}", file=sys.stderr)


if __name__ == "__main__":
    main()
