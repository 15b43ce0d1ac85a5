"""The files for one GPU, as far as a CPU can try them: sizes, memory, and two steps of a small random policy."""

import json
import shutil
from pathlib import Path

import pytest

from grpo.cli.parse import main
from policies.anatomy import anatomy
from policies.checkpoint import read_config

ROOT = Path(__file__).parents[2]
FOLDER = ROOT / "docs/gpus"
DATA = ["--data.name", "word_problems", "--data.template", "{question}"]
CHATML = (
    "{% for message in messages %}<|im_start|>{{ message.role }}\n{{ message.content }}<|end|>\n{% endfor %}"
    "{% if add_generation_prompt %}<|im_start|>assistant\n{% endif %}"
)
GIB = {"qwen2.5_0.5b": "3.0", "qwen3_0.6b": "8.1"}  # as the page says


def test_the_architectures_have_the_published_sizes():
    """.49 B and .36 B without embeddings, .6 B and .44 B without, say the model cards."""
    sizes = {}
    for name in ("qwen2.5_0.5b", "qwen3_0.6b"):
        config = read_config(FOLDER / "architecture" / name)
        whole = anatomy(config, 0, context=1, lora_rank=1, lora_alpha=1.0).parameters
        sizes[name] = round(whole / 1e9, 2), round((whole - config.vocab_size * config.hidden_size) / 1e9, 2)
    assert sizes == {"qwen2.5_0.5b": (0.49, 0.36), "qwen3_0.6b": (0.6, 0.44)}


@pytest.mark.long
@pytest.mark.parametrize("name", GIB)
def test_a_file_fits_16_gib(name, monkeypatch, capsys, tmp_path):
    monkeypatch.chdir(tmp_path)
    words = ["train", str(FOLDER / f"{name}.yaml"), "--model", str(FOLDER / "architecture" / name), *DATA]
    assert main([*words, "--dry_run", "--device_gib", "16"]) == 0
    [line] = [line for line in capsys.readouterr().out.splitlines() if "at most, about" in line]
    assert f"{float(line.split()[-1]):.1f}" == GIB[name]


@pytest.mark.long
@pytest.mark.parametrize("name", ["qwen2.5_0.5b", "qwen3_0.6b"])
def test_a_file_is_rehearsed(name, model, monkeypatch, capsys, tmp_path):
    """With the chat template that the file asks for, and a small tokenizer, since the hub's is not here."""
    folder = tmp_path / "model"
    shutil.copytree(model, folder, ignore=shutil.ignore_patterns("*.safetensors*", "digests*"))
    architecture = json.loads((FOLDER / "architecture" / name / "config.json").read_text())
    # Enough for this tokenizer. The test of 16 GiB has the whole vocabulary.
    architecture |= {"vocab_size": 1024, "bos_token_id": None, "eos_token_id": 0}
    (folder / "config.json").write_text(json.dumps(architecture))
    (folder / "chat_template.jinja").write_text(CHATML)
    monkeypatch.chdir(tmp_path)
    words = [str(FOLDER / f"{name}.yaml"), "--model", str(folder), "--data.name", "word_problems", "--threads", "1"]
    code = main(["rehearse", *words])
    shown = capsys.readouterr()
    assert code == 0, shown.out + shown.err
    assert "second step of a random policy: " in shown.out
