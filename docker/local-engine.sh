#!/usr/bin/env bash
# Start a Docker engine on this machine and make a base image, if the machine has no engine, or its
# engine cannot reach an image registry. Run it as root.
#
#   eval "$(docker/local-engine.sh up)"     set DOCKER_HOST and BASE_IMAGE in this shell
#   docker/local-engine.sh status           show the engine; exit code 3 if no engine answers
#   docker/local-engine.sh down             stop the engine of `up` and its containers; keep images
#
# If an engine already answers, `up` uses it, and `down` does not stop it. The engine has no network
# of its own: build and run with --network host. The base image is this machine's own Debian or
# Ubuntu by debootstrap. For apt and pip, it has this machine's package mirror and CA bundle. It is
# kept in ~/.cache/moco-mgd, so that only the first `up` needs minutes. To build on it instead of
# the official images:
#
#   docker build --network host -f docker/Dockerfile \
#       --build-arg BASE_IMAGE="$BASE_IMAGE" --build-arg RUNTIME_IMAGE="$BASE_IMAGE" -t moco-mgd .
#
#   LOCAL_ENGINE    folder of data/ and dockerd.log (default: runs/local-engine in the repository)
set -euo pipefail
PATH=$PATH:/usr/sbin:/sbin # for debootstrap and its programs

here=$(cd "$(dirname "${BASH_SOURCE[0]}")" && pwd)
folder=$(realpath -m "${LOCAL_ENGINE:-$here/../runs/local-engine}")
run=/run/local-engine-$(sha256sum <<<"$folder" | cut -c1-12) # short, because it has sockets
socket=unix://$run/docker.sock
cache=${XDG_CACHE_HOME:-~/.cache}/moco-mgd
command=(dockerd --config-file="$folder/daemon.json" --host="$socket" --data-root="$folder/data"
    --exec-root="$run/exec" --pidfile="$run/dockerd.pid" --storage-driver=overlay2
    --iptables=false --bridge=none)

log() { echo "local-engine: $*" >&2; } # stdout is for eval
fail() { echo "local-engine: $*" >&2; exit 2; }

answers() { # [--host URL]
    timeout 20 docker "$@" info --format '{{.ServerVersion}}' >/dev/null 2>&1
}
foreign() { # print the address of docker's default engine
    docker context inspect --format '{{.Endpoints.docker.Host}}'
}
containers() { docker --host "$socket" ps -q | wc -l; }

# Print the pid of the folder's engine, if it runs. The full command line must match, because
# another process may have the number of an old pid file.
pid() {
    local number
    number=$(cat "$run/dockerd.pid" 2>/dev/null) && [ -n "$number" ] &&
        cmp -s <(printf '%s\0' "${command[@]}") "/proc/$number/cmdline" && echo "$number"
}

need() { # PROGRAM=PACKAGE...
    local pair missing=()
    for pair in "$@"; do
        command -v "${pair%%=*}" >/dev/null || missing+=("${pair#*=}")
    done
    [ ${#missing[@]} = 0 ] ||
        fail "missing packages. Run apt-get install" \
            "$(printf '%s\n' "${missing[@]}" | sort -u | xargs)"
}

start() {
    local starter number
    need dockerd=docker.io containerd=docker.io runc=docker.io
    [ "$(id -u)" = 0 ] || fail "no Docker engine answers here. Only root can start one"
    if ! number=$(pid); then
        remove_run
        mkdir -m 755 "$run"
        echo '{}' >"$folder/daemon.json" # instead of /etc/docker/daemon.json
        setsid "${command[@]}" >"$folder/dockerd.log" 2>&1 </dev/null 9>&- &
        starter=$!
        disown
    fi
    for _ in $(seq 120); do
        if answers --host "$socket"; then
            log "started, pid $(pid); log: $folder/dockerd.log"
            return
        fi
        kill -0 "${number:-$starter}" 2>/dev/null || break
        sleep 0.5
    done
    tail -n 5 "$folder/dockerd.log" >&2
    fail "the engine did not start. Its log is $folder/dockerd.log"
}

# Make the image `base`: a tree by debootstrap, which is kept, and this machine's settings. A change
# of this function, comments excepted, makes the image again.
base_image() {
    local system suite recipe tree settings mirror pack key
    need debootstrap=debootstrap
    system=$(sed -n 's/^ID=//p' /etc/os-release)
    suite=$(sed -n 's/^VERSION_CODENAME=//p' /etc/os-release)
    [[ $system-$suite =~ ^(debian|ubuntu)-.+ ]] ||
        fail "cannot make a base image on $system $suite; expected Debian or Ubuntu"
    recipe=$(dpkg --print-architecture)-$(declare -f base_image | sha256sum | cut -c1-8)
    tree=$cache/base-$suite-$recipe.tar
    base=moco-mgd-base:$suite
    work=$(mktemp -d "$folder/base.XXXXXX")
    trap 'rm -rf --one-file-system "$work"' EXIT

    settings=$work/settings
    mkdir -p "$settings"/etc/{apt/apt.conf.d,ssl/certs}
    # shellcheck disable=SC2016
    apt-get indextargets --format '$(REPO_URI) $(RELEASE) $(COMPONENT)' 'Created-By: Packages' |
        awk -v suite="$suite" '
            $2 ~ "^" suite "(-updates|-security)?$" && $3 ~ /^(main|universe)$/ {print "deb", $0}' \
            >"$settings/etc/apt/sources.list"
    mirror=$(awk -v suite="$suite" '$3 == suite {print $2; exit}' "$settings/etc/apt/sources.list")
    [ -n "$mirror" ] || fail "apt has no sources of $suite here"
    apt-config dump | grep -E '^Acquire::(Check-|https?::Proxy)' \
        >"$settings/etc/apt/apt.conf.d/80host" || true
    cp -L /etc/ssl/certs/ca-certificates.crt "$settings/etc/ssl/certs/"
    printf '[global]\ncert = /etc/ssl/certs/ca-certificates.crt\ntimeout = %s\n' \
        "${PIP_DEFAULT_TIMEOUT:-60}" >"$settings/etc/pip.conf"
    (cd "$settings" && find . -type f | sort) >"$work/files"
    pack=(tar --no-recursion --mtime=@0 --owner=0 --group=0 --mode=go=rX -C "$settings"
        --files-from="$work/files")
    "${pack[@]}" -cf "$work/settings.tar"

    # Do not import the same image again: all images on top of it would have to be built again.
    key=$(printf '%s' "$recipe" | cat - "$work/settings.tar" | sha256sum | cut -c1-16)
    if [ "$(docker image inspect --format '{{.Comment}}' "$base" 2>/dev/null)" = "$key" ]; then
        return
    fi
    if [ ! -f "$tree" ]; then
        [ "$(id -u)" = 0 ] || fail "only root can make the base image"
        log "making the base image of $suite by debootstrap (about 1 minute)"
        mkdir -p "$cache"
        debootstrap --variant=minbase --include=ca-certificates "$suite" "$work/tree" "$mirror" \
            >"$folder/debootstrap.log" 2>&1 || {
            tail -n 5 "$folder/debootstrap.log" >&2
            fail "debootstrap failed. Its log is $folder/debootstrap.log"
        }
        rm -rf "$work/tree"/var/{cache/apt/archives,lib/apt/lists}/* \
            "$work/tree"/etc/{resolv.conf,hostname}
        # The settings replace these files: a path must be in the archive once.
        (cd "$work/tree" && xargs rm -f) <"$work/files"
        tar -C "$work/tree" --exclude='./dev/*' --exclude='./proc/*' --exclude='./sys/*' \
            -cf "$work/tree.tar" .
        rm -f "$cache/base-$suite"-*.tar
        mv "$work/tree.tar" "$tree.new" && mv "$tree.new" "$tree"
    fi
    cp "$tree" "$work/base.tar"
    "${pack[@]}" --append -f "$work/base.tar"
    docker import --message "$key" --change 'CMD ["bash"]' "$work/base.tar" "$base" >/dev/null
    log "imported the base image $base"
}

up() {
    need docker=docker.io debootstrap=debootstrap
    mkdir -p "$folder"
    exec 9>"$folder/lock"
    flock 9
    if pid >/dev/null && answers --host "$socket"; then
        log "runs already, pid $(pid)"
        export DOCKER_HOST=$socket
    elif answers; then
        DOCKER_HOST=$(foreign)
        export DOCKER_HOST
        log "an engine answers already at $DOCKER_HOST: using it"
    else
        start
        export DOCKER_HOST=$socket
    fi
    base_image
    printf 'export DOCKER_HOST=%q\nexport BASE_IMAGE=%q\n' "$DOCKER_HOST" "$base"
}

status() {
    local number up=
    need docker=docker.io
    if number=$(pid) && answers --host "$socket"; then
        log "runs, pid $number, $(containers) containers: DOCKER_HOST=$socket"
        up=1
    elif [ -n "$number" ]; then
        log "pid $number runs, but does not answer at $socket; log: $folder/dockerd.log"
    fi
    if [ "$(foreign)" != "$socket" ] && answers; then
        log "an engine that was not started here answers at $(foreign)"
        up=1
    fi
    [ -n "$up" ] || { log "no engine answers"; exit 3; }
}

# Remove the sockets' folder. A stopped engine leaves mounts there: the network namespaces of its
# --network host containers.
remove_run() {
    awk -v below="$run/" 'index($2, below) == 1 { print $2 }' /proc/mounts | xargs -r umount
    rm -rf --one-file-system "$run"
}

down() {
    local number
    if ! number=$(pid); then
        log "no engine of $folder runs: nothing to stop"
        return
    fi
    kill -TERM "$number"
    for _ in $(seq 180); do
        if ! kill -0 "$number" 2>/dev/null; then
            remove_run
            log "stopped, pid $number; its images stay in $folder/data"
            return
        fi
        sleep 0.5
    done
    fail "pid $number has not stopped within 90 s. Its log is $folder/dockerd.log"
}

case "${1:-}" in
    up | status | down) "$1" ;;
    *) fail "expected up, status or down" ;;
esac
