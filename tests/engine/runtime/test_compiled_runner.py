"""Compiled steps of a CPU against the decoder's own forward pass, and against themselves in other company."""

from __future__ import annotations

import pytest
import torch

pytest.importorskip("llvmlite")

from draft.tree import Leaf, block_positions
from engine.engine import Engine
from engine.errors import InvalidOption, ModelNotFound
from engine.loading import DraftChoice
from engine.model import linear
from engine.model.decoder import Decoder, forward_reserved
from engine.model.embedding import BlockEmbedding
from engine.model.linear import Gemm, Int8Weight, select_gemm
from engine.runtime.compiled_runner import CompiledDecoder
from engine.runtime.core import EngineCore
from engine.runtime.sampling import SamplingParams
from kernels.cpu_decode import file_blocks
from kernels.cpu_decode.blocks import NAMES, BlockWeight, unpack_blocks
from kernels.cpu_decode.tiles import TileWeight

FAMILIES = [
    ("llama", {"num_attention_heads": 6, "num_key_value_heads": 2, "head_dim": 32}),
    ("qwen2", {"num_attention_heads": 5, "num_key_value_heads": 1, "head_dim": 64}),
    ("qwen3", {"num_attention_heads": 2, "num_key_value_heads": 2, "head_dim": 96}),
]


@pytest.fixture(autouse=True)
def compiled_always(monkeypatch):
    """Whatever a measurement on a busy machine would say."""
    monkeypatch.setattr("engine.model.linear.compiled_share", lambda threads: 1.0)


def decoder_of(tiny_model, family, options):
    return Decoder.from_pretrained(tiny_model(family, hidden_size=96, intermediate_size=96, **options).folder, dtype=torch.bfloat16)


def fed(model, pool, ids, sizes, **options):
    """Outputs of one sequence fed in blocks of the given sizes, and the sequence."""
    sequence, start, outs = pool.new_sequence(), 0, []
    for size in sizes:
        outs.append(forward_reserved(model, ids[start : start + size], [sequence], [size], **options))
        sequence.advance(size)
        start += size
    return outs, sequence


@pytest.mark.parametrize(("family", "options"), FAMILIES)
@torch.inference_mode()
def test_a_step_computes_what_the_decoder_does(tiny_model, family, options, monkeypatch):
    decoder = decoder_of(tiny_model, family, options)
    ids = torch.randint(0, 97, (43,), generator=torch.Generator().manual_seed(1))
    pools = [decoder.new_pool(16, 4) for _ in range(2)]
    runner = CompiledDecoder(decoder, pools[0])
    assert CompiledDecoder.supports(decoder, pools[0])
    sizes = [16, 1, 1, 4, 7, 14]
    ours, sequence = fed(runner, pools[0], ids, sizes, taps=(0, 1, 2))
    exact = Decoder.from_pretrained(tiny_model(family, hidden_size=96, intermediate_size=96, **options).folder, dtype=torch.float32)
    (whole,), exact_sequence = fed(exact, exact.new_pool(16, 4), ids, [43], taps=(0, 1, 2))
    (plain,), plain_sequence = fed(decoder, pools[1], ids, [43], taps=(0, 1, 2))
    for name in ("logits", "hidden"):
        own = torch.cat([getattr(out, name) for out in ours]).float()
        error, bound = ((x - getattr(whole, name)).norm() for x in (own, getattr(plain, name).float()))
        assert error < 1.1 * bound, "no farther from float32 than plain bf16 is"
    for tap in (0, 1, 2):
        own = torch.cat([out.taps[tap] for out in ours])
        assert (
            own.dtype == torch.bfloat16
            and (own.float() - whole.taps[tap]).norm() <= 1.1 * (plain.taps[tap].float() - whole.taps[tap]).norm()
        )
    kv, plain_kv, exact_kv = (m.read_kv(s, 0, 43) for m, s in ((decoder, sequence), (decoder, plain_sequence), (exact, exact_sequence)))
    assert (kv - exact_kv).norm() < 1.1 * (plain_kv - exact_kv).norm()


@torch.inference_mode()
def test_a_token_has_the_same_bits_alone_in_a_block_and_in_a_batch(tiny_model):
    decoder = decoder_of(tiny_model, *FAMILIES[0])
    pool = decoder.new_pool(128, 4)
    runner = CompiledDecoder(decoder, pool)
    ids = torch.randint(0, 97, (80,), generator=torch.Generator().manual_seed(2))
    alone, _ = fed(runner, pool, ids, [1] * 80)
    alone = torch.cat([out.logits for out in alone])
    blocks, _ = fed(runner, pool, ids, [7, 16, 3, 1, 13, 16, 16, 8])
    assert torch.equal(torch.cat([out.logits for out in blocks]), alone)
    (prefill,), _ = fed(runner, pool, ids, [80], deterministic=True)
    assert torch.equal(prefill.logits, alone)
    _, one = fed(runner, pool, ids, [16, 4])
    _, other = fed(runner, pool, ids, [16, 13])
    out = forward_reserved(runner, torch.cat((ids[20:25], ids[29:31])), [one, other], [5, 2], logits="last")
    assert torch.equal(out.logits, alone[[24, 30]])
    first = forward_reserved(runner, ids[20:22], [one], [2], last_layer=1, logits="none")
    rest = forward_reserved(runner, None, [one], [2], first_layer=1, hidden=first.hidden)
    assert torch.equal(rest.logits, alone[20:22]), "an early exit loses nothing of the residual stream"


@torch.inference_mode()
def test_leaves_of_a_tree_see_the_chain_before_them_and_themselves(tiny_model):
    decoder = decoder_of(tiny_model, *FAMILIES[1])
    pool = decoder.new_pool(64, 4)
    runner = CompiledDecoder(decoder, pool)
    ids = torch.randint(0, 97, (20,), generator=torch.Generator().manual_seed(3))
    _, sequence = fed(runner, pool, ids, [12])
    tree = block_positions(13, 3, [Leaf(1, 5), Leaf(3, 8)])
    tokens = torch.cat((ids[12:16], torch.tensor([5, 8])))
    ours = forward_reserved(runner, tokens, [sequence], [6], tree_positions=[tree]).logits
    chain = forward_reserved(runner, ids[12:16], [sequence], [4]).logits
    assert torch.equal(ours[:4], chain)
    for row, position in ((4, tree.positions[4]), (5, tree.positions[5])):
        replaced = torch.cat((ids[12:position], tokens[row : row + 1]))
        out = forward_reserved(runner, replaced, [sequence], [len(replaced)]).logits
        assert (ours[row] - out[-1]).norm() < 1e-5 * out[-1].norm()


def test_greedy_text_is_the_same_with_and_without_drafts(tiny_model):
    decoder = decoder_of(tiny_model, "llama", {"num_attention_heads": 6, "num_key_value_heads": 2, "head_dim": 32})
    texts = []
    for draft, length in ((None, 0), (1, 3), (1, 0)):
        engine = Engine(decoder, draft=draft, pool_tokens=512, page_size=4)
        assert isinstance(engine.core, EngineCore) and isinstance(engine.core.runner, CompiledDecoder)
        assert engine.core.runner.num_threads == 1 and decoder.num_threads == torch.get_num_threads()
        assert engine.core.pool.steps_follow_tables and engine.core.runner.captured_rows is None
        params = SamplingParams(max_new_tokens=24, ignore_eos=True, draft_length=length)
        texts.append(engine.generate([[3, 1, 4, 1, 5]], params)[0].token_ids)
    assert texts[0] == texts[1] == texts[2] and len(texts[0]) == 24


def test_each_models_runner_says_whether_its_steps_follow_page_tables(tiny_model):
    compiled = decoder_of(tiny_model, *FAMILIES[0])
    plain = Decoder.from_pretrained(tiny_model("llama").folder, dtype=torch.bfloat16)
    for target, draft, wanted in ((compiled, plain, (True, False)), (plain, compiled, (False, True)), (plain, 1, (False, None))):
        core = Engine(target, draft=draft, pool_tokens=256, page_size=4).core
        assert (core.pool.steps_follow_tables, None if core.draft_pool is None else core.draft_pool.steps_follow_tables) == wanted


def test_other_models_pools_and_machines_keep_the_decoders_own_pass(tiny_model, monkeypatch):
    decoder = decoder_of(tiny_model, *FAMILIES[0])
    pool = decoder.new_pool(32, 4)
    gemma = Decoder.from_pretrained(tiny_model("gemma3").folder, dtype=torch.bfloat16)
    assert not CompiledDecoder.supports(gemma, gemma.new_pool(4, 4))
    narrow = Decoder.from_pretrained(tiny_model("llama").folder, dtype=torch.bfloat16)
    assert not CompiledDecoder.supports(narrow, narrow.new_pool(4, 4)), "heads of 16 channels"
    monkeypatch.setenv("FORETOLD_KERNELS", "reference")
    assert not CompiledDecoder.supports(decoder_of(tiny_model, *FAMILIES[0]), pool)
    monkeypatch.delenv("FORETOLD_KERNELS")
    runner = CompiledDecoder(decoder, pool)
    ids = torch.arange(runner.most_rows + 1)
    sequence = pool.new_sequence()
    sequence.ensure(len(ids), 0)
    own, ours = decoder.forward(ids, [sequence], [len(ids)]), runner.forward(ids, [sequence], [len(ids)])
    assert torch.equal(own.logits, ours.logits), "many rows are the library's"
    with pytest.raises(InvalidOption, match=r"rows were given"):
        runner.forward(ids[:3], [sequence], [2])


class Blocks(dict):
    """Quantised matrices as `engine.hub.gguf_blocks` gives them, made from dense ones."""

    def __init__(self, dense, kinds):
        super().__init__()
        self.bytes = {}
        for name, matrix in dense.items():
            if (kind := kinds(name)) is not None and matrix.dim() == 2:
                self.bytes[name] = BlockWeight.of_bytes(matrix).blocks
                self[name] = kind, tuple(matrix.shape)

    def read(self, name, out):
        out.copy_(self.bytes[name])


@torch.inference_mode()
@pytest.mark.parametrize("kept_as", [BlockWeight, TileWeight])
def test_quantised_weights_compute_what_they_stand_for(kept_as, tiny_model, monkeypatch):
    """As the file has them, or in tiles where the processor multiplies four bytes at a time; 97 rows of embeddings make no whole tiles."""
    monkeypatch.setattr(file_blocks, "has_flag", lambda name: kept_as is TileWeight)
    folder = tiny_model("qwen3", hidden_size=96, intermediate_size=96, head_dim=32, tie_word_embeddings=True).folder
    plain = Decoder.from_pretrained(folder, dtype=torch.bfloat16)
    # the second layer's values are of another format: its q, k and v stay dense
    kinds = lambda name: None if "layers.1.self_attn.v_proj" in name else NAMES["Q8_0"]  # noqa: E731
    blocks = Blocks(plain.hf_tensors(), kinds)
    decoder = Decoder.from_pretrained(folder, dtype=torch.bfloat16, blocks=blocks)
    kept = [isinstance(m.matrix, kept_as) for layer in decoder.layers for m, _ in layer.projections()]
    assert kept.count(False) == 1 and isinstance(decoder.head_matrix, BlockWeight)
    assert torch.equal(decoder.layers[1].qkv_proj.weight, plain.layers[1].qkv_proj.weight)
    names = plain.hf_tensors()
    for layer in ("0", "1", "2"):
        name = f"model.layers.{layer}.mlp.down_proj.weight"
        assert torch.equal(decoder.hf_tensors()[name], unpack_blocks(blocks.bytes[name], NAMES["Q8_0"]).bfloat16())
        assert (decoder.hf_tensors()[name] - names[name]).norm() < 0.01 * names[name].norm()
    assert decoder.weight_bytes < 0.75 * plain.weight_bytes and decoder.weight_sum is None
    table = unpack_blocks(blocks.bytes["model.embed_tokens.weight"], NAMES["Q8_0"]).bfloat16()
    assert isinstance(decoder.embed_tokens, BlockEmbedding) and torch.equal(
        decoder.embed(torch.tensor([96, 0, 7, 7])), table[[96, 0, 7, 7]]
    )
    assert torch.equal(decoder.hf_tensors()["model.embed_tokens.weight"], table) and decoder.embed(
        torch.zeros(0, dtype=torch.int64)
    ).shape == (0, 96)
    pool, ids = decoder.new_pool(64, 4), torch.arange(30)
    runner = CompiledDecoder(decoder, pool)
    assert CompiledDecoder.supports(decoder, pool)
    many = forward_reserved(runner, ids, [pool.new_sequence()], [30]).logits
    few, _ = fed(runner, pool, ids, [16, 1, 13])
    assert (torch.cat([out.logits for out in few]) - many).norm() < 0.02 * many.norm()
    wanted = forward_reserved(plain, ids, [plain.new_pool(64, 4).new_sequence()], [30]).logits
    assert (many - wanted).norm() < 0.04 * wanted.norm()


@torch.inference_mode()
def test_embeddings_in_tiles_are_looked_up_and_multiplied(tiny_model, monkeypatch):
    monkeypatch.setattr(file_blocks, "has_flag", lambda name: True)
    folder = tiny_model("qwen3", hidden_size=96, intermediate_size=96, head_dim=32, vocab_size=112, tie_word_embeddings=True).folder
    plain = Decoder.from_pretrained(folder, dtype=torch.bfloat16)
    blocks = Blocks(plain.hf_tensors(), lambda name: NAMES["Q8_0"])
    decoder = Decoder.from_pretrained(folder, dtype=torch.bfloat16, blocks=blocks)
    assert isinstance(decoder.head_matrix, TileWeight) and decoder.weight_bytes < 0.75 * plain.weight_bytes
    table = unpack_blocks(blocks.bytes["model.embed_tokens.weight"], NAMES["Q8_0"]).bfloat16()
    assert torch.equal(decoder.embed(torch.tensor([111, 0, 7, 7])), table[[111, 0, 7, 7]])
    pool, ids = decoder.new_pool(64, 4), torch.arange(30)
    runner = CompiledDecoder(decoder, pool)
    few, _ = fed(runner, pool, ids, [16, 1, 13])
    wanted = forward_reserved(plain, ids, [plain.new_pool(64, 4).new_sequence()], [30]).logits
    assert (torch.cat([out.logits for out in few]) - wanted).norm() < 0.04 * wanted.norm()


def test_a_table_of_its_own_stays_in_blocks_too_and_is_plain_again_elsewhere(tiny_model):
    """A head beside the embeddings; both are counted once, and a decoder that moves has plain weights."""
    folder = tiny_model("qwen3", hidden_size=96, intermediate_size=96, head_dim=32, tie_word_embeddings=False).folder
    plain = Decoder.from_pretrained(folder, dtype=torch.bfloat16)
    blocks = Blocks(plain.hf_tensors(), lambda name: NAMES["Q8_0"] if "embed" in name or "lm_head" in name else None)
    decoder = Decoder.from_pretrained(folder, dtype=torch.bfloat16, blocks=blocks)
    held = [blocks.bytes[name].nbytes for name in ("model.embed_tokens.weight", "lm_head.weight")]
    assert plain.weight_bytes - decoder.weight_bytes == 2 * 97 * 96 * 2 - sum(held)
    table = decoder.embed_tokens.weight
    assert (table - plain.embed_tokens.weight).norm() < 0.01 * plain.embed_tokens.weight.norm()
    decoder.to(torch.float32)
    assert isinstance(decoder.embed_tokens, torch.nn.Embedding) and torch.equal(decoder.embed_tokens.weight, table.float())
    assert decoder.embed(torch.tensor([3])).dtype == torch.float32


def test_a_large_quantised_weight_is_multiplied_a_part_at_a_time(monkeypatch):
    generator = torch.Generator().manual_seed(5)
    weight = BlockWeight.of_bytes(torch.randn(70, 64, generator=generator).bfloat16())
    x, bias = torch.randn(3, 64, generator=generator).bfloat16(), torch.randn(70, generator=generator).bfloat16()
    for own in (bias, None):
        whole = linear._library_linear(x, weight, own)
        monkeypatch.setattr(linear, "_UNPACKED_ELEMENTS", 64 * 16)
        parts = linear._library_linear(x, weight, own)
        monkeypatch.undo()
        assert whole.shape == parts.shape == (3, 70) and (whole - parts).norm() < 1e-2 * whole.norm()
    assert torch.equal(whole, torch.nn.functional.linear(x, weight.to_dense()))


@pytest.mark.skipif(not Int8Weight.fits(torch.zeros(64, 64, dtype=torch.bfloat16)), reason="this processor has no use for packed weights")
def test_an_engine_of_quantised_weights_settles_nothing_for_others(tiny_model, monkeypatch):
    """Its draft multiplies as it does; weights loaded before and after it are laid out for what is faster here."""
    monkeypatch.setattr("engine.model.linear.compiled_share", lambda threads: 10.0)
    folder = tiny_model("qwen3", hidden_size=96, intermediate_size=96, head_dim=32, tie_word_embeddings=True).folder
    before = Decoder.from_pretrained(folder, dtype=torch.bfloat16)
    blocks = Blocks(before.hf_tensors(), lambda name: NAMES["Q8_0"])
    quantised = Decoder.from_pretrained(folder, dtype=torch.bfloat16, blocks=blocks)
    draft = DraftChoice(model=folder).load(quantised).model
    after = Decoder.from_pretrained(folder, dtype=torch.bfloat16)
    assert quantised.gemm is draft.gemm is Gemm.COMPILED and before.gemm is after.gemm is Gemm.PACKED
    assert all(module.packed is None for layer in draft.layers for module, _ in layer.projections()), "as they are stored"
    supported = [CompiledDecoder.supports(own, own.new_pool(8, 4)) for own in (before, quantised, draft, after)]
    assert supported == [False, True, True, False]
    engine = Engine(quantised, draft=draft, pool_tokens=256, page_size=4)
    params = SamplingParams(max_new_tokens=6, ignore_eos=True, draft_length=2)
    assert len(engine.generate([[3, 1, 4]], params)[0].token_ids) == 6
    assert quantised.to(torch.float32).gemm is select_gemm(torch.float32, quantised.device), "chosen anew where weights change"


def test_weights_stay_quantised_only_where_they_can(tiny_model, tmp_path, monkeypatch):
    folder = tiny_model("llama").folder
    for options, match in (
        ({"weights": "tiny"}, "unknown kind of weights"),
        ({"weights": "quantized"}, "is none"),
        ({"weights": "quantized", "dtype": "float32"}, "bfloat16 beside them"),
    ):
        with pytest.raises(InvalidOption, match=match):
            Engine.from_pretrained(folder, device="cpu", **options)
    file = tmp_path / "model.gguf"
    file.write_bytes(b"GGUF")
    monkeypatch.setattr(linear, "_shares", {})
    with pytest.raises(ModelNotFound, match="not a readable GGUF file"):
        Engine.from_pretrained(file, device="cpu", weights="quantized")
    assert linear._shares == {}, "asking for blocks says nothing of how other weights are multiplied"
    monkeypatch.setenv("FORETOLD_KERNELS", "reference")
    with pytest.raises(InvalidOption, match="compiled products"):
        Engine.from_pretrained(file, device="cpu", weights="quantized")
