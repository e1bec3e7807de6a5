"""Figures of results.md and method.md, drawn from the numbers of their tables and from two diagnoses.

The figure of a comparison (comparison.svg) is not among them: it is in the report of ``compare``.

python docs/figures.py                               # figures of results.md
antransformer diagnose --checkpoint RUN --json FILE  # for both runs of method.md
python docs/figures.py ANGPT.json GPT+.json          # figures of method.md, in addition
"""

import json
import sys
from pathlib import Path

import numpy as np
from matplotlib.figure import Figure

from antransformer.diagnostics.diagnosis import MAPS
from antransformer.figure_style import INK, SERIES, new_figure, reference_line, style
from antransformer.reporting.figure import Chart, log_ticks
from antransformer.reporting.labels import style_of
from antransformer.scaling.fitting import FLOPS_PER_PARAMETER, power_law

FOLDER = Path(__file__).parent
WIDE = 6.4  # inches; 7 points are then still legible on a page

# Size, tokens, best rate and loss of the runs at a batch of 128 ("Scaling laws").
PARAMETERS, TOKENS = [164_483, 295_813, 590_851, 1_115_653], [328_192, 590_848, 1_114_112, 2_166_784]
LAWS = {
    "gpt+": ([2.3e-3, 1.9e-3, 1.05e-3, 5.9e-4], [2.078, 1.905, 1.778, 1.585]),
    "angpt": ([3.4e-3, 2.4e-3, 2.3e-3, 9.8e-4], [2.097, 1.927, 1.763, 1.611]),
}
# Degrees after the embedding and after the last block, with one rate and with rates ~ 1 / sqrt(width) ("Width").
WIDTHS = [64, 128, 256, 512]
ROTATION = {
    "angpt": (([32, 42, 51, 58], [55, 60, 62, 65]), ([41, 42, 42, 42], [59, 60, 58, 59])),
    "ngpt": (([19, 26, 36, 47], [40, 48, 54, 61]), ([26, 26, 26, 27], [45, 48, 48, 49])),
}
# Mean loss and standard deviation at three budgets ("Muon").
BUDGETS = [153_600, 307_200, 614_400]
MUON = {
    "gpt+": ([2.340, 2.082, 1.892], [0.013, 0.021, 0.013]),
    "angpt": ([2.366, 2.096, 1.779], [0.033, 0.037, 0.031]),
    "gpt+-muon": ([2.016, 1.749, 1.565], [0.011, 0.017, 0.016]),
    "angpt-muon": ([2.027, 1.768, 1.617], [0.003, 0.019, 0.024]),
}
# Losses of the seeds of GPT+ and of anGPT at each budget ("At the paper's smallest body").
WIDTH_256 = {
    "AdamW": {
        2_498_560: ([4.420, 4.438, 4.440], [4.553, 4.563, 4.555]),
        4_997_120: ([4.154, 4.145, 4.138], [4.217, 4.234, 4.172]),
        9_998_336: ([3.749, 3.853], [3.832, 3.932]),
        19_996_672: ([3.534], [3.561]),
    },
    "Muon": {
        2_498_560: ([4.332, 4.335, 4.334], [4.324, 4.310, 4.289]),
        4_997_120: ([3.888, 3.925, 3.878], [3.859, 3.860, 3.852]),
        9_998_336: ([3.622, 3.635, 3.632], [3.607, 3.601, 3.606]),
        19_996_672: ([3.441], [3.424]),
    },
}


def two_panels():
    """A figure of two axes that share nothing, unlike those of ``new_figure``."""
    figure = Figure(figsize=(WIDE, 3.1), layout="constrained")
    return figure, figure.subplots(1, 2)


def scaling():
    """Best learning rate over parameters and loss over compute, with the laws and their bands."""
    figure, panels = two_panels()
    compute = FLOPS_PER_PARAMETER * np.array(PARAMETERS) * np.array(TOKENS)
    for name, columns in LAWS.items():
        item = style_of(name)
        for axes, x, y in zip(panels, (np.array(PARAMETERS, float), compute), columns, strict=True):
            law, line = power_law(x, np.array(y)), np.geomspace(x[0] / 1.15, x[-1] * 1.15)
            axes.plot(x, y, item.marker, color=item.colour, label=item.label)
            axes.plot(line, law(line), color=item.colour, lw=1.3)
            axes.fill_between(line, *law.band(line), color=item.colour, alpha=0.13, lw=0)
    for axes, limits in zip(panels, ((4.5e-4, 6e-3), (1.5, 2.2)), strict=True):
        axes.set(xscale="log", yscale="log", ylim=limits)
        log_ticks(axes.yaxis)
        axes.minorticks_off()
    panels[0].set_xticks(PARAMETERS, ["0.16M", "0.30M", "0.59M", "1.12M"])
    panels[0].set(xlabel="parameters", ylabel="best learning rate")
    panels[1].set_xticks([1e12, 1e13], ["1e12", "1e13"])
    panels[1].set(xlabel="training compute (FLOPs)", ylabel="validation loss (nats per token)")
    figure.legend(*panels[0].get_legend_handles_labels(), loc="outside upper left", ncols=2)
    return figure


def rotation():
    """Angle of the residual stream over width."""
    figure, panels = new_figure(1, 2, height=3.1, width=WIDE)
    for axes, (name, rules) in zip(panels, ROTATION.items(), strict=True):
        item = style_of(name)
        for (outer, last), dash in zip(rules, ("--", "-"), strict=True):
            axes.plot(WIDTHS, outer, dash, marker=item.marker, color=item.colour, alpha=0.5)
            axes.plot(WIDTHS, last, dash, marker=item.marker, color=item.colour)
        axes.set(title=item.label, xlabel="width", xscale="log", ylim=(0, 70))
        axes.set_xticks(WIDTHS, WIDTHS)
        axes.minorticks_off()
    panels[0].set(ylabel="rotation after ten steps (degrees)")
    handles = [
        panels[0].plot([], [], dash, color=INK, alpha=shade, label=label)[0]
        for dash, shade, label in (
            ("--", 1, "one rate"),
            ("-", 1, "rate ~ 1 / sqrt(width)"),
            ("-", 0.5, "pale: after the embedding"),
        )
    ]
    figure.legend(handles=handles, loc="outside upper left", ncols=3)
    return figure


def muon():
    """Loss over tokens with AdamW and with Muon."""
    figure, axes = new_figure(height=3.3, width=WIDE)
    for name, (means, deviations) in MUON.items():
        item = style_of(name)
        axes.errorbar(BUDGETS, means, deviations, color=item.colour, marker=item.marker, label=item.label, capsize=2)
    axes.set(xscale="log", xlabel="tokens of the run", ylabel="validation loss (nats per token)")
    axes.set_xticks(BUDGETS, ["154K", "307K", "614K"])
    axes.minorticks_off()
    axes.legend(ncols=2)
    return figure


def width_256():
    """Loss over tokens with AdamW and with Muon, and the difference of the architectures for each seed."""
    figure, (losses, differences) = two_panels()
    reference_line(differences, 0)
    for (optimizer, runs), dash, colour, marker in zip(WIDTH_256.items(), ("--", "-"), SERIES[2:], "Dv", strict=True):
        for index, name in enumerate(("gpt+", "angpt")):
            item, means = style_of(name), [np.mean(pair[index]) for pair in runs.values()]
            label = f"{item.label}, {optimizer}"
            losses.plot(list(runs), means, dash, marker=item.marker, color=item.colour, label=label)
        gaps = {tokens: np.subtract(angpt, gpt_plus) for tokens, (gpt_plus, angpt) in runs.items()}
        for tokens, gap in gaps.items():
            differences.plot([tokens] * len(gap), gap, marker, color=colour, alpha=0.45, ms=3.5)
        means, label = [gap.mean() for gap in gaps.values()], f"{optimizer}: each seed, and mean"
        differences.plot(list(gaps), means, dash, color=colour, marker=marker, label=label)
    for axes in (losses, differences):
        axes.set(xscale="log", xlabel="tokens of the run")
        axes.set_xticks(list(WIDTH_256["Muon"]), ["2.5M", "5M", "10M", "20M"])
        axes.minorticks_off()
    losses.set(ylabel="validation loss (nats per token)")
    differences.set(ylabel="loss of anGPT minus GPT+'s")
    figure.legend(*losses.get_legend_handles_labels(), loc="outside upper left", ncols=2)
    figure.legend(*differences.get_legend_handles_labels(), loc="outside upper right")
    return figure


def norms(diagnoses):
    """Norms of the residual stream by block, and of the weight rows, of both architectures."""
    figure, (stream, rows) = two_panels()
    for diagnosis in diagnoses:
        item = style_of(diagnosis["architecture"])
        spreads = diagnosis["residual_norm"]["text"]
        means, stds = (np.array([spread[key] for spread in spreads]) for key in ("mean", "std"))
        stream.plot(means, marker=item.marker, color=item.colour, label=item.label)
        stream.fill_between(range(len(means)), means - stds, means + stds, color=item.colour, alpha=0.2, lw=0)
        counts, edges = (np.array(diagnosis["row_norm"][key]) for key in ("counts", "edges"))
        rows.stairs(counts, edges, fill=True, alpha=0.6, color=item.colour)
    stream.set(xlabel="after block (0: embedding)", ylabel="norm of the residual stream", yscale="log")
    rows.set(xlabel="norm of a weight row", ylabel="number of rows", yscale="log", ylim=(0.5, None))
    for axes in (stream, rows):
        log_ticks(axes.yaxis)
    figure.legend(*stream.get_legend_handles_labels(), loc="outside upper left", ncols=2)
    return figure


def factors(diagnosis):
    """Constant factors over the factors that the trained weights need, one point per layer."""
    figure, axes = new_figure(height=3.1, width=WIDE)
    reference_line(axes, 1)
    for shift, (kind, label, marker) in enumerate((("random", "random inputs", "o"), ("text", "text", "s"))):
        points = [
            (position + 0.3 * shift - 0.15, 1 + layer["error"])
            for position, kinds in enumerate(diagnosis["factors"].values())
            for layer in kinds[kind]
        ]
        axes.scatter(*zip(*points, strict=True), s=18, marker=marker, color=SERIES[shift], alpha=0.7, label=label, lw=0)
    axes.set_xticks(range(len(MAPS)), [MAPS[name] for name in diagnosis["factors"]], fontsize=7)
    axes.set(ylabel="factor in use / factor needed", ylim=(0, None))
    axes.grid(visible=False, axis="x")
    axes.legend()
    return figure


def write(name, figure):
    """Write an SVG that follows the light or dark setting of the browser, on paper of its own."""
    text = Chart(name, "", "", "", figure).svg()
    paper = '<rect width="100%" height="100%" rx="4" style="fill: var(--c2)"/>\n <g id="figure_1">'
    (FOLDER / f"{name}.svg").write_text(text.replace('<g id="figure_1">', paper, 1), encoding="utf-8")


def main(files):
    """Draw the figures; ``files`` are empty, or the diagnoses of anGPT and GPT+."""
    with style():
        drawn = {"scaling": scaling(), "rotation": rotation(), "muon": muon(), "width-256": width_256()}
        if files:
            angpt, gpt_plus = (json.loads(Path(file).read_text(encoding="utf-8")) for file in files)
            drawn |= {"norms": norms([gpt_plus, angpt]), "factors": factors(angpt)}
        for name, figure in drawn.items():
            write(name, figure)


if __name__ == "__main__":
    main(sys.argv[1:])
