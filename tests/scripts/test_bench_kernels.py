"""scripts/bench_kernels.py: no time without a passed check, the fastest configuration checked as well, rows written as they come."""

from __future__ import annotations

import json
import os
import subprocess
import sys
from pathlib import Path

import pytest
import torch

pytest.importorskip("triton")
SCRIPTS = Path(__file__).resolve().parents[2] / "scripts"


@pytest.fixture
def timing():
    from bench import kernel_timing

    return kernel_timing


def case(timing, error, candidate_error, milliseconds):
    """A case whose configurations (None: the default) take the given milliseconds on `FakeClock`."""
    return timing.Case(
        "op",
        "shape",
        "f32",
        (10**6, 10**6),
        lambda: error,
        1e-3,
        lambda config: [milliseconds[config]],
        {"fast": "fast"},
        candidate_error,
        {"torch": [4.0]},
    )


class FakeClock:
    copy_gb_per_s, matrix_tflops, seconds, captured = 1000.0, 100.0, 10.0, True

    def ms(self, calls):
        return calls[0]


def test_a_failed_check_leaves_no_times(timing):
    row = timing.measure(case(timing, 1.0, lambda config: 0.0, {None: 2.0, "fast": 1.0}), FakeClock())
    assert not row["correct"] and row["ms"] is None and row["baseline_ms"] is None
    assert "no times" in timing.line(row)


def test_the_fastest_right_configuration_is_reported(timing):
    times = {None: 2.0, "fast": 1.0}
    row = timing.measure(case(timing, 0.0, lambda config: 0.0, times), FakeClock())
    assert (row["config"], row["ms"], row["default_ms"], row["baseline"], row["baseline_ms"]) == ("fast", 1.0, 2.0, "torch", 4.0)
    assert row["gb_per_s"] == pytest.approx(1.0) and row["ceiling_fraction"] == pytest.approx(1e-3)
    row = timing.measure(case(timing, 0.0, lambda config: 1.0, times), FakeClock())
    assert (row["config"], row["ms"]) == ("default", 2.0)
    assert row["tried"]["fast"].startswith("wrong")


def test_the_script_in_the_interpreter(tmp_path):
    environment = {**os.environ, "TRITON_INTERPRET": "1", "CUDA_VISIBLE_DEVICES": "", "OMP_NUM_THREADS": "1"}
    out = tmp_path / "rows.json"
    command = [
        sys.executable,
        str(SCRIPTS / "bench_kernels.py"),
        "--tiny",
        "--no-candidates",
        "--ops",
        "rms_norm,rope",
        "--json-out",
        str(out),
    ]
    subprocess.run(command, check=True, env=environment, capture_output=True)
    result = json.loads(out.read_text())
    assert [row["op"] for row in result["rows"]] == ["rms_norm+residual", "rope"]
    assert all(row["correct"] and row["ms"] > 0 for row in result["rows"])
    assert str(tmp_path) not in result["command"] and result["versions"]["torch"] == torch.__version__
