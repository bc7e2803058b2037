# shellcheck shell=bash
# What the job scripts of this folder share: the run, its signals and requeueing; with staging.sh and containers.sh.
# A script sets the variables that its first lines explain, and sources this file; nodes run parts of it as
# `bash slurm/functions.sh FUNCTION ...`. Needs bash and SLURM's own commands alone.

functions=$(realpath "${BASH_SOURCE[0]}")
signalled= # the signal that asked the job to stop, if any
step=      # the process that is srun, while one runs
starting=  # whether one has been started that `step` is not yet
late=      # the one that requeues if that does not end

# Expand ~/ in a job's paths: the shell leaves it in `sbatch --export=HOME,USER,PATH,DATA=~/images`. Resolve `..` in
# those of its command: a container has what they lead to, but not each folder before it.
expand_paths() {
    local variable home=~
    for variable in DATA ARCHIVE LOCAL RUN IMAGE VENV; do
        [[ ${!variable-} != \~/* ]] || printf -v "$variable" %s "$home/${!variable:2}"
    done
    for variable in DATA RUN; do
        [[ /${!variable-}/ != */../* ]] || printf -v "$variable" %s "$(realpath -m -- "${!variable}")"
    done
}
expand_paths

say() { printf '%(%F %T)T %s: %s\n' -1 "${SLURMD_NODENAME:-batch}" "$*"; }
# record KIND NAME VALUE ...: print a record, a line of JSON (job/metrics/schema.py), for programs that read the job's
# log. Each VALUE is JSON.
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
        [ "$code" != 00 ] || continue # no variable holds it
        printf -v character %b "\\x$code"
        text=${text//"$character"/"\\u00$code"}
    done
    printf '"%s"' "$text"
}
fail() {
    printf 'error: %s: %s\n' "${SLURMD_NODENAME:-batch}" "$*" >&2
    exit 2
}

# This job's name for scontrol. One task of an array has the number of the whole array. A job submitted from within
# an array inherits that array's SLURM_ARRAY_JOB_ID.
job_id() {
    if [ "${SLURM_ARRAY_JOB_ID:-}" = "$SLURM_JOB_ID" ]; then echo "${SLURM_JOB_ID}_$SLURM_ARRAY_TASK_ID"; else echo "$SLURM_JOB_ID"; fi
}

# shellcheck source=slurm/staging.sh
. "${functions%/*}/staging.sh"
# shellcheck source=slurm/containers.sh
. "${functions%/*}/containers.sh"

# --- the run ------------------------------------------------------------------------------------------------------------

# run COMMAND...: run it as the job's tasks; then requeue the job if there is more to do.
run() {
    local status=0 problem
    problem=$(mkdir -p -- "$(realpath -m -- "$RUN")" 2>&1) || # RUN itself may be a link to what is not there yet
        fail "RUN=$RUN: ${problem##*: }; expected a folder that this job can make. Choose another"
    MGD_SECRET=$(head -c 32 /dev/urandom | base64) # the tasks prove it to each other
    export RUN DATA RUNTIME IMAGE MOUNTS MGD_SECRET MGD_IMAGE="${IMAGE:-none}"
    export MGD_NODE_ADDRESSES="${MGD_NODE_ADDRESSES:-$(node_addresses)}"
    say "try $((${SLURM_RESTART_COUNT:-0} + 1)) on $SLURM_JOB_NODELIST, runtime $RUNTIME: $*"
    record try number $((${SLURM_RESTART_COUNT:-0} + 1)) nodes "$(json "$SLURM_JOB_NODELIST")" run "$(json "$(realpath -- "$RUN")")"
    if [ -z "$signalled" ]; then
        start_step start_tasks "$@"
        wait_for "$step" || status=$?
    fi
    settle "$status"
}

# start_step COMMAND...: start it, which is or becomes srun, and let `step` be its process.
start_step() {
    starting=1
    "$@" &
    step=$! starting=''
    [ -z "$signalled" ] || stop_tasks # the signal came when there was no step to tell yet
}

# A script that sources this file stops on USR2, TERM and HUP as `settle` says, also while it stages.
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

# A step or a save can take longer than the time that is left: then the newest checkpoint must do.
requeue_late() {
    local second why
    trap - USR2 TERM HUP
    for second in $(seq "${STOP_SECONDS:-150}"); do
        sleep 1
        kill -0 "$$" 2>/dev/null || exit 0 # the job's own shell is gone: the next try must not be requeued
        ((second % 5)) || tell_tasks # srun loses a signal that comes while it starts them
    done
    why=$(limit_reached)
    [ -n "$why" ] || why=$(slurm_decision)
    record decision reason "\"${why:-late}\""
    say "the tasks have not ended in $second s: $(sentence "${why:-late}")"
    [ -n "$why" ] || requeue
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

# sentence REASON [STATUS]: print a decision for people. The reason is the contract, and the sentence is not.
sentence() {
    case $1 in
        complete) echo "complete, not requeued: $(cat "$RUN/complete")" ;;
        mistake) echo "not requeued: a mistake in its options or data, named above, would end it again" ;;
        nothing-saved) echo "not requeued: it ended before it saved anything new (exit status $2)" ;;
        nothing-saved-twice) echo "not requeued: the last two tries saved nothing new. Submit it again with a longer --time" ;;
        limit) echo "not requeued: MAX_REQUEUES=$MAX_REQUEUES are used up" ;;
        no-requeue) echo "not requeued: the job was submitted with --no-requeue" ;;
        ended-by-slurm) echo "not requeued: SLURM ends the job, cancelled or out of time" ;;
        held-by-slurm) echo "requeued by SLURM itself, and held: scontrol release $(job_id)" ;;
        requeued-by-slurm) echo "requeued by SLURM itself" ;;
        late) echo "requeued from the newest checkpoint" ;;
        requeued) echo "requeued, $((${SLURM_RESTART_COUNT:-0} + 1)) of at most $MAX_REQUEUES times (exit status $2, newest checkpoint $(newest_checkpoint))" ;;
    esac
}

# settle STATUS: end the job as its tasks' exit status and its folder say. Only a requeue needs SLURM's controller.
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
    say "$(sentence "${why:-requeued}" "$status")"
    [ -z "$why" ] || exit "$status"
    requeue
}

# Print the reason why this job must not start again, if so.
limit_reached() {
    local job='' try=-1
    [ ! -f "$RUN/.nothing-saved" ] || read -r job try <"$RUN/.nothing-saved"
    if [ "${SLURM_RESTART_COUNT:-0}" -ge "$MAX_REQUEUES" ]; then
        echo limit
    elif nothing_new && [ "$job" = "$SLURM_JOB_ID" ] && [ "$((try + 1))" = "${SLURM_RESTART_COUNT:-0}" ]; then
        echo nothing-saved-twice
    fi
}

# Print the reason for what SLURM itself does with the job, if it does not leave it running.
slurm_decision() {
    local job
    job=$(ask_slurm show job -o "$(job_id)") || exit
    case $job in
        *" JobState=RUNNING "*"Requeue=0 "*) echo no-requeue ;;
        *" JobState=RUNNING "*) ;;
        *" Restarts=${SLURM_RESTART_COUNT:-0} "*) echo ended-by-slurm ;;
        *" Reason=job_requeued_in_held_state "*) echo held-by-slurm ;;
        *) echo requeued-by-slurm ;;
    esac
}

# The run's checkpoints, oldest first, a line each: name, inode and time. By name, as `--resume auto` finds them:
# last.pth.tar is no link on every file system.
checkpoints() {
    local path
    for path in "${RUN-}"/checkpoint_*; do
        [[ ! ${path##*/} =~ ^checkpoint_[0-9]{4,}_[0-9]{6,}\.pth\.tar$ ]] || stat -c "${path##*/} %i %.9Y" -- "$path"
    done | sort -V
}

newest_checkpoint() { checkpoints | tail -n 1 | cut -d ' ' -f 1 | grep . || echo none; }

# Whether this try has saved nothing: also if it went back to an earlier checkpoint.
nothing_new() { ! checkpoints | tail -n 1 | grep -vxF -e "$before" >/dev/null; }

# A try that saves nothing leaves a mark in the run's folder, for the next one.
requeue() {
    if nothing_new; then
        mkdir -p "$RUN" && echo "$SLURM_JOB_ID ${SLURM_RESTART_COUNT:-0}" >"$RUN/.nothing-saved"
    else
        rm -f "$RUN/.nothing-saved"
    fi || true
    ask_slurm requeue "$(job_id)"
}

# SLURM's controller may be away for a moment: try again for a minute.
ask_slurm() {
    local try answer
    command -v scontrol >/dev/null || fail "not requeued: no scontrol in PATH; expected SLURM's commands. Submit the job again"
    for try in $(seq 12); do
        if answer=$(scontrol ping 2>&1 >/dev/null && scontrol "$@" 2>&1); then
            [ -z "$answer" ] || echo "$answer"
            return
        fi
        [ "$try" = 12 ] || sleep 5
    done
    fail "not requeued: SLURM does not answer scontrol $* (${answer##*$'\n'}). Submit the job again"
}

# The nodes' addresses as SLURM has them: inside a container, names may not resolve. A machine's own name often
# stands for a loopback address in its /etc/hosts, where no other machine finds it: such are left to each task.
node_addresses() {
    local name address number
    scontrol show node -o "$SLURM_JOB_NODELIST" 2>/dev/null | sed 's/.*NodeName=\([^ ]*\).* NodeAddr=\([^ ]*\).*/\1 \2/' |
        while read -r name address; do
            number=$(getent ahostsv4 "$address" | awk 'NR == 1 { print $1 }') || true
            [[ $number = "$address" || ($number && $number != 127.*) ]] && printf '%s=%s ' "$name" "$number"
        done || true
}

# On a node: `bash slurm/functions.sh FUNCTION ...`.
if [ "${BASH_SOURCE[0]}" = "$0" ]; then
    set -euo pipefail
    trap '[ $? = 0 ] || sleep 1' EXIT # srun can lose what a task says last when it ends the whole step with it
    "$@"
else
    [ "${SLURM_JOB_ID_HET_GROUP_0-none}" != "${SLURM_JOB_ID-}" ] ||
        fail "a heterogeneous job of $SLURM_HET_SIZE components; expected one. Submit it without ':' and 'hetjob'"
    check_settings
    # The program must come from the environment chosen, and its ranks from srun. A login environment, or that of
    # `sbatch --export=ALL`, can hold others.
    unset PYTHONPATH PYTHONHOME HOROVOD_{RANK,SIZE} OMPI_COMM_WORLD_{RANK,SIZE}
    before=$(checkpoints)
    trap 'forward USR2' USR2
    trap 'forward TERM' TERM
    trap 'forward HUP' HUP
fi
