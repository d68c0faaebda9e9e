#!/usr/bin/env bash
# Everything that needs a CUDA device, compiled and run on one: kernels against their twins, the decoder and the quantised KV cache.
# usage: scripts/gpu_tests.sh [RESULTS.json]   (under 5 minutes on one H100 or H200; the exit status is pytest's)
# Most of the time goes into compiling, so the tests run in several processes where pytest-xdist is installed.
set -uo pipefail
cd "$(dirname "$0")/.."
results=${1:-gpu-tests.json}
workers=()
python3 -c "import xdist" 2>/dev/null && workers=(-n "$(( $(nproc) < 12 ? $(nproc) : 12 ))" --dist worksteal)
report=$(mktemp)
trap 'rm -f "$report"' EXIT
python3 -m pytest -q -p no:cacheprovider -p no:benchmark "${workers[@]}" --timeout 240 --junitxml "$report" tests/kernels -m "not slow" && first=0 || first=$?
[ "$first" -le 1 ] || exit "$first"
second_report=$(mktemp)
python3 -m pytest -q -p no:cacheprovider -p no:benchmark "${workers[@]}" --timeout 240 --junitxml "$second_report" tests/engine --ignore tests/engine/server -m gpu && second=0 || second=$?
python3 - "$results" "$report" "$second_report" <<'PY'
import json, platform, sys
import xml.etree.ElementTree as tree

import torch
import triton

out, *reports = sys.argv[1:]
suites = [suite.attrib for path in reports for suite in tree.parse(path).getroot().iter("testsuite")]
count = {key: sum(int(suite[key]) for suite in suites) for key in ("tests", "failures", "errors", "skipped")}
failed = [f"{case.get('classname')}::{case.get('name')}" for path in reports for case in tree.parse(path).getroot().iter("testcase")
          if case.find("failure") is not None or case.find("error") is not None]
device = torch.cuda.get_device_name() if torch.cuda.is_available() else "none"
versions = {"python": platform.python_version(), "torch": torch.__version__, "triton": triton.__version__}
found = {"device": device, "versions": versions, "command": "scripts/gpu_tests.sh", "seconds": round(sum(float(s["time"]) for s in suites), 1),
         **count, "failed": failed}
open(out, "w").write(json.dumps(found, indent=1) + "\n")
print(json.dumps(found))
PY
rm -f "$second_report"
[ "$first" -eq 0 ] && { [ "$second" -eq 0 ] || [ "$second" -eq 5 ]; }
