"""A sweep on the stand-in W&B service: what `wandb agent` asks for, and the trials that it gets.

In: the sweep's YAML and the parameters of its trials. Out: commands for agents, in order; a trial
that was preempted (its run said so and ended with an error) comes first, under its own run id.
"""

from __future__ import annotations

import json
from typing import Any

from tests.support.wandb_server import WandbServer


class Sweep:
    def __init__(
        self, server: WandbServer, id: str, yaml: str, trials: dict[str, dict[str, Any]]
    ) -> None:
        """`trials`: run id -> value of each parameter."""
        self.handed_out = list[str]()
        self._server, self._trials = server, trials
        found = {"id": "U3dlZXA=", "name": id, "state": "RUNNING", "method": "grid"}
        sweep = {**found, "config": yaml, "runs": {"edges": []}}
        server.answers |= {
            "SweepWithRuns": lambda variables: {"project": {"sweep": sweep}},
            "CreateAgent": lambda variables: {"createAgent": {"agent": {"id": "QWdlbnQ="}}},
            "Heartbeat": self._heartbeat,
        }

    def _heartbeat(self, variables: dict[str, Any]) -> dict[str, Any]:
        commands = [] if json.loads(variables["runState"]) else [self._next()]
        answer = {"agent": {"id": variables["id"]}, "commands": json.dumps(commands)}
        return {"agentHeartbeat": answer}

    def _next(self) -> dict[str, Any]:
        runs = self._server.runs
        ended = {run.id: run for run in runs.values() if run.complete and run.exit_code}
        preempted = [run_id for run_id, run in ended.items() if run.preempting]
        fresh = [run_id for run_id in self._trials if run_id not in self.handed_out]
        for kind, ids in (("resume", preempted), ("run", fresh)):
            for run_id in ids[:1]:
                self.handed_out.append(run_id)
                if run_id in runs:
                    runs[run_id].preempting = runs[run_id].complete = False
                values = {key: {"value": value} for key, value in self._trials[run_id].items()}
                return {"id": run_id, "type": kind, "run_id": run_id, "program": "", "args": values}
        return {"id": "end", "type": "exit"}
