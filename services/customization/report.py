"""One HTML page on a customization job: what was asked for, how training went, what the probes show, what to publish.

The page stands alone: styles and curves are in it, pictures are data URIs, it loads nothing and runs nothing, and its
policy forbids both. A pure function from a dataclass; everything in it is text that is escaped where it is written.
Knows no job store, no clock and no file.
"""

from __future__ import annotations

import base64
import json
import math
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass, field
from datetime import datetime
from html import escape
from typing import Any

from services.customization.checks import Finding
from services.customization.suggestion import (
    KEPT,
    LOOK_ALIKE,
    MOST_FORGOTTEN,
    RECOGNISED,
    Measured,
    Suggestion,
    suggestion,
)

_CURVE_POINTS = 240  # a curve is averaged to so many
_SMOOTHED_OVER = 0.06  # of a curve: what its heavy line is the mean of
_CURVE_WIDTH, _CURVE_HEIGHT = 320, 120
_SPARK_WIDTH, _SPARK_HEIGHT = 120, 28
_MAGIC = {b"\x89PNG": "image/png", b"\xff\xd8\xff": "image/jpeg", b"RIFF": "image/webp"}
_LOSSES = {
    "total": "what is minimised",
    "mse": "squared error, weighted",
    "mse_new": "squared error on the new story",
    "mse_existing": "squared error on stories of the old cast",
    "mse_prior": "squared error on the network's own pictures",
    "adversarial": "how surely frames are told from true ones",
    "discriminator": "the discriminator's own loss",
    "distillation": "distance to the network as it was",
}


@dataclass(frozen=True, kw_only=True)
class ExamplePicture:
    """One frame of the example story."""

    image: bytes
    caption: str


@dataclass(frozen=True, kw_only=True)
class ReportProbe:
    """One probe: the same text with the same seed at every step that was probed."""

    step: int
    name: str  # "alone", "with:Pip", "old:Pip"
    description: str
    image: bytes


@dataclass(frozen=True, kw_only=True)
class ReportCheckpoint:
    """One checkpoint and what was measured on it."""

    step: int
    weights_sha256: str = ""
    size_bytes: int = 0
    figures: Mapping[str, float] = field(default_factory=dict)


@dataclass(frozen=True, kw_only=True)
class JobReport:
    """All that a page shows of one job."""

    job_id: str
    state: str  # in words: "succeeded"
    name: str
    phrase: str
    pack: str
    method: str
    steps: int  # taken
    step_count: int  # planned
    attempt: int = 1
    create_time: datetime | None = None
    elapsed_s: float = 0.0
    error: str = ""  # why it failed, for a person
    example: Sequence[ExamplePicture] = ()
    findings: Sequence[Finding] = ()
    losses: Mapping[str, Sequence[tuple[int, float]]] = field(default_factory=dict)  # by part: step and value
    probes: Sequence[ReportProbe] = ()
    checkpoints: Sequence[ReportCheckpoint] = ()
    baseline: Mapping[str, float] = field(default_factory=dict)  # figures of the probes before the first step
    recipe: Mapping[str, Any] = field(default_factory=dict)  # as JSON has it


def report_page(job: JobReport) -> str:
    """The whole page."""
    chosen = suggestion([Measured(step=one.step, figures=one.figures) for one in job.checkpoints], job.baseline)
    body = "".join(
        (
            _head(job),
            _suggested(job, chosen),
            _gauges(job, chosen),
            _grid(job, chosen),
            _curves(job),
            _metrics(job, chosen),
            _story(job),
            _recipe(job),
        )
    )
    title = f"{job.name}: a character for {job.pack}"
    return (
        "<!doctype html>\n"
        f'<html lang="en"><head><meta charset="utf-8"><title>{escape(title)}</title>'
        '<meta name="viewport" content="width=device-width, initial-scale=1">'
        # Nothing is loaded and nothing runs, whatever came through.
        '<meta http-equiv="Content-Security-Policy" '
        "content=\"default-src 'none'; img-src data:; style-src 'unsafe-inline'\">"
        f"<style>{_STYLE}</style></head>\n<body><main>{body}</main></body></html>\n"
    )


def _head(job: JobReport) -> str:
    facts = [
        ("pack", job.pack),
        ("method", job.method),
        ("steps", f"{job.steps} of {job.step_count}" if job.steps != job.step_count else str(job.steps)),
        *([("training", _duration(job.elapsed_s))] if job.elapsed_s else []),
        *([("attempts", str(job.attempt))] if job.attempt > 1 else []),
        *([("made", f"{job.create_time:%Y-%m-%d %H:%M} {job.create_time.tzname() or ''}".strip())]
          if job.create_time else []),
        ("job", job.job_id),
    ]  # fmt: skip
    listed = "".join(f"<div><dt>{escape(name)}</dt><dd>{escape(value)}</dd></div>" for name, value in facts)
    failed = f'<p class="bad">{escape(job.error)}</p>' if job.error else ""
    return (
        f'<header><h1>{escape(job.name)} <span class="state {_tone(job.state)}">{escape(job.state)}</span></h1>'
        f'<p class="phrase">{escape(job.phrase)}</p>{failed}<dl class="facts">{listed}</dl></header>'
    )


def _tone(state: str) -> str:
    return {"succeeded": "good", "failed": "bad"}.get(state, "quiet")


def _suggested(job: JobReport, chosen: Suggestion | None) -> str:
    if chosen is None:
        return '<section class="card"><h2>Nothing to publish yet</h2><p>No checkpoint is complete.</p></section>'
    checkpoint = next(one for one in job.checkpoints if one.step == chosen.step)
    weights = f"<p><code>{escape(checkpoint.weights_sha256)}</code></p>" if checkpoint.weights_sha256 else ""
    return (
        f'<section class="card suggested"><h2>Publish step {chosen.step}</h2><p>{escape(chosen.why)}</p>{weights}'
        "</section>"
    )


@dataclass(frozen=True)
class _Gauge:
    """One figure of the probes."""

    figure: str
    title: str
    meaning: str
    higher_is_better: bool


_GAUGES = (
    _Gauge(RECOGNISED, "Recognised", "of the new character's look is right where they should be", True),
    _Gauge(LOOK_ALIKE, "Look-alike", "of them look more like one of the old cast", False),
    _Gauge(KEPT, "Old cast kept", "of the old cast's look is right, alone and beside the new one", True),
)


def _gauges(job: JobReport, chosen: Suggestion | None) -> str:
    probed = sorted((one for one in job.checkpoints if one.figures), key=lambda one: one.step)
    shown = next(
        (one for one in probed if chosen is not None and one.step == chosen.step), probed[-1] if probed else None
    )
    if shown is None:
        return ""
    cards = []
    for gauge in _GAUGES:
        if gauge.figure not in shown.figures:
            continue
        series = [(one.step, one.figures[gauge.figure]) for one in probed if gauge.figure in one.figures]
        if gauge.figure in job.baseline:
            series = [(0, job.baseline[gauge.figure]), *series]
        value, first = shown.figures[gauge.figure], series[0][1]
        moved = ""
        if series[0][0] != shown.step:
            gained = (value - first) if gauge.higher_is_better else (first - value)
            tone = "good" if gained > -0.005 else "quiet" if gained >= -MOST_FORGOTTEN else "bad"
            sign = f"{(value - first) * 100:+.0f} points since step {series[0][0]}".replace("-", "−")
            moved = f'<p class="{tone}">{sign}</p>'
        cards.append(
            f'<div class="gauge"><h3>{gauge.title}</h3><p class="value">{value:.0%}</p>'
            f'<div class="bar" role="img" aria-label="{value:.0%}">'
            f'<i style="width:{_share(value) * 100:.1f}%"></i></div>'
            f"<p>{gauge.meaning}</p>{moved}{_spark(series, shown.step)}</div>"
        )
    if not cards:
        return ""
    return f'<section><h2>At step {shown.step}</h2><div class="gauges">{"".join(cards)}</div></section>'


def _share(value: float) -> float:
    return min(1.0, max(0.0, value))


def _spark(series: Sequence[tuple[int, float]], marked: int) -> str:
    """A figure from the first probe to the last, between 0 and 1."""
    if len(series) < 2:
        return ""
    last = max(step for step, _ in series) or 1

    def at(step: int, value: float) -> tuple[float, float]:
        return 3 + (_SPARK_WIDTH - 6) * step / last, 3 + (_SPARK_HEIGHT - 6) * (1 - _share(value))

    line = " ".join(f"{x:.1f},{y:.1f}" for x, y in (at(step, value) for step, value in series))
    dots = "".join(
        f'<circle cx="{x:.1f}" cy="{y:.1f}" r="{3 if step == marked else 1.6}"><title>step {step}: {value:.0%}</title>'
        "</circle>"
        for (step, value), (x, y) in ((one, at(*one)) for one in series)
    )
    return (
        f'<svg class="spark" viewBox="0 0 {_SPARK_WIDTH} {_SPARK_HEIGHT}" role="img" aria-label="over the steps">'
        f'<polyline points="{line}"/>{dots}</svg>'
    )


def _grid(job: JobReport, chosen: Suggestion | None) -> str:
    if not job.probes:
        return ""
    steps = sorted({one.step for one in job.probes})
    texts = {one.name: one.description for one in job.probes}
    pictures = {(one.name, one.step): one.image for one in job.probes}
    marked = chosen.step if chosen is not None else None

    def cell(name: str, step: int) -> str:
        mark = ' class="chosen"' if step == marked else ""
        image = pictures.get((name, step))
        if image is None:
            return f"<td{mark}></td>"
        return f"<td{mark}>{_picture(image, f'{name} at step {step}: {texts[name]}')}</td>"

    heads = "".join(
        f'<th scope="col"{" class=chosen" if step == marked else ""}>{"before" if step == 0 else f"step {step}"}</th>'
        for step in steps
    )
    rows = "".join(
        f'<tr><th scope="row"><b>{escape(_probe_title(name, job.name))}</b><span>{escape(text)}</span></th>'
        + "".join(cell(name, step) for step in steps)
        + "</tr>"
        for name, text in texts.items()
    )
    return (
        "<section><h2>Probes</h2><p>The same words and the same noise at every step: what differs was learned.</p>"
        f'<div class="scroll"><table class="probes"><thead><tr><td></td>{heads}</tr></thead><tbody>{rows}</tbody>'
        "</table></div></section>"
    )


def _probe_title(name: str, who: str) -> str:
    kind, _, other = name.partition(":")
    return {"alone": f"{who} alone", "with": f"{who} with {other}", "old": f"{other} alone"}.get(
        kind.split("#")[0], name
    )


def _picture(image: bytes, text: str) -> str:
    kind = next((kind for magic, kind in _MAGIC.items() if image.startswith(magic)), "")
    if not kind:
        return f'<span class="quiet">{escape(text)}</span>'
    data = base64.b64encode(image).decode()
    return f'<img src="data:{kind};base64,{data}" alt="{escape(text)}" title="{escape(text)}">'


def _curves(job: JobReport) -> str:
    finite = {name: [one for one in points if math.isfinite(one[1])] for name, points in job.losses.items()}
    parts = {name: points for name, points in finite.items() if points}
    if not parts:
        return ""
    known = [name for name in _LOSSES if name in parts]
    marks = [one.step for one in job.checkpoints]
    drawn = "".join(_curve(name, parts[name], marks) for name in (*known, *sorted(parts.keys() - _LOSSES.keys())))
    return (
        "<section><h2>Losses</h2><p>The heavy line is a running mean; a step's own loss depends on the noise level "
        f'that was drawn for it.</p><div class="curves">{drawn}</div></section>'
    )


def _curve(name: str, points: Sequence[tuple[int, float]], marks: Sequence[int]) -> str:
    ordered = sorted(points)
    averaged = _averaged(ordered)
    smooth = _smoothed(averaged)
    first_step, last_step = ordered[0][0], max(ordered[-1][0], ordered[0][0] + 1)
    values = [value for _, value in averaged]
    low, high = min(values), max(values)
    if high - low < 1e-12:
        low, high = low - 0.5, high + 0.5

    def at(step: float, value: float) -> str:
        x = _CURVE_WIDTH * (step - first_step) / (last_step - first_step)
        y = 4 + (_CURVE_HEIGHT - 8) * (1 - (value - low) / (high - low))
        return f"{x:.1f},{y:.1f}"

    lines = "".join(
        f'<line x1="{x:.1f}" x2="{x:.1f}" y1="0" y2="{_CURVE_HEIGHT}"/>'
        for x in (_CURVE_WIDTH * (step - first_step) / (last_step - first_step) for step in marks)
        if 0 < x < _CURVE_WIDTH
    )
    return (
        f"<figure><figcaption><b>{escape(name)}</b> {escape(_LOSSES.get(name, ''))}</figcaption>"
        f'<div class="plot"><span class="top">{_number(high)}</span><span class="bottom">{_number(low)}</span>'
        f'<svg viewBox="0 0 {_CURVE_WIDTH} {_CURVE_HEIGHT}" preserveAspectRatio="none" role="img" '
        f'aria-label="from {_number(smooth[0][1])} to {_number(smooth[-1][1])}">{lines}'
        f'<polyline class="raw" points="{" ".join(at(*one) for one in averaged)}"/>'
        f'<polyline points="{" ".join(at(*one) for one in smooth)}"/></svg></div>'
        f'<p class="axis"><span>step {ordered[0][0]}</span><span>ends at {_number(smooth[-1][1])}</span>'
        f"<span>step {ordered[-1][0]}</span></p></figure>"
    )


def _averaged(points: Sequence[tuple[int, float]]) -> list[tuple[float, float]]:
    """At most `_CURVE_POINTS` points, each the mean of its neighbours."""
    size = -(-len(points) // _CURVE_POINTS)
    groups = (points[first : first + size] for first in range(0, len(points), size))
    return [(sum(s for s, _ in group) / len(group), sum(v for _, v in group) / len(group)) for group in groups]


def _smoothed(points: Sequence[tuple[float, float]]) -> list[tuple[float, float]]:
    reach = max(1, round(len(points) * _SMOOTHED_OVER))
    return [
        (step, sum(value for _, value in near) / len(near))
        for number, (step, _) in enumerate(points)
        for near in (points[max(0, number - reach) : number + reach + 1],)
    ]


def _metrics(job: JobReport, chosen: Suggestion | None) -> str:
    if not job.checkpoints:
        return ""
    before = [ReportCheckpoint(step=0, figures=job.baseline)] if job.baseline else []
    measured = [*before, *sorted(job.checkpoints, key=lambda one: one.step)]
    names = list(dict.fromkeys(name for one in measured for name in one.figures))
    known = {gauge.figure: gauge.title for gauge in _GAUGES}
    heads = "".join(f'<th scope="col">{escape(known.get(name, name))}</th>' for name in names)
    rows = "".join(
        f"<tr{' class=chosen' if chosen is not None and one.step == chosen.step else ''}>"
        f'<th scope="row">{"before" if one.step == 0 else one.step}</th>'
        + "".join(f"<td>{_figure(name, one.figures.get(name))}</td>" for name in names)
        + f"<td>{_size(one.size_bytes)}</td><td><code>{escape(one.weights_sha256[:12])}</code></td></tr>"
        for one in measured
    )
    return (
        '<section><h2>Checkpoints</h2><div class="scroll"><table class="figures"><thead><tr><th scope="col">step</th>'
        f'{heads}<th scope="col">size</th><th scope="col">weights</th></tr></thead><tbody>{rows}</tbody></table></div>'
        "</section>"
    )


def _figure(name: str, value: float | None) -> str:
    if value is None:
        return ""
    return f"{value:.0%}" if name in {gauge.figure for gauge in _GAUGES} else _number(value)


def _story(job: JobReport) -> str:
    if not job.example and not job.findings:
        return ""
    frames = "".join(
        f"<figure>{_picture(one.image, f'frame {number}')}<figcaption>{escape(one.caption)}</figcaption></figure>"
        for number, one in enumerate(job.example, 1)
    )
    found = "".join(
        f"<li><b>{escape(one.code)}</b> {escape(one.message)} <i>{escape(one.mend)}</i></li>" for one in job.findings
    )
    warned = f"<h3>What the checks found</h3><ul>{found}</ul>" if found else "<p>The checks found nothing to mend.</p>"
    return f'<section><h2>The example story</h2><div class="story">{frames}</div>{warned}</section>'


def _recipe(job: JobReport) -> str:
    if not job.recipe:
        return ""
    rows = "".join(
        f'<tr><th scope="row">{escape(name)}</th><td>{escape(value)}</td></tr>' for name, value in _flat(job.recipe)
    )
    return f'<section><h2>Recipe</h2><table class="recipe"><tbody>{rows}</tbody></table></section>'


def _flat(values: Mapping[str, Any], before: str = "") -> Iterable[tuple[str, str]]:
    """Nested settings as one list: "method.weights.adversarial"."""
    for name, value in values.items():
        if isinstance(value, Mapping):
            yield from _flat(value, f"{before}{name}.")
        else:
            yield (
                f"{before}{name}",
                value if isinstance(value, str) else json.dumps(value, ensure_ascii=False, default=str),
            )


def _number(value: float) -> str:
    return f"{value:.3g}".replace("-", "−")


def _size(size_bytes: int) -> str:
    if not size_bytes:
        return ""
    return f"{size_bytes / 1024:.0f} KiB" if size_bytes < 1 << 20 else f"{size_bytes / (1 << 20):.1f} MiB"


def _duration(seconds: float) -> str:
    minutes, rest = divmod(round(seconds), 60)
    hours, minutes = divmod(minutes, 60)
    return f"{hours} h {minutes} min" if hours else f"{minutes} min {rest} s" if minutes else f"{rest} s"


_STYLE = """
:root{color-scheme:light dark;--ink:#1d1f24;--quiet:#646a76;--paper:#f6f5f2;--card:#fff;--line:#dedcd5;--mark:#2f6f5e;
--tint:#e3f0eb;--bad:#a83232}
@media(prefers-color-scheme:dark){:root{--ink:#e9e8e4;--quiet:#9fa4ae;--paper:#17181b;--card:#212327;--line:#363940;
--mark:#7cc7b0;--tint:#223832;--bad:#ef8f8f}}
*{box-sizing:border-box}
body{margin:0;background:var(--paper);color:var(--ink);font:15px/1.5 system-ui,sans-serif}
main{max-width:1080px;margin:0 auto;padding:32px 20px 64px}
h1{font-size:32px;line-height:1.2;margin:0}h2{font-size:19px;margin:0 0 6px}h3{font-size:15px;margin:0}
p{margin:0 0 8px}section{margin-top:36px}section>p{color:var(--quiet)}
.phrase{font-size:18px;color:var(--quiet);margin:2px 0 14px}
.state{font-size:13px;font-weight:600;vertical-align:middle;padding:3px 10px;border-radius:99px;border:1px solid}
.good{color:var(--mark)}.bad{color:var(--bad)}.quiet{color:var(--quiet)}
.facts{display:flex;flex-wrap:wrap;gap:8px 28px;margin:0}.facts dt{font-size:12px;color:var(--quiet)}
.facts dd{margin:0;overflow-wrap:anywhere}
.card{background:var(--card);border:1px solid var(--line);border-radius:10px;padding:16px 20px}
.suggested{border-color:var(--mark);background:var(--tint);margin-top:24px}.suggested p{color:inherit;margin:0 0 4px}
code{font:12px ui-monospace,monospace;color:var(--quiet);overflow-wrap:anywhere}
.gauges{display:grid;grid-template-columns:repeat(auto-fit,minmax(220px,1fr));gap:14px;margin-top:10px}
.gauge{background:var(--card);border:1px solid var(--line);border-radius:10px;padding:14px 18px}
.gauge p{font-size:13px;margin:4px 0}.gauge .value{font-size:30px;font-weight:650;line-height:1.1;margin:4px 0 8px}
.bar{height:8px;border-radius:4px;background:var(--line);overflow:hidden}.bar i{display:block;height:100%;
background:var(--mark)}
svg{display:block;fill:none;stroke:var(--mark);stroke-width:2;vector-effect:non-scaling-stroke}
svg polyline,svg line{vector-effect:non-scaling-stroke;stroke-linejoin:round}svg line{stroke:var(--line);stroke-width:1}
svg .raw{stroke-width:1;opacity:.35}.spark{width:100%;max-width:200px;height:auto;margin-top:6px}.spark circle{
fill:var(--mark);stroke:none}
.scroll{overflow-x:auto}table{border-collapse:collapse}th{text-align:left;font-weight:600}
.probes td,.probes thead th{padding:4px}.probes thead th{font-size:13px;color:var(--quiet);text-align:center}
.probes tbody th{width:210px;min-width:150px;padding:4px 14px 4px 0;vertical-align:middle;font-weight:400}
.probes tbody th span{display:block;font-size:12px;color:var(--quiet)}
.probes img{width:128px;min-width:96px;height:auto}
.chosen{background:var(--tint)}.probes thead .chosen{color:var(--mark)}
img{display:block;border-radius:6px;max-width:100%}
.curves{display:grid;grid-template-columns:repeat(auto-fit,minmax(290px,1fr));gap:18px;margin-top:10px}
figure{margin:0;min-width:0}.curves figure{
display:flex;flex-direction:column;background:var(--card);border:1px solid var(--line);border-radius:10px;
padding:12px 14px}
figcaption{font-size:13px;color:var(--quiet);margin-bottom:8px}figcaption b{color:var(--ink)}
.plot{position:relative;margin:auto 0 4px 46px;border-left:1px solid var(--line);border-bottom:1px solid var(--line)}
.plot svg{width:100%;height:120px}.plot span{position:absolute;right:100%;margin-right:6px;font-size:11px;
color:var(--quiet)}
.top{top:-4px}.bottom{bottom:-4px}.axis{display:flex;justify-content:space-between;font-size:11px;color:var(--quiet);
margin:0 0 0 46px}
.figures th,.figures td{padding:5px 16px 5px 8px;border-bottom:1px solid var(--line);font-variant-numeric:tabular-nums}
.story{display:grid;grid-template-columns:repeat(auto-fill,minmax(150px,1fr));gap:14px;margin:10px 0 14px}
.story img{width:100%}.story figcaption{margin-top:4px}ul{padding-left:18px;margin:6px 0}
.recipe th,.recipe td{padding:3px 20px 3px 0;border-bottom:1px solid var(--line);font-size:13px;font-weight:400;
vertical-align:top;overflow-wrap:anywhere}.recipe th{color:var(--quiet)}
@media print{body{background:none}section{break-inside:avoid}}
"""
