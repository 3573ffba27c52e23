"""A PDF on which pdfium crashes, runs out of memory or never ends costs a line: the process it runs in is replaced."""

from __future__ import annotations

import os
import signal
import subprocess
import sys
import threading
import time
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path

import pytest
from pdf_toys import SCANNED, Page, memory_bomb, pdf, text, time_bomb

from l4ctx import pdf_process
from l4ctx.images import DocumentImage, ImageError
from l4ctx.pdf import PdfError, PdfSupportMissing, read_pdf

ROOT = Path(__file__).resolve().parent.parent
WORDS = Page(text(b"words"))
READ = '<page number="1">\nwords\n</page>\n'
NOT_READ = r"cannot be read \(pdfium ran out of memory or crashed\)"
ENDLESS, SLOW = 12, 5  # depths of a time bomb: for hours, and for about half a second
FEW = 192 << 20  # bytes of memory; the process has half of them before it opens a document
BOMB = 256 << 20


def read(raw: bytes, mode: str = "text") -> tuple[list[str | DocumentImage], list[str]]:
    return read_pdf("report.pdf", raw, None, mode=mode)


def worker() -> int:
    """The number of the process, which has just read a document."""
    assert read(pdf(WORDS)) == ([READ], [])
    assert pdf_process._worker is not None
    return pdf_process._worker.process.pid


def is_gone(process: int, *, ours: bool = True) -> bool:
    """Where its parent was another one, which ended, the system decides how long it stays a zombie."""
    try:
        state = Path(f"/proc/{process}/stat").read_text().rpartition(")")[2].split()[0]
    except (FileNotFoundError, ProcessLookupError):
        return True
    return state == "Z" and not ours


def wait_until_gone(process: int) -> None:
    end = time.monotonic() + 20
    while not is_gone(process, ours=False):
        assert time.monotonic() < end, f"process {process} is still there"
        time.sleep(0.01)


needs_proc = pytest.mark.skipif(sys.platform != "linux", reason="processes are looked up in /proc")


def test_one_process_reads_all_documents() -> None:
    assert worker() == worker()
    with ThreadPoolExecutor(4) as threads:
        assert list(threads.map(read, [pdf(WORDS)] * 40)) == [([READ], [])] * 40
    assert os.getsid(worker()) != os.getsid(0)


@needs_proc
@pytest.mark.parametrize("mode", ["text", "both"])
def test_out_of_memory(monkeypatch: pytest.MonkeyPatch, mode: str) -> None:
    before = worker()
    monkeypatch.setattr(pdf_process, "MOST_MEMORY", FEW)
    with pytest.raises(PdfError, match=rf"^a PDF of which nothing can be read: 1 of 1 page {NOT_READ}: 1$"):
        read(memory_bomb(Page(), at=0, count=BOMB), mode)
    assert is_gone(before)
    content, notes = read(memory_bomb(WORDS, Page(), WORDS, at=1, count=BOMB), mode)
    assert [piece.split("\n")[0] for piece in content if isinstance(piece, str) and "<page" in piece] == [
        '<page number="1">', '<page number="3">']
    assert notes == [f"1 of 3 pages {NOT_READ}: 2".replace("\\", "")]
    assert worker() != before


@needs_proc
def test_a_document_that_does_not_fit(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(pdf_process, "MOST_MEMORY", 1)
    with pytest.raises(PdfError, match=f"^a PDF that {NOT_READ}$"):
        read(pdf(WORDS) + b"%" * (64 << 20))
    monkeypatch.undo()
    worker()


@needs_proc
@pytest.mark.parametrize("mode", ["text", "pages"])
def test_a_page_without_an_end(monkeypatch: pytest.MonkeyPatch, mode: str) -> None:
    before = worker()
    monkeypatch.setattr(pdf_process, "PAGE_SECONDS", 0.5)
    with pytest.raises(PdfError, match=r"^a PDF of which nothing can be read: 1 of 1 page cannot be read within 0.5 s"):
        read(time_bomb(SCANNED, depth=ENDLESS), mode)
    assert is_gone(before)
    content, notes = read(time_bomb(SCANNED, WORDS, depth=ENDLESS), mode)
    assert str(content[0]).startswith('<page number="2">') and notes == ["1 of 2 pages cannot be read within 0.5 s: 1"]


def test_a_document_of_such_pages_is_given_up(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(pdf_process, "PAGE_SECONDS", 0.4)
    with pytest.raises(PdfError, match=r"^a PDF that is given up: 3 of 999 pages cannot be read within 0.4 s: 2-4$"):
        read(time_bomb(WORDS, *[SCANNED] * 998, depth=ENDLESS))


def test_an_image_that_cannot_be_drawn_any_more(monkeypatch: pytest.MonkeyPatch) -> None:
    content, _ = read(time_bomb(SCANNED, depth=SLOW), "pages")
    shown = content[1]
    assert isinstance(shown, DocumentImage) and (whole := shown.decode())
    monkeypatch.setattr(pdf_process, "PAGE_SECONDS", 0.01)
    with pytest.raises(ImageError, match=r"^report\.pdf, page 1: cannot be read within 0.01 s$"):
        shown.decode()
    monkeypatch.undo()
    assert shown.decode() == whole


@needs_proc
def test_what_kills_the_process_from_outside_costs_nothing() -> None:
    content, _ = read(pdf(WORDS), "pages")
    os.kill(before := worker(), signal.SIGKILL)
    assert worker() != before and is_gone(before)
    os.kill(before := worker(), signal.SIGKILL)
    assert isinstance(content[1], DocumentImage) and content[1].decode().size == (content[1].width, content[1].height)
    assert is_gone(before)
    raw = time_bomb(SCANNED, WORDS, depth=SLOW)
    expected, before = read(raw), worker()
    timer = threading.Timer(0.1, os.kill, (before, signal.SIGKILL))
    timer.start()
    assert read(raw) == expected
    timer.join()
    assert worker() != before and is_gone(before)


@needs_proc
def test_a_process_that_holds_much_is_replaced(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(pdf_process, "MOST_LEFT", 0)
    before = worker()
    assert is_gone(before) and worker() != before


@needs_proc
def test_an_interruption_comes_at_once() -> None:
    before = worker()
    timer = threading.Timer(0.3, os.kill, (os.getpid(), signal.SIGINT))
    timer.start()
    with pytest.raises(KeyboardInterrupt):
        read(time_bomb(SCANNED, depth=ENDLESS))
    assert is_gone(before)
    worker()


def python(code: str) -> list[str]:
    """A command that runs the code, warnings being errors."""
    return [sys.executable, "-W", "error", "-X", "dev", "-c", f"import sys; sys.path.insert(0, {str(ROOT / 'tests')!r})"
            f"\nfrom test_pdf_process import *\nprint(worker(), flush=True)\n{code}"]


@needs_proc
@pytest.mark.parametrize("code", ["", "os._exit(0)", "raise SystemExit", "pdf_process._worker = None"])
def test_it_ends_with_its_reader(code: str) -> None:
    done = subprocess.run(python(code), capture_output=True, text=True, check=True, cwd=ROOT)
    assert done.stderr == ""
    wait_until_gone(int(done.stdout))


@needs_proc
@pytest.mark.parametrize("code", ["time.sleep(99)", "read(time_bomb(SCANNED, depth=ENDLESS))"])
def test_it_ends_with_a_reader_that_is_killed(code: str) -> None:
    """Even within a page."""
    with subprocess.Popen(python(code), stdout=subprocess.PIPE, cwd=ROOT) as reader:
        assert reader.stdout is not None
        process = int(reader.stdout.readline())
        time.sleep(0.2)  # it is in the bomb by now
        assert not is_gone(process)
        reader.kill()
    wait_until_gone(process)


def restart(monkeypatch: pytest.MonkeyPatch, *command: str) -> None:
    """With another command, where one is given."""
    if command:
        monkeypatch.setattr(pdf_process, "_COMMAND", command)
    if pdf_process._worker is not None:
        pdf_process._worker.end()


def test_a_process_that_cannot_be_started(monkeypatch: pytest.MonkeyPatch) -> None:
    restart(monkeypatch, "/no such command")
    with pytest.raises(PdfError, match=r"^a PDF document, but the process that reads it cannot be started: No such"):
        read(pdf(WORDS))
    restart(monkeypatch, sys.executable, "-c", "raise SystemExit(1)")
    with pytest.raises(PdfError, match=r"^a PDF document, but the process that reads it does not start$"):
        read(pdf(WORDS))
    without = "import sys; sys.modules['pypdfium2'] = None; from l4ctx.pdf_worker import main; main()"
    restart(monkeypatch, sys.executable, "-P", "-c", without)
    with pytest.raises(PdfSupportMissing):
        read(pdf(WORDS))
    monkeypatch.undo()
    worker()


def test_nothing_in_the_current_folder_is_run(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    for name in ("pypdfium2", "l4ctx", "json"):
        (tmp_path / f"{name}.py").write_text("raise SystemExit(1)")
    monkeypatch.chdir(tmp_path)
    restart(monkeypatch)
    worker()


def test_it_imports_nothing_heavy() -> None:
    code = ("import sys\nfrom l4ctx.pdf_worker import main\nmain()\n"
            "assert 'pypdfium2.raw' in sys.modules\nprint(*sys.modules, file=sys.stderr)")
    done = subprocess.run([sys.executable, "-P", "-c", code], stdin=subprocess.DEVNULL, capture_output=True, check=True)
    assert not {"torch", "numpy", "PIL", "l4ctx.pdf_process"} & set(done.stderr.decode().split())


def test_memory_is_limited_by_what_is_free(monkeypatch: pytest.MonkeyPatch) -> None:
    gib = 1 << 30
    for free, document, limit in ((None, 0, 4), (64, 0, 4), (64, 3, 10), (6, 0, 3), (1, 0, 1), (0, 2, 3)):
        monkeypatch.setattr(pdf_process, "available_memory", lambda free=free: free if free is None else free * gib)
        assert pdf_process.memory_limit(document * gib) == limit * gib
