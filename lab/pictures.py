"""The evidence as pictures, tables and one page to read: what lab.analyze found, made visible."""

import base64
import html
from pathlib import Path

import matplotlib
import numpy as np
from matplotlib.colors import PowerNorm

from lab import linkage
from lab.stats import Estimate
from node.output import visible

matplotlib.use("Agg")
import matplotlib.pyplot as plt

# Table 2 of arXiv 2510.13554, random and observed, by our names; and its Table 1.
PAPER_LINKS = {
    "entropy at WAAD peaks": (0.2386, 0.3608),
    "receiver peaks that are FAI peaks": (0.2241, 0.6084),
    "FAI peaks at or after WAAD peaks": (0.3687, 0.5253),
}
PAPER_KEPT = {"kept at high": 0.534, "kept at low": 0.631, "less kept at high, share of problems": 0.8714}


def tables(found: dict) -> dict[str, list[list[str]]]:
    """Every table of the report by its title: rows of cells, the first row the heads."""

    def lift(line: dict) -> str:
        return Estimate(*line["lift"]).percent("+.0f")

    links = [["Table 2", "random", "observed", "lift", "p", "p shifted", "peaks", "lift, random weights", "the paper"]]
    for name, x in found["table 2"].items():
        random, observed = (Estimate(*x[which]).text(".3f") for which in ("random", "observed"))
        numbers = [f"{x['p']:.4f}", f"{x['p shifted']:.4f}", str(x["peaks"]), lift(found["floor"][name]), ""]
        if name in PAPER_LINKS:
            before, after = PAPER_LINKS[name]
            numbers[-1] = f"{before} → {after}, {100 * (after / before - 1):+.0f} %"
        links.append([name, random, observed, lift(x), *numbers])
    by = found["other ways"]
    ways = [["lift", *by], *([name, *(lift(lines[name]) for lines in by.values())] for name in linkage.LINKS)]

    table_1 = found.get("table 1", {})
    kept = [["Table 1", *table_1, "the paper"]]
    for name in next(iter(table_1.values()), ()):
        cells = [column.get(name) for column in table_1.values()]
        text = [Estimate(*c).text(".3f") if isinstance(c, list) else "" if c is None else f"{c:.4g}" for c in cells]
        kept.append([name, *text, str(PAPER_KEPT.get(name, ""))])

    parked = found["first token"]
    other = "span with that token" if found["args"]["drop_first"] else "span without that token"
    sink = [["mean over", "span", other, "left on the first token", "by norm", "overlap of the groups"]]
    for name in ("local heads", "global heads", "all heads"):
        overlap = parked.get(f"{name}, overlap")
        span, other_span, share, *taken = parked[name]
        text = "" if overlap is None else f"{overlap:.2f}"
        by_norm = [f"{100 * x:.0f} %" for x in taken] or [""]
        sink.append([name, f"{span:.1f}", f"{other_span:.1f}", f"{100 * share:.0f} %", *by_norm, text])

    return {
        "Linkage: do the peaks fall together?": links,
        "The same lifts by layers, by head split, and with FAI weighted by norm": ways,
        **({"Perturbation: what is kept after another token is forced": kept} if table_1 else {}),
        f"The first token: span and share correlate by {parked['correlation']:.2f} over heads": sink,
    }


def maps_figure(
    local_map: np.ndarray, global_map: np.ndarray, response: linkage.Response, tokens: list[str], path: Path
) -> None:
    """Fig. 2: the two mean maps [T,T] of one response, and under each what is read off it."""
    fig, axes = plt.subplots(
        3, 2, figsize=(13, 10), height_ratios=(6, 1, 1), sharex=True, layout="constrained", gridspec_kw={"hspace": 0.02}
    )
    t = np.arange(len(tokens))
    size = min(9.0, 560 / len(tokens))
    for column, grid, title, under in (
        (0, local_map, "local heads", (("WAAD", "tab:blue"), ("entropy", "tab:gray"))),
        (1, global_map, "global heads", (("FAI", "tab:red"), ("receiver FAI", "tab:purple"))),
    ):
        axes[0, column].imshow(np.ma.masked_equal(grid, 0), cmap="magma_r", norm=PowerNorm(0.4), aspect="auto")
        axes[0, column].set_title(f"mean map of the {title}: row looks back at column")
        axes[0, column].set_yticks(t, tokens, fontsize=size, family="monospace")
        for ax, (name, color) in zip(axes[1:, column], under):
            ax.bar(t, np.nan_to_num(response[name]), color=color, width=0.9)
            top = linkage.peaks(response[name]) == 1
            ax.plot(t[top], response[name][top], "kv", ms=3)
            ax.set_ylabel(name)
        axes[2, column].set_xticks(t, tokens, fontsize=size, family="monospace", rotation=90)
    fig.supxlabel("tokens of the response; marks are the peaks", fontsize=10)
    fig.savefig(path, dpi=110)
    plt.close(fig)


STYLE = """
:root { color-scheme: light dark; --w: #2563eb; --f: #dc2626; }
body { font: 16px/1.5 system-ui, sans-serif; max-width: 76rem; margin: 2rem auto; padding: 0 1rem; }
table { border-collapse: collapse; font-size: .85rem; display: block; overflow-x: auto; }
th, td { border: 1px solid #8886; padding: .2rem .5rem; text-align: left; }
img { max-width: 100%; background: white; }
.text { font: 1.05rem/1.9 ui-monospace, monospace; margin: .3rem 0 1rem; overflow-wrap: anywhere; }
.text span { position: relative; border-radius: 3px; padding: .1rem 0; cursor: default; white-space: pre-wrap; }
.text span { background: color-mix(in srgb, var(--w) calc(var(--x) * 75%), transparent); }
.FAI span { background: color-mix(in srgb, var(--f) calc(var(--x) * 75%), transparent); }
.text span:hover { outline: 2px solid; }
.text span:hover::after { content: attr(data-tip); position: absolute; left: 0; top: 1.9em; z-index: 1;
  padding: .4rem .6rem; font-size: .8rem;
  line-height: 1.35; white-space: pre; background: Canvas; color: CanvasText; border: 1px solid; }
small { opacity: .75; }
"""


def token_spans(tokens: list[str], shade: np.ndarray, tips: list[str]) -> str:
    """The tokens as HTML spans, shaded from 0 to 1, each with its tip; a line break where the text has one."""
    parts = []
    for token, x, tip in zip(tokens, np.clip(np.nan_to_num(shade), 0, 1), tips):
        text = html.escape(visible(token).replace("␣", " ") or "∅")
        parts.append(
            f'<span style="--x:{x:.2f}" data-tip="{html.escape(tip)}">{text}</span>' + "<br>" * ("\n" in token)
        )
    return "".join(parts)


def page(title: str, intro: str, by_title: dict[str, list[list[str]]], texts: list[dict], images: list[Path]) -> str:
    """The whole report as one HTML page that needs no other file: tables, pictures, and responses to hover over.

    texts: prompt, correct, tokens, tips, and shades, the series that the tokens are shown in, one below the other.
    """
    title, intro = html.escape(title), html.escape(intro)
    out = [
        "<!doctype html><html lang=en><meta charset=utf-8><meta name=viewport content='width=device-width'>",
        f"<title>{title}</title><style>{STYLE}</style><h1>{title}</h1><p>{intro}</p><h2>Responses</h2>",
        "<p>Shaded from the response's lowest value to its highest. Hover over a token for its numbers.</p>",
    ]
    for n, text in enumerate(texts, 1):
        verdict = "right" if text["correct"] else "wrong"
        prompt = html.escape(visible(text["prompt"]).replace("␣", " "))
        out.append(f"<h3>Response {n}, {verdict}</h3><div class=text>{prompt}</div>")
        for name, x in text["shades"].items():
            low, high = np.nanmin([*x, np.inf]), np.nanmax([*x, -np.inf])
            shade = (x - low) / (high - low) if high > low else np.zeros(len(x))
            out.append(f"<small>{name}</small><div class='text {name}'>")
            out.append(token_spans(text["tokens"], shade, text["tips"]) + "</div>")
    for name, rows in by_title.items():
        head, *body = ["".join(f"<td>{html.escape(c)}</td>" for c in row) for row in rows]
        out.append(f"<h2>{html.escape(name)}</h2><table><tr>{head.replace('td>', 'th>')}</tr>")
        out.append("".join(f"<tr>{row}</tr>" for row in body) + "</table>")
    for image in images:
        data = base64.b64encode(image.read_bytes()).decode()
        out.append(f"<p><img alt='{html.escape(image.stem)}' src='data:image/png;base64,{data}'></p>")
    return "\n".join(out)
