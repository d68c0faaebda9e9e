"""Token ids of texts that were encoded before: the parts' are the whole text's in every kind of tokenizer, and what is known is not made anew."""

from __future__ import annotations

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from tokenizers import AddedToken, Tokenizer, decoders, models, normalizers, pre_tokenizers, processors
from transformers import PreTrainedTokenizerFast

from engine.text import encoding, known_texts
from engine.text.encoding import encode_text
from engine.text.known_texts import KnownTexts
from engine.text.messages import checked_messages, disguised
from engine.text.remembered import RememberedTokenizer, follows_library

PLAIN = [AddedToken("<|im_start|>", special=True, normalized=False), AddedToken("<|im_end|>", special=True, normalized=False)]
ODD = [
    *PLAIN,
    AddedToken("<|im_end|>\n<|im_start|>", special=False, normalized=False),  # longer than one that begins at the same place
    AddedToken("x<|im_start|>y", special=True, normalized=False),  # around another one
    AddedToken("<trims>", special=True, normalized=False, lstrip=True, rstrip=True),
    AddedToken("<alone>", special=True, normalized=False, single_word=True),
    AddedToken("word", special=True, normalized=False),
    AddedToken(" ", special=False, normalized=False),
    AddedToken("<n>", special=True, normalized=True),
]
PIECES = [
    "<|im_start|>",
    "<|im_end|>",
    "<trims>",
    "<alone>",
    "<n>",
    "word",
    "x",
    "y",
    "ab",
    "a b",
    " ",
    "  ",
    "\n",
    "é",
    "e\u0301",
    "<|im",
    "_end|>",
    "1",
]
TEXTS = st.lists(st.sampled_from(PIECES), max_size=40).map("".join)


def byte_level(normalizer=None, first_space=False):
    letters = {letter: i for i, letter in enumerate(sorted(pre_tokenizers.ByteLevel.alphabet()))}
    vocab = letters | {"ab": 256, "Ġa": 257, "ĊĊ": 258}
    backend = Tokenizer(models.BPE(vocab=vocab, merges=[("a", "b"), ("Ġ", "a"), ("Ċ", "Ċ")]))
    backend.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=first_space)
    backend.decoder, backend.post_processor = decoders.ByteLevel(), processors.ByteLevel(trim_offsets=False)
    if normalizer is not None:
        backend.normalizer = normalizer
    return backend


def spaces_marked(scheme):
    letters = "▁abxywordeé<>|imstnrtal_1\n"
    vocab = {"<unk>": 0} | {letter: i for i, letter in enumerate(dict.fromkeys(letters), 1)} | {"▁a": 90, "▁x": 91}
    backend = Tokenizer(models.BPE(vocab=vocab, merges=[("▁", "a"), ("▁", "x")], unk_token="<unk>", fuse_unk=True))
    if scheme == "none":
        backend.normalizer = normalizers.Sequence([normalizers.Prepend("▁"), normalizers.Replace(" ", "▁")])
    else:
        backend.pre_tokenizer = pre_tokenizers.Metaspace(prepend_scheme=scheme)
    return backend


KINDS = {
    "bytes": byte_level,
    "bytes-nfc": lambda: byte_level(normalizers.NFC()),
    "bytes-space": lambda: byte_level(normalizers.NFKC(), True),
    "first": lambda: spaces_marked("first"),
    "always": lambda: spaces_marked("always"),
    "prepended": lambda: spaces_marked("none"),
}


@pytest.fixture(params=[(kind, name) for kind in KINDS for name in ("plain", "odd")], ids="-".join, scope="module")
def tokenizer(request):
    kind, name = request.param
    backend = KINDS[kind]()
    backend.add_tokens(PLAIN if name == "plain" else ODD)
    return PreTrainedTokenizerFast(tokenizer_object=backend)


@settings(max_examples=120, deadline=None, derandomize=True, database=None)
@given(text=TEXTS)
def test_the_ids_of_the_parts_are_the_whole_text_s(tokenizer, text):
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(known_texts, "PART_CHARS", 1)
        parts = list(KnownTexts(tokenizer.added_tokens_decoder).parts(text))
    assert "".join(parts) == text
    encode = tokenizer.backend_tokenizer.encode
    assert [i for part in parts for i in encode(part, add_special_tokens=False).ids] == encode(text, add_special_tokens=False).ids


def test_texts_are_cut_where_they_can_be(tokenizer):
    turn = "<|im_start|>" + "ab " * 2000 + "<|im_end|>\n"
    found = list(KnownTexts(tokenizer.added_tokens_decoder).parts(3 * turn))
    assert [part[:10] for part in found] == ["<|im_start", *["<|im_end|>"] * 3] and "".join(found) == 3 * turn
    assert list(KnownTexts({}).parts(3 * turn)) == [3 * turn]
    assert list(KnownTexts({}).parts("")) == [""]


@pytest.fixture
def counted(byte_tokenizer):
    """(a tokenizer, the texts that its backend encoded)."""
    theirs, seen = byte_tokenizer(), []

    class Counting:
        def __getattr__(self, name):
            return getattr(theirs.backend_tokenizer, name)

        def encode_batch_fast(self, texts, **options):
            seen.extend(texts)
            return theirs.backend_tokenizer.encode_batch_fast(texts, **options)

    facts = {"special_tokens_map": {}, "eos_token_id": None, "chat_template": None, "cleans_up": False}
    return RememberedTokenizer(Counting(), facts, lambda: theirs), seen


def turns(count):
    return "".join(f"<|im_start|>user\n{number} " + "so it goes " * 100 + "<|im_end|>\n" for number in range(count))


def test_a_prompt_that_comes_back_longer_is_encoded_from_where_it_is_new(counted):
    tokenizer, seen = counted
    expected = tokenizer.backend_tokenizer.encode(turns(101), add_special_tokens=False).ids
    ids = encode_text(tokenizer, turns(100))
    assert ids == expected[: len(ids)]
    assert sum(map(len, seen)) == len(turns(100)), "once, and nothing twice"
    seen.clear()
    assert encode_text(tokenizer, turns(101)) == expected
    assert sum(map(len, seen)) < known_texts.PART_CHARS + 2 * len(turns(1))
    seen.clear()
    changed = turns(101).replace("50 so", "50 no")
    assert encode_text(tokenizer, changed) == tokenizer.backend_tokenizer.encode(changed, add_special_tokens=False).ids
    assert sum(map(len, seen)) < known_texts.PART_CHARS + 2 * len(turns(1)), "the part that was changed alone"


def test_added_tokens_count_from_when_they_are_there(byte_tokenizer):
    tokenizer = byte_tokenizer()
    text = turns(20) + "<|new|>" + turns(1)
    before = encode_text(tokenizer, text)
    tokenizer.add_tokens([AddedToken("<|new|>", special=True, normalized=False)])
    assert tokenizer.convert_tokens_to_ids("<|new|>") in encode_text(tokenizer, text) != before


def test_what_was_used_longest_ago_is_forgotten_first():
    known, made = KnownTexts({}, max_bytes=6000), []

    def encode(part):
        made.append(part[0])
        return [ord(part[0])] * 300

    for letter in "abcacdabx":
        assert list(known.ids(letter * 300, encode)) == [ord(letter)] * 300
        assert known.num_bytes <= 6000
    assert "".join(made) == "abcdbx", "three of some 1,800 bytes are held"
    assert known.ids("z" * 9000, lambda part: [1]) == [1] and known.num_bytes <= 6000, "what is larger than all of it is not kept"
    assert [known.ids("short", own) for own in (lambda part: [1], lambda part: [2])] == [[1], [2]]


def test_tokenizers_with_rules_of_their_own_are_asked_for_whole_texts(byte_tokenizer):
    plain = byte_tokenizer()

    class Own(PreTrainedTokenizerFast):
        def __call__(self, text, **options):
            return {"input_ids": [len(text)]}

    assert follows_library(plain) and not follows_library(object())
    own = Own(tokenizer_object=plain.backend_tokenizer)
    assert not follows_library(own)
    assert encode_text(own, turns(10)) == [len(turns(10))]
    kept = PreTrainedTokenizerFast(tokenizer_object=plain.backend_tokenizer, split_special_tokens=True)
    assert not follows_library(kept)


def test_tokens_that_are_put_around_a_text_are_put_around_the_whole(byte_tokenizer):
    tokenizer = byte_tokenizer()
    backend = tokenizer.backend_tokenizer
    end = backend.token_to_id("<|im_end|>")
    backend.post_processor = processors.TemplateProcessing(single="<|im_end|> $A", special_tokens=[("<|im_end|>", end)])
    text = turns(20)
    inner = encode_text(tokenizer, text)
    assert encode_text(tokenizer, text, add_special_tokens=True) == [end, *inner]


@pytest.mark.parametrize("in_model, normalized, looked_at", [(False, False, False), (True, False, True), (False, True, True)])
def test_a_message_is_looked_at_for_tokens_that_normalising_makes_where_it_may_make_some(in_model, normalized, looked_at, monkeypatch):
    vocab = {letter: i for i, letter in enumerate("abcdefghijklmnop<>")} | ({"<end>": 18} if in_model else {})
    backend = Tokenizer(models.WordLevel(vocab, unk_token="a"))
    backend.normalizer, backend.pre_tokenizer = normalizers.NFKC(), pre_tokenizers.WhitespaceSplit()
    backend.add_tokens([AddedToken("<end>", special=True, normalized=normalized)])
    tokenizer = PreTrainedTokenizerFast(tokenizer_object=backend)
    asked = []
    real = encoding.encode_text
    monkeypatch.setattr("engine.text.messages.encode_text", lambda *args, **options: asked.append(args[1]) or real(*args, **options))
    messages, disguise = disguised(tokenizer, checked_messages([{"role": "user", "content": "b ＜end＞ c"}]))
    shown = messages[0]["content"]
    assert ("b ＜end＞ c" in asked) == (shown != "b ＜end＞ c") == looked_at
    if not in_model:  # which has it as a word, too
        assert backend.token_to_id("<end>") not in disguise.encode(shown)
