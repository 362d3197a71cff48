#!/usr/bin/env bash
# Train on one machine with torchrun: one process per stage.
#
#   NPROC_PER_NODE=4 launch/one_node.sh CONFIG [options of dpp train ...]
#
# Variables:
#   NPROC_PER_NODE  Required. Processes to start; equal to `stages` of the configuration.
#   MAX_RESTARTS    How often a failed run is started again, from its last checkpoint. Default 0.
#   PYTHON          The Python that has decoupled_pp. Default python.
set -euo pipefail

refuse() {
    echo "one_node.sh: $1" >&2
    exit 2
}

[[ $# -ge 1 ]] || refuse "no configuration given; usage: NPROC_PER_NODE=4 launch/one_node.sh CONFIG [options]"
[[ -n "${NPROC_PER_NODE:-}" ]] || refuse "NPROC_PER_NODE is not set; set it to the number of stages"
[[ "$NPROC_PER_NODE" =~ ^[1-9][0-9]*$ ]] || refuse "NPROC_PER_NODE is '$NPROC_PER_NODE'; it must be a whole number, at least 1"

# As torchrun would, but without its warning; the second variable says that nobody asked for 1 thread.
[[ -n "${OMP_NUM_THREADS:-}" ]] || export OMP_NUM_THREADS=1 DPP_DEFAULT_THREADS=1
exec "${PYTHON:-python}" -m torch.distributed.run \
    --standalone \
    --nproc-per-node "$NPROC_PER_NODE" \
    --max-restarts "${MAX_RESTARTS:-0}" \
    -m decoupled_pp train "$@"
