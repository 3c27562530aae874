#!/bin/bash
# Trains on several nodes of a Slurm cluster, with one task per GPU:
#   sbatch launch/slurm.sh --config configs/dalle_paper.py:1.3b,accum=8 --config.data.path=/shared/pictures \
#     --config.frozen.vqgan=/shared/f8 --config.run_dir=/shared/run
# Adapt the nodes, the GPUs per node (in two places), the time, and how Python is found. The run directory and the data
# must be on storage that all nodes share. For one task per node, use --ntasks-per-node=1 and, so that it takes all
# GPUs, `export JAX_LOCAL_DEVICE_IDS=0,1,2,3,4,5,6,7`: JAX gives each task the GPU with the task's index on the node.
#SBATCH --job-name=dalle
#SBATCH --nodes=2
#SBATCH --ntasks-per-node=8
#SBATCH --gpus-per-node=8
#SBATCH --cpus-per-task=8
#SBATCH --time=24:00:00
#SBATCH --signal=TERM@180
#SBATCH --requeue
#SBATCH --open-mode=append
#SBATCH --output=%x-%j.log
# --signal sends SIGTERM three minutes before the time is over (preemption does, too); all tasks then save and stop.

cd "${SLURM_SUBMIT_DIR:-.}" || exit
[ -z "$VIRTUAL_ENV" ] && [ -f .venv/bin/activate ] && . .venv/bin/activate

trap : TERM # the tasks get the signal themselves; this script must outlive them
srun --kill-on-bad-exit=0 python train.py --distributed "$@" &
wait $!
status=$?
while kill -0 $! 2>/dev/null; do # a signal ended the wait, but not the tasks
  wait $!
  status=$?
done

# 143: stopped and saved. 75: a task has lost the others. 137: a task was killed. The same job then resumes where it
# was, unless it ended within ten minutes five times in a row: that must have another cause.
ends=.ended-at-once-$SLURM_JOB_ID
if [ $SECONDS -lt 600 ]; then echo >> "$ends"; else rm -f "$ends"; fi
case $status in
  143 | 75 | 137)
    if [ "$(cat "$ends" 2> /dev/null | wc -l)" -lt 5 ] && [ "${SLURM_RESTART_COUNT:-0}" -lt 50 ]; then
      scontrol requeue "$SLURM_JOB_ID"
      exit $status
    fi
    ;;
esac
rm -f "$ends"
exit $status
