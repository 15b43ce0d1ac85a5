"""What `Session.load` changes besides the learner: the samplers, and what is sampled next."""

import pytest
import torch

from grpo import Session
from grpo.run.checkpoint import CheckpointError


def likelier(logprobs, sampling_logprobs, advantages, mask):
    return -logprobs


def less_likely(logprobs, sampling_logprobs, advantages, mask):
    return logprobs


@pytest.mark.parametrize("lora", [None, {"rank": 2}], ids=["shared weights", "copied weights"])
def test_contract_5_a_policy_that_is_loaded_reaches_the_samplers_though_its_version_is_the_one_they_have(
    micro_config, tmp_path, lora
):
    """Two policies of version 1, by two losses from one start: each samples what it sampled before it was saved."""
    options = {"warm_start.steps": 0, "mtp.loss_weight": 0, "lora": lora}
    with Session.open(micro_config(tmp_path / "r", steps=1, **options)) as session:
        for step in session.run.steps():
            prompts, start = session.prompts(step), session.save(tmp_path / "start")
            batch = session.prepare(session.sample(prompts, step=step))
            known = []
            for loss in (likelier, less_likely):
                session.load(start)
                session.forward_backward(batch, loss)
                session.optim_step(0.05)
                session.publish()
                assert session.publisher.version == session.learner.policy_version == 1
                path = session.save(tmp_path / loss.__name__)
                known.append((path, session.sample(prompts, step=step)))
            (one, by_one), (_, by_other) = known
            assert by_one != by_other
            session.load(one)
            assert session.sample(prompts, step=step) == by_one
            session.record(step, {})


def test_a_damaged_checkpoint_changes_neither_the_policy_nor_what_is_sampled(micro_config, tmp_path):
    with Session.open(micro_config(tmp_path / "r", steps=1, **{"warm_start.steps": 0})) as session:
        for step in session.run.steps():
            path = session.save(tmp_path / "kept")
            session.record(step, session.learn(session.prepare(session.draw(step))))
            session.publish()
            weights = [parameter.detach().clone() for parameter in session.policy.parameters()]
            prompts = session.prompts(step)
            before = session.sample(prompts, step=step)
            file = next(path.glob("policy*.safetensors"))
            file.write_bytes(file.read_bytes()[:-1])
            with pytest.raises(CheckpointError):
                session.load(path)
            now = session.policy.parameters()
            assert all(torch.equal(one, other) for one, other in zip(weights, now, strict=True))
            assert session.sample(prompts, step=step) == before
