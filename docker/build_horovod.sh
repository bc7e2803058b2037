#!/usr/bin/env bash
# Build Horovod for the torch of PYTHON, keep the wheel, and install it there.
#
#   docker/build_horovod.sh [PYTHON]        PYTHON: an interpreter with torch, default python3
#
# If torch is a CUDA build, the wheel has NCCL (torch's own) for GPUs and Gloo for CPUs; otherwise
# it has Gloo only. CUDA's compiler comes from a toolkit of torch's CUDA version. If none is
# installed, it comes from the packages of torch's own CUDA libraries: 105 MB, for the build only,
# from CUDA 13 on. No GPU or driver is needed. Later calls reuse the wheel. Its folder's name has
# the versions of everything it depends on, so different systems can share a home.
#
#   HOROVOD_BACKEND     nccl: fail if the wheel cannot have NCCL; gloo: build without it; default:
#                       NCCL if possible, but if a GPU driver is loaded, fail if the compiler
#                       cannot be fetched
#   HOROVOD_WHEELS      folder of the wheels; default ~/.cache/moco-mgd/wheels
#   HOROVOD_SDIST       source archive of this release, for machines without a package registry
#   HOROVOD_BUILD_JOBS  number of compilers at once; default: one per core, fewer if memory is short
#   CUDA_HOME           the CUDA toolkit, if it is not in a usual folder
#   TMPDIR              folder for the build's files (0.7 GB)
set -euo pipefail

if [[ ${1:-} =~ ^(-h|--help)$ ]]; then
    sed -n '2,/^set /s/^# \{0,1\}//p' "${BASH_SOURCE[0]}"
    exit
fi

version=0.28.1
sdist_sha256=92a43f5a94c43907a56805bad15f19700c62ffc83b7ca483f9e104e229f67ef0
note() { echo "build_horovod: $*"; }
fail() { echo "build_horovod: $*" >&2; exit 2; }

python=$(command -v "${1:-python3}") || fail "no interpreter '${1:-python3}'"
# An absolute path, because the build changes the folder.
python=$(cd "$(dirname "$python")" && pwd)/$(basename "$python")
cache=${HOROVOD_WHEELS:-${XDG_CACHE_HOME:-~/.cache}/moco-mgd/wheels}
requested=${HOROVOD_BACKEND:-}

[[ $requested =~ ^(nccl|gloo|)$ ]] ||
    fail "HOROVOD_BACKEND=$requested: expected nccl, gloo or nothing"
command -v "${CXX:-g++}" >/dev/null || fail "no C++ compiler: apt-get install g++"
command -v make >/dev/null || fail "no make: apt-get install make"

# A toolkit is a folder with compiler and headers. An nvcc script on PATH is not enough.
find_toolkit() {
    local nvcc home
    nvcc=$(readlink -f "$(command -v nvcc || true)")
    for home in "${CUDA_HOME:-}" "${nvcc%/bin/nvcc}" /usr/local/cuda; do
        if [ -x "$home/bin/nvcc" ] && [ -f "$home/include/cuda_runtime.h" ]; then
            readlink -f "$home"
            return
        fi
    done
}

IFS=$'\t' read -r torch torch_cuda standard abi libc nccl headers < <("$python" - <<'PY'
import os, platform, re, sys
try:
    import cffi, cloudpickle, packaging, psutil, setuptools, torch, wheel, yaml
except ImportError as error:
    packages = "torch and the packages of moco-mgd[horovod]"
    sys.exit(f"build_horovod: {sys.executable}: {error}; expected {packages}. Install them there")
cuda = torch.version.cuda or "none"
def find(file):  # the folder of the first package that has the file
    paths = (os.path.join(folder, "nvidia", file) for folder in sys.path)
    return next((os.path.dirname(path) for path in paths if os.path.isfile(path)), "none")
nccl = os.path.dirname(find("nccl/include/nccl.h")) or "none"
headers = find(f"cu{cuda.partition('.')[0]}/include/cublas_v2.h")
# The C++ standard that torch's headers need.
extension = os.path.join(os.path.dirname(torch.__file__), "utils/cpp_extension.py")
standard = max(map(int, re.findall(r"std=c\+\+(\d+)", open(extension).read())))
libc = "".join(platform.libc_ver()) or "libc"
abi = sys.implementation.cache_tag
print(torch.__version__, cuda, standard, abi, libc, nccl, headers, sep="\t")
PY
) || exit 2

cuda=${torch_cuda%%.*}
toolkit=$(find_toolkit)
if [ -n "$toolkit" ] && [[ $("$toolkit/bin/nvcc" --version) != *"release $cuda."* ]]; then
    [ "$torch_cuda" = none ] ||
        note "skipping the toolkit in $toolkit: torch $torch needs CUDA $cuda"
    toolkit=
fi

# without_nccl REASON: build with Gloo only, or fail if NCCL is asked for.
without_nccl() {
    [ "$requested" != nccl ] ||
        fail "HOROVOD_BACKEND=nccl: $1; expected torch with CUDA and NCCL, and CUDA's compiler"
    note "$1: building with Gloo only, for CPUs"
    backend=gloo
}

# Set `backend`: nccl if possible. There are packages of the compiler since CUDA 13.
choose_backend() {
    backend=nccl
    if [ "$requested" = gloo ]; then
        backend=gloo
    elif [ "$torch_cuda" = none ]; then
        without_nccl "torch $torch is a CPU build"
    elif [ "$nccl" = none ]; then
        without_nccl "torch's NCCL package (nvidia-nccl) is not installed"
    elif [ -z "$toolkit" ] && [ "$cuda" -lt 13 ]; then
        without_nccl "no CUDA $cuda toolkit is installed"
    fi
}
choose_backend

# ID and VERSION_ID, such as debian12; a rolling distribution has no VERSION_ID.
distribution=$({ . /etc/os-release && echo "${ID:-linux}${VERSION_ID:-}"; } 2>/dev/null ||
    echo linux)
recipe=$(sha256sum "${BASH_SOURCE[0]}" | cut -c1-8)
system=$(uname -m)-$distribution-$libc
shelf_of() { echo "$cache/horovod-$version-torch-$torch-$abi-$system-$1-$recipe"; }

# refused OUTPUT: fail with pip's error, or its last line.
refused() {
    fail "pip cannot install Horovod into $python:" \
        "$(grep -m 1 ERROR <<<"$1" || echo "${1##*$'\n'}")"
}
install() { "$python" -m pip install -q --no-deps --no-index --force-reinstall "$@"; }
loads() {
    "$python" -c "import horovod.torch as hvd
assert hvd.gloo_built() and ('$backend' != 'nccl' or hvd.nccl_built())"
}

# If a kept wheel loads, install it and exit.
use_kept() {
    local problem
    shelf=$(shelf_of "$backend")
    [ -d "$shelf" ] || return 0
    if ! problem=$(install "$shelf"/*.whl 2>&1); then
        "$python" -m zipfile -l "$shelf"/*.whl >/dev/null 2>&1 && refused "$problem"
    elif problem=$(loads 2>&1); then
        note "using the wheel in $shelf"
        exit
    fi
    note "the wheel in $shelf does not load${problem:+ (${problem##*$'\n'})}: building it again"
}
use_kept

work='' new_shelf='' log=$cache/build-$(uname -n)-$$.log
clean() {
    rm -rf "$work" ${new_shelf:+"$new_shelf"}
    [ -s "$log" ] || rm -f "$log"
}
trap clean EXIT
{ mkdir -p "$cache" && : >"$log"; } 2>/dev/null ||
    fail "$cache: cannot be written to; expected a folder for the wheel." \
        "Set HOROVOD_WHEELS to another one"

# Horovod's CMake files do not quote paths, and the build runs programs that it has just compiled.
plain='^/[A-Za-z0-9_./-]*$'
make_work() {
    local folder
    for folder in "${TMPDIR:-/tmp}" /tmp /var/tmp "$(cd "$cache" && pwd)"; do
        [[ $folder =~ $plain ]] || continue
        folder=$(mktemp -d "$folder/horovod.XXXXXX" 2>/dev/null) || continue
        printf '#!/bin/sh\n' >"$folder/program" && chmod +x "$folder/program"
        if "$folder/program" 2>/dev/null; then
            echo "$folder"
            return
        fi
        rm -rf "$folder"
    done
    return 1
}
work=$(make_work) ||
    fail "TMPDIR ${TMPDIR:-/tmp}: no program can run there, nor in /tmp, /var/tmp and $cache;" \
        "expected a folder that is not mounted noexec, and has only letters, digits, '.', '_'" \
        "and '-' in its path. Set TMPDIR to one"
export TMPDIR=$work
builder=$python
if ! [[ $python =~ $plain ]]; then
    ln -s "$("$python" -c 'import sys; print(sys.prefix)')" "$work/python"
    builder=$work/python/bin/$(basename "$python")
fi

# Compiling torch's headers needs up to 2 GB a process. Login nodes have many cores but little
# memory for each user.
count_jobs() {
    "$python" - <<'PY'
import os, pathlib, psutil
memory = psutil.virtual_memory().available
for line in open("/proc/self/cgroup"):
    _, controllers, group = line.rstrip().split(":", 2)
    if controllers not in ("", "memory"):
        continue
    top, name = ("memory", "memory.limit_in_bytes") if controllers else ("", "memory.max")
    group = pathlib.Path("/sys/fs/cgroup", top, group.lstrip("/"))
    for folder in (group, *group.parents):
        try:
            memory = min(memory, int((folder / name).read_text()))
        except (OSError, ValueError):
            pass  # no limit
print(max(1, min(len(os.sched_getaffinity(0)), memory // 2**31)))
PY
}
jobs=${HOROVOD_BUILD_JOBS:-$(count_jobs)}

# Install CUDA's compiler and headers from packages into `toolkit`, in the build's folder. If
# constraints.txt in this script's folder has the versions of torch, pip checks their hashes.
fetch_toolkit() {
    local pins name arguments=()
    pins=$(dirname "${BASH_SOURCE[0]}")/constraints.txt
    if grep -q "^cuda-toolkit==$torch_cuda\." "$pins" 2>/dev/null; then
        for name in nvidia-cuda-{nvcc,crt,cccl,runtime} nvidia-nvvm; do
            sed -n "/^$name==/,/[^\\]\$/p" "$pins"
        done >"$work/toolkit.txt"
        arguments=(--require-hashes --no-deps -r "$work/toolkit.txt")
    else
        arguments=("cuda-toolkit[nvcc,cccl]==$torch_cuda.*")
    fi
    "$python" -m pip install -q --disable-pip-version-check --target "$work/toolkit" \
        "${arguments[@]}" >>"$log" 2>&1 || return
    toolkit=$work/toolkit/nvidia/cu$cuda
    # nvcc and CMake expect the names of an installed toolkit.
    ln -s lib "$toolkit/lib64" && ln -s "libcudart.so.$cuda" "$toolkit/lib/libcudart.so"
}
has_driver() { [ -e /proc/driver/nvidia/version ] || compgen -G '/dev/nvidia[0-9]*' >/dev/null; }

# Fetch the toolkit. If this fails on a machine with GPUs, end; otherwise build without NCCL.
provide_toolkit() {
    local problem="CUDA $cuda's compiler (nvidia-cuda-nvcc) cannot be fetched (log: $log)"
    note "no CUDA $cuda toolkit is installed: fetching the compiler as a package (105 MB)"
    if fetch_toolkit; then return; fi
    ! has_driver || fail "$problem, and this machine has GPUs. Install a CUDA $cuda toolkit," \
        "or set HOROVOD_BACKEND=gloo to build for CPUs only"
    without_nccl "$problem"
    use_kept
}
# This comes before the source, because a kept wheel with Gloo does not need it.
if [ "$backend" = nccl ] && [ -z "$toolkit" ]; then provide_toolkit; fi

archive=$work/horovod-$version.tar.gz
if [ -n "${HOROVOD_SDIST:-}" ]; then
    origin="HOROVOD_SDIST $HOROVOD_SDIST"
    cp "$HOROVOD_SDIST" "$archive" 2>/dev/null ||
        fail "$origin: cannot be read; expected the source archive of horovod $version"
else
    origin="the package registry's horovod-$version.tar.gz"
    "$python" -m pip download -q --no-deps --no-build-isolation --no-binary :all: -d "$work" \
        "horovod==$version" >>"$log" 2>&1 ||
        fail "could not fetch horovod $version from the package registry (log: $log)"
fi
sum=$(sha256sum "$archive" | cut -d ' ' -f 1)
[ "$sum" = "$sdist_sha256" ] ||
    fail "$origin: damaged or changed, its sha256 is $sum; expected $sdist_sha256." \
        "Download it again"

new_shelf=$shelf.$(uname -n).$$

note "building Horovod $version for torch $torch with $backend" \
    "(about 4 minutes on 2 cores; $jobs at once; log: $log)"
tar -xzf "$archive" -C "$work"
source=$work/horovod-$version

# edit FILE EXPRESSION RESULT: change a file of the release by sed. Fail if a line matches RESULT
# before the change, or none after it.
edit() {
    local file=$source/$1
    if ! grep -q -- "$3" "$file" && sed -i -e "$2" "$file" && grep -q -- "$3" "$file"; then
        return
    fi
    fail "the change of $1 to '$3' does not apply; expected the files of horovod $version"
}

# The release sets C++14. torch's headers, Gloo with them and nvcc 13 need newer standards.
edit CMakeLists.txt \
    's/^set(CMAKE_CXX_STANDARD 14)/set(CMAKE_CXX_STANDARD 17)/' '^set(CMAKE_CXX_STANDARD 17)'
edit horovod/torch/CMakeLists.txt \
    "s/set(CMAKE_CXX_STANDARD 14)/set(CMAKE_CXX_STANDARD $standard)/" "CXX_STANDARD $standard"
edit horovod/common/ops/cuda/CMakeLists.txt \
    's/set(CMAKE_CUDA_STANDARD 11)/set(CMAKE_CUDA_STANDARD 17)/' 'CUDA_STANDARD 17'

# The release writes the build's folders into the library's RUNPATH. One is under /tmp, where any
# user could put a library. Horovod needs no RUNPATH, because torch has loaded its libraries.
edit CMakeLists.txt 's/^set(CMAKE_CXX_EXTENSIONS OFF)/&\nset(CMAKE_SKIP_RPATH ON)/' 'SKIP_RPATH ON'

# The release waits for a collective by spinning on sched_yield, which occupies the core: four
# workers on 2 cores spent more time spinning than training. A short sleep frees the core. Workers
# on GPUs still spin, because they have cores to spare. job/cluster/launch.py sets the variable.
pause='std::getenv("HOROVOD_ENABLE_ASYNC_COMPLETION") ? std::this_thread::yield() :'
pause+=' std::this_thread::sleep_for(std::chrono::microseconds(50));'
edit horovod/torch/mpi_ops_v2.cc "s/std::this_thread::yield();/$pause/" 'microseconds(50)'

# The release polls for work once a cycle: new work waits for the next cycle, and short cycles use
# cores that should train. Here new work ends the sleep.
edit horovod/common/tensor_queue.h '/^  void RemoveJoinTensor();/i\
  void WaitForMessage(std::chrono::steady_clock::duration longest) {\
    std::unique_lock<std::mutex> lock(mutex_);\
    arrived_.wait_for(lock, longest, [this] { return !message_queue_.empty(); });\
  }\
' 'void WaitForMessage'
edit horovod/common/tensor_queue.h \
    's/^protected:/protected:\n  std::condition_variable arrived_;\n/' 'condition_variable arrived_'
edit horovod/common/tensor_queue.h \
    's/^#include <mutex>/#include <chrono>\n#include <condition_variable>\n&/' \
    '<condition_variable>'
edit horovod/common/tensor_queue.cc '/^Status TensorQueue::AddToTensorQueue/,/^}/ {
s/^  return Status::OK();/  arrived_.notify_one();\n&/
}' 'arrived_.notify_one'
wait_for_work='state.process_set_table.Get(0).tensor_queue.WaitForMessage(sleep_duration)'
edit horovod/common/operations.cc \
    "s/std::this_thread::sleep_for(sleep_duration);/$wait_for_work;/" \
    'WaitForMessage(sleep_duration)'

# The release kills workers 5 s after it has forwarded a SIGTERM. A step and a save can need longer.
shell=horovod/runner/common/util/safe_shell_exec.py
edit $shell 's/^GRACEFUL_TERMINATION_TIME_S = 5$/GRACEFUL_TERMINATION_TIME_S = 60/' '_TIME_S = 60$'

# The release terminates the shell around a worker as soon as the worker has ended. A slow shell
# then reports SIGTERM instead of the worker's exit code. Here the shell has the same time as the
# worker to end by itself.
edit $shell 's/wait_procs(p.children(), timeout/wait_procs([] if replaced else children, timeout/' \
    'if replaced else children, timeout'
edit $shell '/^    # Freeze the process to prevent/i\
    end = time.monotonic() + GRACEFUL_TERMINATION_TIME_S\
    while children and not alive and time.monotonic() < end:\
        if not p.is_running():\
            return\
        time.sleep(0.05)\
' 'if not p.is_running'
# If sh is bash, the worker replaces the shell, and the release kills it without a SIGTERM. Here the
# worker receives SIGTERM. Only its parent, Horovod's middleman, can wait for its exit code.
sh='os.path.realpath("/bin/sh")'
edit $shell "s|^    for child in p.children():\$|    replaced = p.exe() != $sh\\
    children = [p] if replaced else p.children()\\
    for child in children:|" '^    replaced = p.exe()'

# If its own output fails, the release stops reading the workers' output, and they block. Here it
# discards the line.
edit $shell 's/^import codecs$/&\nimport contextlib/' '^import contextlib$'
discard='with contextlib.suppress(OSError, AttributeError):'
edit $shell "s/^        dst_stream.write(text)\$/        $discard\n    &/" 'OSError, AttributeError'
edit $shell 's/^        dst_stream.flush()$/    &/' '^            dst_stream.flush()$'

# If a worker fails, the release ends with a traceback and exit code 1. Here it ends with the exit
# code of the first worker that failed. That worker has printed the error.
edit horovod/runner/gloo_run.py "/^def launch_gloo(/,/^def /{
/^ *raise RuntimeError/,/^ *.format(/c\\            sys.exit(exit_code)
}" '^            sys.exit(exit_code)$'

# The release caches its checks of other hosts in ~/.horovod. If HOME is missing, read-only, full or
# another user's, it ends. Here it starts without the cache.
launch=horovod/runner/launch.py memory=horovod/runner/util/cache.py
edit $launch \
    '/^    if not args.disable_cache:$/ s/:$/ and os.path.isabs(CACHE_FOLDER):/' \
    'isabs(CACHE_FOLDER)'
edit $launch 's/^        fn_cache = cache\.Cache(/        try:\n    &/' \
    '^            fn_cache = cache\.Cache('
edit $launch 's/^ *parameters_hash)$/    &\n        except Exception:\n            pass/' \
    '^        except Exception:$'
edit $memory 's/^import datetime$/import contextlib\n&/' '^import contextlib$'
opened="open(self._cache_file, 'wb')"
edit $memory "s/^        with $opened/        with contextlib.suppress(OSError), $opened/" \
    "suppress(OSError), open"

export HOROVOD_WITH_PYTORCH=1 HOROVOD_WITHOUT_TENSORFLOW=1 HOROVOD_WITHOUT_MXNET=1
export HOROVOD_WITH_GLOO=1 HOROVOD_WITHOUT_MPI=1
export CMAKE_POLICY_VERSION_MINIMUM=3.5 MAKEFLAGS=-j$jobs
if [ "$backend" = nccl ]; then
    # torch's NCCL has no libnccl.so to link against, only the versioned library.
    mkdir "$work/nccl"
    ln -s "$nccl/include" "$work/nccl/include"
    ln -s "$nccl"/lib/libnccl.so.2 "$work/nccl/libnccl.so"
    # torch's headers include those of other CUDA libraries, which are in its packages.
    [[ $toolkit != "$work"/* ]] || export CPATH=$toolkit/include/cccl:$headers${CPATH:+:$CPATH}
    export CUDA_HOME=$toolkit HOROVOD_CUDA_HOME=$toolkit CUDAToolkit_ROOT=$toolkit
    export PATH=$toolkit/bin:$PATH
    export HOROVOD_GPU_OPERATIONS=NCCL HOROVOD_NCCL_LINK=SHARED
    export HOROVOD_NCCL_INCLUDE=$work/nccl/include HOROVOD_NCCL_LIB=$work/nccl
else
    # Stop torch and CMake from finding a part of a toolkit, such as an nvcc script without headers.
    edit CMakeLists.txt \
        's/check_language(CUDA)/# no CUDA/; s/find_package(CUDAToolkit)$/# no toolkit/' '# no CUDA'
    # shellcheck disable=SC2016
    edit cmake/Modules/FindPytorch.cmake \
        's/^string(TOUPPER "${Pytorch_CUDA}" Pytorch_CUDA)/set(Pytorch_CUDA FALSE)/' \
        'Pytorch_CUDA FALSE'
fi
if ! command -v cmake >/dev/null; then
    "$python" -m pip install -q --target "$work/cmake" 'cmake==3.31.10' ||
        fail "no cmake: apt-get install cmake"
    printf '#!/bin/sh\nPYTHONPATH=%s exec %s/bin/cmake "$@"\n' "$work/cmake" "$work/cmake" \
        >"$work/run-cmake"
    chmod +x "$work/run-cmake"
    export HOROVOD_CMAKE=$work/run-cmake
fi

(cd "$source" && exec "$builder" setup.py bdist_wheel --dist-dir "$work/wheel") >>"$log" 2>&1 &
build=$!
trap 'kill "$build" 2>/dev/null || true; clean' EXIT
shown=
while kill -0 "$build" 2>/dev/null; do
    sleep 2
    step=$(grep -o '^\[ *[0-9]*%\]' "$log" 2>/dev/null | tail -n 1 || true)
    if [ -n "$step" ] && [ "$step" != "$shown" ] && [ $((SECONDS / 15)) != "${tick:-}" ]; then
        note "$step"
        shown=$step tick=$((SECONDS / 15))
    fi
done
if ! wait "$build"; then
    tail -n 25 "$log" >&2
    fail "the build failed; the log is in $log"
fi

problem=$(install "$work"/wheel/*.whl 2>&1) || refused "$problem"
loads || fail "the wheel does not load; the build log is in $log"
# Rename the folder as the last step: an interrupted build leaves no folder, and two builds at once
# leave one complete wheel.
mkdir "$new_shelf"
cp "$work"/wheel/*.whl "$new_shelf/"
rm -rf "$shelf"
mv -T "$new_shelf" "$shelf" 2>/dev/null || [ -d "$shelf" ]
rm -f "$log"
note "done: $shelf"
