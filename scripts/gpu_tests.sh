#!/usr/bin/env bash
# Everything that needs a CUDA device, compiled and run on one: the engine's tests, then kernels against their twins.
# usage: scripts/gpu_tests.sh [RESULTS.json]   (under 5 minutes on one H100 or H200; the exit status is pytest's)
# Most of the time goes into compiling: the tests run in several processes where pytest-xdist is installed, and of a kernel's matrix of cases those
# run that meet every value of every parameter (FORETOLD_GPU_CASES=all: all, some 7 minutes). A suite that is not through after its share of the
# time is ended, which the results say; they are written after each suite.
set -uo pipefail
cd "$(dirname "$0")/.."
results=${1:-gpu-tests.json}
workers=()
python3 -c "import xdist" 2>/dev/null && workers=(-n "$(( $(nproc) < 12 ? $(nproc) : 12 ))" --dist worksteal)
limits=()  # of a test and a suite, where pytest-timeout knows both
python3 -c "import inspect, pytest_timeout as p; assert 'session-timeout' in inspect.getsource(p)" 2>/dev/null && limits=(--timeout 120 --session-timeout)
folder=$(mktemp -d)
trap 'rm -rf "$folder"' EXIT
status=0

suite() {  # name, seconds, what pytest is to run
    local name=$1 limit_s=$2 code
    shift 2
    timeout --kill-after 5 $((limit_s + 30)) python3 -m pytest -q -p no:cacheprovider -p no:benchmark "${workers[@]}" \
        ${limits[@]:+"${limits[@]}" "$limit_s"} -rf --tb=short --durations 25 --junitxml "$folder/$name.xml" "$@" && code=0 || code=$?
    [ "$code" -eq 5 ] && code=0  # nothing to run without a device
    echo "$name $code" >>"$folder/suites"
    [ "$code" -gt "$status" ] && status=$code
    python3 - "$results" "$folder" <<'PY'
import json, pathlib, platform, sys
import xml.etree.ElementTree as tree

import torch
import triton

out, folder = sys.argv[1], pathlib.Path(sys.argv[2])
codes = dict(line.split() for line in (folder / "suites").read_text().splitlines())
roots = {name: tree.parse(folder / f"{name}.xml") for name in codes if (folder / f"{name}.xml").exists()}
suites = [suite.attrib for root in roots.values() for suite in root.iter("testsuite")]
count = {key: sum(int(suite[key]) for suite in suites) for key in ("tests", "failures", "errors", "skipped")}
failed = [f"{case.get('classname')}::{case.get('name')}" for root in roots.values() for case in root.iter("testcase")
          if case.find("failure") is not None or case.find("error") is not None]
device = torch.cuda.get_device_name() if torch.cuda.is_available() else "none"
versions = {"python": platform.python_version(), "torch": torch.__version__, "triton": triton.__version__}
# pytest's exit codes: 0 and 1 are suites that came to their end
found = {"device": device, "versions": versions, "command": "scripts/gpu_tests.sh", "seconds": round(sum(float(s["time"]) for s in suites), 1),
         **count, "failed": failed, "unfinished": [name for name, code in codes.items() if int(code) > 1]}
open(out, "w").write(json.dumps(found, indent=1) + "\n")
print(json.dumps(found))
PY
}

suite engine 130 tests/engine --ignore tests/engine/server -m gpu
suite kernels 130 tests/kernels -m "not slow"
exit "$status"
