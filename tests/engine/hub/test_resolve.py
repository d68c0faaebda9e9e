"""Folders and hub ids, vocabularies, fingerprints, and the package that shares the name `kernels`."""

import errno
import json
import pickle
import shutil
import types
from types import SimpleNamespace

import pytest
import torch
from tokenizers import Tokenizer, decoders, models, pre_tokenizers
from transformers import AutoModelForCausalLM, LlamaConfig, LlamaForCausalLM, PreTrainedTokenizerFast
from transformers.utils import is_kernels_available

from engine.errors import (
    DiskFull,
    DownloadFailed,
    ForetoldError,
    KernelsPackageClash,
    ModelNotFound,
    UnknownPair,
    VocabularyMismatch,
)
from engine.hub.environment import check_kernels_package
from engine.hub.fingerprint import fingerprint
from engine.hub.progress import StderrProgress
from engine.hub.resolve import resolve_model, resolve_pair
from engine.text.tokenizer import check_vocabularies, load_tokenizer, tokenizer_fingerprint


@pytest.fixture
def folder(tmp_path):
    """A tiny random Llama with a byte-level tokenizer, saved by transformers."""
    path = tmp_path / "model"
    torch.manual_seed(0)
    shape = {"hidden_size": 32, "intermediate_size": 48, "num_hidden_layers": 2, "num_attention_heads": 4, "num_key_value_heads": 2}
    LlamaForCausalLM(LlamaConfig(**shape, vocab_size=256)).save_pretrained(path)
    letters = {letter: i for i, letter in enumerate(sorted(pre_tokenizers.ByteLevel.alphabet()))}
    tokenizer = Tokenizer(models.BPE(vocab=letters, merges=[]))
    tokenizer.pre_tokenizer, tokenizer.decoder = pre_tokenizers.ByteLevel(add_prefix_space=False), decoders.ByteLevel()
    PreTrainedTokenizerFast(tokenizer_object=tokenizer).save_pretrained(path)
    return path


def test_a_folder_is_taken_as_it_is_and_loads(folder):
    assert resolve_model(str(folder)) == folder
    tokenizer = load_tokenizer(folder)
    assert tokenizer.decode(tokenizer("früh")["input_ids"]) == "früh"


@pytest.mark.parametrize("missing", ["config.json", "model.safetensors", "tokenizer.json"])
def test_a_folder_that_lacks_something_is_named(folder, missing):
    (folder / missing).unlink()
    with pytest.raises(ModelNotFound, match=str(folder)):
        resolve_model(folder)


def test_a_missing_shard_is_named(folder):
    index = {"weight_map": {"a": "model.safetensors", "b": "model-00002-of-00002.safetensors"}}
    (folder / "model.safetensors.index.json").write_text(json.dumps(index))
    with pytest.raises(ModelNotFound, match="lacks 1 of 2 weight files, model-00002"):
        resolve_model(folder)


@pytest.mark.parametrize("spec", ["./no/such/folder", "nowhere", "a/b/c", "/nowhere", "~/no such", "owner/"])
def test_what_is_neither_folder_nor_hub_id_is_named(spec, tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    with pytest.raises(ModelNotFound, match="there is no folder"):
        resolve_model(spec)


def test_a_file_is_no_model(folder):
    with pytest.raises(ModelNotFound, match="is a file"):
        resolve_model(folder / "config.json")


def test_a_tokenizer_that_cannot_be_read_is_named(folder):
    (folder / "tokenizer.json").write_text("{")
    with pytest.raises(ModelNotFound, match="tokenizer"):
        load_tokenizer(folder)


def test_a_hub_id_comes_from_the_hub_and_its_failures_are_named(folder, monkeypatch):
    import huggingface_hub
    from huggingface_hub.errors import LocalEntryNotFoundError

    def no_answer(*given, **named):
        raise OSError("no route")

    monkeypatch.setattr(huggingface_hub.HfApi, "model_info", no_answer)
    asked = []
    monkeypatch.setattr(huggingface_hub, "snapshot_download", lambda name, **options: asked.append((name, options)) or str(folder))
    assert resolve_model("owner/some-model") == folder
    assert asked[0][0] == "owner/some-model" and "*.safetensors" in asked[0][1]["allow_patterns"]

    failures = [
        (LocalEntryNotFoundError("no connection"), DownloadFailed, "hub cannot be reached"),
        (OSError("reset by peer"), DownloadFailed, "reset by peer"),
        (OSError(errno.ENOSPC, "No space left on device"), DiskFull, "HF_HOME"),
    ]
    for failure, named, said in failures:

        def fail(name, failure=failure, **options):
            raise failure

        monkeypatch.setattr(huggingface_hub, "snapshot_download", fail)
        with pytest.raises(named, match=said):
            resolve_model("owner/some-model")


def test_a_file_of_a_hub_out_of_reach_is_looked_for_once_and_in_the_cache_alone(monkeypatch):
    """The hub's library asks five times more, in half a minute, and says so each time."""
    import huggingface_hub
    from huggingface_hub import constants
    from huggingface_hub.errors import LocalEntryNotFoundError

    asked = []

    def out_of_reach(*given, **named):
        raise OSError("no route")

    def download(*given, local_files_only=False, **named):
        asked.append(local_files_only)
        raise LocalEntryNotFoundError("not in the cache")

    monkeypatch.setattr(constants, "HF_HUB_OFFLINE", False)
    monkeypatch.setattr(huggingface_hub.HfApi, "model_info", out_of_reach)
    monkeypatch.setattr(huggingface_hub, "hf_hub_download", download)
    with pytest.raises(DownloadFailed, match="hub cannot be reached"):
        resolve_model("owner/some-model:model.gguf")
    assert asked == [True]

    def refused(*given, **named):
        error = OSError("not for you")
        error.response = SimpleNamespace(status_code=401)
        raise error

    monkeypatch.setattr(huggingface_hub.HfApi, "model_info", refused)
    with pytest.raises(DownloadFailed):
        resolve_model("owner/some-model:model.gguf")
    assert asked == [True, False]


@pytest.mark.parametrize(("num_bytes", "error", "said"), [(1 << 50, DownloadFailed, "smaller model"), (1 << 39, DiskFull, "HF_HOME")])
def test_hub_models_that_are_too_large_are_refused_before_they_are_fetched(folder, tmp_path, monkeypatch, num_bytes, error, said):
    import huggingface_hub
    from huggingface_hub import constants

    files = [
        SimpleNamespace(rfilename=name, size=size)
        for name, size in (("a.safetensors", num_bytes), ("b.bin", 1 << 60), ("config.json", None))
    ]
    monkeypatch.setattr(constants, "HF_HUB_OFFLINE", False)
    monkeypatch.setattr(constants, "HF_HUB_CACHE", str(tmp_path / "not" / "yet"))
    monkeypatch.setattr("engine.hub.resolve.shutil.disk_usage", lambda path: SimpleNamespace(free=1 << 30))
    monkeypatch.setattr(
        huggingface_hub.HfApi, "model_info", lambda *given, **named: SimpleNamespace(**{"siblings": files, "sha": "0" * 40})
    )
    monkeypatch.setattr(huggingface_hub, "snapshot_download", lambda name, **options: str(folder))
    with pytest.raises(error, match=said):
        resolve_model("owner/some-model")
    files[0].size = 1 << 20
    assert resolve_model("owner/some-model") == folder


def test_an_unknown_pair_lists_the_known_ones():
    with pytest.raises(UnknownPair, match=r"unknown pair 'gpt5' \(known pairs: smollm2, qwen2.5-coder, gemma3\)"):
        resolve_pair("gpt5")


# --- errors -----------------------------------------------------------------------------------------------------------


def test_errors_are_one_line_with_the_remedy_and_survive_pickling():
    error = pickle.loads(pickle.dumps(UnknownPair("two\nlines", "do this")))
    assert str(error) == "two lines (do this)" and error.what == "two lines" and error.remedy == "do this"
    assert isinstance(error, ForetoldError) and str(ForetoldError("alone")) == "alone"


# --- vocabularies -----------------------------------------------------------------------------------------------------


def vocabulary(*tokens, **at):
    held = {token: index for index, token in enumerate(tokens)} | at
    return types.SimpleNamespace(get_vocab=lambda: held)


def test_equal_vocabularies_and_vocabularies_equal_up_to_padding_are_accepted():
    words = ["a", "b", "<|end|>"]
    assert check_vocabularies(vocabulary(*words), vocabulary(*words)) == 3
    padded = vocabulary(*words, "[PAD3]", "[PAD4]")
    assert check_vocabularies(vocabulary(*words), padded) == 3
    assert check_vocabularies(padded, vocabulary(*words)) == 3
    assert check_vocabularies(padded, vocabulary(*words, "<|extra_0|>")) == 3
    assert tokenizer_fingerprint(padded) == tokenizer_fingerprint(vocabulary(*words))


@pytest.mark.parametrize(
    ("draft", "said"),
    [
        (["a", "c", "<|end|>"], "id 1 is 'b' for the target and 'c' for the draft"),
        (["b", "a", "<|end|>"], "id 0 is 'a' for the target and 'b' for the draft"),
        (["a", "b"], r"only the target has the token '<\|end\|>' \(id 2\)"),
        (["a", "b", "<|end|>", "<tool>"], r"only the draft has the token '<tool>' \(id 3\)"),
        (["a", "[PAD1]", "<|end|>"], "id 1 is 'b'"),
    ],
)
def test_other_differences_are_refused_with_the_reason(draft, said):
    target = vocabulary("a", "b", "<|end|>")
    with pytest.raises(VocabularyMismatch, match=said):
        check_vocabularies(target, vocabulary(*draft))
    assert tokenizer_fingerprint(target) != tokenizer_fingerprint(vocabulary(*draft))


# --- fingerprints -----------------------------------------------------------------------------------------------------


def test_fingerprint_follows_the_content_not_the_place(folder, tmp_path):
    first = fingerprint(folder)
    copy = tmp_path / "elsewhere"
    shutil.copytree(folder, copy)
    assert fingerprint(copy) == first
    config = json.loads((copy / "config.json").read_text())
    (copy / "config.json").write_text(json.dumps(config | {"transformers_version": "0", "_name_or_path": "x"}))
    assert fingerprint(copy) == first
    (copy / "config.json").write_text(json.dumps(config | {"rms_norm_eps": 0.5}))
    assert fingerprint(copy) != first


def test_fingerprint_is_taken_again_when_weights_change(folder, monkeypatch):
    first = fingerprint(folder)
    with monkeypatch.context() as patched:
        patched.setattr("engine.hub.fingerprint.file_sha256", lambda path: pytest.fail("read the weights again"))
        assert fingerprint(folder) == first
    weights = bytearray((folder / "model.safetensors").read_bytes())
    weights[-1] ^= 1
    (folder / "model.safetensors").write_bytes(weights)
    assert fingerprint(folder) != first


def test_fingerprint_ignores_a_damaged_note_and_works_where_it_cannot_write(folder, tmp_path, monkeypatch):
    first = fingerprint(folder)
    (folder / "foretold-fingerprint.json").write_text("[")
    assert fingerprint(folder) == first

    monkeypatch.setenv("FORETOLD_HOME", str(tmp_path / "home"))
    (folder / "foretold-fingerprint.json").unlink()
    from engine.hub import fingerprint as module

    real = module.write_atomically

    def read_only(path, text):
        if path.parent == folder:
            raise PermissionError("read-only")
        real(path, text)

    monkeypatch.setattr(module, "write_atomically", read_only)
    assert fingerprint(folder) == first
    monkeypatch.setattr(module, "file_sha256", lambda path: pytest.fail("read the weights again"))
    assert fingerprint(folder) == first


def test_fingerprint_of_a_folder_without_weights_is_refused(tmp_path):
    with pytest.raises(ModelNotFound):
        fingerprint(tmp_path)


# --- the other `kernels` ----------------------------------------------------------------------------------------------


def test_with_ours_installed_transformers_sees_no_kernels_package_and_loads_models(folder):
    check_kernels_package()
    assert is_kernels_available() is False
    model = AutoModelForCausalLM.from_pretrained(folder)
    assert model(torch.arange(5)[None]).logits.shape == (1, 5, 256)


def test_the_other_package_over_ours_is_named(tmp_path, monkeypatch, folder):
    with pytest.raises(KernelsPackageClash, match="is imported from"):
        check_kernels_package(home=tmp_path)
    (tmp_path / "kernels").mkdir()
    (tmp_path / "kernels" / "__init__.py").write_text("")
    information = tmp_path / "kernels-0.18.2.dist-info"
    information.mkdir()
    (information / "METADATA").write_text("Metadata-Version: 2.1\nName: kernels\nVersion: 0.18.2\n")
    monkeypatch.syspath_prepend(str(tmp_path))
    for entrance in (check_kernels_package, lambda: resolve_model(folder), lambda: resolve_pair("smollm2")):
        with pytest.raises(KernelsPackageClash, match=r"`kernels` 0\.18\.2 is installed"):
            entrance()


# --- progress ---------------------------------------------------------------------------------------------------------


def test_progress_goes_to_standard_error_in_few_lines(capsys):
    show = StderrProgress()
    for done in range(0, 1001):
        show("fetching", done * 10**6, 10**9)
    show("converting", 5, 5)
    out, err = capsys.readouterr()
    lines = err.splitlines()
    assert out == "" and len(lines) == 6
    assert lines[0] == "fetching: 0 of 1000 MB" and lines[4].startswith("fetching: 1000 of 1000 MB, ")
