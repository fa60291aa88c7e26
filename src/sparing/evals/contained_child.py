"""Runs Python code that nobody has read, inside limits that it cannot lift. Run as a program of its own, by `contained`, with the standard
library alone; Linux on x86-64 and aarch64.

Before the code: limits on CPU time, memory, open files (rlimits); nothing can be read but Python's own files (Landlock); and of the
system's calls only those stay that computing needs (seccomp). No file can be opened for writing, no socket made, no process begun, no
signal sent to another, no other's memory read. All of it holds for threads of the code too, and needs no privileges.

Standard input has the request: JSON with `program`, `tests`, `stdin`, `seconds`, `bytes`, `token`. Descriptor 3 gets the outcome: `token`
and a word. What the code writes itself goes to standard output.
"""

import ctypes
import errno
import io
import json
import os
import platform
import resource
import signal
import sys
import sysconfig

X86 = {
    "read": 0, "write": 1, "close": 3, "stat": 4, "fstat": 5, "lstat": 6, "poll": 7, "lseek": 8, "mmap": 9, "mprotect": 10, "munmap": 11,
    "brk": 12, "rt_sigaction": 13, "rt_sigprocmask": 14, "rt_sigreturn": 15, "pread64": 17, "pwrite64": 18, "readv": 19, "writev": 20,
    "access": 21, "pipe": 22, "select": 23, "sched_yield": 24, "mremap": 25, "madvise": 28, "dup": 32, "dup2": 33, "nanosleep": 35,
    "alarm": 37, "setitimer": 38, "getpid": 39, "exit": 60, "uname": 63, "getcwd": 79, "readlink": 89, "gettimeofday": 96, "getrlimit": 97,
    "getrusage": 98, "sysinfo": 99, "times": 100, "getuid": 102, "getgid": 104, "geteuid": 107, "getegid": 108, "getppid": 110,
    "sigaltstack": 131, "gettid": 186, "time": 201, "futex": 202, "sched_getaffinity": 204, "getdents64": 217, "restart_syscall": 219,
    "clock_gettime": 228, "clock_getres": 229, "clock_nanosleep": 230, "exit_group": 231, "epoll_wait": 232, "epoll_ctl": 233,
    "newfstatat": 262, "readlinkat": 267, "faccessat": 269, "pselect6": 270, "ppoll": 271, "set_robust_list": 273, "eventfd2": 290,
    "epoll_create1": 291, "dup3": 292, "pipe2": 293, "getrandom": 318, "statx": 332, "rseq": 334, "faccessat2": 439,
    "ioctl": 16, "clone": 56, "fcntl": 72, "tgkill": 234, "openat": 257, "prlimit64": 302, "clone3": 435,
}  # fmt: skip
ARM = {
    "getcwd": 17, "eventfd2": 19, "epoll_create1": 20, "epoll_ctl": 21, "epoll_pwait": 22, "dup": 23, "dup3": 24, "faccessat": 48,
    "close": 57, "pipe2": 59, "getdents64": 61, "lseek": 62, "read": 63, "write": 64, "readv": 65, "writev": 66, "pread64": 67,
    "pwrite64": 68, "pselect6": 72, "ppoll": 73, "readlinkat": 78, "newfstatat": 79, "fstat": 80, "exit": 93, "exit_group": 94, "futex": 98,
    "set_robust_list": 99, "nanosleep": 101, "setitimer": 103, "clock_gettime": 113, "clock_getres": 114, "clock_nanosleep": 115,
    "sched_getaffinity": 123, "sched_yield": 124, "restart_syscall": 128, "sigaltstack": 132, "rt_sigaction": 134, "rt_sigprocmask": 135,
    "rt_sigreturn": 139, "times": 153, "uname": 160, "getrusage": 165, "gettimeofday": 169, "getpid": 172, "getppid": 173, "getuid": 174,
    "geteuid": 175, "getgid": 176, "getegid": 177, "gettid": 178, "sysinfo": 179, "brk": 214, "munmap": 215, "mremap": 216, "mmap": 222,
    "mprotect": 226, "madvise": 233, "getrandom": 278, "statx": 291, "rseq": 293, "faccessat2": 439,
    "fcntl": 25, "ioctl": 29, "openat": 56, "tgkill": 131, "clone": 220, "prlimit64": 261, "clone3": 435,
}  # fmt: skip
"""Numbers of the calls that stay (asm/unistd_64.h, asm-generic/unistd.h). The last line's are allowed with some arguments only."""
MACHINES = {"x86_64": (0xC000003E, X86), "aarch64": (0xC00000B7, ARM)}
"""Name -> (AUDIT_ARCH, calls)."""
FOLDERS = ("/lib", "/lib64", "/usr/lib", "/usr/lib64", "/usr/local/lib")
"""Where shared libraries of Python's own modules are."""
FILES = ("/etc/ld.so.cache", "/dev/urandom", "/dev/null")
OPEN_FILES = 32

ALLOW, KILL = 0x7FFF0000, 0x80000000
LOAD, EQUAL, ANY_OF, RETURN = 0x20, 0x15, 0x45, 0x06
"""BPF: load a word of the call's description, jump if equal, jump if any of these bits are set, end."""
CREATE_RULESET, ADD_RULE, RESTRICT_SELF = 444, 445, 446
READ_FILE, READ_DIR, ALL_OF_ABI_1 = 1 << 2, 1 << 3, (1 << 13) - 1
PR_SET_PDEATHSIG, PR_SET_SECCOMP, PR_SET_NO_NEW_PRIVS = 1, 22, 38
CLONE_THREAD = 0x10000


class Instruction(ctypes.Structure):
    _fields_ = [("code", ctypes.c_uint16), ("yes", ctypes.c_uint8), ("no", ctypes.c_uint8), ("k", ctypes.c_uint32)]


class Program(ctypes.Structure):
    _fields_ = [("length", ctypes.c_uint16), ("instructions", ctypes.POINTER(Instruction))]


class Beneath(ctypes.Structure):
    _pack_ = 1
    _layout_ = "ms"
    _fields_ = [("allowed", ctypes.c_uint64), ("folder", ctypes.c_int32)]


def refused(number):
    return (RETURN, 0, 0, 0x00050000 | number)


def word(argument, high=False):
    """Offset of half of a call's argument in `struct seccomp_data`, on a little-endian machine."""
    return 16 + 8 * argument + 4 * high


def filter_of(machine, pid):
    """The BPF program for seccomp: (code, jump if yes, jump if no, operand) each."""
    arch, calls = MACHINES[machine]
    allow = (RETURN, 0, 0, ALLOW)
    some = {
        "ioctl": [refused(errno.ENOTTY)],
        "clone3": [refused(errno.ENOSYS)],  # its flags are in memory, where they cannot be seen; libc then uses clone
        "clone": [(LOAD, 0, 0, word(0)), (ANY_OF, 0, 1, CLONE_THREAD), allow, refused(errno.EPERM)],
        "tgkill": [(LOAD, 0, 0, word(0)), (EQUAL, 0, 1, pid), allow, refused(errno.EPERM)],
        "openat": [
            (LOAD, 0, 0, word(2)),
            (ANY_OF, 0, 1, os.O_WRONLY | os.O_RDWR | os.O_CREAT | os.O_TRUNC | os.O_TMPFILE & ~os.O_DIRECTORY),
            refused(errno.EROFS),
            allow,
        ],
        # Limits may be asked for and not set.
        "prlimit64": [
            (LOAD, 0, 0, word(2)), (EQUAL, 0, 3, 0), (LOAD, 0, 0, word(2, high=True)), (EQUAL, 0, 1, 0), allow, refused(errno.EPERM),
        ],
        # Not F_SETOWN, which sends signals to others.
        "fcntl": [(LOAD, 0, 0, word(1)), *(step for command in (0, 1, 2, 3, 4, 1030) for step in ((EQUAL, 0, 1, command), allow)),
                  refused(errno.EPERM)],
    }  # fmt: skip
    steps = [(LOAD, 0, 0, 4), (EQUAL, 1, 0, arch), (RETURN, 0, 0, KILL), (LOAD, 0, 0, 0)]
    for name, number in calls.items():
        body = some.get(name, [allow])
        steps += [(EQUAL, 0, len(body), number), *body]
    return [*steps, refused(errno.EPERM)]


def system():
    """libc. Raises OSError from `called` where a call fails."""
    return ctypes.CDLL(None, use_errno=True)


def called(what, result):
    if result < 0:
        raise OSError(f"{what}: {os.strerror(ctypes.get_errno())}")
    return result


def contain(seconds, size):
    """Everything that limits this process from here on. Raises OSError where the system cannot."""
    machine = platform.machine()
    if sys.platform != "linux" or machine not in MACHINES or sys.byteorder != "little":
        raise OSError(f"it is for Linux on {' or '.join(MACHINES)}, not {sys.platform} on {machine}")
    libc = system()
    for limit, value in (
        (resource.RLIMIT_CPU, seconds), (resource.RLIMIT_AS, size), (resource.RLIMIT_NOFILE, OPEN_FILES), (resource.RLIMIT_FSIZE, 0),
        (resource.RLIMIT_CORE, 0),
    ):  # fmt: skip
        resource.setrlimit(limit, (value, value))
    called("PR_SET_PDEATHSIG", libc.prctl(PR_SET_PDEATHSIG, signal.SIGKILL, 0, 0, 0))
    called("PR_SET_NO_NEW_PRIVS", libc.prctl(PR_SET_NO_NEW_PRIVS, 1, 0, 0, 0))
    _only_read_python(libc)
    steps = filter_of(machine, os.getpid())
    program = Program(len(steps), (Instruction * len(steps))(*steps))
    called("seccomp", libc.prctl(PR_SET_SECCOMP, 2, ctypes.byref(program), 0, 0))


def _only_read_python(libc):
    handled = ctypes.c_uint64(ALL_OF_ABI_1)
    rules = called("Landlock", libc.syscall(CREATE_RULESET, ctypes.byref(handled), ctypes.c_size_t(8), 0))
    stdlib = {sysconfig.get_path("stdlib"), sysconfig.get_path("platstdlib")}
    for path in {*FOLDERS, *FILES, *stdlib, os.path.join(sys.base_prefix, "lib")}:
        try:
            opened = os.open(path, os.O_PATH | os.O_CLOEXEC)
        except OSError:
            continue
        beneath = Beneath(READ_FILE | READ_DIR if os.path.isdir(path) else READ_FILE, opened)
        called("Landlock", libc.syscall(ADD_RULE, rules, 1, ctypes.byref(beneath), 0))
        os.close(opened)
    called("Landlock", libc.syscall(RESTRICT_SELF, rules, 0))
    os.close(rules)


def main():
    request = json.loads(sys.stdin.buffer.read())
    token, program, tests = request["token"], request["program"], request["tests"]
    tell = lambda outcome: os.write(3, f"{token} {outcome}".encode())  # noqa: E731
    try:
        contain(request["seconds"], request["bytes"])
    except OSError as error:
        tell(f"uncontained {error}")
        return
    sys.stdin = io.StringIO(request["stdin"])
    names = {"__name__": "__main__" if not tests else "answer", "__builtins__": __builtins__}
    at = "the code"
    try:
        exec(compile(program, "answer.py", "exec"), names)
        for number, test in enumerate(tests, 1):
            at = f"test {number}"
            exec(compile(test, f"test{number}.py", "exec"), names)
        sys.stdout.flush()
    except MemoryError:
        tell("memory")
    except SystemExit as error:
        tell("passed" if not tests and not error.code else f"failed {at}: it left")
    except BaseException as error:
        tell(f"failed {at}: {type(error).__name__}")
    else:
        tell("passed")
    finally:
        os._exit(0)  # threads of the code may still run


if __name__ == "__main__":
    main()
