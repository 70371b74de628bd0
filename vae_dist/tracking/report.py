"""The report of runs: one HTML page that carries all it shows.

In: run folders, also while the runs go on, and from anywhere: files of other forms and sizes than
training writes are left out. Out: HTML with a table of the runs, curves as inline SVG (a point's
`<title>` is its tooltip), image grids with one slider over the steps, results, config and sessions.
The page fetches nothing, as its content security policy demands. `_tag` escapes each child that is
not its own result, control characters included, and takes the secrets out of addresses.
"""

from __future__ import annotations

import base64
import contextlib
import html
import io
import itertools
import math
import os
from collections.abc import Iterable, Iterator, Sequence
from pathlib import Path
from typing import Any

from PIL import Image

from vae_dist.config.keys import flatten, keys, shown
from vae_dist.config.schema import TrainConfig
from vae_dist.files import printable, read_bounded, read_json, redacted
from vae_dist.run.folder import RunFolder
from vae_dist.tracking.environment import read_sessions
from vae_dist.tracking.images import find_images, image_caption
from vae_dist.tracking.metrics import IMAGES, SECTIONS, Panel, format_number
from vae_dist.tracking.sinks import read_rows

MAX_POINTS = 150  # of a curve
MAX_FRAMES = 12  # of a grid
_MAX_BYTES = 2**28  # of a PNG file
_MAX_SIDE = 1400  # pixels of a grid on the page
_COLORS = ("#2f6fde", "#e07b1a", "#1a9a72", "#b5449b", "#8c6d1f", "#5b5fc7", "#c9372c", "#3f8fa8")
_WIDTH, _HEIGHT, _LEFT, _RIGHT, _TOP, _BOTTOM = 300, 180, 52, 14, 8, 22  # pixels of a chart
_FIGURES = {  # of the first table
    "-ELBO, nats": "eval/neg_elbo_nats",
    "bits/dim": "eval/bits_per_dim",
    "distortion, nats": "eval/distortion_nats",
    "rate, nats": "eval/rate_nats",
    "active units": "latent/active_units",
    "images/s": "time/images_per_second",
}
_SESSION = ("first_step", "started", "host", "processes", "device", "git", "command")
_PAGE = """<!doctype html>
<html lang="en">
<head>
<meta charset="utf-8">
<meta name="viewport" content="width=device-width, initial-scale=1">
<meta http-equiv="Content-Security-Policy" content="default-src 'none'; img-src data:;
 style-src 'unsafe-inline'; script-src 'unsafe-inline'">
<title>{title} - vae_dist report</title>
<style>
:root {{ color-scheme: light dark; font: 14px/1.5 system-ui, sans-serif; }}
body {{ max-width: 1240px; margin: 24px auto; padding: 0 20px; }}
table {{ border-collapse: collapse; margin: 8px 0; }}
th, td {{ text-align: left; padding: 3px 14px 3px 0; border-bottom: 1px solid #8884; }}
td {{ overflow-wrap: anywhere; font-variant-numeric: tabular-nums; }}
.panels {{ display: grid; grid-template-columns: repeat(auto-fill, minmax(290px, 1fr)); }}
.images {{ display: flex; flex-wrap: wrap; gap: 16px; }}
h3 {{ font-size: 14px; margin: 8px 0 0; }} h3 small, figcaption {{ color: #888; }}
small {{ margin-right: 12px; }}
svg text {{ font-size: 11px; fill: #888; }} svg line {{ stroke: #8884; }}
svg polyline {{ fill: none; stroke-width: 1.6; }} svg circle {{ fill-opacity: 0; }}
svg circle:hover {{ fill-opacity: 1; }}
figure {{ margin: 0; }} img {{ max-width: 100%; image-rendering: pixelated; }}
input[type=range] {{ width: 100%; }}
</style>
</head>
<body>
{body}
<script>
const slider = document.getElementById("time");
function show() {{
  const step = JSON.parse(slider.dataset.steps)[slider.value];
  for (const figure of document.querySelectorAll("figure")) {{
    const images = [...figure.querySelectorAll("img")];
    const shown = images.filter((image) => image.dataset.step <= step).at(-1) ?? images[0];
    images.forEach((image) => (image.hidden = image !== shown));
    figure.querySelector("figcaption").textContent = shown.alt;
  }}
}}
if (slider) (slider.oninput = show)();
</script>
</body>
</html>
"""

Point = tuple[float, float]


class Html(str):
    """Text that is HTML already."""


def write_report(folders: Sequence[Path]) -> str:
    """The page. Raises ConfigError where one of the folders is no run folder."""
    root = os.path.commonpath([folder.resolve().parent for folder in folders])
    runs = []
    for folder, color in zip(folders, itertools.cycle(_COLORS), strict=False):
        runs.append(Run(folder, os.path.relpath(folder.resolve(), root), color))
    parts = [*_overview(runs), *_curves(runs), *_images(runs), *_results(runs), *_config(runs)]
    for run in runs:
        lines = [[session.get(key, "-") for key in _SESSION] for session in run.sessions]
        parts += [_tag("h2", "Sessions of ", run.label), _table(_SESSION, lines)] if lines else []
    title = html.escape(", ".join(printable(run.name) for run in runs))
    return _PAGE.format(title=title, body="\n".join(parts))


class Run:
    """What a run folder holds. Raises ConfigError where it is none."""

    def __init__(self, path: Path, name: str, color: str = _COLORS[0]) -> None:
        folder, config = RunFolder(path), RunFolder(path).config()
        self.name, self.color = name, color
        dot = _tag("span", "\u25cf ", style=f"color:{color}")
        self.label = _tag("span", dot, name)
        self.status, self.num_steps = folder.status(), config.training.steps
        self.config = {key: shown(value) for key, value in flatten(config).items()}
        self.sessions = read_sessions(path / "environment.json")
        self.results = []
        for file in [path / "results.json", *sorted(path.glob("results_*.json"))]:
            with contextlib.suppress(OSError, ValueError):  # missing or being written
                self.results.append(read_json(file, 2**24))
        rows = {step: row for step, row in read_rows(folder.log_path) if 0 <= step < 2**53}
        self.last_step, self.curves = max(rows, default=0), _curves_of(rows)
        self.images: dict[str, list[tuple[int, str, str]]] = {}  # name -> (step, caption, data URI)
        found = find_images(folder.images)
        for kind in [kind for kind in {**IMAGES, **found} if kind in found]:
            for step in evenly(list(found[kind]), MAX_FRAMES):
                if uri := _data_uri(found[kind][step]):
                    caption = image_caption(step, rows.get(step, {}))
                    self.images.setdefault(kind, []).append((step, caption, uri))

    def last(self, key: str, default: float = math.nan) -> float:
        return self.curves[key][-1][1] if key in self.curves else default


def _curves_of(rows: dict[int, dict[str, Any]]) -> dict[str, list[Point]]:
    """Of each key (step, value), or of the latest distribution (place, value), largest first."""
    curves: dict[str, list[Point]] = {}
    for step, row in rows.items():
        for key, value in row.items():
            if isinstance(value, list):
                numbers = sorted((item for item in value if _is_number(item)), reverse=True)
                curves[key] = [(place, float(y)) for place, y in enumerate(numbers, start=1)]
            elif _is_number(value):
                curves.setdefault(key, []).append((step, float(value)))
    return {key: thinned(points) for key, points in curves.items() if points}


def thinned(points: list[Point]) -> list[Point]:
    """At most MAX_POINTS, each the mean of neighbours at the place of the last of them."""
    size = -(-len(points) // MAX_POINTS)
    groups = [points[start : start + size] for start in range(0, len(points), size or 1)]
    return [(group[-1][0], sum(y for _, y in group) / len(group)) for group in groups]


def evenly(steps: list[int], count: int) -> list[int]:
    """At most `count` of the steps, with the first and the last."""
    places = [round(i * (len(steps) - 1) / (count - 1)) for i in range(count)]
    return [steps[place] for place in dict.fromkeys(places)]


def _data_uri(path: Path) -> str:
    """Empty for what is no PNG of a moderate size (of pixels Pillow's limit): it may be half
    written, or not ours."""
    buffer = io.BytesIO()
    try:
        image = Image.open(io.BytesIO(read_bounded(path, _MAX_BYTES)), formats=["PNG"])
        image.thumbnail((_MAX_SIDE, _MAX_SIDE))
        image.convert("RGB").save(buffer, "WEBP", quality=80)
    except Exception:  # a decoder raises almost anything
        return ""
    return "data:image/webp;base64," + base64.b64encode(buffer.getvalue()).decode()


# the page


def _tag(name: str, *children: object, **attributes: object) -> Html:
    """An element; a trailing _ of an attribute's name is dropped, other _ are hyphens."""
    inner = "".join(
        c if isinstance(c, Html) else html.escape(printable(redacted(str(c)))) for c in children
    )
    pairs = ((key.rstrip("_").replace("_", "-"), str(attributes[key])) for key in attributes)
    given = "".join(f' {key}="{html.escape(value)}"' for key, value in pairs)
    return Html(f"<{name}{given}>" + f"{inner}</{name}>" * (name not in ("img", "input")))


def _table(head: Iterable[object], rows: Iterable[Iterable[object]]) -> Html:
    lines = [_tag("tr", *(_tag("td", cell) for cell in row)) for row in rows]
    return _tag("table", _tag("tr", *(_tag("th", cell) for cell in head)), *lines)


def _is_number(value: Any) -> bool:
    """Of a size that can be drawn."""
    return isinstance(value, int | float) and (value == 0 or 1e-150 < abs(value) < 1e150)


def _number(value: Any) -> str:
    return format_number(value) if _is_number(value) else "-"


def _overview(runs: list[Run]) -> Iterator[Html]:
    """One line for each run, the lowest -ELBO first."""
    lines = []
    for run in sorted(runs, key=lambda run: run.last("eval/neg_elbo_nats", math.inf)):
        steps = f"{run.last_step} of {run.num_steps}"
        figures = (_number(run.last(key)) for key in _FIGURES.values())
        lines.append([run.label, run.status.get("status", "unknown"), steps, *figures])
    yield _tag("h1", "vae_dist report")
    yield _table(["run", "status", "steps", *_FIGURES], lines)


def _curves(runs: list[Run]) -> Iterator[Html]:
    for title, panels in SECTIONS.items():
        charts = [chart for panel in panels if (chart := _chart(panel, runs))]
        if charts:
            yield Html(_tag("h2", title) + _tag("div", *charts, class_="panels"))


def _chart(panel: Panel, runs: list[Run]) -> Html:
    """A panel's curves, and a legend where it has several keys; empty where nothing changes."""
    series: list[tuple[str, str, str, list[Point]]] = []  # name, color, dashes, points
    legend = []
    for position, key in enumerate(panel.keys):
        dashes = "5 3" if position else "none"
        for run in runs:
            color = _COLORS[position] if len(runs) == 1 else run.color
            if points := run.curves.get(key):
                series.append((f"{run.name} {key}", color, dashes, points))
        if any(key in run.curves for run in runs):
            color = _COLORS[position] if len(runs) == 1 else "#888"
            line = f"{'dashed' if position else 'solid'} {color}"
            legend.append(_tag("small", key, style=f"border-bottom: 2px {line}"))
    values = [y for *_, points in series for _, y in points]
    if len(values) != 1 and len(set(values)) < 2:
        return Html("")
    head = _tag("h3", panel.title, " ", _tag("small", panel.unit))
    return _tag("div", head, *(legend if len(legend) > 1 else []), _drawing(panel, series))


def _drawing(panel: Panel, series: list[tuple[str, str, str, list[Point]]]) -> Html:
    steps = [x for *_, points in series for x, _ in points]
    first, last = min(steps), max(steps)
    levels = sorted(y for *_, points in series for _, y in points)
    low, high, upper = levels[0], levels[-1], levels[-1 - len(levels) // 33]
    if panel.x == "step" and high - low > 3 * (upper - low) > 0:
        high = upper  # a loss starts far above where it is interesting
    margin = 0.05 * (high - low) or abs(high) or 1.0
    low, high = low - margin, high + margin

    def place(x: float, at: float) -> tuple[float, float]:
        """Pixels from the left and from the top."""
        right = (x - first) / ((last - first) or 1) * (_WIDTH - _LEFT - _RIGHT)
        down = (high - min(at, high)) / (high - low) * (_HEIGHT - _TOP - _BOTTOM)
        return round(_LEFT + right, 1), round(_TOP + down, 1)

    parts = []
    for tick in _ticks(low, high):
        _, y = place(first, tick)
        label = _number(float(f"{tick:.3g}"))
        parts.append(_tag("line", x1=_LEFT, x2=_WIDTH - _RIGHT, y1=y, y2=y))
        parts.append(_tag("text", label, x=_LEFT - 5, y=y + 4, text_anchor="end"))
    for tick in _ticks(first, last):
        x, _ = place(tick, high)
        parts.append(_tag("text", _number(tick), x=x, y=_HEIGHT - 6, text_anchor="middle"))
    for name, color, dashes, points in series:
        places = [place(x, y) for x, y in points]
        line = " ".join(f"{x},{y}" for x, y in places)
        parts.append(_tag("polyline", points=line, stroke=color, stroke_dasharray=dashes))
        for (x, y), (cx, cy) in zip(points, places, strict=True):
            title = _tag("title", f"{name}, {panel.x} {_number(x)}: {_number(y)}")
            parts.append(_tag("circle", title, cx=cx, cy=cy, r=4, fill=color))
    return _tag("svg", *parts, viewBox=f"0 0 {_WIDTH} {_HEIGHT}", role="img")


def _ticks(low: float, high: float) -> list[float]:
    """Some three to five round numbers from `low` to `high`."""
    raw = (high - low) / 4 or 1.0
    power = 10.0 ** math.floor(math.log10(raw))
    step = next(m * power for m in (1, 2, 5, 10) if m * power >= 0.999 * raw)
    return [number * step for number in range(math.ceil(low / step), math.floor(high / step) + 1)]


def _images(runs: list[Run]) -> Iterator[Html]:
    """All grids of all runs; the script shows, of each, the newest up to the slider's step."""
    steps = sorted({step for run in runs for frames in run.images.values() for step, *_ in frames})
    if not steps:
        return
    last = len(steps) - 1
    yield _tag("h2", "Pictures")
    yield _tag("input", type="range", id="time", min=0, max=last, value=last, data_steps=steps)
    for name in dict.fromkeys(name for run in runs for name in run.images):
        figures = []
        for run in runs:
            if frames := run.images.get(name, []):
                grids = [_tag("img", src=uri, alt=text, data_step=s) for s, text, uri in frames]
                text = _tag("figcaption", frames[-1][1])
                figures.append(_tag("figure", _tag("div", run.label), *grids, text))
        yield Html(_tag("h3", IMAGES.get(name, name)) + _tag("div", *figures, class_="images"))


def _results(runs: list[Run]) -> Iterator[Html]:
    for run in runs:
        for one in run.results:
            figures = one.pop("figures", {})
            yield _tag("h2", "Results of ", run.label)
            yield _tag("p", ", ".join(f"{key} {value}" for key, value in one.items()))
            if isinstance(figures, dict):
                yield _table((), ((key, _number(value)) for key, value in figures.items()))


def _config(runs: list[Run]) -> Iterator[Html]:
    """The keys in which runs differ, or of one run those that are not at their defaults."""
    defaults = {key: shown(field.default) for key, field in keys(TrainConfig).items()}
    compared = [run.config for run in runs] if len(runs) > 1 else [defaults, runs[0].config]
    rows = [
        [key, *(run.config[key] for run in runs)]
        for key in defaults
        if len({values[key] for values in compared}) > 1
    ]
    yield _tag("h2", "Config: what differs " + ("between runs" if runs[1:] else "from defaults"))
    yield _table(["key", *(run.name for run in runs)], rows)
