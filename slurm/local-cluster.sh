#!/usr/bin/env bash
# A SLURM cluster on this machine, to test batch scripts before they go to a real cluster.
#
#   slurm/local-cluster.sh up [NODES]       start NODES nodes (default 2): node1, node2, ...
#   slurm/local-cluster.sh status           show daemons, nodes and jobs; exit code 3 if not up
#   slurm/local-cluster.sh down             stop it and all its jobs
#
# The nodes are daemons on this machine. Each is set to 8 CPUs, even if the machine has fewer. Jobs
# go to the partition batch. Jobs in the partition urgent preempt them, and SLURM requeues them.
# Each `up` starts with an empty queue. An ordinary user can run it too, only for jobs of that user.
#
#   LOCAL_CLUSTER   folder of slurm.conf and log/ (default: runs/local-cluster in the repository)
set -euo pipefail

here=$(cd "$(dirname "${BASH_SOURCE[0]}")" && pwd)
folder=$(realpath -m "${LOCAL_CLUSTER:-$here/../runs/local-cluster}")
run=$(readlink "$folder/run" || true) # sockets, pid files and spool, by lay_out
PATH=$PATH:/usr/sbin:/sbin            # an ordinary user's PATH may lack the daemons' folders
export SLURM_CONF=$folder/slurm.conf
mark="# written by slurm/local-cluster.sh" # marks a folder whose files it may overwrite

log() { echo "local-cluster: $*"; }
fail() { echo "local-cluster: $*" >&2; exit 2; }

# Print the daemons of the cluster in $folder, in the order of their start.
daemons() {
    [ -n "$run" ] && [ -f "$SLURM_CONF" ] || return 0
    printf '%s\n' munged slurmctld
    sed -n 's/^NodeName=\([^ ]*\).*/\1/p' "$SLURM_CONF"
}

command_of() { # NAME: sets `command`
    case $1 in
        munged) command=(munged --socket="$run/munge.socket" --key-file="$run/munge.key"
            --seed-file="$run/munge.seed" --pid-file="$run/munged.pid"
            --log-file="$run/munged.log") ;;
        slurmctld) command=(slurmctld -f "$SLURM_CONF") ;;
        *) command=(slurmd -N "$1" -f "$SLURM_CONF") ;;
    esac
}

# Whether a process is a daemon of this cluster. The full command line must match, because another
# process may have the number of an old pid file.
runs() { # NAME PID
    command_of "$1"
    [ -n "$2" ] && cmp -s <(printf '%s\0' "${command[@]}") "/proc/$2/cmdline"
}

pid_of() { # NAME: print its pid, if it runs
    local pid
    pid=$(cat "$run/$1.pid" 2>/dev/null) && runs "$1" "$pid" && echo "$pid"
}

living() {
    local name
    for name in $(daemons); do
        if pid_of "$name" >/dev/null; then echo "$name"; fi
    done
}

is_up() { [ -n "$(daemons)" ] && [ "$(living)" = "$(daemons)" ]; }

check_programs() {
    local program missing=()
    for program in munged slurmctld slurmd sinfo sbatch; do
        command -v "$program" >/dev/null || missing+=("$program")
    done
    [ ${#missing[@]} = 0 ] || fail "missing programs: ${missing[*]}. Run" \
        "apt-get install --no-install-recommends slurmctld slurmd slurm-client munge"
}

free_ports() { # COUNT
    local left=$1 port=$((20000 + RANDOM % 10000)) # below the kernel's ports for connections
    while [ "$left" -gt 0 ]; do
        if ! grep -qsi ":$(printf %04X "$port") " /proc/net/tcp /proc/net/tcp6; then
            echo "$port"
            left=$((left - 1))
        fi
        port=$((port + 1))
    done
}

write_conf() { # NODES
    local host listen='' ports number version
    host=$(uname -n)
    mapfile -t ports < <(free_ports $(($1 + 1)))
    # SLURM can listen on the loopback address only, if the machine's name resolves to that.
    # Otherwise it listens on all addresses, and munge's key protects it.
    if [ "$(getent ahostsv4 "$host" | awk 'NR == 1 {print $1}')" = 127.0.0.1 ]; then
        listen=CommunicationParameters=NoInAddrAny,NoCtldInAddrAny
    fi
    cat >"$SLURM_CONF" <<CONF
$mark
ClusterName=local
SlurmctldHost=${host%%.*}(127.0.0.1)
SlurmctldPort=${ports[0]}
SlurmUser=$(id -u)
SlurmdUser=$(id -u)
AuthType=auth/munge
# A requeued job waits until its old credential has expired, by default for two minutes.
AuthInfo=socket=$run/munge.socket,cred_expire=5
$listen

StateSaveLocation=$folder/state
SlurmdSpoolDir=$run/%n
SlurmctldPidFile=$run/slurmctld.pid
SlurmdPidFile=$run/%n.pid
SlurmctldLogFile=$folder/log/slurmctld.log
SlurmdLogFile=$folder/log/%n.log

# No confinement and no accounting: all nodes are this machine, and may lack access to its cgroups.
ProctrackType=proctrack/linuxproc
TaskPlugin=task/none
JobAcctGatherType=jobacct_gather/none
AccountingStorageType=accounting_storage/none
MpiDefault=none
MailProg=/bin/true

# SLURM's defaults, on which scripts may rely.
JobRequeue=1
KillWait=30
InactiveLimit=0
MinJobAge=300
OverTimeLimit=0

# Start jobs within two seconds.
SchedulerType=sched/backfill
SchedulerParameters=batch_sched_delay=0,sched_interval=1,bf_interval=1
SelectType=select/cons_tres
SelectTypeParameters=CR_CPU
PreemptType=preempt/partition_prio
PreemptMode=REQUEUE
SlurmdTimeout=60
ReturnToService=2

# Otherwise nodes with more CPUs than the machine are drained.
SlurmdParameters=config_overrides
CONF
    {
        for number in $(seq "$1"); do
            echo "NodeName=node$number NodeHostname=localhost NodeAddr=127.0.0.1" \
                "Port=${ports[number]} CPUs=8 RealMemory=64000"
        done
        echo "PartitionName=batch Nodes=ALL Default=YES PriorityTier=1"
        echo "PartitionName=urgent Nodes=ALL PriorityTier=2 PreemptMode=OFF"
    } >>"$SLURM_CONF"
    # slurmd loads a cgroup plugin even if it is unused, and the default one needs systemd. From
    # version 23.02 on, SLURM can run without one. Before, use the plugin for cgroups v1, which has
    # no effect by itself.
    version=$(slurmd -V | grep -o '[0-9]*' | head -n 1)
    if [ "$version" -lt 23 ]; then version=cgroup/v1; else version=disabled; fi
    echo "CgroupPlugin=$version" >"$folder/cgroup.conf"
}

lay_out() { # NODES
    local number
    mkdir -p "$folder" || fail "cannot make the folder $folder"
    [ -z "$(ls -A "$folder")" ] || grep -qsx "$mark" "$SLURM_CONF" ||
        fail "$folder: other files in it; expected an empty folder. Set LOCAL_CLUSTER to one"
    echo "$mark" >"$SLURM_CONF"
    rm -rf "$folder/state" "$folder/log"
    mkdir "$folder/state" "$folder/log"
    # A short path, because a socket's path has at most 108 characters, and below folders whose
    # permissions munge accepts: it checks all parents.
    run=$(mktemp -d /tmp/local-cluster.XXXXXX)
    ln -sfn "$run" "$folder/run"
    chmod 711 "$run"
    for number in $(seq "$1"); do mkdir "$run/node$number"; done
    (umask 077 && head -c 128 /dev/urandom >"$run/munge.key" && : >"$run/munged.log")
    ln -s "$run/munged.log" "$folder/log/munged.log"
    write_conf "$1"
}

broken() { # NAME WHAT
    tail -n 15 "$folder/log/$1.log" >&2
    fail "$1 $2; the end of its log is above. All logs are in $folder/log"
}

start() { # NAME
    local try
    command_of "$1"
    "${command[@]}" </dev/null >>"$folder/log/$1.log" 2>&1 || broken "$1" "did not start"
    for try in {1..50}; do # its pid file appears shortly after it has gone into the background
        if pid_of "$1" >/dev/null; then return; fi
        sleep 0.1
    done
    broken "$1" "did not run after $((try / 10)) seconds"
}

wait_for_nodes() { # COUNT
    local name limit=$((SECONDS + 60))
    until [ "$(sinfo -h -p batch -t idle -o %D 2>/dev/null)" = "$1" ]; do
        for name in $(daemons); do
            pid_of "$name" >/dev/null || broken "$name" "ended"
        done
        [ "$SECONDS" -lt "$limit" ] || broken slurmctld "does not have all nodes after 60 seconds"
        sleep 0.2
    done
}

stop() { # NAME...: stop daemons, and kill those that have not ended after 10 seconds
    local name limit=$((SECONDS + 10))
    local -A pids=()
    for name in "$@"; do # keep the pids: daemons remove their pid files before they end
        if pids[$name]=$(pid_of "$name"); then kill "${pids[$name]}" 2>/dev/null || true; fi
    done
    for name in "$@"; do
        while runs "$name" "${pids[$name]}"; do
            if [ "$SECONDS" -ge "$limit" ]; then kill -KILL "${pids[$name]}" 2>/dev/null || true; fi
            sleep 0.1
        done
    done
}

# Print the pids of the nodes' slurmstepds: each has a socket in the spool folder of its node.
stepds() {
    local inode
    awk -v spool="$run/node" 'index($8, spool) == 1 {print $7}' /proc/net/unix |
        while read -r inode; do
            find /proc/[0-9]*/fd -maxdepth 1 -lname "socket:\[$inode\]" 2>/dev/null |
                cut -d / -f 3 || true
        done
}

tree() { # PID...: print them and all their descendants, parents first
    local pid
    for pid in "$@"; do
        echo "$pid"
        # shellcheck disable=SC2046
        tree $(cat "/proc/$pid"/task/*/children 2>/dev/null)
    done
}

halt() {
    local daemons pids
    mapfile -t daemons < <(daemons)
    stop "${daemons[@]:1}"
    mapfile -t pids < <(stepds)
    mapfile -t pids < <(tree "${pids[@]}")
    if [ ${#pids[@]} -gt 0 ]; then kill -KILL "${pids[@]}" 2>/dev/null || true; fi
    stop "${daemons[@]:0:1}"
    if [[ $run == /tmp/local-cluster.* ]]; then
        mv -f "$run/munged.log" "$folder/log/" 2>/dev/null || true
        rm -rf "$run" "$folder/run"
    fi
}

up() { # NODES
    local name partly
    check_programs
    [[ $1 =~ ^[1-9][0-9]?$ ]] || fail "'$1': expected a number of nodes from 1 to 99"
    [[ $folder != *[[:space:]#%\"\\]* ]] ||
        fail "$folder: SLURM does not accept a space, #, %, \" or \\ in it. Set LOCAL_CLUSTER"
    if is_up; then
        log "already up, with $(($(daemons | wc -l) - 2)) nodes"
    else
        partly=$(living | paste -sd ' ')
        [ -z "$partly" ] || fail "of the cluster in $folder, only $partly still runs." \
            "Run slurm/local-cluster.sh down"
        halt # kill jobs of an earlier cluster here
        trap halt EXIT
        lay_out "$1"
        for name in $(daemons); do start "$name"; done
        wait_for_nodes "$1"
        trap - EXIT
        log "up, with $1 nodes of 8 CPUs each"
    fi
    echo "  export SLURM_CONF=$SLURM_CONF"
    echo "  sbatch slurm/train.sbatch"
    echo "  slurm/local-cluster.sh down"
}

status() {
    local name pid
    for name in $(daemons); do
        if pid=$(pid_of "$name"); then log "$name runs, pid $pid"; else log "$name does not run"; fi
    done
    is_up || { log "not up"; exit 3; }
    sinfo
    squeue
}

case "${1:-} $#" in
    'up 1' | 'up 2') up "${2:-2}" ;;
    'status 1') status ;;
    'down 1')
        halt
        log "down"
        ;;
    *)
        sed -n '4,6s/^# *//p' "${BASH_SOURCE[0]}" >&2
        exit 2
        ;;
esac
