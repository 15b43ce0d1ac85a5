"""Every GRPO script of TRL's converts, or is refused with its reason; rehearsed, none is called wrong that is not.

QUARTET_TRL names a checkout of TRL's repository. Its scripts and those of its pages are read where they are.
"""

import json
import os
import re
from pathlib import Path

import pytest
import trl
from trl_hub import write_hub

from grpo.cli.parse import main

FOLDER = Path(os.environ.get("QUARTET_TRL", "."))
LORA = '--use_peft --lora_target_modules "q_proj" "v_proj"'
GSPO = f"--learning_rate 1e-5 --dtype bfloat16 --max_completion_length 1024 {LORA} --log_completions "
GSPO += "--per_device_train_batch_size 8 --num_generations 8 --importance_sampling_level sequence --epsilon 3e-4 "
GSPO += "--epsilon_high 4e-4 --beta 0.0 --loss_type grpo --gradient_accumulation_steps 2 --steps_per_generation 8"
BATCHED = f"--output_dir out --num_generations 32 --max_completion_length 1024 {LORA} --log_completions"
AGENT = "--use_vllm True --vllm_mode colocate --max_completion_length 1024 --log_completions True --max_steps 400"
PICTURES = f"--model_name_or_path Qwen/Qwen2.5-VL-3B-Instruct --output_dir out --max_completion_length 1024 {LORA}"
ARGUMENTS = {  # those of each script's own docstring
    "gspo.py": f"--model_name_or_path Qwen/Qwen3-0.6B --output_dir out {GSPO}",
    "grpo_continuous_batching.py": f"--model_name_or_path Qwen/Qwen3-1.7B {BATCHED}",
    "grpo_agent.py": f"--model_name_or_path Qwen/Qwen3-1.7B --output_dir out {AGENT}",
    "grpo_vlm.py": PICTURES,
    "gspo_vlm.py": PICTURES,
    "carla_vlm_gemma.py": "--env-urls http://localhost:1 http://localhost:2",
    "grpo.py": "--model_name_or_path Qwen/Qwen2.5-0.5B-Instruct --dataset_name trl-lib/DeepMath-103K "
    "--reward_funcs accuracy_reward --output_dir out",
}
REASONS = {  # of those that are refused, by what `quartet from-trl` prints
    "a reward reads the environments' objects": r"a reward reads `environments`",
    "its data has pictures": r"its rows have pictures",
    "it has no data": r"the trainer has none",
    "another trainer": r"AsyncGRPOTrainer is not read",
    "it asks a server or the hub first, which are not here": r"printed last:.*(openreward|LocalEntryNotFoundError)",
    "the page shows a part of it only": r"printed last:.*NameError",
}
TRUE = {  # what is wrong with a script of theirs
    "grpo_continuous_batching.py": r"TRL itself refuses.*\(8\) must be divisible by num_generations \(32\)",
    "grpo_trainer_4.py": r"TRL itself refuses.*\(4\) must be divisible by num_generations \(8\)",  # alone
    "grpo_trainer_13.py": r"NameError: name 'check_math_solution' is not defined",
    "lora_without_regret_1.py": r"the model thinks before it answers, and 512 tokens cut it",
}


def scripts() -> list[Path]:
    """The scripts that make a GRPOTrainer or a kind of it, and TRL's own command."""
    found = [path for path in (FOLDER / "examples/scripts").rglob("*.py") if "GRPOTrainer(" in path.read_text()]
    return [*sorted(found), Path(trl.__file__).parent / "scripts/grpo.py"]


def pages(folder: Path) -> list[Path]:
    """Writes the whole scripts of TRL's pages: those that make their trainer of what they have imported."""
    written = []
    for page in sorted((FOLDER / "docs/source").glob("*.md")):
        blocks = re.findall(r"```python\n(.*?)```", page.read_text(), re.DOTALL)
        for number, text in enumerate(blocks):
            whole = "GRPOTrainer(" in text and "import" in text and "..." not in text
            if whole:
                written.append(folder / f"{page.stem}_{number}.py")
                written[-1].write_text(text)
    return written


@pytest.mark.slow
@pytest.mark.long
@pytest.mark.skipif("QUARTET_TRL" not in os.environ, reason="QUARTET_TRL names no checkout of TRL's repository")
def test_every_script_of_trls_converts_or_is_refused(copied_scripts, hf_policy, tmp_path, monkeypatch, capsys):
    monkeypatch.chdir(tmp_path)
    write_hub(tmp_path, hf_policy, Path(trl.__file__).parent / "chat_templates")
    capsys.readouterr()
    monkeypatch.syspath_prepend(tmp_path / "servers")
    monkeypatch.setenv("PYTHONPATH", str(tmp_path / "servers"))
    lines, false = [], []
    for script in [*scripts(), *pages(tmp_path)]:
        words = [str(script), f"--arguments={ARGUMENTS.get(script.name, '')}"]
        ended = main(["from-trl", *words, "--out", f"converted/{script.stem}.yaml"])
        said = capsys.readouterr().err
        reason = next((words for words, printed in REASONS.items() if re.search(printed, said, re.DOTALL)), "")
        if ended:
            lines.append(f"{script.name:30} is refused: {reason or said}")
            false += [] if reason else [script.name]
            continue
        main(["rehearse", *words, "--json", "rehearsal.json", "--threads", "1"])
        capsys.readouterr()
        findings = json.loads(Path("rehearsal.json").read_text())["findings"]
        worst = [each for each in findings if each["severity"] != "note"]
        lines.append(f"{script.name:30} converts; {len(worst)} findings and {len(findings) - len(worst)} warnings")
        for finding in worst:
            lines.append(f"{'':30} {finding['severity']} {finding['kind']}: {finding['evidence'][:200]}")
            if not re.search(TRUE.get(script.name, "nothing"), finding["evidence"]):
                false.append(lines[-1])
    with capsys.disabled():
        print("", *lines, sep="\n")
    assert false == []
    assert sum("converts" in line for line in lines) >= 10
