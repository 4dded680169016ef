"""The figures of a run: curves over steps, memory by phase, and the spectrum of the update by matrix type."""

from __future__ import annotations

import math
from html import escape

import numpy as np

from trimtab import words
from trimtab.errors import ConfigError
from trimtab.report.plots import Axis, Level, Marks, Series, chart, histogram, loss_range, smooth
from trimtab.report.runfolder import FloatArray, Phase, RunFolder
from trimtab.report.spectrum import NEAR_ZERO, MatrixSpectrum, Spectrum

#: More matrix types than this are listed in the table only.
PANELS = 24
#: Logged steps from which on a running mean is drawn over the raw loss.
_SMOOTH_FROM = 150


def marks(run: RunFolder, *, named: bool = True, note: bool = False) -> list[Marks]:
    """The vertical lines that all curves over steps share; not `named` leaves them out of the legend."""
    switch = [] if run.switch is None else [run.switch]
    return [
        Marks(words.many(len(run.restarts), "restart") if named else "", run.restarts, "restart"),
        Marks("end of the warm start" if named else "", switch, "switch", "warm start ends" if note else ""),
    ]


def step_axis(run: RunFolder, whole: bool = False) -> Axis:
    """Steps from 0 to the last one logged, or to the end of the plan."""
    planned = run.total_steps or 0
    return Axis("completed steps", 0.0, float(max(1, run.last_step, planned if whole else 0)))


def loss_figure(run: RunFolder) -> str:
    """Training and validation loss: nats a token, or what a head's loss is in."""
    x, y = run.series("loss")
    checks = [record for record in run.evals if not record.get("final")]
    ends = [record for record in run.evals if record.get("final")]
    val_x, val_y = run.series("loss", checks)
    end_x, end_y = run.series("loss", ends)
    window = max(5, len(x) // 60) | 1
    curves = [Series("training", x, y, "train")]
    if len(x) >= _SMOOTH_FROM:
        breaks = [*run.restarts, *([] if run.switch is None else [run.switch])]
        curves = [
            Series("training, each logged step", x, y, "train", "faint", hover=False),
            Series(f"training, mean of {window} logged steps", x, smooth(x, y, window, breaks), "train"),
        ]
    low, high = loss_range([(x, y), (val_x, val_y), (end_x, end_y)])
    above = [float(value) for value in (*y.tolist(), *val_y.tolist()) if value > high]
    caption = "Training loss is the mean over a step's tokens. Validation is measured on held-out documents."
    if run.command == "finetune":
        caption = "Training loss is the mean over a step's scored tokens or examples; validation is of the first split."
    if above:
        caption += (
            f" {words.many(len(above), 'point')} above the axis, the highest {words.sig(max(above))}: "
            "the axis follows the run after its first twentieth."
        )
    ended = "what was kept, over all examples" if run.command == "finetune" else "validation of the merged model"
    return chart(
        "Loss",
        [
            *curves,
            Series("", val_x, val_y, "val", "faint", hover=False, legend=False),
            Series("validation", val_x, val_y, "val", "dots"),
            Series(ended, end_x, end_y, "final", "ring"),
        ],
        step_axis(run),
        Axis("loss" if run.command == "finetune" else "nats/token", low, high),
        marks=marks(run, note=True),
        height=360,
        caption=caption,
    )


def rate_figure(run: RunFolder) -> str:
    """The planned learning rate as a line, and what was logged as points on it."""
    x, y = run.series("lr")
    plan: list[Series] = []
    caption = "Each point is a logged step."
    if run.config is not None:
        try:
            plan_x, plan_y = _planned_rate(run)
        except ConfigError as problem:
            caption = f"The planned schedule could not be drawn: {problem}."
        else:
            optim, method = run.config.optim, run.config.method
            plan = [Series("planned", plan_x, plan_y, "plan")]
            early = optim.warm_start_lr
            other = f" ({words.tick(early)} in the warm start)" if early is not None and method.switch_step else ""
            caption = (
                f"The line is the plan: a multiplier between 0 and 1, times the peak rate of "
                f"{words.tick(optim.lr)}{other}. The points were logged."
            )
    high = max((float(one.max()) for one in (*(s.y for s in plan), y) if len(one)), default=1.0) or 1.0
    return chart(
        "Learning rate",
        [*plan, Series("logged", x, y, "train", "points" if len(x) <= 400 else "faint")],
        step_axis(run, whole=True),
        Axis("multiplier × peak rate", 0.0, high * 1.06),
        marks=marks(run),
        height=220,
        caption=caption,
    )


def _planned_rate(run: RunFolder) -> tuple[FloatArray, FloatArray]:
    """Completed steps 1..T and the rate of each, at enough of them to draw every corner exactly."""
    assert run.config is not None
    plan = run.config.multiplier()
    total, first, again = plan.total_steps, plan.warmup_steps, plan.rewarm_steps
    corners = {0, total - 1}
    for turn in (0, plan.warm_start_steps, *plan.restarts):
        corners |= {turn - 1, turn, turn + again - 1, turn + again, turn + first - 1, turn + first}
    steps = sorted({t for t in corners if 0 <= t < total} | set(np.linspace(0, total - 1, 600).astype(int).tolist()))
    optim, switch = run.config.optim, plan.warm_start_steps
    early = optim.lr if optim.warm_start_lr is None else optim.warm_start_lr
    rates = [plan(t) * (early if t < switch else optim.lr) for t in steps]
    return np.asarray(steps, dtype=np.float64) + 1.0, np.asarray(rates, dtype=np.float64)


def speed_figure(run: RunFolder) -> str:
    """Tokens a second, from zero, so that a slow stretch looks as slow as it was."""
    x, y = run.series("tokens_per_second")
    high = float(y.max()) * 1.1 if len(y) and y.max() > 0 else 1.0
    return chart(
        "Throughput",
        [Series("tokens/s", x, y, "train", legend=False)],
        step_axis(run),
        Axis("tokens/s", 0.0, high),
        marks=[*marks(run, named=False), Marks(words.many(len(run.resumes), "resume"), run.resumes, "resume")],
        height=200,
    )


def gradient_figure(run: RunFolder) -> str:
    """The gradient's norm before clipping, on a log axis."""
    x, y = run.series("grad_norm")
    x, y = x[y > 0], y[y > 0]
    low, high = (_round(float(y.min()), up=False), _round(float(y.max()), up=True)) if len(y) else (0.1, 10.0)
    clip = run.config.clip if run.config else None
    return chart(
        "Gradient norm",
        [Series("gradient norm", x, y, "train", legend=False)],
        step_axis(run),
        Axis("norm of the gradient, log", low, high, log=True),
        marks=marks(run, named=False),
        levels=[] if clip is None else [Level(f"clipped above {words.tick(clip)}", clip)],
        height=200,
    )


def _round(value: float, *, up: bool) -> float:
    """The next number 1, 2 or 5 x 10^n strictly above or below."""
    unit = 10.0 ** math.floor(math.log10(value))
    ladder = [unit * factor for factor in (0.5, 1, 2, 5, 10, 20)]
    return min(at for at in ladder if at > value * 1.001) if up else max(at for at in ladder if at < value * 0.999)


def memory_bars(phases: list[Phase]) -> str:
    """One stacked bar a phase; what lies in host memory is drawn last and paler."""
    keys = list(dict.fromkeys(key for phase in phases for key, size in phase.memory.items() if size))
    if not keys:
        return ""
    keys.sort(key=lambda key: key.endswith("_host"))
    widest = max(sum(phase.memory.values()) for phase in phases) or 1
    colour = {key: f"var(--m{index % 4 + 1})" for index, key in enumerate(keys)}
    legend = "".join(
        f'<span class="key"><i class="swatch" style="background:{colour[key]}"></i>{escape(memory_name(key))}</span>'
        for key in keys
    )
    rows = "".join(
        f'<div class="bar"><b>{escape(phase.name)}</b><div>'
        + "".join(
            f'<i style="width:{100 * phase.memory[key] / widest:.2f}%;background:{colour[key]}" '
            f'title="{escape(memory_name(key))}: {words.size(phase.memory[key])}"></i>'
            for key in keys
            if phase.memory.get(key, 0) > 0
        )
        + f"</div><em>{words.size(sum(phase.memory.values()))}</em></div>"
        for phase in phases
    )
    return f'<div class="bars"><h3>What training holds, by phase</h3><div class="legend">{legend}</div>{rows}</div>'


def memory_name(key: str) -> str:
    """`carry_host` in words."""
    base, host, _ = key.partition("_host")
    return base.replace("_", " ") + (" (host memory)" if host else "")


def spectrum_figures(spectrum: Spectrum) -> str:
    """One panel a matrix type: singular values by index, relative to the largest, every layer a line."""
    groups = list(spectrum.by_type().items())[:PANELS]
    smallest = min(
        (s / m.singular_values[0] for _, g in groups for m in g for s in m.singular_values if s > 0), default=1e-3
    )
    floor = 10.0 ** min(-3, max(-5, math.floor(math.log10(smallest))))
    return f'<div class="many">{"".join(_panel(spectrum, kind, group, floor) for kind, group in groups)}</div>'


def histograms(spectrum: Spectrum) -> str:
    """The authors' view: the density of singular values, the layers of one type thrown together."""
    panels = "".join(
        histogram(kind, np.concatenate([np.asarray(m.singular_values, dtype=np.float64) for m in group]))
        for kind, group in list(spectrum.by_type().items())[:PANELS]
    )
    return (
        "<details><summary>The same as densities</summary>"
        '<p class="fine">Density of the singular values of dW, the layers of one type together, in 50 bins from 0 to '
        f"the largest. The table above counts those below {NEAR_ZERO:g}.</p>"
        f'<div class="many">{panels}</div></details>'
    )


def _panel(spectrum: Spectrum, kind: str, group: list[MatrixSpectrum], floor: float) -> str:
    columns = max(15, min(120, 2400 // len(group)))
    relative = [
        np.asarray(m.singular_values, dtype=np.float64) / (m.singular_values[0] or 1.0)
        for m in group
        if m.singular_values
    ]
    longest = max((len(values) for values in relative), default=1)
    x = Axis("index of the singular value", 0.0, float(longest))
    lines = [
        Series("each matrix", _indices(values), values, "train", "faint", hover=False, legend=False)
        for values in relative
        if len(relative) > 1
    ]
    middle = np.asarray(
        [np.median([values[i] for values in relative if i < len(values)]) for i in range(longest if relative else 0)]
    )
    rows = [m.rank for m in group]
    ranks = f"rank {min(rows)}" if min(rows) == max(rows) else f"rank {min(rows)} to {max(rows)}"
    upright = []
    if spectrum.rank is not None and spectrum.rank <= longest:
        upright.append(Marks("r", [spectrum.rank], "switch", f"r = {spectrum.rank}"))
    bound = spectrum.bound
    if bound is not None and bound != spectrum.rank and bound <= longest:
        upright.append(Marks("(k + 1) r", [bound], "restart", f"(k + 1) r = {bound}"))
    return chart(
        f"{kind}: {ranks} of {longest}",
        [*lines, Series("median over layers" if len(group) > 1 else "singular value", _indices(middle), middle)],
        x,
        Axis("share of the largest, log", floor, 8.0, log=True),
        marks=upright,
        levels=[Level("", spectrum.threshold)],
        height=190,
        columns=columns,
        x_word="index",
        legend=False,
    )


def _indices(values: FloatArray) -> FloatArray:
    return np.arange(1, len(values) + 1, dtype=np.float64)
