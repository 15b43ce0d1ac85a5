"""What devices there are and what each of them has. Nothing else of quartet asks for an accelerator by its name."""

from __future__ import annotations

import torch
from torch import Tensor


def accelerator() -> torch.device:
    """Gives this machine's accelerator: cuda (ROCm's has that name too), xpu, mps; the CPU where there is none."""
    return torch.accelerator.current_accelerator(check_available=True) or torch.device("cpu")


def device_of(name: str) -> torch.device:
    """Gives the device that an option names; `auto` is the accelerator. Raises ValueError, with the devices that are
    there, for one that is not."""
    there = ["cpu"]
    if accelerator().type != "cpu":
        there += [accelerator().type, *(f"{accelerator().type}:{i}" for i in range(torch.accelerator.device_count()))]
    if name == "auto":
        return accelerator()
    if name not in there:
        raise ValueError(f"device={name}: there is no such device here; use {', '.join(there)}, or auto")
    return torch.device(name)


def has_cuda(device: torch.device) -> bool:
    """Tells whether a device has CUDA's own paths: flex attention that trains, torch's memory-efficient attention and
    recorded rounds. Others attend by dense products and decode eagerly, as nobody has tried these there."""
    return device.type == "cuda"


def has_bfloat16(device: torch.device) -> bool | None:
    """Tells whether a device computes in bfloat16 itself, where torch would emulate it; None where it does not say."""
    says = getattr(torch.get_device_module(device), "is_bf16_supported", None)
    return None if says is None or device.type == "cpu" else bool(says(False))


def precision(name: str) -> str:
    """Gives the precision that a device has where nobody has said one; float32 for one that is not there, which is
    refused elsewhere."""
    try:
        return "bfloat16" if has_bfloat16(device_of(name)) else "float32"
    except ValueError:
        return "float32"


def wide(tensor: Tensor) -> Tensor:
    """Gives the tensor in float64, on the CPU where its device has none."""
    return tensor.double() if has_float64(tensor.device) else tensor.cpu().double()


def has_float64(device: torch.device) -> bool:
    """Tells whether a device computes in float64: Apple's do not, nor do some of Intel's."""
    if device.type == "xpu":
        return bool(torch.xpu.get_device_properties(device).has_fp64)
    return device.type != "mps"


def wait_for(device: torch.device) -> None:
    """Waits until a device has done what it was told, so that a clock sees the work and not the launches."""
    if device.type == "mps":
        torch.mps.synchronize()
    elif device.type != "cpu":
        torch.get_device_module(device).synchronize(device)


def empty_cache() -> None:
    """Gives memory back to the accelerator, if there is one, that torch keeps for later tensors of this process."""
    if accelerator().type != "cpu":
        torch.get_device_module(accelerator()).empty_cache()


def peak_gib() -> float | None:
    """Gives the most memory that this process has held on the accelerator; None where none says so, as Apple's."""
    most = getattr(torch.get_device_module(accelerator()), "max_memory_allocated", None)
    return None if most is None else most() / 2**30


def names() -> list[str]:
    """Describes each accelerator of this machine, such as `NVIDIA H100, 80 GiB`; one that says nothing by its kind."""
    properties = getattr(torch.get_device_module(accelerator()), "get_device_properties", None)
    if properties is None:
        return [] if accelerator().type == "cpu" else [accelerator().type]
    each = [properties(index) for index in range(torch.accelerator.device_count())]
    return [f"{device.name}, {device.total_memory / 2**30:.0f} GiB" for device in each]
