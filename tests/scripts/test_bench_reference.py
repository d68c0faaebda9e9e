"""The comparison of bits at equal loss that `scripts/bench_reference.py` ends with."""

from __future__ import annotations

import pytest

from bench_reference import bits_ratio, main


def rows(name, method, points):
    return [{"text": name, "method": method, "step": 1.0, "distance": 256, "bits_per_element": bits, "kl": kl} for kl, bits in points]


def test_bits_are_compared_at_equal_loss():
    draft = [(0.01, 0.4), (0.02, 0.2), (0.04, 0.1)]
    fewer = [(kl * 1.5, bits * 1.5**-1 / 4) for kl, bits in draft]  # a quarter of the bits on the same curve, at other losses
    found = bits_ratio([*rows("a", "draft", draft), *rows("a", "reference", fewer)])
    assert found == pytest.approx(4.0, rel=1e-6)
    assert bits_ratio([*rows("a", "draft", draft), *rows("a", "reference", [(1.0, 0.1), (2.0, 0.05)])]) is None


def test_documents_of_no_whole_spans_are_refused(capsys):
    with pytest.raises(SystemExit):
        main(["--tokens", "100"])
    assert "multiple of 64" in capsys.readouterr().err
