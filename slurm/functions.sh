# shellcheck shell=bash
# Shared code of this folder's job scripts: the run, its signals and requeues. It sources staging.sh
# and containers.sh. A job script sets the variables that its first lines explain, and sources this
# file. Nodes run functions of it by `bash slurm/functions.sh FUNCTION ...`. It needs only bash and
# SLURM's own commands.

functions=$(realpath "${BASH_SOURCE[0]}")
signalled= # the last signal that stopped the job, or empty
step=      # process id of srun, or empty if it does not run
starting=  # 1 while srun starts and `step` is not set yet
late=      # process id of requeue_late, or empty if it does not run

# Expand ~/ in the job's paths: the shell does not, in `sbatch --export=HOME,PATH,DATA=~/images`.
# Resolve `..` in the paths of the command: a container has their targets, but not each folder
# before a `..`.
expand_paths() {
    local variable home=~
    for variable in DATA ARCHIVE LOCAL RUN IMAGE VENV; do
        [[ ${!variable-} != \~/* ]] || printf -v "$variable" %s "$home/${!variable:2}"
    done
    for variable in DATA RUN; do
        [[ /${!variable-}/ != */../* ]] ||
            printf -v "$variable" %s "$(realpath -m -- "${!variable}")"
    done
}
expand_paths

log() { printf '%(%F %T)T %s: %s\n' -1 "${SLURMD_NODENAME:-batch}" "$*"; }
# record KIND NAME VALUE ...: print a record, a line of JSON, for programs that read the job's log
# (job/metrics/schema.py). Each VALUE is JSON.
record() {
    local line
    printf -v line '{"kind": "%s", "time": %(%s)T' "$1" -1
    shift
    while [ $# -gt 0 ]; do
        line+=", \"$1\": $2"
        shift 2
    done
    printf '%s}\n' "$line"
}
# json TEXT: print it as a JSON string.
json() {
    local text=${1//\\/\\\\} code character
    text=${text//\"/\\\"}
    for code in {0..1}{{0..9},{a..f}}; do
        [ "$code" != 00 ] || continue # bash variables cannot hold it
        printf -v character %b "\\x$code"
        text=${text//"$character"/"\\u00$code"}
    done
    printf '"%s"' "$text"
}
fail() {
    printf 'error: %s: %s\n' "${SLURMD_NODENAME:-batch}" "$*" >&2
    exit 2
}

# Print this job's id for scontrol. One task of an array has the id of the array, so it needs the
# form ARRAY_TASK. A job submitted from within an array inherits that array's SLURM_ARRAY_JOB_ID.
job_id() {
    if [ "${SLURM_ARRAY_JOB_ID:-}" = "$SLURM_JOB_ID" ]; then
        echo "${SLURM_JOB_ID}_$SLURM_ARRAY_TASK_ID"
    else
        echo "$SLURM_JOB_ID"
    fi
}

# shellcheck source=slurm/staging.sh
. "${functions%/*}/staging.sh"
# shellcheck source=slurm/containers.sh
. "${functions%/*}/containers.sh"

# --- the run --------------------------------------------------------------------------------------

# run COMMAND...: run it as the job's tasks, then requeue the job if it is incomplete.
run() {
    local status=0 problem
    # realpath, because RUN can be a link to a missing folder.
    problem=$(mkdir -p -- "$(realpath -m -- "$RUN")" 2>&1) ||
        fail "RUN=$RUN: ${problem##*: }; expected a folder that this job can make. Choose another"
    MGD_SECRET=$(head -c 32 /dev/urandom | base64) # the tasks prove to each other that they have it
    export RUN DATA RUNTIME IMAGE MOUNTS MGD_SECRET MGD_IMAGE="${IMAGE:-none}"
    export MGD_NODE_ADDRESSES="${MGD_NODE_ADDRESSES:-$(node_addresses)}"
    log "try $((${SLURM_RESTART_COUNT:-0} + 1)) on $SLURM_JOB_NODELIST, runtime $RUNTIME: $*"
    record try number $((${SLURM_RESTART_COUNT:-0} + 1)) nodes "$(json "$SLURM_JOB_NODELIST")" \
        run "$(json "$(realpath -- "$RUN")")"
    if [ -z "$signalled" ]; then
        start_step start_tasks "$@"
        wait_for "$step" || status=$?
    fi
    settle "$status"
}

# start_step COMMAND...: start a command that is srun, or executes it, and set `step`.
start_step() {
    starting=1
    "$@" &
    step=$! starting=''
    [ -z "$signalled" ] || stop_tasks # a signal came before `step` was set
}

# On USR2, TERM and HUP: stop the tasks. The job then ends by `settle`, also while it stages data.
forward() {
    local earlier=$signalled
    signalled=$1 interrupted=1
    log "signal $1: the tasks finish their step and save"
    # start_step has not read $! yet, and another background process would change it.
    if [ -n "$starting" ]; then return; fi
    if [ -z "$earlier" ]; then stop_tasks; else signal_tasks; fi
}

# Tasks stop on USR2 as on TERM. srun passes USR2 on to them, but TERM would end srun itself.
signal_tasks() {
    [ -z "$step" ] || kill -USR2 "$step" 2>/dev/null || true
}

stop_tasks() {
    [ -z "$late" ] || kill "$late" 2>/dev/null || true
    signal_tasks
    (requeue_late) &
    late=$!
}

# If a step or a save needs too long, requeue the job from the newest checkpoint.
requeue_late() {
    local second why
    trap - USR2 TERM HUP
    for second in $(seq "${STOP_SECONDS:-150}"); do
        sleep 1
        kill -0 "$$" 2>/dev/null || exit 0 # the job's shell is gone: do not requeue the next try
        ((second % 5)) || signal_tasks # srun loses signals while it starts the tasks
    done
    why=$(limit_reached)
    [ -n "$why" ] || why=$(slurm_decision)
    record decision reason "\"${why:-late}\""
    log "the tasks have not ended within $second s: $(sentence "${why:-late}")"
    [ -n "$why" ] || requeue
}

# Wait for a child, and return its exit status. Signals interrupt `wait`, so wait again.
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

# sentence REASON [STATUS]: print a decision for people. Programs must read REASON, in the record.
sentence() {
    case $1 in
        complete) echo "complete, not requeued: $(cat "$RUN/complete")" ;;
        mistake)
            echo "not requeued: the error above, in the options or the data, would end it again"
            ;;
        nothing-saved)
            echo "not requeued: the try ended before it saved anything new (exit status $2)." \
                "See the error above"
            ;;
        nothing-saved-twice)
            echo "not requeued: the last two tries saved nothing new." \
                "Submit it again with a longer --time"
            ;;
        limit) echo "not requeued: already requeued MAX_REQUEUES=$MAX_REQUEUES times" ;;
        no-requeue) echo "not requeued: the job was submitted with --no-requeue" ;;
        ended-by-slurm) echo "not requeued: SLURM ends the job (cancelled, or out of time)" ;;
        held-by-slurm) echo "requeued by SLURM itself, and held. Run scontrol release $(job_id)" ;;
        requeued-by-slurm) echo "requeued by SLURM itself" ;;
        late) echo "requeued from the newest checkpoint" ;;
        requeued)
            echo "requeued, $((${SLURM_RESTART_COUNT:-0} + 1)) of at most $MAX_REQUEUES times" \
                "(exit status $2, newest checkpoint $(newest_checkpoint))"
            ;;
    esac
}

# settle STATUS: end or requeue the job, by its tasks' exit status and the run's folder. Only a
# requeue needs SLURM's controller.
settle() {
    local status=$1 why='' decision
    trap '' USR2 TERM HUP
    [ -z "$late" ] || kill "$late" 2>/dev/null || true
    nothing_new || rm -f "$RUN/.nothing-saved"
    if [ "$status" = 0 ] && [ -f "$RUN/complete" ]; then
        why=complete
    elif [ "$status" = 2 ]; then
        why=mistake
    elif [ -z "$signalled" ] && nothing_new; then
        why=nothing-saved
    else
        why=$(limit_reached)
        if [ -z "$why" ] || scontrol ping >/dev/null 2>&1; then
            decision=$(slurm_decision)
            why=${decision:-$why}
        fi
    fi
    record decision reason "\"${why:-requeued}\"" status "$status"
    log "$(sentence "${why:-requeued}" "$status")"
    [ -z "$why" ] || exit "$status"
    requeue
}

# Print the reason if this job must not start again.
limit_reached() {
    local job='' try=-1
    [ ! -f "$RUN/.nothing-saved" ] || read -r job try <"$RUN/.nothing-saved"
    if [ "${SLURM_RESTART_COUNT:-0}" -ge "$MAX_REQUEUES" ]; then
        echo limit
    elif nothing_new && [ "$job" = "$SLURM_JOB_ID" ] &&
        [ "$((try + 1))" = "${SLURM_RESTART_COUNT:-0}" ]; then
        echo nothing-saved-twice
    fi
}

# Print the reason if SLURM itself decides about the job: it ends, requeues or holds the job, or
# forbids a requeue.
slurm_decision() {
    local job
    job=$(retry_scontrol show job -o "$(job_id)") || exit
    case $job in
        *" JobState=RUNNING "*"Requeue=0 "*) echo no-requeue ;;
        *" JobState=RUNNING "*) ;;
        *" Restarts=${SLURM_RESTART_COUNT:-0} "*) echo ended-by-slurm ;;
        *" Reason=job_requeued_in_held_state "*) echo held-by-slurm ;;
        *) echo requeued-by-slurm ;;
    esac
}

# Print name, inode and time of the run's checkpoints, oldest first, one a line. As `--resume auto`
# does, list them by name: last.pth.tar is not a link on every file system.
checkpoints() {
    local path
    for path in "${RUN-}"/checkpoint_*; do
        [[ ! ${path##*/} =~ ^checkpoint_[0-9]{4,}_[0-9]{6,}\.pth\.tar$ ]] ||
            stat -c "${path##*/} %i %.9Y" -- "$path"
    done | sort -V
}

newest_checkpoint() { checkpoints | tail -n 1 | cut -d ' ' -f 1 | grep . || echo none; }

# Whether this try has saved nothing, even if it has gone back to an earlier checkpoint.
nothing_new() { ! checkpoints | tail -n 1 | grep -vxF -e "$before" >/dev/null; }

# Requeue the job. A try that has saved nothing leaves a file in the run's folder for the next try.
requeue() {
    if nothing_new; then
        mkdir -p "$RUN" && echo "$SLURM_JOB_ID ${SLURM_RESTART_COUNT:-0}" >"$RUN/.nothing-saved"
    else
        rm -f "$RUN/.nothing-saved"
    fi || true
    retry_scontrol requeue "$(job_id)"
}

# retry_scontrol ARGUMENT...: run scontrol. If the controller does not answer, retry for a minute.
retry_scontrol() {
    local try answer
    command -v scontrol >/dev/null ||
        fail "not requeued: no scontrol in PATH; expected SLURM's commands. Submit the job again"
    for try in $(seq 12); do
        if answer=$(scontrol ping 2>&1 >/dev/null && scontrol "$@" 2>&1); then
            [ -z "$answer" ] || echo "$answer"
            return
        fi
        [ "$try" = 12 ] || sleep 5
    done
    fail "not requeued: SLURM does not answer scontrol $* (${answer##*$'\n'}). Submit the job again"
}

# Print the nodes' addresses from SLURM, because names may not resolve inside a container.
# /etc/hosts often has a loopback address for a machine's own name, which other machines cannot use.
# Such nodes are omitted, and each task resolves their names.
node_addresses() {
    local name address number
    scontrol show node -o "$SLURM_JOB_NODELIST" 2>/dev/null |
        sed 's/.*NodeName=\([^ ]*\).* NodeAddr=\([^ ]*\).*/\1 \2/' |
        while read -r name address; do
            number=$(getent ahostsv4 "$address" | awk 'NR == 1 { print $1 }') || true
            [[ $number = "$address" || ($number && $number != 127.*) ]] &&
                printf '%s=%s ' "$name" "$number"
        done || true
}

# On a node: `bash slurm/functions.sh FUNCTION ...`.
if [ "${BASH_SOURCE[0]}" = "$0" ]; then
    set -euo pipefail
    # If a failed task ends the step, srun can lose the task's last line.
    trap '[ $? = 0 ] || sleep 1' EXIT
    "$@"
else
    [ "${SLURM_JOB_ID_HET_GROUP_0-none}" != "${SLURM_JOB_ID-}" ] ||
        fail "a heterogeneous job of $SLURM_HET_SIZE components; expected one." \
            "Submit it without ':' and 'hetjob'"
    check_settings
    # The program must come from the chosen environment, and its ranks from srun. A login
    # environment, or `sbatch --export=ALL`, can set others.
    unset PYTHONPATH PYTHONHOME HOROVOD_{RANK,SIZE} OMPI_COMM_WORLD_{RANK,SIZE}
    before=$(checkpoints)
    trap 'forward USR2' USR2
    trap 'forward TERM' TERM
    trap 'forward HUP' HUP
fi
