"""Every causal language model of the installed transformers: does `observe` give the right numbers for it?

    python -m tests.families.models                             all kinds (four minutes on one core)
    python -m tests.families.models --only gemma2 deepseek      only kinds whose names contain one of these words

A *kind* is a model class of transformers with one configuration: each class that AutoModelForCausalLM knows, and
variants of some of them (other windows, head counts, logit scales, ...). Each model is tiny, random and seeded.
tests/families/kinds.py lists them and builds them.

`try_kind` compares three things, on two rows of different length that are padded on the right:

    log-probs, entropy    with the logits of the model's own forward pass over one row without padding
    WAAD, FAI, spans      with their definitions (metrics.waad, metrics.fai, heads.head_spans) on full attention maps
    causality             an earlier logit must not change if the last token changes

The maps come from up to three sources that share no code with ours:

    sdpa        a softmax over the arguments with which a layer calls torch's scaled_dot_product_attention
    eager       in transformers' implementation "eager": the output of the family's attention function for values that
                are one-hot, which is the map that it multiplies values with
    returned    in the same implementation: the attention weights that a layer returns

A verdict is one of

    exact        everything agrees, with each source that there is
    refused      observe raised a ValueError on purpose; the note is its message
    WRONG        something differs; the note says what, and by how much
    crash        observe raised another exception, or failed with a ValueError that no line of ours raises
    not built    transformers cannot build or run this class as a language model of token numbers

The exit status is 1 if a kind is WRONG or crashes.
"""

import contextlib
import copy
import gc
import logging
import re
import signal
import sys
import time
import traceback
import warnings
from collections import Counter
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import NamedTuple
from unittest import mock

import torch
import transformers
from torch import Tensor
from tqdm import tqdm
from transformers import PreTrainedModel
from transformers.hf_argparser import HfArg

import heads
import metrics
from node.output import markdown, minutes, write_whole
from node.settings import parse_args
from tests.families.kinds import kinds

ROOT = Path(metrics.__file__).parent
TOLERANCE = 2e-4  # float32: nats, tokens, shares of attention; spans relative to max(1, |span|)
HORIZONS = ((10, 100), (3, 20), (10, None), (1, None))
N = 64  # tokens of a padded row: more than any sliding window (24) or chunk (16) of the tiny models
ROWS = ((5, 59), (21, 24))  # (prompt, response) tokens of the two rows


@dataclass
class Args:
    """Try observe on every causal language model of transformers, and write a table of verdicts."""

    only: list[str] = HfArg(default_factory=list, help="Try only kinds whose names contain one of these words.")
    out: str = HfArg(default="lab/results/models.md", help="File to write.")
    seconds: int = HfArg(default=60, help="Time limit of one kind.")


QUANTITIES = {"logprobs": "log-probs", "entropy": "entropy", "waad": "WAAD", "fai": "FAI"}  # fields of Signals


# ---- 1. What the model itself says ----


class Batch(NamedTuple):
    """Two rows of tokens, padded on the right with noise."""

    ids: Tensor  # [B,N]
    mask: Tensor  # [B,N] bool, the response tokens
    lengths: list[int]  # prompt and response together


def make_batch(vocab_size: int) -> Batch:
    """The two rows. Token numbers begin at 4, because some models treat special tokens in another way.

    No token occurs twice in a row: sparse attention that chooses keys by a score finds equal scores for equal tokens,
    and which of them it takes can depend on the padding.
    """
    generator = torch.Generator().manual_seed(1)
    ids = torch.stack([4 + torch.randperm(vocab_size - 4, generator=generator)[:N] for _ in ROWS])
    t = torch.arange(N)
    mask = torch.stack([(t >= prompt) & (t < prompt + response) for prompt, response in ROWS])
    return Batch(ids, mask, [prompt + response for prompt, response in ROWS])


Maps = dict[int, list[Tensor]]  # by layer number, the maps [1,H,n,n] of each time the layer attended


class Collected(NamedTuple):
    """Attention maps of one pass, from three places."""

    returned: Maps  # what the modules return
    eager: Maps  # what the family's eager attention function multiplies the values with
    sdpa: Maps  # a softmax over the arguments of torch's scaled_dot_product_attention


@contextlib.contextmanager
def collecting_maps(model: PreTrainedModel) -> Iterator[Collected]:
    """Collect the attention maps of the passes made meanwhile."""
    collected = Collected({}, {}, {})
    layers_entered = []  # the numbers of the layers that are running, the innermost last

    def enter(module, args):
        layers_entered.append(module.layer_idx)

    def leave(module, args, output):
        layers_entered.pop()
        for part in output[1:] if isinstance(output, tuple) else ():
            if is_map(part):
                known = collected.returned.setdefault(module.layer_idx, [])
                if not any(part is other for other in known):  # an outer module hands on what an inner one returned
                    known.append(part)

    def keep(maps: Maps, weights: Tensor):
        known = maps.setdefault(layers_entered[-1], [])
        if not any(torch.equal(weights, other) for other in known):  # DiffLlama uses the same map for two values
            known.append(weights)

    def wrap_eager(eager_attention: Callable):
        def attend(module, query, key, value, *args, **kwargs):
            n = key.shape[2]
            if layers_entered and query.shape[2] == n:
                one_hot = torch.eye(n).expand(*value.shape[:2], n, n)
                weights = eager_attention(module, query, key, one_hot, *args, **kwargs)[0]  # [1,n,H,n]
                keep(collected.eager, weights.transpose(1, 2))
            return eager_attention(module, query, key, value, *args, **kwargs)

        return attend

    torch_sdpa = torch.nn.functional.scaled_dot_product_attention

    def sdpa(query, key, value, attn_mask=None, dropout_p=0.0, is_causal=False, scale=None, enable_gqa=False):
        if layers_entered and query.ndim == 4 and query.shape[2] == key.shape[2]:
            keep(collected.sdpa, softmax_map(query, key, attn_mask, is_causal, scale))
        return torch_sdpa(
            query, key, value, attn_mask=attn_mask, dropout_p=dropout_p, is_causal=is_causal, scale=scale,
            enable_gqa=enable_gqa,
        )  # fmt: skip

    layers = [module for module in model.modules() if isinstance(getattr(module, "layer_idx", None), int)]
    sources = {sys.modules[type(layer).__module__] for layer in layers}
    with contextlib.ExitStack() as stack:
        for layer in layers:
            stack.callback(layer.register_forward_pre_hook(enter).remove)
            stack.callback(layer.register_forward_hook(leave).remove)
        for source in sources:
            if hasattr(source, "eager_attention_forward"):
                wrapped = wrap_eager(source.eager_attention_forward)
                stack.enter_context(mock.patch.object(source, "eager_attention_forward", wrapped))
        stack.enter_context(mock.patch.object(torch.nn.functional, "scaled_dot_product_attention", sdpa))
        yield collected


def is_map(x) -> bool:
    """Whether something that a module returned is attention: [B,H,N,N], and no row sums to more than 1."""
    if not isinstance(x, Tensor) or x.ndim != 4 or x.shape[-1] != x.shape[-2] or x.shape[-1] < 2:
        return False
    return bool((x >= 0).all() and (x.sum(-1) < 1 + 1e-3).all())


def softmax_map(query: Tensor, key: Tensor, mask: Tensor | None, is_causal: bool, scale: float | None) -> Tensor:
    """The map that torch's scaled_dot_product_attention uses and does not return. [B,H,N,N]"""
    key = key.repeat_interleave(query.shape[1] // key.shape[1], 1)
    scores = (query @ key.mT) * (query.shape[-1] ** -0.5 if scale is None else scale)
    if is_causal:
        mask = torch.ones(scores.shape[-2:], dtype=torch.bool).tril()
    if mask is not None and mask.dtype == torch.bool:
        scores = scores.masked_fill(~mask, -torch.inf)
    elif mask is not None:
        scores = scores + mask
    return scores.softmax(-1)


class Run(NamedTuple):
    """A model's own forward passes over the rows, one row at a time, without padding."""

    logits: list[Tensor]  # a row: [n,V]
    maps: list[Collected]  # a row each


@torch.no_grad()
def run_rows(model: PreTrainedModel, batch: Batch) -> Run:
    """Run the model on each row by itself, and keep its logits and maps."""
    run = Run([], [])
    for ids, length in zip(batch.ids, batch.lengths):
        with collecting_maps(model) as collected:
            logits = model(input_ids=ids[None, :length], use_cache=False).logits
        run.logits.append(logits[0].float())
        run.maps.append(collected)
    return run


def eager_copy(model: PreTrainedModel) -> PreTrainedModel:
    """The same weights in a model that was built with the implementation "eager"."""
    config = copy.deepcopy(model.config)
    twin = type(model)._from_config(config, attn_implementation="eager").float().eval()
    twin.load_state_dict(model.state_dict())
    return twin


class Reference(NamedTuple):
    """The maps of some layers from one source, or why there are none."""

    maps: list[Tensor]  # of each layer [B,H,N,N], padded with 0; empty if missing says why
    missing: str = ""


def reference(rows: list[Maps], layers: list[int]) -> Reference:
    """The maps of these layers from those of each row."""
    stacked = []
    for layer in layers:
        of_rows = [maps.get(layer, []) for maps in rows]
        if not all(of_rows):
            return Reference([], f"layer {layer} shows no map")
        if any(len(maps) > 1 for maps in of_rows):
            return Reference([], f"layer {layer} attends {len(of_rows[0])} times")
        whole = torch.zeros(len(rows), of_rows[0][0].shape[1], N, N)
        for b, (one,) in enumerate(of_rows):
            whole[b, :, : one.shape[2], : one.shape[3]] = one[0]
        stacked.append(whole)
    return Reference(stacked)


@torch.no_grad()
def find_leak(model: PreTrainedModel, batch: Batch, own: Run) -> float:
    """How much the logits of earlier tokens change when the last token of the first row changes. 0 if causal."""
    ids = batch.ids[:1, : batch.lengths[0]].clone()
    ids[0, -1] = 4 if ids[0, -1] != 4 else 5
    changed = model(input_ids=ids, use_cache=False).logits[0].float()
    return (changed - own.logits[0])[:-1].abs().max().item()


# ---- 2. The verdict ----


class Verdict(NamedTuple):
    """What became of one kind."""

    kind: str
    model_class: str
    word: str  # exact, refused, WRONG, crash, not built
    note: str


Differences = dict[str, float]  # by quantity, the largest difference from a reference


def compare_logprobs(got: metrics.Signals, logits: list[Tensor], batch: Batch) -> Differences:
    """Log-probs and entropy against the model's own logits."""
    differences = {"log-probs": 0.0, "entropy": 0.0}
    for b, row in enumerate(logits):
        logp = row.log_softmax(-1)  # [n,V]; the logits at t - 1 predict token t
        response = batch.mask[b].nonzero()[:, 0]
        logprobs = logp[response - 1].gather(1, batch.ids[b, response, None])[:, 0]
        entropy = -(logp.exp() * logp).sum(-1)[response - 1]
        for name, ours, theirs in (("log-probs", got.logprobs, logprobs), ("entropy", got.entropy, entropy)):
            differences[name] = max(differences[name], largest(ours[b, response] - theirs))
    outside = torch.where(batch.mask, 0.0, got.logprobs.abs() + got.entropy.abs() + got.waad.abs() + got.fai.abs())
    return differences | {"outside the mask": largest(outside)}


def compare_signals(by_horizon: dict, maps: list[Tensor], mask: Tensor) -> Differences:
    """Spans, WAAD and FAI against their definitions on full maps. by_horizon: what observe returned for each."""
    got = by_horizon[HORIZONS[0]]
    spans = torch.stack([heads.head_spans(m, mask) for m in maps])
    if spans.shape != got.heads.spans.shape:
        return {f"shape of spans {tuple(got.heads.spans.shape)}, not {tuple(spans.shape)}": torch.inf}
    local_map, global_map = (
        torch.cat([m[:, chosen] for m, chosen in zip(maps, group)], 1).mean(1)
        for group in (got.heads.is_local, got.heads.is_global)
    )
    differences = {
        "span": largest((got.heads.spans - spans) / spans.abs().clamp(min=1)),
        "WAAD": largest(got.waad - metrics.waad(local_map, mask)),
    }
    for horizon, signals in by_horizon.items():
        difference = largest(signals.fai - metrics.fai(global_map, mask, horizon))
        differences["FAI"] = max(differences.get("FAI", 0.0), difference)
    return differences


def largest(x: Tensor) -> float:
    """The largest absolute value; infinity if one is not a number."""
    return torch.inf if x.isnan().any() else x.abs().max().item()


def beyond(by_source: dict[str, Differences]) -> list[str]:
    """Each quantity that differs by more than the tolerance: by how much at most, and from which sources."""
    worst, sources = {}, {}
    for source, differences in by_source.items():
        for name, value in differences.items():
            if not value <= TOLERANCE:
                worst[name] = max(worst.get(name, 0.0), value)
                sources.setdefault(name, []).append(source)
    return [f"{name} off by {value:.2g} ({', '.join(sources[name])})" for name, value in worst.items()]


def judge(model: PreTrainedModel, batch: Batch, own: Run) -> tuple[str, str]:
    """Call observe and compare. Returns the word of the verdict and its note."""
    implementation = model.config._attn_implementation
    try:
        first = metrics.observe(model, batch.ids, batch.mask, horizon=HORIZONS[0])
        by_horizon = {HORIZONS[0]: first}
        for horizon in HORIZONS[1:]:
            by_horizon[horizon] = metrics.observe(model, batch.ids, batch.mask, first.heads, horizon=horizon)
    except TimeoutError:
        raise
    except Exception as e:  # what observe raises is the verdict
        return ("refused", one_line(e)) if is_refusal(e) else ("crash", f"{type(e).__name__}: {one_line(e)}")

    # 1. The model's own logits, and whether it is causal at all.
    wrong = beyond({"own logits": compare_logprobs(first, own.logits, batch)})
    leak = find_leak(model, batch, own)
    if leak > TOLERANCE:
        wrong.append(f"not causal: a change of the last token changes earlier logits by {leak:.2g}")
    if model.config._attn_implementation != implementation:
        wrong.append(f"observe leaves the implementation {model.config._attn_implementation}")

    # 2. The maps. One comparison for each source that shows the maps of these layers.
    references, notes = find_references(model, batch, own, first.heads.layers)
    wrong += beyond({source: compare_signals(by_horizon, maps, batch.mask) for source, maps in references.items()})
    if not references:
        wrong.append("no reference for the maps")
    elif all(is_even(m) for maps in references.values() for m in maps):
        notes.append("attention is almost even")
    layers = f"layers {', '.join(map(str, first.heads.layers))}: {', '.join(references)}"
    return ("WRONG" if wrong else "exact"), "; ".join([*wrong, layers, *notes])


def find_references(
    model: PreTrainedModel, batch: Batch, own: Run, layers: list[int]
) -> tuple[dict[str, list[Tensor]], list[str]]:
    """The maps of these layers by source, and notes on sources that cannot be used."""
    implementation = model.config._attn_implementation
    found, notes = {}, []
    if any(maps.sdpa for maps in own.maps):
        found["sdpa"] = reference([maps.sdpa for maps in own.maps], layers)

    # Eager maps say nothing if the eager model computes something else than the model as it is used.
    try:
        eager = own if implementation == "eager" else run_rows(eager_copy(model), batch)
    except Exception as e:  # some classes have no eager attention; the note says so
        notes.append(f"no eager model: {type(e).__name__}: {one_line(e)}")
    else:
        apart = max(largest(a - b) for a, b in zip(eager.logits, own.logits))
        if apart > TOLERANCE:
            notes.append(f"eager is no reference: its logits differ from those of {implementation} by {apart:.2g}")
        else:
            found["eager"] = reference([maps.eager for maps in eager.maps], layers)
            found["returned"] = reference([maps.returned for maps in eager.maps], layers)

    # Granite with sinks returns maps without the sinks: what a layer returns need not be what it multiplies with.
    if found.get("eager", Reference([])).maps and found["returned"].maps:
        apart = max(largest(a - b) for a, b in zip(found["eager"].maps, found["returned"].maps))
        if apart > TOLERANCE:
            notes.append(f"the layers return other maps than those that make their output: {apart:.2g} apart")
            del found["returned"]

    notes += [f"{source}: {maps.missing}" for source, maps in found.items() if maps.missing and source == "sdpa"]
    return {source: maps.maps for source, maps in found.items() if maps.maps}, notes


def is_even(maps: Tensor) -> bool:
    """Whether the maps [B,H,N,N] of a layer have no peaks, so that a comparison with them says little."""
    return bool(maps[0, :, N // 2 : sum(ROWS[0])].amax(-1).median() < 0.1)


def is_refusal(error: Exception) -> bool:
    """Whether an error was raised on purpose: a ValueError by a `raise` of ours, not by something that failed."""
    place = traceback.extract_tb(error.__traceback__)[-1]
    return isinstance(error, ValueError) and Path(place.filename).parent == ROOT and place.line.startswith("raise")


def one_line(error: Exception) -> str:
    """The first line of an error's message, without what would break a table."""
    lines = str(error).strip().splitlines() or ["no message"]
    return lines[0].replace("|", "/")


@contextlib.contextmanager
def time_limit(seconds: int) -> Iterator[None]:
    """Raise TimeoutError in the block after so many seconds. 0: no limit."""

    def stop(number, frame):
        raise TimeoutError(f"took more than {seconds} s")

    before = signal.signal(signal.SIGALRM, stop)
    signal.alarm(seconds)
    try:
        yield
    finally:
        signal.alarm(0)
        signal.signal(signal.SIGALRM, before)


def try_kind(name: str, build_model: Callable[[], PreTrainedModel], seconds: int = 60) -> Verdict:
    """Build the model of a kind and say whether observe is right about it."""
    model_class = ""
    try:
        with time_limit(seconds):
            try:
                model = build_model()
                model_class = type(model).__name__
                batch = make_batch(model.config.get_text_config(decoder=True).vocab_size)
                own = run_rows(model, batch)
            except TimeoutError:
                raise
            except Exception as e:  # transformers' own failure is no verdict on observe
                return Verdict(name, model_class, "not built", f"{type(e).__name__}: {one_line(e)}")
            if not all(row.isfinite().all() for row in own.logits):
                return Verdict(name, model_class, "not built", "its logits are not finite")
            return Verdict(name, model_class, *judge(model, batch, own))
    except TimeoutError as e:
        return Verdict(name, model_class, "crash", str(e))


# ---- 3. The report ----

WORDS = ("exact", "refused", "WRONG", "crash", "not built")


def report(verdicts: list[Verdict], command: str, seconds: float) -> str:
    """The verdicts as a page: counts, causes of refusals, and a table with a row for each kind."""
    counts = Counter(verdict.word for verdict in verdicts)
    summary = [["verdict", "kinds"], *([word, str(counts[word])] for word in WORDS)]
    causes = Counter(cause(verdict) for verdict in verdicts if verdict.word == "refused")
    refusals = [["kinds", "refused because"], *([str(count), text] for text, count in causes.most_common())]
    head = ["kind", "class", "verdict", "note"]
    failures = [list(verdict) for verdict in verdicts if verdict.word in ("WRONG", "crash")]
    return "\n\n".join(
        [
            "# observe on every causal language model of transformers",
            f"`{command}`, {len(verdicts)} kinds in {minutes(seconds)}; transformers {transformers.__version__}, "
            f"torch {torch.__version__}.\ntests/families/models.py says what is compared, and what the verdicts mean.",
            markdown(summary),
            "## Why kinds are refused",
            markdown(refusals),
            "## Kinds that are WRONG or crash",
            markdown([head, *failures]) if failures else "None.",
            "## All kinds",
            markdown([head, *map(list, verdicts)]),
            "",
        ]
    )


def cause(verdict: Verdict) -> str:
    """A refusal's message without names of classes and without numbers, to count equal ones.

    >>> cause(Verdict("x", "XForCausalLM", "refused", "layer 2 (XAttention) of XForCausalLM differs by 0.5"))
    'layer … of the model differs by …'
    """
    text = verdict.note.replace(verdict.model_class, "the model")
    text = re.sub(r" \(\w+Attention\)", "", text)
    return re.sub(r"\[[-\d, ]*\]|-?\b\d+(\.\d+)?(e-\d+)?\b", "…", text)


def main(args: Args) -> None:
    logging.disable(logging.WARNING)
    warnings.simplefilter("ignore")
    torch.set_num_threads(1)
    chosen = {
        name: build_model
        for name, build_model in kinds().items()
        if not args.only or any(word in name for word in args.only)
    }
    if not chosen:
        sys.exit(f"error: --only {' '.join(args.only)}: no kind has such a name. tests/families/kinds.py lists them")
    started, verdicts = time.perf_counter(), []
    with tqdm(chosen.items(), unit="kind") as bar:
        for name, build_model in bar:
            bar.set_postfix_str(name)
            verdicts.append(try_kind(name, build_model, args.seconds))
            gc.collect()
    command = " ".join(["python -m tests.families.models", *sys.argv[1:]])
    text = report(verdicts, command, time.perf_counter() - started)
    Path(args.out).parent.mkdir(parents=True, exist_ok=True)
    write_whole(Path(args.out), text)
    counts = Counter(verdict.word for verdict in verdicts)
    print(", ".join(f"{counts[word]} {word}" for word in WORDS), f"-> {args.out}")
    sys.exit(1 if counts["WRONG"] or counts["crash"] else 0)


if __name__ == "__main__":
    main(parse_args(Args))
