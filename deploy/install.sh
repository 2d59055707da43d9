#!/bin/sh
# Installs loraplane and what it runs on into a fresh virtual environment: install.sh TARGET [EXTRAS], from the repository's root.
# With the extra nvcc, TARGET/cuda becomes a CUDA_HOME with which FlashInfer compiles; that needs a C++ compiler.
# The Dockerfiles call it; deploy/check-install.sh calls it where there is no Docker engine.
set -eu
target=${1:?usage: install.sh TARGET [EXTRAS]}
extras=${2:-}
python=$target/bin/python

# Puts what the wheels bring of CUDA (nvcc, headers, the runtime library) where compilers look for it.
make_cuda_home() {
    cuda=$("$python" -c 'import pathlib, sysconfig; print(*pathlib.Path(sysconfig.get_path("purelib")).glob("nvidia/cu[0-9]*"))')
    mkdir -p "$1/lib64/stubs"
    ln -s "$cuda/bin" "$cuda/include" "$cuda/nvvm" "$1"
    # Linking wants names without versions.
    ln -s "$cuda"/lib/libcudart.so.* "$1/lib64/libcudart.so"
    # The driver's library comes with the machine; what is linked needs its name alone.
    printf '' | c++ -x c++ - -shared -Wl,-soname,libcuda.so.1 -o "$1/lib64/stubs/libcuda.so"
}

# Compiles and links as FlashInfer does (which cannot be imported without a GPU): what does not work is seen here, and not at the
# first start.
check_cuda_home() {
    scratch=$(mktemp -d)
    echo '#include <cuda_bf16.h>
        __global__ void fill(__nv_bfloat16* x) { x[threadIdx.x] = __float2bfloat16(1.0f); }
        extern "C" void launch(__nv_bfloat16* x) { fill<<<1, 32>>>(x); }' >"$scratch/fill.cu"
    "$1/bin/nvcc" -arch=sm_90 --compiler-options=-fPIC -c "$scratch/fill.cu" -o "$scratch/fill.o"
    c++ "$scratch/fill.o" -shared "-L$1/lib64" "-L$1/lib64/stubs" -lcudart -lcuda -o "$scratch/fill.so"
    rm -rf "$scratch"
}

python3 -m venv "$target"
"$python" -m pip install --no-cache-dir --disable-pip-version-check -c constraints.txt ".${extras:+[$extras]}"
# From elsewhere, so that a module or a data file left out of the package is seen when the image is built.
cd /
"$python" -m controlplane --help >/dev/null
"$python" -m dataplane --help >/dev/null
"$python" -c 'import controlplane.app, dataplane.assembly, dataplane.service.server, kernels.lora_torch'
"$target/bin/loraplane" --version
case ",$extras," in
*,nvcc,*)
    make_cuda_home "$target/cuda"
    check_cuda_home "$target/cuda"
    ;;
esac
