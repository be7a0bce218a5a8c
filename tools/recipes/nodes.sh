#!/usr/bin/env bash
# Training on several machines: run this on every one of them, with the same variables.
#
#     NODES=2 HEAD=node1:29400 JOB=tag-7b bash tools/recipes/nodes.sh train_grpo.py --data ... --adapter ... --out ...
#
# NODES       how many machines
# HEAD        name and free port of one of them, where all of them meet
# JOB         a name of this run, the same on all machines
# GPUS        processes on each machine (default 4)
# RESTARTS    how often all processes are started again after one has died (default 3); they resume by themselves
# GRACE       seconds between a signal and SIGKILL, in which a step is finished and saved (default 120)
# IFNAME      network interface, e.g. eth0, for machines whose own name leads to 127.0.1.1 or to a slow network
#
# Weights are sharded within each machine and replicated across them (--shard hybrid): parameters travel over NVLink,
# only gradients of what is trained over the network. A flag given here wins, e.g. --shard full. --out has to be on a
# disk that all machines share. Another number of machines or GPUs resumes the same run, with the same global batch.
# SIGTERM or SIGUSR1 to torchrun saves and ends the run on all machines.
set -euo pipefail
root="$(cd "$(dirname "${BASH_SOURCE[0]}")/../.." && pwd)"
script="${1:?which script: train_sft.py or train_grpo.py}"
shift

# Each start meets in a store of its own: in one that is kept, a process can find the address of one that was killed, and
# machines may count their restarts differently.
export TORCH_DISABLE_SHARE_RDZV_TCP_STORE=1
[ -z "${IFNAME:-}" ] || export GLOO_SOCKET_IFNAME="$IFNAME" NCCL_SOCKET_IFNAME="$IFNAME"
# No two passes have the same shapes: memory in segments that grow does not fall to pieces over a run.
export PYTORCH_ALLOC_CONF="${PYTORCH_ALLOC_CONF:-expandable_segments:True}"
exec torchrun --nnodes "${NODES:?is not set: how many machines (see the head of this script)}" \
    --nproc-per-node "${GPUS:-4}" --max-restarts "${RESTARTS:-3}" \
    --rdzv-backend c10d --rdzv-endpoint "${HEAD:?is not set: name:port of one machine}" \
    --rdzv-id "${JOB:?is not set: a name of this run}" \
    --signals-to-handle SIGTERM,SIGINT,SIGHUP,SIGQUIT,SIGUSR1 --shutdown-timeout "${GRACE:-120}" \
    "$root/$script" --shard hybrid "$@"
