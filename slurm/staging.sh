# shellcheck shell=bash disable=SC2034,SC2154 # functions.sh shares its variables
# Copy a data archive to each node's own disk and unpack it there. Sourced by functions.sh.
#
# LOCAL/NAME-HASH-SIZE-TIME/   one version of one archive
#     archive, unpacking/      its copy and its files, while they are incomplete
#     data/                    its files
#     jobs                     ids of the jobs that staged it
# LOCAL/lock                   locked while a job changes LOCAL

# stage: unpack ARCHIVE once into the folder LOCAL of each node, and set DATA to the unpacked files.
stage() {
    local status=0
    [ -n "${ARCHIVE:-}" ] || return 0
    STAGED=$(staged_folder) # the same for all nodes, which may resolve links differently
    export ARCHIVE LOCAL STAGED
    start_step srun --export=ALL --kill-on-bad-exit=1 --nodes="$SLURM_JOB_NUM_NODES" \
        --ntasks="$SLURM_JOB_NUM_NODES" --ntasks-per-node=1 bash "$functions" stage_here
    wait_for "$step" || status=$?
    step=
    [ -z "$signalled" ] || settle "$status"
    [ "$status" = 0 ] || exit "$status"
    DATA=$(data_folder)
}

check_archive() {
    [[ -r $ARCHIVE && ! -d $ARCHIVE ]] ||
        fail "ARCHIVE=$ARCHIVE: cannot be read;" \
            "expected a tar or squashfs file that every node sees"
}

# Print the folder of this version of ARCHIVE. Its name needs no quoting in a container's options.
staged_folder() {
    local path name sum
    check_archive
    path=$(realpath "$ARCHIVE")
    name=${path##*/} name=${name//[^A-Za-z0-9._-]/_} name=${name/#./_}
    sum=$(sha256sum <<<"$path" | cut -c -16)
    echo "$(realpath -ms "$LOCAL")/${name:0:100}-$sum-$(LC_ALL=C stat -c %s-%.9Y "$path")"
}

# Print the folder of images in the unpacked files: the one with train/, else the only folder, else
# the folder of all files.
data_folder() {
    local train entries
    for train in "$STAGED/data/train" "$STAGED"/data/*/train; do
        [ ! -d "$train" ] || { dirname "$train" && return; }
    done
    entries=("$STAGED"/data/*) # without names that begin with a dot
    [ -e "${entries[0]}" ] ||
        fail "ARCHIVE=$ARCHIVE: no files in it; expected images, such as train/CLASS/IMAGE"
    [[ ${#entries[@]} = 1 && -d ${entries[0]} ]] || entries=("$STAGED/data")
    echo "${entries[0]}"
}

# On each node: unpack ARCHIVE unless this version exists, and record that this job needs it.
stage_here() {
    check_archive
    [ -n "${STAGED:-}" ] || STAGED=$(staged_folder)
    lock_local
    [[ ! -L $STAGED && (! -e $STAGED || -O $STAGED) ]] ||
        fail "$STAGED: a link, or another user's; expected a folder of your own. Remove it"
    if [ ! -d "$STAGED/data" ]; then
        remove_unused "${STAGED%-*-*}"-* # other versions, to make room for this one
        remove "$STAGED"
        mkdir "$STAGED"
    fi
    echo "${SLURM_JOB_ID:-none}" >>"$STAGED/jobs" ||
        fail "LOCAL=$LOCAL: cannot be written; expected free space"
    if [ -d "$STAGED/data" ]; then log "data: $STAGED is here already"; else unpack; fi
}

unpack() {
    local expected='' sum copied
    local copy=$STAGED/archive files=$STAGED/unpacking start=$SECONDS
    [ ! -e "$ARCHIVE.sha256" ] || expected=$(given_sum) || { remove "$STAGED" && exit 2; }
    log "data: copying $ARCHIVE ($(du -hL --apparent-size "$ARCHIVE" | cut -f1)) to $STAGED," \
        "$(df -h --output=avail "$LOCAL" | tail -n 1 | tr -d ' ') free"
    sum=$(tee "$copy" <"$ARCHIVE" | sha256sum | cut -d' ' -f1) ||
        unstage "ARCHIVE=$ARCHIVE: cannot be copied to LOCAL=$LOCAL;" \
            "expected enough free space there"
    copied=$(sha256sum "$copy" | cut -d' ' -f1)
    [ "$copied" = "${expected:-$sum}" ] ||
        unstage "ARCHIVE=$ARCHIVE: the copy has SHA-256 $copied; expected ${expected:-$sum}." \
            "Copy it again, or correct $ARCHIVE.sha256"
    case $ARCHIVE in
        *.sqsh | *.sqfs | *.squashfs)
            unsquashfs -quiet -no-progress -no-xattrs -d "$files" "$copy"
            ;;
        *) mkdir "$files" && tar -xf "$copy" -C "$files" --no-same-owner --no-same-permissions ;;
    esac || unstage "ARCHIVE=$ARCHIVE: cannot be unpacked into $STAGED;" \
        "expected a tar or squashfs archive, and enough free space"
    chmod -R u+rwX,go-rwx,a-s "$files" # instead of the modes in the archive
    rm "$copy"
    sync -f "$files"
    mv "$files" "$STAGED/data"
    log "data: unpacked into $STAGED, verified, in $((SECONDS - start)) s"
}

# Print the SHA-256 of ARCHIVE from ARCHIVE.sha256, which `sha256sum` writes, with --tag or without.
given_sum() {
    local name=${ARCHIVE##*/} gnu='^\s*\\?([0-9A-Fa-f]{64})(\s+\*?(.*))?$'
    local bsd='^\s*SHA256 ?\((.*)\) ?= ?([0-9A-Fa-f]{64})\s*$'
    local sum file all=() ours=()
    [[ -f $ARCHIVE.sha256 && -r $ARCHIVE.sha256 ]] ||
        fail "$ARCHIVE.sha256: cannot be read; expected a file"
    while read -r sum file || [ -n "$sum" ]; do
        all+=("${sum,,}")
        [ "${file##*/}" != "$name" ] || ours+=("${sum,,}")
    done < <(sed -nE "s/\r$//; s/$gnu/\1 \3/p; s/$bsd/\2 \1/p" "$ARCHIVE.sha256")
    [ "${#all[@]}" != 1 ] || ours=("${all[@]}")
    [ "${#ours[@]}" = 1 ] ||
        fail "$ARCHIVE.sha256: ${#ours[@]} SHA-256 sums of $name; expected one." \
            "Write it by: sha256sum $name >$name.sha256"
    echo "${ours[0]}"
}

# lock_local: make LOCAL, for this user only, and lock it until this process ends.
lock_local() {
    LOCAL=$(realpath -ms "$LOCAL")
    umask 077
    mkdir -p "$LOCAL" ||
        fail "LOCAL=$LOCAL: cannot be made; expected a folder on the node's own disk"
    check_planted "$LOCAL"
    check_planted "$(realpath "$LOCAL")"
    [[ ! -L $LOCAL ]] || fail "LOCAL=$LOCAL: a link; expected a folder. Remove it or choose another"
    [[ -O $LOCAL ]] ||
        fail "LOCAL=$LOCAL: another user's; expected a folder of your own. Choose another"
    chmod 700 "$LOCAL" # an existing folder may be writable for the group
    [[ ! -L $LOCAL/lock && (-f $LOCAL/lock || ! -e $LOCAL/lock) ]] ||
        fail "LOCAL=$LOCAL: lock there is not a file. Remove it or choose another folder"
    (: >>"$LOCAL/lock") 2>/dev/null || fail "LOCAL=$LOCAL: cannot be written; expected free space"
    exec 9>>"$LOCAL/lock"
    flock --nonblock 9 || { log "data: waiting for another job that changes $LOCAL" && flock 9; }
}

# check_planted PATH: fail if another user has made, or can exchange, a folder of PATH in one that
# all users can write, such as /tmp.
check_planted() {
    local path=$1 parent
    while [ "$path" != / ]; do
        parent=$(dirname "$path")
        if [[ $(stat -Lc %A "$parent") = ????????w* ]]; then
            [ -k "$parent" ] || fail "LOCAL=$LOCAL: all users can exchange it in $parent," \
                "which has no sticky bit. Choose another folder"
            [[ $(stat -c %u "$path") = @(0|"$EUID") ]] ||
                fail "LOCAL=$LOCAL: $path is another user's; expected a folder of your own." \
                    "Choose another folder"
        fi
        path=$parent
    done
}

# On a node: remove the staged folders in LOCAL that no job of this user needs.
clean_local() {
    lock_local
    remove_unused "$LOCAL"/*
}

# remove_unused FOLDER...: remove the staged folders whose jobs have all ended.
remove_unused() {
    local folder jobs=''
    for folder; do
        [[ -f $folder/jobs && ! -L $folder ]] || continue
        [ -n "$jobs" ] || jobs=-$'\n'$(squeue --noheader --me --format=%A) ||
            { log "data: squeue fails, so no folder is removed" && return; }
        ! grep -qxF -e "$jobs" "$folder/jobs" || continue
        log "data: removing $folder, which no job needs"
        remove "$folder"
    done
}

# remove FOLDER: remove it, even if folders in it are read-only.
remove() {
    [[ ! -d $1 || -L $1 ]] || chmod -R u+rwX "$1"
    rm -rf "$1"
}

# unstage MESSAGE...: remove the incomplete files from the node's disk, and fail.
unstage() {
    remove "$STAGED"
    fail "$@"
}
