"""Which losses and settings Tinker's API takes, and which data they can read."""

import math

import pytest
import torch
from tinker.proto import tinker_public_pb2 as messages

from grpo.learner.terms.token_losses import TokenLoss
from grpo.tinker.data import check_datum, loss_of
from grpo.tinker.wire import Datum, Refused, read_forward_backward


def test_settings_of_a_loss_are_taken():
    assert loss_of("ppo", {"clip_high_threshold": 1.4}) == TokenLoss("ppo", 0.8, 1.4)
    assert loss_of("dro", {"beta": 1}) == TokenLoss("dro", beta=1.0)  # JSON writes 1.0 as 1
    assert loss_of("dro", {}).settings == {"beta": 0.05}


def test_what_is_no_loss_is_refused_by_name():
    for name, config, words in (
        ("stable_reinforce", {}, "its formula is not published"),
        ("custom", {}, "forward_backward_custom at the client"),
        ("grpo", {}, "use cross_entropy, importance_sampling, ppo, cispo, dro, gspo"),
        ("ppo", {"epsilon": 0.2}, "ppo takes numbers for clip_low_threshold, clip_high_threshold"),
        ("dro", {"beta": "much"}, "'much'"),
        ("ppo", {"clip_low_threshold": 1e300}, "use a finite number of float32"),
        ("x" * 1000, {}, "^loss_fn='x{79}: there is none"),
        ("cross_entropy", {"beta": 1.0}, r"'beta'\]=1.0: cross_entropy takes numbers for nothing"),
    ):
        with pytest.raises(Refused, match=words):
            loss_of(name, config)


def test_a_setting_without_a_value_is_refused():
    """Protobuf has 0 for a number that nobody set."""
    message = messages.ForwardBackwardRequest(loss_fn="dro")
    message.loss_fn_config_v2["beta"].CopyFrom(messages.LossConfigValue())
    with pytest.raises(Refused, match="dro takes numbers for beta"):
        loss_of("dro", read_forward_backward(message.SerializeToString()).settings)
    message.loss_fn_config_v2["beta"].number = 0.0
    assert loss_of("dro", read_forward_backward(message.SerializeToString()).settings) == TokenLoss("dro", beta=0.0)


def test_a_datum_that_a_loss_cannot_read_is_refused_with_its_place():
    nothing_marked = {name: torch.zeros(2) for name in ("logprobs", "advantages", "sequence_ratio_mask")}
    for name, tokens, changes, words in (
        ("cross_entropy", [1, 2], {"target_tokens": None}, "target_tokens must be int64 of shape"),
        ("cross_entropy", [1, 2], {"target_tokens": torch.tensor([1])}, "target_tokens must be int64"),
        ("cross_entropy", [1, 2], {"target_tokens": torch.tensor([1.0, 2.0])}, "target_tokens must be int64"),
        ("cross_entropy", [1, 2], {"target_tokens": torch.tensor([1, 9])}, "outside the vocabulary of 9"),
        ("cross_entropy", [1, -2], {}, "model_input has a token outside"),
        ("cross_entropy", [], {"target_tokens": torch.tensor([], dtype=torch.long)}, "the context is 1 to 4"),
        ("cross_entropy", [1, 2], {"weights": torch.ones(3)}, r"weights is \[3\]"),
        ("cross_entropy", [1, 2], {"weights": torch.tensor([1.0, math.nan])}, "not finite"),
        ("cross_entropy", [1, 2], {"advantages": torch.ones(2)}, "reads target_tokens, weights"),
        ("ppo", [1, 2], {"advantages": torch.ones(2)}, "reads logprobs, which is missing"),
        ("gspo", [1, 2], nothing_marked, "marks no token"),
    ):
        of = {"target_tokens": torch.tensor([1, 2])} | changes
        datum = Datum(tokens, {key: value for key, value in of.items() if value is not None})
        with pytest.raises(Refused, match=words) as refusal:
            check_datum(datum, 3, name, vocabulary=9, context=4)
        assert "data[3]" in str(refusal.value)


def test_a_datum_may_be_one_token_or_the_whole_context_and_has_the_weights_1():
    for tokens in ([8], [1, 2, 3, 0]):
        datum = Datum(tokens, {"target_tokens": torch.tensor(tokens)})
        check_datum(datum, 0, "cross_entropy", vocabulary=9, context=4)
        assert datum.inputs["weights"].tolist() == [1.0] * len(tokens)
    targets = torch.tensor([[1, 2], [3, 4]])  # two targets of each token
    check_datum(Datum([1, 2], {"target_tokens": targets}), 0, "cross_entropy", vocabulary=9, context=4)
