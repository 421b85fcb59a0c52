"""One writer at a time: a lock that a killed owner never leaves held, on local and on network file systems.

The owner keeps an operating system's lock on a file, which ends with the process, however it ends. The file says who it
is, and the owner touches it every few seconds: some network file systems keep such locks on each machine for itself, so
the record of another machine counts as alive for as long as somebody touches it.
"""

from __future__ import annotations

import errno
import json
import os
import secrets
import socket
import threading
import time
import weakref
from collections.abc import Callable, Iterator
from contextlib import contextmanager, suppress
from dataclasses import asdict, dataclass
from datetime import UTC, datetime
from pathlib import Path

from hfcompress.utils import files
from hfcompress.utils.logging import log

BEAT = 5.0
"""Seconds between two touches."""
LAPSE = 30.0
"""Seconds after which an owner on another machine, who no longer touches the file, counts as dead."""
LOCK = ".lock"
"""The end of a lock file's name."""
_UNSUPPORTED = (errno.ENOSYS, errno.EOPNOTSUPP, errno.ENOLCK, errno.EINVAL)


@dataclass(frozen=True)
class Owner:
    """Who holds a lock.

    Attributes:
        host: Name of the machine, for people.
        machine: Of this start of the machine, and of this container: where process numbers mean the same.
        pid: Process number.
        started: When the process began, as the machine counts: a number that was given again is another process.
        since: When it took the lock.
        token: Drawn anew for each lock.
    """

    host: str
    machine: str
    pid: int
    started: str
    since: str
    token: str

    def __str__(self) -> str:
        return f"process {self.pid} on {self.host}, since {self.since}"


class HeldError(Exception):
    """Somebody else holds the lock.

    Attributes:
        owner: Who; None where the record is not written yet.
    """

    def __init__(self, owner: Owner | None) -> None:
        self.owner = owner
        super().__init__(str(owner or "another process"))


class Lock:
    """A lock that this process holds; `hold` takes it."""

    def __init__(self, path: Path, descriptor: int, owner: Owner, on_loss: Callable[[], None] | None) -> None:
        self.path, self.owner = path, owner
        self._descriptor, self._on_loss = descriptor, on_loss
        self._done = threading.Event()
        _HELD.add(self)
        self._thread = threading.Thread(target=self._beat, name=f"lock {path}", daemon=True)
        self._thread.start()

    def intact(self) -> bool:
        """Whether the file is still there and ours: not if its directory was removed, moved, or taken by another."""
        try:
            found = self.path.stat()
            ours = os.fstat(self._descriptor)
            same = (found.st_dev, found.st_ino) == (ours.st_dev, ours.st_ino)
            return same and _parsed(os.pread(self._descriptor, 4096, 0)) == self.owner
        except OSError:
            return False

    def _beat(self) -> None:
        while not self._done.wait(BEAT):
            if self.intact():
                with suppress(OSError):
                    os.utime(self.path)
            elif self._on_loss is not None and not self._done.is_set():
                self._on_loss()
                return

    def release(self) -> None:
        """Removes the file and ends the lock."""
        self._done.set()
        self._thread.join()
        if self.intact():  # removed while it is held, so nobody can hold what has no name
            with suppress(OSError):
                self.path.unlink()
        self.close()

    def close(self) -> None:
        """Lets go of the file; in a forked child that leaves the parent's lock as it is."""
        _HELD.discard(self)
        descriptor, self._descriptor = self._descriptor, -1
        if descriptor >= 0:
            with suppress(OSError):
                os.close(descriptor)


_HELD: weakref.WeakSet[Lock] = weakref.WeakSet()


def _close_in_child() -> None:
    """A forked process (a data loader's worker) must not keep its dead parent's lock."""
    for lock in list(_HELD):
        lock.close()


if hasattr(os, "register_at_fork"):
    os.register_at_fork(after_in_child=_close_in_child)


@contextmanager
def hold(path: Path, on_loss: Callable[[], None] | None = None) -> Iterator[Lock]:
    """Takes a lock for as long as the block lasts.

    Args:
        path: The lock file, in a directory that exists; it is removed when the block ends.
        on_loss: Called once, from another thread, within `BEAT` seconds after the file is no longer there or ours.

    Raises:
        HeldError: at once, where another process holds it; where that process is on another machine of a file system
            whose locks are local, after at most `LAPSE` seconds.
    """
    lock = _take(path, on_loss)
    try:
        yield lock
    finally:
        lock.release()


def require_free(path: Path) -> None:
    """Passes where nobody holds the lock at this moment; creates nothing.

    Raises:
        HeldError: where somebody does.
    """
    try:
        descriptor = os.open(path, os.O_RDWR)
    except OSError:
        return
    try:
        _require_dead(path, descriptor, shared=True)
    finally:
        os.close(descriptor)


def _take(path: Path, on_loss: Callable[[], None] | None) -> Lock:
    while True:
        descriptor, mine = os.open(path, os.O_RDWR | os.O_CREAT, 0o666), False
        try:
            locked = _require_dead(path, descriptor)
            if not _is(path, descriptor):  # the owner before removed it after we opened it
                os.close(descriptor)
                continue
            owner, mine = _myself(), True
            _write(descriptor, owner)
            if not locked:  # two may have come this far: the one who wrote last has it
                time.sleep(0.5)
                if (found := _read(path)) != owner:
                    mine = False
                    raise HeldError(found)
            return Lock(path, descriptor, owner, on_loss)
        except BaseException:
            with suppress(OSError):
                if mine:
                    path.unlink()
                os.close(descriptor)
            raise


def _require_dead(path: Path, descriptor: int, shared: bool = False) -> bool:
    """Passes where no living process holds the file; whether the operating system locked it for us."""
    locked = _locked(descriptor, shared)
    for _ in range(10):  # somebody may just be looking, who holds it for a moment
        if locked is not False:
            break
        time.sleep(0.05)
        locked = _locked(descriptor, shared)
    if locked is False:
        raise HeldError(_read(path))
    owner = _parsed(os.pread(descriptor, 4096, 0))
    if owner is not None and _is(path, descriptor) and _alive(path, owner, bool(locked)):
        raise HeldError(owner)
    return bool(locked)


def _locked(descriptor: int, shared: bool) -> bool | None:
    """Takes the operating system's lock; None where the system or the file system has none."""
    try:
        import fcntl
    except ImportError:
        return None
    try:
        fcntl.flock(descriptor, (fcntl.LOCK_SH if shared else fcntl.LOCK_EX) | fcntl.LOCK_NB)
    except OSError as error:
        if error.errno in _UNSUPPORTED:
            return None
        if error.errno in (errno.EAGAIN, errno.EACCES):
            return False
        raise
    return True


def _alive(path: Path, owner: Owner, locked: bool) -> bool:
    """Whether the process of a record goes on, where no lock of this machine's says so."""
    mine = _myself()
    if owner.machine.partition("/")[0] == mine.machine.partition("/")[0] and locked:
        return False  # the same kernel would have kept it locked
    if owner.machine == mine.machine:
        return _started(owner.pid) == owner.started
    return _beats(path, owner)


def _beats(path: Path, owner: Owner) -> bool:
    """Whether somebody touches the file, as the file server tells the time."""
    first = _touched(path)
    age = _server_time(path) - first
    if age < LAPSE:
        log.info(f"{path.parent} was held by {owner}: waiting {LAPSE - age:.0f} s to see whether it is still there")
    end = time.monotonic() + LAPSE - age
    while time.monotonic() < end:
        time.sleep(min(1.0, BEAT / 5))
        try:
            if _touched(path) != first:
                return True
        except FileNotFoundError:
            return False
    return False


def _touched(path: Path) -> float:
    with path.open("rb") as stream:  # opening a file is what makes NFS ask the server
        return os.fstat(stream.fileno()).st_mtime


def _server_time(path: Path) -> float:
    probe = path.with_name(f".{path.name}.{secrets.token_hex(4)}{files.PARTIAL}")
    try:
        probe.write_bytes(b"")
        return probe.stat().st_mtime
    finally:
        probe.unlink(missing_ok=True)


def _started(pid: int) -> str | None:
    """When a process began; None where there is none of this number."""
    try:
        # In ticks since the machine's start: psutil's seconds move with the clock.
        return Path(f"/proc/{pid}/stat").read_text(encoding="utf-8").rpartition(")")[2].split()[19]
    except OSError:
        import psutil

        try:
            return None if Path("/proc/self").exists() else str(psutil.Process(pid).create_time())
        except psutil.Error:
            return None


def _myself() -> Owner:
    host = socket.gethostname()
    try:
        machine = Path("/proc/sys/kernel/random/boot_id").read_text(encoding="ascii").strip()
        machine += f"/{Path('/proc/self/ns/pid').stat().st_ino}"
    except OSError:
        machine = host
    since = datetime.now(UTC).strftime("%Y-%m-%d %H:%M:%S UTC")
    return Owner(host, machine, os.getpid(), _started(os.getpid()) or "", since, secrets.token_hex(8))


def _is(path: Path, descriptor: int) -> bool:
    try:
        return os.path.samestat(path.stat(), os.fstat(descriptor))
    except FileNotFoundError:
        return False


def _write(descriptor: int, owner: Owner) -> None:
    os.ftruncate(descriptor, 0)
    os.pwrite(descriptor, (json.dumps(asdict(owner)) + "\n").encode(), 0)
    os.fsync(descriptor)


def _read(path: Path) -> Owner | None:
    try:
        return _parsed(path.read_bytes())
    except OSError:
        return None


def _parsed(content: bytes) -> Owner | None:
    """The record in a lock file; None for one that is not written yet, or torn."""
    try:
        return Owner(**json.loads(content))
    except (ValueError, TypeError):
        return None


@contextmanager
def shared_directory(target: Path) -> Iterator[Path]:
    """An empty directory to fill, in a folder that several runs write to; it takes the name `target` in the end.

    Where another run was quicker, its directory stays. What a killed run left in the folder is removed first.
    """
    with _shared(target) as scratch:
        scratch.mkdir()
        yield scratch
        files.sync(scratch)
        try:
            files.rename(scratch, target)
        except OSError:
            if not target.is_dir():
                raise


@contextmanager
def shared_file(path: Path) -> Iterator[Path]:
    """A path to write to, in a folder that several runs write to; the file takes the name `path` in the end."""
    with _shared(path) as scratch:
        yield scratch
        files.sync(scratch)
        files.rename(scratch, path)


@contextmanager
def _shared(target: Path) -> Iterator[Path]:
    """A name beside `target` that nobody else uses, with a lock beside it for as long as its owner lives."""
    target.parent.mkdir(parents=True, exist_ok=True)
    remove_dead(target.parent)
    scratch = target.with_name(f"{target.name}.{secrets.token_hex(4)}{files.PARTIAL}")
    with hold(scratch.with_name(scratch.name + LOCK)):
        try:
            yield scratch
        finally:
            files.remove(scratch)


def remove_dead(folder: Path) -> None:
    """Removes what is unfinished in a shared folder and whose writer is dead; a living one's has a lock beside it.

    What may not be removed (another user's) stays.
    """
    for lock in folder.glob(f"*{files.PARTIAL}{LOCK}"):
        with suppress(HeldError, OSError), hold(lock):
            files.remove(lock.with_name(lock.name.removesuffix(LOCK)))
    for scratch in folder.glob(f"*{files.PARTIAL}"):
        if not scratch.with_name(scratch.name + LOCK).exists():
            with suppress(OSError):  # its owner ended just now
                files.remove(scratch)
