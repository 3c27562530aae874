#!/bin/bash
# Trains on several nodes of a Slurm cluster, one task a GPU:
#   sbatch launch/slurm.sh --config configs/dalle_paper.py:1.3b,accum=8 --config.data.path=/shared/pictures \
#     --config.frozen.vqgan=/shared/f8 --config.run_dir=/shared/run
# To change: nodes, GPUs a node (twice), time, and how Python is found. The run directory and the data have to be on
# storage that all nodes share. One task a node instead: --ntasks-per-node=1 and, so that it takes all GPUs,
# `export JAX_LOCAL_DEVICE_IDS=0,1,2,3,4,5,6,7`, as JAX gives each task the GPU of its number on the node.
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
# --signal: SIGTERM three minutes before the time is over (preemption sends it, too), which saves in all tasks.

cd "${SLURM_SUBMIT_DIR:-.}" || exit
[ -z "$VIRTUAL_ENV" ] && [ -f .venv/bin/activate ] && . .venv/bin/activate

trap : TERM # the tasks get it themselves; this script has to outlive them
srun --kill-on-bad-exit=0 python train.py --distributed "$@" &
wait $!
status=$?
while kill -0 $! 2>/dev/null; do # a signal has ended the wait, not the tasks
  wait $!
  status=$?
done

# 143: stopped and saved. 75: a task has lost others. 137: one was killed. The same job goes on where it was; but what ends
# within ten minutes five times in a row has another reason.
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
