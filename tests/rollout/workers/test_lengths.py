from rollout.group import Completion, Prompt, RolloutGroup
from rollout.workers.ray_pool import Lengths


def group(name: str, *lengths: int) -> RolloutGroup:
    return RolloutGroup(Prompt(name, "", [1]), [Completion([1] * n, [0.0] * n, "", "stop", 0) for n in lengths])


def test_the_shard_that_should_take_longest_begins_first():
    """A prompt that was never sampled counts as the mean, and equals keep their order."""
    a, b, c, new = (Prompt(name, "", [1]) for name in ("a", "b", "c", "new"))
    lengths = Lengths()
    assert lengths.order([[a], [b], [c]]) == [0, 1, 2]
    lengths.saw([group("a", 2, 4), group("b", 30, 1), group("c", 8, 8), group("none")])
    assert lengths.order([[a, c], [a, b], [new], [c]]) == [1, 2, 0, 3]
    lengths.saw([group("b", 3)])
    assert lengths.order([[a], [b], [c]]) == [2, 0, 1]
    assert lengths.order([]) == []
