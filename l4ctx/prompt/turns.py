"""The messages of a conversation as the checkpoint's chat template renders them: the tokens between one and the next.

Knows neither what the messages say nor the model: only whose they are, and the template's own text around them.
"""

from __future__ import annotations

from array import array
from dataclasses import dataclass, replace

from l4ctx.checkpoint.chat_template import ChatTemplate, PromptError
from l4ctx.checkpoint.tokenizer import Tokenizer

SYSTEM, USER, ASSISTANT = "system", "user", "assistant"


@dataclass(frozen=True)
class Turns:
    """Whose messages there are so far, and the template's text before each. The last one is open: it may go on."""

    tokenizer: Tokenizer
    template: ChatTemplate
    roles: tuple[str, ...]
    texts: tuple[str, ...]

    @classmethod
    def begin(cls, tokenizer: Tokenizer, template: ChatTemplate, *, has_system_prompt: bool) -> Turns:
        """With the user's first message open, as every prompt of documents leaves it.

        Raises PromptError for a template that renders no conversation in turns.
        """
        roles = (SYSTEM, USER) if has_system_prompt else (USER,)
        turns = cls(tokenizer, template, roles, tuple(template.around(roles)[:-1]))
        turns.then(ASSISTANT)[1].then(USER)
        return turns

    @property
    def role(self) -> str:
        """Whose message is open."""
        return self.roles[-1]

    @property
    def answers(self) -> int:
        return self.roles.count(ASSISTANT)

    def opening(self) -> array[int]:
        """The tokens before the first message, where that is the open one. Raises TokenizerError."""
        assert len(self.roles) == 1
        return array("i", self.tokenizer.encode_control(self.texts[0]))

    def then(self, role: str) -> tuple[array[int], Turns]:
        """The tokens that end the open message and begin one of this role, and the conversation with it.

        Raises PromptError where the template renders no such message there, or would render differently what came
        before it; and TokenizerError.
        """
        if role == ASSISTANT:
            texts = self.template.around(self.roles)
        else:
            texts = self.template.around([*self.roles, role, *([USER] if role == SYSTEM else [])])
        before, text = tuple(texts[: len(self.roles)]), texts[len(self.roles)]
        if before != self.texts:
            raise PromptError(
                "the chat template changes what it wrote before earlier messages as a conversation goes on, so it "
                "cannot be continued turn by turn"
            )
        ids = array("i", self.tokenizer.encode_control(text))
        return ids, replace(self, roles=(*self.roles, role), texts=(*before, text))
