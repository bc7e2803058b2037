# shellcheck shell=bash disable=SC2034,SC2154 # functions.sh shares its variables
# How a job starts its tasks: by srun alone, or each in a container. Sourced by functions.sh.

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
