"""GRPO: group advantages, token log-probabilities, the clipped objective and its gradient steps (Eq. 5-6, 12-13).

Nothing here knows where credit comes from: shape_advantages is the line through which it enters. No KL term and no
entropy bonus, as in the paper. Only torch is needed.
"""

import torch
from torch import Tensor


def group_advantages(rewards: Tensor) -> Tensor:
    """Eq. 6: (r - mean) / std inside each group; a group of equal rewards gets 0. std is the sample's (n - 1).

    rewards [P,G], the G responses to each of P prompts. Returns [P,G] float32.

    >>> group_advantages(torch.tensor([[1.0, 0.0, 0.0, 0.0], [1.0, 1.0, 1.0, 1.0]]))
    tensor([[ 1.5000, -0.5000, -0.5000, -0.5000],
            [ 0.0000,  0.0000,  0.0000,  0.0000]])
    """
    if rewards.shape[1] < 2:
        raise ValueError(f"group size {rewards.shape[1]}: an advantage compares responses, so it needs two or more")
    rewards = rewards.float()
    centred = rewards - rewards.mean(1, keepdim=True)
    equal = (rewards == rewards[:, :1]).all(1, keepdim=True)  # the std of equal floats need not be exactly 0
    return torch.where(equal, 0.0, centred / centred.std(1, keepdim=True).clamp(min=1e-6))


def shape_advantages(advantages: Tensor, gamma: Tensor, sign: str = "both") -> Tensor:
    """A_t * gamma_t, each token's share; gamma applies to advantages of the given sign only (v2: both, v1: positive).

    advantages [B], gamma [B,N]. Returns [B,N].

    >>> shape_advantages(torch.tensor([2.0, -2.0]), torch.tensor([[1.0, 1.5], [1.0, 1.5]]), sign="positive")
    tensor([[ 2.,  3.],
            [-2., -2.]])
    """
    a = advantages[:, None]
    applies = {"both": torch.ones_like(a, dtype=torch.bool), "positive": a >= 0, "negative": a <= 0}
    if sign not in applies:
        raise ValueError(f"unknown sign {sign!r}: choose one of {', '.join(applies)}")
    return a * torch.where(applies[sign], gamma, 1.0)


def clipped_loss(
    logprobs: Tensor, old_logprobs: Tensor, advantages: Tensor, mask: Tensor, epsilon: float = 0.2, responses: int = 0
) -> Tensor:
    """Eq. 12-13, negated: the mean over responses of the mean over each one's tokens of the clipped objective.

    All [B,N]; advantages are already shaped. Gradient flows through logprobs alone. `responses` is the number to divide
    by when this is one part of a larger batch (default: B). A response without tokens contributes 0. Returns a scalar.
    """
    ratio = torch.exp(torch.where(mask, logprobs - old_logprobs, 0.0))
    objective = torch.min(ratio * advantages, ratio.clamp(1 - epsilon, 1 + epsilon) * advantages)
    per_response = torch.where(mask, objective, 0.0).sum(1) / mask.sum(1).clamp(min=1)
    return -per_response.sum() / (responses or len(mask))


def token_logprobs(model, input_ids: Tensor, mask: Tensor, entropy: bool = False) -> tuple[Tensor, Tensor | None]:
    """Log-probability of each response token and, if asked, the entropy (nats) of the distribution it came from.

    input_ids [B,N] right-padded, mask [B,N] bool. No attention mask is needed: padding lies after every real token,
    where causal attention never looks. Logits are made only from the first response token on, and log-softmaxed in
    float32 only where the mask is. Returns ([B,N], [B,N] or None), 0 outside the mask. The temperature is 1.
    """
    if mask[:, 0].any():
        raise ValueError("mask marks token 0, which nothing comes before: every response needs a prompt")
    out = torch.zeros(mask.shape, device=mask.device)
    if not mask.any():
        return out, out if entropy else None
    first = int(mask.any(0).int().argmax())  # no row has a response token before it
    keep = mask.shape[1] - first + 1
    logits = model(input_ids=input_ids, logits_to_keep=keep, use_cache=False).logits[:, :-1]  # [B,keep-1,V]
    chosen = logits[mask[:, first:]].float().log_softmax(-1)  # [tokens,V]
    logprobs = out.masked_scatter(mask, chosen.gather(1, input_ids[mask][:, None])[:, 0])
    return logprobs, out.masked_scatter(mask, -(chosen.exp() * chosen).sum(-1)) if entropy else None


def micro_batches(mask: Tensor, rows: Tensor, size: int) -> list[tuple[Tensor, int]]:
    """The rows in groups of similar length, so that little of a pass is padding, each with how many columns it needs.

    >>> mask = torch.tensor([[0, 1, 1, 1], [0, 1, 0, 0], [0, 1, 1, 0], [0, 1, 0, 0]]).bool()
    >>> micro_batches(mask, torch.tensor([0, 1, 2]), size=2)
    [(tensor([1, 2]), 3), (tensor([0]), 4)]
    """
    ends = (mask * torch.arange(1, mask.shape[1] + 1, device=mask.device)).amax(1)
    rows = rows[ends[rows].argsort(stable=True)]
    return [(index, int(ends[index].max())) for index in rows.split(size) if len(index)]


def update(
    model,
    optimizer,
    input_ids: Tensor,
    mask: Tensor,
    old_logprobs: Tensor,
    advantages: Tensor,
    minibatches: list[Tensor],
    micro_batch: int = 16,
    epsilon: float = 0.2,
) -> dict[str, float]:
    """One gradient step on each minibatch (row numbers) of a batch of rollouts, in passes of micro_batch rows.

    All [B,N], advantages shaped. Rows whose advantages are all 0 count in the mean but are not computed: exact, for
    their gradient is 0. Gradients are clipped to norm 1. Returns the means over the steps of loss and gradient norm.
    """
    losses, norms = [], []
    for minibatch in minibatches:
        loss, matters = 0.0, (advantages[minibatch] * mask[minibatch]).any(1)
        for rows, n in micro_batches(mask, minibatch[matters], micro_batch):
            now = mask[rows, :n]
            logprobs, _ = token_logprobs(model, input_ids[rows, :n], now)
            part = clipped_loss(
                logprobs, old_logprobs[rows, :n], advantages[rows, :n], now, epsilon, responses=len(minibatch)
            )
            part.backward()
            loss += part.item()
        norms.append(torch.nn.utils.clip_grad_norm_(model.parameters(), 1.0).item())
        losses.append(loss)
        optimizer.step()
        optimizer.zero_grad()
    return {"loss": sum(losses) / len(losses), "grad_norm": sum(norms) / len(norms)}
