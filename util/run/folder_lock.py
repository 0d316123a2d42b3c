"""One run per folder: what keeps a second one out, and makes room at once when the first has died.

On one machine the kernel decides: a run holds a lock on the file `.lock`, which ends with its process, however that
ends. Network file systems may keep such locks for each machine apart, or not at all. So a run also leaves a claim,
`.claim.json`: who it is, and by its modification time that it is alive. A claim is void

- when it is from this machine and the lock is ours now, or its process is gone;
- when it is from an earlier start of our own Slurm job, which Slurm has ended;
- when nobody has renewed it for `STALE_AFTER` seconds.
"""

import contextlib
import errno
import fcntl
import json
import logging
import os
import socket
import threading
import time
import uuid
from collections.abc import Mapping
from dataclasses import asdict, dataclass
from pathlib import Path

from util.errors import UserError, unreadable_is_user_error

logger = logging.getLogger(__name__)

RENEW_EVERY = 30.0  # seconds
STALE_AFTER = 180.0  # seconds
NO_LOCKS = (errno.ENOSYS, errno.EOPNOTSUPP, errno.ENOLCK, errno.EINVAL)  # what file systems without locks answer


@dataclass(frozen=True)
class Owner:
    """Who has claimed a folder; '' for what a claim does not record."""

    token: str = ""  # drawn for every claim
    host: str = ""
    kernel: str = ""  # of this boot of the machine: containers may share it, whatever their host names
    process_namespace: str = ""  # in which `process` is a process's number
    process: int = 0
    started: str = ""
    job: str = ""  # Slurm's, '' outside
    restart: int = 0  # how often Slurm has requeued the job

    def __str__(self) -> str:
        job = f" (Slurm job {self.job})" if self.job else ""
        known = f"process {self.process} on {self.host}, started {self.started}{job}"
        return known if self.token else "an unidentified process"

    @classmethod
    def this_process(cls, environ: Mapping[str, str]) -> "Owner":
        try:
            kernel = Path("/proc/sys/kernel/random/boot_id").read_text().strip()
            namespace = os.readlink("/proc/self/ns/pid")
        except OSError:  # not Linux
            kernel, namespace = socket.gethostname(), ""
        return cls(
            token=uuid.uuid4().hex,
            host=socket.gethostname(),
            kernel=kernel,
            process_namespace=namespace,
            process=os.getpid(),
            started=time.strftime("%Y-%m-%d %H:%M:%S"),
            job=environ.get("SLURM_JOB_ID", ""),
            restart=int(environ.get("SLURM_RESTART_COUNT") or 0),
        )

    @property
    def is_running(self) -> bool:
        """Whether there is such a process; only for an owner in our own process namespace."""
        try:
            os.kill(self.process, 0)
        except OSError as error:
            return isinstance(error, PermissionError)  # it is somebody else's
        return True


class FolderLock:
    """Makes `folder` if need be and takes it for this process, until `release()` or the end of the process.

    flag: which named it, for messages.

    Raises:
        UserError: another run has it (says which), or it cannot be made or written to.
    """

    def __init__(self, folder: str | os.PathLike, flag: str = "--output_dir"):
        self.folder, self.flag = Path(folder), flag
        self.own = Owner.this_process(os.environ)
        self.lock, self.claim = self.folder / ".lock", self.folder / ".claim.json"
        self.temporary = self.folder / f".claim.json.{self.own.host}.tmp"  # used under the lock: one per machine
        self.locks_work = True
        self.released = threading.Event()
        with unreadable_is_user_error(f"{flag} {folder} cannot be written to"):
            self.folder.mkdir(parents=True, exist_ok=True)
            self.descriptor = self._lock()
            try:
                self._claim()
            except BaseException:
                os.close(self.descriptor)
                raise
        self.thread = threading.Thread(target=self._renew, name="folder claim", daemon=True)
        self.thread.start()

    def release(self) -> None:
        """Release the folder, leaving nothing behind."""
        self.released.set()
        self.thread.join(timeout=5.0)  # longer only while a file system is away
        with contextlib.suppress(OSError):
            if self._read_claim()[0] == self.own:
                self.claim.unlink()
                self.lock.unlink()  # while it is ours; whoever opened it before will see that it has no name any more
        os.close(self.descriptor)

    def _lock(self) -> int:
        """A descriptor of the locked file."""
        while True:
            descriptor = os.open(self.lock, os.O_RDWR | os.O_CREAT | os.O_CLOEXEC, 0o666)
            try:
                fcntl.flock(descriptor, fcntl.LOCK_EX | fcntl.LOCK_NB)
            except OSError as error:
                if error.errno not in NO_LOCKS:
                    os.close(descriptor)
                    if error.errno not in (errno.EAGAIN, errno.EACCES):
                        raise
                    raise self._in_use(self._locking_owner()) from None
                self.locks_work = False
            if os.fstat(descriptor).st_nlink:
                return descriptor
            os.close(descriptor)  # removed by its last owner before we had it locked

    def _locking_owner(self) -> Owner:
        """The owner of the lock; it may need a moment to write its claim over a dead one's."""
        owner = Owner()
        for _ in range(20):
            with contextlib.suppress(FileNotFoundError):
                owner = self._read_claim()[0]
                if owner.kernel == self.own.kernel and owner.is_running:
                    return owner
            time.sleep(0.05)
        return owner

    def _claim(self) -> None:
        """Write our claim, once any other one is void."""
        first_renewal = None
        while not self._place_claim():
            try:
                owner, renewal = self._read_claim()
            except FileNotFoundError:  # released just now
                continue
            if owner == self.own:  # a network file system reported a repeated request
                return
            os.utime(self.lock)
            silent = os.stat(self.lock).st_mtime - renewal  # both by the clock of the file system
            if self._is_void(owner) or silent > STALE_AFTER:
                self._remove_claim(owner)
                continue
            if first_renewal is None:
                first_renewal = renewal
                logger.warning(
                    "%s was claimed by %s and last renewed %.0f s ago: waiting at most %.0f s to see if it is alive",
                    self.folder, owner, silent, STALE_AFTER - silent,
                )  # fmt: skip
            if renewal != first_renewal:
                raise self._in_use(owner)
            time.sleep(min(1.0, RENEW_EVERY / 10))

    def _is_void(self, owner: Owner) -> bool:
        if owner.kernel == self.own.kernel:
            same_namespace = owner.process_namespace == self.own.process_namespace
            return self.locks_work or (same_namespace and not owner.is_running)
        return bool(owner.job) and owner.job == self.own.job and owner.restart < self.own.restart

    def _place_claim(self) -> bool:
        """Write our claim unless there is one; whether it was written. It appears with its content, or not at all."""
        content = json.dumps(asdict(self.own))
        try:
            self.temporary.write_text(content, encoding="utf-8")
            try:
                os.link(self.temporary, self.claim)
            except FileExistsError:
                raise
            except OSError:  # no hard links here
                with open(self.claim, "x", encoding="utf-8") as file:
                    file.write(content)
        except FileExistsError:
            return False
        finally:
            self.temporary.unlink(missing_ok=True)
        return True

    def _read_claim(self, path: Path | None = None) -> tuple[Owner, float]:
        """The owner and the moment of its last renewal. Opening makes network file systems ask for the newest."""
        with open(path or self.claim, encoding="utf-8", errors="replace") as file:
            renewal = os.fstat(file.fileno()).st_mtime
            try:
                return Owner(**json.load(file)), renewal
            except (ValueError, TypeError):
                return Owner(), renewal

    def _remove_claim(self, judged: Owner) -> None:
        """Remove the claim of `judged`, but not that of another run which did so first."""
        with contextlib.suppress(FileNotFoundError):
            os.rename(self.claim, self.temporary)
            if self._read_claim(self.temporary)[0] != judged:
                with contextlib.suppress(FileExistsError):
                    os.link(self.temporary, self.claim)
            self.temporary.unlink()

    def _renew(self) -> None:
        while not self.released.wait(RENEW_EVERY):
            with contextlib.suppress(OSError):  # of a file system that is away
                try:
                    owner = self._read_claim()[0]
                except FileNotFoundError:  # another run is about to find out that we are alive, or somebody tidied up
                    self._place_claim()
                    continue
                if owner != self.own and not self.released.is_set():
                    logger.error(
                        "%s was taken over by %s, since this run did not renew its claim for %.0f s: it ends here",
                        self.folder, owner, STALE_AFTER,
                    )  # fmt: skip
                    os._exit(1)  # at once, before it writes among the other's files
                os.utime(self.claim)

    def _in_use(self, owner: Owner) -> UserError:
        return UserError(
            f"{self.folder} is in use by another run: {owner}. Wait for its end, or give another {self.flag}"
        )


# --- The folders of this process's run ---

_held: list[FolderLock] = []


def take_folders(output_dir: str | os.PathLike, log_dir: str | os.PathLike) -> None:
    """Take the folders, which may be one, for the run of this process; raises as `FolderLock`."""
    _held.append(FolderLock(output_dir))
    if os.path.realpath(log_dir) != os.path.realpath(output_dir):
        _held.append(FolderLock(log_dir, "--log_dir"))


def release_folders() -> None:
    """Release the folders, if there are any; whatever ends the run calls this after its last write."""
    while _held:
        _held.pop().release()


def _forget_in_child() -> None:
    """A forked process (a data-loading worker, which may outlive us for seconds) must not keep the locks."""
    while _held:
        os.close(_held.pop().descriptor)


os.register_at_fork(after_in_child=_forget_in_child)
