#!/usr/bin/env bash
# A Docker engine of one's own on this machine, and a base image made here: for machines that have no engine,
# or whose engine reaches no image registry. As root.
#
#   eval "$(docker/local-engine.sh up)"     sets DOCKER_HOST and BASE_IMAGE in this shell
#   docker/local-engine.sh status           what runs; exit code 3 when no engine answers
#   docker/local-engine.sh down             stops the engine that `up` started, with its containers; images stay
#
# Where an engine answers already, `up` uses that one, and `down` leaves it alone. The engine has no network
# of its own: build and run with --network host. The base image is this machine's own Debian or Ubuntu by
# debootstrap, with this machine's package mirror and CA bundle, for apt and pip in it; kept in
# ~/.cache/moco-mgd, so that only the first `up` takes minutes. With it in place of the official images:
#
#   docker build --network host -f docker/Dockerfile \
#       --build-arg BASE_IMAGE="$BASE_IMAGE" --build-arg RUNTIME_IMAGE="$BASE_IMAGE" -t moco-mgd .
#
#   LOCAL_ENGINE    the engine's folder (default runs/local-engine in the repository): data/, dockerd.log
set -euo pipefail
PATH=$PATH:/usr/sbin:/sbin # where debootstrap is, and what it needs

here=$(cd "$(dirname "${BASH_SOURCE[0]}")" && pwd)
folder=$(realpath -m "${LOCAL_ENGINE:-$here/../runs/local-engine}")
run=/run/local-engine-$(sha256sum <<<"$folder" | cut -c1-12) # the names of sockets must be short
socket=unix://$run/docker.sock
cache=${XDG_CACHE_HOME:-~/.cache}/moco-mgd
command=(dockerd --config-file="$folder/daemon.json" --host="$socket" --data-root="$folder/data" --exec-root="$run/exec"
    --pidfile="$run/dockerd.pid" --storage-driver=overlay2 --iptables=false --bridge=none)

say() { echo "local-engine: $*" >&2; } # stdout is for eval
fail() { echo "local-engine: $*" >&2; exit 2; }

answers() { timeout 20 docker "$@" info --format '{{.ServerVersion}}' >/dev/null 2>&1; } # [--host URL]
foreign() { docker context inspect --format '{{.Endpoints.docker.Host}}'; }              # what docker uses by itself
containers() { docker --host "$socket" ps -q | wc -l; }

# The pid of the engine in the folder, if it lives. The pid file may be older than the process that has its
# number now, which is why the whole command line must be the same.
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
    [ ${#missing[@]} = 0 ] || fail "missing here: apt-get install $(printf '%s\n' "${missing[@]}" | sort -u | xargs)"
}

start() {
    local starter number
    need dockerd=docker.io containerd=docker.io runc=docker.io
    [ "$(id -u)" = 0 ] || fail "no Docker engine answers here, and only root can start one"
    if ! number=$(pid); then
        remove_run
        mkdir -m 755 "$run"
        echo '{}' >"$folder/daemon.json" # not the machine's own in /etc/docker
        setsid "${command[@]}" >"$folder/dockerd.log" 2>&1 </dev/null 9>&- &
        starter=$!
        disown
    fi
    for _ in $(seq 120); do
        if answers --host "$socket"; then
            say "started, pid $(pid); log: $folder/dockerd.log"
            return
        fi
        kill -0 "${number:-$starter}" 2>/dev/null || break
        sleep 0.5
    done
    tail -n 5 "$folder/dockerd.log" >&2
    fail "the engine did not start; its log is $folder/dockerd.log"
}

# The image `base`: a tree by debootstrap, which is kept, and this machine's settings on top.
base_image() {
    local system suite recipe tree settings mirror pack key
    need debootstrap=debootstrap
    system=$(sed -n 's/^ID=//p' /etc/os-release)
    suite=$(sed -n 's/^VERSION_CODENAME=//p' /etc/os-release)
    [[ $system-$suite =~ ^(debian|ubuntu)-.+ ]] || fail "a base image can be made on Debian and Ubuntu alone"
    recipe=$(dpkg --print-architecture)-$(declare -f base_image | sha256sum | cut -c1-8)
    tree=$cache/base-$suite-$recipe.tar
    base=moco-mgd-base:$suite
    work=$(mktemp -d "$folder/base.XXXXXX")
    trap 'rm -rf --one-file-system "$work"' EXIT

    settings=$work/settings
    mkdir -p "$settings"/etc/{apt/apt.conf.d,ssl/certs}
    # shellcheck disable=SC2016
    apt-get indextargets --format '$(REPO_URI) $(RELEASE) $(COMPONENT)' 'Created-By: Packages' |
        awk -v suite="$suite" '$2 ~ "^" suite "(-updates|-security)?$" && $3 ~ /^(main|universe)$/ {print "deb", $0}' \
            >"$settings/etc/apt/sources.list"
    mirror=$(awk -v suite="$suite" '$3 == suite {print $2; exit}' "$settings/etc/apt/sources.list")
    [ -n "$mirror" ] || fail "apt has no sources of $suite here"
    apt-config dump | grep -E '^Acquire::(Check-|https?::Proxy)' >"$settings/etc/apt/apt.conf.d/80host" || true
    cp -L /etc/ssl/certs/ca-certificates.crt "$settings/etc/ssl/certs/"
    printf '[global]\ncert = /etc/ssl/certs/ca-certificates.crt\ntimeout = %s\n' "${PIP_DEFAULT_TIMEOUT:-60}" >"$settings/etc/pip.conf"
    (cd "$settings" && find . -type f | sort) >"$work/files"
    pack=(tar --no-recursion --mtime=@0 --owner=0 --group=0 --mode=go=rX -C "$settings" --files-from="$work/files")
    "${pack[@]}" -cf "$work/settings.tar"

    # The same image is not imported again: what was built on it would be built anew.
    key=$(printf '%s' "$recipe" | cat - "$work/settings.tar" | sha256sum | cut -c1-16)
    if [ "$(docker image inspect --format '{{.Comment}}' "$base" 2>/dev/null)" = "$key" ]; then
        return
    fi
    if [ ! -f "$tree" ]; then
        [ "$(id -u)" = 0 ] || fail "only root can make the base image"
        say "making the base image of $suite by debootstrap (about 1 minute)"
        mkdir -p "$cache"
        debootstrap --variant=minbase --include=ca-certificates "$suite" "$work/tree" "$mirror" >"$folder/debootstrap.log" 2>&1 ||
            { tail -n 5 "$folder/debootstrap.log" >&2; fail "debootstrap failed; its log is $folder/debootstrap.log"; }
        rm -rf "$work/tree"/var/{cache/apt/archives,lib/apt/lists}/* "$work/tree"/etc/{resolv.conf,hostname}
        (cd "$work/tree" && xargs rm -f) <"$work/files" # a path may be in the archive only once
        tar -C "$work/tree" --exclude='./dev/*' --exclude='./proc/*' --exclude='./sys/*' -cf "$work/tree.tar" .
        rm -f "$cache/base-$suite"-*.tar
        mv "$work/tree.tar" "$tree.new" && mv "$tree.new" "$tree"
    fi
    cp "$tree" "$work/whole.tar"
    "${pack[@]}" --append -f "$work/whole.tar"
    docker import --message "$key" --change 'CMD ["bash"]' "$work/whole.tar" "$base" >/dev/null
    say "imported the base image $base"
}

up() {
    need docker=docker.io debootstrap=debootstrap
    mkdir -p "$folder"
    exec 9>"$folder/lock"
    flock 9
    if pid >/dev/null && answers --host "$socket"; then
        say "runs already, pid $(pid)"
        export DOCKER_HOST=$socket
    elif answers; then
        DOCKER_HOST=$(foreign)
        export DOCKER_HOST
        say "an engine answers already at $DOCKER_HOST: using that"
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
        say "runs, pid $number, $(containers) containers: DOCKER_HOST=$socket"
        up=1
    elif [ -n "$number" ]; then
        say "pid $number runs, but does not answer at $socket; log: $folder/dockerd.log"
    fi
    if [ "$(foreign)" != "$socket" ] && answers; then
        say "an engine that was not started here answers at $(foreign)"
        up=1
    fi
    [ -n "$up" ] || { say "no engine answers"; exit 3; }
}

# An engine leaves the network namespace of its --network host containers mounted.
remove_run() {
    awk -v below="$run/" 'index($2, below) == 1 { print $2 }' /proc/mounts | xargs -r umount
    rm -rf --one-file-system "$run"
}

down() {
    local number
    if ! number=$(pid); then
        say "no engine of $folder runs: nothing to stop"
        return
    fi
    kill -TERM "$number"
    for _ in $(seq 180); do
        if ! kill -0 "$number" 2>/dev/null; then
            remove_run
            say "stopped, pid $number; its images stay in $folder/data"
            return
        fi
        sleep 0.5
    done
    fail "pid $number has not stopped in 90 s; log: $folder/dockerd.log"
}

case "${1:-}" in
    up | status | down) "$1" ;;
    *) fail "expected up, status or down" ;;
esac
