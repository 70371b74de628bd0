"""What launchers ask for through the environment, as far as it decides how processes run.

accelerate and torchrun set variables for the processes that they start; what vae_dist does not do
is refused by name. No torch is imported.
"""

from __future__ import annotations

import os

LAUNCHER_VARIABLES = ("TORCHELASTIC_RUN_ID", "ACCELERATE_MIXED_PRECISION")  # torchrun, accelerate
TRUE = ("1", "true", "yes")


def launcher_problems() -> list[str]:
    """What the launcher offers and vae_dist does not use."""
    asked = os.environ.get
    accumulation = asked("ACCELERATE_GRADIENT_ACCUMULATION_STEPS", "1")
    compiler = asked("ACCELERATE_DYNAMO_BACKEND", "no")
    world, on_cpu = int(asked("WORLD_SIZE", "1")), asked("ACCELERATE_USE_CPU", "").lower() == "true"
    missing = [key for key in ("RANK", "MASTER_ADDR", "MASTER_PORT") if key not in os.environ]
    problems = {
        f"the launcher asks for gradient_accumulation_steps={accumulation}; set "
        "training.microbatch_size instead": accumulation not in ("1", "auto"),
        f"the launcher asks for dynamo_backend={compiler}; leave it out and set runtime.compile": (
            compiler.lower() not in ("", "no")
        ),
        f"WORLD_SIZE={world} is set but {', '.join(missing)} not, so each would train alone; start "
        f"with `accelerate launch --multi_gpu --num_processes {world} -m vae_dist.train ...` or "
        "unset WORLD_SIZE": world > 1 and bool(missing),
        "accelerate was asked for several processes on CPUs (MULTI_CPU), of which it starts one; "
        "start with `torchrun --nproc_per_node N -m vae_dist.train ...`, or ask for one": (
            on_cpu and "MASTER_PORT" in os.environ and "WORLD_SIZE" not in os.environ
        ),
    }
    for name in ("DEEPSPEED", "FSDP", "MEGATRON_LM"):
        problems[
            f"the launcher sets ACCELERATE_USE_{name}; launch without it (vae_dist trains with "
            "DDP; instead of --use_fsdp set runtime.parallel=fsdp)"
        ] = asked(f"ACCELERATE_USE_{name}", "").lower() in TRUE
    return [sentence for sentence, is_so in problems.items() if is_so]


def precision_problem(precision: str) -> str:
    """Why the launcher's precision is none for a run of this one; empty where it is."""
    asked = os.environ.get("ACCELERATE_MIXED_PRECISION", "no")
    if asked in ("no", precision):
        return ""
    remedy = f", or set training.precision={asked}" if asked in ("bf16", "fp16") else ""
    return (
        f"the launcher asks for mixed precision {asked} but training.precision={precision}; "
        f"leave the launcher's out{remedy}"
    )


def threads_of_user() -> int:
    """OMP_NUM_THREADS where no launcher has set it, which would be 1; 0: the user names none."""
    text = os.environ.get("OMP_NUM_THREADS", "").partition(",")[0].strip()
    was_launched = any(name in os.environ for name in LAUNCHER_VARIABLES)
    return int(text) if text.isdecimal() and not was_launched else 0
