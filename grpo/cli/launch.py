"""One run: in one process, in those that accelerate or torchrun has launched, or in those that Ray Train launches."""

from __future__ import annotations

import os
import shutil
from dataclasses import replace
from typing import Any, cast

from torch.distributed import get_default_backend_for_device

from grpo.config.run import LearningConfig, TrainConfig
from grpo.learner.parallel import RankFailed
from grpo.run.stop import ASKED, Stopped, say_stopping, signals
from grpo.sft import sft
from grpo.source.policy_source import with_threads
from grpo.task.check import check_plan
from grpo.train import Result, train
from policies.devices import device_of
from policies.files.atomic import write_file
from rewards.config.problems import command_line


def launch(config: LearningConfig, **flags: Any) -> Result | None:
    """Runs `quartet train` or `quartet sft`. Returns what the summary shows, None in a process that shows none. `flags`
    are resume, stop_after and force."""
    if config.learner.workers and "WORLD_SIZE" not in os.environ:
        return _through_ray(config, flags)
    with command_line():
        act: Any = train if isinstance(config, TrainConfig) else sft
        result = act(config, **flags)
    return result if os.environ.get("RANK", "0") == "0" else None


def _through_ray(config: LearningConfig, flags: dict[str, Any]) -> Result:
    """Runs `learner.workers` ranks on the cluster of RAY_ADDRESS, or on one of our own. A signal reaches them through a
    file in the run folder, which all machines see. Raises Stopped, or RankFailed with the words of the rank that failed
    first."""
    config = with_threads(config, flags.get("resume"), check_plan(config).shape)
    os.environ |= {"RAY_TRAIN_METRICS_ENABLED": "0", "RAY_TRAIN_ENABLE_PREEMPTION_WATCHER": "0"} | os.environ
    from ray.train import RunConfig, ScalingConfig
    from ray.train.torch import TorchConfig, TorchTrainer
    from ray.train.v2._internal.execution.callback import ControllerCallback
    from ray.train.v2.api import data_parallel_trainer, exceptions

    from rollout.workers.cluster import start_ray, stop_ray

    if "RAY_ADDRESS" not in os.environ:  # it would ask the dashboard, which our own cluster has none of
        data_parallel_trainer.PlacementGroupCleanerCallback = ControllerCallback
    device = device_of(config.device).type
    gpus = 0 if device == "cpu" else 1
    config = config.model_copy(update={"output_dir": config.output_dir.absolute()})
    files, asked = config.output_dir / "ray", config.output_dir / ASKED
    workers, threads = config.learner.workers, config.threads or 1

    class Trainer(TorchTrainer):
        def _register_sigint_handler(self, controller: object) -> None:
            """Registers none: ours tells the ranks, which save."""

    def tell(number: int) -> None:
        asked.parent.mkdir(parents=True, exist_ok=True)
        write_file(asked, str(number))
        say_stopping(number)

    trainer = Trainer(
        _rank,
        train_loop_config={"config": config, "flags": flags, "at": os.getcwd()},
        torch_config=TorchConfig(get_default_backend_for_device(device)),
        scaling_config=ScalingConfig(None, workers, bool(gpus), {"CPU": threads, "GPU": gpus}),
        run_config=RunConfig(storage_path=str(files)),
    )
    asked.unlink(missing_ok=True)
    with signals.heard(tell):
        try:
            start_ray(workers * threads + config.whole_rollout.samplers)  # a rollout worker has one thread
            ended = trainer.fit().return_value
        except exceptions.TrainingFailedError as error:  # it knows the exception of each rank
            first = next(iter(getattr(error, "worker_failures", {}).values()), error)
            raise RankFailed(str(getattr(first, "_base_exc", first))) from error
        finally:
            asked.unlink(missing_ok=True)
            shutil.rmtree(files, ignore_errors=True)
            stop_ray()
    if isinstance(ended, Stopped):
        raise ended
    return ended


def _rank(job: dict[str, Any]) -> Result | Stopped | None:
    """Runs on each worker of Ray Train. Rank 0 returns how the run has ended."""
    os.chdir(job["at"])
    signals.asked_by = job["config"].output_dir / ASKED
    try:
        result = launch(job["config"], **job["flags"])
        return result and replace(result, policy=cast(Any, None))
    except Stopped as stopped:
        return stopped
    except RankFailed:
        raise
    except Exception as error:  # in words: Ray cannot carry every exception to the process that has started this one
        raise RankFailed(f"rank {os.environ['RANK']} failed: {type(error).__name__}: {error}") from None
