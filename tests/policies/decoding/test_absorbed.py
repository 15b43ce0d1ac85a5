"""The decode path against stock transformers: same tokens in, same logits out, however the rows are batched."""

import pytest
import torch
from dense_models import dense_model

from policies.conversion.dense import convert_dense
from policies.decoding.absorbed import AbsorbedTrunk
from policies.policy import Policy

GROUPED = {"n_routed_experts": 8, "n_group": 4, "topk_group": 2, "num_experts_per_tok": 3, "routed_scaling_factor": 2.5}
WIDE_RANK = {"hidden_size": 64, "kv_lora_rank": 48}  # folding W_uk and W_uv away would cost more than it saves
YARN = {
    "rope_type": "yarn",
    "rope_theta": 1e4,
    "factor": 4.0,
    "original_max_position_embeddings": 64,
    "beta_fast": 32.0,
    "beta_slow": 1.0,
    "mscale": 1.0,
    "mscale_all_dim": 0.7,
}
CONFIGS = {
    "plain": {},
    "query_latent": {"q_lora_rank": 10},
    "expert_groups": GROUPED,
    "weights_not_normalised": {"norm_topk_prob": False},
    "biases": {"attention_bias": True},
    "biases_and_query_latent": {"attention_bias": True, "q_lora_rank": 10},
    "rope_in_halves": {"rope_interleave": False},
    "yarn": {"rope_parameters": YARN},
    "rotary_keys_only": {"qk_nope_head_dim": 0},
    "rotary_keys_only_unfolded": {"qk_nope_head_dim": 0, **WIDE_RANK},
    "unfolded": WIDE_RANK,
    "unfolded_query_latent": {"q_lora_rank": 40, "attention_bias": True, **WIDE_RANK},
    "value_width_of_its_own": {"v_head_dim": 20, "qk_nope_head_dim": 6, "rms_norm_eps": 1e-3},
    "tied": {"tie_word_embeddings": True},
    "dense": {"first_k_dense_replace": 2},
    "experts_everywhere": {"first_k_dense_replace": 0, "n_shared_experts": 2},
}


def stock_logits(trunk, token_ids: list[int]) -> torch.Tensor:
    """[T, V], one row, no cache, no padding."""
    return trunk(torch.tensor([token_ids]), use_cache=False).logits[0]


class Decoding:
    """Rows that share prompts, decoded side by side; every forward is compared with the stock model row by row."""

    def __init__(self, policy, prompts: list[list[int]], group_size: int, capacity: int = 64) -> None:
        self.trunk, self.ours = policy.trunk, AbsorbedTrunk(policy.trunk, torch.float32, 256)
        self.random = torch.Generator().manual_seed(1)
        longest = max(map(len, prompts))
        token_ids = torch.tensor([prompt + [3] * (longest - len(prompt)) for prompt in prompts])
        cache = self.ours.cache(len(prompts), longest)
        hidden = self.ours(token_ids, torch.arange(longest).expand_as(token_ids), cache)
        for p, prompt in enumerate(prompts):
            self.compare(hidden[p, : len(prompt)], stock_logits(self.trunk, prompt))
        cache.advance(torch.tensor([len(prompt) for prompt in prompts]))
        self.cache = cache.fan_out(group_size, capacity) if group_size else cache
        self.rows = [list(prompt) for prompt in prompts for _ in range(group_size or 1)]

    def compare(self, hidden: torch.Tensor, expected: torch.Tensor) -> None:
        difference = (self.ours.logits(hidden) - expected).abs().max().item()
        assert difference < 1e-4

    def forward(self, new: int, kept: list[int], poison: float = 0.0) -> None:
        """`new` random tokens a row, of which `kept[r]` stay. `poison` fills what no row may read any more."""
        self._poison(new, poison)
        drawn = torch.randint(2, 250, (len(self.rows), new), generator=self.random)
        lengths = torch.tensor([len(row) for row in self.rows])
        hidden = self.ours(drawn, lengths[:, None] + torch.arange(new), self.cache)
        for r, row in enumerate(self.rows):
            expected = stock_logits(self.trunk, row + drawn[r].tolist())
            self.compare(hidden[r], expected[len(row) :])
            row += drawn[r, : kept[r]].tolist()
        self.cache.advance(torch.tensor(kept))

    def _poison(self, new: int, value: float) -> None:
        for row, length in enumerate(self.cache.lengths_R.tolist()):
            for latents in self.cache.layers_RTE:
                latents[row, length : length + new] += value

    def select(self, rows: list[int]) -> None:
        self.cache.select(torch.tensor(rows))
        self.rows = [self.rows[r] for r in rows]


def prompts_of(*lengths: int) -> list[list[int]]:
    generator = torch.Generator().manual_seed(0)
    return [torch.randint(2, 250, (length,), generator=generator).tolist() for length in lengths]


@pytest.fixture(params=CONFIGS)
def policy(request, random_policy):
    with torch.no_grad():
        yield random_policy(1, mtp=False, **CONFIGS[request.param])


def test_decoding_equals_stock_transformers(policy):
    decoding = Decoding(policy, prompts_of(3, 7, 1), group_size=3)
    decoding.forward(1, [1] * 9)
    decoding.forward(4, [4, 1, 0, 2, 3, 4, 0, 1, 2])  # ragged from here on; what was not kept is overwritten
    decoding.forward(4, [1, 2, 3, 4, 0, 1, 2, 3, 4])
    decoding.select([0, 2, 7])  # two rows of the first prompt, none of the second, one of the third
    decoding.forward(3, [0, 3, 1])
    decoding.select([1])
    decoding.forward(2, [2])


@pytest.mark.parametrize(("heads", "groups"), [(4, 4), (6, 2), (3, 1)])
@torch.no_grad()
def test_decoding_a_converted_dense_model_equals_the_dense_model(random_policy, heads, groups):
    """Its latents carry constants thousands of times their size, its norm takes them away again."""
    sizes = {"vocab_size": 280, "max_position_embeddings": 256, "tie_word_embeddings": True, "eos_token_id": 0}
    dense = dense_model((heads, groups, 8, 8 * heads), **sizes)
    policy = Policy(convert_dense(dense), None, random_policy(0).tokenizer)
    decoding = Decoding(policy, prompts_of(3, 7, 1), group_size=2)
    decoding.trunk = dense
    decoding.forward(1, [1] * 6)
    decoding.forward(3, [3, 1, 0, 2, 3, 1])
    decoding.select([0, 1, 4])
    decoding.forward(2, [2, 1, 0])


def test_both_sides_of_every_fold_were_tested(random_policy):
    def folded(**config) -> tuple[bool, bool]:
        block = AbsorbedTrunk(random_policy(0, mtp=False, **config).trunk, torch.float32, 8).blocks[0]
        return block.up_key is None, block.up_value is None

    assert folded(**CONFIGS["plain"]) == (True, True)
    assert folded(**CONFIGS["query_latent"]) == (True, True)
    assert folded(**CONFIGS["unfolded"]) == (False, False)
    assert folded(**CONFIGS["unfolded_query_latent"]) == (False, False)
    assert folded(**CONFIGS["rotary_keys_only_unfolded"]) == (True, False)


@pytest.mark.parametrize("config", ["plain", "rotary_keys_only"])
@pytest.mark.parametrize("group_size", [0, 2])
def test_garbage_behind_a_rows_length_is_never_read(random_policy, config, group_size):
    with torch.no_grad():
        decoding = Decoding(random_policy(2, mtp=False, **CONFIGS[config]), prompts_of(2, 6), group_size, capacity=40)
        if not group_size:  # without a shared prefix the cache that held the prompts grows in place
            decoding.cache.fan_out(1, 34)
        rows = len(decoding.rows)
        decoding.forward(3, [r % 4 for r in range(rows)], poison=float("nan"))
        decoding.forward(3, [3, 0, 1, 2][:rows], poison=float("nan"))
        decoding.select([0, rows - 1])
        decoding.forward(3, [0, 3], poison=float("nan"))


def test_contract_5_the_derived_tensors_are_rebuilt_from_new_weights(random_policy):
    """Every absorbed, folded or copied matrix follows its parameter: change them all, derive again, compare."""
    policy, other = random_policy(5, mtp=False, **GROUPED), random_policy(6, mtp=False, **GROUPED)
    policy.load_weights(other.weights())
    with torch.no_grad():
        Decoding(policy, prompts_of(4, 2), group_size=2).forward(2, [1, 2, 0, 1])
        torch.testing.assert_close(
            stock_logits(policy.trunk, prompts_of(4)[0]), stock_logits(other.trunk, prompts_of(4)[0]), rtol=0, atol=0
        )
