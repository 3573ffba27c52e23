"""Which files and folders have been read, by their real paths, so that each is read once."""

from __future__ import annotations

from array import array
from collections.abc import Sequence

from l4ctx.documents.document import Document


class Reached:
    """A file that a walk comes to can have been read only if a link or the user led there before; of most files, eight
    bytes are kept, in case that one does later.
    """

    def __init__(self) -> None:
        self._noted: dict[str, str] = {}  # of a folder, and of a file that was not reached by walking: its source
        self._walked = array("q")  # of each document, the hash of its real path; 0: that is noted, or there is none
        self._numbers: dict[int, int] = {}  # hash -> number of the document; made once there is a use for it
        self._numbered = 0

    def note(self, real: str, source: str) -> None:
        """A folder, or a file that a link leads to or that the user named."""
        self._noted[real] = source

    def add(self, real: str | None, source: str, *, walked: bool) -> None:
        """The next document; `real` is None for what is no file."""
        if real is not None and not walked:
            self.note(real, source)
        self._walked.append(hash(real) if walked else 0)

    def source(self, real: str, documents: Sequence[Document], *, walked: bool) -> str | None:
        """The source that a file or folder was read as; None: it was not."""
        if real in self._noted or walked:
            return self._noted.get(real)
        for number in range(self._numbered, len(self._walked)):
            self._numbers[self._walked[number]] = number
        self._numbered = len(self._walked)
        found = self._numbers.get(hash(real))
        return None if found is None else documents[found].source
