"""Runs a script up to its GRPOTrainer, without loading a model, and writes down what the trainer was to be made of.

`python recorder.py FACTS.json FOLDER SCRIPT ARGUMENTS...` is a process of its own, and this file imports nothing of
ours. The script's models are stand-ins with a name, and its trainer ends the process.
"""

from __future__ import annotations

import dataclasses
import functools
import inspect
import json
import os
import re
import runpy
import sys
from collections.abc import Callable
from enum import Enum
from itertools import islice
from pathlib import Path
from typing import TYPE_CHECKING, Any
from unittest.mock import MagicMock

if TYPE_CHECKING:
    from datasets import Dataset, DatasetDict
    from peft import PeftConfig
    from transformers import PreTrainedTokenizerBase
    from trl import GRPOTrainer

MOST_STREAMED = 10_000  # rows of a stream that are written
SOLUTIONS = ("answer", "solution", "ground_truth", "gold", "target", "label", "completion")  # columns, the best first
GOLD = "gold_text"
facts: dict[str, Any] = {}  # what will be written
hub_sources: dict[str, dict[str, Any]] = {}  # what was loaded from the hub, by the fingerprint of its rows


class Model(MagicMock):
    """Stands for a model that the script loads: it has its name and the arguments, and takes every call."""


def model_of(_: type, pretrained_model_name_or_path: object, *__: object, **arguments: object) -> Model:
    """Takes the place of `from_pretrained`."""
    model = Model(name="model")
    model.name_or_path = str(pretrained_model_name_or_path)
    for same in (model.to, model.cuda, model.eval, model.train):
        same.return_value = model
    model.record = {"name": model.name_or_path, "arguments": plain(arguments), "lora": None}
    return model


def plain(value: object) -> Any:
    """Gives the value as JSON holds it; what it cannot hold is its text."""
    if isinstance(value, Enum):
        return plain(value.value)
    if isinstance(value, dict):
        return {str(key): plain(item) for key, item in value.items()}
    if isinstance(value, list | tuple | set):
        return [plain(item) for item in (sorted(value, key=str) if isinstance(value, set) else value)]
    if value is None or isinstance(value, bool | int | float | str):
        return value
    if hasattr(value, "to_dict") and not isinstance(value, MagicMock):  # a configuration
        return plain(value.to_dict())
    return getattr(value, "__qualname__", None) or str(value).removeprefix("torch.")


# ---- what the script calls -------------------------------------------------------------------------------------------


def replace_trl() -> None:
    """Puts stand-ins where a script finds the trainer and its models, and lets the configuration note its values."""
    import datasets
    import peft
    import transformers
    import trl
    from transformers.models.auto import modeling_auto
    from trl.trainer import grpo_config, grpo_trainer

    note_values(grpo_config.GRPOConfig)
    transformers.training_args.is_torch_bf16_gpu_available = lambda: True  # it is read where it will not train
    recorder = trainer_class(grpo_trainer.GRPOTrainer)
    for module in (trl, trl.trainer, grpo_trainer):
        module.GRPOTrainer = recorder  # type: ignore[attr-defined]
    automatic = [value for name, value in vars(modeling_auto).items() if name.startswith("AutoModel")]
    for owner in (*automatic, transformers.PreTrainedModel):
        owner.from_pretrained = classmethod(model_of)
    peft.get_peft_model = with_adapters
    datasets.load_dataset = note_source(datasets.load_dataset)


def note_values(config: Any) -> None:
    """Keeps the values of a configuration as they were written, before it derives others from them. Options of other
    versions of TRL are kept apart, and what it refuses is noted, since another machine may be meant."""
    make, finish = config.__init__, config.__post_init__
    names = [field.name for field in dataclasses.fields(config)]

    @functools.wraps(make)  # scripts look at its signature
    def __init__(self: Any, *values: object, **options: object) -> None:
        self.of_other_versions = {name: options.pop(name) for name in list(options) if name not in names}
        make(self, *values, **options)

    def __post_init__(self: Any) -> None:
        self.as_written = {name: getattr(self, name) for name in names}
        try:
            finish(self)
        except Exception as error:
            self.refused = str(error)
        self.as_derived = {name: getattr(self, name) for name in names}

    config.__init__, config.__post_init__ = __init__, __post_init__


def with_adapters(model: object, config: object, *_: object, **__: object) -> object:
    if isinstance(model, Model):
        model.record["lora"] = values_of(config)
    return model


def note_source(load: Callable[..., Any]) -> Callable[..., Any]:
    @functools.wraps(load)
    def load_dataset(path: str, name: str | None = None, *rest: object, **arguments: object) -> Dataset | DatasetDict:
        loaded = load(path, name, *rest, **arguments)
        if not rest and not {"data_files", "data_dir", "revision"} & set(arguments) and not Path(path).exists():
            for split, rows in loaded.items() if isinstance(loaded, dict) else [(arguments.get("split"), loaded)]:
                source = path if name is None else f"{path}:{name}"
                hub_sources[getattr(rows, "_fingerprint", "")] = {"name": source, "split": str(split)}
        return loaded

    return load_dataset


def trainer_class(real: type[GRPOTrainer]) -> type:
    class GRPOTrainer:
        """Writes down what it is made of, and what the script sets later; then it ends the process, where it would
        train. No `finally` and no thread of the script goes on."""

        @functools.wraps(real.__init__)  # type: ignore[misc]
        def __init__(self, *values: object, **arguments: object) -> None:
            names = list(inspect.signature(real.__init__).parameters)[1:]
            facts.update(facts_of(dict(zip(names, values, strict=False)) | arguments, Path(FOLDER)))
            if type(self) is not GRPOTrainer:
                facts["others"]["GRPOTrainer"] = type(self).__name__
                self.train()
            write_facts()

        def __setattr__(self, name: str, value: object) -> None:
            facts["assigned"].append(f"{name} = {plain(value)}")
            write_facts()

        def __getattr__(self, _: str) -> MagicMock:
            return MagicMock()

        def add_callback(self, callback: object) -> None:
            self.callbacks = callback

        def train(self, *_: object, **__: object) -> None:
            write_facts()
            sys.stdout.flush()
            os._exit(0)

    return GRPOTrainer


def write_facts() -> None:
    Path(RESULT).write_text(json.dumps(facts), encoding="utf-8")


# ---- what is written down --------------------------------------------------------------------------------------------


def facts_of(arguments: dict[str, Any], folder: Path) -> dict[str, Any]:
    """All that the parent needs to know of the trainer's arguments, as JSON."""
    from trl import GRPOConfig

    config = arguments.pop("args", None) or GRPOConfig()
    rewards = arguments.pop("reward_funcs", None) or []
    rewards = rewards if isinstance(rewards, list | tuple) else [rewards]
    read = {name for each in rewards if callable(each) for name in inspect.signature(each).parameters}
    environments, lora = arguments.pop("environment_factory", None) or {}, arguments.pop("peft_config", None)
    environments = environments if isinstance(environments, dict) else {"": environments}
    changed = {name for name, value in config.as_derived.items() if getattr(config, name) != value}
    texts = {
        name for name in config._VALID_DICT_FIELDS if isinstance(config.as_written[name], str)
    }  # JSON of a command
    values = config.as_written | {name: getattr(config, name) for name in changed | texts}
    return {
        "values": plain(values),
        "defaults": defaults_of(GRPOConfig),
        "of_other_versions": plain(getattr(config, "of_other_versions", {})),
        "refused": getattr(config, "refused", None),
        "model": model_facts(arguments.pop("model", None)) | ({} if lora is None else {"lora": values_of(lora)}),
        "rewards": [function_of(each) for each in rewards],
        "read": sorted(read),
        "tools": [function_of(each) for each in arguments.pop("tools", None) or []],
        "environments": {name: function_of(each) for name, each in environments.items()},
        "data": data_facts(arguments.pop("train_dataset", None), arguments.pop("eval_dataset", None), read, folder),
        "tokenizer": tokenizer_facts(arguments.pop("processing_class", None)),
        "quantization": plain(arguments.pop("quantization_config", None)) or {},
        "assigned": [],
        "others": {name: plain(each) for name, each in arguments.items() if each is not None and each != (None, None)},
    }


def defaults_of(config: type) -> dict[str, Any]:
    fields = dataclasses.fields(config)
    made = {field.name: field.default_factory() for field in fields if callable(field.default_factory)}
    return plain({field.name: field.default for field in fields} | made)


def model_facts(model: object) -> dict[str, Any]:
    from transformers import AutoConfig

    name = model if isinstance(model, str) else getattr(model, "name_or_path", "")
    record = model.record if isinstance(model, Model) else {"name": name, "arguments": {}, "lora": None}
    try:
        return record | {"type": AutoConfig.from_pretrained(record["name"]).model_type}
    except Exception:  # not there, or not reachable from here: the run will say so
        return record | {"type": None}


def values_of(config: PeftConfig) -> dict[str, Any]:
    """What kind of configuration of peft's it is, its values, and the defaults of LoRA."""
    from peft import LoraConfig

    values = {field.name: getattr(config, field.name) for field in dataclasses.fields(config)}
    return {"kind": type(config).__name__, "values": plain(values), "defaults": defaults_of(LoraConfig)}


def function_of(value: object) -> dict[str, Any]:
    """Tells where others find a function or a class: its file and its name there; only its text if nowhere."""
    if isinstance(value, str | Model):
        return {"model": value if isinstance(value, str) else value.record["name"]}
    if isinstance(value, functools.partial) and not value.args:
        return function_of(value.func) | {"arguments": plain(value.keywords)}
    module = sys.modules.get(getattr(value, "__module__", None) or "", sys.modules["__main__"])
    for place in (module, sys.modules["__main__"]):
        for name, other in vars(place).items():
            file = getattr(place, "__file__", None)  # a built-in module has none
            if other is value and file:
                package = place.__name__ if "." in place.__name__ else ""
                return {"file": str(Path(file).resolve()), "name": name, "module": package}
    return {"text": plain(value)}


def data_facts(train: object, test: object, read: set[str], folder: Path) -> dict[str, Any]:
    """Tells what the rows are. They are written into files, unless they are those of a dataset of the hub as it is.
    `read` are the columns that rewards read."""
    if isinstance(test, dict):
        test = next(iter(test.values()), None)
    parts = {name: rows for name, rows in {"train": train, "test": test}.items() if rows is not None}
    summaries = {name: rows_facts(rows, read) for name, rows in parts.items()}
    sources = {part["source"] and part["source"]["name"] for part in summaries.values()}
    if None in sources or len(sources) > 1:
        written = [write_rows(parts[name], folder / f"{name}.jsonl", of["solution"]) for name, of in summaries.items()]
        for summary in summaries.values():
            summary |= {"source": None, "solution": GOLD if all(written) else None}
    return summaries


def rows_facts(rows: Dataset, read: set[str]) -> dict[str, Any]:
    """Tells how many rows there are and what the first one has; their source, if every row can be read from there."""
    first: dict[str, Any] = next(iter(rows), {})
    known = [name for name in SOLUTIONS if name in first]
    near = [name for name in first if name in read and re.search("|".join(SOLUTIONS), name)]  # reference_answer
    solution = min([*known, *near], key=lambda name: name not in read, default="")
    is_text = isinstance(first.get(solution), str)  # as other values would not reach the rewards as they are
    return {
        "count": len(rows) if hasattr(rows, "__len__") else None,
        "chat": isinstance(first.get("prompt"), list),
        "pictures": not {"image", "images"}.isdisjoint(first),
        "solution": solution,
        "source": hub_sources.get(getattr(rows, "_fingerprint", "-")) if is_text else None,
    }


def write_rows(rows: Dataset, file: Path, solution: str) -> bool:
    """Writes a line for each row, with its reference answer as a text in the column GOLD, which may be empty. Returns
    whether every row has one."""
    complete = True
    file.parent.mkdir(parents=True, exist_ok=True)
    with file.open("w", encoding="utf-8") as lines:
        for row in islice(rows, None if hasattr(rows, "__len__") else MOST_STREAMED):
            value = row.get(solution)
            gold = "" if value is None else str(value).strip()
            complete = complete and gold != ""
            lines.write(json.dumps({**row, GOLD: gold}, ensure_ascii=False, default=str) + "\n")
    return complete


def tokenizer_facts(tokenizer: PreTrainedTokenizerBase) -> dict[str, Any] | None:
    """Tells the tokenizer's name, and whether its chat template is another one than that which it was loaded with."""
    from transformers import AutoTokenizer

    name = getattr(tokenizer, "name_or_path", None)
    if not name:
        return None
    loaded = AutoTokenizer.from_pretrained(name).chat_template
    return {"name": name, "other_template": tokenizer.chat_template != loaded}


if __name__ == "__main__":
    RESULT, FOLDER, SCRIPT, *ARGUMENTS = sys.argv[1:]
    replace_trl()
    sys.argv, sys.path[0] = [SCRIPT, *ARGUMENTS], str(Path(SCRIPT).resolve().parent)
    runpy.run_path(SCRIPT, run_name="__main__")
