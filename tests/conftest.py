"""Settings for all tests."""

from __future__ import annotations

import torch

# The models are tiny: a second thread costs more than it brings, and on a busy machine it costs seconds.
torch.set_num_threads(1)
