"""Datasets and models under the names that TRL's scripts load, made here: a script runs in a folder that holds them.

A relative folder is taken before the hub is asked. Columns and forms of the rows are those of the real datasets.
"""

import json
from collections.abc import Callable
from pathlib import Path
from typing import Any

MODELS = ("Qwen/Qwen3-0.6B", "Qwen/Qwen3-1.7B", "Qwen/Qwen3-4B", "Qwen/Qwen2.5-0.5B-Instruct", "Qwen/Qwen2.5-7B")
MODELS += ("Qwen/Qwen2-0.5B", "Qwen/Qwen2.5-72B", "Qwen/Qwen2.5-VL-3B-Instruct")
MARKS = ["<|endoftext|>", "<|im_start|>", "<|im_end|>", "<tool_call>", "</tool_call>", "<think>", "</think>"]
SERVERS = ("browsergym_env", "carla_env", "echo_env", "openspiel_env", "textarena_env")
STAND_IN = "from unittest.mock import MagicMock\n\n\ndef __getattr__(name):\n    return MagicMock()\n"


def _user(text: str) -> list[dict[str, str]]:
    return [{"role": "user", "content": text}]


def _of_mathematics(count: int) -> list[dict[str, Any]]:
    rows = []
    for number in range(count):
        problem, total = f"What is {number} plus {3 * number}?", 4 * number
        rows.append({"problem": problem, "solution": f"They make $\\boxed{{{total}}}$.", "messages": _user(problem)})
    return rows


def _questions() -> dict[str, list[dict[str, Any]]]:
    mathematics = _of_mathematics(400)
    deep = [{"prompt": row["messages"], "solution": f"${4 * i}$"} for i, row in enumerate(mathematics)]
    words = [{"question": row["problem"], "answer": f"I add them.\n#### {4 * i}"} for i, row in enumerate(mathematics)]
    traces = [{**row, "prompt": row["messages"], "answer": str(4 * i)} for i, row in enumerate(mathematics)]
    genes = [{"question": f"Does the gene G{i} interact?", "answer": "Yes" if i % 2 else "No"} for i in range(40)]
    return {
        "trl-lib/DeepMath-103K": deep,
        "AI-MO/NuminaMath-TIR": mathematics,
        "openai/gsm8k": words,
        "HuggingFaceH4/OpenR1-Math-220k-default-verified": traces,
        "qgallouedec/biogrid": [{"Official Symbol Interactor A": f"G{i}"} for i in range(40)],
        "qgallouedec/biogrid_qa": genes,
    }


def write_hub(folder: Path, hf_policy: Callable[..., Any], templates: Path) -> None:
    """Writes all of them below `folder`, and modules that take the place of the clients of environments' servers."""
    for name, rows in _questions().items():
        place = folder / name
        place.mkdir(parents=True)
        for split in ("train", "test"):
            lines = "".join(json.dumps(row) + "\n" for row in rows)
            (place / f"{split}.jsonl").write_text(lines)
        if name == "openai/gsm8k":
            parts = [f"{{split: {split}, path: {split}.jsonl}}" for split in ("train", "test")]
            (place / "README.md").write_text(
                f"---\nconfigs:\n- config_name: main\n  data_files: [{', '.join(parts)}]\n---\n"
            )
    _write_pictures(folder / "lmms-lab/multimodal-open-r1-8k-verified")
    for name in MODELS:
        template = templates / ("qwen3.jinja" if "Qwen3" in name else "qwen2_5.jinja")
        _write_model(folder / name, hf_policy, template.read_text())
    for name in (*SERVERS, "openenv", "openenv/core", "openenv/core/containers", "openenv/core/containers/runtime"):
        (folder / "servers" / name).mkdir(parents=True)
        (folder / "servers" / name / "__init__.py").write_text(STAND_IN)
    for name in SERVERS:
        (folder / "servers" / name / "models.py").write_text(STAND_IN)


def _write_pictures(folder: Path) -> None:
    from datasets import Dataset
    from PIL import Image

    rows = [{**row, "image": Image.new("RGB", (32, 32))} for row in _of_mathematics(240)]
    folder.mkdir(parents=True)
    Dataset.from_list(rows).to_parquet(folder / "train.parquet")


def _write_model(folder: Path, hf_policy: Callable[..., Any], chat_template: str) -> None:
    vocabulary = hf_policy("qwen3").tokenizer
    vocabulary = type(vocabulary)(tokenizer_object=vocabulary._tokenizer)  # not the one that all tests share
    vocabulary.add_special_tokens({"additional_special_tokens": MARKS})
    vocabulary.eos_token, vocabulary.pad_token, vocabulary.chat_template = "<|im_end|>", "<|endoftext|>", chat_template
    stop, size = vocabulary.convert_tokens_to_ids("<|im_end|>"), len(vocabulary)
    policy = hf_policy("qwen3", vocab_size=size, max_position_embeddings=40_960, eos_token_id=stop)
    policy.trunk.save_pretrained(folder)
    vocabulary.save_pretrained(folder)
