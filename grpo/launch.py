"""One run: in one process, in those that accelerate or torchrun has launched, or in those that Ray Train launches."""

from __future__ import annotations

import os
import shutil
import threading
from typing import Any

from grpo.config.run import SftConfig, TrainConfig
from grpo.evaluation.held_out import Result
from grpo.learner.parallel import RankFailed, join
from grpo.policy_source import check_options, with_threads
from grpo.run import stop
from grpo.run.hardware import device_of
from grpo.run.stop import Stopped, StopSignal, ignore_signals
from grpo.sft import sft
from grpo.train import train
from policies.files.atomic import write_file
from rollout.places import refuse_open


def launch(config: SftConfig, **flags: Any) -> Result | None:
    """`quartet train` or `quartet sft`: what the summary shows, None in a process that shows none.

    `flags` are resume, stop_after and force.
    """
    check_options(config)
    if "WORLD_SIZE" not in os.environ and (config.learner.workers or config.rollout.samplers):
        refuse_open()
    config = with_threads(config, flags.get("resume"))
    if config.learner.workers and "WORLD_SIZE" not in os.environ:
        _through_ray(config, flags)
        return None
    ranks = join(device_of(config.device).type == "cpu", config.learner.parallel)
    if not ranks.first:
        ignore_signals()  # rank 0 decides how the run ends
    with ranks.together():
        run: Any = train if isinstance(config, TrainConfig) else sft
        result = run(config, ranks=ranks, **flags)
    return result if ranks.first else None


def _through_ray(config: SftConfig, flags: dict[str, Any]) -> None:
    """`learner.workers` ranks on the cluster of RAY_ADDRESS, or on one of our own on this machine.

    A signal reaches them through a file in the run folder, which all machines see. Raises Stopped, or RankFailed with
    the words of the rank that failed first.
    """
    os.environ |= {"RAY_TRAIN_METRICS_ENABLED": "0", "RAY_TRAIN_ENABLE_PREEMPTION_WATCHER": "0"} | os.environ
    from ray.train import RunConfig, ScalingConfig
    from ray.train.torch import TorchConfig, TorchTrainer
    from ray.train.v2._internal.execution.callback import ControllerCallback
    from ray.train.v2.api import data_parallel_trainer

    from rollout.cluster import start_ray, stop_ray

    if "RAY_ADDRESS" not in os.environ:  # it would ask the dashboard, which our own cluster has none of
        data_parallel_trainer.PlacementGroupCleanerCallback = ControllerCallback
    folder, workers, threads = config.output_dir.absolute(), config.learner.workers, config.threads or 1
    gpus = device_of(config.device).type == "cuda"
    asked, ended = folder / stop.ASKED, []
    asked.unlink(missing_ok=True)
    trainer = TorchTrainer(
        _rank,
        train_loop_config={
            "config": config.model_copy(update={"output_dir": folder}),
            "flags": flags,
            "at": os.getcwd(),
        },
        torch_config=TorchConfig("nccl" if gpus else "gloo"),
        scaling_config=ScalingConfig(None, workers, gpus, {"CPU": threads, "GPU": int(gpus)}),
        run_config=RunConfig(storage_path=str(folder / "ray")),
    )
    with StopSignal() as signal:
        start_ray(workers * threads + config.rollout.samplers * config.rollout.threads_per_worker)
        try:
            work = threading.Thread(target=lambda: ended.append(_end_of(trainer)), daemon=True)
            work.start()
            while work.is_alive():
                work.join(0.5)
                if signal.asked and not asked.exists():
                    write_file(asked, str(signal.number))  # whole or not there
        finally:
            asked.unlink(missing_ok=True)
            shutil.rmtree(folder / "ray", ignore_errors=True)
            stop_ray()
    if ended[0]:
        raise ended[0]


def _end_of(trainer: Any) -> Exception | None:
    """What rank 0 has ended with, where it did not reach its last step."""
    try:
        stopped = trainer.fit().return_value
        return Stopped(*stopped) if stopped else None
    except Exception as error:  # of Ray Train, which knows the exception of each rank
        failures = getattr(error, "worker_failures", {})
        first = next(iter(failures.values()), error)
        return RankFailed(str(getattr(first, "_base_exc", first)))


def _rank(given: dict[str, Any]) -> tuple[str, int] | None:
    """What each worker of Ray Train runs. Returns why the run has stopped before its end."""
    from grpo.commands.summary import summary

    os.chdir(given["at"])
    stop.asked_by = given["config"].output_dir / stop.ASKED
    try:
        if result := launch(given["config"], **given["flags"]):
            summary(result)
    except Stopped as error:
        return str(error), int(error.number)
    except Exception as error:  # in words: Ray cannot carry every exception to the process that has started this one
        words = f"rank {os.environ['RANK']} failed: {type(error).__name__}: {error}"
        raise RankFailed(str(error) if isinstance(error, RankFailed) else words) from None
    return None
