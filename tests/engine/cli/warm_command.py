"""Imported once by the process that runs of the command are forked from: one run of it, so that none of its forks pays for imports."""

import contextlib
import io
import json
import os

from engine.generate import main

with contextlib.redirect_stdout(io.StringIO()), contextlib.redirect_stderr(io.StringIO()):
    main([*json.loads(os.environ["WARM_COMMAND"]), "--max-new-tokens", "3", "Hello"])
