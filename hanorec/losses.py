r"""The losses, each a pure function: SFT-1, DPO-1, DPO-2 = HN-11, HN-12. All in float32 or wider.

P = pairs, B = rows, T = tokens, V = vocabulary. Source: document 000, sections 2.2 and 2.3.
"""

import torch
from torch import Tensor
from torch.nn import functional as F


def token_log_probs(logits: Tensor, tokens: Tensor) -> Tensor:
    r"""log pi(token) where logits[..., t, :] already predicts tokens[..., t].

    (..., V), (...) -> (...).
    """
    logits = logits.to(torch.promote_types(logits.dtype, torch.float32))
    return logits.gather(-1, tokens[..., None]).squeeze(-1) - logits.logsumexp(-1)


def sft_loss(logits: Tensor, labels: Tensor) -> Tensor:
    r"""Cross-entropy of the answer.

    Args:
        logits: (B, T, V) of the row as the model gives them: position t predicts token t + 1.
        labels: (B, T) int64, the row's own tokens inside the answer (end-of-turn included), -100
            elsewhere. The shift by one happens here.
    Returns:
        (), the mean over all answer tokens of the batch.
    Raises:
        ValueError: no answer token at all.
    """
    answer = labels[:, 1:] != -100  # (B, T - 1)
    if not answer.any():
        raise ValueError(
            "sft_loss: every label is -100, expected at least one answer token; check the answer "
            "mask"
        )
    # SFT-1: L_{SFT} = -\sum_t \log \pi(y_t \mid x, y_{<t}), \text{ over answer tokens}
    return -token_log_probs(logits[:, :-1][answer], labels[:, 1:][answer]).mean()


def preference_logit(policy_w: Tensor, policy_l: Tensor, ref_w: Tensor, ref_l: Tensor) -> Tensor:
    r"""h: (P,) from four (P,) answer log-probabilities, each summed over the answer's tokens.

    w = chosen, l = rejected. No gradient flows to the reference. h > 0: the policy prefers the
    chosen answer by more than the reference does; h = 0 where policy = reference.
    """
    if not policy_w.shape == policy_l.shape == ref_w.shape == ref_l.shape:
        shapes = [tuple(x.shape) for x in (policy_w, policy_l, ref_w, ref_l)]
        raise ValueError(f"preference_logit: shapes {shapes}, expected four equal ones")
    # DPO-1: h_i = [\log\pi_\theta(y_w|x) - \log\pi_{ref}(y_w|x)]
    #            - [\log\pi_\theta(y_l|x) - \log\pi_{ref}(y_l|x)]
    return (policy_w - ref_w.detach()) - (policy_l - ref_l.detach())


def prompt_logits(policy: Tensor, ref: Tensor) -> Tensor:
    r"""h of every pair of B prompts: the chosen answer against each of n rejected ones.

    policy, ref: (B, 1 + n) log-probabilities of the answers, the chosen one first -> (B, n).
    """
    w, l = policy[:, :1], policy[:, 1:]
    ref_w, ref_l = ref[:, :1], ref[:, 1:]
    return preference_logit(w.expand_as(l), l, ref_w.expand_as(ref_l), ref_l)


def dpo_loss(h: Tensor, beta: float | Tensor, normalised_by: float | None = None) -> Tensor:
    r"""The preference loss of each pair.

    Plain DPO with a scalar beta (DPO-2), HaNoRec with one beta' a pair (HN-11).

    Args:
        h: (P,) of `preference_logit`; under NoDO the policy in it is the noisy one.
        beta: a number, or (P,) of `pair_beta`. No gradient flows through it.
        normalised_by: option (ours): beta0. The loss is then scaled by beta0 / beta', so that all
            pairs pull equally at h = 0 and hard ones (low beta') saturate later. Without it the
            pull at h = 0 is beta' / 2: weakest on hard pairs.
    Returns:
        (P,); ln 2 = 0.693 at h = 0 in the plain form.
    """
    beta = torch.as_tensor(beta, dtype=h.dtype, device=h.device).detach()
    if beta.ndim and beta.shape != h.shape:
        raise ValueError(
            f"dpo_loss: beta of shape {tuple(beta.shape)} for h of shape {tuple(h.shape)}, "
            "expected a number or the same shape"
        )
    # DPO-2: L_{DPO} = -\log \sigma(\beta_0 h_i) \quad \text{(one } \beta_0 \text{ for all pairs)}
    # HN-11: L_{HaNo} = -\log \sigma(\beta'_i \tilde h_i) \quad \text{(its own } \beta'_i \text{)}
    loss = -F.logsigmoid(beta * h)
    return loss if normalised_by is None else loss * (normalised_by / beta)


def kl_divergence(policy_logits: Tensor, ref_logits: Tensor) -> Tensor:
    r"""The exact KL of the policy from the reference over the vocabulary.

    Args:
        policy_logits, ref_logits: (n, V) at the n answer positions. No gradient flows to the
            reference.
    Returns:
        (), >= 0, in nats, the mean over the positions.
    """
    dtype = torch.promote_types(policy_logits.dtype, torch.float32)
    log_p = policy_logits.to(dtype).log_softmax(-1)
    log_q = ref_logits.to(dtype).log_softmax(-1).detach()
    # HN-12: KL(\tilde\pi_\theta \Vert \pi_{ref})
    #        = \sum_v \tilde\pi_\theta(v) [\log\tilde\pi_\theta(v) - \log\pi_{ref}(v)]
    return (log_p.exp() * (log_p - log_q)).sum(-1).mean()
