#!/usr/bin/env bash
# Train on several machines with torchrun: run this on each of them, with its own NODE_RANK.
#
#   NNODES=2 NODE_RANK=0 NPROC_PER_NODE=2 MASTER_ADDR=10.0.0.1 launch/multi_node.sh CONFIG [options of dpp train ...]
#
# Stage k runs as rank k; ranks go by NODE_RANK, so machine 0 has the first stages, machine 1 the next, and so on, and
# only neighbouring machines exchange activations. Machine 0 reads the data. All machines need the same configuration
# and code, and one run folder (`runs`) on a file system that they share: a run refuses to train where a machine does not
# see what machine 0 writes there.
#
# Variables:
#   NNODES          Required. Number of machines.
#   NODE_RANK       Required. This machine's place, 0 .. NNODES-1.
#   NPROC_PER_NODE  Required. Processes on every machine; NNODES * NPROC_PER_NODE = `stages` of the configuration.
#   MASTER_ADDR     Required. Address of machine 0 that all machines can reach.
#   MASTER_PORT     A free port of machine 0. Default: one that follows from RUN_ID, so that two launches do not meet at
#                   one port; without RUN_ID 29400.
#   MAX_RESTARTS    How often a failed run is started again, from its last checkpoint. Default 0.
#   RUN_ID          Required with MAX_RESTARTS. A name of this launch, the same on all machines and new every time: by it
#                   restarted ranks know the run folder of their own launch.
#   PYTHON          The Python that has decoupled_pp. Default python.
#
# Read by the transports, not by this script; set them where the host name does not lead to the right network:
#   GLOO_SOCKET_IFNAME, NCCL_SOCKET_IFNAME  Network interface to use, e.g. eth0.
set -euo pipefail

refuse() {
    echo "multi_node.sh: $1" >&2
    exit 2
}

[[ $# -ge 1 ]] || refuse "no configuration given; usage: NNODES=2 NODE_RANK=0 ... launch/multi_node.sh CONFIG [options]"
for name in NNODES NODE_RANK NPROC_PER_NODE MASTER_ADDR; do
    [[ -n "${!name:-}" ]] || refuse "$name is not set; see the top of this file"
done
for name in NNODES NODE_RANK NPROC_PER_NODE; do
    [[ "${!name}" =~ ^[0-9]+$ ]] || refuse "$name is '${!name}'; it must be a whole number"
done
((NODE_RANK < NNODES)) || refuse "NODE_RANK is $NODE_RANK; with NNODES $NNODES it must be 0 .. $((NNODES - 1))"
[[ "${MAX_RESTARTS:-0}" == 0 || -n "${RUN_ID:-}" ]] || refuse "RUN_ID is not set; MAX_RESTARTS needs it, see the top of this file"
if [[ -n "${RUN_ID:-}" && -z "${MASTER_PORT:-}" ]]; then
    read -r checksum _ < <(cksum <<<"$RUN_ID")
    MASTER_PORT=$((10000 + checksum % 20000)) # below the ports that systems hand out by themselves
fi
((NPROC_PER_NODE > 0)) || refuse "NPROC_PER_NODE is 0; it must be at least 1"

# As torchrun would, but without its warning; the second variable says that nobody asked for 1 thread.
[[ -n "${OMP_NUM_THREADS:-}" ]] || export OMP_NUM_THREADS=1 DPP_DEFAULT_THREADS=1
exec "${PYTHON:-python}" -m torch.distributed.run \
    --nnodes "$NNODES" \
    --node-rank "$NODE_RANK" \
    --nproc-per-node "$NPROC_PER_NODE" \
    --master-addr "$MASTER_ADDR" \
    --master-port "${MASTER_PORT:-29400}" \
    --rdzv-id "${RUN_ID:-none}" \
    --max-restarts "${MAX_RESTARTS:-0}" \
    -m decoupled_pp train "$@"
