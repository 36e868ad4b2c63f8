"""Prompts and answers as text: the templates that `data.template` names."""

from collections.abc import Sequence
from typing import Any, NamedTuple

from pipeline.config.data import TemplateName
from pipeline.errors import DataError, did_you_mean


class Message(NamedTuple):
    """A message of a chat.

    Attributes:
        role: "system", "user" or "assistant".
        content: its text.
    """

    role: str
    content: str


class Exchange(NamedTuple):
    """A prompt and the answer to it.

    Attributes:
        prompt: with everything that a template adds.
        answer: as it is.
    """

    prompt: str
    answer: str


class _Template(NamedTuple):
    """What stands around messages.

    Attributes:
        system, user, assistant: text of a message of this role, with {} for its content.
        answer: what the prompt ends with.
    """

    system: str
    user: str
    assistant: str
    answer: str


_TEMPLATES: dict[TemplateName, _Template] = {
    "plain": _Template("{}", "{}", "{}", ""),
    "chat": _Template("System:\n{}\n\n", "User:\n{}\n\n", "Assistant:\n{}\n\n", "Assistant:\n"),
    "instruction": _Template(
        "{}\n\n", "### Instruction:\n{}\n\n", "### Response:\n{}\n\n", "### Response:\n"
    ),
}
_ROLES = ("system", "user", "assistant")


def checked_text(name: str, value: Any) -> str:
    """Return a text of a data set; raise what is wrong with it.

    Args:
        name: of the value, for the message.
        value: what should be text.

    Raises:
        DataError: it is no text.
        UnicodeEncodeError: UTF-8 cannot write it.
    """
    if not isinstance(value, str):
        raise DataError(f"{name} holds a {type(value).__name__}; expected text")
    value.encode("utf-8")  # JSON can spell half of a surrogate pair, which UTF-8 cannot
    return value


def prompt_text(messages: Sequence[Message], template: str) -> str:
    """Write messages as the prompt of an answer.

    Args:
        messages: in order.
        template: one of `data.template`.
    """
    forms = _TEMPLATES[template]  # type: ignore[index]
    parts = (getattr(forms, role).replace("{}", content, 1) for role, content in messages)
    return "".join(parts) + forms.answer


def exchange_of(messages: Sequence[Message], template: str) -> Exchange:
    """Write messages as a prompt and an answer, which is the last message.

    Args:
        messages: in order, the last one of the assistant.
        template: one of `data.template`.
    """
    *before, last = messages
    return Exchange(prompt_text(before, template), last.content)


def messages_of(value: Any) -> list[Message]:
    """Read the messages of a chat.

    Args:
        value: a list of objects with `role` and `content`.

    Raises:
        DataError: another form, an unknown role, or a last message that is no answer.
    """
    if not isinstance(value, list) or not value:
        raise DataError(
            f"messages: {str(value)[:60]!r}; expected a list of objects with 'role' and 'content'"
        )
    messages = []
    for number, item in enumerate(value):
        if not isinstance(item, dict) or not {"role", "content"} <= item.keys():
            raise DataError(
                f"message {number}: {str(item)[:60]!r}; expected an object with 'role' and 'content'"
            )
        role, content = item["role"], checked_text(f"message {number}: 'content'", item["content"])
        if role not in _ROLES:
            raise DataError(
                f"message {number}: role {role!r}; expected {', '.join(_ROLES)}{did_you_mean(str(role), _ROLES)}"
            )
        messages.append(Message(role, content))
    if messages[-1].role != "assistant":
        raise DataError(
            f"messages: the last one is of role {messages[-1].role!r}; expected the assistant's answer"
        )
    return messages
