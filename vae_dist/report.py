"""One page that shows a run: `python -m vae_dist.report run=runs/mnist [out=FILE]`.

Several runs side by side: `run=runs/a,runs/b`. The page is one file without links to anywhere.
"""

from __future__ import annotations

import sys
from pathlib import Path

from vae_dist.cli import run_command, writing
from vae_dist.config.commands import ReportCommand
from vae_dist.config.errors import ConfigError

USAGE = "python -m vae_dist.report run=FOLDER[,FOLDER...] [key=value ...]"
INTRO = "Write one HTML page of curves, pictures, config and results; open it in any browser."


def report(command: ReportCommand) -> None:
    from vae_dist.files import write_durably
    from vae_dist.tracking.report import write_report

    folders = [Path(name.strip()) for name in str(command.run).split(",") if name.strip()]
    if not folders:
        raise ConfigError("run= names no folder; give one, for example run=runs/mnist")
    default = folders[0] / "report.html" if len(folders) == 1 else Path("report.html")
    out = Path(command.out) if command.out else default
    page = write_report(folders).encode()
    with writing(out):
        out.parent.mkdir(parents=True, exist_ok=True)
        write_durably(out, page)
    print(f"report of {', '.join(map(str, folders))}: {out} ({len(page) / 1e6:.1f} MB)")


def main(argv: list[str] | None = None) -> int:
    return run_command(ReportCommand, report, argv, usage=USAGE, intro=INTRO)


if __name__ == "__main__":
    sys.exit(main())
