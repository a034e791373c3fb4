"""What one scoring pass says of each token, by train.py's own functions; and what tokens can be ranked by."""

import torch
from torch import Tensor
from transformers import AutoModelForCausalLM

import credit
import train
from heads import Heads, split_heads
from lab import linkage
from metrics import Signals
from node import precision

CHOICE = 0.1  # nats: tokens of higher entropy are choices; where the model is surer, gamma multiplies next to nothing


def split_of(model, input_ids: Tensor, mask: Tensor, seed: int = 0, **how) -> Heads:
    """The split into local and global heads, measured on SPAN_ROWS random ones of these responses, as in training."""
    some = torch.randperm(len(mask), generator=torch.Generator().manual_seed(seed))[: train.SPAN_ROWS].to(mask.device)
    with precision.autocast_for(model):
        return train.split_into_local_and_global(train.Args(**how), model, input_ids[some], mask[some])


def signals_of(model, input_ids: Tensor, mask: Tensor, heads: Heads | None = None, **how) -> Signals:
    """WAAD, FAI, entropy and log-probs of response tokens, [B,N] each; `how` are arguments of train.py.

    heads: default is the split by the first SPAN_ROWS responses.
    """
    if heads is None:
        heads = split_of(model, input_ids[: train.SPAN_ROWS], mask[: train.SPAN_ROWS], **how)
    with precision.autocast_for(model):
        rows = torch.arange(len(mask), device=mask.device)
        return train.score(train.Args(**how), model, input_ids, mask, rows, heads)


def untrained(model, seed: int = 0):
    """A model of the same shape with random weights: what position and structure alone would show."""
    torch.manual_seed(seed)
    return AutoModelForCausalLM.from_config(model.config, dtype=torch.float32).to(model.device).eval()


def without_first(signals: Signals, model, input_ids: Tensor, mask: Tensor) -> Signals:
    """The same, with WAAD, FAI and head split from attention without the first token's column (lab/sinks.py)."""
    args, rows = train.Args(), slice(train.SPAN_ROWS)
    how = {"layers": signals.heads.layers, "horizon": tuple(args.horizon), "drop_first": True}
    spans = linkage.per_head(model, input_ids[rows], mask[rows], **how).spans.view_as(signals.heads.spans)
    heads = Heads(signals.heads.layers, spans, *split_heads(spans, args.head_quantile))
    looks = linkage.per_head(model, input_ids, mask, **how)
    waad, fai = looks.waad[heads.is_local.flatten()].mean(0), looks.fai[heads.is_global.flatten()].mean(0)
    return signals._replace(waad=waad.to(mask.device), fai=fai.to(mask.device), heads=heads)


def on_cpu(signals: Signals) -> Signals:
    """The same, where the token values are."""
    return Signals(*(x.cpu() for x in signals[:4]), signals.heads)


def scores(signals: Signals, mask: Tensor) -> dict[str, Tensor]:
    """What tokens can be ranked by, highest first: [B,N] each."""
    return {
        "FAI": signals.fai,
        "change of WAAD": credit.waad_change(signals.waad, mask),
        "WAAD": signals.waad,
        "entropy": signals.entropy,
        "surprise": -signals.logprobs,
        "position, early first": -mask.cumsum(1).float(),
    }
