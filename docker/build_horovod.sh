#!/usr/bin/env bash
# Builds Horovod against the torch that PYTHON has, keeps the wheel, and installs it there.
#
#   docker/build_horovod.sh [PYTHON]        PYTHON: an interpreter with torch, default python3
#
# With a CUDA toolkit of torch's own CUDA version the wheel has NCCL (torch's own) for GPUs and Gloo
# for CPUs; without one it has Gloo alone. A wheel once built is reused: it lies in HOROVOD_WHEELS
# (default ~/.cache/moco-mgd/wheels), named after all that it depends on.
#
#   HOROVOD_SDIST   the source archive of this release, for machines that reach no package registry
#   CUDA_HOME       the CUDA toolkit, where it is in no usual place
set -euo pipefail

version=0.28.1
python=$(command -v "${1:-python3}") || { echo "build_horovod: no interpreter '${1:-python3}'" >&2; exit 2; }
python=$(cd "$(dirname "$python")" && pwd)/$(basename "$python") # the build has a folder of its own
cache=${HOROVOD_WHEELS:-${XDG_CACHE_HOME:-~/.cache}/moco-mgd/wheels}

say() { echo "build_horovod: $*"; }
fail() { echo "build_horovod: $*" >&2; exit 2; }

"$python" - <<'PY' || fail "install torch and what 'pip install .[horovod]' names into $python first"
import cffi, cloudpickle, packaging, psutil, setuptools, torch, wheel, yaml
PY
command -v "${CXX:-g++}" >/dev/null || fail "no C++ compiler: apt-get install g++"
command -v make >/dev/null || fail "no make: apt-get install make"

# A toolkit is a folder with the headers beside the compiler; an nvcc script alone on PATH is none.
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

read -r torch torch_cuda standard abi nccl < <("$python" - <<'PY'
import os, re, sys, torch
nccl = "none"
for folder in sys.path:
    if os.path.isfile(os.path.join(folder, "nvidia/nccl/include/nccl.h")):
        nccl = os.path.join(folder, "nvidia/nccl")
        break
# The C++ standard that torch's headers ask of extensions.
extension = os.path.join(os.path.dirname(torch.__file__), "utils/cpp_extension.py")
standard = max(map(int, re.findall(r"std=c\+\+(\d+)", open(extension).read())))
print(torch.__version__, torch.version.cuda or "none", standard, sys.implementation.cache_tag, nccl)
PY
)

toolkit=$(find_toolkit)
backend=gloo
if [ "$torch_cuda" = none ]; then
    say "torch $torch is a CPU build: building with Gloo alone"
elif [ -z "$toolkit" ]; then
    say "no CUDA toolkit here: building with Gloo alone, for CPUs"
elif [[ $("$toolkit/bin/nvcc" --version) != *"release ${torch_cuda%%.*}."* ]]; then
    say "warning: the toolkit in $toolkit is not CUDA ${torch_cuda%%.*}, which torch $torch needs: building with Gloo alone, for CPUs"
elif [ "$nccl" = none ]; then
    say "warning: torch's NCCL package (nvidia-nccl) is not installed: building with Gloo alone, for CPUs"
else
    backend=nccl
fi

recipe=$(sha256sum "${BASH_SOURCE[0]}" | cut -c1-8)
shelf=$cache/horovod-$version-torch-$torch-$abi-$(uname -m)-$backend-$recipe
wheel=$(echo "$shelf"/*.whl)
if [ -f "$wheel" ]; then
    say "using the wheel in $shelf"
    "$python" -m pip install -q --no-deps --force-reinstall "$wheel"
    exit
fi

work=$(mktemp -d)
trap 'rm -rf "$work"' EXIT
log=$cache/build.log
{ mkdir -p "$cache" && : >"$log"; } 2>/dev/null ||
    fail "$cache: cannot be written to; expected a folder for the wheel. Set HOROVOD_WHEELS to another one"

say "building Horovod $version for torch $torch with $backend (about 4 minutes on 2 cores; log: $log)"
if [ -n "${HOROVOD_SDIST:-}" ]; then
    cp "$HOROVOD_SDIST" "$work/horovod-$version.tar.gz"
else
    "$python" -m pip download -q --no-deps --no-build-isolation --no-binary :all: -d "$work" "horovod==$version" >"$log" 2>&1 ||
        fail "could not fetch horovod $version from the package registry (log: $log)"
fi
tar -xzf "$work/horovod-$version.tar.gz" -C "$work"
source=$work/horovod-$version

# The release asks for C++14; today's torch headers, Gloo with them and nvcc 13 need more.
sed -i 's/^set(CMAKE_CXX_STANDARD 14)/set(CMAKE_CXX_STANDARD 17)/' "$source/CMakeLists.txt"
sed -i "s/set(CMAKE_CXX_STANDARD 14)/set(CMAKE_CXX_STANDARD $standard)/" "$source/horovod/torch/CMakeLists.txt"
sed -i 's/set(CMAKE_CUDA_STANDARD 11)/set(CMAKE_CUDA_STANDARD 17)/' "$source/horovod/common/ops/cuda/CMakeLists.txt"

# The release waits for a collective by spinning on sched_yield, which takes the cores from whatever shares them:
# on 2 cores, four workers spent more time on that than on training. A short sleep leaves them free.
sed -i 's/std::this_thread::yield();/std::this_thread::sleep_for(std::chrono::microseconds(50));/' "$source/horovod/torch/mpi_ops_v2.cc"

# The release looks for work once a cycle: what comes just after a look waits for the next, and looking often takes the
# cores that train. Here work that comes ends the sleep.
common=$source/horovod/common
sed -i '/^  void RemoveJoinTensor();/i\
  void WaitForMessage(std::chrono::steady_clock::duration longest) {\
    std::unique_lock<std::mutex> lock(mutex_);\
    came_.wait_for(lock, longest, [this] { return !message_queue_.empty(); });\
  }\
' "$common/tensor_queue.h"
sed -i 's/^protected:/protected:\n  std::condition_variable came_;\n/; s/^#include <mutex>/#include <chrono>\n#include <condition_variable>\n&/' "$common/tensor_queue.h"
sed -i '/^Status TensorQueue::AddToTensorQueue/,/^}/ s/^  return Status::OK();/  came_.notify_one();\n&/' "$common/tensor_queue.cc"
sed -i 's/std::this_thread::sleep_for(sleep_duration);/state.process_set_table.Get(0).tensor_queue.WaitForMessage(sleep_duration);/' "$common/operations.cc"
[ "$(cat "$common"/tensor_queue.{h,cc} "$common/operations.cc" | grep -c 'came_\|WaitForMessage')" = 6 ] ||
    fail "$common has changed: see to how its loop is woken"

# The release kills its workers 5 s after it has passed a SIGTERM on; a step and a save can take longer.
launcher=$source/horovod/runner/common/util/safe_shell_exec.py
sed -i 's/^GRACEFUL_TERMINATION_TIME_S = 5$/GRACEFUL_TERMINATION_TIME_S = 60/' "$launcher"
grep -q '_TIME_S = 60$' "$launcher" || fail "$launcher has changed: see to its time of termination"

# The release remembers its checks of other hosts in ~/.horovod, and ends if it cannot: with a HOME that is read-only,
# full, another user's, or none. Here it starts without that memory.
runner=$source/horovod/runner
sed -i -e 's/^    if not args.disable_cache:$/    if not args.disable_cache and os.path.isabs(CACHE_FOLDER):/' \
    -e 's/^        fn_cache = cache\.Cache(/        try:\n    &/' \
    -e 's/^ *parameters_hash)$/    &\n        except Exception:\n            pass/' "$runner/launch.py"
sed -i -e 's/^import datetime$/import contextlib\n&/' \
    -e "s/^        with open(self._cache_file, 'wb') as cf:/        with contextlib.suppress(OSError), open(self._cache_file, 'wb') as cf:/" \
    "$runner/util/cache.py"
[ "$(cat "$runner"/{launch,util/cache}.py | grep -c 'isabs(CACHE_FOLDER)\|^        except Exception:\|suppress(OSError), open')" = 3 ] ||
    fail "$runner has changed: see to its cache"

export HOROVOD_WITH_PYTORCH=1 HOROVOD_WITHOUT_TENSORFLOW=1 HOROVOD_WITHOUT_MXNET=1
export HOROVOD_WITH_GLOO=1 HOROVOD_WITHOUT_MPI=1
export CMAKE_POLICY_VERSION_MINIMUM=3.5 MAKEFLAGS="-j${HOROVOD_BUILD_JOBS:-$(nproc)}"
if [ "$backend" = nccl ]; then
    # torch's NCCL has no libnccl.so to link against, only the versioned library.
    mkdir "$work/nccl"
    ln -s "$nccl/include" "$work/nccl/include"
    ln -s "$nccl"/lib/libnccl.so.2 "$work/nccl/libnccl.so"
    export CUDA_HOME=$toolkit HOROVOD_CUDA_HOME=$toolkit CUDAToolkit_ROOT=$toolkit PATH=$toolkit/bin:$PATH
    export HOROVOD_GPU_OPERATIONS=NCCL HOROVOD_NCCL_LINK=SHARED
    export HOROVOD_NCCL_INCLUDE=$work/nccl/include HOROVOD_NCCL_LIB=$work/nccl
else
    # Keeps torch's search and CMake's from finding half a toolkit, such as an nvcc script alone.
    sed -i '/check_language(CUDA)/d; /find_package(CUDAToolkit)$/d' "$source/CMakeLists.txt"
    # shellcheck disable=SC2016
    sed -i 's/^string(TOUPPER "${Pytorch_CUDA}" Pytorch_CUDA)/set(Pytorch_CUDA FALSE)/' "$source/cmake/Modules/FindPytorch.cmake"
fi
if ! command -v cmake >/dev/null; then
    "$python" -m pip install -q --target "$work/cmake" 'cmake==3.31.10' || fail "no cmake: apt-get install cmake"
    printf '#!/bin/sh\nPYTHONPATH=%s exec %s/bin/cmake "$@"\n' "$work/cmake" "$work/cmake" >"$work/run-cmake"
    chmod +x "$work/run-cmake"
    export HOROVOD_CMAKE=$work/run-cmake
fi

(cd "$source" && exec "$python" setup.py bdist_wheel --dist-dir "$work/wheel") >>"$log" 2>&1 &
build=$!
trap 'kill "$build" 2>/dev/null || true; rm -rf "$work"' EXIT
shown=
while kill -0 "$build" 2>/dev/null; do
    sleep 2
    step=$(grep -o '^\[ *[0-9]*%\]' "$log" 2>/dev/null | tail -n 1 || true)
    if [ -n "$step" ] && [ "$step" != "$shown" ] && [ $((SECONDS / 15)) != "${tick:-}" ]; then
        say "$step"
        shown=$step tick=$((SECONDS / 15))
    fi
done
if ! wait "$build"; then
    tail -n 25 "$log" >&2
    fail "the build failed; the whole log is in $log"
fi

"$python" -m pip install -q --no-deps --force-reinstall "$work"/wheel/*.whl
"$python" -c 'import horovod.torch as hvd; assert hvd.gloo_built()' || fail "the wheel does not load; the build log is in $log"
# Into place by one rename, so that a build cut short leaves nothing behind that looks whole.
rm -rf "$shelf.new" && mkdir -p "$shelf.new" && cp "$work"/wheel/*.whl "$shelf.new/" && rm -rf "$shelf" && mv "$shelf.new" "$shelf"
say "done: $shelf"
