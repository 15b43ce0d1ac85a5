"""What every test may rely on: one thread, no network, and real GSM8K where it lies beside the checkout."""

import os
from pathlib import Path

import pytest

os.environ |= {  # before anything imports torch, transformers or ray
    "OMP_NUM_THREADS": "1",
    "MKL_NUM_THREADS": "1",
    "TOKENIZERS_PARALLELISM": "false",
    "HF_HUB_OFFLINE": "1",
    "HF_DATASETS_OFFLINE": "1",
    "RAY_USAGE_STATS_ENABLED": "0",
}


def pytest_runtest_setup(item: pytest.Item) -> None:
    if item.get_closest_marker("gpu"):
        import torch

        if not torch.cuda.is_available():
            pytest.skip("needs a CUDA device")


@pytest.fixture(scope="session")
def gsm8k_folder() -> Path:
    """The folder that holds the real `train.jsonl` and `test.jsonl` of GSM8K."""
    folder = Path(__file__).parents[1] / "../shared/data/gsm8k"
    if not (folder / "train.jsonl").is_file():
        pytest.skip("GSM8K does not lie in ../shared/data/gsm8k beside this checkout")
    return folder.resolve()
