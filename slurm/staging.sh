# shellcheck shell=bash disable=SC2034,SC2154 # functions.sh shares its variables
# Copies a data archive to each node's own disk and unpacks it there. Sourced by functions.sh.

# stage: unpack ARCHIVE into the folder LOCAL of each node, once, and let DATA be what was unpacked.
stage() {
    local status=0
    [ -n "${ARCHIVE:-}" ] || return 0
    export ARCHIVE LOCAL
    start_step srun --export=ALL --kill-on-bad-exit=1 --nodes="$SLURM_JOB_NUM_NODES" --ntasks="$SLURM_JOB_NUM_NODES" \
        --ntasks-per-node=1 bash "$functions" stage_here
    wait_for "$step" || status=$?
    step=
    [ -z "$signalled" ] || settle "$status"
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
