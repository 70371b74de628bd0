#!/usr/bin/env bash
# Trains on this machine: one process per visible GPU, or two CPU processes where there is none.
#   launch/local.sh config=mnist [key=value ...]
#   PROCESSES=4 launch/local.sh config=celeba64         another number; it must divide data.slots
#   SAVE_SECONDS=600 launch/local.sh ...                how long a stop may take to save (default: 240)
#   PYTHON=.venv/bin/python launch/local.sh ...         the Python that has vae_dist (default: python)
set -euo pipefail

python=${PYTHON:-python}
processes=${PROCESSES:-$("$python" -c 'import torch; print(torch.cuda.device_count() or 2)')}

# All four are given so that accelerate asks for no config file; the trainer's keys decide the rest.
options=(--num_machines 1 --num_processes "$processes" --mixed_precision no --dynamo_backend no)
if ((processes > 1)); then
  # Also on the CPU: without --multi_gpu accelerate starts one process and says nothing. Port 0 is
  # any free one, so that two runs on one machine do not meet.
  options+=(--multi_gpu --main_process_port 0)
fi
# Of a SIGUSR1 the launcher would die at once, and it would kill what still saves after 30 s.
export PET_SIGNALS_TO_HANDLE=SIGTERM,SIGINT,SIGHUP,SIGQUIT,SIGUSR1
export TORCH_ELASTIC_SHUTDOWN_TIMEOUT=${SAVE_SECONDS:-240}
exec "$python" -m accelerate.commands.launch "${options[@]}" -m vae_dist.train "$@"
