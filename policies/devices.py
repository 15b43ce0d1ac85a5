"""What devices there are and what each of them has. Nothing else of quartet asks for an accelerator by its name."""

from __future__ import annotations

from collections.abc import Sequence

import torch
from torch import Tensor


def device_of(name: str = "auto") -> torch.device:
    """Gives the device that an option names. `auto` is this machine's accelerator: cuda (ROCm's has this name too),
    xpu, mps; the CPU where there is none. Raises ValueError, with the devices that are there, for one that is not."""
    best = torch.accelerator.current_accelerator(check_available=True) or torch.device("cpu")
    numbered = [f"{best.type}:{i}" for i in range(torch.accelerator.device_count())]
    there = dict.fromkeys(["cpu", best.type, *numbered])
    if name not in there and name != "auto":
        raise ValueError(f"device={name}: there is no such device here; use {', '.join(there)}, or auto")
    return best if name == "auto" else torch.device(name)


def has_cuda(device: torch.device) -> bool:
    """Tells whether a device has CUDA's own paths: flex attention that trains, torch's memory-efficient attention and
    recorded rounds. Others attend by dense products and decode eagerly, as nobody has tried these there."""
    return device.type == "cuda"


def has_bfloat16(device: torch.device) -> bool | None:
    """Tells whether an accelerator computes in bfloat16 itself, where torch would emulate it; None: it does not say."""
    says = getattr(torch.get_device_module(device), "is_bf16_supported", None)
    return None if says is None or device.type == "cpu" else bool(says(False))


def has_float64(device: torch.device) -> bool:
    """Tells whether a device computes in float64: Apple's do not, nor do some of Intel's."""
    return device.type != "mps" and (device.type != "xpu" or torch.xpu.get_device_properties(device).has_fp64)


def wide(tensor: Tensor) -> Tensor:
    """Gives the tensor in float64, on the CPU where its device has none."""
    return (tensor if has_float64(tensor.device) else tensor.cpu()).double()


def send(tensors: Sequence[Tensor], device: torch.device | str) -> list[Tensor]:
    """Sends tensors of the host to a device in one copy, since each one waits for it."""
    target = torch.device(device)
    if target.type == "cpu":
        return list(tensors)
    return _in_one(tensors, target)


def fetch(tensors: Sequence[Tensor]) -> list[Tensor]:
    """Brings tensors of one device to the host in one copy, since each one waits for it."""
    if all(tensor.device.type == "cpu" for tensor in tensors):
        return [tensor.detach() for tensor in tensors]
    return _in_one([tensor.detach() for tensor in tensors], torch.device("cpu"))


def _in_one(tensors: Sequence[Tensor], device: torch.device) -> list[Tensor]:
    """Copy tensors to a device as one, wide entries first, so that each begins at a multiple of its width."""
    if len(tensors) == 1:
        return [tensors[0].to(device)]
    order = sorted(range(len(tensors)), key=lambda number: -tensors[number].itemsize)
    whole = torch.cat([tensors[number].contiguous().flatten().view(torch.uint8) for number in order]).to(device)
    parts = whole.split([tensors[number].numel() * tensors[number].itemsize for number in order])
    copies: dict[int, Tensor] = {}
    for number, part in zip(order, parts, strict=True):
        copies[number] = part.view(tensors[number].dtype).view(tensors[number].shape)
    return [copies[number] for number in range(len(tensors))]


def wait_for(device: torch.device) -> None:
    """Waits until a device has done what it was told, so that a clock sees the work and not the launches."""
    if device.type == "mps":
        torch.mps.synchronize()
    elif device.type != "cpu":
        torch.get_device_module(device).synchronize(device)


def empty_cache() -> None:
    """Gives back what torch keeps of the accelerator's memory for later tensors of this process."""
    getattr(torch.get_device_module(device_of()), "empty_cache", lambda: None)()


def peak_gib() -> dict[str, float]:
    """Gives the most memory that this process has held on the `device`; nothing where none says so, as Apple's."""
    most = getattr(torch.get_device_module(device_of()), "max_memory_allocated", None)
    return {} if most is None else {"device": most() / 2**30}


def names() -> list[str]:
    """Describes each accelerator of this machine, such as `NVIDIA H100, 80 GiB`; Apple's by its kind alone."""
    properties = getattr(torch.get_device_module(device_of()), "get_device_properties", None)
    each = map(properties, range(torch.accelerator.device_count())) if properties else ()
    kind = [] if properties or device_of().type == "cpu" else [device_of().type]
    return kind + [f"{device.name}, {device.total_memory / 2**30:.0f} GiB" for device in each]
