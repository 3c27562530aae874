#!/bin/bash
# Trains on all hosts of a TPU slice, one process a host, each of which finds the others by itself:
#   TPU=NAME ZONE=us-east5-a launch/tpu_pod.sh --config configs/dalle_paper.py:1.3b,tpu,accum=8 \
#     --config.data.path=/mnt/shared/pictures --config.frozen.vqgan=/mnt/shared/f8 --config.run_dir=/mnt/shared/run
# To change: TPU, ZONE, and DIR, where this repository with its .venv (pip install -e '.[tpu]') lies on every host. The
# run directory and the data have to be on storage that all hosts mount (Filestore, or a bucket by gcsfuse).
#
# Ctrl-C ends the connection, not the training. This saves on all hosts and stops, wherever it is sent to:
#   gcloud compute tpus tpu-vm ssh NAME --zone=ZONE --worker=0 --command='pkill -TERM -f "python train.py"'
set -eu
: "${TPU:?name of the TPU}" "${ZONE:?zone of the TPU}"

command="cd ${DIR:-dalle_jax} && . .venv/bin/activate && python train.py --distributed$(printf ' %q' "$@")"
# A host that is lost ends all others (75; 137 and 255 are what is heard of a process that was killed and of a host that
# is gone); as often as that happens, they start again from the last checkpoint.
for _ in $(seq 50); do
  status=0
  gcloud compute tpus tpu-vm ssh "$TPU" --zone="$ZONE" --worker=all --command="$command" || status=$?
  case $status in 75 | 137 | 255) ;; *) exit "$status" ;; esac
  sleep 30
done
exit "$status"
