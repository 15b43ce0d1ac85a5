"""Contract 19, in seconds and without a device: who asks which device it is on, and how often the host reads a number.

The counts on an accelerator, with all operators, are those of test_pretend.py, which is slow.
"""

from __future__ import annotations

import ast
import subprocess
import sys
from collections import Counter
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import copies
import pretend
import pytest
import torch
import waits
from recorded import groups_of
from small_learner import small_learner
from torch.utils._python_dispatch import TorchDispatchMode

from grpo.config.learner import LearnerOptions, MTPOptions
from rollout.decoding.batch import Batch
from rollout.decoding.engine import Engine
from rollout.decoding.shard import Decoding
from rollout.group import Prompt
from rollout.sampling import SamplingParams

ROOT = Path(__file__).parents[1]
PACKAGES = ("policies", "rollout", "grpo", "rewards", "review")
VENDORS = ("cuda", "xpu", "mps")
QUESTIONS = ("has_cuda", "is_cpu", "is_cuda", "is_xpu", "is_mps")
# The files that may know. A line here is a promise to look at that file on every new kind of device.
KNOWS = {
    "policies/devices.py": "the names of devices",
    "policies/attention.py": "kernels: which attention is fused",
    "policies/decoding/kernels.py": "kernels: attention over latents",
    "policies/decoding/latent_cache.py": "kernels: pages that the system gives out",
    "policies/decoding/linear.py": "kernels: blocked matrices",
    "policies/decoding/quantized.py": "kernels: int8",
    "policies/lora.py": "kernels: a product in bf16",
    "rollout/sampling.py": "kernels: the choice of a token",
    "rollout/compiled/graph.py": "kernels: what a graph holds",
    "rollout/compiled/recorded.py": "kernels: graphs of CUDA",
    "rollout/compiled/rounds.py": "kernels: where a graph can be had",
    "rollout/compiled/store.py": "kernels: compiled or recorded",
    "rollout/vllm/inside/quartet_tensors.py": "handles of tensors for another process",
    "rollout/vllm/inside/quartet_transfer.py": "handles of tensors for another process",
    "rollout/decoding/engine.py": "how many rows are decoded together",
    "rollout/places.py": "which GPU a worker gets",
    "rollout/decoding/batch.py": "how many tokens are prefilled together",
    "grpo/learner/optimizer.py": "a sum in pieces",
    "grpo/learner/parallel.py": "what a run prints",
    "grpo/task/sampling.py": "where nobody has tried compiled rounds",
    "grpo/task/table.py": "what goes with what",
    "grpo/cli/commands/memory.py": "an estimate of memory",
}


def asks(source: str) -> list[str]:
    """What in a file depends on the kind of a device: torch's modules of one kind, its name, or a question for it."""
    found = []
    for node in ast.walk(ast.parse(source)):
        if isinstance(node, ast.Attribute):
            of = getattr(node.value, "attr", getattr(node.value, "id", ""))
            of_kind = of == "torch" and node.attr in VENDORS
            asked = of == "device" and node.attr == "type"
            if of_kind or asked or node.attr in QUESTIONS:
                found.append(ast.unparse(node))
        elif isinstance(node, ast.Constant) and node.value in VENDORS:
            found.append(repr(node.value))
    return found


def test_contract_19_no_code_but_named_files_knows_which_device_it_is_on():
    files = [file for package in PACKAGES for file in (ROOT / package).rglob("*.py")]
    found = {str(file.relative_to(ROOT)): asks(file.read_text(encoding="utf-8")) for file in files}
    knows = {file: words for file, words in found.items() if words}
    assert {file: words for file, words in knows.items() if file not in KNOWS} == {}, "use policies/devices.py"
    assert set(KNOWS) - set(knows) == set(), "these files ask no more: take them out of KNOWS"


def test_a_question_for_the_device_is_found():
    for source, found in {
        "torch.cuda.synchronize()": ["torch.cuda"],
        "x.device.type == 'cpu'": ["x.device.type"],
        "if x.is_cuda: pass": ["x.is_cuda"],
        "x.to('cuda')": ["'cuda'"],
        "devices.has_cuda(device)": ["devices.has_cuda"],
        "x.to(y.device)\nf(device='auto')": [],
    }.items():
        assert asks(source) == found


METHODS = ("item", "tolist", "numpy", "cpu", "__int__", "__float__", "__bool__", "__index__")  # no operators on a CPU


class Reads(TorchDispatchMode):
    """Counts the operators after which the host knows a number: it waits for a device there."""

    NAMES = ("nonzero", "masked_select", "bincount", "equal", "_unique2", "unique_consecutive")

    def __init__(self, counts: Counter[str]) -> None:
        super().__init__()
        self.counts = counts

    def __torch_dispatch__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        name = func.overloadpacket.__name__
        of_mask = name in ("index", "index_put", "index_put_") and any(
            isinstance(index, torch.Tensor) and index.dtype == torch.bool for index in args[1]
        )
        if name in self.NAMES or of_mask:
            self.counts[name] += 1
        return func(*args, **kwargs or {})


def counting(counts: Counter[str], name: str) -> Callable[..., Any]:
    """A method of tensors, which counts how often it is called."""
    method = getattr(torch.Tensor, name)

    def read(tensor: torch.Tensor, *rest: Any, **more: Any) -> Any:
        counts[name] += 1
        return method(tensor, *rest, **more)

    return read


@contextmanager
def counted(monkeypatch: pytest.MonkeyPatch) -> Iterator[Counter[str]]:
    counts: Counter[str] = Counter()
    with monkeypatch.context() as patch, Reads(counts):
        for name in METHODS:
            patch.setattr(torch.Tensor, name, counting(counts, name))
        yield counts


@torch.inference_mode()
@pytest.mark.parametrize("drafts", [0, 2])
def test_contract_19_a_round_of_decoding_is_read_once(random_policy, monkeypatch, drafts):
    """A round in which no row ends: what the host has to know of it comes in one copy."""
    prompts = [Prompt(f"p/{i}", "", [5 + i, 7, 9 + 3 * i, 11][: 2 + i]) for i in range(3)]
    params = SamplingParams(group_size=2, max_completion_tokens=40, draft_tokens=drafts)
    decoding = Decoding(Batch(Engine(random_policy(2), torch.float32).decoder, prompts, params))
    for _ in range(2):
        decoding.decode_round()
    with counted(monkeypatch) as counts:
        decoding.decode_round()
    assert counts.total() <= 1, counts


def test_contract_19_the_host_reads_no_number_of_each_row_or_token(micro_policy, monkeypatch):
    """A micro-batch of six groups is read as often as one of two. Rows are lists, and are laid out on the host."""
    counts_of = []
    for count in (2, 6):
        options = LearnerOptions(tokens_per_micro_batch=4096)
        learner = small_learner(micro_policy(0), options, MTPOptions(depth=2))
        batch = learner.prepare(*groups_of(count))
        with counted(monkeypatch) as counts:
            learner.forward_backward(batch)
        del counts["tolist"], counts["numpy"]
        counts_of.append(counts)
    assert counts_of[0] == counts_of[1]
    assert counts_of[0].total() <= 5, counts_of


@pytest.mark.parametrize("path", waits.QUICK)  # the other paths are in test_pretend.py
def test_contract_19_every_kind_of_layers_waits_seldom_and_computes_what_a_cpu_does(path):
    """In a copy of this process, since a device that is registered stays."""
    command = [sys.executable, str(ROOT / "tests/cases/waits.py"), path]
    with copies.Copy(command, stdout=subprocess.PIPE, stderr=subprocess.PIPE, text=True) as process:
        said, errors = process.communicate()
    if process.returncode == pretend.NOT_HERE:
        pytest.skip("torch registers no pretend accelerator")
    assert (process.returncode, said.splitlines()[-1:]) == (0, ["{}"]), said + errors
