"""The whole paper in one file: GRPO with attention-guided credit (arXiv 2510.13554).

    python examples/minimal.py                     five to six minutes on two CPU cores
    python examples/minimal.py --credit uniform    plain GRPO, to compare

GRPO gives every token of a response the same advantage A. The paper gives some tokens more,
A * gamma_t. It chooses them by two numbers, which it reads from the model's attention:

    WAAD_t  windowed average attention distance: how far token t looks back
    FAI_s   future attention influence: how much later tokens look back at token s

The equations are computed as they are written, from full attention maps, and gamma in plain loops.
That is slow on purpose. The modules of this repository compute the same numbers without maps, for
large models. Two things train.py does otherwise: it splits the heads once in ten steps, on 32
responses, and here each minibatch has its own split; and it leaves out responses with advantage 0.

train_step puts the parts together. Shapes: B responses, b of them in a minibatch, N tokens each.
Row t of an attention map belongs to the position that reads token t, and WAAD_t is read from that
row. gamma_t multiplies the advantage of the same token t, as in the paper.
"""

import argparse
import math
import random
import statistics
import sys
import time
from pathlib import Path

import torch
from matplotlib.figure import Figure
from torch import Tensor
from transformers import AutoModelForCausalLM, AutoTokenizer, set_seed

sys.path.insert(0, str(Path(__file__).resolve().parents[1]))  # the root of the repository, for tasks
import tasks

# The tiny model has 12 layers of 4 heads, 1.4M parameters, and one token per character. Its task is
# Countdown: combine three numbers with + - * / to reach a target, each number exactly once.
MODEL, TASK = Path(__file__).resolve().parents[1] / "assets" / "tiny", "countdown-tiny"
PROBLEMS, G, MAX_NEW_TOKENS = 32, 8, 128  # a step samples G responses to each problem: B = 256
MINIBATCHES, LEARNING_RATE, EPSILON = 4, 2e-4, 0.2  # b = B / MINIBATCHES; EPSILON clips the ratio
TEST_PROBLEMS, TEST_SAMPLES = 512, 2  # held-out problems, and responses to each of them
W, H_LO, H_HI = 10, 10, 100  # in tokens: the window of WAAD; the nearest and farthest reader in FAI
Q, GAMMA_AMP, ALPHA, K = 0.4, 1.5, 0.5, 3  # the paper does not give alpha and k; these are ours


# ---- 1. Sample and verify ----
def sample(model, tokenizer, problems: list, n: int) -> tuple[Tensor, Tensor, Tensor, Tensor]:
    """Sample n responses to each of P problems. All responses begin in the same column:

        pad pad 3 7 5 > 3 8 <think>      5 * 7 = 3 5 ... <eos> pad pad
        [prompt, padded on the left]     [response, padded on the right]

    Returns ids [B,N] with B = P * n; real [B,N], false for padding; response [B,N], true for the
    response tokens R, the end token included; rewards [P,n], 1.0 for a right answer, else 0.0.
    """
    prompts = tokenizer([p.prompt for p in problems], padding=True, return_tensors="pt")
    # The model's own distribution: temperature 1, nothing cut off.
    options = dict(do_sample=True, temperature=1.0, top_p=1.0, top_k=0, max_new_tokens=MAX_NEW_TOKENS)
    ids = model.generate(**prompts, **options, num_return_sequences=n)  # [B,N]
    new = ids[:, prompts.input_ids.shape[1] :]  # [B,T]
    end_tokens = torch.tensor(model.generation_config.eos_token_id).flatten()  # a model may have two
    is_end = torch.isin(new, end_tokens).int()  # [B,T]
    is_response = is_end.cumsum(1) - is_end == 0  # [B,T]: no end token before this one
    is_prompt = prompts.attention_mask.bool().repeat_interleave(n, dim=0)  # [B,N-T]
    real = torch.cat([is_prompt, is_response], dim=1)  # [B,N]
    response = torch.cat([torch.zeros_like(is_prompt), is_response], dim=1)  # [B,N]
    texts = tokenizer.batch_decode(new, skip_special_tokens=True)
    rewards = [tasks.get(TASK).reward(problems[b // n], text) for b, text in enumerate(texts)]
    return ids, real, response, torch.tensor(rewards).view(-1, n)


# ---- 2. Advantages ----
def group_advantages(rewards: Tensor) -> Tensor:
    """Eq. 6: compare each response with the others to the same problem. [P,G] -> [P,G]"""
    centred = rewards - rewards.mean(1, keepdim=True)  # 0 in a group of equal rewards: it teaches nothing
    return centred / rewards.std(1, keepdim=True).clamp(min=1e-6)


# ---- 3. Attention ----
@torch.no_grad()
def attention_maps(model, ids: Tensor, real: Tensor) -> tuple[Tensor, Tensor]:
    """Maps of five layers in the middle third [b,heads,N,N]; log pi_old of each token [b,N].

    A[t,s] says how much token t looks back at token s. Each row A[t,:] sums to 1. (Prompts are padded
    on the left. That needs no position numbers here: Qwen3's attention sees only differences of them.)
    """
    out = model(input_ids=ids, attention_mask=real, output_attentions=True)
    first, last = len(out.attentions) // 3, 2 * len(out.attentions) // 3
    layers = [first + (i * (last - first) + 2) // 4 for i in range(5)]  # tiny model: 4, 5, 6, 7, 8
    return torch.cat([out.attentions[i] for i in layers], dim=1), token_logprobs(out.logits, ids)


def split_heads(maps: Tensor, response: Tensor) -> tuple[Tensor, Tensor]:
    """H_loc and H_glob: the numbers of the 30 % of heads with the smallest span, and with the largest."""
    t_minus_s = torch.arange(maps.shape[-1])[:, None] - torch.arange(maps.shape[-1])  # [N,N]
    distance = (maps * t_minus_s.clamp(min=0)).sum(-1)  # [b,heads,N]: of one row, in tokens
    spans = (distance * response[:, None]).sum(dim=(0, 2)) / response.sum()  # Eq. 7, [heads]
    size = max(1, int(0.3 * len(spans)))  # tiny model: 6 of its 5 * 4 heads
    order = spans.argsort(stable=True)  # [heads], the smallest span first
    return order[:size], order[-size:]


def waad_and_fai(maps: Tensor, response: Tensor, H_loc: Tensor, H_glob: Tensor) -> tuple[Tensor, Tensor]:
    """Eq. 8-10: WAAD and FAI of each token, 0 outside the response. [b,heads,N,N] -> [b,N], [b,N]"""
    A_loc, A_glob = maps[:, H_loc].mean(1), maps[:, H_glob].mean(1)  # Eq. 8, [b,N,N]
    t_minus_s = torch.arange(maps.shape[-1])[:, None] - torch.arange(maps.shape[-1])  # [N,N]
    waad = (A_loc * t_minus_s.clamp(0, W)).sum(-1)  # Eq. 9, [b,N]: sum over s of A[t,s] min(t-s, W)
    T = (t_minus_s >= H_LO) & (t_minus_s <= H_HI) & response[:, :, None]  # [b,N,N], true: t in T(s)
    fai = (A_glob * T).sum(1) / T.sum(1).clamp(min=1)  # Eq. 10, [b,N]: mean of A[t,s] over t in T(s)
    return waad * response, fai * response


# ---- 4. Credit ----
def top_q(x: list[float], q: float) -> set[int]:
    """TopQ(x, q): the places of the ceil(q * |R|) highest values; among equal ones the earliest."""
    highest_first = sorted(range(len(x)), key=lambda t: -x[t])  # sorted() keeps the order of ties
    return set(highest_first[: math.ceil(q * len(x) - 1e-6)])  # 1e-6: 0.07 * 100 is above 7


def assign_credit(rule: str, waad: list, fai: list, q=Q, gamma_amp=GAMMA_AMP, alpha=ALPHA, k=K) -> list[float]:
    """Eq. 14-19: gamma_t of one response. waad and fai hold one number for each token t in R."""
    R = range(len(waad))
    # Preplan tokens T_loc: the tokens before the largest jumps of WAAD. A jump from t to t+1, up or
    # down, is written at t. In the paper's picture a chunk of text ends there.
    delta = [abs(waad[t] - waad[t + 1]) for t in R[:-1]] + [0.0]  # Eq. 14
    T_loc = top_q(delta, q)
    # Anchors T_glob: later tokens look back at them most. FAI is 0 where no later token can look.
    T_glob = {t for t in top_q(fai, q) if fai[t] > 0}  # Eq. 16

    # Some anchors are locally dominated, the set D: WAAD is low at the anchor, and delta is large at
    # one of the k tokens before. The one with the largest delta, intro(t), introduced the anchor.
    # The paper gives neither threshold. Ours: "low" is at most the median (the mean of the middle two
    # if there are two: no WAAD lies between them); "large" is at least the smallest delta in T_loc.
    tau_waad = statistics.median(waad)
    tau_delta = min((delta[t] for t in T_loc), default=math.inf)
    D, intros = set(), set()
    for t in T_glob - {0}:  # nothing comes before token 0
        before = [t - j for j in range(1, k + 1) if t - j >= 0]  # the k tokens before t, the nearest first
        intro = max(before, key=lambda u: delta[u])  # among equal ones max() takes the first
        if waad[t] <= tau_waad and delta[intro] >= tau_delta:  # Eq. 18
            D.add(t)
            intros.add(intro)

    gamma = [1.0 for t in R]  # the rule "uniform" leaves it so: it is plain GRPO
    bonus = gamma_amp - 1
    for t in R:
        if rule == "local" and t in T_loc:  # Eq. 15: each preplan token gets the bonus
            gamma[t] += bonus
        if rule == "global" and t in T_glob:  # Eq. 17: each anchor gets the bonus
            gamma[t] += bonus
        if rule == "coupled":  # Eq. 19: its three terms add, so a token can reach 1.75
            if t in T_glob - D:  # an anchor that is not dominated gets the bonus
                gamma[t] += bonus
            if t in D:  # a dominated anchor keeps one part of it
                gamma[t] += (1 - alpha) * bonus
            if t in intros:  # and its intro gets the other part, once, even if it has two anchors
                gamma[t] += alpha * bonus
    return gamma


# ---- 5. Loss ----
def token_logprobs(logits: Tensor, ids: Tensor) -> Tensor:
    """log pi of each token, given those before it. [b,N,V] and [b,N] -> [b,N]"""
    logp = logits[:, :-1].log_softmax(-1)  # [b,N-1,V]; row t is the distribution of token t+1
    logp = logp.gather(-1, ids[:, 1:, None]).squeeze(-1)  # [b,N-1]
    return torch.nn.functional.pad(logp, (1, 0))  # [b,N]; token 0 has no distribution


def clipped_loss(logprobs: Tensor, old_logprobs: Tensor, shaped: Tensor, response: Tensor) -> Tensor:
    """Eq. 12-13, negated: a mean over tokens, then over responses. All [b,N]; shaped is A * gamma_t.

    The gradient makes a token more likely if its advantage is positive, less likely if it is negative.
    Clipping stops that: once rho is more than EPSILON away from 1 in that direction, the gradient is 0.
    """
    rho = (logprobs - old_logprobs).exp()  # Eq. 5, [b,N]: pi / pi_old of each token; 1 before the first update
    objective = torch.min(rho * shaped, rho.clamp(1 - EPSILON, 1 + EPSILON) * shaped)  # [b,N]
    return -((objective * response).sum(1) / response.sum(1)).mean()


# ---- One step: all of the above, in this order ----
def train_step(model, tokenizer, optimizer, problems: list, rule: str) -> tuple[float, float]:
    """Returns the mean reward of the sampled responses, and the mean gamma of their tokens."""
    ids, real, response, rewards = sample(model, tokenizer, problems, n=G)
    advantages = group_advantages(rewards).flatten()  # [B]

    # Score all minibatches before the first update: pi_old is the model that sampled the responses.
    # (Plain GRPO needs old_logprobs only.)
    gamma, minibatches = torch.ones(ids.shape), []  # [B,N]
    for rows in torch.randperm(len(ids)).chunk(MINIBATCHES):
        maps, old_logprobs = attention_maps(model, ids[rows], real[rows])
        H_loc, H_glob = split_heads(maps, response[rows])
        waad, fai = waad_and_fai(maps, response[rows], H_loc=H_loc, H_glob=H_glob)  # [b,N], [b,N]
        for b, row in enumerate(rows):
            R = response[row]  # [N]
            gamma[row, R] = torch.tensor(assign_credit(rule, waad[b, R].tolist(), fai[b, R].tolist()))
        minibatches.append((rows, old_logprobs))
    shaped = advantages[:, None] * gamma  # [B,N], A * gamma_t: this is all that the paper changes

    for rows, old_logprobs in minibatches:
        logits = model(input_ids=ids[rows], attention_mask=real[rows]).logits  # [b,N,V]
        logprobs = token_logprobs(logits, ids[rows])  # [b,N]
        loss = clipped_loss(logprobs, old_logprobs, shaped=shaped[rows], response=response[rows])
        loss.backward()
        torch.nn.utils.clip_grad_norm_(model.parameters(), 1.0)
        optimizer.step()
        optimizer.zero_grad()
    return rewards.mean().item(), gamma[response].mean().item()


def evaluate(model, tokenizer, problems: list) -> Tensor:
    """Each problem's share of right answers. [P]"""
    parts = [problems[i : i + 128] for i in range(0, len(problems), 128)]
    return torch.cat([sample(model, tokenizer, part, n=TEST_SAMPLES)[3].mean(1) for part in parts])


def main(arguments: list[str] | None = None) -> None:
    parser = argparse.ArgumentParser(description="A tiny model learns Countdown by GRPO with attention-guided credit.")
    rules = ["coupled", "local", "global", "uniform"]
    text = (
        "tokens that get more: preplan tokens (local); anchors (global); anchors and the tokens that introduce them "
        "(coupled, the default); none (uniform)"
    )
    parser.add_argument("--credit", choices=rules, default="coupled", help=text)
    parser.add_argument("--steps", type=int, default=12, help="training steps, about 20 s each (default: 12)")
    parser.add_argument("--seed", type=int, default=0, help="seed of the problems and the sampling (default: 0)")
    args = parser.parse_args(arguments)
    begin = time.time()
    set_seed(args.seed)
    # "eager" is the one attention implementation that returns its maps.
    model = AutoModelForCausalLM.from_pretrained(MODEL, dtype=torch.float32, attn_implementation="eager")
    tokenizer = AutoTokenizer.from_pretrained(MODEL, padding_side="left")
    optimizer = torch.optim.AdamW(model.parameters(), LEARNING_RATE, weight_decay=0.0)
    warmup = torch.optim.lr_scheduler.LinearLR(optimizer, start_factor=0.2, total_iters=4)
    train_set, test_set = tasks.load(TASK, "train"), tasks.load(TASK, "test", TEST_PROBLEMS)
    print(f"Measuring success on {TEST_PROBLEMS} held-out problems ...", flush=True)
    before = evaluate(model, tokenizer, test_set)  # [TEST_PROBLEMS]

    curve = []  # the mean reward of each step
    for step in range(1, args.steps + 1):
        problems = random.sample(train_set, PROBLEMS)
        reward, gamma = train_step(model, tokenizer, optimizer, problems=problems, rule=args.credit)
        warmup.step()
        curve.append(reward)
        seconds = time.time() - begin
        print(f"step {step}/{args.steps}  reward {reward:.1%}  mean gamma {gamma:.3f}  {seconds:.0f} s", flush=True)

    after = evaluate(model, tokenizer, test_set)  # [TEST_PROBLEMS]
    picture = Path("runs", f"minimal-{args.credit}-{args.seed}.png")
    picture.parent.mkdir(exist_ok=True)
    axes = Figure().subplots()
    axes.plot(range(1, args.steps + 1), curve, label="training problems")
    axes.plot([0, args.steps], [before.mean(), after.mean()], "o", label="held-out problems")
    axes.set(xlabel="step", ylabel="share of right answers", title=f"credit: {args.credit}")
    axes.legend()
    axes.figure.savefig(picture)
    gain = 100 * (after - before)  # [TEST_PROBLEMS], in points; the problems are independent draws
    interval = 1.96 * gain.std() / math.sqrt(len(gain))  # half-width of the 95 % interval
    print(
        f"{args.credit}: held-out success {before.mean():.1%} -> {after.mean():.1%}, a gain of {gain.mean():.1f} "
        f"± {interval:.1f} points (95 % interval) in {time.time() - begin:.0f} s. Learning curve: {picture}"
    )


if __name__ == "__main__":
    main()
