"""Values that others wrote, looked at in one go."""

from __future__ import annotations

import json

import numpy as np
import pytest

from engine.errors import InvalidOption
from engine.inputs import MAX_NESTING, are_whole, is_whole, parse_json


@pytest.mark.parametrize("values", [[], [1, -2], [True], [1, True], [1.0], [np.int64(3), 4], [np.bool_(True)], [1, "2"], [None], [[1]]])
def test_many_whole_numbers_are_told_as_one_is(values):
    assert are_whole(values) == all(is_whole(value) for value in values)


@pytest.mark.parametrize("depth", [1, MAX_NESTING, MAX_NESTING + 1, 5000])
@pytest.mark.parametrize("beside", [0, 100])
def test_json_is_refused_from_one_depth_on(depth, beside):
    text = "[" * depth + "]" * depth
    text = f"[{text[1:-1] or '1'}, {json.dumps(['[{'] * beside)}]"
    if depth <= MAX_NESTING:
        assert parse_json(text, "it", InvalidOption, "") == json.loads(text)
    else:
        with pytest.raises(InvalidOption, match=r"nested|recursion"):
            parse_json(text, "it", InvalidOption, "")
