#!/bin/bash
# Trains on all hosts of a TPU slice, one process a host, each of which finds the others by itself:
#   TPU=NAME ZONE=us-east5-a launch/tpu_pod.sh --config configs/dalle_paper.py:1.3b,tpu,accum=8 \
#     --config.data.path=/mnt/shared/pictures --config.frozen.vqgan=/mnt/shared/f8 --config.run_dir=/mnt/shared/run
# To change: TPU, ZONE, and DIR, where this repository with its .venv (pip install -e '.[tpu]') lies on every host. The
# run directory and the data have to be on storage that all hosts mount: Filestore, or by gcsfuse a bucket with a
# hierarchical namespace, as a checkpoint is a folder that gets its name when it is whole, which others refuse.
#
# The training does not need this connection: it writes DIR/train.log on each host, and the same command attaches to what
# runs there. Ctrl-C detaches. This saves on all hosts and stops, wherever it is sent to:
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
    *) exit \$status ;; # it has ended while nobody was connected
  esac
  rm -f train.status
  setsid nohup bash -c $start > /dev/null 2>&1 < /dev/null &
  echo \$! > train.pid
fi
touch train.log
tail -n 20 -f --pid=\$(cat train.pid) train.log
exit \$(cat train.status 2> /dev/null || echo 137)"
# A host that is lost ends all others (75; 137 is a process that was killed, 255 a connection that broke or a host that is
# gone); as often as that happens, they start again from the last checkpoint. What ends within minutes again and again has
# another reason.
short=0 again=new
for _ in $(seq 50); do
  begun=$SECONDS status=0
  gcloud compute tpus tpu-vm ssh "$TPU" --zone="$ZONE" --worker=all --command="again=$again; $command" || status=$?
  case $status in 75 | 137 | 255) ;; *) exit "$status" ;; esac
  short=$((SECONDS - begun < 600 ? short + 1 : 0))
  [ $short -lt 5 ] || { echo 'five times in a row it ended within ten minutes; see train.log on the hosts' >&2; break; }
  sleep 30
  again=again
done
exit "$status"
