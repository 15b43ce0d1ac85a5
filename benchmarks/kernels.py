"""Compiles for cards that are not here what torch would compile there: flex attention of packed rows, forward and
backward, and sampling. Beside each kernel stands the shared memory that a block of it needs, and what the card has.

    make kernels                                  # installs Triton into .kernels; no card and no CUDA build of torch
    make kernels ARGS="--cards H100 --work 'bfloat16 192/128' sampling"

The learner's own function is traced on torch's meta device. Its graphs are lowered as for the card, whose properties
are told to torch, and Triton compiles down to the card's machine code. Nothing is run. The exit code is 1 if a kernel
does not compile or takes too long; one that needs more than the card has is marked.
"""

from __future__ import annotations

import argparse
import copy
import subprocess
import sys
import time
from collections.abc import Sequence
from pathlib import Path
from types import SimpleNamespace
from typing import Any
from unittest import mock

HERE = Path(__file__).resolve().parent
sys.path[:] = [path for path in sys.path if Path(path).resolve() != HERE]  # else `rollout` would be a file here

import torch  # noqa: E402
import triton  # noqa: E402
from torch.utils._pytree import tree_map  # noqa: E402

# Compute capability, multiprocessors, and bytes of shared memory that a block may ask for.
CARDS = {"A100": (80, 108, 166912), "L4": (89, 58, 101376), "H100": (90, 132, 232448)}
FLEX = [f"{dtype} {widths}" for dtype in ("bfloat16", "float32") for widths in ("64/64", "128/128", "192/128")]
VOCABULARY, ROWS = 32768, 64
CUDA = torch.device("cuda", 0)


def pretend(card: str) -> None:
    """Tells torch and Triton that `card` is here, and has them compile kernels and say what they need."""
    import torch._higher_order_ops.flex_attention
    import torch._inductor.runtime.triton_heuristics
    import torch.nn.attention.flex_attention as flex
    from torch._dynamo.device_interface import CudaInterface
    from torch._inductor import config
    from torch._inductor.async_compile import AsyncCompile
    from torch._inductor.runtime import triton_helpers
    from triton.backends.compiler import GPUTarget

    capability, processors, shared = CARDS[card]
    properties = SimpleNamespace(
        **{"name": card, "major": capability // 10, "minor": capability % 10, "multi_processor_count": processors},
        **{"regs_per_multiprocessor": 65536, "max_threads_per_multi_processor": 2048, "max_threads_per_block": 1024},
        **{"warp_size": 32, "total_memory": 80 * 2**30, "shared_memory_per_block_optin": shared, "gcnArchName": ""},
    )
    torch.cuda.get_device_properties = lambda *_: properties
    torch.cuda.get_device_capability = lambda *_: divmod(capability, 10)
    torch._C._cuda_getCurrentRawStream = lambda _: 0
    CudaInterface.get_compute_capability = staticmethod(lambda *_: capability)
    CudaInterface.is_available = staticmethod(lambda: True)
    CudaInterface.current_device = staticmethod(lambda: 0)
    CudaInterface.get_device_properties = staticmethod(torch.cuda.get_device_properties)
    CudaInterface.Worker.get_device_properties = staticmethod(torch.cuda.get_device_properties)
    target = GPUTarget("cuda", capability, 32)
    triton.runtime.driver.set_active(SimpleNamespace(get_current_target=lambda: target))
    triton_helpers.set_driver_to_gpu = lambda: None
    flex._validate_device = lambda *_: None  # which knows no meta device
    sys.modules["torch._higher_order_ops.flex_attention"]._permute_strides = permuted  # which would copy on the card
    config.force_disable_caches, config.compile_threads = True, 1

    def compiled(_: Any, name: str, source: str, **__: Any) -> Any:
        from torch._inductor.async_compile import _load_triton_kernel_from_source

        kernel = _load_triton_kernel_from_source(name, source)
        needs, started = [], time.monotonic()
        for chosen in kernel.configs:
            meta = kernel._create_compile_meta(chosen)
            parts = kernel.fn, meta["signature"], meta["constants"], meta["configs"][0]
            options = kernel._create_compile_options(chosen, meta)
            result = triton.compile(triton.compiler.ASTSource(*parts), target=target, options=options)
            needs.append(result.metadata.shared)
        mark = "" if max(needs) <= shared else "  TOO LARGE"
        seconds = time.monotonic() - started
        print(f"    {name:60s} {max(needs):8,d} of {shared:,d} bytes, compiled in {seconds:.0f} s{mark}", flush=True)
        return SimpleNamespace(run=lambda *_, **__: None)

    AsyncCompile.triton = compiled


def permuted(out: torch.Tensor, strides: Sequence[int]) -> torch.Tensor:
    """The empty tensor in the order of `strides` that torch makes of `out`."""
    order = sorted(range(len(strides)), key=lambda axis: -strides[axis])
    empty = torch.empty([out.shape[axis] for axis in order], dtype=out.dtype, device=out.device)
    return empty.permute([order.index(axis) for axis in range(len(order))])


def lowered(graph: torch.fx.GraphModule, inputs: Sequence[Any]) -> Any:
    """Compiles a copy of a graph on the meta device for the card, and gives back the graph."""
    from torch._functorch.aot_autograd import make_boxed_func
    from torch._guards import detect_fake_mode
    from torch._inductor.compile_fx import compile_fx_inner

    fake = detect_fake_mode(inputs)

    def moved(value: Any) -> Any:
        if isinstance(value, torch.Tensor) and value.device.type == "meta":
            with fake:
                return torch.empty_strided(value.shape, value.stride(), dtype=value.dtype, device=CUDA)
        return CUDA if isinstance(value, torch.device) and value.type == "meta" else value

    there = copy.deepcopy(graph)
    for module in (part for part in there.modules() if isinstance(part, torch.fx.GraphModule)):
        for node in module.graph.nodes:
            node.args, node.kwargs = tree_map(moved, node.args), tree_map(moved, node.kwargs)
            node.meta |= {key: tree_map(moved, node.meta[key]) for key in ("val", "example_value") if key in node.meta}
        module.recompile()
    nothing = {name: lambda *_: 0 for name in ("current_device", "_exchange_device", "_maybe_exchange_device")}
    nothing |= {"get_rng_state": lambda *_: torch.zeros(1), "set_rng_state": lambda *_: None}
    with mock.patch.multiple(torch.cuda, is_available=lambda: True, **nothing):
        compile_fx_inner(there, [moved(value) for value in inputs])
    return make_boxed_func(graph.forward)


def backend(graph: torch.fx.GraphModule, inputs: Sequence[Any]) -> Any:
    from torch._functorch.aot_autograd import aot_module_simplified
    from torch._functorch.partitioners import min_cut_rematerialization_partition
    from torch._inductor.decomposition import select_decomp_table

    named = {"decompositions": select_decomp_table(), "partition_fn": min_cut_rematerialization_partition}
    return aot_module_simplified(graph, inputs, fw_compiler=lowered, bw_compiler=lowered, **named)


def work(card: str, name: str) -> None:
    pretend(card)
    if name == "sampling":
        from rollout.sampling import choose_by_keys

        def sample(logits: torch.Tensor, keys: torch.Tensor, positions: torch.Tensor) -> Any:
            return choose_by_keys(logits, keys, positions, 1.0, VOCABULARY, [])

        with torch.device("meta"), torch.no_grad():
            integers = torch.zeros(ROWS, 2, dtype=torch.int32), torch.zeros(ROWS, dtype=torch.int32)
            torch.compile(sample, backend=backend, dynamic=False)(torch.zeros(ROWS, VOCABULARY), *integers)
        return
    from torch.nn.attention.flex_attention import flex_attention

    from policies import attention, devices

    devices.has_cuda = lambda device: True  # the meta device takes its paths
    attention.kernel_options = lambda *_: {}  # torch's own tiles: whether they fit is what is asked
    dtype, key_width, value_width = name.replace("/", " ").split()
    attention.compile_friendly_flex_attention = torch.compile(flex_attention, backend=backend, dynamic=False)
    shape = 2, 8, 1024
    with torch.device("meta"):
        heads = [torch.empty(*shape, int(w), dtype=getattr(torch, dtype)) for w in (key_width, key_width, value_width)]
        packing = attention.Packing(torch.zeros(2, 1024, dtype=torch.long))
    out, _ = attention.packed_attention(*(head.requires_grad_() for head in heads), packing, 0.1)
    out.sum().backward()


def main() -> int:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--cards", nargs="+", choices=CARDS, default=list(CARDS))
    parser.add_argument("--work", nargs="+", choices=[*FLEX, "sampling"], default=[*FLEX, "sampling"])
    parser.add_argument("--minutes", type=float, default=20.0, help="for one kind of work, on a machine that is busy")
    parser.add_argument("--one", action="store_true", help=argparse.SUPPRESS)
    args = parser.parse_args()
    if args.one:
        work(args.cards[0], args.work[0])
        return 0
    failed = []
    for card in args.cards:
        for name in args.work:
            print(f"{card} (sm_{CARDS[card][0]}), {name}", flush=True)
            words = [sys.executable, __file__, "--one", "--cards", card, "--work", name]
            try:
                subprocess.run(words, check=True, timeout=60 * args.minutes)
            except (subprocess.CalledProcessError, subprocess.TimeoutExpired) as error:
                failed.append(f"{card}, {name}: {error}")
    print("\n".join(failed) or "everything compiled")
    return 1 if failed else 0


if __name__ == "__main__":
    sys.exit(main())
