"""Memory that was freed is kept, where the C library can be told so."""

import ctypes
import platform
import subprocess
import sys
from typing import ClassVar

import pytest

from debackdoor.allocator import keep_freed_memory

COUNT = """
import ctypes, resource, sys
ctypes.CDLL(None).prctl(41, 1, 0, 0, 0)  # PR_SET_THP_DISABLE: pages of 4 KiB, whatever the kernel is set to
from debackdoor.allocator import keep_freed_memory
if sys.argv[1] == "keep":
    keep_freed_memory()
for _ in range(20):
    held = [letter * (24 << 20) for letter in (b"a", b"b", b"c")]
    del held
print(resource.getrusage(resource.RUSAGE_SELF).ru_minflt)
"""


@pytest.mark.skipif(platform.libc_ver()[0] != "glibc", reason="only glibc has these parameters")
def test_pages_are_asked_for_once() -> None:
    """Three times 24 MiB are 18,432 pages of 4 KiB: twenty times as many, or once and a few for the program itself."""

    def faults(what: str) -> int:
        ran = subprocess.run([sys.executable, "-c", COUNT, what], capture_output=True, text=True, check=True)
        return int(ran.stdout)

    assert faults("keep") < 0.3 * faults("give back")


def test_other_c_libraries_have_no_such_function(monkeypatch: pytest.MonkeyPatch) -> None:
    class Other:
        asked: ClassVar[list[object]] = []

        def __init__(self, name: object) -> None:
            self.asked.append(name)

    monkeypatch.setattr(ctypes, "CDLL", Other)
    keep_freed_memory()
    assert Other.asked == [None]


def test_where_a_library_has_to_have_a_name_nothing_happens(monkeypatch: pytest.MonkeyPatch) -> None:
    def nameless(name: object) -> None:
        raise TypeError(f"argument of type '{type(name).__name__}' is not iterable")

    monkeypatch.setattr(ctypes, "CDLL", nameless)
    keep_freed_memory()
