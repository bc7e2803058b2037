# shellcheck shell=bash disable=SC2034,SC2154 # functions.sh shares its variables
# Start a job's tasks by srun, with or without a container for each. Sourced by functions.sh.

# Refuse invalid settings before the job stages data or starts tasks.
check_settings() {
    local name
    for name in MAX_REQUEUES STOP_SECONDS CONTAINER_GRACE; do
        [[ ${!name:-0} =~ ^[0-9]{1,9}$ ]] || fail "$name=${!name}: expected an integer of 0 or more"
    done
    case ${RUNTIME:=none} in
        none)
            [ -z "${VENV:-}" ] || [ -f "$VENV/bin/activate" ] ||
                fail "VENV=$VENV: no bin/activate; expected a virtual environment. Run make setup"
            return
            ;;
        docker | podman | apptainer | pyxis) ;;
        *) fail "RUNTIME=$RUNTIME: expected none, docker, podman, apptainer or pyxis" ;;
    esac
    check_image
    find_mounts
    [ -z "${ARCHIVE:-}" ] || check_name "$LOCAL"
}

# For apptainer and pyxis, an image is a file, unless it is a registry's address. A relative path
# begins at this folder.
check_image() {
    [ -n "${IMAGE:-}" ] || fail "IMAGE: empty; expected the image for RUNTIME=$RUNTIME"
    case $RUNTIME:$IMAGE in
        docker:[./]* | podman:[./]*)
            fail "IMAGE=$IMAGE: a file; expected a name that $RUNTIME image ls shows"
            ;;
        apptainer:*://* | apptainer:oci:* | apptainer:*-archive:* | apptainer:docker-daemon:*)
            return
            ;;
        apptainer:* | pyxis:[./]* | pyxis:*.sqsh | pyxis:*.squashfs) ;;
        *) [ -f "$IMAGE" ] && [ "$RUNTIME" = pyxis ] || return 0 ;;
    esac
    [ -e "$IMAGE" ] ||
        fail "IMAGE=$IMAGE: missing file; expected an image, or its address in a registry"
    IMAGE=$(realpath -s -- "$IMAGE")
}

# start_tasks COMMAND...: execute srun. The command is the same in each runtime.
start_tasks() {
    local srun=(srun --export=ALL --kill-on-bad-exit=1) name words=()
    # From version 22.05 on, srun ignores the job's number of cores.
    [ -z "${SLURM_CPUS_PER_TASK:-}" ] || srun+=(--cpus-per-task="$SLURM_CPUS_PER_TASK")
    case $RUNTIME in
        none)
            # shellcheck disable=SC1091
            [ -z "${VENV:-}" ] || . "$VENV/bin/activate"
            # Run the program of this file's repository, even if VENV has another one installed.
            PYTHONPATH="${functions%/*/*}" PYTHONSAFEPATH=1 exec "${srun[@]}" "$@"
            ;;
        docker | podman) exec "${srun[@]}" bash "$functions" in_container "$@" ;;
        apptainer) exec "${srun[@]}" bash "$functions" in_apptainer "$@" ;;
        pyxis)
            unset SLURM_JWT # a secret: pyxis passes on the whole environment
            find_mounts
            for name in "${names[@]}"; do words+=("$name:$name${mounts[$name]:+:ro}"); done
            export PYTHONSAFEPATH=1
            exec "${srun[@]}" --container-image="$IMAGE" \
                --container-mounts="$(IFS=, && echo "${words[*]}")" \
                --container-workdir="$(pwd -P)" --no-container-mount-home "$@"
            ;;
    esac
}

# --- the files of a container ---------------------------------------------------------------------

# Set `names` to the paths in a container, parents first: this folder, the data, MOUNTS and the run.
# `mounts` has ro for each read-only path. A path has its real name and every name by which links
# lead to it, because options may use any.
find_mounts() {
    local path paths=("$PWD")
    declare -gA mounts=()
    [ ! -e "${DATA:-}" ] || paths+=("$DATA")
    while IFS= read -r path || [ -n "$path" ]; do
        path=${path#"${path%%[![:blank:]]*}"}
        [[ $path != \~/* ]] || path=~/${path:2}
        [ -z "$path" ] || [ -e "$path" ] ||
            fail "MOUNTS=${path@Q}: missing; expected one file or folder a line"
        [ -z "$path" ] || paths+=("$path")
    done <<<"${MOUNTS:-}"
    # The site's settings of NCCL, and the files in NCCL's variables.
    for path in /etc/nccl.conf "${NCCL_CONF_FILE:-}" "${NCCL_TOPO_FILE:-}" \
        "${NCCL_NET_PLUGIN:-}" "${NCCL_TUNER_PLUGIN:-}"; do
        [[ $path != /* || ! -f $path || ! -r $path ]] || paths+=("$path")
    done
    for path in "${paths[@]}" "$RUN"; do mounts[$(realpath -m -- "$path")]=ro; done
    for path in "${paths[@]}"; do add_names "$path" ro; done
    add_names "$RUN" ""
    for path in "${!mounts[@]}"; do check_name "$path"; done
    mapfile -t names < <(printf '%s\n' "${!mounts[@]}" | LC_ALL=C sort)
}

# add_names PATH MODE: follow PATH's links one by one, and mount its target under each name on the
# way. A link in a mounted folder is in the container too, and needs no mount.
add_names() {
    local rest=$1 path='' component target links=0
    [[ $rest = /* ]] || rest=$(pwd -P)/$rest
    while [[ $rest =~ ^/*([^/]+)(.*)$ ]]; do
        component=${BASH_REMATCH[1]} rest=${BASH_REMATCH[2]}
        if [ "$component" = .. ]; then
            path=${path%/*}
        elif [ -L "$path/$component" ]; then
            ((++links <= 40)) || fail "$1: expected a path without a loop of links"
            is_mounted "$path" || mounts[$(realpath -ms -- "$path/$component$rest")]=$2
            target=$(readlink -- "$path/$component")
            [[ $target != /* ]] || path=''
            rest=$target$rest
        elif [ "$component" != . ]; then
            path+=/$component
        fi
    done
    [ -n "$path" ] || fail "$1: the node's root folder; expected a folder in it"
    mounts[$path]=$2
}

# Whether a folder, by its real name, is in a mounted folder.
is_mounted() {
    local name
    for name in "${!mounts[@]}"; do
        [[ $1/ != "$name"/* ]] || return 0
    done
    return 1
}

# check_name PATH: refuse a path that the runtime's options cannot contain.
check_name() {
    case $RUNTIME:$1 in
        *[[:cntrl:]]* | *[[:space:]])
            fail "RUNTIME=$RUNTIME cannot mount ${1@Q}:" \
                "expected no line break, and no space at the end"
            ;;
        pyxis:*[[:space:],:\"\$\`\\]*)
            fail "RUNTIME=pyxis cannot mount ${1@Q}: expected a path without space , : \" \$ \` \\"
            ;;
    esac
}

# Add the --mount options of docker, podman and apptainer, in CSV.
mount_options() {
    local name quoted
    find_mounts
    for name in "${names[@]}"; do
        quoted=${name//\"/\"\"}
        options+=(--mount "type=bind,\"source=$quoted\",\"target=$quoted\"${mounts[$name]:+,ro}")
    done
}

# Print the names of the variables that a container gets, without SLURM's that can contain a secret,
# such as SLURM_JWT. FI, OFI and UCX are libraries of NCCL's network plug-ins.
passed_on() {
    compgen -e | grep -E '^(SLURM|HOROVOD|NCCL|FI|OFI|UCX|MGD|OMP)_|^SLURMD_NODENAME$' |
        grep -vE '^SLURM_(JWT|SACK|SPANK)'
}

# Whether the job has GPUs. A site may set only one of these variables.
has_gpus() { [[ -n ${SLURM_STEP_GPUS:-}${SLURM_JOB_GPUS:-} || ${SLURM_GPUS_ON_NODE:-0} != 0 ]]; }

# --- tasks in containers --------------------------------------------------------------------------

# in_apptainer COMMAND...: execute one task. /tmp stays the node's, because the image is read-only.
# /dev stays the node's, because NCCL needs its network devices and shared memory.
in_apptainer() {
    local options=(--cleanenv --no-mount "home,cwd" --pwd "$(pwd -P)") variable
    ! has_gpus || options+=(--nv)
    mount_options
    for variable in $(passed_on) CUDA_VISIBLE_DEVICES; do
        [ -z "${!variable+set}" ] || export "APPTAINERENV_$variable=${!variable}"
    done
    export APPTAINERENV_PYTHONSAFEPATH=1
    exec apptainer exec "${options[@]}" "$IMAGE" "$@"
}

# in_container COMMAND...: run one task in a container of docker or podman. Both end together.
in_container() {
    local name="mgd-$SLURM_JOB_ID-$SLURM_PROCID-try-${SLURM_RESTART_COUNT:-0}"
    local engine options problem variable lifeline holder client status=0
    remove_earlier_containers
    problem=$("$RUNTIME" image inspect "$IMAGE" 2>&1 >/dev/null) ||
        fail "rank $SLURM_PROCID: IMAGE=$IMAGE: missing on this node (${problem##*$'\n'})." \
            "Run $RUNTIME pull or $RUNTIME load on every node"
    options=(--rm --init --interactive --name "$name" --network host --ipc host)
    options+=(--workdir "$(pwd -P)")
    options+=(--label "mgd.job=$SLURM_JOB_ID" --label "mgd.node=$SLURMD_NODENAME")
    options+=(--cap-drop ALL --security-opt no-new-privileges)
    [ ! -d /dev/infiniband ] || options+=(--device /dev/infiniband)
    "${RUNTIME}_options"
    mount_options
    for variable in $(passed_on); do options+=(--env "$variable"); done
    # The container's lifeline: if this task is killed, `tail` ends, the pipe closes, and so the
    # program ends. Stop signals reach all processes of the task, and must not end `tail`.
    exec {lifeline}< <(trap '' USR2 TERM HUP && exec tail --pid=$$ -f /dev/null)
    holder=$!
    trap 'interrupted=1' USR2 HUP # the client receives it too, and passes it on
    trap 'interrupted=1; (expire "$name" &)' TERM # in a subshell, so that $! stays the client's
    "${engine[@]}" run "${options[@]}" --env MGD_LIFELINE=stdin --env PYTHONSAFEPATH=1 \
        "$IMAGE" "$@" <&"$lifeline" &
    client=$!
    wait_for "$client" || status=$?
    trap '' TERM USR2 HUP
    remove_container "$name" || true
    kill -KILL "$holder" 2>/dev/null || true
    exit "$status"
}

# docker's daemon starts the container, so its user, groups, cores and GPUs must be options. NCCL
# locks memory for InfiniBand, and the daemon's limit may be too low.
docker_options() {
    local group
    engine=(docker)
    options+=(--user "$(id -u):$(id -g)")
    for group in $(id -G); do options+=(--group-add "$group"); done
    options+=(--cpuset-cpus "$(sed -n 's/^Cpus_allowed_list:\s*//p' /proc/self/status)")
    if [ -n "${SLURM_STEP_GPUS:-}" ]; then
        options+=(--gpus "\"device=$SLURM_STEP_GPUS\"")
    elif has_gpus; then
        options+=(--gpus "${SLURM_GPUS_ON_NODE:-all}")
    fi
    [ ! -d /dev/infiniband ] || options+=(--ulimit memlock=-1)
}

# podman's container is the task's child, with the task's groups, limits and, by cgroupfs, cgroup.
# The user is root inside, without capabilities. Other ids would need ranges in /etc/subuid and a
# copy of the image.
podman_options() {
    local gpu gpus=${SLURM_STEP_GPUS:-}
    engine=(podman --cgroup-manager=cgroupfs)
    options+=(--user 0:0 --group-add keep-groups --security-opt label=disable)
    [ -n "$gpus" ] || ! has_gpus || gpus=all
    for gpu in ${gpus//,/ }; do options+=(--device "nvidia.com/gpu=$gpu"); done
}

# After TERM, SLURM kills the task within KillWait seconds. Its container must end before.
expire() {
    local second
    trap '' TERM USR2 HUP
    for second in $(seq "${CONTAINER_GRACE:-20}"); do
        sleep 1
        kill -0 "$$" 2>/dev/null || exit 0
    done
    log "the container has not ended within $second s: removed"
    remove_container "$1" || true
}

# Kill the container first: podman's `rm --force` sends SIGTERM and waits up to 10 s. A killed
# container may be gone before it is removed.
remove_container() {
    local status=1
    "$RUNTIME" kill "$1" && status=0
    "$RUNTIME" rm --force "$1" && status=0
    return "$status"
} >/dev/null 2>&1

# Remove the containers of the job's earlier tries on this node: a task that was killed at once can
# leave one.
remove_earlier_containers() {
    local id name
    "$RUNTIME" ps --all --filter "label=mgd.job=$SLURM_JOB_ID" \
        --filter "label=mgd.node=$SLURMD_NODENAME" --format '{{.ID}} {{.Names}}' |
        while read -r id name; do
            # Another task of this node may remove it at the same time, or has removed it.
            if [[ $name != *-try-${SLURM_RESTART_COUNT:-0} ]] && remove_container "$id"; then
                log "removed container $id of an earlier try"
            fi
        done
}
