"""What lab.step found, in words, as text for the terminal, as a page (step_page.html is its form), and as a picture."""

import json
from html import escape
from pathlib import Path

TEMPLATE = Path(__file__).with_name("step_page.html")


def credit_rule(found: dict, t: int) -> str:
    """Why coupled rhythm gives token t its gamma, in words, with the numbers that decide."""
    tokens, s, x = found["tokens"], found["settings"], found["tokens"][t]
    bonus = s["gamma_amp"] - 1
    share = s["alpha"] * bonus
    waad, delta = f"WAAD {x['waad']:.2f}", f"Δ {tokens[x['intro']]['delta']:.2f}"
    if t + s["horizon"][0] >= len(tokens):
        said = f"no anchor: no token of the response lies {s['horizon'][0]} or more after it, so its FAI is 0"
    elif not x["t_glob"]:
        said = f"no anchor: its FAI {x['fai']:.4f} is not among the {sum(o['t_glob'] for o in tokens)} highest"
    elif x["dominated"]:
        said = (
            f"anchor, but {waad} ≤ {found['tau_waad']:.2f}, and {delta} ≥ {found['tau_delta']:.2f} "
            f"at {named(tokens, x['intro'], t)}: gives {share:g} of its {bonus:g} to it, keeps {bonus - share:g}"
        )
    elif x["waad"] > found["tau_waad"]:
        said = f"anchor, not dominated, for {waad} > {found['tau_waad']:.2f}: keeps its {bonus:g}"
    else:
        said = (
            f"anchor, not dominated: {waad} ≤ {found['tau_waad']:.2f}, but no Δ ≥ {found['tau_delta']:.2f} "
            f"among the {s['k']} tokens before it: keeps its {bonus:g}"
        )
    if introduced := [i for i, o in enumerate(tokens) if o["intro"] == t]:
        once = ", once for all of them" if len(introduced) > 1 else ""
        said += f"; introduces {' and '.join(named(tokens, i, t) for i in introduced)}: gets {share:g}{once}"
    return f"{said}. γ = {x['coupled']:g}"


def named(tokens: list[dict], i: int, t: int) -> str:
    """Token i as seen from token t.

    >>> named([{"text": "7"}, {"text": "n"}], 0, 1)
    '“7” (token 1, one before)'
    """
    distance = {1: "one", 2: "two", 3: "three"}.get(abs(i - t), str(abs(i - t)))
    return f"“{tokens[i]['text']}” (token {i + 1}, {distance} {'before' if i < t else 'after'})"


def clip_rule(found: dict, t: int) -> str:
    """What clipping does to token t at the second gradient step, in words."""
    x, epsilon = found["tokens"][t], found["settings"]["epsilon"]
    low, high, rho = 1 - epsilon, 1 + epsilon, x["ratios"][1]
    if x["shaped"] == 0:
        return "Â is 0: there is no gradient to clip"
    sign = "positive" if x["shaped"] > 0 else "negative"
    if x["clipped"]:
        side = f"> {high:g}" if rho > 1 else f"< {low:g}"
        return f"Â·γ is {sign} and ρ {rho:.3f} {side}: step 2 pushes this token no further, its gradient is 0"
    if low <= rho <= high:
        return f"ρ {rho:.3f} lies from {low:g} to {high:g}: step 2 takes the whole gradient"
    return f"ρ {rho:.3f} is outside {low:g} to {high:g}, but Â·γ is {sign}: the gradient leads back and stays"


def sentences(found: dict) -> dict[str, str]:
    """What page and terminal say in words, by section; between ` is code."""
    s, tokens, identity, handed = found["settings"], found["tokens"], found["identity"], found["handed"]
    bonus, row, (low, high) = s["gamma_amp"] - 1, identity["token"], s["horizon"]
    mean, std = found["rewards_mean"], found["rewards_std"]
    advantages = {r["reward"]: r["advantage"] for r in found["responses"]}
    formula = f"mean = {mean:.4g}, std = {std:.4f}" + "".join(
        f"; r = {r:g}: Â = ({r:g} − {mean:.4g}) / {std:.4f} = {a:.4f}".replace("-", "−")
        for r, a in sorted(advantages.items())[::-1]
    )
    agrees = (
        f"WAAD and FAI of all tokens of this response agree with full maps to {identity['limit']:g}. WAAD differs by "
        f"at most {identity['waad_gap']:.1e}, FAI by at most {identity['fai_gap']:.1e}."
    )
    norms = ", ".join(f"{u['grad_norm']:.3f} at step {i}" for i, u in enumerate(found["updates"], 1))
    return {
        "formula": formula
        if len(advantages) > 1
        else "All rewards are equal: every Â is 0, the group teaches nothing.",
        "pass": "One pass over prompts and responses gives log π_old, and the entropy of the distribution that each "
        f"token was drawn from. Of layers {', '.join(map(str, found['layers']))} it keeps the queries {found['query']},"
        f" the keys {found['key']} and each row's log-sum-exp; no map. The sampler's log-probs differ from these by at "
        f"most {found['gap']:.1e}. `train.score`, `metrics.observe`",
        "split": "A head's span is the mean distance it looks back, over the response rows of the whole group. Of the "
        f"{len(found['heads'])} sampled heads the {s['head_quantile']:.0%} of lowest span are local, the "
        f"{s['head_quantile']:.0%} of highest span global. Below: layer.head and span. "
        "`metrics.measure_heads`, `heads.split_heads`",
        "band": "WAAD needs no map. A row sums to 1, so WAAD_t = W − Σ (W−i)·A[t,t−i] over i < W. Only these W = "
        f"{s['window']} entries of a row are computed, each exp(q·k·scale − log-sum-exp). Row of token {row + 1}, "
        f"“{tokens[row]['text']}”, mean over the local heads:",
        "row": f"Σ = {identity['sum']:.6f}; W − Σ = {identity['from_band']:.6f}; WAAD that trains: "
        f"{identity['waad']:.6f}; from the full map: {identity['from_map']:.6f}",
        "verdict": f"Check: {agrees}"
        if identity["agrees"]
        else f"DISAGREEMENT. It should be, but is not, so: {agrees}",
        "fai": "FAI is taken from the mean map of the global heads: the mean attention that token s gets from rows "
        f"s+{low} to s+{high} of the response. The last {low} tokens have no such row: their FAI is 0. "
        "`metrics.streamed_fai`",
        "rule": f"Δ_t = |WAAD_t − WAAD_{{t+1}}|. T_loc: the {s['q']:.0%} of tokens with the largest Δ, here "
        f"{sum(x['t_loc'] for x in tokens)}. T_glob, the anchors: the {s['q']:.0%} with the highest FAI, here "
        f"{sum(x['t_glob'] for x in tokens)}. Local gives γ = {s['gamma_amp']:g} to T_loc, global gives it to T_glob. "
        f"Coupled starts from T_glob: each anchor has a bonus of {bonus:g}. It is dominated if its WAAD ≤ τ_waad "
        f"and one of the {s['k']} tokens before it has Δ ≥ τ_Δ. Then it gives α = {s['alpha']:g} of its bonus, "
        f"{s['alpha'] * bonus:g}, to the one of these {s['k']} with the largest Δ, its intro. Bonuses add up, "
        "but an intro gets its share once, however many anchors it introduces. `credit.coupled_rhythm`",
        "clip": f"A token's objective is min(ρ·Âγ, clip(ρ, {1 - s['epsilon']:g}, {1 + s['epsilon']:g})·Âγ) with "
        "ρ = π / π_old. At step 1 every ρ is 1 and nothing is clipped. AdamW with learning rate "
        f"{s['lr']:g} moves the weights. Step 2, on the same group, meets other ρ. Where ρ has left the interval on "
        f"the side to which Âγ pushes, its gradient is 0 (✕): {sum(x['clipped'] for x in tokens)} of {len(tokens)} "
        f"tokens here, {found['clipped_in_group']} of {found['tokens_in_group']} in the group. `grpo.update`",
        "norms": f"Gradient norm: {norms}. A norm above 1 is cut to 1.",
        "handed": f"`actor_infer.reload` takes over {handed['tensors']} tensors with {handed['weights']:,} weights. "
        f"{handed['changed']:,} of them have changed, by at most {handed['farthest']:.1e}. On these responses the "
        f"sampler's log-probs were up to {handed['before']:.3f} from the trained model's; now {handed['after']:.3g}.",
    }


def aligned(rows: list[list]) -> str:
    """Cells in columns, right-aligned.

    >>> print(aligned([["a", "bc"], [10, 2]]))
     a  bc
    10   2
    """
    rows = [[str(cell) for cell in row] for row in rows]
    widths = [max(map(len, column)) for column in zip(*rows)]
    return "\n".join("  ".join(cell.rjust(w) for cell, w in zip(row, widths)) for row in rows)


def text(found: dict) -> str:
    """The page as text for the terminal."""
    says, responses, identity = found["says"], found["responses"], found["identity"]
    numbers = range(1, len(responses) + 1)
    heads = [(f"{h['layer']}.{h['head']}", f"{h['span']:.1f}", h["group"]) for h in found["heads"]]
    rows = [["", "token", "log π_old", "entropy", "WAAD", "Δ", "T_loc", "FAI", "T_glob", "intro", "local", "global",
             "coupled", "Âγ", "ρ 1", "ρ 2", "clipped", "ρ after"]]  # fmt: skip
    for t, x in enumerate(found["tokens"], 1):
        rows.append(
            [t, x["text"], *(f"{x[k]:.3f}" for k in ("old_logprob", "entropy", "waad", "delta")), "x" * x["t_loc"],
             f"{x['fai']:.5f}", "x" * x["t_glob"], x["intro"] + 1 if x["dominated"] else "",
             *(f"{x[k]:g}" for k in ("local", "global", "coupled")), f"{x['shaped']:.3f}",
             *(f"{r:.3f}" for r in x["ratios"][:2]), "x" * x["clipped"], f"{x['ratios'][2]:.3f}"]
        )  # fmt: skip
    losses = [[f"{v:.4f}" for v in (*(r["losses"][i] for r in responses), found["losses"][i])] for i in range(3)]
    band = [["i", *range(len(identity["band"]))], ["A[t,t−i]", *(f"{a:.4f}" for a in identity["band"])],
            ["W−i", *identity["weights"]], ["product", *(f"{a:.4f}" for a in identity["products"])]]  # fmt: skip
    five = [["token", "response", "Âγ", "before", "after step 1", "after step 2"]]
    for x in found["five"]:
        five.append([x["text"], x["response"] + 1, *(f"{v:.4f}" for v in (x["shaped"], *x["logprobs"]))])
    parts = [
        f"1  Sample: {len(responses)} responses to {found['prompt']}",
        "\n".join(f"{n} {'>' if n - 1 == found['followed'] else ' '} {r['text']}" for n, r in zip(numbers, responses)),
        "2  Verify\n" + aligned([["response", *numbers], ["r", *(f"{r['reward']:g}" for r in responses)]]),
        f"3  Advantages\n{says['formula']}",
        f"4  Forward pass\n{says['pass']}",
        f"5  Head spans, by layer.head\n{says['split']}\n{aligned(list(zip(*heads)))}",
        f"6  WAAD\n{says['band']}\n{aligned(band)}\n{says['row']}\n{says['verdict']}",
        f"7  FAI\n{says['fai']}",
        f"8  γ\n{says['rule']}\nτ_waad = {found['tau_waad']:.4f}, τ_Δ = {found['tau_delta']:.4f}. Token by token:",
        aligned(rows),
        "\n".join(f"{t} “{x['text']}”: {x['rule']}" for t, x in enumerate(found["tokens"], 1) if x["coupled"] > 1),
        f"9  Clipped objective\n{says['clip']}\nLoss of each response and their mean, at step 1, at step 2, after:",
        aligned([[*numbers, "mean"], *losses]) + f"\n{says['norms']}\n" + aligned(five),
        f"10  New weights to the sampler\n{says['handed']}",
    ]
    return "\n\n".join(parts).replace("`", "")


def page(found: dict) -> str:
    """The HTML page: the template with the numbers in it. They are JSON without <, > and &, so no text can end it."""
    numbers = json.dumps(rounded(found), separators=(",", ":"))
    for character in "<>&":
        numbers = numbers.replace(character, f"\\u{ord(character):04x}")
    return TEMPLATE.read_text().replace("{{numbers}}", numbers)


def rounded(x):
    """Floats to seven digits, all that float32 has, in whatever lists and dicts."""
    if isinstance(x, dict):
        return {k: rounded(v) for k, v in x.items()}
    if isinstance(x, list | tuple):
        return [rounded(v) for v in x]
    return float(f"{x:.7g}") if isinstance(x, float) else x


PICTURE_STYLE = """
.ground { fill: #ffffff; stroke: #d0d7de } text { fill: #1f2328; font: 17px ui-monospace, monospace }
.note { font: 14px system-ui, sans-serif }
.g125 { fill: #fde3b0 } .g150 { fill: #f9b948 } .g175 { fill: #f08a24 }
@media (prefers-color-scheme: dark) {
.ground { fill: #0d1117; stroke: #3d444d } text { fill: #e6edf3 }
.g125 { fill: #4d3510 } .g150 { fill: #8a5a0c } .g175 { fill: #b8500f } }
"""


def picture(found: dict) -> str:
    """The followed response as an SVG: prompt, then tokens on grounds coloured by gamma, and what the colours mean."""
    cell, line, margin, most = 11, 30, 24, 860  # pixels: a character, a line, the space around, the longest line
    drawn, x, y, width = [], margin, margin + 18, 0
    for token, gamma in [*((c, 1) for c in found["prompt"]), *((t["text"], t["coupled"]) for t in found["tokens"])]:
        if x + cell * len(token) > most:
            x, y = margin, y + line
        if gamma > 1:
            drawn.append(f'<rect class="g{round(100 * gamma)}" x="{x - 1}" y="{y - 19}" width="{cell * len(token)}" '
                         'height="26" rx="3"/>')  # fmt: skip
        drawn.append(f'<text x="{x}" y="{y}" textLength="{cell * len(token) - 2}">{escape(token)}</text>')
        x += cell * len(token)
        width = max(width, x)
        if "↵" in token:
            x, y = margin, y + line
    x, y = margin, y + line + 10
    for gamma, meaning in ((1.25, "shared bonus"), (1.5, "anchor"), (1.75, "anchor and intro"), (1, "the rest")):
        if gamma > 1:
            drawn.append(f'<rect class="g{round(100 * gamma)}" x="{x}" y="{y - 15}" width="20" height="20" rx="3"/>')
            x += 26
        drawn.append(f'<text class="note" x="{x}" y="{y}">γ = {gamma:g}: {meaning}</text>')
        x += 90 + 8 * len(meaning)
    width, height = max(width, x) + margin, y + margin
    return (
        f'<svg xmlns="http://www.w3.org/2000/svg" viewBox="0 0 {width} {height}" width="{width}" height="{height}">\n'
        f"<title>One response, its tokens coloured by γ of coupled rhythm</title><style>{PICTURE_STYLE}</style>\n"
        f'<rect class="ground" x="0.5" y="0.5" width="{width - 1}" height="{height - 1}" rx="8"/>\n'
        + "\n".join(drawn) + "\n</svg>\n"
    )  # fmt: skip
