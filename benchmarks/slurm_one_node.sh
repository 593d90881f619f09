#!/usr/bin/env bash
# A Slurm cluster of this one machine, and a study on it: the same results.json as with local workers. Needs root and Debian's
# slurm-wlm and munge, and the extra `slurm`:
#   apt-get install slurm-wlm munge; PYTHONPATH=.:tests bash benchmarks/slurm_one_node.sh
set -euo pipefail
HOME_OF_SLURM=$(mktemp -d /tmp/slurm.XXXXXX)
chmod 755 "$HOME_OF_SLURM"
NODE=$(hostname -s)
trap 'kill ${SLURMD:-} ${SLURMCTLD:-} ${MUNGED:-} 2>/dev/null || true' EXIT
mkdir -p /run/munge && chown munge: /run/munge
[ -f /etc/munge/munge.key ] || { dd if=/dev/urandom of=/etc/munge/munge.key bs=1 count=1024 status=none; chown munge: /etc/munge/munge.key; chmod 400 /etc/munge/munge.key; }
setpriv --reuid=munge --regid=munge --clear-groups /usr/sbin/munged --foreground --force >"$HOME_OF_SLURM/munged.log" 2>&1 & MUNGED=$!
export SLURM_CONF=$HOME_OF_SLURM/slurm.conf
cat >"$SLURM_CONF" <<CONF
ClusterName=one
SlurmctldHost=$NODE(127.0.0.1)
SlurmUser=root
SlurmdUser=root
AuthType=auth/munge
ProctrackType=proctrack/pgid
TaskPlugin=task/none
SchedulerType=sched/backfill
SelectType=select/cons_tres
SelectTypeParameters=CR_Core
ReturnToService=2
StateSaveLocation=$HOME_OF_SLURM/state
SlurmdSpoolDir=$HOME_OF_SLURM/spool
SlurmctldPidFile=$HOME_OF_SLURM/slurmctld.pid
SlurmdPidFile=$HOME_OF_SLURM/slurmd.pid
SlurmctldLogFile=$HOME_OF_SLURM/slurmctld.log
SlurmdLogFile=$HOME_OF_SLURM/slurmd.log
SlurmctldPort=16817
SlurmdPort=16818
MailProg=/bin/true
NodeName=$NODE NodeAddr=127.0.0.1 CPUs=$(nproc) State=UNKNOWN
PartitionName=all Nodes=$NODE Default=YES MaxTime=INFINITE State=UP
CONF
mkdir -p "$HOME_OF_SLURM/state" "$HOME_OF_SLURM/spool"
sleep 1
slurmctld -D & SLURMCTLD=$!
slurmd -D & SLURMD=$!
for _ in $(seq 30); do sinfo -h -o %T 2>/dev/null | grep -q idle && break; sleep 1; done
sinfo
"${PYTHON:-python}" - "$HOME_OF_SLURM" <<'PY'
import sys
from pathlib import Path

from study_data import INSTANT, finished, study

from adaptive_lora.study.executors import Slurm
from adaptive_lora.study.study import run_study

here = Path(sys.argv[1])
finished(here / "clean")
run_study(study(slurm={"timeout_min": 10}), here / "slurm", workers=2, executor=Slurm, train=INSTANT)
same = (here / "clean" / "results.json").read_bytes() == (here / "slurm" / "results.json").read_bytes()
print("jobs:", sorted(p.name for p in (here / "slurm" / "logs" / "slurm").glob("*_result.pkl")))
print("results.json equals that of a worker in this process:", same)
sys.exit(not same)
PY
