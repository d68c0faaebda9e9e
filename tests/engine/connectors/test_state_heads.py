"""A draft head on the target's last states is coded as an untrained early exit is."""

from __future__ import annotations

import pytest
import torch

from engine.connectors.passes import CodedModel, FeaturePasses
from engine.errors import InvalidOption
from engine.sessions.codec_params import find_pack


def test_codec_parameters_are_those_of_an_early_exit(chat_folders, chat_engine, tmp_path):
    with pytest.raises(InvalidOption, match="no codec"):
        CodedModel.open(chat_folders.target, str(chat_folders.states), None)
    find_pack(chat_engine("states").core).save(tmp_path / "a.pack")
    ours, exit_alone = (
        CodedModel.open(chat_folders.target, draft, str(tmp_path / "a.pack")) for draft in (str(chat_folders.states), "trunk")
    )
    assert ours.prints == exit_alone.prints and ours.choice == exit_alone.choice
    assert FeaturePasses(ours, dtype=torch.float32, device="cpu", max_tokens=1000).head is None
