"""Rounds as functions of tensors give the tokens of eager rounds, with any drafts, batch, temperature and weights."""

import zipfile
from dataclasses import replace
from typing import ClassVar

import pytest
import torch
from engine_cases import PARAMS, PROMPTS, completions, prompts_of, tokens
from torch import Tensor

from rollout.backends import Decoder
from rollout.compiled import rounds, store
from rollout.compiled.graph import Bucket, Inputs, Round, weights
from rollout.compiled.recorded import RecordedRound
from rollout.compiled.rounds import Graphs
from rollout.compiled.store import SMALL, CompiledRound
from rollout.cost_table import FEW_ROWS, CostTable
from rollout.decoding.engine import Engine
from rollout.draft_stats import draft_gain
from rollout.group import Prompt, RolloutGroup
from rollout.request import Request
from rollout.requests.serving import Serving
from rollout.sampling import SamplingParams

CASES = {
    "one row": (PROMPTS[:1], replace(PARAMS, group_size=1)),
    "one row, three drafts": (PROMPTS[:1], replace(PARAMS, group_size=1, draft_tokens=3)),
    "three rows of own prompts, two drafts": (PROMPTS[:3], replace(PARAMS, group_size=1, draft_tokens=2)),
    "two groups": (PROMPTS[2:4], PARAMS),
    "two groups, two drafts": (PROMPTS[2:4], replace(PARAMS, draft_tokens=2)),
    "the end of eight groups, two drafts": (PROMPTS, replace(PARAMS, draft_tokens=2)),
    "greedy": (PROMPTS[:2], replace(PARAMS, temperature=0.0, draft_tokens=1)),
}
QUICK = ("one row", "two groups, two drafts")
quick_and_slow = pytest.mark.parametrize(
    "case", [pytest.param(case, marks=[pytest.mark.slow] * (case not in QUICK)) for case in CASES]
)


class Traced:
    """In place of a compiled round: the function that it is compiled from."""

    def bind(self, decoder: Decoder, bucket: Bucket) -> None:
        self.module = Round(decoder, bucket)

    def release(self) -> None:
        self.module = None

    def __call__(self, given: Inputs) -> list[Tensor]:
        return list(self.module(*given.flat()))


@pytest.fixture
def made(monkeypatch) -> list[Bucket]:
    """The buckets of the graphs that were needed; none is compiled."""
    found: list[Bucket] = []

    def find(decoder, bucket, given, compiling) -> Traced:
        found.append(bucket)
        return Traced()

    monkeypatch.setattr(rounds, "find", find)
    return found


def assert_same(engine: Engine, prompts: list[Prompt], params: SamplingParams) -> list[RolloutGroup]:
    eager = engine.sample(prompts, params)
    by_graph = engine.sample(prompts, replace(params, compiled=True))
    assert tokens(by_graph) == tokens(eager)
    assert [c.finish_reason for c in completions(by_graph)] == [c.finish_reason for c in completions(eager)]
    for one, other in zip(completions(by_graph), completions(eager), strict=True):
        assert one.logprobs == pytest.approx(other.logprobs, abs=2e-5)
        end = len(one.token_ids) - (params.draft_tokens or 0)  # a graph drafts past the limit, too
        assert one.draft.depths[:end] == other.draft.depths[:end]
    return by_graph


@quick_and_slow
def test_contracts_3_and_4_a_graph_changes_no_token(policy, random_policy, made, case):
    """Also with the weights of a publication, which needs no other graph."""
    before = {name: tensor.clone() for name, tensor in policy.synced_weights().items()}
    engine, (prompts, params) = Engine(policy), CASES[case]
    first = assert_same(engine, prompts, params)
    graphs = list(made)
    assert graphs
    assert max(bucket.rows for bucket in graphs) <= FEW_ROWS
    assert {bucket.drafts for bucket in graphs} == {params.draft_tokens}
    engine.sync_weights(random_policy(12, attention_bias=True).synced_weights(), version=1)
    assert tokens(assert_same(engine, prompts, params)) != tokens(first)
    assert len(set(made)) == len(made)
    engine.sync_weights(before, version=2)
    assert tokens(assert_same(engine, prompts, params)) == tokens(first)


@pytest.mark.parametrize("params", [replace(PARAMS, group_size=1), replace(PARAMS, group_size=2, draft_tokens=2)])
def test_in_bfloat16_a_graph_says_what_eager_rounds_say_up_to_rounding(policy, made, params):
    engine = Engine(policy, torch.bfloat16)
    assert_close(engine, PROMPTS, params)
    assert made


def assert_close(engine: Engine, prompts: list[Prompt], params: SamplingParams) -> None:
    """Rounding flips a choice now and then; up to there log-probabilities are close."""
    eager = completions(engine.sample(prompts, params))
    by_graph = completions(engine.sample(prompts, replace(params, compiled=True)))
    same = count = 0
    for one, other in zip(by_graph, eager, strict=True):
        pairs = list(zip(one.token_ids, other.token_ids, strict=False))
        equal = next((i for i, (a, b) in enumerate(pairs) if a != b), len(pairs))
        assert one.logprobs[:equal] == pytest.approx(other.logprobs[:equal], abs=0.15)
        same, count = same + equal, count + len(pairs)
    assert same > 0.6 * count > 5


def test_one_graph_serves_any_number_of_rows_of_a_dense_policy_and_caches_of_any_size(random_policy, made):
    dense, experts = random_policy(11, first_k_dense_replace=2), random_policy(11)
    params = replace(PARAMS, group_size=2)
    for policy, expected in ((dense, {(0, 0)}), (experts, {(rows, 0) for rows in (1, 2, 4, 8)})):
        made.clear()
        assert_same(Engine(policy), PROMPTS[:4], params)
        assert_same(Engine(policy), PROMPTS[:4], replace(params, max_completion_tokens=100, stop_token_ids=(7,)))
        assert made
        assert {(bucket.rows, bucket.entries) for bucket in made} <= expected


def test_a_long_prompt_is_not_copied_into_each_of_its_rows(policy, made, monkeypatch):
    engine, prompts = Engine(policy), prompts_of(30)
    monkeypatch.setattr(rounds, "MOST_COPIED", 4 * 30 - 1)
    assert_same(engine, prompts, replace(PARAMS, stop_token_ids=()))
    assert not made
    monkeypatch.setattr(rounds, "MOST_COPIED", 4 * 30)
    assert_same(engine, prompts, replace(PARAMS, stop_token_ids=()))
    assert made


def test_a_graph_chooses_the_heads_that_eager_code_chooses(random_policy, made):
    policy = random_policy(11, num_attention_heads=4, num_key_value_heads=4)
    policy.choose_heads(0.75, 1)
    engine, (prompts, params) = Engine(policy), next(iter(CASES.values()))
    assert_same(engine, prompts, params)
    assert made


@pytest.mark.long
def test_contract_3_over_many_tokens(policy, made):
    engine, prompts = Engine(policy), prompts_of(5, 12, seed=3)
    params = replace(PARAMS, max_completion_tokens=60, stop_token_ids=(7,), draft_tokens=2)
    count = sum(len(ids) for step in range(4) for ids in tokens(assert_same(engine, prompts, params.at(step))))
    assert count > 1000


@pytest.mark.parametrize("chosen", [0, 1, 3])
def test_contract_3_a_controller_chooses_among_graphs_and_changes_no_token(policy, made, chosen):
    """It is made to prefer one number at one row and another one at more; what the head has not read it reads first."""
    other = 0 if chosen else 1
    graphs = [[10.0] * 4 for _ in range(3)]
    graphs[0][chosen] = graphs[1][chosen] = graphs[2][other] = 1.0
    costs = CostTable([1, 2, 4], [[1.0, 1.1, 1.2, 1.3]] * 3, graphs=graphs)
    params = replace(PARAMS, group_size=2, max_completion_tokens=60, stop_token_ids=())
    first, *_, third, fourth = tokens(Engine(policy).sample(PROMPTS[:2], params))
    params = replace(params, stop_token_ids=(first[8], third[14], fourth[20]))  # so that rows end one by one
    eager = tokens(Engine(policy).sample(PROMPTS[:2], params))
    engine = Engine(policy, costs=costs)
    groups = engine.sample(PROMPTS[:2], replace(params, draft_tokens=None, compiled=True))
    assert tokens(groups) == eager
    assert {bucket.drafts for bucket in made} == {chosen, other}
    assert draft_gain(completions(groups)) > 4  # most rounds cost 1 ms, and 10 without drafts


@pytest.mark.slow
def test_costs_of_graphs_are_measured_with_graphs(policy, made):
    engine = Engine(policy)
    params = replace(PARAMS, group_size=3, draft_tokens=None, compiled=True, max_completion_tokens=30)
    expected = tokens(Engine(policy).sample(PROMPTS[:1], replace(params, draft_tokens=0, compiled=False)))
    assert tokens(engine.sample(PROMPTS[:1], params)) == expected
    assert engine.costs.graphs is not None
    assert [len(row) for row in engine.costs.graphs] == [4, 4, 4]  # 0 to 3 drafts at 1, 2 and 3 rows
    assert {(bucket.rows, bucket.drafts) for bucket in made} == {(rows, k) for rows in (1, 2, 4) for k in (0, 1, 3)}


@pytest.mark.parametrize("draft_tokens", [0, 2, None])
def test_requests_that_join_and_leave_get_the_tokens_that_they_get_alone(policy, made, draft_tokens):
    """Each with its own temperature and limit: they are inputs of one graph."""
    zero = [[1.0, 9.0, 9.0, 9.0]] * 3  # a controller that never wants a draft: the head must read all the same
    engine = Engine(policy, costs=CostTable([1, 2, 4], [[1.0, 9.0, 9.0, 9.0]] * 3, graphs=zero))
    own = [replace(PARAMS, temperature=t, max_completion_tokens=m, seed=s, group_size=1) for t, m, s in
           ((0.0, 30, 1), (0.7, 9, 2), (1.0, 25, 3), (1.3, 40, 4))]  # fmt: skip
    expected = [tokens(engine.sample([prompt], params))[0] for prompt, params in zip(PROMPTS, own, strict=False)]
    base = replace(PARAMS, group_size=1, draft_tokens=draft_tokens, compiled=True)
    found: dict[int, list[int]] = {}
    with torch.inference_mode():
        serving = Serving(engine.decoder, base)
        for i, params in enumerate(own):
            serving.add(Request(PROMPTS[i], params, lambda news, i=i: found.setdefault(i, []).extend(news.token_ids)))
            serving.round()
        while serving.busy:
            serving.round()
    assert [found[i] for i in range(len(own))] == expected
    assert made


@pytest.mark.parametrize("draft_tokens", [0, 2])
def test_contract_4_the_noise_of_a_continued_completion_goes_on_in_a_graph(policy, made, draft_tokens):
    """The prompt ends with what was sampled before: the rest is what one call would have sampled."""
    engine = Engine(policy)
    params = replace(PARAMS, group_size=1, stop_token_ids=(), draft_tokens=draft_tokens, max_completion_tokens=20)
    [[first, *_]] = [tokens(engine.sample(PROMPTS[:1], params))]
    begun = replace(PROMPTS[0], token_ids=PROMPTS[0].token_ids + first[:7])
    rest = replace(params, start=7, max_completion_tokens=13)
    assert tokens(assert_same(engine, [begun], rest)) == [first[7:]]
    assert made
    assert tokens(engine.sample([begun], replace(rest, start=0))) != [first[7:]]


UNCOMPUTED = {
    "stop strings": {"stop_strings": ("x",)},
    "lossy drafts": {"accept": "margin"},
    "recorded routing": {"record_routing": True},
    "a controller without costs": {"draft_tokens": None},
}


@pytest.mark.parametrize("kind", UNCOMPUTED)
def test_what_no_graph_computes_is_eager(policy, made, kind):
    engine, params = Engine(policy), replace(PARAMS, group_size=2, draft_tokens=2, compiled=True)
    assert rounds.can_compile(engine.decoder, params)
    uncomputed = replace(params, **UNCOMPUTED[kind])
    assert not rounds.can_compile(engine.decoder, uncomputed)
    if uncomputed.draft_tokens is not None:  # which would measure costs
        engine.sample(PROMPTS[:2], uncomputed)
    assert not made
    engine.sample(PROMPTS[:2], params)
    assert made


def test_broken_logits_abort_a_row_as_eagerly(random_policy, made):
    policy = random_policy(5)
    with torch.no_grad():
        policy.trunk.lm_head.weight[3] = torch.nan
    engine = Engine(policy)
    from rollout.faults import RolloutError

    with pytest.raises(RolloutError, match="not finite"):
        engine.sample(PROMPTS[:1], replace(PARAMS, compiled=True))


def test_a_graph_with_the_numbers_of_a_weight_is_refused(policy):
    """It would be right for the weights that it was compiled with alone."""
    decoder, bucket = Engine(policy).decoder, Bucket(1, 0, 128)
    tensors = weights(decoder, bucket)
    [bias] = [name for name, tensor in tensors.items() if tensor.numel() <= SMALL]
    graph = CompiledRound.__new__(CompiledRound)
    graph.names = [name for name in tensors if name != bias]
    with pytest.raises(RuntimeError, match=f"{bias} is written into it"):
        graph.bind(decoder, bucket)


@pytest.mark.parametrize("case", ["three rows of own prompts, two drafts", "the end of eight groups, two drafts"])
def test_without_a_compiler_or_a_disk_rounds_are_eager_and_a_warning_says_why(policy, monkeypatch, case):
    """Five places would be eight in a graph for experts; the rows go on in five."""
    tried = []

    def find(*_):
        tried.append(1)
        raise OSError("No space left on device")

    monkeypatch.setattr(rounds, "find", find)
    engine, (prompts, params) = Engine(policy), CASES[case]
    with pytest.warns(UserWarning, match="not compiled: OSError: No space left on device. They are decoded eagerly"):
        assert_same(engine, prompts, params)
    assert_same(engine, prompts, params)
    assert len(tried) == 1


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_a_graph_lets_the_weights_of_the_publication_before_go(policy, dtype):
    """What torch has loaded keeps the tensors that it was given for good, so they must hold nothing."""

    class Loaded:
        given: ClassVar[list[Tensor]] = []

        def load_constants(self, tensors, **_):
            self.given += tensors.values()

    decoder, bucket = Engine(policy.cast(dtype), dtype).decoder, Bucket(1, 0, 128)
    before = {name: tensor.clone() for name, tensor in weights(decoder, bucket).items()}
    graph = CompiledRound.__new__(CompiledRound)
    graph.loaded, graph.names, graph.bound = Loaded(), list(before), {}
    for _ in range(2):
        with torch.inference_mode():  # as in a shard
            graph.bind(decoder, bucket)
    assert all(tensor.numel() == 0 for tensor in Loaded.given[: len(before)])
    graph.release()
    assert all(tensor.numel() == 0 for tensor in Loaded.given)
    after = weights(decoder, bucket)
    assert all(torch.equal(_plain(after[name]), _plain(tensor)) for name, tensor in before.items())


def _plain(tensor: Tensor) -> Tensor:
    return tensor.to_dense() if tensor.is_mkldnn else tensor


def test_a_bias_of_zero_is_a_weight_of_the_graph_since_later_ones_may_not_be(random_policy):
    policy = random_policy(3, attention_bias=True)
    with torch.no_grad():
        for name, tensor in policy.trunk.named_parameters():
            if name.endswith("bias"):
                tensor.zero_()
    assert "block0_into_bias" in weights(Engine(policy).decoder, Bucket(1, 0, 128))


@quick_and_slow
def test_contracts_3_and_4_a_recorded_round_changes_no_token(policy, random_policy, monkeypatch, case):
    """On a CPU it is called where a GPU replays it: its own inputs, moved caches and publications are the same."""
    recorded: list[RecordedRound] = []

    def find(decoder, bucket, given, compiling) -> RecordedRound:
        recorded.append(RecordedRound())
        return recorded[-1]

    monkeypatch.setattr(rounds, "find", find)
    for name in ("takes_any_size", "takes_any_rows"):
        monkeypatch.setattr(rounds, name, lambda of: False)
    before = {name: tensor.clone() for name, tensor in policy.synced_weights().items()}
    engine, (prompts, params) = Engine(policy), CASES[case]
    first = assert_same(engine, prompts, params)
    assert recorded
    engine.sync_weights(random_policy(12, attention_bias=True).synced_weights(), version=1)
    assert all(one.module is one.replay is None for one in recorded), "else old weights keep their memory"
    assert tokens(assert_same(engine, prompts, params)) != tokens(first)
    engine.sync_weights(before, version=2)
    assert tokens(assert_same(engine, prompts, params)) == tokens(first)


@pytest.mark.long
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_a_compiled_round_is_kept_on_disk_without_weights(random_policy, tmp_path, monkeypatch, dtype):
    """Compiled once; another engine finds it, with its own weights, and a publication compiles nothing."""
    monkeypatch.setattr(store, "FOLDER", tmp_path)
    told: list[Bucket] = []
    compare = assert_same if dtype == torch.float32 else assert_close
    prompts, params = CASES["three rows of own prompts, two drafts"]
    for seed in (11, 12):
        engine = Engine(random_policy(seed).cast(dtype), dtype)
        engine.graphs = [Graphs(told.append)]
        compare(engine, prompts, params)
        engine.sync_weights(random_policy(seed + 5).synced_weights(), version=1)
        compare(engine, prompts, params)
        assert len(list(tmp_path.glob("*.pt2"))) == len(told) == len(set(told)) > 0
    for path in tmp_path.glob("*.pt2"):
        with zipfile.ZipFile(path) as file:
            held = b"".join(file.read(name) for name in file.namelist())
        for seed in (11, 12, 16, 17):
            for tensor in weights(Engine(random_policy(seed).cast(dtype), dtype).decoder, told[0]).values():
                some = (tensor.to_dense() if tensor.is_mkldnn else tensor).flatten()[:16].contiguous()
                written = some.view(torch.uint8).numpy().tobytes()
                assert len(some.unique()) == 1 or written not in held
