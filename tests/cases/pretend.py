"""A pretend accelerator, for machines that have none: tensors on the device `pretend` are kept by the host, but they
behave as those of an accelerator do where a program can tell the difference.

Tensors of both devices do not mix, nothing but a copy brings a number to the host, and every operator that makes the
host wait is counted by the line that asked for it. An operator is about a launch of a kernel, and views are none.
`pytest -p pretend` installs it. It is slow, some 50 µs for each operator.
"""

from __future__ import annotations

import contextlib
import sys
from collections import Counter
from collections.abc import Callable, Iterator
from functools import cache
from pathlib import Path
from types import ModuleType, SimpleNamespace
from typing import Any

import pytest
import torch

NAME, ROOT = "pretend", Path(__file__).parents[2]
OPERATORS: Counter[str] = Counter()
WAITS: Counter[str] = Counter()  # synchronisations, by reason and line
NOT_HERE = 77  # the exit status where torch registers no device
CAPTURES: list[str] = []  # what is being captured: nothing may wait then
aten = torch.ops.aten
COPIES = (aten.copy_, aten._to_copy, aten._copy_from)
INDEXED = (aten.index, aten.index_put, aten.index_put_, aten._index_put_impl_, aten._unsafe_index)
WAITING = {
    getattr(aten, name)
    for name in (
        *("_local_scalar_dense", "nonzero", "masked_select", "bincount", "equal"),
        *("_unique2", "unique_dim", "unique_consecutive"),
    )
}
FREE = {
    "aten::detach",
    "aten::lift_fresh",
    "aten::alias",
    "aten::_unsafe_view",
    "aten::_local_scalar_dense",
}  # no kernel is launched
DEVICE_OF_GENERATOR: dict[int, str] = {}  # by its address


class DeviceTensor(torch.Tensor):
    """A tensor of the device. `host` holds its numbers."""

    host: torch.Tensor
    __torch_function__ = torch._C._disabled_torch_function_impl

    @staticmethod
    def __new__(cls: type[DeviceTensor], host: torch.Tensor) -> DeviceTensor:
        layout = {"strides": host.stride(), "storage_offset": host.storage_offset(), "dtype": host.dtype}
        made = torch.Tensor._make_wrapper_subclass(cls, host.shape, device=torch.device(NAME, 0), **layout)
        made.host = host
        return made

    def __repr__(self, **_: Any) -> str:
        return f"{NAME}({self.host!r})"

    def __reduce_ex__(self, protocol: Any) -> Any:
        wait("pickle")
        return _unpickled, (self.host.detach(), self.requires_grad)

    def __deepcopy__(self, memo: dict[int, Any]) -> torch.Tensor:
        memo[id(self)] = self.detach().clone().requires_grad_(self.requires_grad)
        return memo[id(self)]

    def data_ptr(self) -> int:
        return self.host.data_ptr()

    def untyped_storage(self) -> Any:
        return self.host.untyped_storage()

    def numpy(self, *, force: bool = False) -> Any:
        if not force:
            raise TypeError(f"can't convert {NAME}:0 device type tensor to numpy; use Tensor.cpu() first")
        return self.cpu().numpy()

    def tolist(self) -> Any:
        return self.cpu().tolist()

    def __array__(self, *_: Any) -> Any:
        return self.numpy()

    @classmethod
    def __torch_dispatch__(cls, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        return run(func, args, kwargs or {})


def _unpickled(host: torch.Tensor, requires_grad: bool) -> torch.Tensor:
    return DeviceTensor(host).requires_grad_(requires_grad)


def wait(why: str) -> None:
    """Counts a synchronisation, for the innermost line of the project; tests count where nothing else asks."""
    if CAPTURES:
        raise RuntimeError(f"operation not permitted when stream is capturing {CAPTURES[-1]}: {why}")
    frame, test = sys._getframe(1), "elsewhere"
    while frame.f_back:
        frame = frame.f_back
        if file := of_project(frame.f_code.co_filename):
            where = f"{file}:{frame.f_lineno}"
            if not file.startswith("tests"):
                break
            test = where
    else:
        where = test
    WAITS[f"{why} at {where}"] += 1


@cache
def of_project(file: str) -> str:
    """Gives the path of a file of the project, and nothing for others."""
    path = Path(file)
    ours = path.is_relative_to(ROOT) and path != Path(__file__) and "site-packages" not in path.parts
    return str(path.relative_to(ROOT)) if ours else ""


def refuse(name: str, what: str) -> None:
    raise RuntimeError(f"expected all tensors to be on the same device, but {name} got {what} besides {NAME}:0")


def tensors_of(values: Any) -> Iterator[torch.Tensor]:
    for value in values:
        if isinstance(value, torch.Tensor):
            yield value
        elif isinstance(value, list | tuple):
            yield from tensors_of(value)


def check(func: Any, args: Any, kwargs: dict[str, Any]) -> None:
    """Refuses tensors of the host among those of the device, and counts what makes the host wait."""
    packet, tensors = func.overloadpacket, list(tensors_of((*args, *kwargs.values())))
    here = [isinstance(x, DeviceTensor) for x in tensors]
    if packet in COPIES:
        to_device = here[0] if packet is aten.copy_ else torch.device(kwargs.get("device") or NAME).type == NAME
        if here[-1] != to_device:
            wait("copy to the host" if here[-1] else "copy to the device")
    elif packet in INDEXED:
        indices = [index for index in args[1] if index is not None]
        values = list(args[2:3])
        if not here[0]:
            refuse(func.name(), "a tensor of the host that is indexed")
        if any(value.dim() and not isinstance(value, DeviceTensor) for value in values):
            refuse(func.name(), "values of the host")
        as_mask = bool(values) and len(indices) == 1 and not values[0].dim()  # one number into the places of a mask
        if any(not isinstance(index, DeviceTensor) for index in indices):
            wait("index of the host")
        elif any(index.dtype == torch.bool for index in indices) and not as_mask:
            wait("boolean index")
    elif any(here):
        for x, mine in zip(tensors, here, strict=True):
            if x.dim() and not mine:
                refuse(func.name(), f"a tensor of the {x.device.type} of shape {list(x.shape)}")
        sized = kwargs.get("output_size") is not None
        if packet in WAITING or (packet is aten.repeat_interleave and not sized):
            wait(func.name().removeprefix("aten::"))
    generator = kwargs.get("generator")
    if generator is not None and DEVICE_OF_GENERATOR.get(generator._cdata, "cpu") != NAME:
        raise RuntimeError(f"expected a '{NAME}' device type for generator but found 'cpu'")


@cache
def facts(func: Any) -> tuple[bool, list[str], list[str], bool]:
    """Tells of an operator whether it gives views, which arguments it writes, the names of all, and whether it counts
    as one."""
    schema = func._schema
    aliases = [result.alias_info for result in schema.returns if result.alias_info is not None]
    written = [a.name for a in schema.arguments if a.alias_info is not None and a.alias_info.is_write]
    is_view = any(not alias.is_write for alias in aliases)
    counts = not is_view and schema.name not in FREE and "empty" not in schema.name
    return is_view, written if aliases else [], [argument.name for argument in schema.arguments], counts


def bare(x: Any) -> Any:
    if isinstance(x, DeviceTensor):
        return x.host
    return type(x)(map(bare, x)) if isinstance(x, list | tuple) else x


def dressed(x: Any) -> Any:
    if isinstance(x, torch.Tensor):
        return DeviceTensor(x)
    return type(x)(map(dressed, x)) if isinstance(x, list | tuple) else x


def run(func: Any, args: Any, kwargs: dict[str, Any]) -> Any:
    """Checks, counts and computes an operator, on what the host holds."""
    inference = torch.is_inference_mode_enabled()
    if inference and func is not aten.rms_norm.default:  # which takes no composite operator apart; this is one kernel
        apart = func.decompose(*args, **kwargs)
        if apart is not NotImplemented:
            return apart
    check(func, args, kwargs)
    device = kwargs.get("device")
    on_host = {name: bare(value) for name, value in kwargs.items()} | ({} if device is None else {"device": "cpu"})
    on_host.pop("pin_memory", None)
    if func is aten.histc.default:  # which a CPU does not have for integers
        out = func(args[0].host.float(), *args[1:]).to(args[0].dtype)
    else:
        out = func(*bare(args), **on_host)
    is_view, written, names, counts = facts(func)
    if counts:
        OPERATORS[func._schema.name] += 1
    if device is not None and torch.device(device).type == "cpu":
        return out
    if written and not is_view:  # in place, or `out`: the results are those arguments
        given = dict(zip(names, args, strict=False)) | kwargs
        results = [given[name] for name in written]
        if any(isinstance(x, DeviceTensor) and x.shape != x.host.shape for x in results):
            raise NotImplementedError(f"{func.name()} resizes a tensor of the pretend accelerator")
        return results[0] if len(results) == 1 else tuple(results)
    if is_view and inference and not args[0].is_inference():  # a view of a weight is none that inference has made
        with torch.inference_mode(False):
            return dressed(out)
    return dressed(out)


def factory(func: Any) -> Callable[..., Any]:
    def make(*args: Any, **kwargs: Any) -> Any:
        return run(func, args, kwargs)

    return make


def copy_from(source: torch.Tensor, target: torch.Tensor, non_blocking: bool = False) -> torch.Tensor:
    return run(aten.copy_.default, (target, source), {})


def by_products(
    query: Any, key: Any, value: Any, mask: Any = None, dropout: float = 0.0, *rest: Any, **more: Any
) -> Any:
    """Attends by products. Their kernel adds a mask to the scores, so that one of booleans is made such a mask."""
    if mask is not None and mask.dtype == torch.bool:
        mask = torch.zeros_like(mask, dtype=query.dtype).masked_fill_(~mask, -torch.inf)
    return aten._scaled_dot_product_attention_math(query, key, value, mask, dropout, *rest, **more)[0]


def flex(
    query: Any, key: Any, value: Any, training: bool = False, *, block_mask: Any, scale: float, **more: Any
) -> Any:
    """Attends as flex attention does, without compiling it."""
    sizes = (query.shape[0], 1, query.shape[2], key.shape[2])
    b, h, q, k = (torch.arange(size, device=query.device) for size in sizes)
    visible = block_mask.mask_mod(b[:, None, None, None], h[:, None, None], q[:, None], k)
    shared = query.shape[1] // key.shape[1]
    if shared > 1:
        key, value = (x[:, :, None].expand(-1, -1, shared, -1, -1).flatten(1, 2) for x in (key, value))
    scores = (query.float() @ key.float().transpose(2, 3) * scale).masked_fill(~visible, -torch.inf)
    out, total = (scores.softmax(-1) @ value.float()).to(query.dtype), scores.logsumexp(-1)
    if more.get("return_aux") is not None:
        return out, SimpleNamespace(lse=total)
    return (out, total) if more.get("return_lse") else out


@contextlib.contextmanager
def counted() -> Iterator[SimpleNamespace]:
    """Counts what happens inside: `operators` by name, and `waits` by reason and line."""
    operators, waits, counts = OPERATORS.copy(), WAITS.copy(), SimpleNamespace()
    yield counts
    counts.operators, counts.waits = OPERATORS - operators, WAITS - waits


def install() -> None:
    """Makes the device known to torch and to what reads its name. Raises where torch lets nobody register one."""
    from torch.utils.backend_registration import _setup_privateuseone_for_python_backend

    module = ModuleType(f"torch.{NAME}")
    always = {"is_available": True, "is_initialized": True, "_is_in_bad_fork": False, "device_count": 1}
    always |= {"current_device": 0, "memory_allocated": 0, "max_memory_allocated": 0, "is_bf16_supported": True}
    for name, value in always.items():
        setattr(module, name, lambda *_, value=value: value)
    properties = SimpleNamespace(name="a pretend accelerator", total_memory=2**36)
    module.get_device_properties = lambda *_: properties
    for name in ("manual_seed_all", "manual_seed", "set_device", "empty_cache", "set_rng_state"):
        setattr(module, name, lambda *_: None)
    module.synchronize = lambda *_: wait("synchronize")
    module.get_rng_state = lambda *_: torch.get_rng_state()
    module.get_amp_supported_dtype = lambda: [torch.bfloat16]
    _setup_privateuseone_for_python_backend(NAME, backend_module=module)
    library = torch.library.Library("aten", "IMPL")
    for schema in torch._C._jit_get_all_schemas():
        names = [argument.name for argument in schema.arguments]
        tensors = any("Tensor" in str(argument.type) for argument in schema.arguments)
        packet = getattr(aten, schema.name.removeprefix("aten::"), None) if schema.name.startswith("aten::") else None
        if packet and "device" in names and not tensors and "out" not in names and len(schema.returns) == 1:
            func = getattr(packet, schema.overload_name or "default")
            library.impl(func, factory(func), "PrivateUse1")
    # torch.tensor(..., device=...) copies below the keys of Python.
    library.impl("_copy_from", copy_from, "PrivateUse1")
    for func in (aten.copy_.default, aten.view.default, aten.as_strided.default, aten.fill_.Scalar, aten.zero_.default):
        library.impl(func, factory(func), "PrivateUse1")
    library.impl("_local_scalar_dense", factory(aten._local_scalar_dense.default), "PrivateUse1")
    for key in ("AutogradPrivateUse1", "PrivateUse1"):
        library.impl("scaled_dot_product_attention", by_products, key)
    KEPT.append(library)

    class Generator(torch.Generator):
        def __new__(cls, device: Any = "cpu") -> Any:
            made = super().__new__(cls, "cpu")
            DEVICE_OF_GENERATOR[made._cdata] = torch.device(device).type
            return made

        def __init__(self, device: Any = "cpu") -> None:
            pass

    torch.Generator = Generator


KEPT: list[Any] = []  # a library that goes away takes its operators along


def pytest_configure() -> None:
    try:
        install()
    except Exception as error:  # torch calls the registration experimental
        pytest.exit(f"torch {torch.__version__} registers no pretend accelerator: {error}", returncode=NOT_HERE)
    import transformers.integrations.flex_attention as integration

    import policies.attention
    from rollout.compiled import rounds
    from rollout.compiled.graph import Round

    integration.compile_friendly_flex_attention = flex
    policies.attention.compile_friendly_flex_attention = flex
    rounds.can_compile = lambda decoder, params: params.compiled and decoder.graphs is not None
    forward = Round.forward

    def captured(self: Round, *flat: torch.Tensor) -> tuple[torch.Tensor, ...]:
        """Runs a round as a recording of a graph does: nothing may wait for the device."""
        CAPTURES.append("a round")
        try:
            return forward(self, *flat)
        finally:
            CAPTURES.pop()

    Round.forward = captured


def pytest_terminal_summary(terminalreporter: Any) -> None:
    terminalreporter.write_line(f"{sum(OPERATORS.values())} operators, {sum(WAITS.values())} synchronisations")
