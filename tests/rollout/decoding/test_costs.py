"""What drafts cost: the table that is measured once."""

from collections import Counter

import pytest

from rollout.cost_table import Workload
from rollout.decoding import costs
from rollout.decoding.engine import Engine
from rollout.decoding.shard import Decoding

WORK = Workload(4, completion_tokens=60)


@pytest.fixture
def timed(monkeypatch):
    """Notes what `note` says of every decoding before each of its rounds, in the place of a clock."""

    def begin(note):
        noted, decode = [], Decoding.decode_round

        def at(decoding):
            noted.append(note(decoding.batch))
            return decode(decoding)

        monkeypatch.setattr(Decoding, "decode_round", at)
        return noted

    return begin


def test_a_slow_moment_of_the_machine_changes_no_choice(random_policy, timed, monkeypatch):
    """A draft costs half a round. The machine gets slower all the time, and one round of each kind hangs. All are
    compared with one and the same round without drafts."""
    now, speed, seen = [0.0], [1.0], Counter()

    def cost(batch):
        drafts = batch.drafts.max_depth
        if not drafts:
            speed[0] *= 1.1  # since the turn before
        seen[id(batch)] += 1
        hangs = 5 if drafts and seen[id(batch)] == 3 else 1
        now[0] += hangs * speed[0] * (1 + 0.5 * drafts)

    timed(cost)
    monkeypatch.setattr(costs.time, "perf_counter", lambda: now[0])
    table = Engine(random_policy(1)).measure_costs(WORK, 2)
    assert table.rows == [1, 2, 4]
    for rounds in table.rounds:
        assert rounds == pytest.approx([rounds[0], 1.5 * rounds[0], 2 * rounds[0]])


@pytest.mark.parametrize("mtp", [True, False])
def test_rounds_are_timed_in_the_middle_of_completions(random_policy, timed, mtp):
    lengths = timed(lambda batch: (batch.reader.cache.lengths_R.tolist(), batch.live.count.tolist()))
    Engine(random_policy(1, mtp=mtp)).measure_costs(WORK, 2)
    rounds = [counts for _, counts in lengths if max(counts) > 1]  # all but the first round of each
    assert all(30 < count <= 60 + 30 for counts in rounds for count in counts)
    assert all(min(own) >= 30 for own, counts in lengths if max(counts) > 30)


def test_the_middle_of_completions_lies_within_the_context(random_policy, timed):
    policy = random_policy(1)
    longest = timed(lambda batch: int((batch.live.prompt_length + batch.live.count).max()))
    Engine(policy).measure_costs(Workload(2, completion_tokens=10 * policy.max_length), 2)
    assert max(longest) < policy.max_length
