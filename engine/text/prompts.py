"""From what a caller gives as prompts to token ids: text, token ids in any of the usual containers, or chat messages."""

from __future__ import annotations

import codecs
from collections.abc import Mapping, Sequence
from typing import Any

from engine.errors import EmptyPrompt, InvalidOption
from engine.inputs import are_whole, is_whole, shown
from engine.text.encoding import encode_text
from engine.text.messages import checked_messages, disguised, special_tokens, valid_text
from engine.text.templates import has_template, render

__all__ = ["Messages", "Prompt", "as_prompts", "encode_prompt", "end_tokens", "is_messages", "prompt_text", "special_tokens", "token_ids"]

Messages = Sequence[Mapping[str, Any]]
Prompt = str | Sequence[int] | Messages | Any  # or an encoding, a numpy array or a torch tensor of ids
_FORMS = "give text, token ids, or chat messages"


def prompt_text(content: bytes | str, where: str) -> str:
    """A prompt as it was read from a file, standard input or the command line: decoded, and without its byte order mark.

    Bytes are UTF-8, or UTF-16 where a byte order mark says so.

    Raises:
        InvalidOption: `where` (which begins the error) holds no such text.
    """
    if isinstance(content, bytes):
        utf16 = content.startswith((codecs.BOM_UTF16_LE, codecs.BOM_UTF16_BE))
        try:
            content = content.decode("utf-16" if utf16 else "utf-8")
        except UnicodeDecodeError as error:
            raise InvalidOption(f"{where} is not text: {error.reason} at byte {error.start}", "give UTF-8") from error
    return valid_text(content.removeprefix("\ufeff"), where)


def is_messages(prompt: object) -> bool:
    """True for chat messages: a mapping with a role or content, or a non-empty list of mappings without token ids."""
    if isinstance(prompt, Mapping):
        return "input_ids" not in prompt and ("role" in prompt or "content" in prompt)
    if not isinstance(prompt, (list, tuple)) or not prompt:
        return False
    return all(isinstance(item, Mapping) and "input_ids" not in item for item in prompt)


def as_prompts(prompts: Prompt | Sequence[Prompt]) -> list[Prompt]:
    """A list of prompts; a single text, list of token ids or list of messages becomes a list of one.

    A tokenizer's output, an array or a tensor is one prompt, or a prompt a row when it has two axes; what an attention mask leaves out (padding)
    is dropped.

    Raises:
        InvalidOption: bytes, None, numbers, or another thing that is no prompt.
    """
    if isinstance(prompts, str) or is_messages(prompts):
        return [prompts]
    if isinstance(prompts, Mapping) or hasattr(prompts, "tolist"):
        rows = _rows(prompts)
        return rows if rows and isinstance(rows[0], list) else [rows]
    if isinstance(prompts, (bytes, bytearray, memoryview)) or not isinstance(prompts, Sequence):
        raise _no_prompt(prompts)
    # numbers only: the ids of one prompt
    return [prompts] if len(prompts) > 0 and (are_whole(prompts) or all(map(_is_id, prompts))) else list(prompts)


def encode_prompt(
    tokenizer: Any | None, prompt: Prompt, most: int | None = None, *, continue_final_message: bool | None = None
) -> list[int]:
    """Token ids of a prompt. Text is taken raw, messages go through the tokenizer's chat template with the assistant's turn opened.

    continue_final_message: the last message is left open and goes on, instead of a new turn (transformers' `apply_chat_template`); None: if it is
    what the assistant says, as transformers' pipelines do.

    What looks like a special token in raw text is one, as whoever writes raw text writes the turns; in a message it is ordinary text. Raw text of white
    space alone is text, as vLLM and transformers take it. most: tokens of the model's context, to refuse at once what is far longer.

    Raises:
        PromptTooLong: a text of far more than `most` tokens.
        EmptyPrompt: no text, no ids, no messages, or nothing but what the tokenizer always adds.
        InvalidOption: text or messages without a tokenizer, messages without a chat template or of another form, or no prompt at all.
    """
    if isinstance(prompt, str):
        text = valid_text(prompt, "the prompt")
        ids = encode_text(_needed(tokenizer), text, add_special_tokens=True, most=most) if text else []
        if ids and not text.strip() and ids == encode_text(tokenizer, "", add_special_tokens=True):  # a tokenizer that drops white space
            ids = []
    elif is_messages(prompt):
        if not has_template(_needed(tokenizer)):
            raise InvalidOption(
                "the model's tokenizer has no chat template", "give the prompt as text (--raw), or use an instruction-tuned model"
            )
        given = checked_messages(prompt)
        last = given[-1]
        said = last["role"] == "assistant" and not last.get("tool_calls")
        open_end = said if continue_final_message is None else continue_final_message
        messages, disguise = disguised(tokenizer, given)
        ids = disguise.encode(render(tokenizer, messages, continue_final_message=open_end), most)
    else:
        ids = token_ids(prompt)
    if not ids:
        raise EmptyPrompt("the prompt is empty", "give at least one word, or one token id")
    return ids


def token_ids(prompt: Any) -> list[int]:
    """Ids of one prompt from a list, a numpy array, a torch tensor or a tokenizer's output.

    Raises:
        InvalidOption: something else, or an element that is no whole number.
    """
    if isinstance(prompt, Mapping) or hasattr(prompt, "tolist"):
        ids = _rows(prompt)
        if len(ids) == 1 and isinstance(ids[0], list):  # a batch of one
            ids = ids[0]
    elif isinstance(getattr(prompt, "ids", None), list):  # of the tokenizers library
        ids = prompt.ids
    elif isinstance(prompt, (str, bytes, bytearray, memoryview)) or not isinstance(prompt, Sequence):
        raise _no_prompt(prompt)
    else:
        ids = list(prompt)
    if set(map(type, ids)) <= {int}:  # nearly always; what follows takes 30 times as long
        return list(ids)
    wrong = next((item for item in ids if not _is_id(item)), None)
    if wrong is not None or None in ids:
        raise InvalidOption(f"a prompt of token ids holds {shown(wrong)}", _FORMS)
    return [int(item) for item in ids]


def _is_id(item: Any) -> bool:
    """Whether the item is a whole number, of Python, of numpy, or a tensor of one."""
    if is_whole(item):
        return True
    return getattr(item, "shape", None) == () and hasattr(item, "tolist") and is_whole(item.tolist())


def _rows(prompt: Any) -> list[Any]:
    """The list or list of lists in a tokenizer's output, an array or a tensor, without padding."""
    mask: Any = None
    if isinstance(prompt, Mapping):
        if "input_ids" not in prompt:
            raise InvalidOption(f"a prompt is a mapping of {shown(list(prompt))}", _FORMS)
        mask = prompt.get("attention_mask")
        prompt = prompt["input_ids"]
    ids = prompt.tolist() if hasattr(prompt, "tolist") else prompt
    keep = mask.tolist() if hasattr(mask, "tolist") else mask
    if not isinstance(ids, (list, tuple)):
        raise InvalidOption(f"a prompt's input_ids are {shown(ids)}", _FORMS)
    rows = [row.tolist() if hasattr(row, "tolist") and getattr(row, "shape", ()) != () else row for row in ids]
    if keep is None:
        return rows
    if rows and isinstance(rows[0], (list, tuple)):
        return [_unpadded(row, own) for row, own in zip(rows, _same_length(keep, rows), strict=True)]
    return _unpadded(rows, keep)


def _unpadded(ids: Any, mask: Any) -> list[Any]:
    own = mask.tolist() if hasattr(mask, "tolist") else mask
    return [item for item, kept in zip(ids, _same_length(own, ids), strict=True) if kept]


def _same_length(mask: Any, ids: Any) -> Any:
    if not isinstance(mask, (list, tuple)) or not isinstance(ids, (list, tuple)) or len(mask) != len(ids):
        raise InvalidOption("a prompt's attention_mask does not fit its input_ids", "pass the tokenizer's output as it is")
    return mask


def _no_prompt(prompt: object) -> InvalidOption:
    if isinstance(prompt, (bytes, bytearray, memoryview)):
        return InvalidOption(f"a prompt is of type {type(prompt).__name__}", "decode it to text first: prompt.decode()")
    return InvalidOption(f"a prompt is of type {type(prompt).__name__}: {shown(prompt)}", _FORMS)


def _needed(tokenizer: Any | None) -> Any:
    if tokenizer is None:
        raise InvalidOption("a text prompt needs a tokenizer", "give token ids, or an engine with a tokenizer")
    return tokenizer


def end_tokens(model_ids: Sequence[int], tokenizer: Any | None) -> frozenset[int]:
    """End-of-sequence ids: the model's own, which are generation_config.json's if that names any and else config.json's, as transformers takes them;
    of a model that names none, the tokenizer's, so that a chat ends."""
    if model_ids or tokenizer is None or tokenizer.eos_token_id is None:
        return frozenset(model_ids)
    return frozenset({tokenizer.eos_token_id})
