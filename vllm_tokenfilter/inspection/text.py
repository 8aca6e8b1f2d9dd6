"""The text to inspect, cut into tokens."""

import json
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from vllm_tokenfilter.errors import EvaluationError


@dataclass(frozen=True)
class InspectedText:
    """A text cut into tokens."""

    ids: list[int]  #: the tokens.
    pieces: list[str]  #: the characters of each; joined they are the text. Empty where a token ends inside a character.
    num_cut: int  #: tokens of the text that were left out at its end.


def read_text(path: Path, chat: bool, tokenizer: Any, limit: int) -> InspectedText:
    """A UTF-8 file's text in tokens of a fast tokenizer, at most `limit` of them.

    With `chat` it is a conversation: a JSON list of messages with role and content (text, a list of text parts, or
    null), or else the text of one message of the user. It is put into the model's chat template.

    Raises:
        EvaluationError: the file cannot be read, is empty, or does not fit the model's chat template.
    """
    try:
        text = path.read_text(encoding="utf-8-sig")
    except (OSError, UnicodeDecodeError) as error:
        raise EvaluationError(f"text={path} cannot be read ({error}); pass a UTF-8 file.") from None
    if chat:
        text = _rendered(text, tokenizer, path)
    encoded = tokenizer(text, return_offsets_mapping=True, add_special_tokens=not chat)
    ids, offsets = encoded["input_ids"], encoded["offset_mapping"]
    if len(ids) < 2:
        raise EvaluationError(f"text={path} holds {len(ids)} tokens; pass a longer text.")
    pieces, end = [], 0
    for _, stop in offsets[:limit]:
        pieces.append(text[end:stop])
        end = max(end, stop)
    return InspectedText(ids[:limit], pieces, max(0, len(ids) - limit))


def _rendered(text: str, tokenizer: Any, path: Path) -> str:
    try:
        messages = json.loads(text)
    except (ValueError, RecursionError):
        messages = [{"role": "user", "content": text}]
    try:
        messages = [{**message, "role": str(message["role"]), "content": _content(message)} for message in messages]
    except (TypeError, KeyError):
        form = "[{'role': ..., 'content': ...}, ...], where a content is text, text parts or null"
        raise EvaluationError(f"text={path} must be a list of messages: {form}.") from None
    if not getattr(tokenizer, "chat_template", None):
        raise EvaluationError("chat=True needs a chat template, and the model has none; leave --chat out.")
    try:
        return str(tokenizer.apply_chat_template(messages, tokenize=False))
    except Exception as error:  # a template raises what it likes
        raise EvaluationError(f"text={path} does not fit the model's chat template ({error}).") from None


def _content(message: dict[str, Any]) -> str:
    """The text of a message, its parts joined by line breaks as vLLM joins them."""
    content = message["content"]
    parts = [part["text"] for part in content] if isinstance(content, list) else [content or ""]
    return "\n".join(parts)
