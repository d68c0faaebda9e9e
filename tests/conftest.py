"""Settings for all tests."""

from __future__ import annotations

import os

import torch
from hypothesis import settings

if not torch.cuda.is_available():
    # read when triton is imported first, by whichever test comes first
    os.environ.setdefault("TRITON_INTERPRET", "1")

# every run tries the same examples
settings.register_profile("fixed", derandomize=True, deadline=None)
settings.load_profile("fixed")

# The models are tiny: a second thread costs more than it brings, and on a busy machine it costs seconds.
torch.set_num_threads(1)
