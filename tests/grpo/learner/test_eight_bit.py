"""AdamW with moments of 8 bits: what it holds, that it learns, and that it goes on to the same bits."""

import sys
from importlib import util
from pathlib import Path
from types import SimpleNamespace

import eight_bit_ranks
import pytest
import torch
from recorded import groups_of
from small_learner import small_learner
from start_ranks import results_of_ranks

from grpo.config.learner import LearnerOptions, MTPOptions
from grpo.learner import eight_bit
from grpo.learner.eight_bit import block_of, parts
from grpo.learner.learner import Learner
from grpo.learner.master_weights import MasterWeights
from grpo.run import checkpoint

EIGHT = LearnerOptions(optimizer="adamw_8bit", learning_rate=1e-3, tokens_per_micro_batch=60)
needs_torchao = pytest.mark.skipif(util.find_spec("torchao") is None, reason="torchao is not installed")


@pytest.mark.parametrize(
    ("shape", "block"),
    [((64, 64), 64), ((64, 512), 256), ((8, 96, 192), 192), ((4096,), 256), ((63, 64), 0), ((64, 577), 0)],
)
def test_a_block_divides_a_row(shape, block):
    assert block_of(torch.zeros(shape)) == block


@pytest.fixture(scope="module")
def wide_policy(random_policy):
    """Wide enough for moments of 8 bits, also on two ranks."""
    return lambda: random_policy(hidden_size=128, intermediate_size=192, moe_intermediate_size=64)


@needs_torchao
def test_moments_are_codes_and_come_back_to_the_same_bits(wide_policy):
    """Against AdamW: nearly the same step. Resumed from what a checkpoint keeps: the same one."""
    batch = groups_of(5)

    def steps(learner, numbers):
        for number in numbers:
            learner.step(learner.prepare(*batch), number)
        return {name: p.detach().clone() for name, p in learner.policy.named_parameters()}

    whole = small_learner(wide_policy(), EIGHT, MTPOptions(depth=2))
    steps(whole, (1, 2))
    tensors, state = whole.state()
    kept = {kind: {name: t.clone() for name, t in mapping.items()} for kind, mapping in tensors.items()}
    codes = [name for name in kept["optimizer"] if name.endswith(".codes")]
    assert len(codes) > 10
    assert all(kept["optimizer"][name].dtype == torch.uint8 for name in codes)
    numbers = [sum(part.nbytes for part in parts(m).values()) / m.numel() for m in _large_moments(whole)]
    assert max(numbers) <= 1 + 4 / 32
    expected = steps(whole, (3,))
    resumed = small_learner(wide_policy(), EIGHT, MTPOptions(depth=2))
    resumed.load_state(kept, state)
    found = steps(resumed, (3,))
    assert all(torch.equal(found[name], tensor) for name, tensor in expected.items())
    usual = small_learner(wide_policy(), EIGHT.model_copy(update={"optimizer": "adamw"}), MTPOptions(depth=2))
    begin = {name: p.detach().clone() for name, p in usual.policy.named_parameters()}
    moved = steps(usual, (1, 2, 3))
    far = torch.cat([(moved[name] - expected[name]).flatten() for name in moved]).norm()
    way = torch.cat([(moved[name] - begin[name]).flatten() for name in moved]).norm()
    assert 0 < far < 0.1 * way
    with pytest.raises(ValueError, match="moments have 8 bits; resume with learner.optimizer: adamw_8bit"):
        usual.load_state(kept, state)
    resumed.load_state(usual.state()[0], state)  # fp32 moments are rounded
    assert [name for name in resumed.state()[0]["optimizer"] if name.endswith(".codes")] == codes


@needs_torchao
@pytest.mark.parametrize("rounds", [True, False])
def test_small_steps_survive_in_bfloat16_by_stochastic_rounding_alone(rounds):
    """Below 1 the next number of bfloat16 is 1 - 2^-8. Fifty steps of 1e-4 make 0.995: 4,096 weights hold it in their
    mean, whose deviation is 7e-5, and each of them rounded to the nearest holds nothing. A step moves one in 39, and
    each time others: 1 - (38/39)^50 = 73 % in all."""
    linear = torch.nn.Linear(64, 64, bias=False, dtype=torch.bfloat16)
    torch.nn.init.ones_(linear.weight)
    masters = MasterWeights(linear, rounds=True)
    assert masters.of(linear.weight) is linear.weight
    group = {"params": [linear.weight], "lr": 1e-4, "weight_decay": 0.0}
    optimizer = eight_bit.adamw_8bit([group], (0.9, 0.95), rounds=rounds)
    chance = torch.random.get_rng_state()
    for _ in range(50):
        optimizer.zero_grad()
        for gradient in (1.0, 2**-9):  # a sum that bfloat16 would round away
            masters.backward(linear.weight.sum() * gradient)
        assert linear.weight.grad[0, 0].item() == 1 + 2**-9
        optimizer.step()
    assert linear.weight.float().mean().item() == pytest.approx(0.995 if rounds else 1.0, abs=3e-4)
    moved = (linear.weight != 1).float().mean().item()
    assert moved == pytest.approx(0.73 if rounds else 0.0, abs=0.03)
    assert torch.equal(chance, torch.random.get_rng_state())  # what is sampled next is another matter


def test_each_step_rounds_by_draws_of_its_own_and_a_resumed_run_by_the_same(monkeypatch):
    class Drawing:
        """Draws as torchao's optimizer does where it rounds, and counts its steps as that does."""

        def __init__(self, groups, betas, bf16_stochastic_round) -> None:
            self.state, self.drawn = {"weight": {"step": 0}}, []

        def step(self, closure) -> None:
            self.drawn.append(torch.rand(()).item())
            self.state["weight"]["step"] += 1

    monkeypatch.setitem(sys.modules, "torchao.optim", SimpleNamespace(AdamW8bit=Drawing))
    whole, resumed = (eight_bit.adamw_8bit([], (0.9, 0.95), rounds=True) for _ in range(2))
    chance = torch.random.get_rng_state()
    for _ in range(3):
        whole.step()
    resumed.state["weight"]["step"] = 2
    resumed.step()
    assert len(set(whole.drawn)) == 3
    assert resumed.drawn == whole.drawn[2:]
    assert torch.equal(chance, torch.random.get_rng_state())


@needs_torchao
def test_contract_9_stochastic_rounding_goes_on_to_the_same_bits(wide_policy):
    options = EIGHT.model_copy(update={"optimizer": "adamw_8bit_stochastic", "learning_rate": 1e-4})

    def learner() -> Learner:
        return small_learner(wide_policy().cast(torch.bfloat16), options, MTPOptions(depth=2))

    def steps(learner: Learner, numbers: range) -> dict[str, torch.Tensor]:
        for number in numbers:
            learner.step(learner.prepare(*groups_of(5)), number)
        return {name: p.detach().clone() for name, p in learner.policy.named_parameters()}

    whole, resumed = learner(), learner()
    before = steps(whole, range(1, 3))
    tensors, state = whole.state()
    resumed.load_state({kind: {n: t.clone() for n, t in mapping.items()} for kind, mapping in tensors.items()}, state)
    torch.manual_seed(99)
    after, again = steps(whole, range(3, 5)), steps(resumed, range(3, 5))
    assert all(torch.equal(again[name], tensor) for name, tensor in after.items())
    moved = [name for name in after if not torch.equal(after[name], before[name])]
    assert len(moved) > 20
    assert whole.masters.pairs == []


def _large_moments(learner):
    states = learner.optimizer.state.values()
    return [state["exp_avg"] for state in states if hasattr(state["exp_avg"], "codes")]


@needs_torchao
@pytest.mark.slow
@pytest.mark.parametrize("dtype", ["float32", "bfloat16"])  # the latter without masters, rounded by chance
def test_two_ranks_resume_to_the_same_bits_and_one_rank_takes_their_moments(wide_policy, tmp_path, dtype):
    wide_policy().save(tmp_path / "policy")

    def run(folder: str, size: int, *saved: Path):
        results_of_ranks(eight_bit_ranks.main, tmp_path / "policy", tmp_path / folder, dtype, *saved, size=size)
        return checkpoint.load(tmp_path / folder / "step_000003").tensors

    whole = run("whole", 2)
    resumed = run("resumed", 2, tmp_path / "whole/step_000002")
    for kind, mapping in whole.items():
        for name, tensor in mapping.items():
            assert torch.equal(tensor, resumed[kind][name]), name
    before = checkpoint.load(tmp_path / "whole/step_000002").tensors["optimizer"]
    assert sum(name.endswith(".codes") for name in before) > 10
    alone = run("alone", 1, tmp_path / "whole/step_000002")
    assert all(
        tensor.dtype == getattr(torch, dtype) for n, tensor in whole["policy"].items() if n.endswith("o_proj.weight")
    )
    for name, tensor in whole["policy"].items():
        close = {"rtol": 1e-3, "atol": 1e-4} if dtype == "float32" else {"rtol": 2**-6, "atol": 4e-3}
        far = ~torch.isclose(alone["policy"][name], tensor, **close)
        most = 1e-4 if dtype == "bfloat16" else 0  # one number of 32,768 moved 38 rates further, in bfloat16
        assert far.float().mean() <= most, name
