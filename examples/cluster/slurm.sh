#!/bin/bash
# Workers under SLURM for `pipeline run --executor dask`, one for each task of the job:
#
#   sbatch --ntasks=8 examples/cluster/slurm.sh tls://head:8786
#
# They run in the environment that was active at sbatch; $TLS is the folder with their certificate.
#SBATCH --job-name=stagegraph
#SBATCH --ntasks=4
#SBATCH --cpus-per-task=8
#SBATCH --mem-per-cpu=4G
#SBATCH --time=08:00:00
set -euo pipefail

scheduler=${1:?give the address of the scheduler, tls://HOST:PORT}
tls=${TLS:-$HOME/.config/stagegraph}
memory=$((SLURM_MEM_PER_CPU * SLURM_CPUS_PER_TASK * 1024 * 1024)) # bytes; SLURM says it in MiB

# A worker whose scheduler has been away for five minutes ends, and the job with the last of them.
# With GPUs: #SBATCH --gpus-per-task=1 above, and --resources "MEMORY=$memory GPU=1".
exec srun dask worker "$scheduler" \
  --nthreads 1 --no-dashboard --death-timeout 300 \
  --local-directory "${SLURM_TMPDIR:-/tmp}/stagegraph-$SLURM_JOB_ID" \
  --resources "MEMORY=$memory" \
  --tls-ca-file "$tls/ca.pem" --tls-cert "$tls/worker.pem" --tls-key "$tls/worker.key"
