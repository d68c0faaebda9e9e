"""A small synthetic KV source and a pack for it."""

from __future__ import annotations

from collections.abc import Callable, Iterator

import pytest
import torch

from codec.calibrate_tables import fit_entropy_model
from codec.codec import KvCodec
from codec.pack import CodecPack
from codec.rate import EntropyModel
from codec.rows import allocate_bits, row_bytes
from codec.spec import QUALITIES, KvLayout
from codec.transform import Transform, fit_fallback, fit_global, fit_per_layer
from codec.weighting import Weighting, normalised, unit_weighting

LAYOUT = KvLayout(num_layers=5, num_kv_heads=2, head_dim=16, first_layer=1)


class Source:
    """Correlated KV rows whose size varies from token to token, as real ones do.

    seed: of how the elements hang together, and of the rows. rows_seed: of the rows alone.
    """

    def __init__(self, seed: int = 0, rows_seed: int | None = None) -> None:
        self.generator = torch.Generator().manual_seed(seed)
        dim = LAYOUT.dim
        decay = torch.exp(-torch.arange(dim) / 40.0)
        self.mixing = decay[:, None] * torch.randn(dim, dim, generator=self.generator) * 2
        if rows_seed is not None:
            self.generator.manual_seed(rows_seed)

    def draw(self, tokens: int) -> torch.Tensor:
        """float32 [tokens, D]."""
        size = torch.exp(0.25 * torch.randn(tokens, 1, generator=self.generator))
        return size * torch.randn(tokens, LAYOUT.dim, generator=self.generator) @ self.mixing


def block_covariances(rows: torch.Tensor) -> torch.Tensor:
    x = rows.reshape(len(rows), -1, LAYOUT.head_dim).transpose(0, 1)
    return x.transpose(1, 2) @ x / len(rows)


def _make_pack(source: Source, kind: str = "global", room: float | None = None) -> CodecPack:
    """room: bytes of the transform's rows as a share of what all of them take in 8 bits."""
    rows = source.draw(3000)
    weighting: Weighting = normalised(unit_weighting(LAYOUT, rows.var(0)), block_covariances(rows))
    cov = weighting.whiten_covariance(rows.T @ rows / len(rows))
    transform: Transform
    if kind == "global":
        transform = fit_global(cov, 0.15, LAYOUT.dim)
    else:
        w = LAYOUT.layer_dim
        transform = fit_per_layer([cov[i : i + w, i : i + w] for i in range(0, LAYOUT.dim, w)], 0.15, LAYOUT.dim)
    row_bits = None
    if room is not None:
        count, width = transform.basis.shape
        row_bits = allocate_bits(transform.variance.tolist(), width, room * count * row_bytes(width, 8), min(QUALITIES.values()))
        assert len(set(row_bits)) > 1
        transform = transform.first(len(row_bits))
    pack = CodecPack.build(
        LAYOUT,
        weighting,
        transform,
        EntropyModel.laplace(),
        row_bits=row_bits,
        predictor={"mu": torch.zeros(LAYOUT.dim)},
        predictor_settings={"taps": [1]},
        fingerprints={"target": "t", "draft": "d"},
    )
    held = source.draw(1500)
    c = KvCodec(pack).components(held, torch.zeros_like(held), pack.transform.num_components)
    return pack.with_model(fit_entropy_model(c, c.pow(2).mean(0)))


def _with_fallback(pack: CodecPack, held: torch.Tensor) -> CodecPack:
    """The pack with a fallback basis fitted on rows held float32 [n, D]."""
    z = pack.weighting.whiten(held)
    rest = z - pack.transform.expand(pack.transform.project(z, pack.transform.num_rows), z.shape[1])
    fallback, variance = fit_fallback(rest, LAYOUT.layer_dim)
    return pack.with_fallback(fallback, torch.cat([pack.transform.variance, variance]), pack.model)


@pytest.fixture(scope="module", autouse=True)
def one_thread() -> Iterator[None]:
    """Products this small only lose by being shared out."""
    threads = torch.get_num_threads()
    torch.set_num_threads(1)
    yield
    torch.set_num_threads(threads)


@pytest.fixture(scope="session")
def make_source() -> Callable[..., Source]:
    return Source


@pytest.fixture(scope="session")
def make_pack() -> Callable[..., CodecPack]:
    return _make_pack


@pytest.fixture
def source() -> Source:
    """Rows that the packs were not fitted on, the same in every test whatever ran before it."""
    return Source(rows_seed=1)


@pytest.fixture(scope="session")
def pack() -> CodecPack:
    return _make_pack(Source())


@pytest.fixture(scope="session")
def completed_pack(pack: CodecPack) -> CodecPack:
    """A pack of the source's leading components alone, with a fallback basis."""
    t, count = pack.transform, pack.transform.num_rows // 4
    kept = {"predictor": pack.predictor, "predictor_settings": pack.predictor_settings, "fingerprints": pack.fingerprints}
    few = CodecPack.build(LAYOUT, pack.weighting, t.first(count), pack.model, **kept)
    return _with_fallback(few, Source(rows_seed=2).draw(1000))


@pytest.fixture(scope="session")
def codec(pack: CodecPack) -> KvCodec:
    return KvCodec(pack)
