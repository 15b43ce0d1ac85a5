"""Run by test_watch.py in two processes: a training by TRL whose groups lie on both, plain and watched.

torchrun watched_ranks.py FOLDER      # FOLDER/plain/weights.safetensors are those at the end, and FOLDER/watched/...
"""

import sys
from pathlib import Path

from safetensors.torch import save_file

from review.watch import watch
from tests.review.test_watch import trainer_of

for how in ("plain", "watched"):
    folder = Path(sys.argv[1]) / how
    trainer = trainer_of(folder, ddp_backend="gloo", per_device_train_batch_size=6)
    if how == "watched":
        watch(trainer)
    trainer.train()
    if trainer.accelerator.is_main_process:
        model = trainer.accelerator.unwrap_model(trainer.model)
        save_file({name: weight.clone() for name, weight in model.named_parameters()}, folder / "weights.safetensors")
