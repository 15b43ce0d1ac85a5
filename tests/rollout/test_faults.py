"""What a pool has lost is counted by kind, with the time that it cost, and too much of it ends the run."""

import pytest

import rollout.faults
from rollout.faults import Faults, RolloutError, why_died


@pytest.fixture
def clock(monkeypatch):
    class Clock:
        now = 0.0

        def monotonic(self) -> float:
            return self.now

    clock = Clock()
    monkeypatch.setattr(rollout.faults, "time", clock)
    return clock


def test_seconds_are_those_in_which_any_lost_work_was_missing(clock):
    """One shard is lost from 0 to 10, another from 4 to 7, twice; a third from 20 to 25: 15 seconds."""
    faults = Faults()
    faults.lost("worker", "worker 0", "killed", work="a", since=0)
    faults.lost("node", "worker 1", "left", work="b", since=4)
    faults.lost("worker", "worker 1", "killed", work="b", since=6)
    clock.now = 7
    faults.done("b")
    assert faults.metrics() == {"faults/worker": 2, "faults/node": 1}
    clock.now = 10
    faults.done("a")
    faults.done("never lost")
    faults.on_weight_sync()
    faults.lost("worker", "worker 0", "killed", work="c", since=20)
    clock.now = 25
    faults.done("c")
    assert faults.metrics() == {"faults/worker": 1, "faults/sampling_seconds": 15}
    assert faults.metrics() == {}


def test_too_many_losses_between_two_publications_end_the_run_with_the_culprit():
    told = []
    faults = Faults(lambda *what: told.append(what), most=1)
    faults.lost("worker", "worker 0", "first", work="a", since=0)
    faults.on_weight_sync()
    faults.lost("worker", "worker 1", "second", work="a", since=0)
    with pytest.raises(RolloutError, match="^2 losses since .* was worker 1: third. .*--resume auto$"):
        faults.lost("worker", "worker 1", "third", work="a", since=0)
    ends = ("it is replaced", "it is replaced", "the run ends")
    assert told == [("worker 0", "first", ends[0]), ("worker 1", "second", ends[1]), ("worker 1", "third", ends[2])]
    assert faults.metrics() == {"faults/worker": 2}


KILLED = "The actor died.\n\tclass_name: Worker\n\tpid: 32566\nIt is dead. Worker exit type: SYSTEM_ERROR ..."
LEFT = "The actor died because its node has died. Node Id: 8617f3fc0c6e9d9e\n\tthe actor's node was terminated"
RAISED = "The actor died: RuntimeError in its\n __init__"


def test_what_ray_says_of_a_dead_worker_in_fewer_words():
    killed = "its process 32566 was killed or crashed, perhaps since memory ran out"
    assert why_died(RuntimeError(KILLED)) == ("worker", killed)
    assert why_died(RuntimeError(LEFT)) == ("node", "its machine left the cluster (node 8617f3fc)")
    raised = "it died: The actor died: RuntimeError in its __init__"
    assert why_died(RuntimeError(RAISED)) == ("worker", raised)
