"""A sweep of one trial on the stand-in W&B service, as `wandb agent` asks for it."""

import json


def answer_agents(server, yaml, trial, values):
    """`yaml`: the sweep's; `values`: of the trial's parameters. Returns the list of how the trial
    was handed out: "run", then "resume" each time that it was preempted (it said so and failed)."""
    starts = []
    sweep = {"id": "U3dlZXA=", "name": "sweep", "state": "RUNNING", "method": "grid"}
    sweep |= {"config": yaml, "runs": {"edges": []}}
    arguments = {key: {"value": value} for key, value in values.items()}

    def next_command():
        run = server.runs.get(trial)
        if run is None and not starts:
            starts.append("run")
        elif run is not None and run.complete and run.exit_code and run.preempting:
            run.preempting = run.complete = False
            starts.append("resume")
        else:
            return {"id": "end", "type": "exit"}
        return {"id": trial, "type": starts[-1], "run_id": trial, "program": "", "args": arguments}

    def heartbeat(variables):
        commands = [] if json.loads(variables["runState"]) else [next_command()]
        answer = {"agent": {"id": variables["id"]}, "commands": json.dumps(commands)}
        return {"agentHeartbeat": answer}

    server.answers |= {
        "SweepWithRuns": lambda variables: {"project": {"sweep": sweep}},
        "CreateAgent": lambda variables: {"createAgent": {"agent": {"id": "QWdlbnQ="}}},
        "Heartbeat": heartbeat,
    }
    return starts
