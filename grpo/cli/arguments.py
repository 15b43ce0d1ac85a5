"""What each command takes besides its options: the arguments of `add_argument`, command by command."""

from __future__ import annotations

from pathlib import Path
from typing import Any

from rewards.commands.command_line import Argument, argument, json_argument, version_of


def _flag(name: str, what: str) -> Argument:
    return argument(f"--{name}", action="store_true", help=what)


_FILE: dict[str, Any] = {"type": Path, "nargs": "?"}
_POLICY = argument("policy", metavar="MODEL", help="a run folder, a checkpoint folder, a GGUF file or a hub id")
_PRINT_CONFIG = _flag("print_config", "print the effective options and stop")
_STOP_AFTER = "save and stop after step N, as if interrupted"
_DEVICE = "with --dry_run: does the run fit devices of GIB GiB each, in place of those at hand"
_RUN = (
    _PRINT_CONFIG,
    _flag("dry_run", "check all that can be checked without training, and stop"),
    argument("--device_gib", type=float, metavar="GIB", help=_DEVICE),
    argument("--resume", metavar="auto|PATH", help="continue from the newest checkpoint of output_dir, or this one"),
    _flag("force", "resume although the configuration has changed"),
    argument("--stop_after", type=int, metavar="N", help=_STOP_AFTER),
)
_DESTINATION = argument("destination", type=Path, metavar="DST", help="the folder to write; it must not exist")

_TRAIN = "train and sample by Tinker's API, with the client that its SDK brings"
_WHAT = "options from a file; the command line wins"
TRAIN = (argument("config", metavar="CONFIG.yaml", help=_WHAT, **_FILE), *_RUN)
_WHAT = "options from a file, a script with TRL's trainer, or a shell file with verl's command; the command line wins"
REHEARSE = (
    argument("config", metavar="CONFIG.yaml|SCRIPT.py|RUN.sh", help=_WHAT, **_FILE),
    argument("--arguments", default="", metavar="TEXT", help="the script's own, as in --arguments='--lr 1e-5'"),
    argument("--verl", metavar="COMMAND", help="a command of verl's in one word, in place of a file"),
    _flag("faults", "also kill the run and its workers, fill the disk, let workers hang, and resume"),
    argument("--device_gib", type=float, metavar="GIB", help="the memory of a device of the real run"),
    json_argument("all that was found"),
)
_WHAT = (
    "options from a file (the command line wins), or the policy: a run or checkpoint folder, a GGUF file or a hub id"
)
MTP = (argument("config", metavar="CONFIG.yaml|MODEL", help=_WHAT, **_FILE), *_RUN)
_WHAT = "a run, a checkpoint, a hub id, or http://HOST:PORT of a server; further ones are compared with the first"
EVAL = (
    argument("policies", nargs="+", metavar="MODEL", help=_WHAT),
    _PRINT_CONFIG,
    json_argument("what the tables show"),
)
_WHAT = "training problems to choose the control by; as many as the run kept (data.validation), or 256"
CONTROL = (
    argument("run", type=Path, metavar="RUN", help="the folder of a finished run of quartet train"),
    argument("--validation", type=int, metavar="N", help=_WHAT),
    json_argument("all that was found, which is in RUN/control/control.json as well"),
)
_WHAT = 'lines such as {"prompt": "2 + 3 = ?"}; - reads standard input, where a line may also be plain text'
SAMPLE = (
    _POLICY,
    argument("--prompt", action="append", default=[], metavar="TEXT", help="a prompt; give it again for another one"),
    argument("--prompts", type=Path, metavar="FILE.jsonl|-", help=_WHAT),
    json_argument("groups and completions"),
)
_WHAT = "serve the newest checkpoint of a run that is still training, as soon as it is saved"
SERVE = (_POLICY, _flag("follow", _WHAT), _flag("train", _TRAIN), _PRINT_CONFIG)
_WHAT = "path/to/file.py:Class, path/to/file.py:function for a tool, mcp:SERVER, calculator, python or word_game"
ENVIRONMENT_TEST = (argument("environment", metavar="FILE:CLASS", help=_WHAT), json_argument("what was found"))
CONVERT = (
    argument("source", metavar="SRC", help="a checkpoint folder, a GGUF file or a hub id"),
    _DESTINATION,
    _flag("mtp", "add a draft head, started from the last layer"),
    json_argument("what is printed"),
)
QUANTIZE = (
    argument("source", metavar="SRC", help="a run folder, a checkpoint folder, a GGUF file or a hub id"),
    _DESTINATION,
    _PRINT_CONFIG,
    json_argument("the report, which is beside the weights as well"),
)
_WHAT = "a preset, a run folder, a checkpoint folder, a hub id, or a model type of transformers such as qwen3_5"
CHECK = (
    argument("model", metavar="MODEL", help=_WHAT),
    argument("--layers", type=int, default=1, metavar="N", help="try so many layers of each kind; 1"),
    json_argument("the table"),
)
_WHAT = "tokens to attend to; by default 4096, or the policy's longest context if that is less"
INSPECT = (
    argument("model", metavar="MODEL", help="a preset, a run folder, a checkpoint folder, a GGUF file or a hub id"),
    argument("--context", type=int, metavar="TOKENS", help=_WHAT),
    json_argument("what the table shows"),
)
EXPORT = (
    argument("run", type=Path, metavar="RUN", help="a run folder, or a checkpoint inside one"),
    argument("destination", metavar="DST", help="the folder to write; not needed with --push_to_hub", **_FILE),
    argument("--push_to_hub", metavar="OWNER/NAME", help="upload it; a new repository is private"),
    _flag("adapter", "the adapters of a LoRA run alone, in peft's format"),
)
_WHAT = "the step with other options on the same rollouts, such as loss.advantage=rloo; give it again for another one"
WHY = (
    argument("run", type=Path, metavar="RUN", help="a run folder; nothing in it is touched"),
    argument("step", type=int, metavar="STEP", help="a step whose rollouts are recorded"),
    argument("--group", type=int, metavar="N", help="this group of the step alone, token by token"),
    argument("--groups", type=int, metavar="N", help="leave out at most N groups; by default what ten minutes allow"),
    argument("--tokens", type=int, default=400, metavar="N", help="with --group: read at most N tokens; 400"),
    argument("--held_out", type=int, default=64, metavar="N", help="measure by N solutions; 64"),
    argument("--what_if", nargs="+", action="append", default=[], metavar="KEY=VALUE", help=_WHAT),
    json_argument("all that was found"),
)

_OUT = argument("--out", type=Path, default=Path("run.yaml"), metavar="RUN.yaml", help="the file to write; run.yaml")
_MIGRATION = "the options, and what has no counterpart,"
_PROCESSES = "by how many processes the script would be started; 1"
FROM_TRL = (
    argument("source", type=Path, metavar="SCRIPT.py", help="a script with GRPOTrainer, which runs up to that"),
    _OUT,
    argument("--arguments", default="", metavar="TEXT", help="the script's own, as in --arguments='--lr 1e-5'"),
    argument("--processes", type=int, default=1, metavar="N", help=_PROCESSES),
    argument("--timeout_s", type=float, default=600.0, metavar="S", help="the script's time; 600"),
    json_argument(_MIGRATION),
)
_WHAT = "a shell file with a command of verl.trainer.main_ppo, or the command as one word"
FROM_VERL = (argument("source", metavar="RUN.sh", help=_WHAT), _OUT, json_argument(_MIGRATION))


def version() -> str:
    return version_of("quartet-rl")
