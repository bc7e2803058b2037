# shellcheck shell=bash disable=SC2034,SC2154 # functions.sh shares its variables
# How a job starts its tasks: by srun alone, or each in a container. Sourced by functions.sh.

# Refuse settings that no task can start with, before the job stages data or starts one.
check_settings() {
    local name
    for name in MAX_REQUEUES STOP_SECONDS CONTAINER_GRACE; do
        [[ ${!name:-0} =~ ^[0-9]{1,9}$ ]] || fail "$name=${!name}: expected a whole number"
    done
    case ${RUNTIME:=none} in
        none)
            [ -z "${VENV:-}" ] || [ -f "$VENV/bin/activate" ] || fail "VENV=$VENV is no virtual environment: make setup"
            return
            ;;
        docker | podman | apptainer | pyxis) ;;
        *) fail "RUNTIME=$RUNTIME: expected none, docker, podman, apptainer or pyxis" ;;
    esac
    check_image
    find_mounts
    [ -z "${ARCHIVE:-}" ] || check_name "$LOCAL"
}

# An image is a file for apptainer and pyxis, if it is no address of a registry; a relative one lies in this folder.
check_image() {
    [ -n "${IMAGE:-}" ] || fail "IMAGE is empty: expected the image for RUNTIME=$RUNTIME"
    case $RUNTIME:$IMAGE in
        docker:[./]* | podman:[./]*) fail "IMAGE=$IMAGE is a file: expected a name that $RUNTIME image ls shows" ;;
        apptainer:*://* | apptainer:oci:* | apptainer:*-archive:* | apptainer:docker-daemon:*) return ;;
        apptainer:* | pyxis:[./]* | pyxis:*.sqsh | pyxis:*.squashfs) ;;
        *) [ -f "$IMAGE" ] && [ "$RUNTIME" = pyxis ] || return 0 ;;
    esac
    [ -e "$IMAGE" ] || fail "IMAGE=$IMAGE: missing file; expected an image, or its address in a registry"
    IMAGE=$(realpath -s -- "$IMAGE")
}

# start_tasks COMMAND...: become srun, with the same command in each runtime.
start_tasks() {
    local srun=(srun --export=ALL --kill-on-bad-exit=1) name words=()
    [ -z "${SLURM_CPUS_PER_TASK:-}" ] || srun+=(--cpus-per-task="$SLURM_CPUS_PER_TASK") # since 22.05 not by itself
    case $RUNTIME in
        none)
            # shellcheck disable=SC1091
            [ -z "${VENV:-}" ] || . "$VENV/bin/activate"
            # The repository of this file is what runs, whatever VENV has installed.
            PYTHONPATH="${functions%/*/*}" PYTHONSAFEPATH=1 exec "${srun[@]}" "$@"
            ;;
        docker | podman) exec "${srun[@]}" bash "$functions" in_container "$@" ;;
        apptainer) exec "${srun[@]}" bash "$functions" in_apptainer "$@" ;;
        pyxis)
            unset SLURM_JWT # the whole environment goes into the container
            find_mounts
            for name in "${names[@]}"; do words+=("$name:$name${mounts[$name]:+:ro}"); done
            export PYTHONSAFEPATH=1
            exec "${srun[@]}" --container-image="$IMAGE" --container-mounts="$(IFS=, && echo "${words[*]}")" \
                --container-workdir="$(pwd -P)" --no-container-mount-home "$@"
            ;;
    esac
}

# --- what a container sees ------------------------------------------------------------------------------------------------

# Let `names` be what a container sees, parents first: this folder, the data, MOUNTS and the run. `mounts` has ro for
# each that it may only read. A path has its real name and every name that its links give it, as options may use any.
find_mounts() {
    local path paths=("$PWD")
    declare -gA mounts=()
    [ ! -e "${DATA:-}" ] || paths+=("$DATA")
    while IFS= read -r path || [ -n "$path" ]; do
        path=${path#"${path%%[![:blank:]]*}"}
        [[ $path != \~/* ]] || path=~/${path:2}
        [ -z "$path" ] || [ -e "$path" ] || fail "MOUNTS=${path@Q}: missing; expected one file or folder a line"
        [ -z "$path" ] || paths+=("$path")
    done <<<"${MOUNTS:-}"
    # The site's settings of NCCL, and files that its variables name.
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

# add_names PATH MODE: follow PATH's links one by one, and mount what it holds under each name on the way.
# A link in a mounted folder is in the container too, and needs no other name.
add_names() {
    local rest=$1 path='' part target links=0
    [[ $rest = /* ]] || rest=$(pwd -P)/$rest
    while [[ $rest =~ ^/*([^/]+)(.*)$ ]]; do
        part=${BASH_REMATCH[1]} rest=${BASH_REMATCH[2]}
        if [ "$part" = .. ]; then
            path=${path%/*}
        elif [ -L "$path/$part" ]; then
            ((++links <= 40)) || fail "$1: expected a path without a loop of links"
            is_mounted "$path" || mounts[$(realpath -ms -- "$path/$part$rest")]=$2
            target=$(readlink -- "$path/$part")
            [[ $target != /* ]] || path=''
            rest=$target$rest
        elif [ "$part" != . ]; then
            path+=/$part
        fi
    done
    [ -n "$path" ] || fail "$1 is the node's root folder: a container cannot have it"
    mounts[$path]=$2
}

# Whether a folder, by its real name, lies in what is mounted.
is_mounted() {
    local name
    for name in "${!mounts[@]}"; do
        [[ $1/ != "$name"/* ]] || return 0
    done
    return 1
}

# check_name PATH: refuse one that the runtime's options cannot have.
check_name() {
    case $RUNTIME:$1 in
        *[[:cntrl:]]* | *[[:space:]]) fail "RUNTIME=$RUNTIME cannot mount ${1@Q}: expected no line break, and no space at the end" ;;
        pyxis:*[[:space:],:\"\$\`\\]*) fail "RUNTIME=pyxis cannot mount ${1@Q}: expected no space, and none of , : \" \$ \` \\" ;;
    esac
}

# The --mount options of docker, podman and apptainer, which read them as CSV.
mount_options() {
    local name quoted
    find_mounts
    for name in "${names[@]}"; do
        quoted=${name//\"/\"\"}
        options+=(--mount "type=bind,\"source=$quoted\",\"target=$quoted\"${mounts[$name]:+,ro}")
    done
}

# The names of the variables that a container gets; of SLURM's, not those that can hold a secret, as SLURM_JWT does.
# FI, OFI and UCX are libraries of NCCL's plug-ins for networks.
passed_on() {
    compgen -e | grep -E '^(SLURM|HOROVOD|NCCL|FI|OFI|UCX|MGD|OMP)_|^SLURMD_NODENAME$' |
        grep -vE '^SLURM_(JWT|SACK|SPANK)'
}

# Whether the job has GPUs: a site may set one of these only.
has_gpus() { [[ -n ${SLURM_STEP_GPUS:-}${SLURM_JOB_GPUS:-} || ${SLURM_GPUS_ON_NODE:-0} != 0 ]]; }

# --- tasks in containers ------------------------------------------------------------------------------------------------

# in_apptainer COMMAND...: become one task. /tmp stays the node's, as the image is read-only; so does /dev, which
# has the network's and the shared memory of NCCL.
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

# in_container COMMAND...: one task, in a container of docker or podman that does not outlive it.
in_container() {
    local name="mgd-$SLURM_JOB_ID-$SLURM_PROCID-try-${SLURM_RESTART_COUNT:-0}" engine options problem variable
    local lifeline holder client status=0
    remove_earlier_containers
    problem=$("$RUNTIME" image inspect "$IMAGE" 2>&1 >/dev/null) ||
        fail "rank $SLURM_PROCID: no image '$IMAGE' here: $RUNTIME pull or $RUNTIME load it on every node (${problem##*$'\n'})"
    options=(--rm --init --interactive --name "$name" --network host --ipc host --workdir "$(pwd -P)")
    options+=(--label "mgd.job=$SLURM_JOB_ID" --label "mgd.node=$SLURMD_NODENAME")
    options+=(--cap-drop ALL --security-opt no-new-privileges)
    [ ! -d /dev/infiniband ] || options+=(--device /dev/infiniband)
    "${RUNTIME}_options"
    mount_options
    for variable in $(passed_on); do options+=(--env "$variable"); done
    # The container's life line: the pipe closes when this task is killed, as `tail` ends with it, and the program ends
    # too. Signals that ask for a stop come to all processes of the task, and must not cut it.
    exec {lifeline}< <(trap '' USR2 TERM HUP && exec tail --pid=$$ -f /dev/null)
    holder=$!
    trap 'interrupted=1' USR2 HUP # the client has it too, and passes it on
    trap 'interrupted=1; (expire "$name" &)' TERM # in a shell of its own, as it may come before the client's number is known
    "${engine[@]}" run "${options[@]}" --env MGD_LIFELINE=stdin --env PYTHONSAFEPATH=1 "$IMAGE" "$@" <&"$lifeline" &
    client=$!
    wait_for "$client" || status=$?
    trap '' TERM USR2 HUP
    remove_container "$name" || true
    kill -KILL "$holder" 2>/dev/null || true
    exit "$status"
}

# The daemon starts a container of docker, with the user, groups, cores and GPUs that it is given. NCCL locks memory
# for InfiniBand, which the daemon's limit may not allow.
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

# A container of podman is the task's own child, with its groups, limits and, by cgroupfs, its cgroup. The user who
# starts it is root inside, without any capability; other ids would need ranges in /etc/subuid and a copy of the image.
podman_options() {
    local gpu gpus=${SLURM_STEP_GPUS:-}
    engine=(podman --cgroup-manager=cgroupfs)
    options+=(--user 0:0 --group-add keep-groups --security-opt label=disable)
    [ -n "$gpus" ] || ! has_gpus || gpus=all
    for gpu in ${gpus//,/ }; do options+=(--device "nvidia.com/gpu=$gpu"); done
}

# After TERM, SLURM kills the task in KillWait seconds; its container has to be gone before.
expire() {
    local second
    trap '' TERM USR2 HUP
    for second in $(seq "${CONTAINER_GRACE:-20}"); do
        sleep 1
        kill -0 "$$" 2>/dev/null || exit 0
    done
    say "the container has not ended in $second s: removed"
    remove_container "$1" || true
}

# Kills it first: podman's `rm --force` waits up to 10 s for SIGTERM. A killed one may be gone before it is removed.
remove_container() {
    local status=1
    "$RUNTIME" kill "$1" && status=0
    "$RUNTIME" rm --force "$1" && status=0
    return "$status"
} >/dev/null 2>&1

# A task killed at once can leave its container behind, to be found by the job's next try on this node.
remove_earlier_containers() {
    local id name
    "$RUNTIME" ps --all --filter "label=mgd.job=$SLURM_JOB_ID" --filter "label=mgd.node=$SLURMD_NODENAME" \
        --format '{{.ID}} {{.Names}}' | while read -r id name; do
        # Another task of this node may be at it too, or quicker.
        if [[ $name != *-try-${SLURM_RESTART_COUNT:-0} ]] && remove_container "$id"; then
            say "removed container $id of an earlier try"
        fi
    done
}
