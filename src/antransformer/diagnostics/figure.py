"""Figure of a diagnosis; needs the extra ``plots``."""

from pathlib import Path
from typing import Any

from antransformer.diagnostics.diagnosis import MAPS, Diagnosis, Spread
from antransformer.figure_style import reference_line, save, style
from antransformer.reporting.figure import log_ticks


def diagnosis_figure(diagnosis: Diagnosis, title: str, path: Path) -> None:
    """Draw all measurements into ``path``; its extension selects the format.

    Raises:
        MissingExtraError: matplotlib is not installed.
    """
    layout: list[Any] = [["residual", "ratio", "rows"]]
    if diagnosis.factors:
        layout.append(["factors", "factors", "alpha" if diagnosis.alpha else "factors"])
    elif diagnosis.alpha:
        layout = [["residual", "ratio"], ["alpha", "rows"]]
    with style(extra="plots"):
        from matplotlib.figure import Figure

        figure = Figure(figsize=(4.4 * len(layout[0]), 3.4 * len(layout)), layout="constrained")
        panels = figure.subplot_mosaic(layout)
        _draw_residual(panels["residual"], diagnosis)
        _draw_ratio(panels["ratio"], diagnosis)
        _draw_rows(panels["rows"], diagnosis)
        if diagnosis.factors:
            _draw_factors(panels["factors"], diagnosis)
        if diagnosis.alpha:
            _draw_alpha(panels["alpha"], diagnosis)
        figure.suptitle(title)
        save(figure, path)


def _draw_residual(panel: Any, diagnosis: Diagnosis) -> None:
    labels = {"text": "text", "repeated": "one token repeated"}
    for kind, spreads in diagnosis.residual_norm.items():
        _draw_spreads(panel, range(len(spreads)), spreads, labels[kind])
    panel.set(ylabel="norm", title="norm of the residual stream")
    _block_axis(panel, "after block (0: embedding)", range(len(spreads)))
    _finish(panel)


def _draw_ratio(panel: Any, diagnosis: Diagnosis) -> None:
    reference_line(panel, 1)
    for name, spreads in diagnosis.norm_ratio.items():
        _draw_spreads(panel, range(1, len(spreads) + 1), spreads, name.replace("mlp", "MLP"))
    panel.set(ylabel="output norm / input norm", title="blocks and sublayers on text")
    _block_axis(panel, "block", range(1, len(spreads) + 1))
    _finish(panel)


def _draw_rows(panel: Any, diagnosis: Diagnosis) -> None:
    rows = diagnosis.row_norm
    panel.stairs(rows["counts"], rows["edges"], fill=True, alpha=0.6)
    if diagnosis.bound != "none":
        reference_line(panel, 1, "x", f"bound: {diagnosis.bound}")
        panel.legend(loc="upper left")
    panel.set(xlabel="norm", ylabel="number of weight vectors", title="norms of weight vectors")
    panel.set(yscale="log", ylim=(0.5, None))
    log_ticks(panel.yaxis)


def _draw_factors(panel: Any, diagnosis: Diagnosis) -> None:
    reference_line(panel, 1)
    for shift, (kind, label, marker) in enumerate((("random", "random inputs", "o"), ("text", "text", "s"))):
        points = [
            (position + 0.3 * shift - 0.15, 1 + layer.error)
            for position, kinds in enumerate(diagnosis.factors.values())
            for layer in kinds[kind]
        ]
        panel.scatter(*zip(*points, strict=True), s=22, marker=marker, alpha=0.6, label=label)
    panel.set_xticks(range(len(diagnosis.factors)), [MAPS[name] for name in diagnosis.factors], fontsize=8)
    panel.set(ylabel="factor in use / factor needed", title="constant factors, one point per layer")
    _finish(panel)


def _draw_alpha(panel: Any, diagnosis: Diagnosis) -> None:
    assert diagnosis.alpha is not None and diagnosis.alpha_start is not None
    reference_line(panel, diagnosis.alpha_start, label="at initialization")
    for name, values in zip(("attention", "MLP"), zip(*diagnosis.alpha, strict=True), strict=True):
        panel.plot(range(1, len(values) + 1), values, "o-", ms=4, label=name)
    panel.set(ylabel="mean alpha", title="step size alpha of the residuals")
    _block_axis(panel, "block", range(1, len(diagnosis.alpha) + 1))
    _finish(panel)


def _draw_spreads(panel: Any, x: range, spreads: list[Spread], label: str) -> None:
    """Draw means as a line with a band of one standard deviation."""
    means = [spread.mean for spread in spreads]
    line = panel.plot(x, means, "o-", ms=4, label=label)[0]
    # The band stays positive, since the axis may be logarithmic.
    low = [max(spread.mean - spread.std, spread.mean / 10) for spread in spreads]
    panel.fill_between(x, low, [spread.mean + spread.std for spread in spreads], alpha=0.2, color=line.get_color())


def _finish(panel: Any) -> None:
    """Add a legend; use a logarithmic y axis if values span more than a decade, else one that starts at 0."""
    low, high = panel.dataLim.intervaly
    if high > 10 * low > 0:
        panel.set_yscale("log")
        log_ticks(panel.yaxis)
    else:
        panel.set_ylim(min(0, low), 1.1 * high)
    panel.legend()


def _block_axis(panel: Any, label: str, blocks: range) -> None:
    panel.set(xlabel=label, xlim=(blocks[0] - 0.5, blocks[-1] + 0.5))
    panel.set_xticks(blocks[:: len(blocks) // 8 + 1])
