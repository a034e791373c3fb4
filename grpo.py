"""GRPO: group advantages, token log-probabilities, the clipped objective and its gradient steps (Eq. 5-6, 12-13).

Nothing here knows where credit comes from: shape_advantages is the line through which it enters. No KL term and no
entropy bonus, as in the paper. Only torch is needed.
"""

import math
from collections.abc import Callable

import torch
from torch import Tensor
from torch.distributed.tensor import DTensor
from torch.utils.checkpoint import checkpoint


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
    """A_t * gamma_t, each token's share. gamma applies to advantages of the given sign only.

    The paper takes both; its first version, positive ones.

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


def probability_ratio(logprobs: Tensor, old_logprobs: Tensor, mask: Tensor) -> Tensor:
    """rho_t = pi(o_t) / pi_old(o_t) of each response token (Eq. 5); 1 outside the mask. All [B,N]."""
    return torch.exp(torch.where(mask, logprobs - old_logprobs, 0.0))


def clipped_loss(
    logprobs: Tensor,
    old_logprobs: Tensor,
    advantages: Tensor,
    mask: Tensor,
    epsilon: float = 0.2,
    epsilon_high: float | None = None,
    responses: int = 0,
) -> Tensor:
    """Eq. 12-13, negated: the mean over responses of the mean over each one's tokens of the clipped objective.

    All [B,N]; advantages are already shaped. Gradient flows through logprobs alone. epsilon_high is the upper clip
    where it is another than the lower ("clip-higher", DAPO). `responses` is the number to divide by when this is one
    part of a larger batch (default: B). A response without tokens contributes 0. Returns a scalar.
    """
    high = epsilon if epsilon_high is None else epsilon_high
    ratio = probability_ratio(logprobs, old_logprobs, mask)
    objective = torch.min(ratio * advantages, ratio.clamp(1 - epsilon, 1 + high) * advantages)
    per_response = torch.where(mask, objective, 0.0).sum(1) / mask.sum(1).clamp(min=1)
    return -per_response.sum() / (responses or len(mask))


# Float32 logits made at a time: 128 MiB, 220 tokens at a vocabulary of 152,000; softmax and gradient take more.
CHUNK = 2**25


def token_logprobs(model, input_ids: Tensor, mask: Tensor, entropy: bool = False) -> tuple[Tensor, Tensor | None]:
    """Log-probability of each response token and, if asked, the entropy (nats) of the distribution it came from.

    input_ids [B,N] right-padded, mask [B,N] bool. No attention mask is needed: padding lies after every real token,
    where causal attention never looks. Logits are made only where the mask is, and never all at once: the output head
    runs chunk by chunk, in the backward pass again. Returns ([B,N], [B,N] or None), 0 outside the mask. Temperature 1.
    The model may be wrapped by DDP, FSDP2 or PEFT (LoRA), by whomever. Autocast is the caller's: a forward that
    accelerate has replaced to enter it is not called, so call within accelerator.autocast().
    """
    if mask[:, 0].any():
        raise ValueError("mask marks token 0, which nothing comes before: every response needs a prompt")
    inner = getattr(model, "module", model)  # DDP's own model
    softcap = getattr(inner.config.get_text_config(), "final_logit_softcapping", None)  # Gemma's

    def forward() -> tuple[Tensor, Tensor | None]:
        hidden = inner.get_decoder()(input_ids=input_ids, use_cache=False).last_hidden_state[:, :-1]  # [B,N-1,d]
        states, ids = hidden[mask[:, 1:]], input_ids[mask]  # [tokens,d], [tokens]: the state that produced each token
        head = inner.get_output_embeddings()

        def chunk(h: Tensor, i: Tensor) -> tuple[Tensor, Tensor]:
            logits = head(h).float()
            if softcap:
                logits = softcap * torch.tanh(logits / softcap)
            logp = logits.log_softmax(-1)
            chosen = logp.gather(1, i[:, None])[:, 0]
            return chosen, -(logp.exp() * logp).sum(-1) if entropy else chosen.detach()

        size = max(1, CHUNK // head.weight.shape[0])
        if len(ids) > size:
            parts = [checkpoint(chunk, h, i, use_reentrant=False) for h, i in zip(states.split(size), ids.split(size))]
            chosen, uncertainty = (torch.cat(x) for x in zip(*parts))
        else:
            chosen, uncertainty = chunk(states, ids)
        zero = torch.zeros(mask.shape, device=mask.device)
        return zero.masked_scatter(mask, chosen), zero.masked_scatter(mask, uncertainty) if entropy else None

    return _in_place_of_forward(model, inner, forward)


def _in_place_of_forward(model, inner, forward: Callable):
    """forward(), called as the inner model's own forward pass.

    So whoever has wrapped the model does what it does around a pass: FSDP2 gathers the weights before it, and both
    FSDP2 and DDP reduce the gradients after it.
    """
    own = inner.__dict__.get("forward")  # None unless somebody has replaced the class's, as accelerate does
    inner.forward = forward
    try:
        return model()
    finally:
        if own is None:
            del inner.forward
        else:
            inner.forward = own


def check_head(model) -> None:
    """Raise ValueError if the model does to its logits what token_logprobs does not (scale them, say)."""
    ids = torch.tensor([[0, 1, 2, 3]], device=next(model.parameters()).device)
    with torch.no_grad():
        ours = token_logprobs(model, ids, ids > 0)[0][:, 1:]
        logits = model(input_ids=ids).logits[:, :-1]
        own, own_dtype = logits.float().log_softmax(-1).gather(2, ids[:, 1:, None])[..., 0], logits.dtype
    tolerance = 1e-2 if own_dtype == torch.float32 else 0.3
    if not torch.allclose(ours, own, atol=tolerance):
        raise ValueError(f"{type(model).__name__} changes its logits after the output head: grpo.py cannot score it")


def micro_batches(mask: Tensor, rows: Tensor, tokens: int) -> list[tuple[Tensor, int]]:
    """The rows in groups of similar length that fill a pass of so many tokens, each with how many columns it needs.

    Padding counts. A row longer than that gets a pass of its own.

    >>> mask = torch.tensor([[0, 1, 1, 1], [0, 1, 0, 0], [0, 1, 1, 0], [0, 1, 0, 0]]).bool()
    >>> micro_batches(mask, torch.tensor([0, 1, 2]), tokens=6)
    [(tensor([1, 2]), 3), (tensor([0]), 4)]
    """
    ends = (mask * torch.arange(1, mask.shape[1] + 1, device=mask.device)).amax(1)
    groups: list[tuple[list[int], int]] = []
    for row in rows[ends[rows].argsort(stable=True)].tolist():
        n = int(ends[row])
        if not groups or (len(groups[-1][0]) + 1) * n > tokens:
            groups.append(([], n))
        groups[-1] = ([*groups[-1][0], row], n)
    return [(torch.tensor(group, device=mask.device), n) for group, n in groups]


def share_of_passes(passes: list, rank: int, world: int) -> list[tuple]:
    """A rank's passes, each with whether its result counts. Of no passes, none.

    The ranks of a sharded model must make equally many. Where the passes do not divide by the ranks, some ranks make
    one that another rank has made as well, and that one does not count.

    >>> share_of_passes(["a", "b", "c"], rank=0, world=2), share_of_passes(["a", "b", "c"], rank=1, world=2)
    ([('a', True), ('c', True)], [('b', True), ('a', False)])
    """
    turns = math.ceil(len(passes) / world)
    return [(passes[i % len(passes)], i < len(passes)) for i in range(rank, turns * world, world)]


def update(
    model,
    optimizer,
    input_ids: Tensor,
    mask: Tensor,
    old_logprobs: Tensor,
    advantages: Tensor,
    minibatches: list[Tensor],
    micro_tokens: int = 2048,
    epsilon: float = 0.2,
    epsilon_high: float | None = None,
    rank: int = 0,
    world: int = 1,
) -> dict[str, float]:
    """One gradient step on each minibatch (row numbers) of a batch of rollouts, in passes of micro_tokens.

    All [B,N], advantages shaped, minibatches on the same device. Rows whose advantages are all 0 count in the mean but
    are not computed: exact, for their gradient is 0; of such rows alone, a minibatch moves nothing. Gradients are
    clipped to norm 1; a step whose gradient is not finite is not taken. Several ranks must all hold the same batch, or
    they would wait for each other for ever: each makes its share of the passes; a sharded model averages gradients.
    Returns means over the steps: the loss (this rank's share, to be summed), the gradient norm, and steps not taken.
    """
    losses, norms, skipped = [], [], 0
    for minibatch in minibatches:
        loss, teaches = 0.0, (advantages[minibatch] * mask[minibatch]).any(1)
        passes = micro_batches(mask, minibatch[teaches], micro_tokens)
        for (rows, n), counts in share_of_passes(passes, rank, world):
            response = mask[rows, :n]
            logprobs, _ = token_logprobs(model, input_ids[rows, :n], response)
            part = clipped_loss(
                logprobs, old_logprobs[rows, :n], advantages[rows, :n], response, epsilon, epsilon_high, len(minibatch)
            )
            part = part * counts
            (part * world).backward()
            loss += part.item()
        norm = torch.nn.utils.clip_grad_norm_(model.parameters(), 1.0)
        norms.append((norm.full_tensor() if isinstance(norm, DTensor) else norm).item())
        losses.append(loss)
        if math.isfinite(norms[-1]):
            optimizer.step()
        else:
            skipped += 1
        optimizer.zero_grad()
    return {"loss": sum(losses) / len(losses), "grad_norm": sum(norms) / len(norms), "skipped": skipped}
