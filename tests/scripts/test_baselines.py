"""Every baseline of the registry: round trip from the bytes alone, exact sinks, damaged bytes, bad input (tiny synthetic KV)."""

from __future__ import annotations

import pytest
import torch

from baselines import BASELINES, Baseline, Calibration, CalibrationAccumulator, NotFitted, UnknownBaseline, make_baseline, select_baselines
from codec.errors import BadInput, CodecError, CorruptedCode, ForeignCode, NewerCode, PackMismatch, TruncatedCode
from codec.spec import NUM_SINKS, KvLayout

LAYOUT = KvLayout(num_layers=3, num_kv_heads=2, head_dim=16)
FAMILIES = {  # points of one family, more bits first: distortion and size must follow
    "kivi-nowindow": ["4bit", "2bit"],
    "turboquant-mean": ["4bit", "3bit", "2bit"],
    "kvtc": ["2bit", "1bit", "0.5bit"],
    "cachegen": ["finest", "fine", "medium", "coarse"],
    "cachegen-anchors": ["finest", "fine", "medium", "coarse"],
    "aqua-kv": ["3bit", "2bit"],
}


# relative errors that only a broken decoder exceeds: those of turboquant and cachegen grow with the mean, small KVTC budgets keep only it
LOOSEST = {"kivi-nowindow": 0.5, "turboquant": 20.0, "kvtc": 1.05, "cachegen-coarse": 2.0, "cachegen-anchors-coarse": 1.0}


def synthetic_kv(tokens: int, seed: int, layout: KvLayout = LAYOUT) -> torch.Tensor:
    """[T, D]: a shared low-rank part across layers, layers of different size, channel means, a little noise, outlier sinks."""
    fixed, fresh = torch.Generator().manual_seed(7), torch.Generator().manual_seed(seed)
    mixing = torch.randn(12, layout.dim, generator=fixed) * torch.logspace(0, -1.2, 12)[:, None]
    mean, size = 3 * torch.randn(layout.dim, generator=fixed), 0.5 + torch.rand(layout.dim, generator=fixed)
    kv = (torch.randn(tokens, 12, generator=fresh) @ mixing + 0.15 * torch.randn(tokens, layout.dim, generator=fresh)) * size + mean
    kv[:NUM_SINKS] *= 20
    return kv


@pytest.fixture(scope="module")
def calibration() -> Calibration:
    return Calibration.from_sample(LAYOUT, synthetic_kv(1000, seed=1)[NUM_SINKS:])


@pytest.fixture(scope="module")
def all_baselines(calibration: Calibration) -> dict[str, Baseline]:
    made = {name: make_baseline(name, LAYOUT) for name in BASELINES}
    for baseline in made.values():
        baseline.fit(calibration)
    return made


def relative_error(kv: torch.Tensor, decoded: torch.Tensor) -> float:
    kv, decoded = kv[NUM_SINKS:], decoded[NUM_SINKS:]
    return float((kv - decoded).pow(2).sum() / (kv - kv.mean(0)).pow(2).sum())


@pytest.mark.parametrize("name", BASELINES)
@pytest.mark.parametrize("tokens", [1, 4, 5, 61, 200])
def test_round_trip_from_bytes_only(name: str, tokens: int, all_baselines: dict[str, Baseline], calibration: Calibration) -> None:
    kv = synthetic_kv(tokens, seed=2)
    data = all_baselines[name].encode(kv)
    assert isinstance(data, bytes)
    reader = make_baseline(name, LAYOUT)  # a second instance with the same calibration: nothing but the bytes connects the two
    reader.fit(calibration)
    decoded = reader.decode(data)
    assert decoded.shape == kv.shape and decoded.dtype == torch.float32
    assert torch.equal(decoded[:NUM_SINKS], kv[:NUM_SINKS].bfloat16().float())
    assert torch.equal(decoded, all_baselines[name].decode(data))
    assert len(data) >= min(tokens, NUM_SINKS) * LAYOUT.dim * 2
    if tokens == 200:
        assert relative_error(kv, decoded) < LOOSEST.get(name, LOOSEST.get(all_baselines[name].method, 0.4))


@pytest.mark.parametrize("name", ["bf16+zstd", "kvtc-2bit", "cachegen-fine", "cachegen-anchors-coarse", "aqua-kv-2bit"])
def test_many_sequences_at_once_are_coded_as_one_by_one(name: str, all_baselines: dict[str, Baseline]) -> None:
    kvs = [synthetic_kv(tokens, seed=20 + tokens) for tokens in (61, 4, 200, 1, 15, 5)]
    codes = all_baselines[name].encode_many(kvs, workers=2)
    assert codes == [all_baselines[name].encode(kv) for kv in kvs]
    for together, data in zip(all_baselines[name].decode_many(codes, workers=2), codes, strict=True):
        assert torch.equal(together, all_baselines[name].decode(data))
    assert all_baselines[name].encode_many([]) == [] == all_baselines[name].decode_many([])


@pytest.mark.gpu
@pytest.mark.skipif(not torch.cuda.is_available(), reason="needs a CUDA device")
@pytest.mark.parametrize("name", BASELINES)
def test_a_gpu_codes_like_a_cpu(name: str, calibration: Calibration) -> None:
    """Fitted and coded on a GPU by several threads: bytes that decode there to nearly what the CPU's do."""
    kvs = [synthetic_kv(tokens, seed=tokens) for tokens in (200, 61, 5, 3)]
    here, there = make_baseline(name, LAYOUT), make_baseline(name, LAYOUT).to("cuda")
    moved = Calibration(LAYOUT, calibration.mean.cuda(), None, None if calibration.sample is None else calibration.sample.cuda())
    here.fit(calibration)
    there.fit(moved)
    codes = there.encode_many([kv.cuda() for kv in kvs], workers=4)
    for kv, data, own, decoded in zip(kvs, codes, here.encode_many(kvs), there.decode_many(codes, workers=4), strict=True):
        assert abs(len(data) - len(own)) <= 0.02 * len(own) + 8
        cpu, gpu = ((kv - x).pow(2).mean() for x in (here.decode(own), decoded.cpu()))
        assert float(gpu) <= 1.05 * float(cpu) + 1e-6


def test_bf16_is_exact(all_baselines: dict[str, Baseline]) -> None:
    kv = synthetic_kv(40, seed=3)
    assert torch.equal(all_baselines["bf16+zstd"].decode(all_baselines["bf16+zstd"].encode(kv)), kv.bfloat16().float())


@pytest.mark.parametrize("family", FAMILIES)
def test_more_bits_less_distortion(family: str, all_baselines: dict[str, Baseline]) -> None:
    kv = synthetic_kv(300, seed=4)
    sizes, errors = [], []
    for point in FAMILIES[family]:
        data = all_baselines[f"{family}-{point}"].encode(kv)
        sizes.append(len(data))
        errors.append(relative_error(kv, all_baselines[f"{family}-{point}"].decode(data)))
    assert sizes == sorted(sizes, reverse=True) and len(set(sizes)) == len(sizes)
    assert errors == sorted(errors) and errors[-1] > 1.2 * errors[0]


def test_nominal_sizes(all_baselines: dict[str, Baseline]) -> None:
    """Bytes are what the papers' arithmetic says, plus sinks and a header below 64 bytes."""
    tokens, layers = 260, LAYOUT.num_layers
    kv = synthetic_kv(tokens, seed=5)
    sinks, n = NUM_SINKS * LAYOUT.dim * 2, tokens - NUM_SINKS
    expected = {
        "fp8": n * LAYOUT.dim + layers * 8,
        "turboquant-3bit": n * LAYOUT.num_blocks * (16 * 3 // 8 + 2),
        "kivi-nowindow-2bit": n * LAYOUT.dim * 3 // 8,
        "kivi-4bit": 128 * LAYOUT.dim * (5 + 16) // 8,
        "aqua-kv-2bit": n * (LAYOUT.dim * 2 // 8 + layers * 4 + LAYOUT.layer_dim * 2 // 8),
    }
    for name, size in expected.items():
        assert 0 <= len(all_baselines[name].encode(kv)) - sinks - size <= 80, name


def test_removing_the_mean_saves_turboquant(all_baselines: dict[str, Baseline]) -> None:
    kv = synthetic_kv(100, seed=6)
    kept, removed = (
        relative_error(kv, p.decode(p.encode(kv))) for p in (all_baselines["turboquant-3bit"], all_baselines["turboquant-mean-3bit"])
    )
    assert removed < kept / 4


def test_aqua_predictor_beats_the_bare_quantiser(all_baselines: dict[str, Baseline]) -> None:
    """On layers that share a low-rank part, 2 bits on the residual beat 2 bits on the vector (TurboQuant's grid is as good)."""
    kv = synthetic_kv(300, seed=8)
    aqua, plain = (
        relative_error(kv, p.decode(p.encode(kv))) for p in (all_baselines["aqua-kv-2bit"], all_baselines["turboquant-mean-2bit"])
    )
    assert aqua < 0.5 * plain


@pytest.mark.parametrize("name", ["bf16+zstd", "fp8", "kivi-2bit", "turboquant-2bit", "kvtc-1bit", "cachegen-anchors-fine", "aqua-kv-2bit"])
def test_damaged_bytes_raise_named_errors(name: str, all_baselines: dict[str, Baseline]) -> None:
    baseline = all_baselines[name]
    data = baseline.encode(synthetic_kv(20, seed=9))
    for cut in (4, 19, 30, len(data) // 2, len(data) - 1):
        with pytest.raises(TruncatedCode):
            baseline.decode(data[:cut])
    for position in range(4, len(data), max(1, len(data) // 60)):
        damaged = bytearray(data)
        damaged[position] ^= 0x10
        with pytest.raises(CodecError):
            baseline.decode(bytes(damaged))
    with pytest.raises(CorruptedCode):
        baseline.decode(data + b"\0")
    with pytest.raises(ForeignCode):
        baseline.decode(b"PK\3\4" + data[4:])
    with pytest.raises(NewerCode):
        baseline.decode(data[:4] + b"\xff" + data[5:])


def test_codes_of_other_baselines_and_fits_are_refused(all_baselines: dict[str, Baseline]) -> None:
    data = all_baselines["kvtc-1bit"].encode(synthetic_kv(20, seed=9))
    with pytest.raises(PackMismatch):
        all_baselines["kvtc-2bit"].decode(data)
    other = make_baseline("kvtc-1bit", LAYOUT)
    other.fit(synthetic_kv(500, seed=10)[NUM_SINKS:])
    with pytest.raises(PackMismatch):
        other.decode(data)


def test_bad_input() -> None:
    fp8, kvtc = make_baseline("fp8", LAYOUT), make_baseline("kvtc-1bit", LAYOUT)
    with pytest.raises(NotFitted):
        kvtc.encode(synthetic_kv(8, seed=1))
    dim = LAYOUT.dim
    for bad in (torch.zeros(0, dim), torch.zeros(3, dim + 1), torch.zeros(dim), torch.full((3, dim), float("nan"))):
        with pytest.raises(BadInput):
            fp8.encode(bad)
    with pytest.raises(BadInput):
        kvtc.fit(torch.zeros(10, 7))
    with pytest.raises(CodecError, match="2"):
        kvtc.fit(torch.zeros(1, LAYOUT.dim))


def test_registry_names_what_it_has() -> None:
    with pytest.raises(UnknownBaseline, match="turboquant-mean-3bit"):
        make_baseline("gzip", LAYOUT)
    with pytest.raises(UnknownBaseline, match="kvtc"):
        select_baselines(["kvtk"])
    assert select_baselines(["turboquant-mean", "fp8"]) == [*(f"turboquant-mean-{bits}bit" for bits in (4, 3, 2, 1)), "fp8"]
    assert all(make_baseline(name, LAYOUT).name == name for name in BASELINES)


def test_streamed_calibration_equals_the_sample() -> None:
    kv = synthetic_kv(903, seed=1)[NUM_SINKS:] + 50  # a large mean: sums must be shifted
    stream = CalibrationAccumulator(LAYOUT, sample_tokens=100, expected_tokens=len(kv))
    for chunk in kv.split(128):
        stream.update(chunk)
    streamed, whole = stream.finish(), Calibration.from_sample(LAYOUT, kv)
    torch.testing.assert_close(streamed.mean, whole.mean, rtol=1e-5, atol=1e-4)
    assert streamed.sample is not None and len(streamed.sample) == 100
    for part in (0, 1):
        variances = whole.spectrum(part, True)[0]
        torch.testing.assert_close(streamed.spectrum(part, True)[0], variances, rtol=2e-2, atol=1e-4)
