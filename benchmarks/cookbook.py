"""Recipes of the Tinker cookbook, as its package ships them, against `quartet serve --train`.

    python -m benchmarks.cookbook rl_loop --model FOLDER --steps 10

runs `tinker_cookbook.recipes.rl_loop` with another model and other data: the name of the model is a folder, its chat is
written as ROLE: TEXT, and `datasets.load_dataset` gives what is on this machine, GSM8K where it is there and word
problems elsewhere. The recipe's default loss, stable_reinforce, has no published formula; `--loss` names another.
"""

from __future__ import annotations

import argparse
import importlib
import json
import os
import sys
import time
from pathlib import Path
from typing import Any

WORDS = 512  # word problems, where there is no GSM8K


def rows(kind: str) -> list[dict[str, str]]:
    """Questions with worked answers that end in `#### NUMBER`."""
    folder = os.environ.get("QUARTET_GSM8K")
    if kind == "gsm8k" and folder:
        return [json.loads(line) for line in (Path(folder) / "train.jsonl").read_text().splitlines()]
    from rewards.data.word_problems import word_problems

    return [{name: row[name] for name in ("question", "answer")} for row in word_problems("train", [1], count=WORDS)]


def local_data(kind: str) -> Any:
    """What stands in for `datasets.load_dataset`: the columns of GSM8K, and chats of them."""
    from datasets import Dataset, DatasetDict

    def load_dataset(*names: str) -> DatasetDict:
        found = rows(kind)
        chats = [
            [{"role": "user", "content": row["question"]}, {"role": "assistant", "content": row["answer"]}]
            for row in found
        ]
        columns = {name: [row[name] for row in found] for name in ("question", "answer")} | {"messages": chats}
        return DatasetDict({"train": Dataset.from_dict(columns)})

    return load_dataset


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("recipe", choices=["rl_loop", "sl_loop"])
    parser.add_argument("--model", required=True, help="the folder that is served")
    parser.add_argument("--steps", type=int, default=10)
    parser.add_argument("--loss", default="importance_sampling")
    parser.add_argument("--data", choices=["gsm8k", "words"], default="gsm8k")
    parser.add_argument("--renderer", default="role_colon")
    parser.add_argument("--folder", help="by default a new one in runs/cookbook; in a former one the recipe resumes")
    parser.add_argument("options", nargs="*", help="of the recipe's Config, such as batch_size=8")
    args = parser.parse_intermixed_args()
    for name in ("TINKER_BASE_URL", "TINKER_API_KEY"):
        if name not in os.environ:
            parser.error(f"{name} is not set; `quartet serve --train FOLDER` prints it when it listens")
    folder = args.folder or f"runs/cookbook/{args.recipe}-{time.strftime('%Y%m%d-%H%M%S')}"
    import datasets
    from tinker_cookbook import model_info

    datasets.load_dataset = local_data(args.data)
    model_info.get_recommended_renderer_name = lambda name: args.renderer
    recipe = importlib.import_module(f"tinker_cookbook.recipes.{args.recipe}")
    changes: dict[str, Any] = {"model_name": args.model, "log_path": folder, "max_steps": args.steps}
    if args.recipe == "rl_loop":
        changes["loss_fn"] = args.loss
    for option in args.options:
        name, _, value = option.partition("=")
        changes[name] = json.loads(value)
    recipe.main(recipe.Config(**changes))
    path = Path(folder) / "metrics.jsonl"
    lines = [json.loads(line) for line in path.read_text().splitlines()]
    name = "reward/total" if args.recipe == "rl_loop" else "train_mean_nll"
    print(f"{name}: " + " ".join(f"{line[name]:.3f}" for line in lines), file=sys.stderr)


if __name__ == "__main__":
    main()
