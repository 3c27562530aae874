#!/bin/bash
# Tests launch/slurm.sh, as root, on a Slurm cluster of one node that exists in a temporary folder for this test only:
#   apt-get install slurm-wlm munge && launch/slurm_test.sh
# A job of two tasks trains a tiny CLIP. It gets a SIGTERM, is requeued, loses a task to kill -9, is requeued, and ends
# well.
set -eu
cd "$(dirname "$0")/.."
PYTHON=${PYTHON:-.venv/bin/python}
[ "$(id -u)" = 0 ] || { echo 'run this as root: it starts the daemons of Slurm' >&2; exit 2; }
for program in munged slurmctld slurmd sbatch; do
  command -v $program > /dev/null || { echo "there is no $program: apt-get install slurm-wlm munge" >&2; exit 2; }
done

work=$(mktemp -d)
daemons=()
finish() {
  if [ "${state:-}" != COMPLETED ] && [ -n "${job:-}" ]; then scancel "$job" && sleep 6; fi
  for pid in "${daemons[@]}"; do kill "$pid" 2> /dev/null || true; done
  wait 2> /dev/null || true
  rm -rf "$work"
}
trap finish EXIT
fail() {
  echo "failed: $1" >&2
  tail -n 20 "$work"/*.log >&2
  exit 1
}

# --- A cluster of one node
mkdir "$work/state" "$work/spool"
chmod 755 "$work"
dd if=/dev/urandom of="$work/munge.key" bs=1024 count=1 status=none
chmod 400 "$work/munge.key"
munged --foreground --force --key-file="$work/munge.key" --socket="$work/munge.socket" --pid-file="$work/munged.pid" \
  --seed-file="$work/munged.seed" > "$work/munged.log" 2>&1 & daemons+=($!)
host=$(hostname -s)
cat > "$work/slurm.conf" << CONF
ClusterName=test
SlurmctldHost=$host(127.0.0.1)
SlurmctldPort=17817
SlurmdPort=17818
SlurmUser=root
SlurmdUser=root
AuthType=auth/munge
AuthInfo=socket=$work/munge.socket,cred_expire=5
CredType=cred/munge
StateSaveLocation=$work/state
SlurmdSpoolDir=$work/spool
SlurmctldPidFile=$work/slurmctld.pid
SlurmdPidFile=$work/slurmd.pid
ProctrackType=proctrack/linuxproc
TaskPlugin=task/none
JobAcctGatherType=jobacct_gather/none
MpiDefault=none
ReturnToService=2
KillWait=3
GresTypes=gpu
SelectType=select/cons_tres
SelectTypeParameters=CR_CPU
NodeName=$host NodeAddr=127.0.0.1 CPUs=$(nproc) State=UNKNOWN
PartitionName=test Nodes=ALL Default=YES State=UP OverSubscribe=FORCE:2
CONF
export SLURM_CONF=$work/slurm.conf
sleep 1
slurmctld -D > "$work/slurmctld.log" 2>&1 & daemons+=($!)
slurmd -D -N "$host" > "$work/slurmd.log" 2>&1 & daemons+=($!)
for _ in $(seq 30); do
  [ "$(sinfo -h -o %t 2> /dev/null)" = idle ] && break
  sleep 1
done
[ "$(sinfo -h -o %t)" = idle ] || fail 'the node did not come up'

# --- The job
run=$work/run
steps() { grep -c step "$run/metrics.jsonl" 2> /dev/null || true; }
past() { # waits until the run has logged this many steps
  for _ in $(seq 240); do
    [ "$(steps)" -ge "$1" ] 2> /dev/null && return
    sleep 0.5
  done
  fail "the run did not get to step $1"
}
logged() { # waits for this text in the log of the job
  for _ in $(seq 240); do
    grep -q "$1" "$work/job.log" 2> /dev/null && return
    sleep 0.5
  done
  fail "the log has no '$1'"
}
PATH=$(cd "$(dirname "$PYTHON")" && pwd):$PATH
export PATH JAX_PLATFORMS=cpu PYTHONPATH=$PWD
job=$(sbatch --parsable --nodes=1 --ntasks-per-node=2 --gpus-per-node=0 --cpus-per-task=1 --time=20 \
  --output="$work/job.log" launch/slurm.sh --silence=5 --config=configs/quickstart.py:clip --config.run_dir="$run" \
  --config.model.variant=test --config.model.patch=9 --config.data.source_args.count=64 --config.data.batch_size=16 \
  --config.train.steps=800 --config.train.log_every=1 --config.train.eval_every=0 --config.train.checkpoint_every=50)
echo "job $job: two tasks"
past 100
grep 'devices: 2 x' "$work/job.log" || fail 'there are not two devices'

scancel --signal=TERM "$job.0"
logged 'stopped at step'
grep 'stopped at step' "$work/job.log"
logged 'resuming at step'

past $(($(steps) + 100))
task=$(scontrol listpids "$job.0" | awk '$5 == 1 {print $1; exit}')
kill -9 "$task"
logged 'Start all processes again'
grep 'Start all processes again' "$work/job.log"

for _ in $(seq 240); do
  state=$(scontrol show job "$job" | grep -o 'JobState=[A-Z]*' | cut -d= -f2)
  [ "$state" = COMPLETED ] && break
  sleep 1
done
grep 'resuming at step' "$work/job.log"
[ "$state" = COMPLETED ] || fail "the job is $state"
[ "$(steps)" = 800 ] || fail "there are $(steps) lines of metrics for 800 steps"
echo "job $job: $state, each of 800 steps is in metrics.jsonl once, checkpoints: $(ls "$run/checkpoints" | xargs)"
