"""One self-contained page about a proof: verdict, timeline with the kills, latencies.  Needs no network to be read.

Inline SVG and CSS only; what is drawn comes from the result and nothing is left out silently.
"""

from __future__ import annotations

import html
import statistics
from collections.abc import Callable, Iterable, Sequence
from pathlib import Path
from string import Template

from reliamq.proving.plan import Plan
from reliamq.proving.proof import Result
from reliamq.settings import masked

__all__ = ["write_report"]

WIDTH, HEIGHT, LEFT, BOTTOM = 960, 300, 60, 30
COLOURS = {"committed": "#1b6ca8", "confirmed": "#8a5fbf", "delivered": "#c77d0a", "effects": "#1a8754"}
PROCESS_KILL = 'stroke="#b3261e" stroke-width="1" stroke-dasharray="3 3"'
BROKER_KILL = 'stroke="#1d2430" stroke-width="2"'
POINTS = 240
BARS = 40

PAGE = Template("""<!doctype html>
<html lang="en"><head><meta charset="utf-8"><title>reliamq prove: $verdict</title><style>
body { font: 15px/1.5 system-ui, sans-serif; max-width: 1000px; margin: 2rem auto;
  padding: 0 1rem; color: #1d2430; }
h1 { font-size: 1.6rem; } .good { color: #1a8754; } .bad { color: #b3261e; }
table { border-collapse: collapse; } td { padding: .25rem .8rem; border-bottom: 1px solid #dde2ea; }
td.n { text-align: right; font-variant-numeric: tabular-nums; } svg { width: 100%; height: auto; background: #f7f9fc; }
text { font: 12px system-ui, sans-serif; fill: #4a5568; }
.key { margin-right: 1.2rem; } code { background: #eef1f6; }
</style></head><body>
<h1 class="$class">$verdict</h1>
<p>$summary</p>
<table>$counters</table>
<h2>Timeline</h2>
<p>$legend <span class="key" style="color:#b3261e">┆ a process killed with SIGKILL</span>
<span class="key" style="color:#1d2430">┃ a broker killed</span></p>
$timeline
<h2>From commit to effect</h2>
<p>$latency</p>
$histogram
$examples
<h2>How it was run</h2>
<table>$settings</table>
</body></html>
""")


def write_report(path: Path, plan: Plan, result: Result) -> None:
    """Write the page to ``path``."""
    verdict = result.verdict
    good = result.holds and result.finished
    text = (
        f"lost {verdict.lost} · doubled {verdict.doubled} · reordered {verdict.reordered} · phantom {verdict.phantom}"
    )
    page = PAGE.substitute(
        {
            "verdict": text,
            "class": "good" if good else "bad",
            "summary": html.escape(_summary(plan, result)),
            "counters": _rows(_counters(result)),
            "legend": "".join(
                f'<span class="key" style="color:{colour}">■ {name}</span>' for name, colour in COLOURS.items()
            ),
            "timeline": _timeline(result),
            "latency": html.escape(_latency(result.latencies)),
            "histogram": _histogram(result.latencies),
            "examples": _examples(result),
            "settings": _rows(_settings(plan)),
        }
    )
    path.write_text(page, encoding="utf-8")


def _summary(plan: Plan, result: Result) -> str:
    broken = f" The rule {plan.broken} was broken on purpose." if plan.broken else ""
    end = "" if result.finished else " Not everything took effect before the deadline."
    if result.interrupted:
        end = f" Interrupted: {result.verdict.in_flight} were in flight and are not judged."
    if result.unplaced:
        end += f" {result.unplaced} planned orders were not placed."
    killed = f"{len(result.kills)} processes and {len(result.broker_kills)} brokers killed"
    return f"{result.verdict.committed} committed orders, {killed}, {result.seconds:.1f} s.{broken}{end}"


def _counters(result: Result) -> list[tuple[str, object]]:
    verdict = result.verdict
    names = (
        "committed",
        "confirmed",
        "effects",
        "lost",
        "doubled",
        "reordered",
        "phantom",
        "false_confirms",
        "unbalanced",
    )
    rest = ("redelivered", "dead_letters", "in_flight")
    counted = [(name.replace("_", " "), getattr(verdict, name)) for name in (*names, *rest)]
    return [*counted, ("rolled back on purpose", result.rolled_back), ("not placed", result.unplaced)]


def _settings(plan: Plan) -> list[tuple[str, object]]:
    return [
        ("broker", masked(plan.broker)),
        ("database", masked(plan.database)),
        ("messages", plan.messages),
        ("keys", plan.keys),
        ("processes", f"{plan.applications} applications, {plan.relays} relays, {plan.workers} workers"),
        ("seed", plan.seed),
    ]


def _rows(pairs: Iterable[tuple[str, object]]) -> str:
    return "".join(
        f'<tr><td>{html.escape(name)}</td><td class="n">{html.escape(str(value))}</td></tr>' for name, value in pairs
    )


def _examples(result: Result) -> str:
    items = [
        f"<li>{html.escape(what)}: {', '.join(f'<code>{html.escape(one)}</code>' for one in ids)}</li>"
        for what, ids in result.verdict.examples.items()
    ]
    crashed = [f"<li>{html.escape(line)}</li>" for line in result.crashes]
    return f"<h2>What went wrong</h2><ul>{''.join(items + crashed)}</ul>" if items or crashed else ""


# --- drawing ----------------------------------------------------------------------------------------------------------


def _timeline(result: Result) -> str:
    """Cumulative counts over time, one line each, with the kills as dashes."""
    moments = [at for times in result.timeline.values() for at in times]
    moments += [at for at, _ in (*result.kills, *result.broker_kills)]
    if not moments:
        return "<p>Nothing happened.</p>"
    start, end = min(moments), max(moments)
    span = max(end - start, 0.001)
    top = max(1, *(len(times) for times in result.timeline.values()))

    def x(at: float) -> float:
        return LEFT + (at - start) / span * (WIDTH - LEFT - 10)

    def y(count: int) -> float:
        return HEIGHT - BOTTOM - count / top * (HEIGHT - BOTTOM - 10)

    kills = "".join(
        f'<line x1="{x(at):.1f}" x2="{x(at):.1f}" y1="10" y2="{HEIGHT - BOTTOM}" {style} opacity=".6">'
        f"<title>{what}{html.escape(name)} killed at {at - start:.2f} s</title></line>"
        for dead, what, style in ((result.kills, "", PROCESS_KILL), (result.broker_kills, "broker ", BROKER_KILL))
        for at, name in dead
    )
    lines = "".join(
        _line(result.timeline[name], colour, x, y) for name, colour in COLOURS.items() if result.timeline.get(name)
    )
    return (
        f'<svg viewBox="0 0 {WIDTH} {HEIGHT}" role="img" aria-label="timeline">{kills}{lines}{_axes(span, top)}</svg>'
    )


def _line(times: Sequence[float], colour: str, x: Callable[[float], float], y: Callable[[int], float]) -> str:
    step = max(1, len(times) // POINTS)
    chosen = [*range(0, len(times), step), len(times) - 1]
    points = " ".join(f"{x(times[index]):.1f},{y(index + 1):.1f}" for index in chosen)
    return f'<polyline points="{points}" fill="none" stroke="{colour}" stroke-width="2"/>'


def _latency(latencies: Sequence[float]) -> str:
    if len(latencies) < 2:
        return "Too few effects to say anything."
    cuts = statistics.quantiles(latencies, n=100, method="inclusive")
    half, most, nearly_all = cuts[49], cuts[94], cuts[98]
    return (
        f"half within {half:.3f} s, 95 % within {most:.3f} s, 99 % within {nearly_all:.3f} s, "
        f"longest {max(latencies):.3f} s"
    )


def _histogram(latencies: Sequence[float]) -> str:
    if not latencies:
        return ""
    width = max(max(latencies) / BARS, 0.001)
    counts = [0] * BARS
    for one in latencies:
        counts[min(int(one / width), BARS - 1)] += 1
    top, step = max(counts), (WIDTH - LEFT - 10) / BARS
    height = (HEIGHT - BOTTOM - 10) / top
    bars = "".join(
        f'<rect x="{LEFT + index * step:.1f}" y="{HEIGHT - BOTTOM - count * height:.1f}" width="{step - 1:.1f}"'
        f' height="{count * height:.1f}" fill="#1a8754">'
        f"<title>{index * width:.2f}–{(index + 1) * width:.2f} s: {count}</title></rect>"
        for index, count in enumerate(counts)
    )
    label = 'role="img" aria-label="latency histogram"'
    return f'<svg viewBox="0 0 {WIDTH} {HEIGHT}" {label}>{bars}{_axes(BARS * width, top)}</svg>'


def _axes(span: float, top: int) -> str:
    """The ends of both axes: seconds to the right, a count upwards."""
    return "".join(
        (
            _text(LEFT, HEIGHT - 8, "0 s"),
            _text(WIDTH - 10, HEIGHT - 8, f"{span:.2f} s", end=True),
            _text(LEFT - 6, 16, str(top), end=True),
            _text(LEFT - 6, HEIGHT - BOTTOM, "0", end=True),
        )
    )


def _text(x: int, y: int, content: str, *, end: bool = False) -> str:
    anchor = ' text-anchor="end"' if end else ""
    return f'<text x="{x}" y="{y}"{anchor}>{content}</text>'
