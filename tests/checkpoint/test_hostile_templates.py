"""A stranger's chat template costs one line: it ends within its limits, and sees nothing but the messages."""

from __future__ import annotations

import datetime
import os
import re
import shutil
import signal
import subprocess
import sys
import time
from dataclasses import replace
from pathlib import Path

import pytest

from l4ctx.checkpoint import chat_template
from l4ctx.checkpoint.chat_environment import render
from l4ctx.checkpoint.chat_template import ChatTemplate, PromptError
from l4ctx.checkpoint.known import TEMPLATES, is_known_template
from support.cli_runner import run_here
from support.places import ROOT, TINY
from support.tokenizer_fixtures import LLAMA4_TOKENIZER, toy_tokenizer_folder

NESTED = "{% for a in range(99999) %}{% for b in range(99999) %}{% endfor %}{% endfor %}"
SLOW = [NESTED, "{{ 10 ** (10 ** 9) }}"]
LARGE = [
    "{{ 'a' * 10 ** 10 }}",
    "{% set n = namespace(s='a') %}{% for i in range(60) %}{% set n.s = n.s + n.s %}{% endfor %}",
    "{{ '%*d' | format(10 ** 9, 1) }}",
    "{{ '%1000000000d' % 1 }}",
    "{{ '{:>1000000000}'.format(1) }}",
    "{{ 'a' | center(10 ** 9) }}",
    "{{ 'a\n' | indent(10 ** 9) }}",
    "{{ [1] | tojson(indent=10 ** 9) }}",
    "{{ ([0] * 10 ** 9) | length }}",
    "{{ 'a'.rjust(10 ** 9) }}",
    "{{ 'a'.replace('a', 'b' * 10 ** 5).replace('b', 'c' * 10 ** 5) }}",
]
FAILING = [
    "{% macro m() %}{{ m() }}{% endmacro %}{{ m() }}",
    "{{ " + "(" * 5000 + "1" + ")" * 5000 + " }}",
    "{{ " + "-" * 50_000 + "1 }}",
    "{% if 1 %}" * 3000 + "{% endif %}" * 3000,
    "{% set n = namespace() %}{% set n.a = n %}{{ n | tojson }}",
    "{{ '\\N{WHITE SMILING FACE' }}",
    "{{ 'a'.encode('zlib') }}",
    "{{ range(100001) }}",
    "{{ 9 ** 9999 }}",
    "{{ lipsum.__globals__ }}{{ 1 / 0 }}",
]
ESCAPES = [  # what was published against Jinja's sandbox, and what people try
    "''.__class__.__mro__[1].__subclasses__()",
    "''['__class__']",
    "'' | attr('__class__')",
    "'' | attr('format') | attr('__globals__')",
    "('{0.__class__.__init__.__globals__}' | attr('format'))(dict)",
    "'{0.__class__}'.format(1)",
    "'{a.__class__}'.format_map({'a': 1})",
    "('{0.__class__}'.format | string) and ['{0.__class__}'.format] | map('string') and '{0.__class__}'.format(1)",
    "[['{0.__class__}'] | map('format', 1)] and (['{0.__class__}'] | map(attribute='format') | first)(1)",
    "([''] | map(attribute='__class__') | first).__mro__",
    "[''] | map(attribute='__class__.__mro__') | list",
    "[''] | groupby('__class__') | list",
    "[''] | selectattr('__class__') | list",
    "[''] | sort(attribute='__class__.__mro__')",
    "'' | xmlattr and [''] | sum(attribute='__class__')",
    "cycler.__init__.__globals__.os.environ",
    "cycler.__init__",
    "joiner.__init__.__globals__",
    "namespace.__init__.__globals__",
    "namespace(__class__=1)",
    "lipsum.__globals__['os'].environ",
    "lipsum['__globals__']",
    "lipsum | attr('__globals__')",
    "self.__init__.__globals__",
    "self._TemplateReference__context",
    "self['_TemplateReference__context']",
    "raise_exception.__globals__",
    "strftime_now.__globals__",
    "strftime_now.__closure__",
    "strftime_now.__code__",
    "dict.__call__.__globals__",
    "range.__class__",
    "messages.__class__",
    "messages[0].__init__",
    "(messages | map('upper')).gi_frame",
    "((messages | map('upper')) | attr('gi_frame')).f_globals",
    "loop.__class__",
    "caller.__globals__",
    "config.environ",
    "request.application.__globals__",
    "url_for.__globals__",
    "get_flashed_messages.__globals__",
    "__import__('os').environ",
    "self.__dict__",
    "''.join.__self__.__class__",
    "(1).__class__.__base__",
    "().__class__.__bases__",
    "{}.__class__",
    "'' | format | attr('__class__')",
    "tools.__class__",
    "undefined_name.__class__.__mro__",
]


def split(source: str) -> list[str]:
    return ChatTemplate(source + "{{ messages[0].content }}").split(system=False)


def refused(source: str) -> str:
    with pytest.raises(PromptError) as error:
        split(source)
    message = str(error.value)
    assert "\n" not in message and len(message) < 3000
    return message


def limit(monkeypatch: pytest.MonkeyPatch, processor_seconds: float) -> None:
    limits = replace(chat_template.LIMITS, processor_seconds=processor_seconds)
    monkeypatch.setattr(chat_template, "LIMITS", limits)


@pytest.mark.parametrize("source", SLOW, ids=range(len(SLOW)))
def test_one_without_an_end_is_ended(monkeypatch: pytest.MonkeyPatch, source: str) -> None:
    limit(monkeypatch, 0.1)
    assert refused(source) == "the checkpoint's chat template fails: it takes more than 0.1 s"


@pytest.mark.skipif(sys.platform != "linux", reason="the address space is limited on Linux")
@pytest.mark.parametrize("source", LARGE, ids=range(len(LARGE)))
def test_one_that_fills_the_memory_is_ended(source: str) -> None:
    assert refused(source) in {
        "the checkpoint's chat template fails: it needs more than 512 MiB of memory",
        "the checkpoint's chat template fails: it takes more than 3 s",
    }


def test_one_with_a_huge_text_is_refused() -> None:
    assert refused("{{ 'a' * 5 * 10 ** 6 }}") == (
        "the checkpoint's chat template fails: it renders more than 4.0 MiB of text"
    )
    assert split("{{ 'a' * 10 ** 6 }}")[0] == "a" * 10**6


def test_a_long_one_is_refused_early() -> None:
    """Even one with everything that could mark a message."""
    markers = "".join(f"l4ctxUserText{n}q" for n in range(6000))
    assert split(markers)[-1] == "" and split(markers)[0] == markers
    assert refused(markers * 10) == "the checkpoint's chat template has more than 131,072 characters"


@pytest.mark.parametrize("source", FAILING, ids=range(len(FAILING)))
def test_one_that_fails_is_one_line(source: str) -> None:
    assert refused(source).startswith("the checkpoint's chat template fails: ")


@pytest.mark.parametrize("width", ["1000000000", "99999999999999999999"])
def test_formats_of_dates_are_bounded(width: str) -> None:
    try:
        shown = split(f"{{{{ strftime_now('%{width}d') }}}}")[0]
    except PromptError as error:
        shown = str(error)
    assert len(shown) < 100


@pytest.mark.parametrize("escape", ESCAPES)
def test_no_known_escape_reaches_anything(monkeypatch: pytest.MonkeyPatch, escape: str) -> None:
    """Neither where a template is rendered in this process nor in the confined one, whose environment is empty."""
    monkeypatch.setenv("L4CTX_SECRET", "48213")
    for shown in (f"{{{{ {escape} }}}}", f"{{% for x in [1] %}}{{{{ ({escape}) | string }}}}{{% endfor %}}"):
        outcomes = []
        try:
            outcomes.append(render(shown, {"messages": [{"role": "user", "content": "text"}], "tools": None}))
        except Exception as error:
            outcomes.append(f"{type(error).__name__}: {error}")
        try:
            outcomes += split(shown)
        except PromptError as error:
            outcomes.append(str(error))
        for outcome in outcomes:
            assert not re.search(r"48213|environ\(|<class|<module|<function|<frame|<code|built-in|0x", outcome), outcome


@pytest.mark.parametrize("format", ["%A, %-d %B %Y", "%c %x %X %p %Z|%z", "%d/%m — %Yé", "%s", "%Q%"])
def test_dates_are_written_as_in_this_process(monkeypatch: pytest.MonkeyPatch, format: str) -> None:
    monkeypatch.setenv("TZ", "Asia/Kathmandu")
    time.tzset()
    chat_template.CHILD.end()
    date = datetime.datetime(2024, 2, 29, 17, 8, 9)
    try:
        source = "{{ strftime_now(form) }}"
        rendered = chat_template.render_confined(source, {"form": format}, "the template", date)
        assert rendered == date.strftime(format)
    finally:
        monkeypatch.undo()
        time.tzset()
        chat_template.CHILD.end()


def test_known_templates_start_no_process(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(chat_template.CHILD, "command", ("/no such command",))
    chat_template.CHILD.end()
    for folder in (TINY, LLAMA4_TOKENIZER):
        template = ChatTemplate.from_folder(folder) if folder.is_dir() else None
        if template is not None:
            assert is_known_template(template.source) and template.split(system=True)[1] == "system"
    assert len(TEMPLATES) == 2
    message = "the process that renders the checkpoint's chat template cannot be started: No such file or directory"
    assert refused("") == message


@pytest.mark.skipif(sys.platform != "linux", reason="processes are looked up in /proc")
def test_an_interruption_comes_at_once() -> None:
    """Exit code 130, though the template would run for three seconds."""
    code = (
        "from l4ctx.cli.exits import errors_as_exit_codes\nfrom l4ctx.checkpoint.chat_template import ChatTemplate\n"
        f"with errors_as_exit_codes():\n    ChatTemplate({NESTED!r}).split(system=False)"
    )
    environment = os.environ | {"PYTHONPATH": str(ROOT)}
    with subprocess.Popen([sys.executable, "-c", code], stderr=subprocess.PIPE, env=environment) as process:
        children = Path(f"/proc/{process.pid}/task/{process.pid}/children")
        end = time.monotonic() + 60
        while not any(
            b"template_work" in Path(f"/proc/{child}/cmdline").read_bytes() for child in children.read_text().split()
        ):
            assert time.monotonic() < end and process.poll() is None
            time.sleep(0.01)
        time.sleep(0.1)
        process.send_signal(signal.SIGINT)
        began = time.monotonic()
        _, stderr = process.communicate(timeout=60)
    assert process.returncode == 130 and time.monotonic() - began < 8, stderr
    assert stderr.decode().startswith("l4ctx: interrupted") and stderr.count(b"\n") == 1


def test_the_command_says_so_in_one_line(tmp_path: Path) -> None:
    folder = toy_tokenizer_folder(tmp_path / "model")
    for file in [TINY / "config.json", *TINY.glob("model*")]:
        shutil.copy(file, folder)
    (folder / "chat_template.jinja").write_text("{{ 'a' * 10 ** 10 }}")
    (tmp_path / "document.txt").write_text("words")
    done = run_here("plan", str(tmp_path / "document.txt"), "--model", str(folder))
    assert done.code == 3 and done.stderr.count("\n") == 1 and "chat template fails" in done.stderr
