"""A conversation in turns is the same conversation as one prompt, token for token, whatever was undone in between."""

from __future__ import annotations

from array import array
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import Tensor

from l4ctx.checkpoint.chat_template import PromptError
from l4ctx.engine.prefill import as_batch
from l4ctx.errors import ContextError, RequestError
from l4ctx.planning.memory_plan import MemoryPlanError
from l4ctx.prompt.builder import PromptLengthError
from l4ctx.run import sizing
from l4ctx.run.chat import Chat
from l4ctx.run.chat_documents import begin_reading, encoded_documents
from l4ctx.run.chat_saving import save
from l4ctx.run.chat_saying import settle, tell_model
from l4ctx.run.monitor import Monitor
from support.chats import chatting, document_text, read, rendered, say, with_config, with_template
from support.cli_runner import FACTS, FILLER, answer, question
from support.places import TINY

CHUNK = 64
NAMES = "abcd"


@pytest.fixture(scope="module")
def document(tmp_path_factory: pytest.TempPathFactory) -> Path:
    file = tmp_path_factory.mktemp("documents") / "facts.md"
    file.write_text("".join(answer(name) for name in FACTS))
    return file


@pytest.fixture(scope="module")
def short_chunks(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """The sample model with attention chunks of CHUNK tokens."""
    return with_config(tmp_path_factory.mktemp("model") / "short", attention_chunk_size=CHUNK)


def first_message(file: Path, text: str) -> str:
    return f"{document_text(file, str(file)[1:])}{text}"


def state(chat: Chat) -> dict[str, Tensor]:
    """All that the cache holds."""
    found = {"offset": torch.tensor(chat.cache.offset)}
    for layer, (keys, values) in chat.cache.tail().items():
        found |= {f"{layer} keys": keys, f"{layer} values": values}
    for store in chat.cache.stores:
        for row, block in enumerate(store.sealed):
            for number in range(len(block.segments)):
                for name, tensor in zip("kv", chat.cache.tiers.load(block, number), strict=True):
                    found[f"{store.layer} {row} {number} {name}"] = tensor.clone()
    return found


def equal(one: dict[str, Tensor], other: dict[str, Tensor]) -> bool:
    return one.keys() == other.keys() and all(torch.equal(one[name], other[name]) for name in one)


def test_twenty_turns_are_one_prompt(document: Path) -> None:
    """Token ids against the whole text's, and each token of each answer against one plain forward."""
    with chatting(TINY, document) as chat:
        messages: list[tuple[str, str]] = []
        answers: list[range] = []
        for number in range(20):
            name = NAMES[number % len(NAMES)]
            before = chat.cache.offset
            turn = chat.begin(question(name))
            assert turn.sized.reused == before >= turn.sized.inputs.prompt_tokens - 60 or number == 0
            read(turn)
            start = chat.tokens
            shown = "".join(turn.decode())
            chat.end()
            answers.append(range(start, chat.tokens))
            assert shown == answer(name).strip()
            asked = question(name) if messages else first_message(document, question(name))
            messages += [("user", asked), ("assistant", shown)]
            ids = rendered(messages)
            assert chat.said.ids.tolist() == ids[: chat.tokens]
            assert len(ids) == chat.tokens + 1 and chat.moments.all[-1].kept is None
        logits = chat.session.model(as_batch(ids, torch.device("cpu")))
    assert logits is not None
    best = logits[0].argmax(-1).tolist()
    for positions in answers:
        predicted = best[positions.start - 1 : positions.stop]
        assert predicted == ids[positions.start : positions.stop + 1]  # and then the token that ends a message


def plain_answer(chat: Chat, ids: array[int], tokens: int) -> list[int]:
    """Greedily, by forwards without a cache."""
    found = list(ids)
    for _ in range(tokens):
        logits = chat.session.model(as_batch(array("i", found), torch.device("cpu")))
        assert logits is not None
        found.append(int(logits[0, -1].argmax()))
    return found[len(ids) :]


@pytest.mark.usefixtures("small_rows")
@pytest.mark.parametrize("kv_dtype", ["auto", pytest.param("int8", marks=pytest.mark.matrix)])
def test_undo_is_exact_wherever_chunks_and_blocks_end(
    short_chunks: Path, document: Path, tmp_path: Path, kv_dtype: str
) -> None:
    """Turns of some 40 tokens: some end within an attention chunk of 64, some after it. All are undone and repeated."""
    longer = tmp_path / "longer.md"
    longer.write_text(document.read_text() + FILLER * 15)
    with chatting(short_chunks, longer, kv_dtype=kv_dtype, max_new_tokens=9) as chat:
        crossings, before_all = 0, len(chat.cache.stores[0].sealed)
        assert chat.cache.layout.block_tokens - 200 < chat.tokens < chat.cache.layout.block_tokens
        for number in range(9):
            before, tokens, held = chat.said, chat.tokens, state(chat)
            first = say(chat, question(NAMES[number % 4]))
            ids, after = chat.said.ids, state(chat)
            crossings += chat.moments.all[-1].kept is not None
            assert sum(moment.kept is not None for moment in chat.moments.all) <= 1
            assert chat.undo() == "the last turn" and chat.said == before and chat.tokens == tokens
            assert equal(state(chat), held)
            assert say(chat, question(NAMES[number % 4])) == first
            assert chat.said.ids == ids and equal(state(chat), after)
            if kv_dtype == "auto" and number == 8:
                length = len(chat._last.answer.ids)
                assert plain_answer(chat, ids[:-length], length) == ids[-length:].tolist()
        assert 2 < crossings < 9 and before_all == 0 < len(chat.cache.stores[0].sealed)
        while chat.moments.all and (
            chat.moments.all[-1].kept or chat.moments._is_same_chunk(chat.moments.all[-1].offset, chat.cache.offset)
        ):
            chat.undo()
        assert 0 < len(chat.moments.all) < 8
        with pytest.raises(RequestError, match="no longer held"):
            chat.undo()


def test_what_was_said_until_an_interrupt_stays(short_chunks: Path, document: Path) -> None:
    """Also where the cache holds a draft that has not been verified."""
    with chatting(short_chunks, document, max_new_tokens=12, draft_tokens=7) as chat:
        say(chat, question("a"))
        turn = chat.begin(question("b"))
        read(turn)
        for _ in turn.decode():
            if turn.answer.tokens >= 3:
                break
        chat.cache.advance(min(2, chat.cache.room))  # as a forward that was interrupted behind it
        said = turn.answer.ids[:]
        assert chat.end().ids == said and chat.cache.offset <= chat.tokens
        third = chat.begin(question("c"))
        read(third)
        "".join(third.decode())
        length = len(third.answer.ids)
        ids = third.sized.inputs.prompt.ids
        assert third.answer.ids.tolist() == plain_answer(chat, ids, length)[:length]


def test_an_interrupted_reading_is_dropped(short_chunks: Path, document: Path) -> None:
    with chatting(short_chunks, document, max_new_tokens=5) as chat:
        for begin in (lambda: chat.begin("x y z " * 100), lambda: settle(chat)):
            held, said = state(chat), chat.said
            session = begin()
            next(iter(session.prefill()), None)
            chat.drop()
            assert equal(state(chat), held) and chat.said is said and not chat.moments.all


def test_nothing_changes_where_a_turn_is_refused(
    tmp_path: Path, document: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    few = with_config(tmp_path / "few", max_position_embeddings=300)
    with chatting(few, document) as chat:
        say(chat, question("a"))
        held, said = state(chat), chat.said
        with pytest.raises(PromptLengthError, match=r"more than the model's 300 positions .* and /undo makes room"):
            chat.begin("Who? " * 300)
        monkeypatch.setattr(sizing, "available_memory", lambda: 2**26 + 10)
        with pytest.raises(
            MemoryPlanError, match=r"needs .* of memory, and 64\.0 MiB are free; the conversation is as"
        ):
            chat.begin(question("b"))
        monkeypatch.undo()
        assert equal(state(chat), held) and chat.said is said and len(chat.moments.all) == 1
        assert say(chat, question("b")) == answer("b").strip()
    with chatting(few, document, max_new_tokens=100) as chat:
        say(chat, question("a"))
        with pytest.raises(RequestError, match="an answer of 100 tokens does not fit"):
            chat.begin("Who? " * 20)


def test_documents_and_instructions_come_where_they_are_given(tmp_path: Path, document: Path) -> None:
    other = tmp_path / "other.md"
    other.write_text("The access code for the red fox is 31415.\n")
    with chatting(TINY, document) as chat, Monitor(lambda text: None) as monitor:
        say(chat, question("a"))
        prompt, images = encoded_documents(chat, [str(other)], monitor)
        session = begin_reading(chat, prompt, "/add", images)
        read(session)
        chat.end()
        assert chat.cache.offset == chat.tokens
        with pytest.raises(RequestError, match="holds all of it already"):
            encoded_documents(chat, [str(other), str(document)], monitor)
        fox = "What is the access code for the red fox?"
        assert "31415" in say(chat, fox)
        tell_model(chat, "Be brief.")
        say(chat, question("b"))
        second = first_message(other, fox).replace('index="1"', 'index="2"')
        texts = [("user", first_message(document, question("a"))), ("assistant", answer("a").strip()),
                 ("user", second), ("assistant", "The access code for the red fox is 31415."),
                 ("system", "Be brief."), ("user", question("b")), ("assistant", answer("b").strip())]  # fmt: skip
        assert chat.said.ids.tolist() == rendered(texts)[: chat.tokens]
        assert [chat.undo() for _ in range(4)] == ["the last turn", "the system's message", "the last turn", "/add"]
        assert chat.said.ids.tolist() == rendered(texts[:2])[:-1] and len(chat.said.spans) == 1


def test_an_instruction_before_everything_is_the_system_prompt() -> None:
    with chatting(TINY) as chat, chatting(TINY, system="Be brief.") as other:
        tell_model(chat, "Be rude.")
        tell_model(chat, "Be brief.")
        assert chat.said.ids == other.said.ids and chat.said.turns.texts == other.said.turns.texts
        before = chat.said.ids
        assert say(chat, "Who?") == say(other, "Who?") and chat.said.ids == other.said.ids
        assert (
            chat.said.ids.tolist()[: chat.tokens]
            == rendered([("system", "Be brief."), ("user", "Who?"), ("assistant", other._last.answer.text)])[
                : chat.tokens
            ]
        )
        assert [chat.undo() for _ in range(3)] == ["the last turn", *["the system's message"] * 2]
        assert chat.said.turns.roles == ("user",)
        tell_model(chat, "Be brief.")
        assert chat.said.ids == before


@pytest.mark.usefixtures("small_rows")
@pytest.mark.parametrize("kv_dtype", ["auto", "int8"])
def test_a_saved_conversation_goes_on(short_chunks: Path, document: Path, tmp_path: Path, kv_dtype: str) -> None:
    folder = tmp_path / "context"
    options: dict[str, Any] = {"kv_dtype": kv_dtype, "max_new_tokens": 9}
    with chatting(short_chunks, document, **options) as chat:
        for number in range(4):
            say(chat, question(NAMES[number]))
        assert save_all(chat, folder) == chat.tokens == chat.cache.offset
        held = state(chat)
        expected, ids = say(chat, question("a")), chat.said.ids
        with chatting(short_chunks, context=folder, **options) as other:
            assert other.tokens == int(held["offset"]) and equal(state(other), held)
            assert say(other, question("a")) == expected
            assert save_all(other, folder) == other.tokens == len(ids) + 6  # extends it; a message of the user is begun
        with chatting(short_chunks, context=folder, **options) as other:
            assert other.tokens == len(ids) + 6
            assert [span.source for span in other.session.sized.inputs.context.documents()] == [str(document)[1:]]  # type: ignore[union-attr]
        assert chat.undo() == "the last turn" and chat.undo() == "the last turn"
        with pytest.raises(RequestError, match="something other than the beginning"):
            save_all(chat, folder)
    (tmp_path / "file").write_text("x")
    with chatting(short_chunks, document, **options) as chat, pytest.raises((ContextError, RequestError)):
        save_all(chat, tmp_path)


def save_all(chat: Chat, folder: Path) -> int:
    read(settle(chat))
    chat.end()
    return save(chat, folder)


def test_each_turn_has_its_own_seed() -> None:
    with chatting(TINY, seed=2**63 - 1, temperature=1.0, max_new_tokens=2) as chat:
        seeds = []
        for _ in range(3):
            seeds.append(chat.begin("Who?").sized.inputs.checked.sampling.seed)
            chat.end()
    assert seeds == [2**63 - 1, 0, 1]


TURNS = "{% for m in messages %}[{{ m.role }}]{{ m.content }}{% endfor %}"


@pytest.mark.parametrize(
    ("template", "why"),
    [
        (None, "no chat template"),
        ("{{ messages[-1].content }}", "omits or alters"),
        (TURNS.replace("[{{", "{{ messages|length }}[{{"), "changes what it wrote before earlier messages"),
        ("{% for m in messages|reverse %}{{ m.content }}{% endfor %}", "order of messages"),
    ],
)
def test_templates_that_take_no_turns(tmp_path: Path, template: str | None, why: str) -> None:
    model = with_template(tmp_path / "model", template)
    with pytest.raises((PromptError, RequestError), match=why), chatting(model):
        pass


@pytest.fixture(autouse=True)
def _one_thread() -> Iterator[None]:
    """Equal grids give equal bits with equal numbers of threads."""
    before = torch.get_num_threads()
    torch.set_num_threads(1)
    yield
    torch.set_num_threads(before)
