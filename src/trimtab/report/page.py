"""`report.html`: one page that holds all of a run, needs nothing else, and says the same for the same run folder.

The page carries a content security policy that forbids it to fetch anything, and to run any script but its own.
All that comes from the run (names, config, error texts) is escaped.
"""

from __future__ import annotations

import base64
import hashlib
import math
import shlex
from collections.abc import Sequence
from html import escape
from pathlib import Path
from statistics import median
from typing import Any, NamedTuple
from urllib.parse import quote

from trimtab import words
from trimtab.errors import ReportError
from trimtab.report import figures, taskscores
from trimtab.report.assets import SCRIPT, STYLE
from trimtab.report.files import write_whole
from trimtab.report.runfolder import Record, RunFolder, number, read_run
from trimtab.report.spectrum import NEAR_ZERO, Spectrum, TypeSpectrum

#: Keys of the "run" event that are told elsewhere on the page.
_NOT_MACHINE = {"event", "step", "time"}


def write_report(run: Path) -> Path:
    """Write `report.html` into a run folder, finished or not, and return its path.

    Raises:
        ReportError: `run` is no run folder, or the page could not be written.
    """
    found = read_run(run)
    path = run / "report.html"
    write_whole(path, render(found), ReportError)
    return path


def render(run: RunFolder) -> str:
    """The page as text; the same for the same input."""
    spectrum = _with_hints(run)
    parts = [
        ("curves", "Curves", _curves(run)),
        ("memory", "Parameters and memory", _memory(run)),
        ("spectrum", "Spectrum of the update", _spectrum(run, spectrum)),
        ("config", "Config", _config(run)),
        ("repeat", "Repeat this run", _repeat(run)),
    ]
    links = "".join(f'<a href="#{key}">{escape(title)}</a>' for key, title, _ in parts)
    sections = "".join(f'<section id="{key}"><h2>{escape(title)}</h2>{body}</section>' for key, title, body in parts)
    notices = "".join(f'<p class="notice">{escape(notice)}</p>' for notice in run.notices)
    return document(
        run.name,
        f"{_subtitle(run)}<nav>{links}</nav>{notices}{_cards(run, spectrum)}",
        f'<section id="summary"><h2>What this run shows</h2>{says(summary(run, spectrum))}</section>{sections}',
    )


def document(title: str, header: str, body: str) -> str:
    """A whole page.

    Args:
        title: plain text.
        header: HTML below the title.
        body: HTML below that, in sections.
    """
    digest = base64.b64encode(hashlib.sha256(SCRIPT.encode()).digest()).decode()
    policy = f"default-src 'none'; style-src 'unsafe-inline'; script-src 'sha256-{digest}'; base-uri 'none'"
    return (
        '<!doctype html>\n<html lang="en"><head><meta charset="utf-8">'
        f'<meta http-equiv="Content-Security-Policy" content="{policy}">'
        '<meta name="viewport" content="width=device-width,initial-scale=1">'
        f"<title>{escape(title)} · Trimtab</title>\n<style>{STYLE}</style></head>\n<body><main>"
        f"<header><h1>{escape(title)}</h1>{header}</header>{body}"
        f"<footer>Written by Trimtab. This page is complete: it loads nothing from anywhere."
        f"</footer></main>\n<script>{SCRIPT}</script></body></html>\n"
    )


def says(lines: Sequence[str]) -> str:
    """Sentences as a list; plain text."""
    return f'<ul class="says">{"".join(f"<li>{escape(line)}</li>" for line in lines)}</ul>'


def summary(run: RunFolder, spectrum: Spectrum | None) -> list[str]:
    """What the run shows, in sentences that a reader needs no figure for."""
    lines = [_progress(run)]
    lines += _loss_sentence(run)
    if run.switch is not None:
        lines.append(f"The first {run.switch:,} steps trained every weight; then the base was frozen.")
    if run.restarts:
        where = ", ".join(f"{step:,}" for step in run.restarts[:8]) + (", …" if len(run.restarts) > 8 else "")
        steps, each = ("step", "it") if len(run.restarts) == 1 else ("steps", "each")
        lines.append(
            f"{words.many(len(run.restarts), 'restart')}, after {steps} {where}: {each} folded the adapter into the "
            "weights, drew a new one and reset its optimizer state."
        )
    if spectrum is not None and spectrum.matrices:
        lines.append(_rank_sentence(spectrum))
    held = [(phase, phase.on_device) for phase in run.phases if phase.memory]
    if len(held) > 1:
        most, least = max(held, key=lambda pair: pair[1]), min(held, key=lambda pair: pair[1])
        if most[1] > least[1]:
            lines.append(
                f"Device memory peaks in the phase “{most[0].name}” at {words.size(most[1])} of weights, gradients and "
                f"optimizer state; “{least[0].name}” holds {words.size(least[1])} "
                f"({100 * (1 - least[1] / most[1]):.0f} % less)."
            )
    return lines


def _progress(run: RunFolder) -> str:
    tokens, epoch = run.last("tokens"), run.last("epoch")
    seen = f", {words.short(tokens)} tokens" if tokens else ""
    seen += f" ({words.sig(epoch, 3)} epochs)" if tokens and epoch else ""
    total = run.total_steps
    if run.final is not None:
        return f"The run finished after {words.many(run.last_step, 'step')}{seen}."
    of = f" of {total:,}" if total else ""
    why = str(run.stop.get("reason", "")) if run.stop else ""
    return f"The run has not finished: it stands at step {run.last_step:,}{of}{seen}." + (
        f" It stopped: {why}." if why else ""
    )


def _loss_sentence(run: RunFolder) -> list[str]:
    tuned = run.command == "finetune"  # its last scores may be of an earlier step, over other examples
    x, y = run.series("loss", [record for record in run.evals if not (tuned and record.get("final"))])
    if not len(y):
        return ["No validation loss was measured yet."]
    end = run.evals[-1]
    merged = " of the merged model" if end.get("merged") and not tuned else ""
    unit = "" if tuned else " nats/token"
    if len(y) == 1:
        return [f"The validation loss{merged} is {words.sig(y[0])}{unit}."]
    verb = "fell" if y[-1] < y[0] else "rose" if y[-1] > y[0] else "stayed"
    began = f"{words.sig(y[0])} (step {x[0]:,.0f})"
    return [f"The validation loss{merged} {verb} from {began} to {words.sig(y[-1])}{unit}."]


def _rank_sentence(spectrum: Spectrum) -> str:
    ranks = [matrix.rank for matrix in spectrum.matrices]
    span = f"{min(ranks)}" if min(ranks) == max(ranks) else f"{min(ranks)} to {max(ranks)} (median {median(ranks):g})"
    text = f"The update of {words.many(len(ranks), 'matrix', 'matrices')} has rank {span}"
    r, bound = spectrum.rank, spectrum.bound
    if r is None or bound is None:
        return f"{text}, counting singular values above {spectrum.threshold:g} of the largest."
    if bound == r:
        return f"{text}, of at most {r}: one adapter, never restarted, cannot do more."
    text += f", of at most {bound} ({spectrum.restarts} restarts, r = {r} each)"
    beyond = sum(rank > r for rank in ranks)
    if max(ranks) > bound:
        return f"{text}. A rank above that bound cannot come from the adapters: look for rounding in the weights."
    if beyond == len(ranks):
        return f"{text}. Every one is above r, the most that plain LoRA could reach."
    return f"{text}. {beyond} of them are above r, the most that plain LoRA could reach."


def _with_hints(run: RunFolder) -> Spectrum | None:
    """The spectrum with its reference lines; where the file has none, the config and the restarts give them."""
    spectrum = run.spectrum
    if spectrum is None or spectrum.rank is not None or run.config is None:
        return spectrum
    rank = run.config.method.update_rank
    if rank is None:
        return spectrum
    restarts = len(run.restarts) if spectrum.restarts is None else spectrum.restarts
    return Spectrum(spectrum.matrices, spectrum.threshold, rank, restarts)


def _subtitle(run: RunFolder) -> str:
    parts = []
    if run.config is not None:
        method = run.config.method
        settings = method.model_dump(exclude_defaults=True, exclude={"name"}, mode="json")
        settings = {"rank": method.update_rank, **settings}
        told = [
            f"{key.replace('_', ' ')} {_told(value)}"
            for key, value in settings.items()
            if isinstance(value, int | float | str)
        ]
        parts.append(", ".join([type(method).__name__, *told]))
        parts.append(f"{run.config.model.name} in {run.config.dtype}")
    if run.started is not None:
        parts.append(words.date(run.started))
    lines = [" · ".join(parts), ", ".join(_machine(run))]
    return "".join(f'<p class="sub">{escape(line)}</p>' for line in lines if line)


def _machine(run: RunFolder) -> list[str]:
    """The "run" event in words: Trimtab 0.1.0, torch 2.13.0, device cpu, threads 2."""
    return [
        f"{'Trimtab' if key == 'version' else key.replace('_', ' ')} {_told(value)}"
        for key, value in run.machine.items()
        if key not in _NOT_MACHINE and isinstance(value, str | int | float)
    ]


def _told(value: Any) -> str:
    return f"{value:,}" if isinstance(value, int) and not isinstance(value, bool) else str(value)


def _cards(run: RunFolder, spectrum: Spectrum | None) -> str:
    cards: list[tuple[str, str]] = []
    end: Record = run.evals[-1] if run.evals else {}
    loss, perplexity = number(end.get("loss")), number(end.get("perplexity"))
    unit = "" if run.command == "finetune" else ", nats/token"
    which = f"final validation loss{unit}" if run.final is not None else f"last validation loss{unit}"
    if (best := taskscores.headline(end)) is not None:
        cards.append((words.sig(best[1], 4), f"{best[0]}, {next(iter(end.get('scores') or ['validation']))}"))
    if loss is not None:
        cards.append((words.sig(loss), which))
        if perplexity is None and loss < 50 and run.command == "pretrain":
            perplexity = math.exp(loss)
    if perplexity is not None:
        cards.append((words.sig(perplexity), "perplexity"))
    bits = number(end.get("bits_per_byte"))
    if bits is not None:
        cards.append((words.sig(bits), "bits a byte"))
    if spectrum is not None and spectrum.matrices:
        ranks = [matrix.rank for matrix in spectrum.matrices]
        most = f", at most {spectrum.bound:,}" if spectrum.bound is not None else ""
        cards.append((f"{median(ranks):g}", f"median rank of the update{most}"))
    tokens = run.last("tokens")
    if tokens is not None:
        cards.append((words.short(tokens), f"tokens in {words.many(run.last_step, 'step')}"))
    _, speed = run.series("tokens_per_second")
    if len(speed):
        cards.append((words.short(float(median(speed.tolist()))), "tokens/s, median"))
    if run.seconds > 0:
        split = f" in {run.sessions} sessions" if run.sessions > 1 else ""
        cards.append((words.duration(run.seconds), f"wall time{split}"))
    shown = "".join(f'<div class="card"><b>{escape(b)}</b><span>{escape(text)}</span></div>' for b, text in cards)
    return f'<div class="cards">{shown}</div>'


def _curves(run: RunFolder) -> str:
    if not run.steps and not run.evals:
        return "<p>No step was logged yet, so there is no curve to draw.</p>" + figures.rate_figure(run)
    heads, rows = taskscores.score_rows(run)
    scores = data_table("Scores of the last evaluation", heads, rows) if rows else ""
    return (
        f"{taskscores.headline_figure(run, figures.step_axis(run))}{scores}"
        f"{figures.loss_figure(run)}{figures.rate_figure(run)}"
        f'<div class="pair">{figures.speed_figure(run)}{figures.gradient_figure(run)}</div>'
    )


def _memory(run: RunFolder) -> str:
    if not run.phases:
        return "<p>parameters.json is missing: it is written before the first step.</p>"
    groups = list(dict.fromkeys(key for phase in run.phases for key, count in phase.groups.items() if count))
    kinds = list(dict.fromkeys(key for phase in run.phases for key, size in phase.memory.items() if size))
    rows = [
        [
            phase.name,
            words.count(phase.from_step),
            words.count(phase.total),
            words.count(phase.trainable),
            f"{100 * phase.trainable / phase.total:.1f} %" if phase.total else "",
            *(words.count(phase.groups.get(key, 0)) for key in groups),
        ]
        for phase in run.phases
    ]
    table = data_table(
        "Parameters", ["phase", "from step", "all", "trained", "share", *(f"in {key}" for key in groups)], rows
    )
    if kinds:
        memory = [
            [
                phase.name,
                *(words.size(phase.memory.get(key, 0)) for key in kinds),
                words.size(phase.on_device),
            ]
            for phase in run.phases
        ]
        heads = ["phase", *map(figures.memory_name, kinds), "sum on the device"]
        table += (
            f'<div style="height:1.2rem"></div>{data_table("Memory", heads, memory)}{figures.memory_bars(run.phases)}'
        )
    return (
        f'{table}<p class="fine">“All” counts each tied tensor once. Memory is what is held between steps plus the '
        f"gradients; activations depend on the micro-batch and come on top.{escape(_measured(run))}</p>"
    )


def _measured(run: RunFolder) -> str:
    told = [f"{key.replace('_', ' ')} {words.size(value)}" for key, value in run.measured.items()]
    return f" Measured in this process: {', '.join(told)}." if told else ""


def _spectrum(run: RunFolder, spectrum: Spectrum | None) -> str:
    if spectrum is None or not spectrum.matrices:
        why = "was not computed" if run.final is not None else "is computed when the run ends"
        return f"<p>The spectrum of the update {why}: there is no readable spectrum.json.</p>"
    lines = f"the dashed red line is {spectrum.threshold:g} of the largest, and the rank counts what lies above it"
    if spectrum.rank is not None:
        lines += "; the green line stands at r, where plain LoRA ends"
    if spectrum.bound is not None and spectrum.bound != spectrum.rank:
        lines += ", the violet one at (k + 1) r, where k restarts must end (not drawn beyond the full rank)"
    many = len(spectrum.by_type()) > figures.PANELS
    intro = (
        "<p>The update dW is W at the end minus W when the adapter was attached (after a warm start), both in fp32 "
        "with everything that rounding held back. Each panel shows the singular values of dW by index, relative to the "
        f"largest: one faint line a matrix, the bold one their median; {escape(lines)}.</p>"
    )
    if run.final is None:
        intro += '<p class="notice">The run has gone on since this spectrum was computed.</p>'
    if many:
        intro += f'<p class="fine">The first {figures.PANELS} matrix types are drawn; the table lists all.</p>'
    heads = [
        "matrix type",
        "matrices",
        "shape",
        "rank min",
        "median",
        "max",
        "full",
        "largest σ",
        f"σ < {NEAR_ZERO:g}",
        "|dW| / |W|",
    ]
    table = data_table("Rank of the update, by matrix type", heads, [_type_row(row) for row in spectrum.types()])
    return (
        f'{intro}{figures.spectrum_figures(spectrum)}<div style="height:1.4rem"></div>{table}'
        f'<p class="fine">σ &lt; {NEAR_ZERO:g}: mean count a matrix. |dW| / |W|: Frobenius norms over all matrices of '
        f"the type.</p>{figures.histograms(spectrum)}"
    )


def _type_row(row: TypeSpectrum) -> list[str]:
    return [
        row.type,
        words.count(row.matrices),
        f"{row.shape[0]} × {row.shape[1]}",
        words.count(row.rank_min),
        f"{row.rank_median:g}",
        words.count(row.rank_max),
        words.count(row.full_rank),
        words.sig(row.largest, 3),
        words.sig(row.near_zero, 4),
        words.sig(row.relative, 3) if math.isfinite(row.relative) else "W was 0",
    ]


def _config(run: RunFolder) -> str:
    if run.config_text is None:
        return "<p>config.yaml is missing.</p>"
    return f"<pre>{escape(run.config_text.rstrip())}</pre>"


def _repeat(run: RunFolder) -> str:
    folder = str((run.config.out if run.config else Path("runs")) / run.name)
    again = f"trimtab {run.command} {shlex.quote(f'{folder}/config.yaml')} {shlex.quote(f'name={run.name}-again')}"
    goes_on = f"trimtab {run.command} --resume {shlex.quote(folder)}"
    text = "<p>From the folder in which the run was started, with the same version of Trimtab:</p>"
    text += f"<pre>{escape(again)}</pre>"
    if run.final is None:
        text += f"<p>To go on where it stopped:</p><pre>{escape(goes_on)}</pre>"
    if run.machine:
        text += f'<p class="fine">Made with {escape(", ".join(_machine(run)))}.</p>'
    return text


class Link(NamedTuple):
    """A text that leads to a file beside the page."""

    text: str
    target: str


def data_table(title: str, heads: Sequence[str], rows: Sequence[Sequence[str | Link]]) -> str:
    """A table as HTML; the texts are plain."""
    head = "".join(f'<th scope="col">{escape(cell)}</th>' for cell in heads)
    body = "".join(f"<tr>{''.join(f'<td>{_cell(cell)}</td>' for cell in row)}</tr>" for row in rows)
    return (
        f'<div class="scroll"><table><caption>{escape(title)}</caption><thead><tr>{head}</tr></thead>'
        f"<tbody>{body}</tbody></table></div>"
    )


def _cell(cell: str | Link) -> str:
    if isinstance(cell, Link):
        return f'<a href="{escape(quote(cell.target))}">{escape(cell.text)}</a>'
    return escape(cell)
