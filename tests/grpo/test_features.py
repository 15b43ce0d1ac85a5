"""Features leave whole: without its files and its line of a table a feature is gone, and the demo trains as before."""

import json
import re
import shutil
import subprocess
import sys
from pathlib import Path

import pytest
import torch
from copies import Copy
from safetensors import safe_open

from grpo.config.features import FEATURES
from review.readers.run_folder import documented

ROOT = Path(__file__).parents[2]
TABLE, SAMPLERS = "grpo/config/features.py", "rollout/workers/kinds.py"
ENVIRONMENTS = [
    "calculator",
    "episodes",
    "families",
    "format",
    "mcp",
    "openenv",
    "protocol",
    "python",
    "response",
    "verifiers",
]
# By feature: its files and folders, the file of its table and how its line there begins, if it has one.
LEAVING = {
    "distill": (
        ["grpo/config/distill.py", "grpo/learner/terms/distill.py", "grpo/learner/terms/teacher_server.py"],
        (TABLE, 'Feature("distill"'),
    ),
    "balance": (["grpo/config/balance.py", "grpo/learner/terms/balance.py"], (TABLE, 'Feature("balance"')),
    "value": (["grpo/config/value.py", "grpo/learner/terms/value.py"], (TABLE, 'Feature("value"')),
    "draft_head": (["grpo/learner/terms/draft_head.py"], (TABLE, 'Feature("draft_head"')),
    "curriculum": (["grpo/config/curriculum.py", "grpo/steps/curriculum.py"], (TABLE, 'Feature("curriculum"')),
    "zero_variance_steps": (["grpo/steps/zero_variance_steps.py"], (TABLE, 'Feature("zero_variance_steps"')),
    "alarms": (["grpo/steps/alarms.py", "review/findings/alarms.py"], (TABLE, 'Feature("alarms"')),
    "mix": (["grpo/steps/mix.py", "grpo/task/mix.py", "grpo/data/mix.py"], (TABLE, 'Feature("mix"')),
    "Ray workers": (
        ["rollout/workers/ray_pool.py", "rollout/workers/worker.py", "rollout/workers/actors.py"],
        (SAMPLERS, '"ray"'),
    ),
    "vLLM": (["rollout/vllm", "grpo/steps/vllm.py", "grpo/source/vllm_token.py"], (SAMPLERS, '"vllm"')),
    "agents": (["grpo/endpoint"], None),
    "environments and tools": ([f"rollout/environments/{name}.py" for name in ENVIRONMENTS], None),
    "graphs": (["rollout/compiled"], None),
    "reward models": (["grpo/task/reward_models.py"], None),
    "conversion of dense models": (["policies/conversion"], None),
    "the page": (["review/page", "review/compare"], None),
    "TRL's users": (["grpo/trl_bridge.py"], None),
}
ALONE = [pytest.param([feature], id=feature, marks=pytest.mark.long) for feature in LEAVING]
CASES = [pytest.param([*LEAVING], id="all"), *ALONE]  # CI tries them all at once, a nightly run each alone
SHORT = ["--steps=2", "--sft.steps=3", "--eval.limit=0", "--prompts_per_step=4", "--checkpoint.every=1"]
SHORT += ["--rollout.max_completion_tokens=12", "--rollout.draft_tokens=2", "--data.limit=200", "--log.trackers=[]"]


def tree(folder):
    """A copy of what is installed, and of word problems, whose run drafts and has a draft head that learns."""
    for package in ("grpo", "policies", "review", "rewards", "rollout", "benchmarks/learn"):
        shutil.copytree(ROOT / package, folder / package, ignore=shutil.ignore_patterns("__pycache__"))
    return folder


def demo(folder, start=subprocess.Popen):
    """Two steps by the code in this folder: the weights, and the metrics that it documents. A clock measures what
    drafts cost, so their number is fixed."""
    code = "import json, sys; from review.readers.run_folder import documented; print(json.dumps(documented())); "
    code += "from grpo.__main__ import main; sys.exit(main())"
    words = [str(folder / "benchmarks/learn/words.yaml"), *SHORT, "--output_dir", str(folder / "run")]
    environment = {"PYTHONPATH": str(folder), "OMP_NUM_THREADS": "1", "PATH": "/usr/bin:/bin", "HOME": str(folder)}
    pipes = {"stdout": subprocess.PIPE, "stderr": subprocess.PIPE, "text": True}
    ran = start([sys.executable, "-P", "-c", code, "train", *words], cwd=folder, env=environment, **pipes)
    output, errors = ran.communicate()
    assert ran.returncode == 0, output[-2000:] + errors[-4000:]
    with safe_open(folder / "run/policy/model.safetensors", "pt") as file:
        weights = {name: file.get_tensor(name) for name in file.keys()}  # noqa: SIM118
    return weights, json.loads(output.splitlines()[0])


def leave(features, folder):
    """Deletes their files. All metrics stay documented but those that these files had; returns the others."""
    paths = [folder / name for feature in features for name in LEAVING[feature][0]]
    written = "".join(file.read_text() for path in paths for file in [*path.rglob("*.py"), path] if file.is_file())
    for path in paths:
        shutil.rmtree(path) if path.is_dir() else path.unlink()
    return {name: meaning for name, meaning in documented().items() if f'"{name}": "' not in written}


@pytest.fixture(scope="module")
def whole(tmp_path_factory):
    """The weights of the code that is imported here: nothing has left."""
    weights, metrics = demo(tree(tmp_path_factory.mktemp("whole")), Copy)
    assert metrics == documented()
    return weights


@pytest.mark.slow
@pytest.mark.parametrize("features", CASES)
def test_a_feature_leaves_whole(features, whole, tmp_path):
    folder = tree(tmp_path)
    rest = leave(features, folder)
    for file, line in filter(None, (LEAVING[feature][1] for feature in features)):
        table = folder / file
        text = table.read_text()
        shorter = re.sub(rf"^ *{re.escape(line)}.*\n", "", text, flags=re.MULTILINE)
        assert len(text.splitlines()) == len(shorter.splitlines()) + 1, "a line of the table"
        table.write_text(shorter)
    weights, metrics = demo(folder)
    assert metrics == rest
    layers = max(int(name.split(".")[2]) for name in whole if name.startswith("model.layers."))
    for name, tensor in whole.items():
        if "draft_head" in features and name.startswith(f"model.layers.{layers}."):
            continue  # that is the head, which nothing teaches then
        assert torch.equal(weights[name], tensor), name
    if len(features) == len(LEAVING):
        gone = documented().keys() - rest.keys()
        parts = ("agent/", "alarm/", "heads/", "moe/", "value/")
        assert {name for name in documented() if name.startswith(parts)} < gone
        assert {"loss/teacher_kl", "loss/mtp", "curriculum/seen", "faults/worker", "faults/vllm"} < gone
        assert "draft/mtp_head_age" in gone


def test_every_feature_of_the_table_is_tried():
    assert {feature.name for feature in FEATURES} <= LEAVING.keys()
