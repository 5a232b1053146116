#!/bin/sh
# Build, test and measure on a machine with a GPU, none of it cut short by a failure of another.
#
#     PYTHON=python3 sh bench/on_gpu.sh DIRECTORY [options of bench.gpu, such as --quick]
#
# Writes native.log, tests.log, ops.json, gpu.json and consistency.json to DIRECTORY.
set -u
out=$(mkdir -p "$1" && cd "$1" && pwd) || exit 2
shift
cd "$(dirname "$0")/.." || exit 2
python=${PYTHON:-python3}
export PYTHONPATH=$PWD:$PWD/kernels
status=0
{ cmake -S . -B build/native -DPython_EXECUTABLE="$(command -v "$python")" &&
    cmake --build build/native --parallel 8; } > "$out/native.log" 2>&1 || status=1
"$python" -m pytest -m gpu 2>&1 | tee "$out/tests.log" | tail -30
grep -Eq '[0-9]+ (failed|error)' "$out/tests.log" && status=1
"$python" -m bench.gpu --output "$out/gpu.json" "$@" || status=1
"$python" -m bench.ops --output "$out/ops.json" || status=1
"$python" -m bench.consistency --output "$out/consistency.json" || status=1
exit $status
