"""Chat templates: messages to prompt text, exactly as transformers' `apply_chat_template` renders them.

A template comes with a checkpoint, so it is a program by a stranger: it runs in jinja2's sandbox, under a budget that
holds in any thread (`npllm.chat_meter`), and whatever goes wrong in it is one `TemplateError` of one line.
"""

import dataclasses
from collections.abc import Mapping, Sequence
from types import TracebackType
from typing import Any

import numpy as np

from npllm.chat_meter import DEFAULT_BUDGET, Budget, Meter, OverBudgetError, enter, leave
from npllm.errors import TemplateError

__all__ = ["Budget", "render"]

# A message's reasoning goes by one of these names; templates read the first, those of gpt-oss the second.
REASONING_FIELDS = ("reasoning_content", "thinking", "reasoning")

# Stands behind the text to be continued, to find it again in the rendering. The space tells whether a template trims.
_MARK = "NPLLM_CONTINUES_THIS_MESSAGE "

_MAX_ERROR = 500


def render(
    template: str,
    messages: Sequence[Mapping[str, Any]],
    *,
    tools: Sequence[Mapping[str, Any]] | None = None,
    documents: Sequence[Mapping[str, Any]] | None = None,
    add_generation_prompt: bool = False,
    continue_final_message: bool | str = False,
    special_tokens: Mapping[str, str] = {},
    budget: Budget = DEFAULT_BUDGET,
    **template_args: Any,
) -> str:
    """Render a conversation into the text of a prompt.

    template: jinja2 source, from `chat_template.jinja` or `tokenizer_config.json`.
    messages: dicts with `role`, `content` and whatever else the template reads; keys whose value is None are dropped.
    tools: JSON schemas of functions the model may call. documents: dicts for retrieval, mostly `title` and `text`.
    add_generation_prompt: end with the header of the assistant's answer.
    continue_final_message: end within the last message, for the model to go on with; a string names its field.
    special_tokens: `bos_token`, `eos_token` and the like, by name; template_args go before them.

    Raises TemplateError if the template is malformed, fails, refuses the messages, reaches for Python's internals or
    exceeds its budget, and if the arguments are of the wrong kind.
    """
    if not isinstance(template, str):
        raise TemplateError(f"chat template: must be a string, not {type(template).__name__}")
    try:
        chat = _conversation(messages)
        variables = _plain({**special_tokens, **template_args})
        variables |= {"tools": _schemas(tools), "documents": _dicts(documents, "documents")}
    except RecursionError:
        raise TemplateError("chat template: the messages or arguments are nested too deep") from None
    variables |= {"messages": chat, "add_generation_prompt": add_generation_prompt}
    if not continue_final_message:
        return _run(template, variables, budget)
    if add_generation_prompt:
        raise TemplateError("chat template: continue_final_message and add_generation_prompt exclude each other")
    field = continue_final_message if isinstance(continue_final_message, str) else "content"
    final = _mark_final(template, chat, field)
    return _cut_at_mark(_run(template, variables, budget), final)


# -- What the template gets to see: plain copies, so that no method of a caller's object comes into its reach. --


def _conversation(messages: object) -> list[dict[Any, Any]]:
    chat = _dicts(messages, "messages")
    if not chat:
        raise TemplateError("chat template: the conversation is empty; give at least one message")
    return [_with_reasoning({key: value for key, value in message.items() if value is not None}) for message in chat]


def _dicts(values: object, name: str) -> list[dict[Any, Any]] | None:
    if values is None and name != "messages":
        return None
    if not isinstance(values, Sequence) or not all(isinstance(value, Mapping) for value in values):
        raise TemplateError(f"chat template: {name} must be a list of dicts")
    return [_plain(value) for value in values]


def _schemas(tools: object) -> list[dict[Any, Any]] | None:
    if isinstance(tools, Sequence) and any(callable(tool) for tool in tools):
        raise TemplateError("chat template: tools must be JSON schemas (dicts), not Python functions")
    return _dicts(tools, "tools")


def _with_reasoning(message: dict[Any, Any]) -> dict[Any, Any]:
    """The message with its reasoning, if any, under the names that templates read."""
    reasoning = next((message[field] for field in REASONING_FIELDS if message.get(field) is not None), None)
    if reasoning is None:
        return message
    return {"thinking": reasoning, **message, "reasoning_content": reasoning}


def _plain(value: Any) -> Any:
    """A copy made of JSON's types; anything else (images, arrays) is replaced by the name of its type."""
    if value is None or type(value) in (str, int, float, bool):
        return value
    if isinstance(value, np.generic):
        return _plain(value.item())
    # Instances of subclasses, as enumerations are, lose what the subclass adds.
    if isinstance(value, str):
        return str.__str__(value)
    if isinstance(value, int):
        return int.__int__(value)
    if isinstance(value, float):
        return float.__float__(value)
    return _plain_container(value)


def _plain_container(value: Any) -> Any:
    if isinstance(value, Mapping):
        return {_plain(key): _plain(item) for key, item in value.items()}
    if isinstance(value, list):
        return [_plain(item) for item in value]
    if isinstance(value, tuple):
        return tuple(_plain(item) for item in value)
    if dataclasses.is_dataclass(value) and not isinstance(value, type):
        return {field.name: _plain(getattr(value, field.name)) for field in dataclasses.fields(value)}
    if callable(getattr(value, "model_dump", None)):  # pydantic
        return _plain(value.model_dump())
    return f"<{type(value).__name__}>"


# -- Continuing the last message --


def _mark_final(template: str, chat: list[dict[Any, Any]], field: str) -> str:
    """Put the mark behind the text to be continued, in place, and return that text as it was."""
    message = chat[-1]
    final = message.get(field)
    if final is None:
        raise TemplateError(f"chat template: continue_final_message, but the last message has no {field!r}")
    same = REASONING_FIELDS if field in REASONING_FIELDS else (field,)
    fields = [name for name in same if message.get(name) == final]
    if not any(name in template for name in fields):
        raise TemplateError(f"chat template: continue_final_message={field!r}, but the template never reads that field")
    if isinstance(final, str):
        message.update(dict.fromkeys(fields, final + _MARK))
        return final
    return _mark_last_text(final)


def _mark_last_text(blocks: object) -> str:
    for block in reversed(blocks if isinstance(blocks, list | tuple) else ()):
        if isinstance(block, dict) and isinstance(block.get("text"), str):
            text: str = block["text"]
            block["text"] = text + _MARK
            return text
    raise TemplateError("chat template: continue_final_message, but the last message has no text to continue")


def _cut_at_mark(text: str, final: str) -> str:
    mark = _MARK.strip()
    if final.strip() not in text or mark not in text:
        raise TemplateError("chat template: continue_final_message, but the template changes or drops the last message")
    head, _, tail = text.rpartition(mark)
    return head if tail.startswith(_MARK[len(mark) :]) else head.rstrip()


# -- Running it --


def _run(template: str, variables: Mapping[str, Any], budget: Budget) -> str:
    from npllm.chat_sandbox import rendered

    try:
        meter = Meter(budget, variables)
        token = enter(meter)
        try:
            return rendered(template, variables, meter)
        finally:
            leave(token)
    except Exception as error:
        raise TemplateError(_explained(error)) from None


def _explained(error: Exception) -> str:
    """One line about what went wrong, with the template's line where it is known."""
    import jinja2
    from jinja2.exceptions import SecurityError

    line = error.lineno if isinstance(error, jinja2.TemplateSyntaxError) else _line(error.__traceback__)
    where = f"chat template, line {line}: " if line else "chat template: "
    if isinstance(error, OverBudgetError):
        return f"{where}it {error}; do not trust it, or give it a larger Budget"
    if isinstance(error, RecursionError):
        return f"{where}nested too deep, or recursion without an end"
    if isinstance(error, MemoryError):
        return f"{where}needs more memory than there is"
    text = " ".join(str(error)[: 4 * _MAX_ERROR].split())[:_MAX_ERROR]
    if isinstance(error, jinja2.TemplateSyntaxError):
        return f"{where}syntax error: {text}"
    if isinstance(error, SecurityError):
        return f"{where}refused as unsafe: {text}"
    if type(error) is jinja2.TemplateError:
        return f"{where}it refuses these messages: {text}"
    return where + (text if isinstance(error, jinja2.TemplateError) else f"{type(error).__name__}: {text}")


def _line(traceback: TracebackType | None) -> int | None:
    """The innermost line of the template that a traceback rewritten by jinja2 leads through."""
    line = None
    while traceback is not None:
        if "__jinja_exception__" in traceback.tb_frame.f_globals:
            line = traceback.tb_lineno
        traceback = traceback.tb_next
    return line
