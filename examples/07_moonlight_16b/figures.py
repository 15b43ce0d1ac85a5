"""The figures of README.md, as `--dry_run` computes them for a GPU; `python figures.py` writes them there."""

from pathlib import Path
from unittest.mock import patch

import torch
from transformers import AutoModelForCausalLM

from grpo.cli.commands import memory
from grpo.cli.commands.memory import MemoryOfRun
from grpo.config.mtp import MtpConfig
from grpo.config.run import TrainConfig
from policies.mtp import MTPHead
from policies.policy import read_config
from rewards.config.options import load

HERE = Path(__file__).parent
BEGIN, END = "<!-- figures.py writes from here -->\n", "<!-- to here -->\n"


def block() -> str:
    """The table of README.md and what the text beside it counts, in GiB, as on a GPU wherever this runs."""
    with patch.object(memory, "will_block", lambda dtype, device: False):
        return _block()


def _block() -> str:
    shape = read_config(HERE / "architecture")
    names = ("2_grpo_lora", "3_grpo_lora_workers", "4_grpo_full")
    lora, workers, spread = (load(TrainConfig, HERE / f"{name}.yaml", {}) for name in names)
    (head,) = MemoryOfRun(shape, True, load(MtpConfig, HERE / "1_mtp.yaml", {})).devices()
    alone = load(TrainConfig, HERE / "2_grpo_lora.yaml", {"learner.parallel.fsdp": None})
    (whole,) = MemoryOfRun(shape, True, alone).devices()
    rank_0, rank = MemoryOfRun(shape, True, lora).devices()
    learner, worker = MemoryOfRun(shape, True, workers).devices()
    first, other = MemoryOfRun(shape, True, spread).devices()
    (full,) = MemoryOfRun(shape, True, alone.model_copy(update={"lora": None})).devices()
    assert alone.lora is not None
    with_experts = alone.lora.model_copy(update={"targets": [*(alone.lora.targets or []), "experts"]})
    (experts,) = MemoryOfRun(shape, True, alone.model_copy(update={"lora": with_experts})).devices()
    with torch.device("meta"):
        trunk = sum(p.numel() for p in AutoModelForCausalLM.from_config(shape).parameters())
        mtp = sum(p.numel() for p in MTPHead(shape).parameters())
    rows = {
        "`1_mtp.yaml`: learner and sampler": (head, "one GPU of 80 GB; 48 GB leave little to spare"),
        "`2_grpo_lora.yaml`: rank 0, learner and sampler": (rank_0, "four GPUs of 80 GB"),
        "each of its three other ranks": (rank, "four GPUs of 80 GB; 48 GB might do"),
        "`3_grpo_lora_workers.yaml`: each of four ranks": (learner, "four GPUs of 80 GB; 48 GB might do"),
        "each of its four workers": (worker, "four GPUs of 80 GB; 48 GB might do"),
        "`4_grpo_full.yaml`: rank 0, learner and sampler": (first, "eight GPUs of 80 GB"),
        "each of its seven other ranks": (other, "eight GPUs of 80 GB; 48 GB might do"),
        "full updates in one process, AdamW in fp32": (full, "**no GPU**"),
    }
    lines = ["| GiB, from `--dry_run` | on one device | fits in theory |", "|---|---|---|"]
    lines += [f"| {name} | {_gib(device.peak)} | {fits} |" for name, (device, fits) in rows.items()]
    added = experts.publication - whole.publication
    each = whole.gradients + whole.moments + whole.reference
    said = {
        "full updates in one process": f"weights {_gib(full.weights)}, fp32 masters {_gib(full.masters)}, gradients "
        f"{_gib(full.gradients)}, moments {_gib(full.moments)}",
        "full updates on each of eight": f"weights {_gib(other.weights)}, fp32 masters {_gib(other.masters)}, "
        f"gradients {_gib(other.gradients)}, moments of 8 bits {_gib(other.moments)}, gathered by FSDP "
        f"{_gib(other.buffers + other.gathered)}, activations {_gib(other.activations)}",
        "adapters on the routed experts": f"{_gib(added)} more of W + ΔW at each publication",
        "a checkpoint of the LoRA run": f"{_gib(each)}, its `policy/` {_gib((trunk + mtp) * 2)}",
        "parameters": f"{trunk / 1e9:.2f} B, the draft head {mtp / 1e9:.2f} B",
    }
    return "\n".join([*lines, "", *(f"- {name}: {what}" for name, what in said.items())]) + "\n"


def written(text: str) -> str:
    """`text` of README.md with the block as it is computed now."""
    before, _, rest = text.partition(BEGIN)
    _, _, after = rest.partition(END)
    return f"{before}{BEGIN}{block()}{END}{after}"


def _gib(size: float) -> str:
    return f"{size / 2**30:.0f}"


if __name__ == "__main__":
    readme = HERE / "README.md"
    readme.write_text(written(readme.read_text(encoding="utf-8")), encoding="utf-8")
