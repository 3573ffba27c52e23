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

from l4ctx.confinement import process
from l4ctx.documents import pdf_process
from l4ctx.documents.images import DocumentImage, ImageError
from l4ctx.documents.pdf import PdfError, PdfSupportMissing, page_bytes, read_pdf
from l4ctx.machine.memory import process_memory
from support.pdf_toys import SCANNED, Page, mark, memory_bomb, noise, pdf, text, time_bomb
from support.places import ROOT

WORDS = Page(text(b"words"))
READ = '<page number="1">\nwords\n</page>\n'
NOT_READ = r"cannot be read \(pdfium ran out of memory or crashed\)"
ENDLESS, SLOW = 12, 5  # depths of a time bomb: for hours, and for about half a second
FEW = 192 << 20  # bytes of memory; the process has half of them before it opens a document
BOMB = 256 << 20
HERE = f"import sys; sys.path.insert(0, {str(ROOT)!r})"
MAIN = "from l4ctx.confinement.child import main; main('l4ctx.documents.pdf_worker')"


def read(raw: bytes, mode: str = "text", path: Path | None = None) -> tuple[list[str | DocumentImage], list[str]]:
    return read_pdf("report.pdf", raw, path and str(path), mode=mode)


def images(raw: bytes, path: Path | None = None) -> list[DocumentImage]:
    return [piece for piece in read(raw, "pages", path)[0] if isinstance(piece, DocumentImage)]


def worker() -> int:
    """The number of the process, which has just read a document."""
    assert read(pdf(WORDS)) == ([READ], [])
    return worker_running()


def worker_running() -> int:
    assert pdf_process.CHILD.pid is not None
    return pdf_process.CHILD.pid


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
        '<page number="1">',
        '<page number="3">',
    ]
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
    (shown,) = images(time_bomb(SCANNED, depth=SLOW))  # so slow that a busy machine does not find it done in time
    whole = shown.decode()
    monkeypatch.setattr(pdf_process, "PAGE_SECONDS", 0.01)
    with pytest.raises(ImageError, match=r"^report\.pdf, page 1: cannot be read within 0.01 s$"):
        shown.decode()
    monkeypatch.undo()
    assert shown.decode() == whole


@needs_proc
def test_what_kills_the_process_from_outside_costs_nothing() -> None:
    (shown,) = images(pdf(WORDS))
    os.kill(before := worker(), signal.SIGKILL)
    assert worker() != before and is_gone(before)
    os.kill(before := worker(), signal.SIGKILL)
    assert shown.decode().size == (shown.width, shown.height)
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
def test_memory_is_limited_anew_for_every_page(monkeypatch: pytest.MonkeyPatch) -> None:
    first, second = images(memory_bomb(WORDS, SCANNED, at=0, count=BOMB))
    monkeypatch.setattr(pdf_process, "MOST_MEMORY", FEW)
    with pytest.raises(ImageError, match=rf"^report\.pdf, page 1: {NOT_READ}$"):
        first.decode()
    second.decode()


def overwrite(path: Path) -> None:
    """With something else; nothing but its content tells."""
    status = path.stat()
    with path.open("r+b") as file:
        file.write(b"x" * status.st_size)
    os.utime(path, ns=(status.st_atime_ns, status.st_mtime_ns))


@pytest.mark.parametrize("closed_by", ["reading", "drawing", "a change"])
def test_a_document_stays_open_between_pages(tmp_path: Path, closed_by: str) -> None:
    path, raw = tmp_path / "a.pdf", pdf(Page(mark()), Page(mark()))
    path.write_bytes(raw)
    first, second = images(raw, path)
    (other,) = images(pdf(Page(mark())))
    first.decode()
    overwrite(path)
    second.decode()
    if closed_by == "reading":
        read(pdf(WORDS))
    elif closed_by == "drawing":
        other.decode()
    else:
        os.utime(path)
    with pytest.raises(ImageError, match=r"^report\.pdf, page 2: changed since it was first read \(a broken PDF"):
        second.decode()


@needs_proc
def test_an_open_document_is_closed_in_time(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    code = f"{HERE}\nfrom l4ctx.documents import pdf_worker; pdf_worker.KEPT_SECONDS = 0.05\n{MAIN}"
    restart(monkeypatch, sys.executable, "-P", "-c", code)
    path, raw = tmp_path / "report.pdf", pdf(WORDS) + b"%" * (64 << 20)
    path.write_bytes(raw)
    (shown,) = images(raw, path)
    shown.decode()
    process, end = worker_running(), time.monotonic() + 20
    while (held := process_memory(process)) is not None and held.anonymous > 48 << 20:
        assert time.monotonic() < end, held
        time.sleep(0.01)
    shown.decode()
    assert worker_running() == process
    monkeypatch.undo()
    restart(monkeypatch)


def test_what_has_no_path_is_sent_once(monkeypatch: pytest.MonkeyPatch) -> None:
    sent = []

    def send(child: process._Child, raw: bytes) -> None:
        sent.append(raw)
        whole(child, raw)

    whole = process._Child._send
    raw = pdf(WORDS, SCANNED)
    shown = images(raw)
    monkeypatch.setattr(process._Child, "_send", send)
    for image in shown * 2:
        image.decode()
    assert sent.count(raw) == 1 and len(sent) == 5


@needs_proc
def test_what_pdfium_copies_does_not_gather(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    path, raw = tmp_path / "scan.pdf", noise(pages=12, side=2000)
    path.write_bytes(raw)
    monkeypatch.setattr(pdf_process, "MOST_LEFT", 48 << 20)
    worker()
    shown, process = images(raw, path), worker_running()
    for image in shown:
        image.decode()
        held = process_memory(process)
        assert held is not None and held.anonymous < len(raw) + pdf_process.MOST_LEFT and worker_running() == process


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
    return [
        sys.executable,
        "-W",
        "error",
        "-X",
        "dev",
        "-c",
        f"import sys; sys.path[:0] = [{str(ROOT / 'tests')!r}, {str(ROOT / 'tests' / 'documents')!r}]"
        f"\nfrom test_pdf_process import *\nprint(worker(), flush=True)\n{code}",
    ]


@needs_proc
@pytest.mark.parametrize("code", ["", "os._exit(0)", "raise SystemExit", "pdf_process.CHILD._child = None"])
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
        monkeypatch.setattr(pdf_process.CHILD, "command", command)
    pdf_process.CHILD.end()


def test_a_process_that_cannot_be_started(monkeypatch: pytest.MonkeyPatch) -> None:
    restart(monkeypatch, "/no such command")
    with pytest.raises(PdfError, match=r"^a PDF document, but the process that reads it cannot be started: No such"):
        read(pdf(WORDS))
    restart(monkeypatch, sys.executable, "-c", "raise SystemExit(1)")
    with pytest.raises(PdfError, match=r"^a PDF document, but the process that reads it does not start$"):
        read(pdf(WORDS))
    without = f"{HERE}; sys.modules['pypdfium2'] = None\n{MAIN}"
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
    code = f"import sys\n{MAIN}\nassert 'pypdfium2.raw' in sys.modules\nprint(*sys.modules, file=sys.stderr)"
    done = subprocess.run([sys.executable, "-P", "-c", code], stdin=subprocess.DEVNULL, capture_output=True, check=True)
    assert not {"torch", "numpy", "PIL", "l4ctx.confinement.process"} & set(done.stderr.decode().split())


def test_memory_is_limited_by_what_is_free(monkeypatch: pytest.MonkeyPatch) -> None:
    gib = 1 << 30
    for free, document, limit in ((None, 0, 4), (64, 0, 4), (64, 3, 10), (6, 0, 3), (1, 0, 1), (0, 2, 3)):
        monkeypatch.setattr(pdf_process, "available_memory", lambda free=free: free if free is None else free * gib)
        assert pdf_process.memory_limit(document * gib) == limit * gib
        assert page_bytes(document * gib) <= limit * gib  # what is planned for can be had
