"""What launchers ask for through the environment, as far as it decides how processes run.

accelerate and torchrun set variables for the processes that they start; what vae_dist does not do
is refused by name. No torch is imported.
"""

from __future__ import annotations

import os

LAUNCHER_VARIABLES = ("TORCHELASTIC_RUN_ID", "ACCELERATE_MIXED_PRECISION")  # torchrun, accelerate
NOTHING = ("", "no", "false", "0", "1", "auto")  # values that ask for nothing
REMEDIES = {
    "ACCELERATE_GRADIENT_ACCUMULATION_STEPS": "training.microbatch_size",
    "ACCELERATE_DYNAMO_BACKEND": "runtime.compile",
    **dict.fromkeys(
        (f"ACCELERATE_USE_{name}" for name in ("DEEPSPEED", "FSDP", "MEGATRON_LM")),
        "runtime.parallel=fsdp (instead of --use_fsdp)",
    ),
}


def launcher_problems() -> list[str]:
    """What the launcher offers and vae_dist does not use."""
    found = [
        f"the launcher sets {name}={value}; launch without it and set {remedy}"
        for name, remedy in REMEDIES.items()
        if (value := os.environ.get(name, "")).lower() not in NOTHING
    ]
    world = int(os.environ.get("WORLD_SIZE", "1"))
    missing = [key for key in ("RANK", "MASTER_ADDR", "MASTER_PORT") if key not in os.environ]
    if world > 1 and missing:
        found.append(
            f"WORLD_SIZE={world} is set but {', '.join(missing)} not, so each would train alone; "
            f"start with `accelerate launch --multi_gpu --num_processes {world} -m vae_dist.train "
            "...` or unset WORLD_SIZE"
        )
    on_cpu = os.environ.get("ACCELERATE_USE_CPU", "").lower() == "true"
    if on_cpu and "MASTER_PORT" in os.environ and "WORLD_SIZE" not in os.environ:
        found.append(
            "accelerate was asked for several processes on CPUs (MULTI_CPU), of which it starts "
            "one; start with `torchrun --nproc_per_node N -m vae_dist.train ...`, or ask for one"
        )
    return found


def precision_problem(precision: str) -> str:
    """Why the launcher's precision is none for a run of this one; empty where it is."""
    asked = os.environ.get("ACCELERATE_MIXED_PRECISION", "no")
    if asked in ("no", precision):
        return ""
    return (
        f"the launcher asks for mixed precision {asked} but training.precision={precision}; leave "
        "the launcher's out, or set the same"
    )


def threads_of_user() -> int:
    """OMP_NUM_THREADS where no launcher has set it, which would be 1; 0: the user names none."""
    text = os.environ.get("OMP_NUM_THREADS", "").partition(",")[0].strip()
    was_launched = any(name in os.environ for name in LAUNCHER_VARIABLES)
    return int(text) if text.isdecimal() and not was_launched else 0
