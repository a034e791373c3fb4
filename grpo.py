"""GRPO: advantages, log-probabilities, the clipped loss, and the gradient steps (Eq. 5-6, 12-13).

Nothing here knows where credit comes from: it enters through shape_advantages. There is no KL term and no entropy
bonus, as in the paper. Only torch is needed. This file has two parts:

    1. The mathematics    pure functions of tensors
    2. Through the model  the same on a model that may be wrapped by DDP, FSDP2 or PEFT, in passes that fit into memory
"""

import math
from collections.abc import Callable

import torch
from torch import Tensor
from torch.distributed.tensor import DTensor
from torch.utils.checkpoint import checkpoint

# ---- 1. The mathematics ----


def group_advantages(rewards: Tensor) -> Tensor:
    """Eq. 6: (r - mean) / std inside each group. A group of equal rewards gets 0. std is the sample's (n - 1).

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
    """Advantage * gamma_t: the advantage of each token. This is where credit enters.

    advantages [B], gamma [B,N]. Returns [B,N]. sign: gamma multiplies "both" signs of the advantage (the paper), or
    only "positive" ones (the paper's first version), or only "negative" ones.

    >>> shape_advantages(torch.tensor([2.0, -2.0]), torch.tensor([[1.0, 1.5], [1.0, 1.5]]), sign="positive")
    tensor([[ 2.,  3.],
            [-2., -2.]])
    """
    a = advantages[:, None]  # [B,1]
    if sign == "positive":
        gamma = torch.where(a >= 0, gamma, 1.0)
    elif sign == "negative":
        gamma = torch.where(a <= 0, gamma, 1.0)
    elif sign != "both":
        raise ValueError(f"unknown sign {sign!r}: choose one of both, positive, negative")
    return a * gamma


def logprob_and_entropy(logits: Tensor, ids: Tensor, entropy: bool = True) -> tuple[Tensor, Tensor | None]:
    """Log-probability of each token and, if asked, the entropy (nats) of its distribution.

    logits [tokens,V] in any dtype, ids [tokens]. Returns ([tokens], [tokens] or None) float32.
    """
    logp = logits.float().log_softmax(-1)  # [tokens,V]
    logprobs = logp.gather(1, ids[:, None])[:, 0]
    return logprobs, -(logp.exp() * logp).sum(-1) if entropy else None


def probability_ratio(logprobs: Tensor, old_logprobs: Tensor, mask: Tensor) -> Tensor:
    """Eq. 5: rho_t = pi(o_t) / pi_old(o_t) of each response token; 1 outside the mask. All [B,N]."""
    return torch.exp(torch.where(mask, logprobs - old_logprobs, 0.0))


def clipped_loss(
    logprobs: Tensor,
    old_logprobs: Tensor,
    advantages: Tensor,
    mask: Tensor,
    epsilon: float = 0.2,
    epsilon_high: float | None = None,
    responses: int | None = None,
    tokens: int | None = None,
) -> Tensor:
    """Eq. 12-13, negated: the mean over responses of the mean over each one's tokens of the clipped objective.

    All [B,N]. advantages are already shaped: advantage * gamma_t. Gradient flows through logprobs alone.
    epsilon_high: the upper clip range, if different from epsilon ("clip-higher", DAPO).
    responses: the number to divide by, if this is one part of a larger batch (default: B).
    tokens: the number of the batch's response tokens, to take the mean over all of them instead ("token-level loss",
    DAPO); then long responses weigh more.
    A response without tokens contributes 0. Returns a scalar.
    """
    if epsilon_high is None:
        epsilon_high = epsilon
    ratio = probability_ratio(logprobs, old_logprobs, mask)  # [B,N]
    clipped_ratio = ratio.clamp(1 - epsilon, 1 + epsilon_high)
    objective = torch.min(ratio * advantages, clipped_ratio * advantages)
    if tokens is not None:
        return -torch.where(mask, objective, 0.0).sum() / tokens
    per_response = torch.where(mask, objective, 0.0).sum(1) / mask.sum(1).clamp(min=1)  # [B]
    return -per_response.sum() / (len(mask) if responses is None else responses)


def find_clipped(
    logprobs: Tensor,
    old_logprobs: Tensor,
    advantages: Tensor,
    mask: Tensor,
    epsilon: float = 0.2,
    epsilon_high: float | None = None,
) -> Tensor:
    """Response tokens outside the clip range, on the side that their advantage pushes to: their gradient is 0.

    All [B,N], as for clipped_loss. Returns [B,N] bool. Ratios of 1.5 and 0.5 lie outside the range from 0.8 to 1.2:

    >>> ratios = torch.tensor([[1.5, 0.5, 1.5, 0.5]])
    >>> advantages, mask = torch.tensor([[1.0, 1.0, -1.0, -1.0]]), torch.ones(1, 4, dtype=torch.bool)
    >>> find_clipped(ratios.log(), torch.zeros(1, 4), advantages, mask)
    tensor([[ True, False, False,  True]])
    """
    if epsilon_high is None:
        epsilon_high = epsilon
    ratio = probability_ratio(logprobs, old_logprobs, mask)  # [B,N], 1 outside the mask
    too_high = (ratio > 1 + epsilon_high) & (advantages > 0)
    too_low = (ratio < 1 - epsilon) & (advantages < 0)
    return too_high | too_low


def estimate_kl(logprobs: Tensor, old_logprobs: Tensor, mask: Tensor) -> Tensor:
    """The k3 estimate of KL(pi_old || pi) at each response token: rho - 1 - log rho, in nats; 0 outside the mask.

    It is never negative, and its mean over tokens that pi_old sampled is the KL divergence. All [B,N].

    >>> estimate_kl(torch.tensor([[0.5, 0.0]]), torch.zeros(1, 2), torch.ones(1, 2, dtype=torch.bool))
    tensor([[0.1487, 0.0000]])
    """
    log_ratio = torch.where(mask, logprobs - old_logprobs, 0.0)
    return log_ratio.expm1() - log_ratio


# ---- 2. Through the model ----

# How many float32 logits are made at a time: 128 MiB. That is 220 tokens if the vocabulary has 152,000 entries.
CHUNK = 2**25


def token_logprobs(model, input_ids: Tensor, mask: Tensor, entropy: bool = False) -> tuple[Tensor, Tensor | None]:
    """Log-probability of each response token and, if asked, the entropy of its distribution. Temperature 1.

    input_ids [B,N] right-padded, mask [B,N] bool. Returns ([B,N], [B,N] or None), 0 outside the mask.

    No attention mask is needed: padding lies after every real token, where causal attention never looks. Logits are
    made only where the mask is, and never all at once: the output head runs chunk by chunk, and again in the backward
    pass.

    The model may be wrapped by DDP, FSDP2 or PEFT (LoRA). In mixed precision, call this inside your own torch.autocast:
    the wrapper that accelerate puts around forward is bypassed.
    """
    if mask[:, 0].any():
        raise ValueError("mask marks token 0, which nothing comes before: every response needs a prompt")
    inner = getattr(model, "module", model)  # DDP's own model
    decoder = find_decoder(inner)

    def score_states(states: Tensor, ids: Tensor) -> tuple[Tensor, Tensor | None]:
        return logprob_and_entropy(logits_of_states(inner, decoder, states), ids, entropy)

    def forward() -> tuple[Tensor, Tensor | None]:
        # The state at t-1 produced token t: leave out the last state, and shift the mask by one.
        hidden = decoder(input_ids=input_ids, use_cache=False).last_hidden_state[:, :-1]  # [B,N-1,d]
        states, ids = hidden[mask[:, 1:]], input_ids[mask]  # [tokens,d], [tokens]
        size = max(1, CHUNK // inner.config.get_text_config().vocab_size)
        if len(ids) <= size:
            return score_states(states, ids)
        parts = [
            checkpoint(score_states, chunk, chunk_ids, use_reentrant=False)
            for chunk, chunk_ids in zip(states.split(size), ids.split(size))
        ]
        logprobs, entropies = zip(*parts)
        return torch.cat(logprobs), torch.cat(entropies) if entropy else None

    logprobs, entropies = _call_as_forward(model, inner, forward)  # [tokens] each
    zero = torch.zeros(mask.shape, device=mask.device)
    return zero.masked_scatter(mask, logprobs), zero.masked_scatter(mask, entropies) if entropy else None


def find_decoder(model):
    """The part of a transformers model that makes hidden states from tokens."""
    decoder = model.get_decoder()
    if decoder is model or not hasattr(decoder, "get_input_embeddings"):  # not found (Llama 4), or the output head
        decoder = next(part for part in model.children() if hasattr(part, "get_input_embeddings"))
    return decoder


def logits_of_states(model, decoder, states: Tensor) -> Tensor:
    """The logits [tokens,V] that the model makes from hidden states [tokens,d].

    Models differ in what they do there: some scale the logits, cap them, or transform the states first. So we call the
    model's own forward, whose decoder returns the given states instead of computing them.
    """
    own = decoder.__dict__.get("forward")
    decoder.forward = lambda *_, **__: DecoderOutput([states[None]])
    try:
        no_ids = torch.zeros(1, len(states), dtype=torch.long, device=states.device)  # nobody looks at them
        return type(model).forward(model, input_ids=no_ids).logits[0]
    finally:
        _put_back(decoder, own)


class DecoderOutput(tuple):
    """What a decoder returns: the hidden states [1,tokens,d], and None for all else that it might return."""

    last_hidden_state = property(lambda self: self[0])

    def __getattr__(self, name: str) -> None:
        return None


def _call_as_forward(model, inner, forward: Callable):
    """forward(), called as the model's own forward pass.

    DDP and FSDP2 act around model.forward() only: FSDP2 gathers the weights before it, and both reduce the gradients
    after it. So we replace the inner model's forward by our function, for one call, and call the wrapped model. model()
    runs the wrapper's hooks, which call inner.forward. It needs no arguments, because our function has them already.
    """
    own = inner.__dict__.get("forward")  # None unless somebody has replaced the class's, as accelerate does
    inner.forward = forward
    try:
        return model()
    finally:
        _put_back(inner, own)


def _put_back(module, own: Callable | None) -> None:
    """Undo `module.forward = ...`."""
    if own is None:
        del module.forward
    else:
        module.forward = own


def check_logits(model) -> None:
    """Raise ValueError if token_logprobs does not give the log-probs of the model's own logits."""
    name = f"{type(getattr(model, 'module', model)).__name__} cannot be trained here"
    ids = torch.tensor([[0, 1, 2, 3]], device=next(model.parameters()).device)
    with torch.no_grad():
        try:
            ours = token_logprobs(model, ids, ids > 0)[0][:, 1:]
        except Exception as e:  # any: what the model's own forward misses, it misses in its own way
            raise ValueError(
                f"{name}: no logits from its decoder's last hidden states ({type(e).__name__}: {e})"
            ) from e
        logits = model(input_ids=ids, use_cache=False).logits[:, :-1]
        own, own_dtype = logits.float().log_softmax(-1).gather(2, ids[:, 1:, None])[..., 0], logits.dtype
    tolerance = 1e-2 if own_dtype == torch.float32 else 0.3
    if not torch.allclose(ours, own, atol=tolerance):
        raise ValueError(
            f"{name}: the log-probs of grpo.token_logprobs differ from those of its own logits by "
            f"{(ours - own).abs().max():.2g} (if dropout is on: call model.eval())"
        )


def micro_batches(mask: Tensor, rows: Tensor, tokens: int) -> list[tuple[Tensor, int]]:
    """Split rows into passes of similar length with at most `tokens` tokens each, padding included.

    mask [B,N]; rows [number], the row numbers to split; those without a response are left out. Returns (row numbers,
    columns needed) of each pass. A row is never split: one that is longer than `tokens` gets a pass of its own.

    >>> mask = torch.tensor([[0, 1, 1, 1], [0, 1, 0, 0], [0, 1, 1, 0], [0, 1, 0, 0]]).bool()
    >>> micro_batches(mask, torch.tensor([0, 1, 2]), tokens=6)
    [(tensor([1, 2]), 3), (tensor([0]), 4)]
    """
    ends = (mask * torch.arange(1, mask.shape[1] + 1, device=mask.device)).amax(1)  # [B], columns each row needs
    rows = rows[ends[rows] > 0]  # a row without a response needs no pass
    passes, current = [], []
    for row in rows[ends[rows].argsort(stable=True)].tolist():
        width = int(ends[row])  # the longest so far: the others would be padded to it
        if current and (len(current) + 1) * width > tokens:
            passes.append(current)
            current = []
        current.append(row)
    if current:
        passes.append(current)
    return [(torch.tensor(rows_of_pass, device=mask.device), int(ends[rows_of_pass[-1]])) for rows_of_pass in passes]


def share_passes(passes: list, rank: int, world: int) -> list[tuple]:
    """The passes of one rank, each with whether its result counts.

    All ranks must make equally many passes, or FSDP2 deadlocks, because it gathers weights on all ranks together. If
    the passes cannot be divided evenly, some ranks repeat a pass of another rank, and the repeated one does not
    count.

    >>> share_passes(["a", "b", "c"], rank=0, world=2), share_passes(["a", "b", "c"], rank=1, world=2)
    ([('a', True), ('c', True)], [('b', True), ('a', False)])
    """
    passes_per_rank = math.ceil(len(passes) / world)
    numbers = range(rank, passes_per_rank * world, world)
    return [(passes[i % len(passes)], i < len(passes)) for i in numbers]


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
    token_level: bool = False,
    rank: int = 0,
    world: int = 1,
) -> dict[str, float]:
    """One gradient step on each minibatch of a batch of rollouts, in passes of micro_tokens.

    input_ids, mask, old_logprobs, advantages: [B,N]; advantages are shaped. minibatches: row numbers, on the same
    device.

    token_level: the mean over a minibatch's tokens in place of the mean over its responses (clipped_loss).

    A row whose advantages are all 0 has gradient 0. Such rows are not computed, but they count in the mean, so the
    result is exact. A minibatch of only such rows changes nothing. Gradients are clipped to norm 1. A step whose
    gradient is not finite is not taken.

    With several ranks, all must hold the same batch. Each makes its share of the passes, and FSDP2 averages the
    gradients.

    Returns a dict. The first three are this rank's share, to be summed over ranks:
        loss           mean over the minibatches
        clip_fraction  share of the tokens whose gradient was clipped to 0 (find_clipped)
        kl             mean over the tokens of estimate_kl: how far the model has moved from pi_old
        grad_norm      mean over the minibatches, before it is clipped to 1
        skipped        number of skipped gradient steps
    The tokens are those of the rows that are computed, each measured in its own pass, so before its own gradient step.
    In the first minibatch all ratios are 1 up to rounding. Without any such row, clip_fraction and kl are 0.
    """
    # Sums over the minibatches.
    losses, norms, skipped = [], [], 0
    clipped, kl, tokens = 0.0, 0.0, 0  # clipped, kl: sums over this rank's tokens; tokens: the number on all ranks
    for minibatch in minibatches:
        # Forward and backward: gradients add up over the passes of the minibatch.
        has_gradient = (advantages[minibatch] * mask[minibatch]).any(1)
        tokens += mask[minibatch[has_gradient]].sum().item()
        passes = micro_batches(mask, minibatch[has_gradient], micro_tokens)
        loss_sum = 0.0
        for (rows, width), counts in share_passes(passes, rank, world):
            response = mask[rows, :width]
            old, token_advantages = old_logprobs[rows, :width], advantages[rows, :width]
            logprobs, _ = token_logprobs(model, input_ids[rows, :width], response)
            loss = clipped_loss(
                logprobs,
                old,
                token_advantages,
                response,
                epsilon=epsilon,
                epsilon_high=epsilon_high,
                responses=len(minibatch),
                tokens=int(mask[minibatch].sum()) if token_level else None,
            )
            loss = loss * counts  # a repeated pass has weight 0
            (loss * world).backward()  # FSDP2 averages over the ranks, but the loss is a sum over their passes
            loss_sum += loss.item()
            if counts:
                new = logprobs.detach()
                clipped += find_clipped(new, old, token_advantages, response, epsilon, epsilon_high).sum().item()
                kl += estimate_kl(new, old, response).sum().item()
        # One gradient step.
        norm = torch.nn.utils.clip_grad_norm_(model.parameters(), 1.0)
        norms.append((norm.full_tensor() if isinstance(norm, DTensor) else norm).item())
        losses.append(loss_sum)
        if math.isfinite(norms[-1]):
            optimizer.step()
        else:
            skipped += 1
        optimizer.zero_grad()
    return {
        "loss": sum(losses) / len(losses),
        "clip_fraction": clipped / max(tokens, 1),
        "kl": kl / max(tokens, 1),
        "grad_norm": sum(norms) / len(norms),
        "skipped": skipped,
    }
