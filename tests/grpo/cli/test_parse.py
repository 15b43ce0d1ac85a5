"""The commands as a user meets them: help, typos, files, exit codes, Ctrl-C and SIGTERM."""

import os
import re
import shlex
import signal
import subprocess
import sys
import time
from collections.abc import Callable
from contextlib import suppress
from importlib import import_module, metadata
from pathlib import Path
from typing import NoReturn

import psutil
import pytest
from copies import Copy

from grpo.cli.actions import EXPECTED
from grpo.cli.config.inference import EvalConfig, SampleConfig
from grpo.cli.parse import SECTIONS, _commands, build_parser, main
from grpo.config.mtp import MtpConfig
from grpo.config.run import SftConfig, TrainConfig
from policies.policy import Policy
from review.readers.run_folder import read_metrics
from rewards.__main__ import main as quartet_reward
from rewards.config.options import _options, load, parse
from rewards.records import read_rollouts

ROOT = Path(__file__).parents[3]
MODELS = {"train": TrainConfig, "sft": SftConfig, "eval": EvalConfig, "sample": SampleConfig}
MICRO_RUN = shlex.split(
    "--threads 1 --steps 2 --prompts_per_step 2 --data.limit 8 --data.task_options.levels [1] --log.trackers [] "
    "--rollout.group_size 2 --rollout.max_completion_tokens 6"
)
TINY = ["train", "--model", "tiny", "--device", "cpu"]


def ends(words: list[str], code: int, command: Callable[[list[str]], int] = main) -> None:
    """As `argparse` ends a process."""
    with pytest.raises(SystemExit) as end:
        command(words)
    assert end.value.code == code


@pytest.fixture(scope="module")
def run(model, letters, tmp_path_factory) -> Path:
    """The folder of a run that `quartet train` has made from a file."""
    folder = tmp_path_factory.mktemp("run")
    config = folder / "micro.yaml"
    config.write_text(f"model: {model}\noutput_dir: {folder / 'run'}\nrewards:\n- function: {letters}\n")
    assert main(["train", str(config), *MICRO_RUN, "--eval.limit", "3"]) == 0
    return folder / "run"


@pytest.mark.parametrize("command", MODELS)
def test_help_names_and_explains_every_option(command, capsys, monkeypatch):
    monkeypatch.setenv("COLUMNS", "500")
    ends([command, "--help", "all"], 0)
    text = capsys.readouterr().out
    for option in _options(MODELS[command].model_construct()):
        if "[]" not in option.key and not option.is_group:
            assert f"--{option.key} " in text
        assert option.help in text or not option.help or "[]" in option.key
    flags = {
        "train": ["--resume", "--force", "--stop_after", "--dry_run", "--print_config"],
        "sft": ["--dry_run", "--print_config"],
        "eval": ["--json", "--print_config"],
        "sample": ["--prompts", "--json"],
    }
    assert all(flag in text for flag in flags[command])


@pytest.mark.parametrize("command", ["train", "sft", "mtp"])
def test_help_shows_the_options_that_most_runs_use_and_where_the_others_are(command, capsys, monkeypatch):
    monkeypatch.setenv("COLUMNS", "100")
    model = {"train": TrainConfig, "sft": SftConfig, "mtp": MtpConfig}[command]
    options = [o for o in _options(model.model_construct()) if "[]" not in o.key]
    known = [o.key for o in options if not o.is_group or o.key == "data"]  # which takes a list of sources, too
    for words in (["--help"], ["-h"], ["CONFIG.yaml", "--help"]):
        ends([command, *words], 0)
        text = capsys.readouterr().out
        shown = [key for key in known if f"  --{key} " in text]
        assert shown == [key for key in known if key in model.common]  # each is an option that there is
        assert len(shown) == len(model.common)
        assert 10 <= len(shown) <= 20
        assert {"model", "output_dir", "data.name", "eval.limit"} <= set(shown)
        assert f"{len(known) - len(shown)} more options: quartet {command} --help all" in text
        assert "--resume" in text
        assert "--dry_run" in text


@pytest.mark.parametrize("words", [[], ["policy"], ["reward"]])
def test_without_a_command_the_help_is_printed(words, capsys):
    assert main(words) == 0
    shown = capsys.readouterr().out
    assert shown.startswith("usage: quartet")
    assert "commands:" in shown


def test_the_version_is_that_of_the_package(capsys):
    ends(["--version"], 0)
    assert capsys.readouterr().out == f"quartet {metadata.version('quartet-rl')}\n"


def help_of(capsys, *words: str) -> str:
    ends([*words, "--help"], 0)
    return capsys.readouterr().out


def test_help_lists_every_command_once_in_five_sections(capsys):
    shown = help_of(capsys)
    commands = {name for name, command in _commands().items() if command.run}
    listed = re.findall(r"^    (\S+(?: \S+)?)  ", shown, re.MULTILINE)
    assert sorted(listed) == sorted(commands)
    assert len(SECTIONS) == 5
    assert [line.strip() for line in shown.splitlines() if re.match(r"  [a-z]", line)][:5] == list(SECTIONS)
    assert shown.count("example: quartet ") == 1
    assert "lossless" not in shown
    assert max(map(len, shown.splitlines())) <= 80
    assert "SRC" in help_of(capsys, "convert")


def test_each_command_has_a_short_help_of_its_own_with_an_example(capsys, monkeypatch):
    monkeypatch.setenv("COLUMNS", "200")
    descriptions = {}
    for name, command in _commands().items():
        if not command.run:
            continue
        shown = help_of(capsys, *name.split())
        if name != "reference":
            assert shown.count(f"\nexample: quartet {name} ") == 1, name
            descriptions[name] = shown.split("\n\n")[1]
        keys = re.findall(r"^  --([a-z_.]+\.[a-z_.]+|[a-z_]+) ", shown, re.MULTILINE)
        own = {names[0].lstrip("-") for names, _ in command.takes}
        assert len([key for key in keys if key not in own]) <= 20, name
        assert not re.search(r"--[a-z]+-[a-z]", shown), name
    assert len(set(descriptions.values())) == len(descriptions)
    assert "Smoke test" in descriptions["rehearse"]
    for flag in ("--print_config", "--print-config"):  # one spelling is shown, and both are read
        assert main([*TINY, flag]) == 0


@pytest.mark.parametrize(
    ("words", "answer"),
    [
        (["trian"], "trian: no such command; did you mean quartet train?"),
        (["trian", "run.yaml", "--steps", "3"], "trian: no such command; did you mean quartet train?"),
        (["from_trl", "x.py"], "from_trl: no such command; did you mean quartet from-trl?"),
        (["policy", "inspekt"], "policy inspekt: no such command; did you mean quartet policy inspect?"),
        (["inspect", "tiny"], "inspect: no such command; did you mean quartet policy inspect?"),
        (["zzz"], "zzz: no such command; quartet --help lists all commands"),
    ],
)
def test_a_misspelt_command_is_answered_with_the_nearest_one(capsys, words, answer):
    ends(words, 2)
    assert capsys.readouterr().err.splitlines() == [
        "usage: quartet [-h] [--version] COMMAND ...",
        f"quartet: error: {answer}",
    ]
    ends(["tset", "gsm8k"], 2, quartet_reward)
    assert "tset: no such command; did you mean quartet-reward test?" in capsys.readouterr().err


@pytest.mark.parametrize("command", ["train", "sft", "mtp", "rehearse"])
@pytest.mark.parametrize("words", [[], ["--steps", "3"], ["--output_dir", "r"]])
def test_without_a_file_or_a_policy_three_commands_are_named(tmp_path, capsys, monkeypatch, command, words):
    monkeypatch.chdir(tmp_path)
    assert main([command, *words]) == 2
    shown = capsys.readouterr().err
    named = [line.removeprefix("  ") for line in shown.splitlines()[1:]]
    assert shown.startswith(f"quartet: {command}: name a file or a policy, such as\n")
    assert len(named) == 3
    for line in named:
        words = shlex.split(line)[1:]
        args = parse(build_parser(words), words)  # no option of it is unknown
        load(args.options, None, args.overrides | {"device": "cpu"}, args.flags)
    assert not list(tmp_path.iterdir())


def test_the_demo_is_named_in_the_repository_only(tmp_path, capsys, monkeypatch):
    monkeypatch.chdir(ROOT)
    assert main(["train"]) == 2
    assert "  quartet train examples/01_demo.yaml\n" in capsys.readouterr().err
    monkeypatch.chdir(tmp_path)
    assert main(["train"]) == 2
    assert "examples" not in capsys.readouterr().err


def test_rewards_take_the_name_of_one_function(capsys):
    words = [*TINY, "--output_dir", "r", "--print_config"]
    forms = ("mine.py:f", "[mine.py:f]", "[{function: 'mine.py:f'}]")
    shown = []
    for form in forms:
        assert main([*words, "--rewards", form]) == 0
        shown.append(capsys.readouterr().out)
    assert "function: mine.py:f" in shown[0]
    assert len(set(shown)) == 1
    for value in ("[{function: mine.py:f}", "{function: mine.py:f", "&a [*a]", "3"):
        assert main([*words, "--rewards", value]) == 2
        assert "expected a valid list" in capsys.readouterr().err


@pytest.mark.parametrize("command", ["train", "sft", "mtp"])
def test_a_run_without_a_folder_gets_one_with_the_time(tmp_path, capsys, monkeypatch, command):
    monkeypatch.chdir(tmp_path)
    assert main([command, "--model", "tiny", "--device", "cpu", "--print_config"]) == 0
    [folder] = re.findall(r"^output_dir: (\S+)$", capsys.readouterr().out, re.MULTILINE)
    assert re.fullmatch(rf"runs/{command}-\d{{8}}-\d{{6}}", folder)
    Path("runs/train-20260101-000000").mkdir(parents=True)
    assert main([command, "--model", "tiny", "--device", "cpu", "--resume", "auto"]) == 2
    shown = capsys.readouterr().err
    assert "output_dir: --resume needs the run folder; give it, as in --output_dir runs/" in shown
    assert ("runs/train-20260101-000000" in shown) == (command == "train")
    monkeypatch.setenv("WORLD_SIZE", "2")  # several processes need a folder by name
    assert main([command, "--model", "tiny", "--device", "cpu", "--print_config"]) == 2
    assert "output_dir" in capsys.readouterr().err


def test_the_folder_is_chosen_once_and_printed(model, letters, tmp_path, capsys, monkeypatch):
    monkeypatch.chdir(tmp_path)
    assert main(["train", "--model", model, *MICRO_RUN, "--rewards", letters, "--steps", "1"]) == 0
    [folder] = Path("runs").iterdir()
    assert f"run folder: {folder}\n" in capsys.readouterr().out
    assert f"output_dir: {folder}\n" in (folder / "config.yaml").read_text()


def test_help_and_typos_answer_without_loading_what_is_slow():
    said = (
        "--help",
        "train --help",
        "trian",
        "train",
        "train --stepz 3",
        "train nowhere.yaml",
        "sft --model tiny --stepz 3",
        "rehearse --model tiny --stepz 3",
        "eval tiny --limitt 3",
    )
    code = "import sys\nfrom grpo.cli.parse import main\nfor words in sys.argv[1:]:\n"
    code += "    try: main(words.split())\n    except SystemExit: pass\n"
    code += "    loaded = {'torch', 'transformers', 'ray', 'peft', 'datasets', 'accelerate'} & set(sys.modules)\n"
    code += "    print('loaded', words, *loaded, sep=': ')"
    done = subprocess.run([sys.executable, "-c", code, *said], capture_output=True, text=True, cwd=ROOT)
    assert [line for line in done.stdout.splitlines() if line.startswith("loaded: ")] == [f"loaded: {w}" for w in said]


@pytest.mark.parametrize(
    ("words", "message"),
    [
        (
            ["--rollout.groupsize", "4"],
            "rollout.groupsize=4 (command line): no such option; did you mean rollout.group_size?",
        ),
        (["--stepz=3"], "stepz=3 (command line): no such option; did you mean steps?"),  # before the missing policy
        (["--resum", "auto"], "did you mean resume?"),
        (
            ["--rollout.group_size", "1"],
            "rollout.group_size=1 (command line): gives every completion a zero advantage; use 2 or more",
        ),
        (["--loss.loss_type", "dapoo"], "loss.loss_type=dapoo (command line): expected 'grpo', 'dr_grpo', 'dapo'"),
        (["--steps", "many"], "steps=many (command line): expected a valid integer"),
        (
            ["--reward.on_error", "zero"],
            "reward.on_error=zero (command line): choose abort, drop_sample, drop_group or",
        ),
    ],
)
def test_a_wrong_option_is_named_with_the_way_out(tmp_path, capsys, words, message):
    assert main(["train", "--output_dir", str(tmp_path / "r"), *words]) == 2
    shown = capsys.readouterr().err
    assert message in shown
    assert "Traceback" not in shown
    assert not (tmp_path / "r").exists()


@pytest.mark.parametrize(
    ("content", "message"),
    [
        (
            "rollout:\n  group_sise: 4\n",
            "rollout.group_sise=4 ({file}, line 2): no such option; did you mean rollout.group_size?",
        ),
        ("", "{file}: is empty"),
        ("# nothing here\n", "{file}: is empty"),
        ("steps: [1\n", "{file}, line 2: is not valid YAML"),
        ("- steps\n", "{file}: expected a mapping"),
        ("steps: 3\nsteps: 4\n", "{file}: steps is given on lines 1 and 2"),
        ("rewards: []\n", "rewards"),
        ("rewards:\n- functoin: gsm8k\n", "did you mean rewards[].function?"),
    ],
)
def test_a_wrong_file_is_named_by_line(tmp_path, capsys, content, message):
    file = tmp_path / "run.yaml"
    file.write_text(content)
    assert main(["train", str(file), "--output_dir", str(tmp_path / "r")]) == 2
    assert message.replace("{file}", str(file)) in capsys.readouterr().err
    assert not (tmp_path / "r").exists()


def test_a_wrong_path_names_the_nearest_file_and_all_problems_come_at_once(tmp_path, capsys):
    (tmp_path / "demo.yaml").write_text("steps: 1\n")
    assert main(["train", str(tmp_path / "demmo.yaml")]) == 2
    assert f"no such file; did you mean {tmp_path / 'demo.yaml'}?" in capsys.readouterr().err
    assert main(["train", str(tmp_path / "nowhere/demo.yaml")]) == 2
    assert f"there is no folder {tmp_path / 'nowhere'}" in capsys.readouterr().err
    (tmp_path / "demo.yaml").write_text("steps: 0\nlern_rate: 1\n")
    assert main(["train", str(tmp_path / "demo.yaml"), "--seeed", "3"]) == 2
    shown = capsys.readouterr().err
    assert all(part in shown for part in ("steps=0", "lern_rate=1", "seeed=3"))


@pytest.mark.parametrize("command", ["train", "sft"])
def test_the_printed_config_is_the_effective_one_and_reads_back(tmp_path, capsys, command):
    words = ["--output_dir=runs/a", "--rollout.max_completion_tokens=6"]
    words += ["--data.task_options.levels=[1, 3]", "--learner.betas=[0.9, 0.99]"]
    words += ["--lora.rank", "4", "--steps", "7"] if command == "train" else []
    assert main([command, *words, "--print_config"]) == 0
    first = capsys.readouterr().out
    file = tmp_path / "printed.yaml"
    file.write_text(first)
    assert main([command, str(file), "--print-config"]) == 0
    assert capsys.readouterr().out == first
    assert "max_completion_tokens: 6" in first
    assert main([command, str(file), "--rollout.max_completion_tokens", "9", "--print_config"]) == 0
    changed = [line for line in capsys.readouterr().out.splitlines() if line not in first.splitlines()]
    assert changed == ["  max_completion_tokens: 9"]  # the command line wins, and nothing else moves


@pytest.mark.parametrize("flag", ["--dry_run", "--dry-run"])
def test_a_dry_run_prints_counts_and_writes_nothing(model, tmp_path, capsys, monkeypatch, flag):
    monkeypatch.chdir(tmp_path)
    assert main(["train", "--model", model, "--output_dir", "r", *MICRO_RUN, flag]) == 0
    shown = capsys.readouterr().out
    for part in ("prompts per step", "4 (2 prompts × 2)", "updates per step", "AdamW moments", "disk: checkpoints"):
        assert part in shown
    assert not list(tmp_path.iterdir())


@pytest.mark.slow
def test_examples_are_usable(capsys, monkeypatch):
    monkeypatch.chdir(ROOT)
    for file in sorted((ROOT / "examples").glob("*.yaml")):
        assert main(["train", str(file), "--print_config"]) == 0, file
    recipe = ROOT / "examples/05_gsm8k_recipe"
    for command, stage in (("sft", "1_sft"), ("mtp", "2_mtp"), ("train", "3_grpo"), ("train", "3_grpo_lora")):
        assert main([command, str(recipe / f"{stage}.yaml"), "--print_config"]) == 0, stage
    agents = ROOT / "examples/08_agents"
    for command, file in (("sft", "start"), ("train", "train")):
        assert main([command, str(agents / f"{file}.yaml"), "--print_config"]) == 0, file
    assert main(["train", "examples/01_demo.yaml", "--dry_run"]) == 0
    assert main(["train", "examples/02_custom_reward.yaml", "--dry_run"]) == 0
    assert "shows_its_work" in capsys.readouterr().out


def test_train_makes_a_run_from_a_file_and_no_second_one_in_its_folder(run, model, capsys):
    assert [line["step"] for line in read_metrics(run)] == [0, 1, 2]
    assert (run / "policy/model.safetensors").is_file()
    words = ["--output_dir", str(run), "--model", model, *MICRO_RUN]
    assert main(["train", *words]) == 1
    assert re.fullmatch(r"quartet: output_dir=.* already holds a run; .*--resume auto.*\n", capsys.readouterr().err)


@pytest.mark.slow
def test_stop_after_and_resume(model, letters, tmp_path, capsys):
    words = ["--output_dir", str(tmp_path / "r"), "--model", model, *MICRO_RUN, "--rewards", letters]
    assert main(["train", *words, "--stop_after", "1"]) == 143
    assert "stopped after step 1; go on with --resume auto" in capsys.readouterr().err
    assert main(["train", *words, "--resume", "auto", "--learner.learning_rate", "0.5"]) == 1
    assert "learner.learning_rate: 1e-06 then, 0.5 now" in capsys.readouterr().err
    assert main(["train", *words, "--resume", "nowhere"]) == 1
    assert "nowhere is no checkpoint" in capsys.readouterr().err
    assert main(["train", *words, "--resume", "auto", "--learner.learning_rate", "0.5", "--force"]) == 0
    assert [line["learner/learning_rate"] for line in read_metrics(tmp_path / "r")] == [1e-6, 0.5]


def test_eval_and_mtp_print_the_options_that_a_run_brings_along(run, capsys):
    assert main(["eval", str(run), "--print_config"]) == 0
    shown = capsys.readouterr().out
    assert "max_completion_tokens: 6" in shown
    assert "letters.py:letters" in shown
    assert "limit: 3" in shown
    assert main(["mtp", str(run), "--output_dir", "a", "--print_config"]) == 0
    assert "letters.py:letters" in capsys.readouterr().out


@pytest.mark.slow
def test_sft_trains_and_its_policy_samples(model, tmp_path, capsys):
    words = ["--output_dir", str(tmp_path / "sft"), "--model", model, "--threads", "1"]
    words += ["--data.task_options.levels", "[1]"]
    words += ["--steps", "3", "--data.limit", "20", "--eval.limit", "2", "--log.trackers", "[]"]
    words += ["--rollout.max_completion_tokens", "5"]
    assert main(["sft", *words]) == 0
    shown = capsys.readouterr().out
    assert "before, sampled" in shown
    assert "after, greedy" in shown
    assert [line["step"] for line in read_metrics(tmp_path / "sft")] == [0, 1, 2, 3]
    prompts = tmp_path / "p.jsonl"
    prompts.write_text('{"prompt": "Tom has 5 pens. "}\n')
    words = ["--prompts", str(prompts), "--rollout.max_completion_tokens", "4", "--threads", "1"]
    assert main(["sample", str(tmp_path / "sft"), *words]) == 0
    assert main(["sft", "--output_dir", str(tmp_path / "sft"), "--model", model]) == 1
    assert "already holds a run" in capsys.readouterr().err


@pytest.mark.parametrize(
    ("words", "message"),
    [
        (
            ["sample", "tinny", "--prompts", "{prompts}"],
            "model='tinny': there is no such folder; did you mean the preset 'tiny'?",
        ),
        (["sample", "{model}", "--prompts", "{dir}/none.jsonl"], "none.jsonl: there is no such file"),
        (["sample", "{model}", "--prompts", "{dir}/bad.jsonl"], "bad.jsonl, line 2: not JSON"),
        (["eval", "./nowhere"], "model='./nowhere': there is no such folder"),
        (
            ["eval", "{dir}", "--data.task_options", "{levels: [1]}", "--eval.limit", "2"],
            "is neither a preset, a checkpoint folder nor",
        ),
        (["eval", "{model}", "--data.task_options", "{levels: [7]}"], "7"),
        (["train", "--output_dir", "{dir}/r", "--model", "./nowhere"], "model='./nowhere': there is no such folder"),
        (
            ["train", "--model", "tiny", "--output_dir", "{dir}/r", "--data.name", "{dir}/none.jsonl"],
            "there is no file or folder",
        ),
        (["train", "--model", "tiny", "--output_dir", "{dir}/r", "--rewards", "[{function: gsm9k}]"], "gsm8k"),
        (["report", "{dir}"], "metrics.jsonl"),
        (["report", "{dir}/nosuch"], "RUN={dir}/nosuch: there is no such folder"),
        (["train", "--model", "gpt2", "--output_dir", "{dir}/r"], "write its owner too: OWNER/gpt2"),
        (
            ["train", "--model", "tiny", "--output_dir", "{prompts}/r"],
            "output_dir: {prompts}/r cannot be written (Not a directory",
        ),
        (
            ["train", "--model", "tiny", "--output_dir", "{prompts}/r", "--dry_run"],
            "output_dir: {prompts}/r cannot be written",
        ),
        (["policy", "inspect", "{model}", "--json", "{prompts}/out.json"], "json: [Errno"),
        (["convert", "{model}", "{dir}/new"], "model_type='deepseek_v3' cannot be carried over exactly"),
        (["convert", "{model}", "{dir}"], "is not empty; remove it or name another"),
    ],
)
def test_what_cannot_be_done_is_one_message_and_exit_code_1(model, tmp_path, capsys, words, message):
    (tmp_path / "prompts.jsonl").write_text('{"prompt": "a"}\n')
    (tmp_path / "bad.jsonl").write_text('{"prompt": "a"}\n{"prompt"\n')
    names = {"{model}": model, "{dir}": str(tmp_path), "{prompts}": str(tmp_path / "prompts.jsonl")}
    for name, value in names.items():
        words = [word.replace(name, value) for word in words]
        message = message.replace(name, value)
    assert main(words) == 1
    shown = capsys.readouterr().err
    assert message in shown
    assert "Traceback" not in shown
    assert not (tmp_path / "r").exists()


@pytest.mark.parametrize("words", [["trane"], ["sample", "tiny"], ["train", "--resume"]])
def test_words_that_are_no_command_exit_with_2(words, capsys):
    ends(words, 2)
    assert "usage: quartet" in capsys.readouterr().err


def test_a_bug_keeps_its_traceback(run, monkeypatch):
    def broken(*_: object) -> None:
        raise KeyError("a bug")

    monkeypatch.setattr("grpo.cli.commands.eval.evaluate_model", broken)
    with pytest.raises(KeyError):
        main(["eval", str(run), "--threads", "1"])


def test_a_package_that_is_missing_is_named_and_nothing_hides_it(tmp_path):
    (tmp_path / "torch.py").write_text("raise ModuleNotFoundError(\"No module named 'torch'\", name='torch')")
    code = f"import sys; sys.path.insert(0, {str(tmp_path)!r}); from grpo.cli.parse import main; "
    code += "sys.exit(main(sys.argv[1:]))"
    command = [sys.executable, "-c", code, "train", "--model", "tiny", "--output_dir", str(tmp_path / "r")]
    done = subprocess.run(command, cwd=ROOT, capture_output=True, text=True)
    assert done.returncode == 1
    assert done.stderr.startswith("quartet: the package 'torch' is not installed in this environment (")
    assert "Traceback" not in done.stderr


def test_every_expected_error_is_where_the_table_says():
    for module, name in EXPECTED.items():
        assert issubclass(getattr(import_module(module), name), Exception)


class Process:
    """`python -m grpo train` in a session of its own, as a terminal would start it."""

    def __init__(self, model: str, letters: str, folder: Path, workers: int) -> None:
        self.folder, self.started = folder, list[psutil.Process]()
        command = [sys.executable, "-m", "grpo", "train", "--output_dir", str(folder)]
        command += ["--model", model, "--rollout.workers", str(workers), *MICRO_RUN]
        command += ["--rewards", f"[{{function: '{letters}'}}]", "--steps", "100000", "--checkpoint.every", "1000"]
        self.stderr = folder.with_suffix(".err")
        self.process = (subprocess.Popen if workers else Copy)(  # a copy may have had another Ray
            command,
            cwd=ROOT,
            env=os.environ | {"OMP_NUM_THREADS": "1", "PYTHONFAULTHANDLER": "1"},
            stdout=subprocess.DEVNULL,
            stderr=self.stderr.open("w"),
            start_new_session=True,
        )

    def wait_for_step(self, step: int) -> None:
        deadline = time.monotonic() + 120
        while time.monotonic() < deadline and self.process.poll() is None:
            metrics = self.folder / "metrics.jsonl"
            if metrics.exists() and f'"step": {step},' in metrics.read_text():
                self.started = psutil.Process(self.process.pid).children(recursive=True)
                return
            time.sleep(0.05)
        self.give_up(f"step {step} was not reached")

    def end(self, number: signal.Signals, group: bool = False) -> tuple[int, str]:
        """Exit code and standard error; no process that it has started is left."""
        (os.killpg if group else os.kill)(self.process.pid, number)
        try:
            code = self.process.wait(timeout=60)
        except subprocess.TimeoutExpired:
            self.give_up(f"it did not end after {signal.Signals(number).name}")
        _, alive = psutil.wait_procs(self.started, timeout=20)
        assert not alive, [process.cmdline() for process in alive]
        return code, self.stderr.read_text()

    def give_up(self, why: str) -> NoReturn:
        """Fail with what it has said and with where every thread of it stands, and leave nothing."""
        started = self.started
        with suppress(psutil.NoSuchProcess):  # it has ended by itself
            started = started or psutil.Process(self.process.pid).children(recursive=True)
        self.process.send_signal(signal.SIGABRT)
        self.process.wait(timeout=60)
        for process in started:
            with suppress(psutil.NoSuchProcess):
                process.kill()
        pytest.fail(f"{why}: {self.stderr.read_text()[-6000:]}")


@pytest.mark.parametrize(
    ("number", "group", "workers"),
    [
        (signal.SIGTERM, False, 0),
        pytest.param(signal.SIGHUP, False, 0, marks=pytest.mark.long),
        pytest.param(signal.SIGINT, True, 0, marks=pytest.mark.long),  # a terminal's Ctrl-C reaches the whole group
        pytest.param(signal.SIGINT, True, 2, marks=pytest.mark.slow),
    ],
)
def test_a_signal_saves_the_last_whole_step_and_the_run_can_be_resumed(
    model, letters, tmp_path, capsys, number, group, workers
):
    folder = tmp_path / "r"
    run = Process(model, letters, folder, workers)
    run.wait_for_step(2)
    assert run.started  # at least the process that scores
    code, shown = run.end(number, group)
    assert code == 128 + number
    last = read_metrics(folder)[-1]["step"]
    ours = [f"quartet: stopped after step {last}; go on with --resume auto"]
    assert [line for line in shown.splitlines() if workers == 0 or line.startswith("quartet:")] == ours
    assert "Traceback" not in shown
    assert [path.name for path in (folder / "checkpoints").iterdir()] == [f"step_{last:06d}"]
    assert len(read_rollouts(folder, last)) == 4
    if workers == 0:
        assert main(["train", str(folder / "config.yaml"), "--resume", "auto", "--steps", str(last + 1)]) == 0
        assert [line["step"] for line in read_metrics(folder)] == list(range(1, last + 2))
        assert Policy.load(folder / "policy").mtp is not None


@pytest.mark.parametrize(
    ("number", "moment"),
    [(signal.SIGINT, "torch._C"), (signal.SIGTERM, "torch"), (signal.SIGHUP, "pydantic")],
)
def test_a_signal_during_imports_is_one_line(model, tmp_path, number, moment):
    """Whatever the module that is being imported makes of an exception."""
    (tmp_path / "sitecustomize.py").write_text(
        "import importlib.abc, os, sys, time\n"
        "class Signals(importlib.abc.MetaPathFinder):\n"
        "    def find_spec(self, name, path=None, target=None):\n"
        f"        if name == {moment!r}:\n"
        "            try:\n"
        f"                os.kill(os.getpid(), {int(number)})\n"
        "                time.sleep(5)\n"
        "            except BaseException as error:\n"
        "                raise ImportError('a library makes this of it') from error\n"
        "sys.meta_path.insert(0, Signals())\n"
    )
    command = [sys.executable, "-m", "grpo", "train", "--output_dir", str(tmp_path / "r"), "--model", model]
    env = os.environ | {"PYTHONPATH": f"{tmp_path}:{ROOT}"}
    done = subprocess.run(command, cwd=ROOT, env=env, capture_output=True, text=True, timeout=120)
    said = "interrupted" if number == signal.SIGINT else f"ended by {number.name}"
    assert (done.returncode, done.stderr) == (128 + number, f"quartet: {said}\n")


@pytest.mark.parametrize("number", [signal.SIGINT, signal.SIGTERM, signal.SIGHUP])
def test_a_signal_in_a_command_without_checkpoints_is_one_line(run, monkeypatch, capsys, number):
    def interrupt(*_: object) -> None:
        try:
            signal.raise_signal(number)
        except KeyboardInterrupt as error:
            raise RuntimeError("what a library makes of it") from error

    before = signal.getsignal(number)
    monkeypatch.setattr("grpo.cli.commands.eval.evaluate_model", interrupt)
    assert main(["eval", str(run)]) == 128 + number
    said = "interrupted" if number == signal.SIGINT else f"ended by {number.name}"
    assert capsys.readouterr().err == f"quartet: {said}\n"
    assert signal.getsignal(number) == before


@pytest.mark.long
def test_sigterm_while_ray_starts_is_one_line(model, letters, tmp_path):
    for delay in (0.2, 1.0, 2.0):
        run = Process(model, letters, tmp_path / f"{delay}", 2)
        deadline = time.monotonic() + 120
        while time.monotonic() < deadline and not any(
            "gcs_server" in child.name() for child in psutil.Process(run.process.pid).children(recursive=True)
        ):
            time.sleep(0.02)
        time.sleep(delay)
        run.started = psutil.Process(run.process.pid).children(recursive=True)
        code, shown = run.end(signal.SIGTERM)
        assert code == 143
        assert "Traceback" not in shown
        ours = [line for line in shown.splitlines() if line.startswith("quartet:")]
        assert len(ours) == 1
        assert re.match(r"quartet: stopped (before step 1|after step \d+); go on with --resume auto", ours[0])
