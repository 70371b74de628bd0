"""The W&B workspace of a project as code: `python -m vae_dist.dashboard [project=vae_dist]`.

Saves a view of sections for pictures, learning, latents, optimizer and machine, on the trainer's
own step axis. Needs the extra `dashboard` and a W&B login.
"""

from __future__ import annotations

import sys
from typing import Any

from vae_dist.cli import run_command
from vae_dist.config.commands import DashboardCommand
from vae_dist.config.errors import ConfigError
from vae_dist.tracking.metrics import IMAGES, SECTIONS, WANDB_STEP, Panel

USAGE = "python -m vae_dist.dashboard [project=NAME] [key=value ...]"
INTRO = "Save the W&B workspace of a project: sections, panels and axes for vae_dist's metrics."


def dashboard(command: DashboardCommand) -> None:
    try:
        import wandb
        import wandb_workspaces.workspaces as ws
    except ImportError:
        raise ConfigError(
            "the dashboard needs the package wandb-workspaces: pip install 'vae_dist[dashboard]'"
        ) from None
    if not wandb.login(prompt=False, verify=False):
        raise ConfigError("there is no login: run `wandb login` or set WANDB_API_KEY")
    try:
        entity = command.entity or str(wandb.Api().default_entity)
        workspace = build(ws, entity=entity, project=command.project, name=command.name)
        workspace.save()
    except Exception as error:  # the service and its client raise errors of many kinds
        raise ConfigError(
            f"project={command.project}: the workspace cannot be saved "
            f"({type(error).__name__}: {error}); check the login, entity= and the network"
        ) from None
    print(f"workspace {command.name!r} of {entity}/{command.project}: {workspace.url}")


def build(ws: Any, *, entity: str, project: str, name: str) -> Any:
    """The workspace, not saved; `ws` is the module wandb_workspaces.workspaces."""
    import wandb_workspaces.reports.v2 as wr

    def line(panel: Panel) -> Any:
        title = f"{panel.title} ({panel.unit})" if panel.unit else panel.title
        return wr.LinePlot(title=title, x=WANDB_STEP, y=list(panel.keys))

    sections = {
        "Pictures": [
            wr.MediaBrowser(title=title, media_keys=[f"images/{name}"], num_columns=1)
            for name, title in IMAGES.items()
        ],
        **{name: [line(panel) for panel in panels] for name, panels in SECTIONS.items()},
    }
    rate, distortion = (wr.SummaryMetric(f"eval/{key}_nats") for key in ("rate", "distortion"))
    sections["Learning"].append(wr.ScatterPlot(title="Rate and distortion", x=rate, y=distortion))
    return ws.Workspace(
        entity=entity,
        project=project,
        name=name,
        settings=ws.WorkspaceSettings(x_axis=WANDB_STEP),
        sections=[ws.Section(name=name, panels=p, is_open=True) for name, p in sections.items()],
    )


def main(argv: list[str] | None = None) -> int:
    return run_command(DashboardCommand, dashboard, argv, usage=USAGE, intro=INTRO)


if __name__ == "__main__":
    sys.exit(main())
