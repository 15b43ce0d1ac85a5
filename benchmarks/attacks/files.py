"""What do a hostile model folder and a damaged run folder cost before they are refused? One process for each attack.

    python benchmarks/attacks/files.py [--tree ANOTHER_CHECKOUT]

The folder `good` shows what a command costs that is not attacked. Each attack changes one file of such a folder.
"""

from __future__ import annotations

import argparse
import json
import os
import shutil
import subprocess
import sys
import tempfile
from collections.abc import Iterator, Sequence
from pathlib import Path

from measure import TREE, table

MAKE = """
import sys
from policies import presets
from transformers import GPT2Config
policy = presets.build("tiny", ["2 + 3 = 5"] * 10, 0)
policy.tokenizer.chat_template = "{% for m in messages %}{{ m.content }}\\n{% endfor %}"
policy.save(sys.argv[1])
"""
DEEP = '{"x": ' + "[" * 100_000 + "]" * 100_000 + "}"
RUN = Path("tests/cases/run_to_view")
MANY = 10**9
OTHERS = {
    "qwen3_moe": {"num_experts": MANY, "num_hidden_layers": 2},
    "mixtral": {"num_local_experts": MANY, "num_hidden_layers": 2},
    "llama": {"num_hidden_layers": MANY},
    "qwen3": {"num_hidden_layers": 10**8, "use_sliding_window": True},
    "gemma3": {"text_config": {"model_type": "gemma3_text", "num_hidden_layers": 10**8}},
    "gpt2": {"n_layer": MANY},
}
FIELDS = {
    "n_routed_experts": MANY,
    "num_hidden_layers": MANY,
    "num_nextn_predict_layers": MANY,
    "vocab_size": 10**13,
    "hidden_size": 10**12,
    "num_attention_heads": MANY,
    "max_position_embeddings": 10**15,
    "num_labels": 10**8,
    "n_shared_experts": 10**15,
}
TEMPLATES = {
    "nested loops": "{% for a in range(99999) %}{% for b in range(99999) %}{% for c in range(99999) %}{% endfor %}"
    "{% endfor %}{% endfor %}",
    "10 GB of text": "{{ 'a' * 10**10 }}",
    "a power": "{{ 9 ** (9 ** 9) }}",
    "a width": "{{ 'a'.ljust(10**10) }}",
    "doubling": "{% set n = namespace(s='a') %}{% for i in range(40) %}{% set n.s = n.s ~ n.s %}{% endfor %}{{ n.s }}",
    "only for another message": "{% if messages[0].content == 'dear' %}{{ 'a' * 10**10 }}{% endif %}x",
    "100,000 brackets": "{{ " + "(" * 100_000 + "1" + ")" * 100_000 + " }}",
    "100 MB of text for each message": "{{ 'a' * 10**8 }}",
}


def attacks(good: Path, folder: Path) -> Iterator[tuple[str, Sequence[str]]]:
    def changed(name: str, file: str, text: str) -> str:
        model = folder / name.replace(" ", "-").replace(",", "").replace("=", "-")
        shutil.copytree(good, model)
        (model / file).write_text(text)
        return str(model)

    config = json.loads((good / "config.json").read_text())
    inspect, sample = ("-m", "grpo", "policy", "inspect"), ("-m", "grpo", "sample", "--prompt", "dear")
    plain, chat = ("--data.template", "{question}"), ("--data.template", "chat", "--rollout.max_completion_tokens", "4")
    yield "good, inspect", [*inspect, str(good)]
    yield "good, sample", [*sample, str(good), *chat]
    for field, value in FIELDS.items():
        model = changed(field, "config.json", json.dumps(config | {field: value}))
        yield f"{field}={value:.0e}", [*sample, model, *plain]
    yield "n_routed_experts=1e9, inspect", [*inspect, str(folder / "n_routed_experts")]
    for kind, fields in OTHERS.items():
        model = changed(kind, "config.json", json.dumps({"model_type": kind} | fields))
        yield f"{kind} with {json.dumps(fields)[:60]}", [*inspect, model]
    for file in ("config.json", "tokenizer_config.json", "tokenizer.json", "generation_config.json"):
        yield f"100,000-deep {file}", [*sample, changed(f"deep {file}", file, DEEP), *plain]
    index = changed("deep index", "model.safetensors.index.json", DEEP)
    os.unlink(Path(index, "model.safetensors"))
    yield "100,000-deep index", [*sample, index, *plain]
    yield "config.json of 300 MB", [*inspect, changed("large", "config.json", json.dumps({"x": "y" * 300_000_000}))]
    for name, template in TEMPLATES.items():
        yield f"template: {name}", [*sample, changed(name, "chat_template.jinja", template), *chat]


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--tree", type=Path, default=TREE, help="the checkout that is attacked")
    parser.add_argument("--only", default="", help="part of the name of an attack")
    args = parser.parse_args()
    with tempfile.TemporaryDirectory() as folder:
        good = Path(folder, "good")
        variables = os.environ | {"PYTHONPATH": str(args.tree)}
        subprocess.run([sys.executable, "-c", MAKE, str(good)], cwd=args.tree, env=variables, check=True)
        table((row for row in attacks(good, Path(folder)) if args.only in row[0]), args.tree)


if __name__ == "__main__":
    main()
