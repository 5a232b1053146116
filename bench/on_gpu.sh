#!/bin/sh
# Build, test and measure on a machine with a GPU, none of it cut short by a failure of another.
#
#     LIMIT=570 PYTHON=python3 sh bench/on_gpu.sh DIRECTORY [options of bench.gpu, such as --quick]
#
# Writes native.log, tests.log, gpu.json, ops.json and consistency.json to DIRECTORY. All of it ends
# within LIMIT seconds: each part has a bound, bench.gpu what the others leave (of 570 at most 370;
# 120, enough for --quick, where all before it need the whole of theirs), and what it and bench.ops
# have measured is stored as they go. A diffusers that is not in the environment of PYTHON comes by
# PYTHONPATH.
set -u
out=$(mkdir -p "$1" && cd "$1" && pwd) || exit 2
shift
cd "$(dirname "$0")/.." || exit 2
python=${PYTHON:-python3}
export PYTHONPATH="$PWD:$PWD/kernels${PYTHONPATH:+:$PYTHONPATH}" PYTHONUNBUFFERED=1
end=$(($(date +%s) + ${LIMIT:-570}))
status=0

# left AFTERWARDS: the seconds until the end, but for those that other parts need
left() {
    seconds=$((end - $(date +%s) - $1))
    echo $((seconds > 1 ? seconds : 1))
}

# within SECONDS COMMAND...: the command, interrupted after that many seconds or with LIMIT: pytest
# then still says what failed
within() {
    seconds=$(left 10)
    seconds=$((seconds < $1 ? seconds : $1))
    shift
    timeout -s INT -k 10 "$seconds" "$@"
}

arch=$("$python" -c 'import diffusers, torch; print("%d%d" % torch.cuda.get_device_capability())') || {
    echo "most of what follows will say that it cannot run" >&2
    status=1
}
{ within 30 cmake -S . -B build/native -DPython_EXECUTABLE="$(command -v "$python")" \
    ${arch:+"-DCMAKE_CUDA_ARCHITECTURES=$arch"} &&
    within 70 cmake --build build/native --parallel 8; } > "$out/native.log" 2>&1 || status=1
# Only these files: others may ask for packages that such a machine lacks.
within 150 "$python" -m pytest -m gpu $(grep -rl --include='test_*.py' 'mark\.gpu' tests) \
    > "$out/tests.log" 2>&1 || status=1
tail -30 "$out/tests.log"
budget=$(left 200)
within $((budget + 10)) "$python" -m bench.gpu --output "$out/gpu.json" --budget "$budget" "$@" ||
    status=1
within 150 "$python" -m bench.ops --output "$out/ops.json" || status=1
within 30 "$python" -m bench.consistency --output "$out/consistency.json" || status=1
exit $status
