"""`quartet export`: a run's policy as a folder that other tools load, with everything they need.

    DST/config.json, *.safetensors, generation_config.json   what stock transformers loads, MTP layers after the last
        tokenizer*, chat_template.jinja
        LICENSE ...                                          of the base, where it has one
        README.md                                            the model card: the run's own numbers
        run/config.yaml, environment.json, metrics.jsonl     what the card was made from
            report.html                                  what `quartet report` has made, where it is there
        trained_on.txt                                   fingerprints of the problems that it was trained on

`--adapter` writes the adapters of a LoRA run instead, in peft's format. `--push_to_hub OWNER/NAME` makes a model
repository of the folder.
"""

from __future__ import annotations

import json
import shutil
import tempfile
import warnings
from dataclasses import dataclass, replace
from pathlib import Path
from typing import TYPE_CHECKING, Any

import torch
from huggingface_hub import HfApi, ModelCard, constants
from huggingface_hub.errors import HfHubHTTPError, HFValidationError, LocalTokenNotFoundError
from huggingface_hub.utils import validate_repo_id
from peft import LoraConfig, PeftModel
from peft.tuners.lora.layer import ParamWrapper
from safetensors.torch import save_file
from torch import Tensor
from transformers import DeepseekV3Config
from transformers.conversion_mapping import get_checkpoint_conversion_mapping

from grpo.cli.commands.model_card import REPORT, Origin, model_card
from grpo.config.policy import ModelOptions
from grpo.data.folders import around
from grpo.data.trained_on import TRAINED_ON
from grpo.run import checkpoint
from grpo.source.policy_source import RECORD, PolicySource, find_policy, load_found, shape_of
from policies import lora, presets
from policies.attention import sees_prompts_whole
from policies.checkpoint import check_policy
from policies.conversion.dense import LICENCE_FILES
from policies.files import gguf, hub
from policies.files.atomic import heed_umask
from policies.files.checksums import CHECKSUMS
from policies.layout import FIXED_FIELDS, WeightFiles, auto_class, find_file
from policies.policy import Policy, read_config
from policies.routing.heads import DynamicHeadsConfig
from rewards.config.names import recorded_options

if TYPE_CHECKING:
    from transformers import PreTrainedModel

RUN_FILES = ("config.yaml", "environment.json", "metrics.jsonl", REPORT, TRAINED_ON)
# Modules that peft takes for routed experts or the router in models whose experts transformers stacks.
REINTERPRETED = {"gate_proj", "up_proj", "down_proj", "gate"}


class ExportError(ValueError):
    """A run cannot be exported as asked; the message says what is missing and what to do."""


@dataclass(frozen=True)
class Run:
    folder: Path
    config: dict[str, Any]

    @property
    def base(self) -> str:
        """GRPO started from this: the SFT stage that the run made, else its `model`; folders have their whole path."""
        warm = self.folder / "warm_start"
        base = find_policy(str(warm) if warm.is_dir() else str(self.config["model"])).folder
        return str(Path(base).resolve()) if Path(base).is_dir() else base


def export(run: str | Path, destination: str | Path, *, adapter: bool = False, hub_id: str = "") -> str:
    """Writes `destination`, complete or not at all, and returns what to tell the user. `run` is a run folder or a
    checkpoint inside one. The model card loads `hub_id`, where that is not the folder. Raises FileExistsError,
    ExportError, PolicyError or CheckpointError for what cannot be exported."""
    run, destination = Path(run), Path(destination)
    if destination.exists() or destination.is_symlink():
        raise FileExistsError(f"destination={str(destination)!r} exists; remove it or name another")
    record = _read_run(run)
    source = find_policy(str(run))
    shape = shape_of(source)
    sees_whole = sees_prompts_whole(shape)
    if sees_whole or isinstance(shape, DynamicHeadsConfig):
        what = "prompt_attention=bidirectional" if sees_whole else "dynamic heads (active_heads)"
        raise ExportError(
            f"{run} has {what}, which no other program computes: use it with quartet, by `model: {source.folder}`"
        )
    origin = replace(origin_of(record.config["model"]), auto=auto_class(shape).__name__)
    destination.parent.mkdir(parents=True, exist_ok=True)
    with tempfile.TemporaryDirectory(dir=destination.parent, prefix=f".{destination.name}.") as scratch:
        folder = Path(scratch) / destination.name
        notes = []
        if adapter:
            if _write_adapter(record, source, folder).mtp is not None:
                notes.append("The draft head is not among them: export without `--adapter` for it.")
            if record.config["lora"].get("base"):
                notes.append("They were trained over a base in 4 bits: load it so, or export without `--adapter`.")
        else:
            _write_merged(source, record, folder)
        for file in origin.licence_files:
            shutil.copy(file, folder / file.name)
        heed_umask(folder)
        (folder / "run").mkdir()
        for name in RUN_FILES:
            if (record.folder / name).is_file():
                shutil.copy(record.folder / name, folder / "run" / name)
        what = source.meaning if source.step is None else f"{source.meaning} (its weights are of step {source.step})"
        if source.checkpoint is not None:
            what = f"checkpoint {source.checkpoint.name}"
        base, called, left = record.base if adapter else None, hub_id or destination.name, " ".join(notes)
        card = model_card(record.folder, called, origin, what, base, folder, left, source.step)
        (folder / "README.md").write_text(card, encoding="utf-8")
        folder.rename(destination)
    what, licence = "adapters" if adapter else "policy", f"licence: {origin.licence_note}"
    message = f"{what} of {run} ({source.meaning}) written to {destination}; {licence}"
    return f"{message}\n{left}" if left else message


def origin_of(model: str) -> Origin:
    """Returns the model whose weights `model` began with, through runs that continue runs, and its licence."""
    while run := _run_around(Path(model)):
        model = str(_read_run(run).config["model"])
    if model in presets.PRESETS:
        return Origin(model, preset=True)
    files = [Path(path) for name in LICENCE_FILES if (path := find_file(model, name))]
    card = find_file(model, "README.md")
    data = ModelCard(Path(card).read_text(encoding="utf-8"), ignore_metadata_errors=True).data if card else None
    terms = {key: getattr(data, key, None) for key in ("license", "license_name", "license_link")}
    return Origin(model, terms={key: str(value) for key, value in terms.items() if value}, licence_files=files)


def _run_around(path: Path) -> Path | None:
    """Returns the run that `path` is, or that holds it as policy/, warm_start/ or checkpoints/step_000010/."""
    folders = around(path) if path.is_dir() else []
    return next((folder for folder in folders if (folder / "environment.json").is_file()), None)


def _read_run(run: Path) -> Run:
    folder = _run_around(run)
    if folder is None or not (folder / "config.yaml").is_file():
        raise ExportError(f"RUN={str(run)!r} is no run folder (no environment.json and config.yaml in it)")
    _, options = recorded_options(folder / "config.yaml")
    if "model" not in options:
        raise ExportError(f"{folder / 'config.yaml'} names no `model`; it is not the configuration of a run")
    return Run(folder, options)


def _write_merged(source: PolicySource, run: Run, folder: Path) -> None:
    """Write the policy as it was saved, or that of a checkpoint, with its adapters merged."""
    if source.checkpoint is not None:
        load_found(source, _options(run)).save(folder)
        return
    if not WeightFiles(source.folder).shapes:  # reads headers: a damaged file is not passed on
        raise ExportError(f"{source.folder} holds no safetensors; let the run end: --resume auto")
    shape = read_config(source.folder)
    check_policy(Path(source.folder))
    # The export may be edited, and the record names a checkpoint of the run.
    shutil.copytree(source.folder, folder, ignore=shutil.ignore_patterns(CHECKSUMS, RECORD))
    if isinstance(shape, DeepseekV3Config):  # a policy that was saved before we wrote these fields
        file = folder / "config.json"
        fields = json.loads(file.read_text(encoding="utf-8")) | FIXED_FIELDS
        file.write_text(json.dumps(fields, indent=2, sort_keys=True) + "\n", encoding="utf-8")


def _write_adapter(run: Run, source: PolicySource, folder: Path) -> Policy:
    """Write the adapters of a LoRA run. Returns the policy that has them."""
    options = run.config.get("lora")
    if not options:
        raise ExportError(f"{run.folder} trained every weight (lora: null), so there is no adapter; drop --adapter")
    base, saved = run.base, source.checkpoint
    if saved is None:
        saved = None if source.step is None else checkpoint.saved(run.folder / "checkpoints").get(source.step)
    for fault, why in (
        (base in presets.PRESETS, f"the base of {run.folder} is preset {base!r}, random weights that nobody has"),
        (gguf.file_of(base), f"the base of {run.folder} is a GGUF file, which peft cannot load by name"),
        (saved is None, f"{run.folder} has no checkpoint of {source.folder}, where adapters are kept"),
    ):
        if fault:
            raise ExportError(f"{why}; drop --adapter")
    policy = load_found(source if source.checkpoint else find_policy(str(saved)), _options(run), merged=False)
    if source.checkpoint is None:
        check_policy(Path(source.folder))
        _refuse_other_base(policy, source.folder, run.base)
    _refuse_moved_parts(policy, run.base)
    folder.mkdir()
    tensors = {name: t for name, t in policy.trunk.state_dict().items() if ".lora_" in name}
    stored = {f"base_model.model.{name.replace(f'.{lora.ADAPTER}', '')}": t.contiguous() for name, t in tensors.items()}
    save_file(stored, folder / "adapter_model.safetensors", metadata={"format": "pt"})
    peft_config(policy.trunk, options["rank"], options["alpha"], run.base).save_pretrained(folder)
    _refuse_lost_adapters(policy, folder)
    policy.tokenizer.save_pretrained(folder)
    return policy


def _refuse_lost_adapters(policy: Policy, folder: Path) -> None:
    """Refuse adapters that peft does not take back, by loading them into a model without storage."""
    with torch.device("meta"):
        bare = auto_class(policy.config).from_config(policy.config)
    with warnings.catch_warnings(record=True) as told:
        warnings.simplefilter("always")
        try:
            PeftModel.from_pretrained(bare, folder)
        except ValueError as error:
            raise ExportError(f"peft refuses these adapters ({error}); drop --adapter") from error
    if lost := [str(warning.message) for warning in told if "missing adapter keys" in str(warning.message)]:
        raise ExportError(f"peft gives some layers of this model other names ({lost[0][:200]} ...); drop --adapter")


def peft_config(model: PreTrainedModel, rank: int, alpha: float, base: str) -> LoraConfig:
    """Returns the configuration under which `PeftModel.from_pretrained(base, ...)` puts our adapters where they were.
    In a model whose experts transformers stacks, peft takes gate_proj, up_proj and down_proj among target_modules for
    the routed experts. As target_parameters, with `.weight`, they mean the dense and shared ones."""
    stacked = get_checkpoint_conversion_mapping(model.config.model_type) is not None
    modules, parameters = set(), set()
    for name, layer in lora.adapters(model):
        module = name.replace(".base_layer", "")
        if isinstance(layer, ParamWrapper):
            parameters.add(f"{module}.{layer.parameter_name}")
        elif stacked and module.rpartition(".")[2] in REINTERPRETED:
            parameters.add(f"{module}.weight")
        else:
            modules.add(module)
    return LoraConfig(
        r=rank,
        lora_alpha=alpha,
        lora_dropout=0.0,
        target_modules=sorted(modules),
        target_parameters=sorted(parameters) or None,
        fan_in_fan_out=any(layer.fan_in_fan_out for _, layer in lora.adapters(model)),
        base_model_name_or_path=hub.split(base)[0],
        revision=hub.split(base)[1],
        task_type="CAUSAL_LM",
        inference_mode=True,
    )


@torch.no_grad()
def _refuse_other_base(policy: Policy, saved: str, base: str) -> None:
    """Refuse a base that has changed: base and adapters must add up to the policy that the run saved."""
    merged, trained = lora.merged_state(policy.trunk), Policy.load(saved, next(policy.trunk.parameters()).dtype)
    worst = max((_difference(merged[name], t), name) for name, t in trained.trunk.state_dict().items())
    if worst[0] > 1e-3:
        raise ExportError(
            f"{base} and the run's adapters do not add up to {saved}: {worst[1]} differs by {worst[0]:.1e}; the base "
            "has changed since, so an adapter would not fit it: export without --adapter"
        )


def _refuse_moved_parts(policy: Policy, base: str) -> None:
    """Refuse a run that moved more than its adapters: the experts' bias of a balanced run, whose trunk is native."""
    if policy.backend != "native":
        return
    files = WeightFiles(base)
    biases = {n.replace(".base_layer", ""): b for n, b in policy.trunk.named_buffers() if n.endswith("correction_bias")}
    for name, bias in biases.items():
        if not torch.equal(files.read(name)[name].float(), bias.float()):
            raise ExportError(f"the run moved {name} (balance.bias_rate), which an adapter cannot hold; drop --adapter")


def _difference(a: Tensor, b: Tensor) -> float:
    """Returns the largest difference as a share of the largest value."""
    return float((a.float() - b.float()).abs().max() / b.float().abs().max().clamp_min(1e-6))


def _options(run: Run) -> ModelOptions:
    return ModelOptions(dtype=run.config.get("dtype", "float32"), device="cpu")


def export_and_push(run: Path, destination: Path | None, repo_id: str, *, adapter: bool = False) -> str:
    """Writes `destination` (None: a folder that is removed afterwards), uploads it, and returns what to tell the user.
    A repository that is not there is made, and is private. The token is the one of `hf auth login` or HF_TOKEN. Raises
    ExportError for a name or token that cannot be used, before anything is written, and where the hub refuses."""
    api = HfApi(endpoint=constants.ENDPOINT)
    check(api, repo_id)
    with tempfile.TemporaryDirectory() as scratch:
        folder = destination or Path(scratch) / repo_id.rpartition("/")[2]
        message = export(run, folder, adapter=adapter, hub_id=repo_id)
        try:
            api.create_repo(repo_id, private=True, exist_ok=True)
            commit = api.upload_folder(
                repo_id=repo_id, folder_path=folder, commit_message=f"quartet export of {run.name}"
            )
        except (HfHubHTTPError, OSError) as error:
            copy = f"; the export is in {destination}" if destination else ""
            raise ExportError(f"--push_to_hub {repo_id}: the hub refused it: {error}{copy}") from error
    return f"{message}\npushed to {commit.repo_url.url if commit.repo_url else repo_id} (a new repository is private)"


def check(api: HfApi, repo_id: str) -> None:
    """Raises ExportError unless this can be pushed to."""
    try:
        validate_repo_id(repo_id)
    except HFValidationError as error:
        raise ExportError(f"--push_to_hub {repo_id!r} is no name of a repository: {error}") from None
    if "/" not in repo_id:
        raise ExportError(f"--push_to_hub {repo_id!r} has no owner: write OWNER/NAME")
    if why := hub.unreachable():
        raise ExportError(
            f"--push_to_hub {repo_id}: {why}. Leave it out, and where there is a network: hf upload {repo_id} FOLDER"
        )
    try:
        api.whoami()
    except (LocalTokenNotFoundError, HfHubHTTPError) as error:
        raise ExportError(
            f"--push_to_hub {repo_id}: the hub does not know who you are ({type(error).__name__}); log in with "
            "`hf auth login`, or set HF_TOKEN to a token that may write"
        ) from error
