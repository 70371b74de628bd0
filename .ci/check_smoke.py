"""The smoke run learned: its last evaluation, its pictures and its checkpoint are there.

In: the run folder and the largest allowed `eval/neg_elbo_nats` (nats per image). Out: one line with
the figures, exit code 1 with the reason when something is missing or too large.
"""

from __future__ import annotations

import json
import sys
from pathlib import Path


def problems(run: Path, limit_nats: float) -> list[str]:
    """What the run folder lacks."""
    found = []
    log = run / "log.jsonl"
    rows = [json.loads(line) for line in log.read_text().splitlines()] if log.is_file() else []
    values = [row["eval/neg_elbo_nats"] for row in rows if "eval/neg_elbo_nats" in row]
    if not values:
        found.append(f"{log}: no row has eval/neg_elbo_nats")
    elif not values[-1] <= limit_nats:  # also refuses NaN
        found.append(
            f"eval/neg_elbo_nats is {values[-1]} in the last evaluation, not <= {limit_nats}"
        )
    else:
        print(f"eval/neg_elbo_nats {values[-1]:.2f} (limit {limit_nats:g}), {len(rows)} rows")
    pictures = [path for path in (run / "images").rglob("*.png") if path.stat().st_size > 100]
    if not pictures:
        found.append(f"{run / 'images'}: no pictures")
    if not (run / "checkpoints" / "latest").exists():
        found.append(f"{run / 'checkpoints'}: no latest checkpoint")
    return found


def main() -> int:
    found = problems(Path(sys.argv[1]), float(sys.argv[2]))
    if found:
        print("\n".join(found), file=sys.stderr)
    return bool(found)


if __name__ == "__main__":
    sys.exit(main())
