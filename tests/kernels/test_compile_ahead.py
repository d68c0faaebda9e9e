"""Kernels compiled before their launch, for a GPU that is not there: what the compiler does, in a process without the interpreter."""

import os
import subprocess
import sys

SCRIPT = """
import threading

import torch
import triton
import triton.language as tl
from triton.backends.compiler import GPUTarget
from triton.runtime import driver

from kernels.compile_ahead import compile_ahead, compiling_ahead


class Driver:
    def get_current_target(self): return GPUTarget("cuda", 90, 32)
    def get_current_device(self): return 0
    def get_current_stream(self, device=None): return 0
    def get_active_torch_device(self): return torch.device("cpu")
    def get_device_interface(self): return None
    def map_python_to_cpp_type(self, kind): return "int"
    launcher_cls = None


driver.set_active(Driver())


@triton.jit
def double(x, y, SIZE: tl.constexpr):
    at = tl.arange(0, SIZE)
    tl.store(y + at, 2 * tl.load(x + at))


@triton.jit
def broken(x, SIZE: tl.constexpr):
    tl.store(x + tl.arange(0, SIZE), no_such_name)


def compiled():
    return sorted(kernel.metadata.name for kernel in double.device_caches[0][0].values())


x = torch.full((64,), 7.0)
seen = []
with compile_ahead():
    assert compiling_ahead()
    y = torch.empty(64)
    for size in (16, 32, 64, 64):
        double[(1,)](x, y, SIZE=size)
    broken[(1,)](x, SIZE=16)
    with compile_ahead():  # inside another: nothing of its own
        assert torch.empty_like(x).eq(0).all() and x.new_empty(3).eq(0).all()
    assert compiling_ahead() and y.eq(0).all(), "nothing was launched, and what is read is zero"
    thread = threading.Thread(target=lambda: seen.append(compiling_ahead()))
    thread.start()
    thread.join()
assert not compiling_ahead() and seen == [False], "other threads launch as ever"
assert compiled() == ["double"] * 3, compiled()
assert torch.full_like(x, 7).eq(x).all()
double.warmup(x, y, SIZE=32, grid=(1,))
assert len(compiled()) == 3, "known"
try:
    double[(1,)](x, y, SIZE=16)
except Exception as error:  # outside a launch is a launch, which this driver has not
    print("launched", type(error).__name__)
try:
    broken[(1,)](x, SIZE=16)
except triton.CompilationError as error:
    print("refused", "no_such_name" in str(error))
"""


def test_kernels_are_compiled_at_once_and_none_is_launched(tmp_path):
    environment = {**os.environ, "TRITON_CACHE_DIR": str(tmp_path), "PYTHONPATH": os.pathsep.join(sys.path)}
    environment.pop("TRITON_INTERPRET", None)
    script = tmp_path / "script.py"
    script.write_text(SCRIPT)
    done = subprocess.run([sys.executable, str(script)], env=environment, capture_output=True, text=True, timeout=300)
    assert done.returncode == 0, done.stderr
    assert done.stdout.splitlines()[0].startswith("launched ") and done.stdout.splitlines()[1] == "refused True"
