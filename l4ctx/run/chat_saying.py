"""What is said in a conversation and not answered: to the model as the system, and again from another run."""

from __future__ import annotations

from l4ctx.prompt.instruction import instructed
from l4ctx.prompt.turns import ASSISTANT, SYSTEM, USER
from l4ctx.run.chat import Chat
from l4ctx.run.chat_moments import LAST_TURN, Said
from l4ctx.run.session import Session

SYSTEM_MESSAGE = "the system's message"


def tell_model(chat: Chat, text: str) -> None:
    """Says something as the system: before everything where nothing has been said, else from here on.

    Raises TokenizerError, and PromptError where the template allows it only at the beginning.
    """
    if chat.said.is_empty:
        said = Said.by_system(chat.said.turns, text)
        chat.cache.rewind(0)
    else:
        said = chat.said.then(SYSTEM).with_text(text).then(USER)
    chat.say(said, chat.cache.offset, SYSTEM_MESSAGE)


def repeat(chat: Chat, role: str, text: str, *, cites: bool = False) -> None:
    """What was said in another run, to be read later; `cites`: sources were asked for. Raises what `tell_model`
    raises."""
    if role == SYSTEM:
        tell_model(chat, text)
    elif role == USER:
        said = chat.said.for_user.with_text(instructed(text) if cites else text)
        chat.say(said, chat.tokens, LAST_TURN, text)
    else:
        chat.said = chat.said.then(ASSISTANT).with_text(text)


def settle(chat: Chat) -> Session:
    """Reads all that has been said, and begins a message of the user, which is what a saved context needs; then call
    `Chat.end`. Raises what `Chat.read` raises."""
    return chat.read(chat.said.for_user, "")
