"""Which devices there are and what each has, on a machine that has none: torch's answers are put in its place."""

from types import SimpleNamespace

import pytest
import torch

from grpo.cli.commands.machine import Memory
from grpo.config.policy import ModelOptions
from policies import devices
from policies.devices import device_of
from rewards.config.options import dump_yaml

NO_BFLOAT16 = {"is_bf16_supported": lambda emulated: emulated}
BFLOAT16 = {"is_bf16_supported": lambda emulated: True}


def test_auto_is_the_accelerator_whatever_it_is(accelerator):
    assert device_of("cpu").type == "cpu"
    for kind in ("cuda", "xpu", "mps"):
        accelerator(kind)
        assert device_of("auto") == torch.device(kind)
        assert device_of(f"{kind}:0") == torch.device(kind, 0)
        assert device_of("cpu").type == "cpu"


@pytest.mark.parametrize("name", ["cuda", "xpu:2", "mps", "gpu", "xpu:", "meta"])
def test_a_device_that_is_not_there_is_refused_with_those_that_are(accelerator, name):
    accelerator("xpu", 2)
    with pytest.raises(
        ValueError, match=rf"device={name}: there is no such device here; use cpu, xpu, xpu:0, xpu:1, or"
    ):
        device_of(name)


def test_without_an_accelerator_there_is_the_cpu(accelerator):
    accelerator("cpu", 0)
    assert device_of("auto") == torch.device("cpu")
    with pytest.raises(ValueError, match="device=cuda: there is no such device here; use cpu, or auto"):
        device_of("cuda")
    devices.empty_cache()
    devices.wait_for(torch.device("cpu"))
    assert (devices.names(), devices.peak_gib()) == ([], {})


@pytest.mark.parametrize(
    ("kind", "functions", "expected"),
    [
        ("cuda", BFLOAT16, "bfloat16"),
        ("cuda", NO_BFLOAT16, "float32"),  # a T4, for which torch emulates it
        ("mps", {}, "float32"),  # it does not say
        ("cpu", BFLOAT16, "float32"),
    ],
)
def test_the_precision_is_that_of_the_device_unless_it_is_named(accelerator, kind, functions, expected):
    accelerator(kind, **functions)
    options = ModelOptions()
    assert options.dtype == expected
    assert f"dtype: {expected}" in dump_yaml(options)
    assert ModelOptions(device="cpu").dtype == ModelOptions(device="nowhere").dtype == "float32"
    assert ModelOptions(dtype="float32").dtype == "float32"
    assert ModelOptions(dtype="bfloat16").dtype == "bfloat16"
    assert ModelOptions(dtype="auto").dtype == expected


def test_a_device_says_its_name_its_memory_and_its_peak(accelerator):
    properties = SimpleNamespace(name="Arc", total_memory=16 << 30)
    waited: list[torch.device] = []
    accelerator(
        "xpu",
        2,
        get_device_properties=lambda index: properties,
        max_memory_allocated=lambda: 3 << 30,
        synchronize=waited.append,
        empty_cache=lambda: waited.clear(),
        mem_get_info=lambda device: (1 << 30, 2 << 30),
        get_device_name=lambda device: "Arc",
    )
    assert devices.names() == ["Arc, 16 GiB"] * 2
    assert devices.peak_gib() == {"device": 3.0}
    devices.wait_for(torch.device("xpu:1"))
    assert waited == [torch.device("xpu:1")]
    devices.empty_cache()
    assert waited == []
    assert Memory.there(torch.device("xpu"), None) == ("memory of Arc", 2 << 30, 1 << 30, 2)
