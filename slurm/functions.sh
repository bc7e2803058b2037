# shellcheck shell=bash
# What the job scripts of this folder share: staging of the data, the run with its signals, requeueing, and containers.
# A script sets the variables that its first lines explain, and sources this file; nodes run parts of it as
# `bash slurm/functions.sh FUNCTION ...`. Needs bash and SLURM's own commands alone.

functions=${BASH_SOURCE[0]}
signalled= # the signal that asked the job to stop, if any
step=      # the process that is srun, while one runs
starting=  # whether one has been started that `step` is not yet
late=      # the one that requeues if that does not end

# Expand ~/ in a job's paths: the shell leaves it in `sbatch --export=HOME,USER,PATH,DATA=~/images`.
expand_home() {
    local variable words home=~
    for variable in DATA ARCHIVE LOCAL RUN IMAGE VENV MOUNTS; do
        words=" ${!variable-}"
        words=${words// \~\// "$home"/}
        [ "$words" = " " ] || printf -v "$variable" %s "${words:1}"
    done
}
expand_home

say() { printf '%(%F %T)T %s: %s\n' -1 "${SLURMD_NODENAME:-batch}" "$*"; }
fail() {
    printf 'error: %s: %s\n' "${SLURMD_NODENAME:-batch}" "$*" >&2
    exit 2
}

# This job's name for scontrol: in an array, the bare number can mean the whole array.
job_id() { echo "${SLURM_ARRAY_JOB_ID:+${SLURM_ARRAY_JOB_ID}_${SLURM_ARRAY_TASK_ID}}" | grep . || echo "$SLURM_JOB_ID"; }
job_state() { ask_slurm show job -o "$(job_id)" | sed -n 's/.* JobState=\([A-Z_]*\).*/\1/p'; }

# --- the run ------------------------------------------------------------------------------------------------------------

# run COMMAND...: run it as the job's tasks; then requeue the job if there is more to do.
run() {
    local before status=0
    RUN=$(realpath -m "$RUN") && mkdir -p "$RUN"
    [ ! -d "$DATA" ] || DATA=$(realpath "$DATA")
    export RUN DATA IMAGE MOUNTS MGD_IMAGE="${IMAGE:-none}"
    export MGD_NODE_ADDRESSES="${MGD_NODE_ADDRESSES:-$(node_addresses)}"
    before=$(newest_checkpoint)
    say "try $((${SLURM_RESTART_COUNT:-0} + 1)) on $SLURM_JOB_NODELIST, runtime $RUNTIME: $*"
    say "run's folder: $RUN"
    if [ -z "$signalled" ]; then
        start_step start_tasks "$@"
        wait_for "$step" || status=$?
    fi
    settle "$status" "$before"
}

# start_step COMMAND...: start it, which is or becomes srun, and let `step` be its process.
start_step() {
    starting=1
    "$@" &
    step=$! starting=''
    [ -z "$signalled" ] || stop_tasks # the signal came when there was no step to tell yet
}

# A script that sources this file stops on USR2 and TERM as `settle` says, also while it stages.
forward() {
    local earlier=$signalled
    signalled=$1 interrupted=1
    say "signal $1: the tasks finish their step and save"
    if [ -n "$starting" ]; then return; fi # the step's number is $! still, which another process would change
    if [ -z "$earlier" ]; then stop_tasks; else tell_tasks; fi
}

# Tasks stop alike on USR2, which srun passes on; on TERM srun itself would end.
tell_tasks() {
    [ -z "$step" ] || kill -USR2 "$step" 2>/dev/null || true
}

stop_tasks() {
    [ -z "$late" ] || kill "$late" 2>/dev/null || true
    tell_tasks
    (requeue_late) &
    late=$!
}

# A step, or what comes between epochs, can take longer than the time that is left: what is saved has to do then.
requeue_late() {
    local second
    trap - USR2 TERM
    for second in $(seq "${STOP_SECONDS:-150}"); do
        sleep 1
        kill -0 "$$" 2>/dev/null || exit 0 # the job's own shell is gone: the next try must not be requeued
        ((second % 5)) || tell_tasks # srun loses a signal that comes while it starts them
    done
    if [ "$(job_state)" = RUNNING ] && [ "${SLURM_RESTART_COUNT:-0}" -lt "$MAX_REQUEUES" ]; then
        say "the tasks have not ended in $second s: requeued from the newest checkpoint"
        requeue
    fi
}

# The exit status of a child, though signals interrupt the waiting for it.
wait_for() {
    local status again
    while :; do
        interrupted='' status=0
        wait "$1" || status=$?
        [ -n "$interrupted" ] || return "$status"
        kill -0 "$1" 2>/dev/null && continue
        again=0
        wait "$1" || again=$?
        [ "$again" = 127 ] || status=$again
        return "$status"
    done
}

# settle STATUS CHECKPOINT: end the job as its tasks' exit status and its folder say.
settle() {
    local status=$1 before=$2 state restarts=${SLURM_RESTART_COUNT:-0} why=''
    trap '' USR2 TERM
    [ -z "$late" ] || kill "$late" 2>/dev/null || true
    state=$(job_state)
    if [ "$status" = 0 ] && [ -f "$RUN/complete" ]; then
        say "complete, not requeued: $(cat "$RUN/complete")"
        exit 0
    elif [ "$state" != RUNNING ]; then
        why="the job is $state by SLURM's own doing"
    elif [ "$status" = 2 ]; then
        why="a mistake in its options or data, named above, would end it again"
    elif [ -z "$signalled" ] && [ "$(newest_checkpoint)" = "$before" ]; then
        why="it ended before it saved anything new (exit status $status)"
    elif [ "$restarts" -ge "$MAX_REQUEUES" ]; then
        why="MAX_REQUEUES=$MAX_REQUEUES are used up"
    fi
    if [ -n "$why" ]; then
        say "not requeued: $why"
        exit "$status"
    fi
    say "requeued, $((restarts + 1)) of at most $MAX_REQUEUES times (exit status $status, newest checkpoint $(newest_checkpoint))"
    requeue
}

# By name, as `--resume auto` finds it: last.pth.tar is no link on every file system.
newest_checkpoint() {
    printf '%s\n' "$RUN"/checkpoint_* | sed 's:.*/::' | grep -xE 'checkpoint_[0-9]{4,}_[0-9]{6,}\.pth\.tar' |
        sort -V | tail -n 1 | grep . || echo none
}

# SLURM's controller may be away for a moment; ask again for a minute.
ask_slurm() {
    local try
    for try in $(seq 12); do
        scontrol "$@" && return
        [ "$try" = 12 ] || sleep 5
    done
    fail "SLURM does not answer: scontrol $*"
}
requeue() { ask_slurm requeue "$(job_id)"; }

# The nodes' addresses as SLURM has them: inside a container, names may not resolve. A machine's own name often
# stands for a loopback address in its /etc/hosts, where no other machine finds it: such are left to each task.
node_addresses() {
    local name address number
    scontrol show node -o "$SLURM_JOB_NODELIST" | sed 's/.*NodeName=\([^ ]*\).* NodeAddr=\([^ ]*\).*/\1 \2/' |
        while read -r name address; do
            number=$(getent ahostsv4 "$address" | awk 'NR == 1 { print $1 }') || true
            [[ $number = "$address" || ($number && $number != 127.*) ]] && printf '%s=%s ' "$name" "$number"
        done || true
}

# --- the tasks, in a container or not --------------------------------------------------------------------------------------

# start_tasks COMMAND...: become srun, with the same command in each runtime.
start_tasks() {
    local srun=(srun --export=ALL --kill-on-bad-exit=1) shared
    [ -z "${SLURM_CPUS_PER_TASK:-}" ] || srun+=(--cpus-per-task="$SLURM_CPUS_PER_TASK") # since 22.05 not by itself
    case $RUNTIME in
        none)
            if [ -n "${VENV:-}" ]; then
                [ -f "$VENV/bin/activate" ] || fail "VENV=$VENV is no virtual environment: make setup"
                # shellcheck disable=SC1091
                . "$VENV/bin/activate"
            fi
            exec "${srun[@]}" "$@"
            ;;
        docker) exec "${srun[@]}" bash "$functions" in_docker "$@" ;;
        apptainer)
            shared=$(binds | paste -sd ,) && export APPTAINERENV_PYTHONSAFEPATH=1
            exec "${srun[@]}" apptainer exec ${SLURM_JOB_GPUS:+--nv} --bind "$shared" --pwd "$PWD" "$IMAGE" "$@"
            ;;
        pyxis)
            shared=$(binds | paste -sd ,) && export PYTHONSAFEPATH=1
            exec "${srun[@]}" --container-image="$IMAGE" --container-mounts="$shared" --container-workdir="$PWD" \
                --no-container-mount-home "$@"
            ;;
        *) fail "RUNTIME=$RUNTIME: expected none, docker, apptainer or pyxis" ;;
    esac
}

# What a container sees, a line each, under its own path: this folder, the data and MOUNTS to read, the run to write.
binds() {
    local path
    for path in "$PWD" "$DATA" ${MOUNTS:-}; do
        [ ! -d "$path" ] || printf '%s:%s:ro\n' "$path" "$path"
    done
    printf '%s:%s\n' "$RUN" "$RUN"
}

# in_docker COMMAND...: one task, in a container that does not outlive it.
in_docker() {
    local name="mgd-$SLURM_JOB_ID-$SLURM_PROCID-try-${SLURM_RESTART_COUNT:-0}" options paths path group problem variable
    local lifeline sleeper client status=0
    remove_earlier_containers
    problem=$(docker image inspect "$IMAGE" 2>&1 >/dev/null) ||
        fail "rank $SLURM_PROCID: no image '$IMAGE' here: docker pull or docker load it on every node (${problem##*$'\n'})"
    options=(--rm --init --interactive --name "$name" --network host --ipc host --user "$(id -u):$(id -g)" --workdir "$PWD")
    options+=(--label "mgd.job=$SLURM_JOB_ID" --label "mgd.node=$SLURMD_NODENAME" --label "mgd.try=${SLURM_RESTART_COUNT:-0}")
    options+=(--cap-drop ALL --security-opt no-new-privileges)
    options+=(--cpuset-cpus "$(sed -n 's/^Cpus_allowed_list:\s*//p' /proc/self/status)")
    for group in $(id -G); do options+=(--group-add "$group"); done
    [ -z "${SLURM_STEP_GPUS:-}" ] || options+=(--gpus "\"device=$SLURM_STEP_GPUS\"")
    mapfile -t paths < <(binds)
    for path in "${paths[@]}"; do options+=(--volume "$path"); done
    for variable in $(compgen -e | grep -E '^(SLURM|HOROVOD|NCCL|MGD|OMP)_|^SLURMD_NODENAME$'); do options+=(--env "$variable"); done
    # The container's life line: the pipe closes when this task is killed, and the program ends with it. Signals
    # that ask for a stop come to all processes of the task, and must not cut it.
    exec {lifeline}< <(trap '' USR2 TERM && exec sleep infinity)
    sleeper=$!
    trap 'interrupted=1' USR2 # the client has it too, and passes it on
    trap 'interrupted=1; (expire "$name" &)' TERM # in a shell of its own, as it may come before the client's number is known
    docker run "${options[@]}" --env MGD_LIFELINE=stdin --env PYTHONSAFEPATH=1 "$IMAGE" "$@" <&"$lifeline" &
    client=$!
    wait_for "$client" || status=$?
    trap '' TERM USR2
    docker rm --force "$name" >/dev/null 2>&1 || true
    kill -KILL "$sleeper" 2>/dev/null || true
    exit "$status"
}

# After TERM, SLURM kills the task in KillWait seconds; its container has to be gone before.
expire() {
    local second
    trap '' TERM USR2
    for second in $(seq "${CONTAINER_GRACE:-20}"); do
        sleep 1
        kill -0 "$$" 2>/dev/null || exit 0
    done
    say "the container has not ended in $second s: removed"
    docker rm --force "$1" >/dev/null 2>&1 || true
}

# A task killed at once can leave its container behind, to be found by the job's next try on this node.
remove_earlier_containers() {
    local id try
    docker ps --all --filter "label=mgd.job=$SLURM_JOB_ID" --filter "label=mgd.node=$SLURMD_NODENAME" \
        --format '{{.ID}} {{.Label "mgd.try"}}' | while read -r id try; do
        # Another task of this node may be at it too, or quicker.
        if [ "$try" != "${SLURM_RESTART_COUNT:-0}" ] && docker rm --force "$id" >/dev/null 2>&1; then
            say "removed container $id of an earlier try"
        fi
    done
}

# --- staging ----------------------------------------------------------------------------------------------------------------

# stage: unpack ARCHIVE into the folder LOCAL of each node, once, and let DATA be what was unpacked.
stage() {
    local status=0
    [ -n "${ARCHIVE:-}" ] || return 0
    export ARCHIVE LOCAL
    start_step srun --export=ALL --kill-on-bad-exit=1 --nodes="$SLURM_JOB_NUM_NODES" --ntasks="$SLURM_JOB_NUM_NODES" \
        --ntasks-per-node=1 bash "$functions" stage_here
    wait_for "$step" || status=$?
    step=
    [ -z "$signalled" ] || settle "$status" none
    [ "$status" = 0 ] || exit "$status"
    DATA=$(data_folder)
}

# Where an archive is unpacked: its name, size and time of change, so that another version is another folder.
staged_folder() { echo "$LOCAL/$(basename "$ARCHIVE")-$(stat -c %s-%Y "$ARCHIVE")"; }

# The folder with train/ in what was unpacked: it may have a name of its own in the archive.
data_folder() {
    local folder train
    folder=$(staged_folder)
    for train in "$folder/train" "$folder"/*/train; do
        [ ! -d "$train" ] || { dirname "$train" && return; }
    done
    fail "$ARCHIVE has no folder train, as in train/CLASS/IMAGE"
}

stage_here() {
    local folder part sum copied expected begun=$SECONDS
    [ -r "$ARCHIVE" ] || fail "ARCHIVE=$ARCHIVE cannot be read"
    folder=$(staged_folder)
    part=$folder.part
    mkdir -p "$LOCAL"
    [ -O "$LOCAL" ] || fail "LOCAL=$LOCAL is another user's: choose another folder"
    exec 9>"$folder.lock"
    flock 9
    if [ -f "$folder/.staged" ]; then
        say "data: $folder is here already"
        return
    fi
    say "data: copying $ARCHIVE ($(du -h --apparent-size "$ARCHIVE" | cut -f1)) to $LOCAL, $(df -h --output=avail "$LOCAL" | tail -n 1 | tr -d ' ') free"
    rm -rf "$folder" "$part"
    sum=$(tee "$part" <"$ARCHIVE" | sha256sum | cut -d' ' -f1) ||
        unstage "cannot copy $ARCHIVE to $LOCAL: is there room?"
    copied=$(sha256sum "$part" | cut -d' ' -f1)
    expected=$(cut -d' ' -f1 "$ARCHIVE.sha256" 2>/dev/null || echo "$sum")
    [ "$copied" = "$expected" ] ||
        unstage "the copy of $ARCHIVE has sha256 $copied, expected $expected: copy it anew, or mend $ARCHIVE.sha256"
    case $ARCHIVE in
        *.sqsh | *.sqfs | *.squashfs) unsquashfs -quiet -no-progress -d "$folder" "$part" ;;
        *) mkdir "$folder" && tar -xf "$part" -C "$folder" ;;
    esac || unstage "cannot unpack $ARCHIVE into $folder: expected a tar or squashfs archive, and room for it"
    rm -f "$part"
    touch "$folder/.staged"
    say "data: unpacked into $folder, verified, in $((SECONDS - begun)) s"
}

# unstage WORDS...: leave nothing half done on the node's disk, and fail.
unstage() {
    rm -rf "$part" "$folder"
    fail "$@"
}

# On a node: `bash slurm/functions.sh FUNCTION ...`.
if [ "${BASH_SOURCE[0]}" = "$0" ]; then
    set -euo pipefail
    trap '[ $? = 0 ] || sleep 1' EXIT # srun can lose what a task says last when it ends the whole step with it
    "$@"
else
    trap 'forward USR2' USR2
    trap 'forward TERM' TERM
fi
