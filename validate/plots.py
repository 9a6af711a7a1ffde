"""The report's plots, as SVG to put into HTML. Text stays text, in the page's own font."""

import io
from collections.abc import Iterator
from contextlib import contextmanager

import numpy as np
from matplotlib import rc_context
from matplotlib.axes import Axes
from matplotlib.figure import Figure

INK, FAINT, GRID = "#1f2933", "#7b8794", "#e4e7eb"
BLUE, ORANGE, RED = "#2563a8", "#d9822b", "#c0392b"
STYLE = {
    "svg.fonttype": "none",
    "text.parse_math": False,  # names come from files
    "font.family": "sans-serif",
    "font.size": 9,
    "axes.edgecolor": GRID,
    "axes.labelcolor": FAINT,
    "axes.spines.top": False,
    "axes.spines.right": False,
    "axes.grid": True,
    "axes.axisbelow": True,
    "grid.color": GRID,
    "grid.linewidth": 0.6,
    "xtick.color": FAINT,
    "ytick.color": FAINT,
    "text.color": INK,
}
POINTS = 300  # of a curve: each is the largest of its neighbourhood
EXACT = 1e-9  # where a difference of zero is drawn


def token_errors(comparison: dict) -> str | None:
    """The logits' error, token by token, one panel a scenario; every other step shaded."""
    shown = [scenario for scenario in comparison["scenarios"] if scenario["token_errors"]]
    if not shown:
        return None
    with rc_context(STYLE):
        figure = Figure(figsize=(11, 2.4))
        panels = figure.subplots(1, len(shown), sharey=True, squeeze=False)[0]
        figure.subplots_adjust(left=0.07, right=0.985, bottom=0.2, top=0.88, wspace=0.08)
        for panel, scenario in zip(panels, shown):
            _draw_errors(panel, scenario, comparison["tolerance"])
        _log_axis(panels[0], EXACT / 2, max(comparison["tolerance"] * 5, *(_worst(scenario) * 2 for scenario in shown)))
        panels[0].set_ylabel("error of the logits")
        return _svg(figure, "errors" + comparison["candidate"])


@contextmanager
def _panel() -> Iterator[tuple[Figure, Axes]]:
    """A figure of half the page's width with one panel."""
    with rc_context(STYLE):
        figure = Figure(figsize=(5.4, 2.6))
        panel = figure.subplots()
        figure.subplots_adjust(left=0.12, right=0.99, bottom=0.18, top=0.97)
        yield figure, panel


def _draw_errors(panel: Axes, scenario: dict, tolerance: float) -> None:
    edges = np.cumsum([0, *scenario["step_tokens"]])
    if len(edges) <= 40:
        for start, end in zip(edges[:-1:2], edges[1::2]):
            panel.axvspan(start - 0.5, end - 0.5, color=BLUE, alpha=0.05, linewidth=0)
    errors = np.array([np.nan if error is None else max(error, EXACT) for error in scenario["token_errors"]])
    panel.axhline(np.log10(tolerance), color=RED, linewidth=0.9, linestyle=(0, (4, 3)))
    positions, values = _peaks(errors)
    panel.plot(positions, np.log10(values), color=BLUE, linewidth=0.9, marker="o", markersize=2 if len(values) < 80 else 0)
    for position in np.flatnonzero(np.isnan(errors)):
        panel.axvline(position, color=RED, linewidth=1)
    panel.set_title(scenario["name"], fontsize=9, color=INK)
    panel.set_xlabel("token")


def token_divergence(readings: list[dict]) -> str:
    """KL divergence by position in the window."""
    with _panel() as (figure, panel):
        for reading, color in zip(readings, (BLUE, ORANGE)):
            values = np.array([np.nan if value is None else max(value, 1e-16) for value in reading["kl_by_position"]])
            positions, peaks = _peaks(values)
            panel.plot(positions, np.log10(peaks), color=color, linewidth=0.9, label=_name(reading))
        _log_axis(panel, *(10.0**limit for limit in panel.get_ylim()))
        panel.set_xlabel("position in the window")
        panel.set_ylabel("KL divergence, nats a token")
        panel.legend(frameon=False, fontsize=8)
        return _svg(figure, "divergence")


def latent_errors(pictures: dict) -> str:
    """How far the latents are apart after each step of denoising."""
    with rc_context(STYLE):
        figure = Figure(figsize=(5.4, 2.6))
        panel = figure.subplots()
        figure.subplots_adjust(left=0.14, right=0.99, bottom=0.18, top=0.97)
        values = np.log10(np.maximum(pictures["latent_errors"], 1e-9))
        panel.plot(1 + np.arange(len(values)), values, color=BLUE, linewidth=1, marker="o", markersize=2.5)
        low, high = panel.get_ylim()
        _log_axis(panel, 10.0 ** (low - 0.5), 10.0 ** (high + 0.5))
        panel.set_xlabel("denoising step")
        panel.set_ylabel("difference of latents, of their size")
        return _svg(figure, "latents")


def text_bits(readings: list[dict]) -> str:
    """Bits per token by position, smoothed: the reference as a broad line, the candidate as a thin one upon it."""
    with _panel() as (figure, panel):
        for reading, color in zip(readings, (BLUE, ORANGE)):
            styles = ({"color": color, "alpha": 0.25, "linewidth": 5}, {"color": color, "linewidth": 1})
            for (model, values), style in zip(reading["bits_by_position"].items(), styles):
                panel.plot(*_smooth(values), label=f"{model} ({reading['window']})", **style)
        panel.set_ylim(0)
        panel.set_xlabel("position in the window")
        panel.set_ylabel("bits a token")
        panel.legend(frameon=False, fontsize=8)
        return _svg(figure, "bits")


def quantisation_cost(cost: dict, quantised: dict) -> str:
    """How many tokens diverge by how much, and bytes with the perplexity that they buy, before and after quantising."""
    readings = {"before": cost["before"], "quantised": quantised}
    with rc_context(STYLE):
        figure = Figure(figsize=(11, 2.6))
        divergence, size = figure.subplots(1, 2, width_ratios=(3, 2))
        figure.subplots_adjust(left=0.06, right=0.985, bottom=0.18, top=0.97, wspace=0.5)
        for (name, reading), color in zip(readings.items(), (FAINT, BLUE)):
            values = np.array([np.nan if value is None else max(value, 1e-12) for value in reading["kl_percentiles"]])
            divergence.plot(np.log10(values), 100 - np.arange(len(values)), color=color, linewidth=1.2, label=name)
            if reading["mean_kl"]:
                divergence.axvline(np.log10(reading["mean_kl"]), color=color, linewidth=0.8, linestyle=(0, (2, 2)))
        powers = np.arange(-12, 2, 2)
        divergence.set_xticks(powers, [f"1e{power}" for power in powers])
        divergence.set_xlabel("KL divergence from float32, nats (dashed: its mean)")
        divergence.set_ylabel("% of tokens beyond")
        divergence.legend(frameon=False, fontsize=8)
        places, sizes = range(len(readings)), [cost["bytes"][name] / 1e6 for name in readings]
        size.barh(places, sizes, color=(GRID, BLUE), height=0.5)
        size.set_yticks(places, [f"{name}: perplexity {_perplexity(reading)}" for name, reading in readings.items()])
        size.invert_yaxis()
        size.grid(axis="y", visible=False)
        size.set_xlabel("MB of weights")
        return _svg(figure, "quantisation")


def _perplexity(reading: dict) -> str:
    *_, bits = reading["bits_by_position"].values()  # the reference's, then the candidate's
    return "not a number" if None in bits else f"{2 ** np.mean(bits):.3f}"


def _name(reading: dict) -> str:
    return f"{reading['name']} ({reading['window']})"


def _worst(scenario: dict) -> float:
    return max((error for error in scenario["token_errors"] if error is not None), default=0.0)


def _log_axis(panel: Axes, low: float, high: float) -> None:
    """Labels for values drawn as their logarithm: matplotlib's own logarithmic axes take seconds to draw."""
    low, high = np.log10(low), np.log10(high)
    powers = np.arange(np.ceil(low), np.floor(high) + 1, max(1, (high - low) // 5))
    panel.set_yticks(powers, [f"1e{power:.0f}" for power in powers])
    panel.set_ylim(low, high)


def _peaks(values: np.ndarray) -> tuple[np.ndarray, np.ndarray]:
    width = -(-len(values) // POINTS)
    padded = np.pad(values, (0, -len(values) % width), constant_values=-np.inf).reshape(-1, width)
    return np.arange(len(padded)) * width, padded.max(axis=1)


def _smooth(values: list[float | None]) -> tuple[np.ndarray, np.ndarray]:
    width = max(1, min(48, len(values) // 4))
    known = np.array([np.nan if value is None else value for value in values])
    return np.arange(len(known) - width + 1) + width // 2, np.convolve(known, np.ones(width) / width, "valid")


def _svg(figure: Figure, salt: str) -> str:
    buffer = io.StringIO()
    with rc_context({"svg.hashsalt": salt}):
        figure.savefig(buffer, format="svg", transparent=True, metadata=dict.fromkeys(("Date", "Creator", "Format", "Type")))
    svg = buffer.getvalue()
    return svg[svg.index("<svg") :]
