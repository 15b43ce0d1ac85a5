"""What every test may rely on: one thread, no network, signals that end a process, seeded generators, a limit of time,
and real GSM8K where QUARTET_GSM8K or a folder beside the checkout has it."""

import copy
import faulthandler
import functools
import gc
import json
import os
import random
import resource
import signal
import sys
import time
import zlib
from collections.abc import Callable, Iterator
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import copies
import hypothesis
import numpy
import pytest

os.environ |= {  # before anything imports torch, transformers or ray
    "OMP_NUM_THREADS": "1",
    "MKL_NUM_THREADS": "1",
    "TOKENIZERS_PARALLELISM": "false",
    "HF_HUB_OFFLINE": "1",
    "HF_DATASETS_OFFLINE": "1",
    "RAY_USAGE_STATS_ENABLED": "0",
}
STDERR, WRITES_NOTHING = pytest.StashKey[int](), pytest.StashKey[bool]()
LIMIT_S, SLOW_LIMIT_S = 300, 3600  # of one test; the time that it takes on a busy machine is not known

# Under nohup or in the background of a script some signals are ignored, and every child would inherit that. A handler
# is not inherited: what a test starts has the usual ones, while pytest itself, and its workers, outlive a terminal.
for number in (signal.SIGINT, signal.SIGQUIT, signal.SIGHUP):
    if signal.getsignal(number) == signal.SIG_IGN or ("PYTEST_XDIST_WORKER" in os.environ and number != signal.SIGINT):
        signal.signal(number, signal.default_int_handler if number == signal.SIGINT else lambda *_: None)

os.fsync = lambda _: None  # no test turns the power off, and waiting for a disk is a tenth of a run's time

# The same examples at every run, however long one of them takes.
hypothesis.settings.register_profile("seeded", derandomize=True, deadline=None)
hypothesis.settings.load_profile("seeded")


def seed(name: str) -> None:
    """The global generators of all that is loaded. A torch that is loaded later begins with the same seed each time."""
    number = zlib.crc32(name.encode())
    random.seed(number)
    numpy.random.seed(number)
    if "torch" in sys.modules:
        sys.modules["torch"].manual_seed(number)


@pytest.fixture(autouse=True)
def seeded(request: pytest.FixtureRequest) -> None:
    seed(request.node.name)


def pytest_fixture_setup(fixturedef: Any) -> None:
    """What several tests share is the same whichever of them asks for it first."""
    if fixturedef.scope != "function":
        seed(fixturedef.argname)


def pytest_configure(config: pytest.Config) -> None:
    """Collection imports some hundred files, and most of what it makes stays: looking for garbage there takes a fifth
    of the time, and so does compiling the files, which every worker would do again where no bytecode is written."""
    config.stash[STDERR] = os.dup(2)  # captured later
    config.stash[WRITES_NOTHING], sys.dont_write_bytecode = sys.dont_write_bytecode, False
    gc.disable()


def pytest_collection_finish(session: pytest.Session) -> None:
    sys.dont_write_bytecode = session.config.stash[WRITES_NOTHING]
    gc.freeze()  # else the collector reads all modules and all tests again and again, for a tenth of the time
    gc.enable()


@pytest.hookimpl(wrapper=True)
def pytest_runtest_protocol(item: pytest.Item) -> Iterator[None]:
    """A test that takes too long ends this process, which first shows where every thread of it is. Timers that raise in
    the main thread would be the ones that a run sets itself."""
    quick = not any(item.get_closest_marker(name) for name in ("slow", "gpu", "peer", "browser"))
    end = time.monotonic() + (LIMIT_S if quick else SLOW_LIMIT_S)
    file = item.config.stash[STDERR]
    copies.arm = lambda: faulthandler.dump_traceback_later(max(0.1, end - time.monotonic()), exit=True, file=file)
    copies.arm()
    try:
        return (yield)
    finally:
        faulthandler.cancel_dump_traceback_later()


@pytest.hookimpl(wrapper=True)
def pytest_sessionfinish(session: pytest.Session, exitstatus: int) -> Iterator[None]:
    """Write the CPU seconds of a whole run, for tests/house.py. Workers have ended by then, so they are counted."""
    yield
    config = session.config
    is_whole = config.args_source is config.ArgsSource.TESTPATHS and not config.option.keyword
    if is_whole and exitstatus in (0, 1) and "PYTEST_XDIST_WORKER" not in os.environ:
        used = [resource.getrusage(who) for who in (resource.RUSAGE_SELF, resource.RUSAGE_CHILDREN)]
        file = config.rootpath / ".cache/cpu_seconds.json"
        measured = json.loads(file.read_text()) if file.is_file() else {}
        measured[config.option.markexpr] = round(sum(each.ru_utime + each.ru_stime for each in used))
        file.parent.mkdir(exist_ok=True)
        file.write_text(json.dumps(measured, indent=1) + "\n")


def pytest_itemcollected(item: pytest.Item) -> None:
    if item.get_closest_marker("long"):
        item.add_marker("slow")


def pytest_runtest_setup(item: pytest.Item) -> None:
    if item.get_closest_marker("gpu"):
        import torch

        if not torch.cuda.is_available() and "QUARTET_GPU_TESTS" not in os.environ:
            pytest.skip("needs a CUDA device")


GSM8K = Path(os.environ.get("QUARTET_GSM8K") or Path(__file__).parents[1] / "../shared/data/gsm8k").resolve()
if GSM8K.is_dir():
    os.environ["QUARTET_GSM8K"] = str(GSM8K)  # also for what a test starts


@pytest.fixture(scope="session")
def gsm8k_folder() -> Path:
    """The folder that holds the real `train.jsonl` and `test.jsonl` of GSM8K."""
    if not (GSM8K / "train.jsonl").is_file():
        pytest.skip(f"GSM8K is not in {GSM8K}; QUARTET_GSM8K names another folder")
    return GSM8K


MICRO = {
    "hidden_size": 32,
    "intermediate_size": 48,
    "moe_intermediate_size": 16,
    "num_hidden_layers": 2,
    "num_attention_heads": 2,
    "num_key_value_heads": 2,
    "qk_nope_head_dim": 8,
    "qk_rope_head_dim": 8,
    "v_head_dim": 8,
    "kv_lora_rank": 12,
    "q_lora_rank": None,
    "n_routed_experts": 4,
    "num_experts_per_tok": 2,
    "n_shared_experts": 1,
    "n_group": 1,
    "topk_group": 1,
    "routed_scaling_factor": 1.0,
    "first_k_dense_replace": 1,
    "max_position_embeddings": 256,
    "initializer_range": 0.2,
}


@pytest.fixture
def accelerator(monkeypatch: pytest.MonkeyPatch) -> Callable[..., None]:
    """`accelerator("xpu", count=2, is_bf16_supported=...)`: torch says that this machine has such devices, and the
    module of their kind has these functions."""
    import torch

    def pretend(kind: str, count: int = 1, **functions: Any) -> None:
        monkeypatch.setattr(torch.accelerator, "current_accelerator", lambda **_: torch.device(kind))
        monkeypatch.setattr(torch.accelerator, "device_count", lambda: count)
        module = torch.get_device_module
        own = SimpleNamespace(**functions)
        monkeypatch.setattr(torch, "get_device_module", lambda device: own if device.type == kind else module(device))

    return pretend


@pytest.fixture(scope="session")
def micro_preset() -> Iterator[str]:
    """`model: micro`: one dense and one MoE layer of width 32, small enough for hundreds of forwards in a test."""
    from policies.presets import PRESETS

    with pytest.MonkeyPatch.context() as patch:
        patch.setitem(PRESETS, "micro", MICRO)
        yield "micro"


@pytest.fixture(scope="session")
def micro_policy(micro_preset: str) -> Callable[[int], Any]:
    """`micro_policy(seed)`: a fresh micro policy with an MTP head, and a tokenizer of word problems."""
    import torch

    from policies.presets import build
    from rewards.data.word_problems import word_problems

    torch.set_num_threads(1)
    corpus = [f"{row['question']}\n{row['answer']}\n" for row in word_problems("train", [1], count=200)]
    built = functools.cache(lambda seed: build(micro_preset, corpus, seed))  # which takes three times as long as a copy
    return lambda seed=0: copy.deepcopy(built(seed))


@pytest.fixture(scope="session")
def model(micro_policy: Callable[[int], Any], tmp_path_factory: pytest.TempPathFactory) -> str:
    """The folder of a saved micro policy, for processes that know no micro preset. No test writes into it."""
    folder = tmp_path_factory.mktemp("models") / "micro"
    micro_policy(0).save(folder)
    return str(folder)


@pytest.fixture(scope="session")
def letters() -> str:
    """A reward by path that even an untrained policy earns in parts, so that groups are not tied."""
    return f"{Path(__file__).parent / 'cases/letters.py'}:letters"


@pytest.fixture(scope="session")
def micro_config(micro_preset: str, letters: str) -> Callable[..., Any]:
    """`micro_config(output_dir, **{"rollout.workers": 2})`: the options of a run of three steps, about a second."""
    from grpo.config.run import TrainConfig
    from rewards.config.options import load

    options = {
        "model": micro_preset,
        "dtype": "float32",
        "threads": 1,
        "steps": 3,
        "prompts_per_step": 4,
        "data.limit": 24,
        "sft.steps": 3,
        "sft.batch_size": 4,
        "sft.learning_rate": 1e-2,
        "rollout.group_size": 4,
        "rollout.max_completion_tokens": 10,
        "rollout.draft_tokens": 2,
        "rollout.prompts_per_shard": 2,
        "rewards": [{"function": letters}],
        "learner.learning_rate": 1e-2,
        "mtp.depth": 2,
        "checkpoint.every": 1,
        "checkpoint.keep": None,
        "log.trackers": [],
    }

    def config(output_dir: Path, **given: Any) -> Any:
        base = {} if "data.name" in given else {"data.task_options.levels": [1]}
        base |= options | {"output_dir": output_dir}
        if "data" in given:  # a list of sources, which has all of their options
            base = {key: value for key, value in base.items() if not key.startswith("data.")}
        return load(TrainConfig, None, base | given)

    return config


@pytest.fixture(scope="session")
def run_words(model: str, letters: str) -> Callable[..., list[str]]:
    """`run_words(folder, "sft", **{"steps": 3})`: the words after `python` of a small run in a process of its own."""

    def words(folder: Path, command: str = "train", reward: str = letters, **given: object) -> list[str]:
        options: dict[str, object] = {
            "output_dir": folder,
            "model": model,
            "threads": 1,
            **({} if "data.name" in given else {"data.task_options.levels": [1]}),
            "data.limit": 12,
            "rollout.max_completion_tokens": 6,
            "rewards": f"[{{function: '{reward}'}}]",
            "mtp.depth": 2,
            "log.trackers": "[]",
            "checkpoint.every": 1,
        }
        if command == "train":
            options |= {"steps": 2, "prompts_per_step": 3, "rollout.group_size": 3, "learner.learning_rate": 1e-3}
        both = (word for key, value in (options | given).items() for word in (f"--{key}", str(value)))
        return ["-m", "grpo", command, *both]

    return words


@pytest.fixture(scope="session")
def random_policy() -> Callable[..., Any]:
    """`random_policy(seed, mtp=True, **config)`: a micro policy in which nothing is neutral.

    Norms, biases, the router's correction bias and the MTP head are random too, so that leaving one out shows. Its
    distributions are far from uniform. `config` overrides MICRO.
    """
    import torch
    from transformers import DeepseekV3Config, DeepseekV3ForCausalLM, GenerationConfig

    from policies.mtp import MTPHead
    from policies.policy import Policy
    from policies.presets import small_tokenizer

    torch.set_num_threads(1)
    tokenizer = small_tokenizer(["3 + 4 = 7\n", "how many apples are left?\n"])

    def build(seed: int = 0, mtp: bool = True, **config: Any) -> Policy:
        chosen = MICRO | {"vocab_size": len(tokenizer), "bos_token_id": None, "eos_token_id": 0} | config
        with torch.random.fork_rng(devices=[]), torch.no_grad():
            torch.manual_seed(seed)
            trunk = DeepseekV3ForCausalLM(DeepseekV3Config(**chosen)).eval()
            head = MTPHead(trunk.config) if mtp else None
            for module in (trunk, head) if head else (trunk,):
                for name, tensor in module.state_dict().items():
                    if "norm" in name:
                        tensor.copy_(1 + 0.3 * torch.randn(tensor.shape))
                    elif "bias" in name:
                        tensor.copy_(0.3 * torch.randn(tensor.shape))
            trunk.get_output_embeddings().weight.mul_(2)
        trunk.generation_config = GenerationConfig(eos_token_id=0, pad_token_id=1)
        return Policy(trunk, head, copy.deepcopy(tokenizer))  # tests give it a chat template

    return build


@pytest.fixture(scope="session")
def hf_policy() -> Callable[..., Any]:
    """`hf_policy("qwen3", seed, **config)`: a micro policy of another architecture; norms and biases are random too."""
    import torch
    from transformers import AutoConfig, AutoModelForCausalLM

    from policies.policy import Policy
    from policies.presets import small_tokenizer

    torch.set_num_threads(1)
    tokenizer = small_tokenizer(["3 + 4 = 7\n", "how many apples are left?\n"])
    sizes = {
        "vocab_size": len(tokenizer),
        "hidden_size": 32,
        "intermediate_size": 48,
        "num_hidden_layers": 3,
        "num_attention_heads": 4,
        "num_key_value_heads": 2,
        "max_position_embeddings": 256,
        "initializer_range": 0.2,
        "bos_token_id": None,
        "eos_token_id": 0,
        "pad_token_id": 1,
    }

    def build(kind: str, seed: int = 0, **given: Any) -> Policy:
        config = AutoConfig.for_model(kind, **sizes | given)
        with torch.random.fork_rng(devices=[]), torch.no_grad():
            torch.manual_seed(seed)
            trunk = AutoModelForCausalLM.from_config(config, dtype=torch.float32).eval()
            for name, tensor in trunk.state_dict().items():
                if "norm" in name or name.endswith("bias"):
                    tensor.add_(0.3 * torch.randn(tensor.shape))
        return Policy(trunk, None, tokenizer)

    return build
