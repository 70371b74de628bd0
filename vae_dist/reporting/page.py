"""One HTML page from the stories of one or several runs.

In: stories. Out: HTML that carries its style, its script, its pictures and its data, asks for
nothing from anywhere (its content security policy forbids it), and opens from a file.
"""

from __future__ import annotations

import html
import json
from dataclasses import asdict
from importlib import resources
from typing import Any

from vae_dist.reporting.collect import PICTURES, Story

# Panels of curves: title, unit, keys, whether the axis is logarithmic. A panel without data is
# left out. Keys of training come before those of evaluation, which are drawn over them.
SECTIONS: dict[str, list[tuple[str, str, list[str], bool]]] = {
    "Learning": [
        ("Negative ELBO", "nats/image", ["train/neg_elbo_nats", "eval/neg_elbo_nats"], False),
        ("Importance-weighted bound", "nats/image, negative", ["train/neg_iwae_nats"], False),
        ("Bits per dim", "bits/dim", ["train/bits_per_dim", "eval/bits_per_dim"], False),
        ("Distortion", "nats/image", ["train/distortion_nats", "eval/distortion_nats"], False),
        ("Rate", "nats/image", ["train/rate_nats", "eval/rate_nats"], False),
    ],
    "Latents": [
        ("Active units", "units", ["latent/active_units"], False),
        (
            "Mutual information",
            "nats, estimated from below",
            ["latent/mutual_information_nats"],
            False,
        ),
        ("Posterior variance", "prior = 1", ["latent/posterior_variance"], False),
        ("Beta", "", ["train/beta"], False),
    ],
    "Optimizer": [
        ("Learning rate", "", ["optim/lr"], False),
        ("Gradient norm", "before clipping", ["optim/grad_norm"], True),
        ("Update / weights", "ratio of norms", ["optim/update_ratio"], True),
        ("Skipped steps", "steps", ["optim/skipped_steps"], False),
        ("Loss scale", "", ["optim/loss_scale"], True),
    ],
    "Machine": [
        ("Throughput", "images/s", ["time/images_per_second"], False),
        ("Waiting for data", "fraction of time", ["time/data_wait_fraction"], False),
        ("Step time", "seconds", ["time/step_seconds"], False),
        ("Model flops utilisation", "of peak", ["time/mfu"], False),
        ("Host memory", "GiB", ["system/memory_gib"], False),
        ("Device memory", "GiB, peak", ["system/device_memory_gib"], False),
        ("Skipped samples", "samples", ["data/skipped_samples"], False),
    ],
}
_CONSTANT_AT_ZERO_IS_LEFT_OUT = {"Skipped steps", "Skipped samples"}
_CONSTANT_IS_LEFT_OUT = {"Beta"}

_PAGE = """<!doctype html>
<html lang="en">
<head>
<meta charset="utf-8">
<meta name="viewport" content="width=device-width, initial-scale=1">
<meta http-equiv="Content-Security-Policy" content="default-src 'none'; img-src data:;
 style-src 'unsafe-inline'; script-src 'unsafe-inline'">
<title>{title}</title>
<link rel="icon" href="data:,">
<style>
{style}
</style>
</head>
<body>
<main id="page"><noscript>This page draws its curves with JavaScript.</noscript></main>
<script type="application/json" id="data">{data}</script>
<script>
{script}
</script>
</body>
</html>
"""


def render(stories: list[Story]) -> str:
    data = {
        "runs": [_plain(story) for story in stories],
        "sections": {
            name: panels for name, found in SECTIONS.items() if (panels := _panels(found, stories))
        },
        "pictures": {name: list(words) for name, words in PICTURES.items()},
    }
    text = json.dumps(data, separators=(",", ":"), allow_nan=False)
    assets = resources.files("vae_dist.reporting")
    return _PAGE.format(
        title=html.escape(", ".join(story.name for story in stories)) + " - vae_dist report",
        style=(assets / "page.css").read_text(encoding="utf-8"),
        # functions of both are hoisted; page.js ends with the calls
        script="\n".join(
            (assets / name).read_text(encoding="utf-8") for name in ("curves.js", "page.js")
        ),
        # "</script>" in a value must not end the element; JSON reads \u003c as <
        data=text.replace("<", "\\u003c"),
    )


def _plain(story: Story) -> dict[str, Any]:
    record = asdict(story)
    record["pictures"] = {
        name: [frame._asdict() for frame in frames] for name, frames in story.pictures.items()
    }
    return record


def _panels(
    panels: list[tuple[str, str, list[str], bool]], stories: list[Story]
) -> list[dict[str, Any]]:
    found = []
    for title, unit, keys, is_log in panels:
        values = [v for s in stories for key in keys for _, v in s.curves.get(key, [])]
        is_flat = len(set(values)) < 2
        if not values or (is_flat and title in _CONSTANT_IS_LEFT_OUT):
            continue
        if title in _CONSTANT_AT_ZERO_IS_LEFT_OUT and not any(values):
            continue
        found.append({"title": title, "unit": unit, "keys": keys, "log": is_log})
    return found
