"""What vLLM's worker learns from us: a way to take published weights. vLLM mixes `Extension` into its worker class."""

from __future__ import annotations

from typing import TYPE_CHECKING

import quartet_bypasses as bypasses
from vllm.distributed.weight_transfer import WeightTransferEngineFactory

if TYPE_CHECKING:
    from vllm.distributed.weight_transfer.base import WeightTransferEngine

WeightTransferEngineFactory.register_engine("quartet", "quartet_transfer", "SharedMemory")
bypasses.allow_any_temperature()  # a worker checks the requests that reach it once more


class Extension:
    """What vLLM's workers can do more. Its method is called by `collective_rpc`, in every worker process of the
    engine."""

    weight_transfer_engine: WeightTransferEngine  # the worker's own

    def quartet_confirm(self) -> tuple[dict[str, str], list[str]]:
        return self.weight_transfer_engine.confirm()
