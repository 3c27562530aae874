#!/bin/bash
# Trains on all hosts of a TPU slice, with one process per host; the processes find each other:
#   TPU=NAME ZONE=us-east5-a launch/tpu_pod.sh --config configs/dalle_paper.py:1.3b,tpu,accum=8 \
#     --config.data.path=/mnt/shared/pictures --config.frozen.vqgan=/mnt/shared/f8 --config.run_dir=/mnt/shared/run
# Set TPU, ZONE, and DIR, the folder on every host with this repository and its .venv (pip install -e '.[tpu]'). The run
# directory and the data must be on storage that all hosts mount: Filestore, or through gcsfuse a bucket with a
# hierarchical namespace (a checkpoint is a folder that is renamed once it is complete, which other buckets refuse).
#
# Training does not depend on this connection: it writes DIR/train.log on each host, and the same command attaches to a
# running job. Ctrl-C detaches. The following saves and stops on all hosts, whichever worker it is sent to:
#   gcloud compute tpus tpu-vm ssh NAME --zone=ZONE --worker=0 --command='pkill -TERM -f "python train.py"'
set -eu
: "${TPU:?name of the TPU}" "${ZONE:?zone of the TPU}"

printf -v train '%q ' python train.py --distributed "$@"
printf -v start '%q' "trap : TERM; $train >> train.log 2>&1; echo \$? > train.status"
command="cd ${DIR:-dalle_jax} && . .venv/bin/activate
if ! kill -0 \$(cat train.pid 2> /dev/null) 2> /dev/null; then
  status=\$(cat train.status 2> /dev/null)
  case \$again\$status in
    again | again75 | again137 | new*) ;;
    *) exit \$status ;; # it ended while nobody was connected
  esac
  rm -f train.status
  setsid nohup bash -c $start > /dev/null 2>&1 < /dev/null &
  echo \$! > train.pid
fi
touch train.log
tail -n 20 -f --pid=\$(cat train.pid) train.log
exit \$(cat train.status 2> /dev/null || echo 137)"
# When a host is lost, all others end (75; 137 is a process that was killed, 255 a broken connection or a host that is
# gone), and all start again from the last checkpoint, up to 50 times, unless they ended within ten minutes five times
# in a row: that must have another cause.
short=0 again=new
for _ in $(seq 50); do
  begun=$SECONDS status=0
  gcloud compute tpus tpu-vm ssh "$TPU" --zone="$ZONE" --worker=all --command="again=$again; $command" || status=$?
  case $status in 75 | 137 | 255) ;; *) exit "$status" ;; esac
  short=$((SECONDS - begun < 600 ? short + 1 : 0))
  [ $short -lt 5 ] || { echo 'training ended within ten minutes five times in a row; see train.log' >&2; break; }
  sleep 30
  again=again
done
exit "$status"
