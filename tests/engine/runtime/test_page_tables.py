"""Page tables on the device: each sequence's row is its own and up to date, those of windowed layers where their pages begin."""

from __future__ import annotations

import pytest
import torch

from engine.config import EngineConfig
from engine.runtime.memory import open_pool, step_tokens, window_layers
from engine.runtime.page_tables import PageTables

GPU = torch.cuda.is_available()
DEVICE = torch.device("cuda" if GPU else "cpu")
pytestmark = [pytest.mark.gpu] if GPU else []


def test_tables_of_more_sequences_than_rows(tiny_model):
    pool = tiny_model("llama").decoder.to(DEVICE).new_pool(40, 16)
    tables = PageTables(4, 8, DEVICE)
    sequences = [pool.new_sequence() for _ in range(6)]
    for n, sequence in enumerate(sequences):
        sequence.ensure(16 * (n % 3 + 1))
    # three rows; the fourth batch holds a sequence that has one, another that gets the last, and a third: none may share
    for numbers in ((0,), (1, 2), (3, 4), (3, 0, 1), (5, 3, 1)):
        batch = [sequences[number] for number in numbers]
        rows = tables.rows(batch)
        assert len(set(rows)) == len(batch) and 0 not in rows
        for row, sequence in zip(rows, batch, strict=True):
            assert tables.tables[row, : len(sequence.pages)].tolist() == sequence.pages
    sequence.ensure(64)
    assert tables.tables[tables.rows([sequence])[0], :4].tolist() == sequence.pages


@pytest.mark.parametrize("family", ["gemma3", "mistral-window"])
def test_a_window_that_slides(tiny_model, family):
    """While texts of several lengths grow in turn, and one begins anew in a row that another had; what was given back may stay in a table."""
    decoder, config = tiny_model(family).decoder.to(DEVICE), EngineConfig(page_size=8, prefill_chunk=40)
    pool = open_pool(decoder, "bf16", 80, 8, 80, windows=window_layers(decoder, config), step_tokens=step_tokens(decoder, config))
    [group] = pool.windowed
    tables = PageTables(3, 64, DEVICE, 1)
    sequences = [pool.new_sequence(), pool.new_sequence()]
    for turn in range(22):
        if turn == 14:
            sequences[0].free()
            sequences[0] = pool.new_sequence()
        for sequence, count in zip(sequences, (13, 9), strict=True):
            sequence.reserve(count + 1)
        rows = tables.rows(sequences)
        step = tables.new_step(4, 64)
        assert step.windows.shape == (1, 4, 64)
        tables.look_up(torch.tensor([*rows, 0, 0], device=DEVICE), step)
        for at, sequence in enumerate(sequences):
            [own] = sequence.windows
            assert step.main[at, : len(sequence.pages)].tolist() == sequence.pages
            assert step.windows[0, at, own.first_page : own.first_page + len(own.pages)].tolist() == own.pages
        assert int(step.windows.min()) >= 0 and int(step.windows.max()) < group.pool.num_pages
        for sequence, count in zip(sequences, (13, 9), strict=True):
            sequence.advance(count)
    assert sequences[1].windows[0].first_page > 0
