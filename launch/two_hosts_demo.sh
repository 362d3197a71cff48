#!/usr/bin/env bash
# Train across two hosts on one machine: two network namespaces, joined by one virtual cable and nothing else.
#
#   sudo launch/two_hosts_demo.sh [options of dpp train ...]
#
#     host 0 (10.99.0.1)                                   host 1 (10.99.0.2)
#     stage 0, stage 1   ---- veth pair, the only way ---- stage 2, stage 3
#
# Each host runs multi_node.sh as a real one would. They share the file system. Needs root and `ip` (package iproute2),
# installs nothing, and removes the namespaces at the end, however it ends. Without root or `ip` it says so, starting
# with "skipped:", and exits 0.
#
# Variables:
#   CONFIG          Configuration. Default configs/small/digits.yaml (4 stages).
#   NPROC_PER_NODE  Stages per host; twice this is `stages` of the configuration. Default 2.
#   RUNS            Folder of the run folder `two-hosts` (an old one is replaced). Default runs.
#   MAX_RESTARTS, MASTER_PORT, PYTHON  As in multi_node.sh. PYTHON defaults to .venv/bin/python if that exists.
set -euo pipefail
cd "$(dirname "${BASH_SOURCE[0]}")/.."

skip() {
    echo "skipped: $1"
    exit 0
}

[[ "$(uname)" == Linux ]] || skip "network namespaces exist on Linux only"
[[ "$(id -u)" -eq 0 ]] || skip "making network namespaces needs root; run it with sudo"
command -v ip >/dev/null || skip "the command ip is missing; install the package iproute2"

default_python=python
[[ -x .venv/bin/python ]] && default_python=.venv/bin/python
export PYTHON="${PYTHON:-$default_python}"
RUN_ID="two-hosts-$$-$(date +%s)"
export RUN_ID NNODES=2 NPROC_PER_NODE="${NPROC_PER_NODE:-2}" MASTER_ADDR=10.99.0.1
hosts=("dpp-$$-0" "dpp-$$-1")
cables=("dpp0-$$" "dpp1-$$") # names of interfaces have at most 15 characters
running=()

# shellcheck disable=SC2317 # called by the trap
clean_up() {
    for process in "${running[@]}"; do
        kill "$process" 2>/dev/null || true
    done
    wait
    for host in "${hosts[@]}"; do
        ip netns del "$host" 2>/dev/null || true # the cable goes with them
    done
}
trap clean_up EXIT
trap 'exit 130' INT
trap 'exit 143' TERM

ip netns add "${hosts[0]}" 2>/dev/null || skip "this kernel or container does not allow network namespaces"
ip netns add "${hosts[1]}"
ip link add name "${cables[0]}" netns "${hosts[0]}" type veth peer name "${cables[1]}" netns "${hosts[1]}" 2>/dev/null ||
    skip "this kernel or container does not allow veth pairs"
for k in 0 1; do
    ip -n "${hosts[k]}" addr add "10.99.0.$((k + 1))/24" dev "${cables[k]}"
    ip -n "${hosts[k]}" link set lo up
    ip -n "${hosts[k]}" link set "${cables[k]}" up
done

# One host: its output with its name before every line, its exit status kept.
run_host() {
    local k=$1
    shift
    exec ip netns exec "${hosts[k]}" env NODE_RANK="$k" GLOO_SOCKET_IFNAME="${cables[k]}" \
        launch/multi_node.sh "${CONFIG:-configs/small/digits.yaml}" \
        --set name=two-hosts --set runs="${RUNS:-runs}" --set threads=1 --overwrite "$@" \
        > >(sed -u "s/^/[host $k] /") 2>&1
}

for k in 0 1; do
    run_host "$k" "$@" &
    running+=($!)
done
status=0
for process in "${running[@]}"; do
    wait "$process" || status=$?
done
running=()

for k in 0 1; do
    statistics="/sys/class/net/${cables[k]}/statistics"
    sent="$(ip netns exec "${hosts[k]}" cat "$statistics/tx_bytes")"
    echo "host $k sent $sent bytes over the cable (all of TCP/IP)"
done
exit "$status"
