"""What examples/step.py computed, in words: as text for the terminal, as a page (form: step_page.html), as a picture.

`facts` is always the dict that step.describe returns. The sentences that both the page and the terminal show are
written here. The page's script writes the rule of each token in section 8, because a reader can change the settings
there.
"""

import json
import math
from html import escape
from pathlib import Path

TEMPLATE = Path(__file__).with_name("step_page.html")
GRADIENT_STEPS = ("at gradient step 1", "at gradient step 2", "after both")


# ---- sentences; what stands between ` is code ----


def sentences(facts: dict) -> dict:
    """What page and terminal say in words, by subject."""
    return {
        "what": say_what(facts),
        "task": say_task(facts["task"]),
        "formula": say_advantages(facts),
        "split": say_split(facts),
        "pass": say_pass(facts),
        **say_waad(facts),
        "fai": say_fai(facts),
        "jump": say_jump(facts),
        "clip": say_clip(facts),
        "lesson": say_lesson(facts),
        "norms": say_norms(facts),
        "handed": say_handover(facts),
        "departures": list_departures(facts),
    }


def say_what(facts: dict) -> str:
    return (
        f"{len(facts['responses'])} responses of {facts['model']} ({facts['handed']['weights']:,} weights) to one "
        f"problem of the task {facts['task']}, followed from the sampled text to the new weights. Response "
        f"{facts['followed'] + 1} is followed token by token."
    )


def say_task(task: str) -> str:
    if not task.startswith("countdown"):
        return ""
    said = "Countdown: combine the given numbers with + − × ÷ to reach the target. Each number is used exactly once."
    if task.startswith("countdown-tiny"):
        said += (
            " The prompt lists the numbers, then `>` and the target. The model writes attempts. After each attempt it "
            "writes its own judgement: `y` if the attempt reaches the target, `n` if not. Then it writes the answer."
        )
    return said


def say_advantages(facts: dict) -> str:
    mean, std = facts["rewards_mean"], facts["rewards_std"]
    advantage_of = {r["reward"]: r["advantage"] for r in facts["responses"]}
    if len(advantage_of) == 1:
        return "All rewards are equal, so every Â is 0: this group has no gradient."
    lines = [f"mean = {mean:.4g}, std = {std:.4f}"]
    for reward in sorted(advantage_of, reverse=True):
        lines.append(f"r = {reward:g}: Â = ({reward:g} − {mean:.4g}) / {std:.4f} = {advantage_of[reward]:.4f}")
    return "; ".join(lines).replace("-", "−")


def say_split(facts: dict) -> str:
    s, layers = facts["settings"], facts["layers"]
    return (
        f"Layers {', '.join(map(str, layers))} are sampled: {len(layers)} evenly spaced layers of the middle third of "
        "the model, the paper's choice. The span of a head is the mean distance that it looks back: the mean over the "
        "response tokens of all responses. The distance may reach into the prompt, so spans include the prompt. Of "
        f"the {len(facts['heads'])} sampled heads, the {s['head_quantile']:.0%} with the lowest span are the local "
        f"heads: they look near. The {s['head_quantile']:.0%} with the highest span are the global heads: they look "
        "far. The split is measured first, by a pass of its own. The scoring pass of section 5 then takes WAAD from "
        "the local heads and FAI from the global heads. `metrics.measure_heads`, `heads.split_heads`"
    )


def say_pass(facts: dict) -> str:
    return (
        "One pass over prompts and responses gives two numbers for each token: log π_old, the log-probability of the "
        "token, and the entropy of the distribution that it was drawn from. The same pass keeps what WAAD and FAI "
        f"need: of each sampled layer the queries {facts['query']}, the keys {facts['key']} and the log-sum-exp of "
        "each row. It keeps no attention map. Check: the sampler's log-probs differ from these by at most "
        f"{facts['gap']:.1e}. `train.score`, `metrics.observe`"
    )


def say_waad(facts: dict) -> dict[str, str]:
    """The example in section 6, and the check against full maps."""
    tokens, identity, window = facts["tokens"], facts["identity"], facts["settings"]["window"]
    t = identity["token"]
    why = (
        "This token is the example because it is the first dominated anchor of section 8."
        if tokens[t]["dominated"]
        else "This token is the example because no anchor of this response is dominated."
    )
    agreement = (
        f"WAAD and FAI of all tokens of this response agree with full maps to {identity['limit']:g}. WAAD differs by "
        f"at most {identity['waad_gap']:.1e}, FAI by at most {identity['fai_gap']:.1e}."
    )
    return {
        "band": "WAAD needs no map. A row of attention sums to 1, so WAAD_t = W − Σ (W−i)·A[t,t−i], where the sum runs "
        f"over the distances i < W. Only these W = {window} entries of a row are computed, each as "
        "exp(q·k·scale − log-sum-exp).",
        "example": f"Row of token {t + 1}, “{tokens[t]['text']}”, mean over the local heads. {why}",
        "row": f"Σ = {identity['sum']:.6f}; W − Σ = {identity['from_band']:.6f}; WAAD that trains: "
        f"{identity['waad']:.6f}; from the full map: {identity['from_map']:.6f}",
        "verdict": f"Check: {agreement}"
        if identity["agrees"]
        else f"DISAGREEMENT. This should be true, but it is not: {agreement}",
    }


def say_fai(facts: dict) -> str:
    low, high = facts["settings"]["horizon"]
    return (
        "FAI is taken from the mean map of the global heads. FAI of token s is the mean attention that s gets from the "
        f"response tokens s+{low} to s+{high}. The last {low} tokens have no token that far behind them, so their FAI "
        "is 0. `metrics.streamed_fai`"
    )


def say_jump(facts: dict) -> str:
    """An example of Δ: the token of T_loc before the largest rise of WAAD whose next token is not in T_loc."""
    tokens, s = facts["tokens"], facts["settings"]
    jumps = [t for t, x in enumerate(tokens[:-1]) if x["t_loc"] and not tokens[t + 1]["t_loc"]]
    if not jumps:
        return ""
    t = max(jumps, key=lambda t: tokens[t + 1]["waad"] - tokens[t]["waad"])
    here, after = tokens[t], tokens[t + 1]
    in_t_loc = [x for x in tokens if x["t_loc"]]
    low = sum(x["waad"] <= facts["tau_waad"] for x in in_t_loc)
    return (
        f"WAAD goes from {here['waad']:.2f} at “{here['text']}” (token {t + 1}) to {after['waad']:.2f} at "
        f"“{after['text']}” (token {t + 2}). So Δ of “{here['text']}” is {here['delta']:.2f}, and at the run's "
        f"settings “{here['text']}” is in T_loc and gets γ local = {s['gamma_amp']:g}, while “{after['text']}” gets 1. "
        f"A token of T_loc need not look far back itself: {low} of the {len(in_t_loc)} tokens of T_loc have a WAAD "
        "at or below the median."
    )


def say_clip(facts: dict) -> str:
    s, tokens = facts["settings"], facts["tokens"]
    low, high = 1 - s["epsilon"], 1 + s["epsilon"]
    return (
        f"The objective of a token is min(ρ·Âγ, clip(ρ, {low:g}, {high:g})·Âγ) with ρ = π / π_old. At gradient step 1 "
        f"every ρ is 1 and nothing is clipped. Then AdamW moves the weights, with learning rate {s['lr']:g}. Gradient "
        "step 2 uses the same responses, and their ρ are no longer 1. If the ρ of a token has left the interval on the "
        "side to which Âγ pushes, its gradient is 0 (✕). This holds for "
        f"{sum(x['clipped'] for x in tokens)} of {len(tokens)} tokens of this response, and for "
        f"{facts['clipped_in_group']} of {facts['tokens_in_group']} tokens of the group. `grpo.update`"
    )


def say_lesson(facts: dict) -> str:
    """How many of the credited tokens have a gradient that γ can multiply."""
    credited = [x for x in facts["tokens"] if x["coupled"] > 1]
    certain = [x for x in credited if x["certain"]]
    limit = facts["settings"]["certain"]
    if not certain:
        return f"None of the {len(credited)} tokens with γ > 1 has π_old > {limit:g}."
    return (
        f"γ acts only where the model has a choice. {len(certain)} of the {len(credited)} credited tokens (γ > 1) have "
        f"entropy near 0, at most {max(x['entropy'] for x in certain):.3f} nats: the model gave them a probability "
        f"π_old above {limit:g}. The gradient of log π with respect to the token's own logit is 1 − π_old, so it is "
        f"near 0 there, and γ multiplies almost nothing. γ matters at the other {len(credited) - len(certain)} tokens."
    )


def say_norms(facts: dict) -> str:
    norms = [f"{u['grad_norm']:.3f} at gradient step {i}" for i, u in enumerate(facts["updates"], 1)]
    return f"Gradient norm: {', '.join(norms)}. A norm above 1 is scaled down to 1."


def say_handover(facts: dict) -> str:
    handed = facts["handed"]
    return (
        f"The sampler gets {handed['tensors']} tensors with {handed['weights']:,} weights. In train.py that is "
        f"`VLLMActor.reload`. {handed['changed']:,} of the weights have changed, by at most {handed['farthest']:.1e}. "
        "Before, the "
        f"sampler's log-probs of these responses differed from the trained model's by up to {handed['before']:.3f}. "
        f"Now they differ by {handed['after']:.3g}."
    )


def list_departures(facts: dict) -> list[str]:
    """What a training step of train.py does differently."""
    s = facts["settings"]
    return [
        "Many groups. This page follows one group, so that a person can read it. train.py samples a group for each of "
        "many problems.",
        "vLLM samples. Here transformers samples, so that vLLM need not be installed.",
        "Each gradient step uses other responses. train.py splits the batch into minibatches and makes one gradient "
        "step on each. Here both gradient steps use the same group, so that the second one has ratios other than 1 "
        "and clipping can be seen.",
        f"The learning rate is reached over the first {s['warmup_steps']} training steps. Here it is full at once.",
        f"The head split is measured on {s['span_rows']} responses, once in {s['heads_every']} training steps. Here "
        "it is measured on the group.",
        "One scoring pass. Here a second pass keeps queries and keys, so that maps can be drawn.",
    ]


def clip_rule(facts: dict, t: int) -> str:
    """What clipping does to token t at gradient step 2, in words."""
    x, epsilon = facts["tokens"][t], facts["settings"]["epsilon"]
    low, high, rho = 1 - epsilon, 1 + epsilon, x["ratios"][1]
    if x["token_advantage"] == 0:
        return "Â is 0, so there is no gradient to clip."
    sign = "positive" if x["token_advantage"] > 0 else "negative"
    if x["clipped"]:
        side = f"> {high:g}" if rho > 1 else f"< {low:g}"
        return f"Â·γ is {sign} and ρ {rho:.3f} {side}: the gradient at gradient step 2 is 0. It pushes no further."
    if low <= rho <= high:
        said = f"ρ {rho:.3f} lies from {low:g} to {high:g}: gradient step 2 takes the whole gradient"
    else:
        said = f"ρ {rho:.3f} is outside {low:g} to {high:g}, but Â·γ is {sign}: the gradient leads back and is kept"
    if x["certain"]:
        said += f", but π_old is {math.exp(x['old_logprob']):.3f} here, so that gradient is almost 0"
    return said + "."


# ---- the terminal ----


def align(rows: list[list]) -> str:
    """Cells in columns, right-aligned.

    >>> print(align([["a", "bc"], [10, 2]]))
     a  bc
    10   2
    """
    rows = [[str(cell) for cell in row] for row in rows]
    widths = [max(map(len, column)) for column in zip(*rows)]
    return "\n".join("  ".join(cell.rjust(w) for cell, w in zip(row, widths)) for row in rows)


def text(facts: dict) -> str:
    """The page as text for the terminal. The rule of each token in words is on the page alone."""
    says, responses = facts["says"], facts["responses"]
    # The small tables.
    numbers = range(1, len(responses) + 1)
    sampled = [
        f"{n} {'>' if n - 1 == facts['followed'] else ' '} {response['text']}"
        for n, response in zip(numbers, responses)
    ]
    rewards = [["response", *numbers], ["r", *(f"{response['reward']:g}" for response in responses)]]
    heads = [(f"{h['layer']}.{h['head']}", f"{h['span']:.1f}", h["group"]) for h in facts["heads"]]
    # One part for each section of the page, with the same number.
    parts = [
        says["what"],
        f"1  Sample: {len(responses)} responses to {facts['prompt']}",
        "\n".join(sampled),
        f"2  Verify\n{align(rewards)}",
        f"3  Advantages\n{says['formula']}",
        f"4  Head spans, by layer.head\n{says['split']}\n{align(list(zip(*heads)))}",
        f"5  Forward pass\n{says['pass']}",
        f"6  WAAD, windowed average attention distance\n{says['band']}\n{says['example']}",
        f"{align(list_band(facts['identity']))}\n{says['row']}\n{says['verdict']}",
        f"7  FAI, future attention influence\n{says['fai']}",
        f"8  γ\n{says['jump']}\nτ_waad = {facts['tau_waad']:.4f}, τ_Δ = {facts['tau_delta']:.4f}. Token by token, "
        "where ρ1 and ρ2 are the ratios at gradient steps 1 and 2. The page explains the γ of each token in words.",
        align(list_tokens(facts["tokens"])),
        f"9  Clipped objective\n{says['clip']}\n{says['lesson']}\nLoss of each response and their mean:",
        f"{align(list_losses(facts))}\n{says['norms']}\nThe tokens of highest entropy in the group:",
        align(list_most_uncertain(facts["five"])),
        f"10  New weights to the sampler\n{says['handed']}",
        "What train.py does differently:\n" + "\n".join(f"- {line}" for line in says["departures"]),
    ]
    return "\n\n".join(parts).replace("`", "")


def list_band(identity: dict) -> list[list]:
    return [
        ["i", *range(len(identity["band"]))],
        ["A[t,t−i]", *(f"{a:.4f}" for a in identity["band"])],
        ["W−i", *identity["weights"]],
        ["product", *(f"{a:.4f}" for a in identity["products"])],
    ]


def list_tokens(tokens: list[dict]) -> list[list]:
    rows = [
        "- token logπ_old entropy WAAD Δ T_loc FAI T_glob intro local global coupled Âγ ρ1 ρ2 clipped ρ_after".split()
    ]
    for number, x in enumerate(tokens, 1):
        rows.append(
            [number, x["text"]]
            + [f"{x[name]:.3f}" for name in ("old_logprob", "entropy", "waad", "delta")]
            + ["x" * x["t_loc"], f"{x['fai']:.5f}", "x" * x["t_glob"], x["intro"] + 1 if x["dominated"] else ""]
            + [f"{x[name]:g}" for name in ("local", "global", "coupled")]
            + [f"{x['token_advantage']:.3f}"]
            + [f"{x['ratios'][0]:.3f}", f"{x['ratios'][1]:.3f}", "x" * x["clipped"], f"{x['ratios'][2]:.3f}"]
        )
    return rows


def list_losses(facts: dict) -> list[list]:
    responses = facts["responses"]
    rows = [["response", *range(1, len(responses) + 1), "mean"]]
    for i, when in enumerate(GRADIENT_STEPS):
        rows.append([when, *(f"{r['losses'][i]:.4f}" for r in responses), f"{facts['losses'][i]:.4f}"])
    return rows


def list_most_uncertain(tokens: list[dict]) -> list[list]:
    rows = [["token", "response", "entropy", "Âγ", "log-prob before", "after gradient step 1", "after gradient step 2"]]
    for x in tokens:
        values = (x["entropy"], x["token_advantage"], *x["logprobs"])
        rows.append([x["text"], x["response"] + 1, *(f"{value:.4f}" for value in values)])
    return rows


# ---- the page ----


def page(facts: dict) -> str:
    """The HTML page: the template with the numbers in it. They are JSON without <, > and &, so no text can end it."""
    numbers = json.dumps(round_floats(facts), separators=(",", ":"))
    for character in "<>&":
        numbers = numbers.replace(character, f"\\u{ord(character):04x}")
    return TEMPLATE.read_text().replace("{{numbers}}", numbers)


def round_floats(x):
    """Floats to nine digits, in whatever lists and dicts.

    Nine digits name a float32 exactly. The page's script needs that: it computes γ again, and a rounded WAAD could
    change which of two nearly equal jumps is the larger.

    >>> round_floats({"third": [1 / 3, 1]})
    {'third': [0.333333333, 1]}
    """
    if isinstance(x, dict):
        return {k: round_floats(v) for k, v in x.items()}
    if isinstance(x, list | tuple):
        return [round_floats(v) for v in x]
    return float(f"{x:.9g}") if isinstance(x, float) else x


# ---- the picture ----

PICTURE_STYLE = """
.ground { fill: #ffffff; stroke: #d0d7de } text { fill: #1f2328; font: 17px ui-monospace, monospace }
.note { font: 14px system-ui, sans-serif }
.g125 { fill: #fde3b0 } .g150 { fill: #f9b948 } .g175 { fill: #f08a24 }
@media (prefers-color-scheme: dark) {
.ground { fill: #0d1117; stroke: #3d444d } text { fill: #e6edf3 }
.g125 { fill: #4d3510 } .g150 { fill: #8a5a0c } .g175 { fill: #b8500f } }
"""
MEANINGS = {  # of γ with train.py's default settings
    1.25: "gives or receives a share",
    1.5: "anchor, or dominated anchor and intro (1.25 + 0.25)",
    1.75: "anchor and intro",
    1: "all other tokens",
}
CELL, LINE, MARGIN, LONGEST = 11, 30, 24, 860  # pixels: a character, a line, the space around, the longest line


def picture(facts: dict) -> str:
    """The followed response as an SVG: prompt, then tokens on grounds coloured by gamma, and what the colours mean."""
    drawn, width, bottom = draw_tokens(facts)
    legend, legend_width, bottom = draw_legend(bottom + LINE + 10)
    width, height = max(width, legend_width) + MARGIN, bottom
    return (
        f'<svg xmlns="http://www.w3.org/2000/svg" viewBox="0 0 {width} {height}" width="{width}" height="{height}">\n'
        f"<title>One response, its tokens coloured by γ of coupled rhythm</title><style>{PICTURE_STYLE}</style>\n"
        f'<rect class="ground" x="0.5" y="0.5" width="{width - 1}" height="{height - 1}" rx="8"/>\n'
        + "\n".join(drawn + legend)
        + "\n</svg>\n"
    )


def draw_tokens(facts: dict) -> tuple[list[str], int, int]:
    """The elements, their right end, and the base of the last line of text."""
    prompt = [(character, 1) for character in facts["prompt"]]
    response = [(x["text"], x["coupled"]) for x in facts["tokens"]]
    drawn, x, y, width = [], MARGIN, MARGIN + 18, 0
    for token, gamma in prompt + response:
        if x + CELL * len(token) > LONGEST:
            x, y = MARGIN, y + LINE
        if gamma > 1:
            drawn.append(
                f'<rect class="g{round(100 * gamma)}" x="{x - 1}" y="{y - 19}" width="{CELL * len(token)}" '
                'height="26" rx="3"/>'
            )
        drawn.append(f'<text x="{x}" y="{y}" textLength="{CELL * len(token) - 2}">{escape(token)}</text>')
        x += CELL * len(token)
        width = max(width, x)
        if "↵" in token:
            x, y = MARGIN, y + LINE
    return drawn, width, y


def draw_legend(y: int) -> tuple[list[str], int, int]:
    """One line for each value of γ, from y on. Returns the elements, their right end and their lower end."""
    drawn, width = [], 0
    for gamma, meaning in MEANINGS.items():
        note = f"γ = {gamma:g}: {meaning}"
        shade = f"g{round(100 * gamma)}" if gamma > 1 else "ground"
        drawn.append(f'<rect class="{shade}" x="{MARGIN}" y="{y - 15}" width="20" height="20" rx="3"/>')
        drawn.append(f'<text class="note" x="{MARGIN + 28}" y="{y}">{note}</text>')
        width = max(width, MARGIN + 28 + 8 * len(note))
        y += 25
    return drawn, width, y
