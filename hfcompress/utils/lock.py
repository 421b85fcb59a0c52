"""A lock for one writer at a time, on local and network file systems; it ends with its owner, also if that is killed.

The owner keeps an operating system's lock on a file; it ends with the process. The file names the owner, who touches it
every few seconds. This is for network file systems whose locks hold on one machine only: an owner on another machine
counts as alive as long as the file is touched.
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
from contextlib import ExitStack, contextmanager, suppress
from dataclasses import asdict, dataclass
from datetime import UTC, datetime
from pathlib import Path

from hfcompress.utils import files
from hfcompress.utils.logging import log

BEAT = 5.0
"""Seconds between two touches."""
POLL = 0.5
"""Seconds between two tries to take a lock that another process holds."""
LAPSE = 30.0
"""Seconds without a touch after which an owner on another machine counts as dead."""
LOCK = ".lock"
"""Ending of a lock file's name."""
_UNSUPPORTED = (errno.ENOSYS, errno.EOPNOTSUPP, errno.ENOLCK, errno.EINVAL)


@dataclass(frozen=True)
class Owner:
    """The process that holds a lock.

    Attributes:
        host: Name of the machine, for people.
        machine: Id of this boot of the machine and of this container: process numbers are unique inside it.
        pid: Process number.
        started: Start time of the process, as the machine counts: its number may be given to another process later.
        since: The time at which it took the lock.
        token: A random text, new for each lock.
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
    """Another process holds the lock.

    Attributes:
        owner: That process; None if its record is not written yet.
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

    def is_intact(self) -> bool:
        """True if the file is still there and ours; False if its directory was removed, moved, or taken by another."""
        try:
            found = self.path.stat()
            ours = os.fstat(self._descriptor)
            same = (found.st_dev, found.st_ino) == (ours.st_dev, ours.st_ino)
            return same and _parse(os.pread(self._descriptor, 4096, 0)) == self.owner
        except OSError:
            return False

    def _beat(self) -> None:
        while not self._done.wait(BEAT):
            if self.is_intact():
                with suppress(OSError):
                    os.utime(self.path)
            elif self._on_loss is not None and not self._done.is_set():
                self._on_loss()
                return

    def release(self) -> None:
        """Removes the file and ends the lock."""
        self._done.set()
        self._thread.join()
        if self.is_intact():  # it is removed while we hold it, so no other process can take it in between
            with suppress(OSError):
                self.path.unlink()
        self.close()

    def close(self) -> None:
        """Closes the file; in a forked child this leaves the parent's lock as it is."""
        _HELD.discard(self)
        descriptor, self._descriptor = self._descriptor, -1
        if descriptor >= 0:
            with suppress(OSError):
                os.close(descriptor)


_HELD: weakref.WeakSet[Lock] = weakref.WeakSet()


def _close_in_child() -> None:
    """Closes the locks in a forked process (a data loader's worker), which must not keep its dead parent's lock."""
    for lock in list(_HELD):
        lock.close()


if hasattr(os, "register_at_fork"):
    os.register_at_fork(after_in_child=_close_in_child)


@contextmanager
def hold(path: Path, on_loss: Callable[[], None] | None = None) -> Iterator[Lock]:
    """Takes a lock for as long as the block lasts.

    Args:
        path: The lock file, in a directory that exists; it is removed when the block ends.
        on_loss: Called once, from another thread, within `BEAT` seconds after the file is lost, see `Lock.is_intact`.

    Raises:
        HeldError: if another process holds it: at once; if that process is on another machine and the file system's
            locks are local: after at most `LAPSE` seconds.
    """
    lock = _take(path, on_loss)
    try:
        yield lock
    finally:
        lock.release()


@contextmanager
def wait_for(path: Path) -> Iterator[None]:
    """Takes a lock for as long as the block lasts, after waiting for any other process that holds it."""
    with ExitStack() as stack:
        while True:
            try:
                stack.enter_context(hold(path))
                break
            except HeldError:
                time.sleep(POLL)
        yield


def require_free(path: Path) -> None:
    """Requires that no process holds the lock at this moment; creates nothing.

    Raises:
        HeldError: if a process holds it.
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
            if not _is_same_file(path, descriptor):  # the previous owner removed it after we opened it
                os.close(descriptor)
                continue
            owner, mine = _myself(), True
            _write(descriptor, owner)
            if not locked:  # two processes may get here: the one that wrote last has the lock
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
    """Requires that no living process holds the file; returns True if the operating system locked it for us."""
    locked = _take_system_lock(descriptor, shared)
    for _ in range(10):  # a process that only looks (`require_free`) holds it for a moment
        if locked is not False:
            break
        time.sleep(0.05)
        locked = _take_system_lock(descriptor, shared)
    if locked is False:
        raise HeldError(_read(path))
    owner = _parse(os.pread(descriptor, 4096, 0))
    if owner is not None and _is_same_file(path, descriptor) and _is_alive(path, owner, bool(locked)):
        raise HeldError(owner)
    return bool(locked)


def _take_system_lock(descriptor: int, shared: bool) -> bool | None:
    """Takes the operating system's lock; False if it is taken, None if the system or the file system has no locks."""
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


def _is_alive(path: Path, owner: Owner, locked: bool) -> bool:
    """True if the process of a record is alive; for a file that this machine's locks show as free, or without locks."""
    mine = _myself()
    if owner.machine.partition("/")[0] == mine.machine.partition("/")[0] and locked:
        return False  # the same kernel would have kept it locked
    if owner.machine == mine.machine:
        return _read_start_time(owner.pid) == owner.started
    return _is_touched(path, owner)


def _is_touched(path: Path, owner: Owner) -> bool:
    """True if the owner still touches the file, by the clock of the file server."""
    first = _read_touch_time(path)
    age = _server_time(path) - first
    if age < LAPSE:
        log.info(f"{path.parent} was held by {owner}: waiting {LAPSE - age:.0f} s to see if it still runs")
    end = time.monotonic() + LAPSE - age
    while time.monotonic() < end:
        time.sleep(min(1.0, BEAT / 5))
        try:
            if _read_touch_time(path) != first:
                return True
        except FileNotFoundError:
            return False
    return False


def _read_touch_time(path: Path) -> float:
    with path.open("rb") as stream:  # NFS asks the server when a file is opened
        return os.fstat(stream.fileno()).st_mtime


def _server_time(path: Path) -> float:
    probe = path.with_name(f".{path.name}.{secrets.token_hex(4)}{files.PARTIAL}")
    try:
        probe.write_bytes(b"")
        return probe.stat().st_mtime
    finally:
        probe.unlink(missing_ok=True)


def _read_start_time(pid: int) -> str | None:
    """Reads the start time of a process; None if there is no process with this number."""
    try:
        # In ticks since the machine's start: psutil's seconds change when the clock is set.
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
    return Owner(host, machine, os.getpid(), _read_start_time(os.getpid()) or "", since, secrets.token_hex(8))


def _is_same_file(path: Path, descriptor: int) -> bool:
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
        return _parse(path.read_bytes())
    except OSError:
        return None


def _parse(content: bytes) -> Owner | None:
    """Parses the record in a lock file; None if it is not written yet, or incomplete."""
    try:
        return Owner(**json.loads(content))
    except (ValueError, TypeError):
        return None


@contextmanager
def shared_directory(target: Path) -> Iterator[Path]:
    """Yields an empty directory to fill, in a folder that several runs write to; it gets the name `target` in the end.

    If another run was faster, its directory stays. Leftovers of killed runs in the folder are removed first.
    """
    with _scratch_beside(target) as scratch:
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
    """Yields a path to write to, in a folder that several runs write to; the file gets the name `path` in the end."""
    with _scratch_beside(path) as scratch:
        yield scratch
        files.sync(scratch)
        files.rename(scratch, path)


@contextmanager
def _scratch_beside(target: Path) -> Iterator[Path]:
    """Yields a new name beside `target`, with a lock file beside it that lasts as long as its owner."""
    target.parent.mkdir(parents=True, exist_ok=True)
    remove_dead(target.parent)
    scratch = target.with_name(f"{target.name}.{secrets.token_hex(4)}{files.PARTIAL}")
    with hold(scratch.with_name(scratch.name + LOCK)):
        try:
            yield scratch
        finally:
            files.remove(scratch)


def remove_dead(folder: Path) -> None:
    """Removes what dead writers left unfinished in a shared folder; living writers hold locks.

    Files of another user, which may not be removed, stay.
    """
    for lock in folder.glob(f"*{files.PARTIAL}{LOCK}"):
        with suppress(HeldError, OSError), hold(lock):
            files.remove(lock.with_name(lock.name.removesuffix(LOCK)))
    for scratch in folder.glob(f"*{files.PARTIAL}"):
        if not scratch.with_name(scratch.name + LOCK).exists():
            with suppress(OSError):  # its owner has just finished it
                files.remove(scratch)
