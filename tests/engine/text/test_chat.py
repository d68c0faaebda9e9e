"""Turns appended to a chat, against the template's rendering of the whole conversation."""

from __future__ import annotations

import pytest

from engine.errors import InvalidOption
from engine.runtime.sampling import SamplingParams
from engine.text.chat import next_turn

CHATML = (
    "{% if messages[0].role != 'system' %}<|im_start|>system\nBe brief.<|im_end|>\n{% endif %}"
    "{% for m in messages %}<|im_start|>{{ m.role }}\n{{ m.content }}<|im_end|>\n{% endfor %}"
    "{% if add_generation_prompt %}<|im_start|>assistant\n{% endif %}"
)
LLAMA = (
    "{{ '<|endoftext|>' }}{% for m in messages %}<|im_start|>{{ m.role }}<|im_start|>\n\n{{ m.content | trim }}<|im_end|>{% endfor %}"
    "{% if add_generation_prompt %}<|im_start|>assistant<|im_start|>\n\n{% endif %}"
)
INSTRUCT = "{% for m in messages %}{% if m.role == 'user' %}[INST] {{ m.content }} [/INST]{% else %} {{ m.content }}<|im_end|>{% endif %}{% endfor %}"
# the last answer is shown with its thoughts, earlier ones without: rendering the turns so far is no beginning of rendering one more
THINKING = (
    "{% for m in messages %}<|im_start|>{{ m.role }}\n"
    "{% if m.role == 'assistant' and loop.last %}<think>\n\n</think>\n\n{% endif %}{{ m.content }}<|im_end|>\n{% endfor %}"
    "{% if add_generation_prompt %}<|im_start|>assistant\n{% endif %}"
)
PLAIN = "{% for m in messages %}{{ m.role }}: {{ m.content }}\n\n{% endfor %}{% if add_generation_prompt %}assistant: {% endif %}"
END = {CHATML: "<|im_end|>", LLAMA: "<|im_end|>", INSTRUCT: "<|im_end|>", THINKING: "<|im_end|>", PLAIN: "\n"}
NAMES = ["chatml", "llama", "instruct", "thinking", "plain"]
TALK = ["Hi there.", "Hello!\nWhat can I do?", "Count to three, please", "one, two, three", "and <b>back</b>?  "]


def user(content):
    return {"role": "user", "content": content}


@pytest.mark.parametrize("template", END, ids=NAMES)
@pytest.mark.parametrize("ended", [True, False])
def test_turns_add_up_to_the_whole_rendering(byte_tokenizer, template, ended):
    tokenizer = byte_tokenizer(template)
    messages = [user(TALK[0])]
    text = tokenizer.apply_chat_template(messages, tokenize=False, add_generation_prompt=True)
    ids = tokenizer(text, add_special_tokens=False)["input_ids"]
    for answer, message in zip(TALK[1::2], TALK[2::2], strict=True):
        answer = " " + answer if template == INSTRUCT else answer  # its template puts a space there, a model would too
        # what a model says, with the token that ends its turn or cut off by a limit before it
        ids = ids + tokenizer(answer + END[template] * ended, add_special_tokens=False)["input_ids"]
        added = next_turn(tokenizer, message, ids)
        ids = ids + added
        messages += [{"role": "assistant", "content": answer.strip()}, user(message)]
        whole = tokenizer.apply_chat_template(messages, tokenize=False, add_generation_prompt=True)
        assert tokenizer.decode(ids) == whole
        assert ids == tokenizer(whole, add_special_tokens=False)["input_ids"]


def test_nothing_that_stands_there_is_repeated(byte_tokenizer):
    tokenizer = byte_tokenizer(CHATML)
    ids = {
        text: tokenizer(text, add_special_tokens=False)["input_ids"] for text in ("so", "so<|im_end|>", "so<|im_end|>\n", "so<|im_start|>")
    }
    added = {text: tokenizer.decode(next_turn(tokenizer, "go on", own)) for text, own in ids.items()}
    tail = "<|im_start|>user\ngo on<|im_end|>\n<|im_start|>assistant\n"
    assert added["so"] == "<|im_end|>\n" + tail == added["so<|im_start|>"]
    assert added["so<|im_end|>"] == "\n" + tail
    assert added["so<|im_end|>\n"] == tail


def test_a_message_may_hold_anything(byte_tokenizer):
    tokenizer = byte_tokenizer(CHATML)
    message = "assistant-turn-placeholder user-turn-placeholder {{ messages }} früh 🙂"
    assert message in tokenizer.decode(next_turn(tokenizer, message, [1, 2, 3]))


@pytest.mark.parametrize(
    "template, what",
    [
        (None, "no chat template"),
        ("{% for m in messages if m.role == 'user' %}{{ m.content }}{% endfor %}", "leaves out earlier answers"),
        ("{% if messages | length > 1 %}{{ raise_exception('one question only') }}{% endif %}", "refuses a second turn: one question only"),
    ],
)
def test_templates_that_do_not_serve(byte_tokenizer, template, what):
    with pytest.raises(InvalidOption, match=what):
        next_turn(byte_tokenizer(template), "hi", [1, 2, 3])


@pytest.mark.parametrize("limit", [1, 25])
def test_a_session_s_turns_are_the_template_s(chat_engine, limit):
    """Its first turn as a rendering of its own, later ones appended; answers here end by the limit, as a random model hardly ends a turn."""
    engine = chat_engine("none", deterministic=True)
    params = SamplingParams(max_new_tokens=limit)
    with engine.session(quality="tokens") as session:
        said = session.chat("Hello", params)
        before = engine.tokenizer("<|im_start|>user\nHello<|im_end|>\n<|im_start|>assistant\n")["input_ids"]
        assert session.token_ids == before + said.token_ids
        cached = len(session.token_ids) - 1
        again = session.chat("More", params)
        closing = "" if said.finish_reason == "eos" else "<|im_end|>"
        middle = engine.tokenizer(closing + "\n<|im_start|>user\nMore<|im_end|>\n<|im_start|>assistant\n")["input_ids"]
        assert session.token_ids == before + said.token_ids + middle + again.token_ids
        assert again.reused_tokens == cached, "the cache of the first turn stays valid"


def test_only_the_first_text_gets_special_tokens(chat_engine):
    engine = chat_engine("none")

    class Beginning:
        """The engine's tokenizer, with a token at the beginning of a text, as many models want."""

        def __init__(self, inner):
            self._inner = inner

        def __getattr__(self, name):
            return getattr(self._inner, name)

        def __call__(self, text, add_special_tokens=True):
            return {"input_ids": [257] * add_special_tokens + self._inner(text)["input_ids"]}

    engine.core.text.tokenizer = Beginning(engine.tokenizer)
    one = SamplingParams(max_new_tokens=1)
    with engine.session(quality="tokens") as session:
        session.generate("a", one)
        session.generate("b", one)
        assert session.token_ids[0] == 257 and session.token_ids.count(257) == 1 + (session.token_ids[2] == 257) + (
            session.token_ids[-1] == 257
        )
        assert len(session.token_ids) == 5
