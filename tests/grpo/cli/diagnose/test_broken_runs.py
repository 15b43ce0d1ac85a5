"""`quartet diagnose` on trainings that are broken on purpose in twelve ways, and on three healthy ones."""

from pathlib import Path

import pytest
from broken_runs import broken, healthy, make

from grpo.cli.diagnose.record import Record
from grpo.cli.diagnose.report import diagnose
from grpo.config.run import TrainConfig
from grpo.train import train

DEMO = Path(__file__).parents[4] / "benchmarks/learn/words.yaml"
WARM = {"steps": 1, "learner.learning_rate": 1e-12, "eval.limit": 0, "log.trackers": []}


@pytest.mark.slow
@pytest.mark.long  # three minutes of a warm start, and a third of a minute for each of fifteen runs
@pytest.mark.parametrize("unseen", [False, True], ids=["tuned", "unseen"])
def test_the_cause_comes_first_or_second_and_healthy_runs_get_none(tmp_path_factory, tmp_path, unseen):
    warm = tmp_path_factory.getbasetemp() / "warm"
    if not warm.exists():
        train(TrainConfig.read(DEMO, **WARM, threads=1, output_dir=str(warm)))
    kinds = {}
    for seed, (name, overrides) in enumerate((broken(warm / "policy", tmp_path, unseen) | healthy(unseen)).items()):
        run = make(name, warm / "policy", tmp_path, overrides, seed + 1)
        kinds[name] = [finding["kind"] for finding in diagnose(Record(run))]
    causes = [name for name in kinds if not name.startswith("healthy")]
    assert len(causes) == 12
    assert sum(name in kinds[name][:2] for name in causes) >= 10, kinds
    assert [kinds[name] for name in healthy(unseen)] == [[], [], []]
