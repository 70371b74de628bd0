"""A sweep on the stand-in W&B service: what `wandb agent` asks for, and the trials that it gets.

In: the sweep's YAML and the parameters of its trials. Out: commands for agents, in order; a trial
that was preempted (its run said so and ended with an error) comes first, under its own run id.
"""

from __future__ import annotations

import json
from typing import Any

from tests.support.wandb_server import Run, WandbServer


class Sweep:
    def __init__(
        self, server: WandbServer, id: str, yaml: str, trials: dict[str, dict[str, Any]]
    ) -> None:
        """`trials`: run id -> value of each parameter."""
        self.id, self.handed_out = id, list[str]()
        self._server, self._yaml, self._trials = server, yaml, trials
        server.answers |= {
            "SweepWithRuns": self._sweep,
            "CreateAgent": lambda variables: {"createAgent": {"agent": {"id": "QWdlbnQ="}}},
            "Heartbeat": self._heartbeat,
        }

    def _sweep(self, variables: dict[str, Any]) -> dict[str, Any]:
        found = {"id": "U3dlZXA=", "name": self.id, "state": "RUNNING", "method": "grid"}
        sweep = {**found, "config": self._yaml, "runs": {"edges": []}}
        return {"project": {"sweep": sweep}}

    def _heartbeat(self, variables: dict[str, Any]) -> dict[str, Any]:
        command = {} if json.loads(variables["runState"]) else self._next()
        commands = [command] if command else []
        answer = {"agent": {"id": variables["id"]}, "commands": json.dumps(commands)}
        return {"agentHeartbeat": answer}

    def _next(self) -> dict[str, Any]:
        runs = self._server.runs
        preempted = [run_id for run_id in self._trials if is_preempted(runs.get(run_id))]
        fresh = [run_id for run_id in self._trials if run_id not in self.handed_out]
        for kind, ids in (("resume", preempted), ("run", fresh)):
            for run_id in ids:
                self.handed_out.append(run_id)
                if run_id in runs:
                    runs[run_id].preempting = runs[run_id].complete = False
                values = {key: {"value": value} for key, value in self._trials[run_id].items()}
                return {"id": run_id, "type": kind, "run_id": run_id, "program": "", "args": values}
        return {"id": "end", "type": "exit"}


def is_preempted(run: Run | None) -> bool:
    return run is not None and run.preempting and run.complete and bool(run.exit_code)
