"""How near a converted model is to its source, by logits, KL, text and perplexity."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

import torch
import torch.nn.functional as F
from torch import Tensor
from transformers import PreTrainedModel

from policies.devices import wide


class ParityFailed(RuntimeError):
    """The converted model does not compute what the dense one does. No folder was written."""


@dataclass(frozen=True)
class ParityReport:
    """How far a converted model is from its dense source.

    `max_logit_difference` and `max_logit` are absolute values, `kl_mean` is KL(dense ‖ converted) in nats per token,
    `top1_agreement` is a share in [0, 1], and `greedy_identical` compares the continuations of every prompt.
    """

    max_logit_difference: float
    max_logit: float
    kl_mean: float
    top1_agreement: float
    greedy_identical: bool
    num_tokens: int

    @property
    def limit(self) -> float:
        """The largest logit difference that passes, in logits."""
        return 1e-3 * self.max_logit

    @property
    def passed(self) -> bool:
        return self.max_logit_difference <= self.limit and self.greedy_identical

    def __str__(self) -> str:
        rows = {
            "tokens compared": f"{self.num_tokens}",
            "max logit difference": f"{self.max_logit_difference:.1e} (limit {self.limit:.1e})",
            "mean KL, nats a token": f"{self.kl_mean:.1e}",
            "top-1 agreement": f"{100 * self.top1_agreement:.2f} %",
            "greedy text identical": "yes" if self.greedy_identical else "no",
            "parity": "passed" if self.passed else "FAILED",
        }
        return "\n".join(f"{name:<22} {value}" for name, value in rows.items())


@torch.no_grad()
def parity(
    dense: PreTrainedModel, converted: PreTrainedModel, token_ids: Tensor | Sequence[Tensor], new_tokens: int = 32
) -> ParityReport:
    """Compares the logits at every position of the prompts and greedy continuations of `new_tokens` tokens.

    `token_ids` is [B, L] without padding, or a list of [L_i]. Both models are in eval mode.
    """
    differences, largest, kls, agreements, identical = [], [], [], [], True
    for row in token_ids:
        ids = row[None].to(dense.device)
        expected, actual = (wide(model(ids).logits[0]) for model in (dense, converted))
        differences.append((expected - actual).abs().max().item())
        largest.append(expected.abs().max().item())
        log_p, log_q = expected.log_softmax(-1), actual.log_softmax(-1)
        kls.append((log_p.exp() * (log_p - log_q)).sum(-1))
        agreements.append(expected.argmax(-1) == actual.argmax(-1))
        texts = [_greedy(model, ids, new_tokens) for model in (dense, converted)]
        identical = identical and torch.equal(*texts)
    return ParityReport(
        max_logit_difference=torch.tensor(differences).max().item(),  # Python's max() would lose a NaN
        max_logit=torch.tensor(largest).max().item(),
        kl_mean=torch.cat(kls).mean().item(),
        top1_agreement=wide(torch.cat(agreements)).mean().item(),
        greedy_identical=identical,
        num_tokens=sum(len(kl) for kl in kls),
    )


@dataclass(frozen=True)
class Fidelity:
    """How near a compressed model is to the dense one, on text to which neither was fitted.

    `kl_mean` is KL(dense ‖ compressed) in nats per token, and `top1_agreement` a share in [0, 1]. The perplexities are
    those of the text itself, without the first token of each window.
    """

    kl_mean: float
    top1_agreement: float
    perplexity: float
    dense_perplexity: float
    num_tokens: int


@torch.no_grad()
def fidelity(dense: PreTrainedModel, model: PreTrainedModel, windows: Sequence[Tensor]) -> Fidelity:
    """Compares both on every position of `windows`, token ids [T] each, T ≥ 2."""
    sums, count, scored = torch.zeros(4, dtype=torch.float64), 0, 0
    for window in windows:
        ids = window[None].to(dense.device)
        log_p, log_q = (m(ids).logits[0].float().log_softmax(-1) for m in (dense, model))
        kl = F.kl_div(log_q, log_p, reduction="sum", log_target=True)
        agreed = (log_p.argmax(-1) == log_q.argmax(-1)).sum()
        nats = (-log[:-1].gather(1, ids[0, 1:, None]).sum() for log in (log_q, log_p))
        sums += torch.stack([kl, agreed, *nats]).cpu().double()
        count, scored = count + len(log_p), scored + len(log_p) - 1
    kl, agreed, nats, dense_nats = sums
    return Fidelity(
        kl_mean=float(kl / count),
        top1_agreement=float(agreed / count),
        perplexity=float((nats / scored).exp()),
        dense_perplexity=float((dense_nats / scored).exp()),
        num_tokens=count,
    )


def _greedy(model: PreTrainedModel, ids: Tensor, new_tokens: int) -> Tensor:
    mask = torch.ones_like(ids)
    return model.generate(ids, attention_mask=mask, max_new_tokens=new_tokens, do_sample=False)
