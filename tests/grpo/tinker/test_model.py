"""What a training client moves: its gradients and steps are those of plain torch."""

import copy
import math

import pytest
import torch

from grpo.config.learner import LearnerOptions
from grpo.learner import tree
from grpo.learner.batch import TrainingBatch
from grpo.learner.learner import Learner
from grpo.learner.likelihood import Likelihood
from grpo.learner.row import PackedRow, Sample
from grpo.learner.terms.custom import PerToken
from grpo.learner.terms.token_losses import LOSSES, TokenLoss
from grpo.tinker import model as of_model
from grpo.tinker.model import Spec, forward_backward, learner_of, load_state, optim_step, state_of
from grpo.tinker.wire import Datum, ForwardBackward, Refused

ADAM = {"beta1": 0.9, "beta2": 0.95, "eps": 1e-8, "weight_decay": 0.1, "grad_clip_norm": 0.5}


def data(vocabulary, name, sizes=(7, 4, 11), seed=1):
    """Datums of several turns: some tokens count, some do not, and targets that do not count are 0."""
    draw = torch.Generator().manual_seed(seed)
    out = []
    for size in sizes:
        ids = torch.randint(1, vocabulary, (size + 1,), generator=draw)
        counts = torch.rand(size, generator=draw) < 0.6
        counts[-1] = True
        of = {"target_tokens": ids[1:].where(counts, 0)}
        if name == "cross_entropy":
            of["weights"] = torch.rand(size, generator=draw) * counts
        else:
            of["logprobs"] = -5 * torch.rand(size, generator=draw) * counts
            of["advantages"] = torch.randn(size, generator=draw) * counts
        if name == "gspo":
            of["sequence_ratio_mask"] = counts.float()
        out.append(Datum(ids[:-1].tolist(), of))
    return out


def ask(datums, name="cross_entropy", backward=True, **config):
    return ForwardBackward(name, config, datums, backward)


def plain_loss(model, datums, name):
    """Each datum alone, by transformers' own forward and torch's own log-softmax."""
    loss = TokenLoss(name)
    losses, logprobs = [], []
    for datum in datums:
        logits = model(input_ids=torch.tensor([datum.tokens])).logits[0].float()
        of = logits.log_softmax(-1).gather(-1, datum.inputs["target_tokens"][:, None])[:, 0]
        logprobs.append(of)
        inputs = [datum.inputs.get(key) for key in ("logprobs", "advantages", "sequence_ratio_mask")]
        inputs = [None, datum.inputs["weights"], None] if name == "cross_entropy" else inputs
        losses.append(loss(of, *inputs).sum())
    return torch.stack(losses).sum(), logprobs


def gradients(module):
    return {n: p.grad.clone() for n, p in module.named_parameters() if p.grad is not None}


@pytest.mark.parametrize("name", LOSSES)
@pytest.mark.parametrize("rank", [0, 4])
def test_gradients_and_log_probabilities_are_those_of_plain_torch(base, name, rank, monkeypatch):
    monkeypatch.setattr(of_model, "OPTIONS", LearnerOptions(learning_rate=1.0, tokens_per_micro_batch=16))
    learner = learner_of(base, Spec(rank))
    if rank:  # B begins at zero, and A would have no gradient
        with torch.no_grad():
            for parameter in learner.policy.parameters():
                if parameter.requires_grad:
                    parameter.add_(0.05 * torch.randn(parameter.shape, generator=torch.Generator().manual_seed(2)))
    datums = data(len(base.tokenizer), name)
    loss, logprobs = plain_loss(learner.policy.trunk, datums, name)
    loss.backward()
    want = gradients(learner.policy.trunk)
    learner.update.zero()
    outputs = forward_backward(learner, ask(datums, name))
    found = gradients(learner.policy.trunk)
    # A sum of about 1 that nearly cancels.
    assert outputs.metrics["loss:sum"] == pytest.approx(loss.item(), rel=1e-5, abs=5e-7)
    for datum, of in zip(outputs.by_datum, logprobs, strict=True):
        torch.testing.assert_close(datum["logprobs"], of.detach(), atol=1e-5, rtol=0)
    assert found.keys() == want.keys()
    assert len(want) > 10
    for key in want:
        torch.testing.assert_close(found[key], want[key], atol=1e-5, rtol=1e-4)


def test_gradients_are_those_of_our_own_learner(base):
    """A sum over tokens there, the mean of a step's tokens here."""
    [datum] = data(len(base.tokenizer), "importance_sampling", sizes=(9,))
    datum.inputs["target_tokens"] = torch.tensor([*datum.tokens[1:], 3])
    learner = learner_of(base, Spec(0))
    forward_backward(learner, ask([datum], "importance_sampling"))
    want = gradients(learner.policy.trunk)
    policy = Spec(0).build(base)

    def loss(logprobs, sampling, advantages, mask):
        return -(logprobs - sampling).exp() * advantages

    learner = Learner(policy, LearnerOptions(learning_rate=1.0), [PerToken(loss)], Likelihood(policy))
    targets, sampled, advantages = (datum.inputs[key].tolist() for key in ("target_tokens", "logprobs", "advantages"))
    sample = Sample(0, targets, sampled, token_advantages=advantages)
    learner.forward_backward(TrainingBatch([PackedRow(datum.tokens[:1], [sample])], torch.ones(1, 1), 1, 9))
    for key, gradient in gradients(policy.trunk).items():
        torch.testing.assert_close(9 * gradient, want[key], atol=1e-5, rtol=1e-4)


@pytest.mark.parametrize("rank", [0, 4])
def test_five_steps_are_those_of_torchs_adamw(base, rank):
    learner = learner_of(base, Spec(rank))
    plain = copy.deepcopy(learner.policy.trunk)
    moved = [parameter for parameter in plain.parameters() if parameter.requires_grad]
    optimizer = torch.optim.AdamW(moved, lr=1.0)
    for step in range(5):
        datums = data(len(base.tokenizer), "ppo", seed=step)
        rate = 1e-3 * (step + 1)
        forward_backward(learner, ask(datums[:1], "ppo"))
        forward_backward(learner, ask(datums[1:], "ppo"))  # gradients add up
        optim_step(learner, ADAM | {"learning_rate": rate})
        optimizer.zero_grad()
        plain_loss(plain, datums, "ppo")[0].backward()
        torch.nn.utils.clip_grad_norm_(moved, ADAM["grad_clip_norm"])
        changes = {"lr": rate, "betas": (0.9, 0.95), "eps": 1e-8, "weight_decay": 0.1}
        optimizer.param_groups[0].update(changes)
        optimizer.step()
    for (name, found), want in zip(learner.policy.trunk.named_parameters(), plain.parameters(), strict=True):
        torch.testing.assert_close(found, want, atol=1e-4, rtol=0, msg=name)


def test_several_targets_of_a_token_have_the_gradient_of_plain_torch(base):
    """Next to a datum with one target a token, in the same micro-batch."""
    learner = learner_of(base, Spec(0))
    [one, of_two] = data(len(base.tokenizer), "cross_entropy", sizes=(7, 5))
    targets = torch.stack([of_two.inputs["target_tokens"], of_two.inputs["target_tokens"] + 1], dim=1)
    weights = torch.rand(5, 2, generator=torch.Generator().manual_seed(3))
    two = Datum(of_two.tokens, {"target_tokens": targets, "weights": weights})
    loss, [_] = plain_loss(learner.policy.trunk, [one], "cross_entropy")
    logprobs = learner.policy.trunk(input_ids=torch.tensor([two.tokens])).logits[0].float().log_softmax(-1)
    loss = loss - (weights * logprobs.gather(-1, targets)).sum()
    loss.backward()
    want = gradients(learner.policy.trunk)
    learner.update.zero()
    outputs = forward_backward(learner, ask([one, two]))
    assert outputs.metrics["loss:sum"] == pytest.approx(loss.item(), rel=1e-5)
    torch.testing.assert_close(outputs.by_datum[1]["logprobs"], logprobs.gather(-1, targets).detach())
    for key, gradient in gradients(learner.policy.trunk).items():
        torch.testing.assert_close(gradient, want[key], atol=1e-5, rtol=1e-4)


def test_data_that_begin_alike_are_rows_of_their_own(base, monkeypatch):
    """The learner would read what they share once."""
    monkeypatch.setattr(tree, "SHARED", 4)
    learner = learner_of(base, Spec(0))
    assert learner.policy.reads_trees
    [datum] = data(len(base.tokenizer), "cross_entropy", sizes=(9,))
    other = Datum([*datum.tokens[:6], 3, 4], {"target_tokens": datum.inputs["target_tokens"][:8]})
    outputs = forward_backward(learner, ask([datum, other]))
    [*_, want] = plain_loss(learner.policy.trunk, [datum, other], "cross_entropy")
    for found, of in zip(outputs.by_datum, want, strict=True):
        torch.testing.assert_close(found["logprobs"], of.detach(), atol=1e-5, rtol=0)


def test_a_datum_may_fill_the_context(base):
    learner = learner_of(base, Spec(4))
    [datum] = data(len(base.tokenizer), "cross_entropy", sizes=(base.max_length,))
    [found] = forward_backward(learner, ask([datum])).by_datum
    [want] = plain_loss(learner.policy.trunk, [datum], "cross_entropy")[1]
    torch.testing.assert_close(found["logprobs"], want.detach(), atol=1e-5, rtol=0)


def test_a_step_for_which_no_gradient_waits_moves_nothing(base):
    learner = learner_of(base, Spec(4))
    forward_backward(learner, ask(data(len(base.tokenizer), "cross_entropy")))
    optim_step(learner, ADAM | {"learning_rate": 1e-2})
    before = {name: value.clone() for name, value in state_of(learner)["policy"].items()}
    forward_backward(learner, ask(data(len(base.tokenizer), "cross_entropy"), backward=False))
    assert optim_step(learner, ADAM | {"learning_rate": 0.5}) == {"grad_norm": 0.0, "learning_rate": 0.5}
    assert all(torch.equal(value, before[name]) for name, value in state_of(learner)["policy"].items())


def test_a_forward_alone_leaves_no_gradient_and_several_targets_are_scored(base):
    learner = learner_of(base, Spec(4))
    [datum] = data(len(base.tokenizer), "cross_entropy", sizes=(5,))
    two = torch.stack([datum.inputs["target_tokens"], datum.inputs["target_tokens"] + 1], dim=1)
    outputs = forward_backward(learner, ask([Datum(datum.tokens, {"target_tokens": two})], backward=False))
    one = forward_backward(learner, ask([datum], backward=False)).by_datum[0]["logprobs"]
    assert outputs.by_datum[0]["logprobs"].shape == (5, 2)
    torch.testing.assert_close(outputs.by_datum[0]["logprobs"][:, 0], one)
    assert not gradients(learner.policy.trunk)


def test_adapters_are_where_they_were_asked_for(base):
    def names(**flags):
        policy = Spec(2, **flags).build(base)
        return {n.split(".lora_")[0].rpartition(".")[2] for n, p in policy.named_parameters() if p.requires_grad}

    attention, mlp = {"q_proj", "k_proj", "v_proj", "o_proj"}, {"gate_proj", "up_proj", "down_proj"}
    assert names() == attention | mlp | {"lm_head"}
    assert names(train_mlp=False, train_unembed=False) == attention
    assert names(train_attn=False, train_unembed=False) == mlp
    tied = copy.deepcopy(base)
    tied.trunk.config.tie_word_embeddings = True
    with pytest.raises(Refused, match="LM head of this model is its embedding"):
        Spec(2, train_attn=False, train_mlp=False).build(tied)


def test_a_policy_that_trains_all_weights_moves_them_and_nobody_elses(base):
    before = {name: parameter.clone() for name, parameter in base.named_parameters()}
    Spec(2).build(base)  # which freezes what it shares
    learner = learner_of(base, Spec(0))
    forward_backward(learner, ask(data(len(base.tokenizer), "cross_entropy")))
    optim_step(learner, ADAM | {"learning_rate": 1e-2})
    own = dict(learner.policy.named_parameters())
    assert all(not torch.equal(own[name], value) for name, value in before.items() if "embed" not in name)
    assert all(torch.equal(parameter, before[name]) for name, parameter in base.named_parameters())


def test_a_state_comes_back_to_the_same_bits_with_its_moments_or_without(base):
    first = learner_of(base, Spec(4))

    def step(learner, seed):
        forward_backward(learner, ask(data(len(base.tokenizer), "cross_entropy", seed=seed)))
        optim_step(learner, ADAM | {"learning_rate": 1e-2})
        return {name: value.clone() for name, value in state_of(learner)["policy"].items()}

    step(first, 1)
    state = {part: {name: t.clone() for name, t in tensors.items()} for part, tensors in state_of(first).items()}
    want = step(first, 2)
    whole, weights = learner_of(base, Spec(4, seed=5)), learner_of(base, Spec(4, seed=6))
    load_state(whole, state)
    load_state(weights, state, optimizer=False)
    found, without = step(whole, 2), step(weights, 2)
    assert all(torch.equal(found[name], want[name]) for name in want)
    assert any(not torch.equal(without[name], want[name]) for name in want)
    with pytest.raises(Refused, match="do not fit"):
        load_state(learner_of(base, Spec(8)), state)


def test_what_is_not_finite_is_refused_and_the_next_step_is_as_if_it_had_not_been(base):
    learner, other = learner_of(base, Spec(4)), learner_of(base, Spec(4))
    datums = data(len(base.tokenizer), "importance_sampling")
    bad = data(len(base.tokenizer), "importance_sampling")
    bad[0].inputs["logprobs"] = torch.full_like(bad[0].inputs["logprobs"], -1e4)
    with pytest.raises(Refused, match="the loss is nan"):
        forward_backward(learner, ask(bad, "importance_sampling"))
    for each in (learner, other):
        forward_backward(each, ask(datums, "importance_sampling"))
        optim_step(each, ADAM | {"learning_rate": 1e-2})
    assert all(
        torch.equal(value, state_of(other)["policy"][name]) for name, value in state_of(learner)["policy"].items()
    )


def test_a_gradient_that_fails_half_way_leaves_nothing_and_says_so(base, monkeypatch):
    """And a forward alone that fails leaves what waits."""
    monkeypatch.setattr(of_model, "OPTIONS", LearnerOptions(learning_rate=1.0, tokens_per_micro_batch=8))
    learner = learner_of(base, Spec(4))
    [first, *others] = data(len(base.tokenizer), "importance_sampling", sizes=(4, 5, 7))
    hidden, calls = learner.policy.hidden, []

    def second_fails(*of):
        calls.append(torch.is_grad_enabled())
        if len(calls) % 2 == 0:
            raise MemoryError("no memory")
        return hidden(*of)

    monkeypatch.setattr(learner.policy, "hidden", second_fails)
    forward_backward(learner, ask([first], "importance_sampling"))
    calls.clear()
    want = gradients(learner.policy.trunk)
    with pytest.raises(MemoryError):
        forward_backward(learner, ask(others, "importance_sampling", backward=False))
    bad = Datum(first.tokens, first.inputs | {"logprobs": torch.full_like(first.inputs["logprobs"], -1e4)})
    with pytest.raises(Refused, match="^the loss is [^;]*$"):
        forward_backward(learner, ask([bad], "importance_sampling", backward=False))
    assert not any(calls)  # what is not learned from keeps no activations
    found = gradients(learner.policy.trunk)
    assert found
    assert all(torch.equal(found[name], want[name]) for name in want)
    calls.clear()
    with pytest.raises(RuntimeError, match="no memory; the gradients that waited are dropped"):
        forward_backward(learner, ask(others, "importance_sampling"))
    assert not gradients(learner.policy.trunk)


def test_numbers_of_adamw_that_make_no_sense_are_refused_by_name(base):
    learner = learner_of(base, Spec(2))
    for name, value in {"beta1": 1.0, "learning_rate": math.nan, "eps": -1.0, "weight_decay": -1.0}.items():
        with pytest.raises(Refused, match=f"adam_params.{name}"):
            optim_step(learner, ADAM | {"learning_rate": 1e-3, name: value})
    for eps in (0.0, 1e-300):  # in float32 both are 0, and A of an adapter has no gradient in its first step
        with pytest.raises(Refused, match="adam_params.eps=.*: use a finite number, 1e-30 or more"):
            optim_step(learner, ADAM | {"learning_rate": 1e-3, "eps": eps})
    forward_backward(learner, ask(data(len(base.tokenizer), "cross_entropy")))
    optim_step(learner, ADAM | {"learning_rate": 1e-3, "eps": 1e-30})
    assert all(torch.isfinite(value).all() for value in state_of(learner)["policy"].values())
