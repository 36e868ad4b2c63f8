#!/usr/bin/env bash
# Runs one job on the nodes of a Slurm allocation: a Ray node on every Slurm node, the head on the first.
#   sbatch cluster/slurm.sh jobs.pretrain configs/text/pgm_8_8.yaml cluster.workers=8 cluster.storage=/shared/runs
# Submit it in the root of the repository, which must lie, like `cluster.storage`, in a folder that all nodes see.
# Lines marked "yours" hold what only you can know.
#SBATCH --job-name=partition-pipeline
#SBATCH --nodes=2 # yours
#SBATCH --gpus-per-node=4 # yours
#SBATCH --cpus-per-task=32 # yours: all CPUs of a node's share
#SBATCH --time=24:00:00 # yours
#SBATCH --ntasks-per-node=1
#SBATCH --output=slurm-%j.log
#SBATCH --open-mode=append
#SBATCH --signal=B:TERM@600
set -euo pipefail

python=${PIPELINE_PYTHON:-.venv/bin/python} # of an environment that all nodes see
(($# > 0)) || { echo "expected a job, such as: sbatch cluster/slurm.sh jobs.pretrain CONFIG.yaml" >&2 && exit 2; }

# Everyone on the network who has the token can run code in the cluster (cluster/README.md, step 1).
export RAY_AUTH_MODE=token
ray=("$python" -m ray.scripts.scripts)
[[ -s ~/.ray/auth_token ]] || "${ray[@]}" get-auth-token --generate >/dev/null

mapfile -t nodes < <(scontrol show hostnames "$SLURM_JOB_NODELIST")
export SRUN_CPUS_PER_TASK=${SLURM_CPUS_PER_TASK:-1} # newer versions of srun do not take it from the job
address=$(hostname -I | cut -d' ' -f1) # this script runs on the first node
port=$((20000 + SLURM_JOB_ID % 10000 * 3)) # three ports of this job's own, since other jobs may share the node
export RAY_ADDRESS=$address:$port
trap 'kill $(jobs -p) 2>/dev/null || true' EXIT

# Workers on all nodes write to MLflow, so a server must be there: yours, or one for the time of this job.
if [[ -z ${MLFLOW_TRACKING_URI:-} ]]; then
  folder=$(realpath -m "${PIPELINE_MLFLOW:-runs/mlflow}")
  mkdir -p "$folder"
  export MLFLOW_TRACKING_URI=http://$address:$((port + 1))
  "$python" -m mlflow server --host "$address" --port $((port + 1)) --allowed-hosts "$address:$((port + 1))" --workers 1 \
    --backend-store-uri "sqlite:///$folder/mlflow.db" --artifacts-destination "$folder/artifacts" >"$folder/server.log" 2>&1 &
fi

# Ray counts the CPUs and GPUs of the machine, of which the job may have only a share.
share=(--num-cpus="$SRUN_CPUS_PER_TASK" --num-gpus="${SLURM_GPUS_ON_NODE:-0}" --disable-usage-stats --block)
srun --nodes=1 --ntasks=1 --nodelist="${nodes[0]}" --overlap "${ray[@]}" start --head \
  --node-ip-address="$address" --port="$port" --dashboard-host=127.0.0.1 --dashboard-port=$((port + 2)) \
  --temp-dir="/tmp/ray-$SLURM_JOB_ID" "${share[@]}" &
"$python" cluster/wait_for_nodes.py 1
workers=$((${#nodes[@]} - 1))
if ((workers > 0)); then
  srun --nodes=$workers --ntasks=$workers --exclude="${nodes[0]}" --overlap \
    "${ray[@]}" start --address="$RAY_ADDRESS" "${share[@]}" &
  "$python" cluster/wait_for_nodes.py "${#nodes[@]}"
fi

if [[ -n ${folder:-} ]]; then
  timeout 120 bash -c "until (exec 3<>/dev/tcp/$address/$((port + 1))) 2>/dev/null; do sleep 1; done"
fi

# Ten minutes before the time limit Slurm sends TERM: the job writes a checkpoint and ends, and is queued again.
"$python" -m "$@" &
job=$!
trap 'requeue=true; kill -TERM $job' TERM
code=0
wait $job || code=$?
if [[ -n ${requeue:-} ]]; then # the signal ended the first wait
  wait $job || code=$?
  scontrol requeue "$SLURM_JOB_ID"
fi
exit $code
