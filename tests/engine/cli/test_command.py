"""`python -m engine.generate`: what goes where, the JSON of the contract, mistakes in one line, and a conversation at a terminal."""

from __future__ import annotations

import io
import json
import os
import re
import threading
from dataclasses import replace
from pathlib import Path

import pytest
from transformers import FalconConfig

from engine.engine import Engine
from engine.generate import main
from engine.hub.resolve import PairPaths
from engine.runtime.core import EngineCore
from engine.sessions import codec_params
from engine.sessions.codec_params import find_pack, known_pack
from engine.sessions.file import SessionFile

ROOT = Path(__file__).resolve().parents[3]
TYPES = {
    "text": str,
    "finish_reason": str,
    "prompt_tokens": int,
    "reused_tokens": int,
    "new_tokens": int,
    "ttft_s": float,
    "decode_s": float,
    "tokens_per_s": float,
    "pair": str,
    "device": str,
    "dtype": str,
    "seed": int,
    "versions": dict,
    "speculation": {
        "drafter": str,
        "steps": int,
        "proposed": int,
        "accepted": int,
        "acceptance_rate": float,
        "tokens_per_step": float,
        "accepted_by_position": list,
    },
    "kv": {"tokens": int, "raw_bytes": int, "hot_bytes": int, "stored_bytes": int, "bits_per_element": float, "quality": str},
    "memory": {"target_bytes": int, "draft_bytes": int, "pool_bytes": int, "pack_bytes": int},
}


@pytest.fixture
def generate(capsys, model_options):
    """`generate(*options)` -> exit status, standard output, standard error, over the tiny pair unless models are named."""

    def call(*options):
        named = [] if {"--target", "--pair"} & set(options) else model_options
        status = main([*named, *map(str, options)])
        out, err = capsys.readouterr()
        return status, out, err

    return call


@pytest.fixture
def stdin(monkeypatch):
    """`stdin(data)`: what standard input holds."""
    return lambda data: monkeypatch.setattr("sys.stdin", io.TextIOWrapper(io.BytesIO(data), "utf-8"))


def mistake(status, out, err):
    """The one line of a mistake."""
    assert status == 2 and out == "" and "Traceback" not in err
    lines = [line for line in err.splitlines() if line.startswith("error: ")]
    assert len(lines) == 1 and err.splitlines()[-1] == lines[0] and re.fullmatch(r"error: .+ \(.+\)", lines[0]), err
    return lines[0]


# --- text and figures ---------------------------------------------------------------------------------------------------


def test_text_to_stdout_figures_to_stderr(generate):
    status, out, err = generate("Hello", "--max-new-tokens", 12)
    assert status == 0 and out.endswith("\n") and "tokens/s" not in out
    assert re.search(r"\[.*target, cpu, float32: target \d+ MiB, draft \d+ MiB \(draft\), KV pools \d+ MiB\]", err)
    assert re.search(r"\[\d+ tokens at [\d.]+ tokens/s, first after [\d.]+ s; prompt \d+ tokens, 0 reused.*; (length|eos)\]", err)


def test_json_is_the_contract_s(generate, tmp_path):
    status, out, _ = generate("Hello", "--max-new-tokens", 20, "--json", "--session", tmp_path / "a.kv", "--draft-length", 3, "--seed", 5)
    found = json.loads(out.splitlines()[-1])
    assert status == 0 and len(out.splitlines()) == 1
    for key, kind in TYPES.items():
        inner = kind if isinstance(kind, dict) else {}
        assert isinstance(found[key], dict if inner else kind), key
        for name, type_ in inner.items():
            assert isinstance(found[key][name], type_) and not isinstance(found[key][name], bool), (key, name)
    assert (
        found["finish_reason"] in ("stop", "length", "eos")
        and found["seed"] == 5
        and found["device"] == "cpu"
        and found["dtype"] == "float32"
    )
    assert found["kv"]["stored_bytes"] == (tmp_path / "a.kv").stat().st_size and found["kv"]["quality"] == "balanced"
    assert found["kv"]["tokens"] == found["prompt_tokens"] + found["new_tokens"] - 1
    assert found["memory"]["pack_bytes"] > 0 and found["speculation"]["drafter"] == "draft"
    assert {"python", "torch", "transformers"} <= set(found["versions"])


def test_json_without_a_session(generate, model_options):
    status, out, _ = generate("Hello", "--max-new-tokens", 3, "--json")
    found = json.loads(out)
    assert status == 0 and found["kv"]["stored_bytes"] is found["kv"]["bits_per_element"] is found["kv"]["quality"] is None
    assert found["memory"]["pack_bytes"] == 0 and found["pair"] == model_options[1]


def test_json_into_a_file_beside_the_text(generate, tmp_path):
    status, out, _ = generate("Hello", "--max-new-tokens", 12, "--json-out", tmp_path / "a.json")
    found = json.loads((tmp_path / "a.json").read_text())
    assert status == 0 and out == found["text"] + "\n" and found["new_tokens"] <= 12


def test_a_known_pair(generate, chat_folders, monkeypatch, pack_home):
    pairs: list[str] = []
    paths = PairPaths("smollm2", chat_folders.target, chat_folders.draft)
    monkeypatch.setattr("engine.engine.resolve_pair", lambda name, progress: pairs.append(name) or paths)
    monkeypatch.setattr("engine.engine.resolve_target", lambda name, progress: chat_folders.target)
    found = {}
    for draft in ("draft", "trunk", "none"):
        own = [] if draft == "draft" else ["--draft", draft]
        status, out, _ = generate(
            "--pair", "smollm2", *own, "Hello", "--max-new-tokens", 24, "--json", "--dtype", "float32", "--device", "cpu"
        )
        assert status == 0
        found[draft] = json.loads(out)
        assert found[draft]["pair"] == "smollm2" and found[draft]["speculation"]["drafter"] == {"trunk": "early exit"}.get(draft, draft)
    assert found["draft"]["text"] == found["trunk"]["text"] == found["none"]["text"]
    assert found["none"]["speculation"]["proposed"] == 0 and found["none"]["memory"]["draft_bytes"] == 0
    assert pairs == ["smollm2"], "a pair's own draft is fetched where no other is named"


def test_prompts_come_from_the_argument_a_file_or_standard_input(generate, stdin, tmp_path):
    (tmp_path / "prompt.txt").write_text("früh 🙂", encoding="utf-8")
    _, argued, _ = generate("früh 🙂", "--max-new-tokens", 10)
    _, filed, _ = generate("--prompt-file", tmp_path / "prompt.txt", "--max-new-tokens", 10)
    stdin("früh 🙂".encode())
    _, piped, _ = generate("--max-new-tokens", 10)
    assert argued == filed == piped


def test_raw_leaves_the_template_out(generate):
    lengths = {}
    for options in ([], ["--raw"]):
        _, out, _ = generate("Hello", "--max-new-tokens", 1, "--json", *options)
        lengths[len(options)] = json.loads(out)["prompt_tokens"]
    assert lengths == {1: 5, 0: len("user\nHello\nassistant\n") + 3}


def test_raw_white_space_is_a_prompt(generate, stdin, tmp_path):
    stdin(b"")
    assert "there is no prompt" in mistake(*generate("--raw"))
    (tmp_path / "p").write_bytes(b" \n")
    for options in ([" \n"], ["--prompt-file", tmp_path / "p"]):
        status, out, _ = generate("--raw", "--max-new-tokens", 2, "--json", *options)
        assert status == 0 and json.loads(out)["prompt_tokens"] == 2


def test_sampling_options_reach_the_sampler(generate):
    def text(*options):
        status, out, _ = generate("Hello", "--json", "--max-new-tokens", 40, "--draft-length", 2, *options)
        assert status == 0
        return json.loads(out)["text"]

    warm = ["--temperature", 1.5]
    assert text(*warm, "--seed", 1) == text(*warm, "--seed", 1) != text(*warm, "--seed", 2)
    greedy = text()
    assert text(*warm, "--top-k", 1) == greedy == text(*warm, "--top-p", 1e-6) == text(*warm, "--min-p", 1)
    assert text("--draft-length", 0) == greedy == text("--deterministic")
    part = greedy[5:8]
    stopped = text("--stop", "never there", "--stop", part)
    assert part and stopped == greedy[: greedy.index(part)]


def prompt_seen(monkeypatch):
    """The token ids that requests begin with."""
    seen, submit = [], EngineCore.submit

    def spied(self, conversation, tokens, params, **options):
        seen.append(([*conversation.token_ids, *tokens], params))
        return submit(self, conversation, tokens, params, **options)

    monkeypatch.setattr(EngineCore, "submit", spied)
    return seen


def test_a_system_message_and_the_beginning_of_answers(generate, byte_tokenizer, stdin, tmp_path, monkeypatch):
    seen, file, tokenizer = prompt_seen(monkeypatch), tmp_path / "a.kv", byte_tokenizer()
    status, out, _ = generate("Hello", "--system", "Be brief.", "--prefill", "Sure: ", "--max-new-tokens", 6, "--session", file)
    messages = [{"role": "system", "content": "Be brief."}, {"role": "user", "content": "Hello"}]
    opened = tokenizer.apply_chat_template(messages, tokenize=False, add_generation_prompt=True) + "Sure: "
    assert status == 0 and seen[-1][0] == tokenizer(opened)["input_ids"] and not out.startswith("Sure")
    stdin(b"Again\nAnd again\n")
    assert generate("--chat", "--system", "Be long.", "--prefill", "Well, ", "--max-new-tokens", 6, "--session", file)[0] == 0
    for ids, _ in seen[-2:]:
        text = tokenizer.decode(ids)
        assert text.endswith("<|im_start|>assistant\nWell, ") and text.count("system\n") == 1, "a conversation has one system message"
    for option in ("--system", "--prefill"):
        assert f"--raw does not go with {option} (write it into the prompt)" in mistake(*generate("Hello", "--raw", option, "x"))
    assert "not valid text" in mistake(*generate("Hello", "--system", "caf\udce9"))


def test_penalties_reach_the_sampler(generate, monkeypatch):
    seen = prompt_seen(monkeypatch)

    def text(*options):
        status, out, _ = generate("Hello", "--max-new-tokens", 30, *options)
        assert status == 0
        return out

    greedy = text()
    for name, value in (("repetition_penalty", 1.8), ("frequency_penalty", 1.9), ("presence_penalty", -1.7)):
        assert text("--" + name.replace("_", "-"), value) != greedy
        own = seen[-1][1]
        values = {n: getattr(own, n) for n in ("repetition_penalty", "frequency_penalty", "presence_penalty")}
        assert values == {"repetition_penalty": 1.0, "frequency_penalty": 0.0, "presence_penalty": 0.0} | {name: value}
    for option, value in (("--repetition-penalty", "0"), ("--frequency-penalty", "3"), ("--presence-penalty", "nan")):
        assert option[2:].replace("-", "_") in mistake(*generate("Hello", option, value))


def test_formats_of_the_kv_cache(generate, monkeypatch):
    """Kernels that read the formats have tests of their own; heads as small as the tiny pair's are refused by name."""
    made, init = [], Engine.__init__

    def spied(self, *args, **options):
        made.append(options["kv_cache_dtype"])
        init(self, *args, **options)

    monkeypatch.setattr(Engine, "__init__", spied)
    for option in ("--kv-cache-dtype", "--hot"):
        assert "q4" in mistake(*generate("Hello", option, "q4"))
    assert generate("Hello", "--max-new-tokens", 2)[0] == 0 and made == ["q4", "q4", "bf16"]
    assert "invalid choice: 'q5'" in mistake(*generate("Hello", "--kv-cache-dtype", "q5"))


def test_threads_and_versions(generate, monkeypatch):
    given = []
    monkeypatch.setattr("torch.set_num_threads", given.append)
    assert generate("Hello", "--max-new-tokens", 2, "--threads", 1)[0] == 0 and given == [1]
    for wrong in ("0", "-2", "1025", "many", "1.5"):
        assert "--threads" in mistake(*generate("Hello", "--threads", wrong))
    assert given == [1]
    status, out, err = generate("--version")
    assert status == 0 and re.match(r"python 3[.\d]+, .*torch \d", out) and err == ""


# --- sessions -----------------------------------------------------------------------------------------------------------


def test_a_session_is_made_then_resumed(generate, tmp_path):
    file = tmp_path / "chat.kv"
    status, _, err = generate("Hello", "--session", file, "--max-new-tokens", 20, "--quality", "compact")
    assert status == 0 and re.search(
        r"suspended \d+ tokens to .*chat\.kv: [\d,]+ bytes, \d+ times less than [\d,]+ in bf16 \(.*, compact, ", err
    )
    assert "resumed" not in err
    first = SessionFile.load(file)
    status, out, err = generate("And now?", "--session", file, "--max-new-tokens", 20, "--json")
    found, second = json.loads(out), SessionFile.load(file)
    assert status == 0 and re.search(rf"resumed {len(first.token_ids)} tokens from .*chat\.kv in ", err)
    assert found["reused_tokens"] == len(first.token_ids) - 1 == first.num_cached
    assert second.token_ids[: len(first.token_ids)] == first.token_ids and second.spans[: len(first.spans)] == first.spans
    assert second.quality == "compact", "the file's own quality, unless another is asked for"
    status, _, _ = generate("More", "--session", file, "--max-new-tokens", 3, "--quality", "tokens")
    assert status == 0 and SessionFile.load(file).quality == "tokens"


@pytest.mark.parametrize("draft", ["trunk", "none"])
def test_sessions_without_a_separate_draft(generate, chat_folders, draft, tmp_path):
    options = ["--target", chat_folders.target, "--draft", draft, "--dtype", "float32", "--device", "cpu", "--session", tmp_path / "a.kv"]
    for reused in (False, True):
        status, out, _ = generate("Hello", *options, "--max-new-tokens", 20, "--json")
        assert status == 0 and (json.loads(out)["reused_tokens"] > 0) is reused


def test_a_session_whose_turn_fails_keeps_its_file(generate, tmp_path):
    file = tmp_path / "chat.kv"
    generate("Hello", "--session", file, "--max-new-tokens", 5)
    before = file.read_bytes()
    assert "context is 1024" in mistake(*generate("x" * 2000, "--session", file))
    assert file.read_bytes() == before


# --- mistakes -----------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    "options, what",
    [
        (["--pair", "gpt-9", "hi"], "unknown pair 'gpt-9' (known pairs: "),
        (["--target", "/no/such/folder", "hi"], "there is no folder '/no/such/folder'"),
        (["--target", "/no/such", "--draft", "trunk", "hi"], "there is no folder '/no/such'"),
        (["--target", "", "hi"], "--target is empty (name a model, or leave it out)"),
        (["hi", "--draft", ""], "--draft is empty"),
        (["hi", "--store", ""], "--store is empty (name a folder, or leave it out)"),
        (["hi", "--threads", "2000"], "--threads cannot be 2000 (give a whole number from 1 to 1,024)"),
        (["hi", "--repetition-penalty", "1e300"], "repetition_penalty cannot be 1e+300 (give a number from 1e-10 to 1e10, 1 for none)"),
        (["--pair", "smollm2", "--target", "x", "hi"], "--pair and --target exclude each other"),
        (["hi", "--temperature", "-1"], "temperature"),
        (["hi", "--temperature", "hot"], "--temperature: invalid float value: 'hot'"),
        (["hi", "--temperature", "nan"], "temperature"),
        (["hi", "--top-p", "0"], "top_p"),
        (["hi", "--top-k", "-3"], "top_k"),
        (["hi", "--min-p", "2"], "min_p"),
        (["hi", "--seed", "-1"], "seed"),
        (["hi", "--max-new-tokens", "0"], "max_new_tokens"),
        (["hi", "--stop", ""], "stop"),
        (["hi", "--draft-length", "many"], "--draft-length cannot be 'many'"),
        (["hi", "--draft-length", "-1"], "draft_length"),
        (["hi", "--device", "abacus"], "unknown device 'abacus'"),
        (["hi", "--dtype", "int3"], "unknown dtype 'int3'"),
        (["hi", "--quality", "best", "--session", "a.kv"], "unknown quality 'best'"),
        (["hi", "--quality", "tiny"], "--quality only matters to a session"),
        (["hi", "--pack", "x.pack"], "--pack only matters to a session"),
        (["hi", "--session", "/no/such/folder/a.kv"], "--session cannot be written to"),
        (["hi", "--session", "/tmp"], "--session cannot be written to"),
        (["hi", "--json-out", "/no/such/folder/a.json"], "--json-out cannot be written to"),
        (["hi", "--session", "/dev/null"], "'/dev/null' cannot be read: it is not a regular file"),
        (["hi", "--session", "/dev/zero"], "'/dev/zero' cannot be read: it is not a regular file"),
        (["hi", "--session", ""], "--session cannot be written to"),
        (["hi", "--session", "n" * 300], "--session cannot be written to"),
        (["hi", "--session", "a\0b"], "--session cannot be written to"),
        (["hi", "--session", "a.kv", "--json-out", "./a.kv"], "--session and --json-out name one file (give each its own)"),
        (["hi", "--max-new-tokens", "9" * 30], "max_new_tokens cannot be 999999999"),
        (["hi", "--target", "/no/\x1b]0;x\x07"], r"there is no folder '/no/\x1b]0;x\x07'"),
        (["hi", "--hot", "q5"], "--hot"),
        (["hi", "there"], "unrecognized arguments: there"),
        (["hi", "--frobnicate"], "unrecognized arguments: --frobnicate"),
        (["--chat", "--json"], "--chat does not go with --json"),
        (["--chat", "--raw"], "--chat does not go with --raw"),
        (["--chat", "--json-out", "a"], "--chat does not go with --json-out"),
        (["hi", "--prompt-file", "x"], "there are two prompts"),
        (["--prompt-file", "/no/such/file"], "prompt file /no/such/file cannot be read"),
        ([""], "there is no prompt"),
        ([" \n"], "there is no prompt"),
        (["", "--raw"], "there is no prompt"),
        (["caf\udce9"], "not valid text"),
        (["x" * 2000], "the model's context is 1024"),
        (["x" * 2000, "--raw"], "the prompt has 2000 tokens"),
    ],
)
def test_mistakes_end_in_one_line(generate, options, what):
    assert what in mistake(*generate(*options))


@pytest.mark.parametrize(
    "data, what", [(b"", "there is no prompt"), (b"\n", "there is no prompt"), (b"caf\xe9", "standard input is not text")]
)
def test_standard_input_without_a_prompt(generate, stdin, data, what):
    stdin(data)
    assert what in mistake(*generate())


def test_prompt_files_that_are_no_text(generate, tmp_path):
    (tmp_path / "p").write_bytes(b"\xff\xfe\x00")
    assert "cannot be read" in mistake(*generate("--prompt-file", tmp_path / "p"))
    assert "cannot be read" in mistake(*generate("--prompt-file", tmp_path))
    (tmp_path / "p").write_bytes(b"  \n")
    assert "there is no prompt" in mistake(*generate("--prompt-file", tmp_path / "p"))


def test_pipes_that_nobody_holds_are_named(generate, tmp_path, monkeypatch):
    monkeypatch.setattr("engine.cli.options.PIPE_WAIT_S", 0.05)
    pipe = tmp_path / "pipe"
    os.mkfifo(pipe)
    assert "it is a pipe that nobody has written to" in mistake(*generate("--prompt-file", pipe))
    status, out, err = generate("hi", "--max-new-tokens", "2", "--json-out", pipe)
    assert status == 2 and out and err.splitlines()[-1].startswith(f"error: {pipe} cannot be written: No such device or address")
    writer = threading.Thread(target=pipe.write_text, args=("hello",))
    writer.start()
    monkeypatch.setattr("engine.cli.options.PIPE_WAIT_S", 20.0)
    status, out, _ = generate("--prompt-file", pipe, "--max-new-tokens", "2")
    writer.join()
    assert status == 0 and out


def test_links_pipes_and_names_of_session_files(generate, tmp_path):
    loop, fifo, dangling, link = (tmp_path / name for name in ("loop", "fifo", "dangling", "link"))
    loop.symlink_to(loop)
    dangling.symlink_to(tmp_path / "none" / "x")
    link.symlink_to(tmp_path / "target.kv")
    os.mkfifo(fifo)
    for option in ("--session", "--json-out"):
        for path in (loop, dangling):
            assert f"{option} cannot be written to" in mistake(*generate("hi", option, path)), "before the work, not after it"
    assert "it is not a regular file" in mistake(*generate("hi", "--session", fifo))
    assert generate("hi", "--session", link, "--quality", "tokens", "--max-new-tokens", 2)[0] == 0
    assert link.is_symlink() and SessionFile.load(tmp_path / "target.kv").token_ids
    status, _, err = generate("hi", "--session", tmp_path / "a\x1b[31mb.kv", "--quality", "tokens", "--max-new-tokens", 2)
    assert status == 0 and "\x1b" not in err and r"a\x1b[31mb.kv" in err


def test_models_that_do_not_serve(generate, chat_folders, byte_tokenizer, tmp_path):
    other = tmp_path / "other"
    other.mkdir()
    for file in chat_folders.draft.iterdir():
        (other / file.name).write_bytes(file.read_bytes())
    tokenizer = byte_tokenizer()
    tokenizer.add_tokens(["surplus"])
    tokenizer.save_pretrained(other)
    assert "only the draft has the token 'surplus'" in mistake(*generate("hi", "--target", chat_folders.target, "--draft", other))
    for config, what in (
        (FalconConfig(architectures=["FalconForCausalLM"]).to_dict(), "Falcon"),
        ({"architectures": ["NewForCausalLM"], "model_type": "new"}, "architecture 'new' is not supported"),
        (FalconConfig().to_dict() | {"head_dim": 8}, "Falcon"),
        ([], "not valid"),
    ):
        (other / "config.json").write_text(json.dumps(config))
        assert what.lower() in mistake(*generate("hi", "--target", other)).lower()
    (other / "config.json").unlink()
    assert "holds no config.json" in mistake(*generate("hi", "--target", other))


def test_a_model_without_a_chat_template(generate, chat_folders, byte_tokenizer, tmp_path):
    for file in chat_folders.target.iterdir():
        if "template" not in file.name:
            (tmp_path / file.name).write_bytes(file.read_bytes())
    byte_tokenizer(None).save_pretrained(tmp_path)
    plain = ["--target", tmp_path, "--device", "cpu", "--max-new-tokens", 3]
    assert "no chat template (give the prompt as text (--raw)" in mistake(*generate("hi", *plain))
    assert generate("hi", "--raw", *plain)[0] == 0


def test_session_files_and_packs_that_do_not_serve(generate, chat_engine, chat_folders, tmp_path):
    file, good = tmp_path / "a.kv", tmp_path / "good.kv"
    file.write_bytes(b"nothing of the kind, but long enough to be one")
    assert "not a Foretold file" in mistake(*generate("hi", "--session", file))
    assert file.read_bytes().startswith(b"nothing"), "what was there is not overwritten"
    assert generate("hi", "--session", good, "--max-new-tokens", 10)[0] == 0
    file.write_bytes(good.read_bytes()[:-1])
    assert "ends inside section" in mistake(*generate("hi", "--session", file))
    stranger = ["--target", chat_folders.stranger, "--draft", chat_folders.draft, "--dtype", "float32", "--device", "cpu"]
    assert "written with another target" in mistake(*generate("hi", "--session", good, *stranger))
    pack = find_pack(chat_engine().core, log=lambda _: None)
    replace(pack, fingerprints=pack.fingerprints | {"draft": "another"}).save(tmp_path / "pack")
    assert "made for another draft" in mistake(*generate("hi", "--session", tmp_path / "new.kv", "--pack", tmp_path / "pack"))
    assert "there is no codec pack" in mistake(*generate("hi", "--session", tmp_path / "new.kv", "--pack", tmp_path / "none"))
    assert not (tmp_path / "new.kv").exists()


def test_a_disk_that_is_full_at_the_end(generate, tmp_path, monkeypatch):
    import errno

    def full(_):
        raise OSError(errno.ENOSPC, "No space left on device")

    file = tmp_path / "a.kv"
    generate("Hello", "--session", file, "--max-new-tokens", 5)
    before = file.read_bytes()
    monkeypatch.setattr("os.fsync", full)
    status, out, err = generate("More", "--session", file, "--max-new-tokens", 5)
    assert mistake(status, "", err).startswith("error: no room left for the session file") and out, "the answer was shown before"
    assert file.read_bytes() == before


def without_a_pack(monkeypatch, tmp_path, fit):
    """A cache folder that has none, and what fits one."""
    monkeypatch.setattr("engine.sessions.kv_codec.known_pack", known_pack)
    monkeypatch.setattr("engine.sessions.codec_params.quick_pack", fit)
    monkeypatch.setenv("FORETOLD_HOME", str(tmp_path / "home"))


@pytest.mark.parametrize("chat", [False, True])
def test_codec_parameters_are_fitted_behind_the_last_answer(generate, stdin, monkeypatch, tmp_path, chat):
    file, fit = tmp_path / "a.kv", codec_params.quick_pack
    held: list[SessionFile] = []

    def fitted(*args, **options):
        held.append(SessionFile.load(file))
        return fit(*args, **options)

    without_a_pack(monkeypatch, tmp_path, fitted)
    options = ["--session", file, "--quality", "compact", "--max-new-tokens", 6, "--draft", "none"]
    if chat:
        stdin(b"Hello\nAnd now?\n")
    status, out, err = generate(*(["--chat"] if chat else ["Hello"]), *options)
    assert status == 0 and out.count("\n") >= (2 if chat else 1)
    [before] = held
    stored = SessionFile.load(file)
    assert not before.spans and stored.spans and before.token_ids == stored.token_ids, "every answer was in the file before"
    lines = err.splitlines()
    [fits] = (n for n, line in enumerate(lines) if "fitting a quick one" in line)
    suspended = [n for n, line in enumerate(lines) if line.startswith("suspended")]
    assert len(suspended) == (3 if chat else 2) and suspended[-2] < fits < suspended[-1]
    assert "kept as ids: there are no codec parameters" in lines[suspended[-2]]


def test_an_interrupted_fit_leaves_the_ids(generate, monkeypatch, tmp_path):
    def interrupted(*_args, **_options):
        raise KeyboardInterrupt

    without_a_pack(monkeypatch, tmp_path, interrupted)
    status, out, err = generate("Hello", "--session", tmp_path / "a.kv", "--quality", "tiny", "--max-new-tokens", 6, "--draft", "none")
    assert status == 130 and out and "suspended" in err
    stored = SessionFile.load(tmp_path / "a.kv")
    assert not stored.spans and stored.quality == "tiny" and stored.token_ids
    options = ["--session", tmp_path / "b.kv", "--quality", "tiny", "--max-new-tokens", 6, "--draft", "none"]
    status, again, _ = generate("Hello", *options, "--json", "--json-out", tmp_path / "b.json")
    assert status == 130 and (tmp_path / "b.json").read_text() == again
    assert json.loads(again)["text"] == out.removesuffix("\n") and json.loads(again)["kv"]["restore"] == "recompute"


# --- several turns ------------------------------------------------------------------------------------------------------


def test_turns_from_a_pipe(generate, stdin, tmp_path):
    stdin(b"Hello\nAnd now?\n\n  \nAfter blank lines\n")
    status, out, err = generate("--chat", "--session", tmp_path / "a.kv", "--max-new-tokens", 6)
    assert status == 0 and err.count("tokens/s") == err.count("suspended") == 3 and "> " not in out + err
    stdin(b"More")
    status, _, err = generate("--chat", "First", "--session", tmp_path / "a.kv", "--max-new-tokens", 6)
    assert status == 0 and err.count("tokens/s") == 2 and "resumed" in err
    (tmp_path / "p").write_text("From a file")
    stdin(b"")
    status, _, err = generate("--chat", "--prompt-file", tmp_path / "p", "--max-new-tokens", 6)
    assert status == 0 and err.count("tokens/s") == 1
    tokens = SessionFile.load(tmp_path / "a.kv").token_ids
    assert tokens.count(258) == 10, "five turns of two speakers"


def test_a_chat_that_fills_the_context_is_kept(generate, stdin, tmp_path):
    stdin(b"Hello\n" + b"x" * 2000 + b"\n")
    status, out, err = generate("--chat", "--session", tmp_path / "a.kv", "--max-new-tokens", 6)
    assert "context is 1024" in mistake(status, "", err) and out and "suspended" in err
    assert SessionFile.load(tmp_path / "a.kv").token_ids.count(258) == 2


def test_nothing_said_nothing_kept(generate, stdin, tmp_path):
    stdin(b"\n")
    status, out, _ = generate("--chat", "--session", tmp_path / "a.kv")
    assert status == 0 and out == "" and not (tmp_path / "a.kv").exists()


def test_an_interrupt_without_a_terminal_ends_the_program(generate, stdin, tmp_path, monkeypatch):
    def interrupted(*_):
        raise KeyboardInterrupt

    monkeypatch.setattr("engine.runtime.core.EngineCore.run", interrupted)
    stdin(b"Hello\nmore\n")
    status, _, err = generate("--chat", "--session", tmp_path / "a.kv")
    assert status == 130 and "interrupted" in err
    assert generate("Hello")[0] == 130


def test_settings_of_the_model_are_taken_and_named(generate, chat_folders, tmp_path):
    for file in chat_folders.target.iterdir():
        (tmp_path / file.name).write_bytes(file.read_bytes())
    config = {"do_sample": True, "temperature": 0.7, "top_k": 20, "repetition_penalty": 1.1, "eos_token_id": 256}
    (tmp_path / "generation_config.json").write_text(json.dumps(config))
    own = ["--target", tmp_path, "--dtype", "float32", "--device", "cpu", "--max-new-tokens", 2, "Hello"]
    line = "[generation_config.json: repetition_penalty 1.1, temperature 0.7, top_k 20; --temperature 0 is greedy]"
    assert line in generate(*own)[2].splitlines()
    _, _, said = generate(*own, "--temperature", 0.5, "--top-k", 20)
    assert "[generation_config.json: repetition_penalty 1.1]" in said.splitlines()
    _, greedy, said = generate(*own, "--temperature", 0)
    assert "[generation_config.json: repetition_penalty 1.1]" in said.splitlines()
    assert greedy == generate(*own, "--temperature", 0, "--repetition-penalty", 1.1)[1]
    assert "generation_config" not in generate(*own, "--temperature", 0.5, "--top-k", 20, "--repetition-penalty", 1.2)[2]
