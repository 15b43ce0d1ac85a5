"""Which teacher a run of `loss.advantage: distill` learns from, and whether it reads the same tokens."""

from __future__ import annotations

from transformers import PreTrainedTokenizerBase

from grpo.config.policy import ModelOptions
from grpo.config.run import TrainConfig
from grpo.policy_source import find_policy, load_policy
from policies import presets
from policies.policy import Policy, read_tokenizer

# Numbers, spaces, lines, other scripts: where tokenizers with one vocabulary may still differ.
PROBES = (
    "12 + 1,030 = 1042.5\n#### 1042",
    "  two  spaces,\ttabs\n\nlines",
    "na\u00efve \u6f22\u5b57 \U0001f642 e\u0301",
    "can't I'll",
)


def check_teacher(config: TrainConfig) -> None:
    """Raises ValueError for a teacher with another tokenizer than the policy's, before either of them is loaded."""
    if config.distill.teacher is None:
        return
    named = f"distill.teacher={config.distill.teacher!r}"
    policy, teacher = (find_policy(model, read=False).base for model in (config.model, config.distill.teacher))
    if policy in presets.PRESETS:
        raise ValueError(
            f"{named}: model={config.model!r} is a preset, which learns a tokenizer from the data, and the teacher has "
            "another one; name a checkpoint folder as model, with the teacher's tokenizer"
        )
    if teacher in presets.PRESETS:
        raise ValueError(f"{named} is a preset, which has learned nothing; name a checkpoint folder, a run or a hub id")
    if fault := _difference(read_tokenizer(policy), read_tokenizer(teacher)):
        raise ValueError(
            f"{named} reads other tokens than model={config.model!r}: {fault}. A teacher scores the ids that the "
            "policy has sampled: name one with the same tokenizer"
        )


def load_teacher(config: TrainConfig) -> Policy | None:
    """The frozen teacher, in the policy's precision and on its device; None where there is none."""
    if config.distill.teacher is None:
        return None
    return load_policy(ModelOptions(model=config.distill.teacher, dtype=config.dtype, device=config.device))


def _difference(policy: PreTrainedTokenizerBase, teacher: PreTrainedTokenizerBase) -> str:
    """How two tokenizers differ, in words; empty where they do not."""
    own, other = policy.get_vocab(), teacher.get_vocab()
    if different := sorted(token for token in own.keys() | other.keys() if own.get(token) != other.get(token)):
        first = different[0]
        return (
            f"{len(different)} of {len(own)} tokens have another id or are not there, the first of them {first!r} "
            f"({own.get(first)} and {other.get(first)})"
        )
    for text in PROBES:
        ids = [tokenizer.encode(text, add_special_tokens=False) for tokenizer in (policy, teacher)]
        if ids[0] != ids[1]:
            return f"{text!r} is {ids[0]} for one and {ids[1]} for the other"
    if policy.eos_token_id != teacher.eos_token_id:
        return f"they end a text with {policy.eos_token!r} and {teacher.eos_token!r}"
    return ""
