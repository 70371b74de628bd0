"""The report of runs: one HTML page that carries all it shows.

In: run folders, also while the runs go on. Out: HTML with a table of the runs, curves as inline
SVG (a point's `<title>` is its tooltip), image grids with one slider over the steps, results,
config and sessions. The page fetches nothing, as its content security policy demands. All text is
escaped: `_tag` does so with each child that is not its own result.
"""

from __future__ import annotations

import base64
import contextlib
import html
import io
import json
import math
import os
from collections.abc import Iterable, Iterator, Sequence
from pathlib import Path
from typing import Any, NamedTuple

from PIL import Image

from vae_dist.config.keys import flatten, keys, shown
from vae_dist.config.schema import TrainConfig
from vae_dist.run.folder import RunFolder
from vae_dist.tracking.environment import read_sessions
from vae_dist.tracking.images import find_images, image_caption
from vae_dist.tracking.metrics import IMAGES, SECTIONS, Panel, format_number
from vae_dist.tracking.sinks import read_rows

MAX_POINTS = 150  # of a curve
MAX_FRAMES = 12  # of a grid
_MAX_SIDE = 1400  # pixels of a grid
_COLORS = ("#2f6fde", "#e07b1a", "#1a9a72", "#b5449b", "#8c6d1f", "#5b5fc7", "#c9372c", "#3f8fa8")
_WIDTH, _HEIGHT, _LEFT, _RIGHT, _TOP, _BOTTOM = 300, 180, 52, 14, 8, 22  # pixels
_VOID = ("img", "input")  # elements without an end
_FIGURES = {
    "-ELBO, nats": "eval/neg_elbo_nats",
    "bits/dim": "eval/bits_per_dim",
    "distortion, nats": "eval/distortion_nats",
    "rate, nats": "eval/rate_nats",
    "active units": "latent/active_units",
    "images/s": "time/images_per_second",
}
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
h3 {{ font-size: 14px; margin: 8px 0 0; }} h3 small, figcaption, summary {{ color: #888; }}
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
if (slider) slider.oninput = () => {{
  const step = JSON.parse(slider.dataset.steps)[slider.value];
  for (const figure of document.querySelectorAll("figure")) {{
    const images = [...figure.querySelectorAll("img")];
    const shown = images.filter((image) => image.dataset.step <= step).at(-1) ?? images[0];
    images.forEach((image) => (image.hidden = image !== shown));
    figure.querySelector("figcaption").textContent = shown.alt;
  }}
}};
</script>
</body>
</html>
"""

Point = tuple[float, float]
Series = tuple[str, str, list[Point]]  # name, colour, points


class Html(str):
    """Text that is HTML already."""


class RunSummary(NamedTuple):
    name: str
    status: dict[str, Any]
    steps: int  # that the run was asked for
    curves: dict[str, list[Point]]
    images: dict[str, list[tuple[int, str, str]]]  # name -> (step, caption, data URI), by step
    config: dict[str, str]
    sessions: list[dict[str, Any]]
    results: list[dict[str, Any]]

    def last(self, key: str, default: float = math.nan) -> float:
        return self.curves[key][-1][1] if key in self.curves else default


def write_report(folders: Sequence[Path]) -> str:
    """The page. Raises ConfigError where one of the folders is no run folder."""
    paths = [folder.resolve() for folder in folders]
    root = os.path.commonpath([path.parent for path in paths])
    names = [os.path.relpath(path, root) for path in paths]
    runs = [read_run(folder, name=name) for folder, name in zip(folders, names, strict=True)]
    parts = [_overview(runs), *_curves(runs), *_images(runs), *_results(runs), *_config(runs)]
    title = html.escape(", ".join(run.name for run in runs))
    return _PAGE.format(title=title, body="\n".join([*parts, *_sessions(runs)]))


# reading


def read_run(path: Path, *, name: str) -> RunSummary:
    folder = RunFolder(path)
    config = folder.config()
    rows = dict(read_rows(folder.log_path))
    curves: dict[str, list[Point]] = {}
    for step, row in rows.items():
        for key, value in row.items():
            if isinstance(value, (int, float)) and math.isfinite(value):
                curves.setdefault(key, []).append((step, float(value)))
            elif isinstance(value, list):  # the latest distribution, largest first
                known = sorted((item for item in value if item is not None), reverse=True)
                curves[key] = list(enumerate(known, start=1))
    images: dict[str, list[tuple[int, str, str]]] = {}
    found = find_images(folder.images)
    for kind in [name for name in {**IMAGES, **found} if name in found]:
        for step in evenly(list(found[kind]), MAX_FRAMES):
            caption = image_caption(step, rows.get(step, {}))
            images.setdefault(kind, []).append((step, caption, _data_uri(found[kind][step])))
    results = []
    for file in [path / "results.json", *sorted(path.glob("results_*.json"))]:
        with contextlib.suppress(OSError, ValueError):  # missing or being written
            results.append(dict(json.loads(file.read_bytes())))
    return RunSummary(
        name=name,
        status=folder.status(),
        steps=config.training.steps,
        curves={key: thinned(points) for key, points in curves.items()},
        images=images,
        config={key: shown(value) for key, value in flatten(config).items()},
        sessions=read_sessions(path / "environment.json"),
        results=results,
    )


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
    buffer = io.BytesIO()
    with contextlib.suppress(OSError):  # the trainer may be writing it
        image = Image.open(path)
        image.thumbnail((_MAX_SIDE, _MAX_SIDE))
        image.save(buffer, "WEBP", quality=80)
    return "data:image/webp;base64," + base64.b64encode(buffer.getvalue()).decode()


# the page


def _tag(name: str, *children: object, **attributes: object) -> Html:
    """An element; a trailing _ of an attribute's name is dropped, other _ are hyphens."""
    inner = "".join(c if isinstance(c, Html) else html.escape(str(c)) for c in children)
    given = "".join(
        f' {key.rstrip("_").replace("_", "-")}="{html.escape(str(value))}"'
        for key, value in attributes.items()
    )
    return Html(f"<{name}{given}>" if name in _VOID else f"<{name}{given}>{inner}</{name}>")


def _table(head: Iterable[object], rows: Iterable[Iterable[object]]) -> Html:
    lines = [_tag("tr", *(_tag("td", cell) for cell in row)) for row in rows]
    return _tag("table", _tag("tr", *(_tag("th", cell) for cell in head)), *lines)


def _name(index: int, run: RunSummary) -> Html:
    dot = _tag("span", "\u25cf ", style=f"color:{_COLORS[index % len(_COLORS)]}")
    return _tag("span", dot, run.name)


def _number(value: object) -> str:
    is_number = isinstance(value, (int, float)) and math.isfinite(value)
    return format_number(value) if is_number else "-"  # type: ignore[arg-type]


def _overview(runs: list[RunSummary]) -> Html:
    """One line for each run, the lowest -ELBO first."""
    lines = []
    order = sorted(enumerate(runs), key=lambda pair: pair[1].last("eval/neg_elbo_nats", math.inf))
    for index, run in order:
        logged = run.curves.get("train/loss", [(0, 0.0)])[-1][0]
        step = max(run.status.get("step") or 0, logged)
        figures = (_number(run.last(key)) for key in _FIGURES.values())
        state = run.status.get("status", "unknown")
        lines.append([_name(index, run), state, f"{step:.0f} of {run.steps}", *figures])
    head = ["run", "status", "steps", *_FIGURES]
    return Html(_tag("h1", "vae_dist report") + _table(head, lines))


def _curves(runs: list[RunSummary]) -> Iterator[Html]:
    for title, panels in SECTIONS.items():
        charts = [_chart(panel, series) for panel in panels if (series := _series(panel, runs))]
        if charts:
            yield Html(_tag("h2", title) + _tag("div", *charts, class_="panels"))


def _series(panel: Panel, runs: list[RunSummary]) -> list[Series]:
    """What a panel shows: nothing where all points have one value."""
    series = []
    for index, run in enumerate(runs):
        for position, key in enumerate(panel.keys):
            points = [(x, y) for x, y in run.curves.get(key, []) if y > 0 or not panel.is_log]
            color = _COLORS[(index if len(runs) > 1 else position) % len(_COLORS)]
            if points:
                series.append((f"{run.name} {key}", color, points))
    values = [y for *_, points in series for _, y in points]
    return series if len(values) == 1 or len(set(values)) > 1 else []


def _chart(panel: Panel, series: list[Series]) -> Html:
    level = math.log10 if panel.is_log else float
    steps = [x for *_, points in series for x, _ in points]
    first, last = min(steps), max(steps)
    levels = sorted(level(y) for *_, points in series for _, y in points)
    low, high, upper = levels[0], levels[-1], levels[int(0.97 * (len(levels) - 1))]
    if high - low > 3 * (upper - low) > 0:  # a loss starts far above where it is interesting
        high = upper
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
        label = _number(float(f"{10**tick if panel.is_log else tick:.3g}"))
        parts.append(_tag("line", x1=_LEFT, x2=_WIDTH - _RIGHT, y1=y, y2=y))
        parts.append(_tag("text", label, x=_LEFT - 5, y=y + 4, text_anchor="end"))
    for tick in _ticks(first, last):
        x, _ = place(tick, high)
        parts.append(_tag("text", _number(tick), x=x, y=_HEIGHT - 6, text_anchor="middle"))
    for name, color, points in series:
        places = [place(x, level(y)) for x, y in points]
        line = " ".join(f"{x},{y}" for x, y in places)
        parts.append(_tag("polyline", points=line, stroke=color))
        for (x, y), (cx, cy) in zip(points, places, strict=True):
            title = _tag("title", f"{name}, {panel.x} {_number(x)}: {_number(y)}")
            parts.append(_tag("circle", title, cx=cx, cy=cy, r=4, fill=color))
    svg = _tag("svg", *parts, viewBox=f"0 0 {_WIDTH} {_HEIGHT}", role="img")
    return _tag("div", _tag("h3", panel.title, " ", _tag("small", panel.unit)), svg)


def _ticks(low: float, high: float) -> list[float]:
    """Some three to five round numbers from `low` to `high`."""
    raw = (high - low) / 4 or 1.0
    power = 10.0 ** math.floor(math.log10(raw))
    step = next(m * power for m in (1, 2, 5, 10) if m * power >= 0.999 * raw)
    return [number * step for number in range(math.ceil(low / step), math.floor(high / step) + 1)]


def _images(runs: list[RunSummary]) -> Iterator[Html]:
    """All grids of all runs; the script shows, of each, the newest up to the slider's step."""
    names = list(dict.fromkeys(name for run in runs for name in run.images))
    steps = sorted({step for run in runs for frames in run.images.values() for step, *_ in frames})
    if not steps:
        return
    last = len(steps) - 1
    yield _tag("h2", "Pictures")
    yield _tag("input", type="range", id="time", min=0, max=last, value=last, data_steps=steps)
    for name in names:
        figures = []
        for index, run in enumerate(runs):
            *earlier, (step, caption, uri) = run.images.get(name, []) or [(0, "", "")]
            if uri:
                grids = [_tag("img", src=u, alt=c, data_step=s, hidden="") for s, c, u in earlier]
                grids.append(_tag("img", src=uri, alt=caption, data_step=step))
                text = _tag("figcaption", caption)
                figures.append(_tag("figure", _tag("div", _name(index, run)), *grids, text))
        yield Html(_tag("h3", IMAGES.get(name, name)) + _tag("div", *figures, class_="images"))


def _results(runs: list[RunSummary]) -> Iterator[Html]:
    for index, run in enumerate(runs):
        for one in run.results:
            about = ", ".join(f"{key} {value}" for key, value in one.items() if key != "figures")
            rows = ((key, _number(value)) for key, value in one.get("figures", {}).items())
            yield Html(_tag("h2", "Results of ", _name(index, run)) + _tag("p", about))
            yield _table((), rows)


def _config(runs: list[RunSummary]) -> Iterator[Html]:
    """The keys in which runs differ, or of one run those that are not at their defaults."""
    defaults = {key: shown(field.default) for key, field in keys(TrainConfig).items()}
    compared = [run.config for run in runs] if len(runs) > 1 else [defaults, runs[0].config]
    rows = []
    for key in dict.fromkeys(key for run in runs for key in run.config):
        if len({values.get(key) for values in compared}) > 1:
            rows.append([key, *(run.config.get(key, "-") for run in runs)])
    yield _tag("h2", "Config: what differs " + ("between runs" if runs[1:] else "from defaults"))
    yield _table(["key", *(run.name for run in runs)], rows)


def _sessions(runs: list[RunSummary]) -> Iterator[Html]:
    columns = ("first_step", "started", "host", "processes", "device", "git", "command")
    for index, run in enumerate(runs):
        if run.sessions:
            rows = ([session.get(key, "-") for key in columns] for session in run.sessions)
            yield Html(_tag("h2", "Sessions of ", _name(index, run)) + _table(columns, rows))
