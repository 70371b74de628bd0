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

USAGE = "python -m vae_dist.dashboard [project=NAME] [key=value ...]"
INTRO = "Save the W&B workspace of a project: sections, panels and axes for vae_dist's metrics."

STEP_KEY = "trainer/step"


def dashboard(command: DashboardCommand) -> None:
    try:
        import wandb
        import wandb_workspaces.workspaces as ws
    except ImportError:
        raise ConfigError(
            "the dashboard needs the package wandb-workspaces: pip install 'vae_dist[dashboard]'"
        ) from None
    try:
        if not wandb.login(prompt=False, verify=False):
            raise ConfigError("nobody is logged in: run `wandb login` or set WANDB_API_KEY")
        entity = command.entity or str(wandb.Api().default_entity)
        workspace = build(ws, entity=entity, project=command.project, name=command.name)
        workspace.save()
    except ConfigError:
        raise
    except Exception as error:  # the service and its client raise errors of many kinds
        raise ConfigError(
            f"project={command.project}: the workspace cannot be saved "
            f"({type(error).__name__}: {error}); check the login, entity= and the network"
        ) from None
    print(f"workspace {command.name!r} of {entity}/{command.project}: {workspace.url}")


def build(ws: Any, *, entity: str, project: str, name: str) -> Any:
    """The workspace, not saved; `ws` is the module wandb_workspaces.workspaces."""
    import wandb_workspaces.reports.v2 as wr

    def line(title: str, *keys: str, log: bool = False) -> Any:
        return wr.LinePlot(title=title, x=STEP_KEY, y=list(keys), log_y=log or None)

    def pictures(title: str, name: str) -> Any:
        return wr.MediaBrowser(title=title, media_keys=[f"images/{name}"], num_columns=1)

    def section(name: str, *panels: Any) -> Any:
        return ws.Section(name=name, panels=list(panels), is_open=True)

    rate_distortion = wr.ScatterPlot(
        title="Rate and distortion (validation)",
        x=wr.SummaryMetric("eval/rate_nats"),
        y=wr.SummaryMetric("eval/distortion_nats"),
    )
    return ws.Workspace(
        entity=entity,
        project=project,
        name=name,
        settings=ws.WorkspaceSettings(x_axis=STEP_KEY),
        sections=[
            section(
                "Pictures",
                pictures("Prior samples", "samples"),
                pictures("Reconstructions", "reconstructions"),
                pictures("Interpolations", "interpolations"),
                pictures("Traversals", "traversals"),
                pictures("By class", "by_class"),
                pictures("Worst reconstructions", "worst"),
            ),
            section(
                "Learning",
                line("-ELBO (nats/image)", "train/neg_elbo_nats", "eval/neg_elbo_nats"),
                line("-IWAE bound (nats/image)", "train/neg_iwae_nats"),
                line("Bits/dim", "train/bits_per_dim", "eval/bits_per_dim"),
                line("Distortion (nats/image)", "train/distortion_nats", "eval/distortion_nats"),
                line("Rate (nats/image)", "train/rate_nats", "eval/rate_nats"),
                line("Beta", "train/beta"),
                rate_distortion,
            ),
            section(
                "Latents",
                line("Active units", "latent/active_units"),
                line("Mutual information (nats)", "latent/mutual_information_nats"),
                line("Posterior variance", "latent/posterior_variance"),
                line("Rate per unit (nats)", "latent/kl_nats_per_unit"),
            ),
            section(
                "Optimizer",
                line("Learning rate", "optim/lr"),
                line("Gradient norm", "optim/grad_norm", log=True),
                line("Update / weights", "optim/update_ratio", log=True),
                line("Skipped steps", "optim/skipped_steps"),
                line("Loss scale", "optim/loss_scale", log=True),
            ),
            section(
                "Machine",
                line("Images/s", "time/images_per_second"),
                line("Images/s of a device", "time/images_per_second_per_device"),
                line("Waiting for data (fraction)", "time/data_wait_fraction"),
                line("Seconds of a step", "time/step_seconds"),
                line("Model flops utilisation", "time/mfu"),
                line("Memory (GiB)", "system/memory_gib", "system/device_memory_gib"),
                line("Skipped samples", "data/skipped_samples"),
            ),
        ],
    )


def main(argv: list[str] | None = None) -> int:
    return run_command(DashboardCommand, dashboard, argv, usage=USAGE, intro=INTRO)


if __name__ == "__main__":
    sys.exit(main())
