//! Attempts to get out of a sandbox, to disturb it, or to stay in it. Each has to end as it is said here, and the sandbox that it was
//! tried in keeps working.
#![forbid(unsafe_code)]
#![allow(clippy::unwrap_used, reason = "a panic is how a test fails")]

use std::net::TcpListener;
use std::os::unix::net::UnixListener;
use std::time::Duration;

use pacs_sandbox::{Case, Ended, Entry, Job, Layer, Limits, Outcome, Policy, Sandbox, Told};

fn entry() -> Entry {
    Entry::new(env!("CARGO_BIN_EXE_pacs-sandbox-init").into(), &[])
}

/// A sandbox with the layers that this machine has; those that it lacks are announced, for the suite shows less without them.
async fn sandbox() -> Sandbox {
    let sandbox = Sandbox::probe(&entry(), &Policy::default()).await.unwrap();
    for (layer, why) in sandbox.layers().missing() {
        eprintln!("WARNING: the layer `{layer}` does not hold on this machine ({why}): the suite runs without it");
    }
    sandbox
}

/// How an attempt has to end.
#[derive(Clone, Copy, Debug, PartialEq)]
enum Expected {
    /// What it tries raises an exception, which it reports.
    Refused,
    /// It runs to its end and finds nothing.
    Nothing,
    OverTime,
    OverOutput,
    Memory,
    /// It raises an exception that ends it.
    Raises,
    /// It ends by a signal.
    Signalled,
    /// Either of the two, by the kernel's choice.
    DiesSomehow,
}
use Expected::{DiesSomehow, Memory, Nothing, OverOutput, OverTime, Raises, Refused, Signalled};

/// Names, what Python does, and how it ends. `HOST_FILE`, `HOST_PORT`, `HOST_SOCKET` and `HOST_PID` are those of the test.
const ATTEMPTS: &[(&str, Expected, &str)] = &[
    // The network.
    ("connect over TCP", Refused, "import socket; socket.create_connection(('127.0.0.1', HOST_PORT), 2)"),
    ("an internet socket", Refused, "import socket; socket.socket(socket.AF_INET, socket.SOCK_DGRAM)"),
    ("a raw socket", Refused, "import socket; socket.socket(socket.AF_INET, socket.SOCK_RAW, 1)"),
    ("a packet socket", Refused, "import socket; socket.socket(17, socket.SOCK_RAW, 0)"),
    ("a netlink socket", Refused, "import socket; socket.socket(16, socket.SOCK_RAW, 0)"),
    (
        "a unix socket of the host",
        Refused,
        "import socket; s = socket.socket(socket.AF_UNIX); s.connect('HOST_SOCKET')",
    ),
    ("an abstract unix socket", Refused, "import socket; s = socket.socket(socket.AF_UNIX); s.bind('\\0name')"),
    ("resolve a name", Refused, "import socket; socket.getaddrinfo('example.com', 80)"),
    ("a pair of internet sockets", Refused, "import socket; socket.socketpair(socket.AF_INET)"),
    // Files of the host.
    ("read a secret of the host", Refused, "open('HOST_FILE').read()"),
    ("read passwords", Refused, "open('/etc/passwd').read()"),
    ("read shadows", Refused, "open('/etc/shadow').read()"),
    (
        "list the home of root",
        Refused,
        "import os; assert any(n.startswith('.ssh') or n == '.bashrc' for n in os.listdir('/root'))",
    ),
    ("write into the root", Refused, "open('/escaped', 'w')"),
    (
        "write into the libraries",
        Refused,
        "import os; open(os.path.join(os.path.dirname(os.__file__), 'sitecustomize.py'), 'w')",
    ),
    ("replace a module of the library", Refused, "import os; os.rename(os.__file__, '/tmp/os.py')"),
    ("a link to the host's files", Refused, "import os; os.symlink('/etc/passwd', '/tmp/l'); open('/tmp/l').read()"),
    (
        "a link out of the folder by dots",
        Refused,
        "import os; os.symlink('../../../../HOST_FILE', '/tmp/d'); open('/tmp/d').read()",
    ),
    ("a hard link to a library", Refused, "import os; os.link(os.__file__, '/tmp/h')"),
    ("a device node", Refused, "import os, stat; os.mknod('/tmp/sda', 0o600 | stat.S_IFBLK, os.makedev(8, 0))"),
    ("the disk", Refused, "open('/dev/sda', 'rb')"),
    ("the memory of the machine", Refused, "open('/dev/mem', 'rb')"),
    ("a terminal", Refused, "open('/dev/tty', 'w')"),
    ("settings of the kernel", Refused, "open('/sys/kernel/mm/transparent_hugepage/enabled', 'w')"),
    (
        "become set-user-id",
        Nothing,
        "import os; open('/tmp/s', 'w'); os.chmod('/tmp/s', 0o4755); print(os.geteuid() == 0 and 'ESCAPED')",
    ),
    // /proc and other processes.
    ("the environment of process 1", Refused, "open('/proc/1/environ', 'rb').read()"),
    ("the root of process 1", Refused, "import os; os.listdir('/proc/1/root')"),
    ("its own executable through /proc", Refused, "open('/proc/self/exe', 'rb')"),
    ("the core pattern", Refused, "open('/proc/sys/kernel/core_pattern', 'w').write('|/tmp/x')"),
    ("the memory of the steward through /proc", Refused, "import os; open(f'/proc/{os.getppid()}/mem', 'rb')"),
    ("a signal to a process of the host", Refused, "import os; os.kill(HOST_PID, 9)"),
    (
        "end the steward",
        Nothing,
        "import os, signal\nfor s in range(1, 65):\n    try:\n        os.kill(os.getppid(), s)\n    except OSError:\n        pass",
    ),
    ("signals to everybody", DiesSomehow, "import os; os.kill(-1, 9)"),
    ("signals to its group", DiesSomehow, "import os; os.killpg(0, 9)"),
    ("trace the steward", Refused, "call(101, 16, os.getppid(), 0, 0)"),
    ("let itself be traced", Refused, "call(101, 0, 0, 0, 0)"),
    ("read memory of the steward", Refused, "call(310, os.getppid(), 0, 0, 0)"),
    ("write memory of the steward", Refused, "call(311, os.getppid(), 0, 0, 0)"),
    ("take a descriptor of the steward", Refused, "handle = os.pidfd_open(os.getppid()); call(438, handle, 0, 0)"),
    ("files through handles", Refused, "call(304, 0, 0, 0)"),
    // The kernel.
    ("a mount", Refused, "check(LIBC.mount(b'none', b'/tmp', b'tmpfs', 0, None))"),
    ("the new interface of mounts", Refused, "call(430, b'tmpfs', 0)"),
    ("unmount the root", Refused, "check(LIBC.umount2(b'/', 2))"),
    ("change the root", Refused, "os.chroot('/tmp')"),
    ("a user namespace in a user namespace", Refused, "check(LIBC.unshare(0x10000000))"),
    ("a mount namespace", Refused, "check(LIBC.unshare(0x20000))"),
    ("a process in a user namespace", Refused, "call(56, 0x10000000 | 17, 0, 0, 0)"),
    ("join a namespace", Refused, "call(308, 0, 0)"),
    ("a key of the kernel", Refused, "call(248, b'user', b'k', b'v', 1)"),
    ("keyrings", Refused, "call(250, 0, -3, 0)"),
    ("io_uring", Refused, "call(425, 8, ctypes.create_string_buffer(256))"),
    ("a program of the kernel", Refused, "call(321, 0, 0, 0)"),
    ("performance counters", Refused, "call(298, ctypes.create_string_buffer(128), 0, -1, -1, 0)"),
    ("faults in user space", Refused, "call(323, 0)"),
    ("a module of the kernel", Refused, "call(175, 0, 0, b'')"),
    ("another kernel", Refused, "call(246, 0, 0, 0, 0)"),
    ("restart the machine", Refused, "call(169, 0xfee1dead, 672274793, 0x1234567, 0)"),
    ("the clock of the machine", Refused, "import time; time.clock_settime(time.CLOCK_REALTIME, 0)"),
    ("the name of the machine", Refused, "import socket; socket.sethostname('escaped')"),
    ("another user", Refused, "os.setuid(0)"),
    ("another group", Refused, "os.setgid(0)"),
    ("capabilities", Refused, "call(126, 0, 0)"),
    ("raise a limit", Refused, "import resource; resource.setrlimit(resource.RLIMIT_AS, (-1, -1))"),
    ("a higher priority", Refused, "os.nice(-10)"),
    ("shared memory of System V", Refused, "call(29, 1234, 4096, 0o1600)"),
    ("a message queue", Refused, "call(240, b'q', 0o102, 0o600, 0)"),
    ("memory without a name that is executed", Refused, "os.memfd_create('x')"),
    ("an older interface of system calls", Refused, "call(0x40000000 | 41, 2, 1, 0)"),
    ("input for a terminal", Refused, "import fcntl; fcntl.ioctl(0, 0x5412, b'x')"),
    ("the log of the kernel", Refused, "call(103, 3, ctypes.create_string_buffer(64), 64)"),
    // Processes.
    ("fork", Refused, "os.fork()"),
    ("a bomb of forks", Refused, "while True: os.fork()"),
    ("a subprocess", Refused, "import subprocess; subprocess.run(['/bin/sh', '-c', 'true'])"),
    (
        "a bomb of threads",
        Refused,
        "import threading, time\nfor _ in range(10000): threading.Thread(target=time.sleep, args=(60,), daemon=True).start()",
    ),
    ("a shell", Refused, "os.execv('/bin/sh', ['sh', '-c', 'echo ESCAPED'])"),
    ("a daemon", Refused, "os.setsid()\nif os.fork() == 0: os.setsid()"),
    // Memory, disk, output and time.
    ("all memory", Memory, "x = []\nwhile True: x.append(bytearray(1 << 24))"),
    ("memory at once", Memory, "x = bytearray(1 << 36)"),
    (
        "a large file",
        Refused,
        "import signal; signal.signal(signal.SIGXFSZ, signal.SIG_IGN)\nwith open('/tmp/large', 'wb') as f:\n    while True: f.write(bytes(1 << 20))",
    ),
    ("many large files", Refused, "for i in range(1000): open(f'/tmp/large{i}', 'wb').write(bytes(1 << 20))"),
    ("many small files", Refused, "for i in range(100000): open(f'/tmp/small{i}', 'w').close()"),
    ("deep folders", Refused, "for i in range(100000): os.mkdir('d'); os.chdir('d')"),
    ("many descriptors", Refused, "x = [open('/dev/null') for _ in range(100000)]"),
    ("a flood of output", OverOutput, "while True: print('x' * 10000)"),
    ("a flood of errors", OverOutput, "import sys\nwhile True: sys.stderr.write('x' * 10000)"),
    ("a flood of what it says of itself", OverOutput, "while True: os.write(3, b'x' * 4096)"),
    ("an endless exit message", OverOutput, "import sys; sys.exit('x' * (8 << 20))"),
    ("an endless loop", OverTime, "while True: pass"),
    ("sleep for ever", OverTime, "import time; time.sleep(1e6)"),
    ("a loop in C", OverTime, "pow(3, 10 ** 9, 10 ** 100_000)\nsum(range(10 ** 14))"),
    (
        "ignore all signals",
        OverTime,
        "import signal\nfor s in range(1, 65):\n    try:\n        signal.signal(s, signal.SIG_IGN)\n    except (OSError, ValueError):\n        pass\nwhile True: pass",
    ),
    ("stop itself", OverTime, "import signal; os.kill(os.getpid(), signal.SIGSTOP)"),
    (
        "a thread that never ends",
        OverTime,
        "import threading, time\nthreading.Thread(target=time.sleep, args=(1e6,)).start()",
    ),
    ("an exit handler that never ends", OverTime, "import atexit, time; atexit.register(time.sleep, 1e6)"),
    ("a lock for ever", OverTime, "import threading; l = threading.Lock(); l.acquire(); l.acquire()"),
    ("wait for input that never comes", Nothing, "import sys; sys.stdin.read(); print('at its end')"),
    ("a stack overflow in Python", Raises, "def f(): f()\nf()"),
    (
        "a stack overflow in C",
        Signalled,
        "ctypes.CDLL(None).qsort(ctypes.create_string_buffer(8), 2, 4, ctypes.cast(0, ctypes.c_void_p))",
    ),
    ("a wild pointer", Signalled, "ctypes.string_at(1)"),
    ("abort", Signalled, "os.abort()"),
    ("an uncollectable exception", Raises, "class E(BaseException):\n    def __str__(self): raise self\nraise E()"),
];

/// What attempts at the kernel begin with: numbers of system calls are those of x86-64.
const PRELUDE: &str = "import ctypes, os
LIBC = ctypes.CDLL(None, use_errno=True)
LIBC.syscall.restype = ctypes.c_long
def check(result):
    if result < 0:
        raise OSError(ctypes.get_errno(), os.strerror(ctypes.get_errno()))
    return result
def call(number, *arguments):
    return check(LIBC.syscall(ctypes.c_long(number), *[ctypes.c_long(a) if isinstance(a, int) else a for a in arguments]))
";

fn limits() -> Limits {
    let two = Duration::from_secs(2);
    Limits { wall: two, cpu: two, memory_bytes: 256 << 20, ..Limits::default() }
}

fn stdin() -> Case {
    Case::Stdin { stdin: String::new() }
}

async fn run(sandbox: &mut Sandbox, source: &str, case: &Case) -> Ended {
    let mut running = sandbox.begin(&Job::python(source, limits())).await.unwrap();
    let ended = running.run(case).await.unwrap();
    running.end().await.unwrap();
    ended
}

fn is_memory(told: &Told) -> bool {
    matches!(told, Told::Memory(_))
}

fn judge(expected: Expected, ended: &Ended) -> Result<(), &'static str> {
    if ended.stdout.contains("ESCAPED") || ended.stderr.contains("ESCAPED") {
        return Err("it escaped");
    }
    let holds = match expected {
        Refused => ended.outcome == Outcome::Exited(0) && ended.stdout.contains("refused"),
        Nothing => ended.outcome == Outcome::Exited(0),
        OverTime => ended.outcome == Outcome::OverTime,
        OverOutput => ended.outcome == Outcome::OverOutput,
        Memory => ended.told.iter().any(is_memory),
        Raises => ended.outcome == Outcome::Exited(1) && ended.told.iter().any(|told| matches!(told, Told::Error(_))),
        Signalled => matches!(ended.outcome, Outcome::Signalled(_)),
        DiesSomehow => matches!(ended.outcome, Outcome::Signalled(_) | Outcome::Exited(_)),
    };
    if holds { Ok(()) } else { Err("it ended otherwise") }
}

#[tokio::test]
async fn no_attempt_escapes_and_the_sandbox_survives() {
    let folder = tempfile::Builder::new().prefix("pacs-escapes").tempdir().unwrap();
    let secret = folder.path().join("secret");
    std::fs::write(&secret, "ESCAPED").unwrap();
    let listener = TcpListener::bind("127.0.0.1:0").unwrap();
    let socket = folder.path().join("socket");
    let unix = UnixListener::bind(&socket).unwrap();
    let mut victim = Victim::start();
    let filled = |text: &str| {
        text.replace("HOST_FILE", secret.to_str().unwrap())
            .replace("HOST_SOCKET", socket.to_str().unwrap())
            .replace("HOST_PORT", &listener.local_addr().unwrap().port().to_string())
            .replace("HOST_PID", &victim.0.id().to_string())
    };

    let mut sandbox = sandbox().await;
    let mut failures = Vec::new();
    let mut number = 0;
    for (name, expected, attempt) in ATTEMPTS {
        if !cfg!(target_arch = "x86_64") && attempt.contains("call(") {
            eprintln!("skipped on this processor: {name}");
            continue;
        }
        number += 1;
        let body = filled(attempt);
        let source = match expected {
            Refused => {
                let body = body.replace('\n', "\n    ");
                format!(
                    "{PRELUDE}try:\n    {body}\nexcept BaseException as error:\n    print('refused', repr(error))\nelse:\n    print('ESCAPED')\n"
                )
            }
            _ => format!("{PRELUDE}{body}\n"),
        };
        let ended = run(&mut sandbox, &source, &stdin()).await;
        if let Err(problem) = judge(*expected, &ended) {
            let mut ended = ended;
            ended.stdout.truncate(300);
            failures.push(format!("{name}: {problem}, expected {expected:?}: {ended:?}"));
        }
        let after = run(
            &mut sandbox,
            "import os; print(os.listdir('/tmp'), 6 * int(input()))",
            &Case::Stdin { stdin: "7".into() },
        )
        .await;
        assert_eq!((after.outcome, after.stdout.as_str()), (Outcome::Exited(0), "[] 42\n"), "after {name}: {after:?}");
    }
    assert!(failures.is_empty(), "{} of {number} attempts:\n{}", failures.len(), failures.join("\n"));
    assert!(number >= 40, "{number}");

    listener.set_nonblocking(true).unwrap();
    unix.set_nonblocking(true).unwrap();
    assert!(listener.accept().is_err() && unix.accept().is_err(), "something came from a sandbox");
    assert!(victim.0.try_wait().unwrap().is_none(), "a process of the host was ended");
}

/// A process of the host, which ends with the test.
struct Victim(std::process::Child);

impl Victim {
    fn start() -> Self {
        let none = std::process::Stdio::null;
        Self(
            std::process::Command::new("sleep").arg("600").stdin(none()).stdout(none()).stderr(none()).spawn().unwrap(),
        )
    }
}

impl Drop for Victim {
    fn drop(&mut self) {
        let _ = self.0.kill();
        let _ = self.0.wait();
    }
}

/// What a program does to the interpreter that it runs in, and how the next one would see it.
const POISONS: &[(&str, &str, &str)] = &[
    ("a patched builtin", "import builtins; builtins.len = lambda _: 13", "print(len([1]) == 13)"),
    ("a patched module", "import math; math.sqrt = lambda _: 13", "import math; print(math.sqrt(4) == 13)"),
    (
        "a module of its own",
        "import sys; sys.modules['heapq'] = None",
        "import sys; print(sys.modules.get('heapq', 1) is None)",
    ),
    ("a finder of modules", "import sys; sys.meta_path.insert(0, 13)", "import sys; print(13 in sys.meta_path)"),
    ("an entry of the path", "import sys; sys.path.insert(0, '/tmp')", "import sys; print('/tmp' in sys.path)"),
    (
        "sitecustomize",
        "open('/tmp/sitecustomize.py', 'w').write('13'); open('/tmp/usercustomize.py', 'w').write('13')",
        "import os; print(os.listdir('/tmp') != [])",
    ),
    ("an exit handler", "import atexit; atexit.register(print, 'True')", "pass"),
    (
        "a trace",
        "import sys; sys.settrace(lambda *a: print('True')); sys.setprofile(lambda *a: None)",
        "import sys; print(sys.gettrace() is not None)",
    ),
    ("a hook of exceptions", "import sys; sys.excepthook = 13", "import sys; print(sys.excepthook == 13)"),
    (
        "the environment",
        "import os; os.environ['X'] = '13'; os.putenv('Y', '13')",
        "import os; print(bool(os.environ))",
    ),
    (
        "a limit of recursion",
        "import sys; sys.setrecursionlimit(13000)",
        "import sys; print(sys.getrecursionlimit() == 13000)",
    ),
    ("a shared integer", "import ctypes; ctypes.c_int.from_address(id(7) + 24).value = 13", "print(7 == 13)"),
    (
        "randomness",
        "import random; random.seed(13)",
        "import random; a = random.random(); random.seed(13); print(a == random.random())",
    ),
    (
        "a handler of signals",
        "import signal; signal.signal(signal.SIGINT, signal.SIG_IGN)",
        "import signal; print(signal.getsignal(2) == signal.SIG_IGN)",
    ),
    ("a hook of audits", "import sys; sys.addaudithook(lambda *a: print('True'))", "open('/dev/null')"),
    ("a hook after forks", "import os; os.register_at_fork(after_in_child=lambda: print('True'))", "pass"),
    ("a text in memory", "SECRET = 'only-the-first-' + 'program-has-this' * 1000", FIND),
    ("what it prints", "print('only-the-first-' + 'program-has-this')", FIND),
];

/// Looks for a text of the program before through all of its own memory, which `mincore` and pipes tell it the extent of.
const FIND: &str = "
import ctypes, gc, os
LIBC = ctypes.CDLL(None)
needle = 'only-the-' + 'first-program-has-this'
reading, writing = os.pipe()
found = False
start = id(needle) & ~0xfff
for direction in (1, -1):
    page = start
    for _ in range(8192):
        try:
            # A page that is not mapped is an error of the call, not of the process.
            if LIBC.write(writing, ctypes.c_void_p(page), 4096) != 4096:
                page += direction * 4096
                continue
            text = os.read(reading, 4096)
            if needle.encode() in text and (page > id(needle) or page + 4096 < id(needle)):
                found = True
        except OSError:
            pass
        page += direction * 4096
print('True' if found else 'nothing')
";

#[tokio::test]
async fn nothing_survives_from_one_program_to_the_next() {
    let mut sandbox = sandbox().await;
    for (name, poison, look) in POISONS {
        let poisoned = run(&mut sandbox, poison, &stdin()).await;
        assert!(!matches!(poisoned.outcome, Outcome::OverTime | Outcome::OverOutput), "{name}: {poisoned:?}");
        let ended = run(&mut sandbox, look, &stdin()).await;
        assert_eq!(ended.outcome, Outcome::Exited(0), "{name}: {ended:?}");
        assert!(!ended.stdout.contains("True"), "{name} survived: {ended:?}");
    }
}

#[tokio::test]
async fn what_a_program_says_of_itself_is_a_claim_and_never_a_failure_of_the_sandbox() {
    let mut sandbox = sandbox().await;
    let forged = "import os
os.write(3, b'{\"kind\": \"fault\", \"text\": \"retry me\"}\\n')
os.write(3, b'R{\"kind\": \"value\", \"text\": 42}\\n')
os.write(1, (1).to_bytes(4, 'big') + b'{')
os._exit(0)";
    let ended = run(&mut sandbox, forged, &Case::Call { call: "f()".into() }).await;
    assert_eq!((ended.outcome, ended.told.len()), (Outcome::Exited(0), 0), "{ended:?}");
    let closed = "import os\nos.closerange(0, 64)\nos._exit(97)";
    let ended = run(&mut sandbox, closed, &stdin()).await;
    assert_eq!(ended.outcome, Outcome::Exited(97));
}

#[tokio::test]
async fn what_a_call_raises_is_told_with_its_classes() {
    let mut sandbox = sandbox().await;
    let source = "class Odd(ValueError): pass
class Sly(Exception):
    args = property(lambda e: 1 / 0)
class Meta(type):
    __mro__ = __name__ = property(lambda c: 1 / 0)
class Masked(Exception, metaclass=Meta): pass
def f(kind, *arguments): raise kind(*arguments)";
    let told = |names: &[&str], arguments: serde_json::Value, text: &str| {
        let classes: Vec<&str> = names.iter().copied().chain(["Exception", "BaseException", "object"]).collect();
        Told::Raised(serde_json::json!({"classes": classes, "arguments": arguments, "text": text}))
    };
    for (call, expected) in [
        (
            "f(Odd, 'x', (1, 2.5))",
            vec![
                Told::Error("Odd: ('x', (1, 2.5))".into()),
                told(
                    &["Odd", "ValueError"],
                    serde_json::json!(["x", {"tuple": [1, {"float": "0x1.4000000000000p+1"}]}]),
                    "('x', (1, 2.5))",
                ),
            ],
        ),
        ("f(Masked)", vec![Told::Error("Masked".into()), told(&["Masked"], serde_json::json!([]), "")]),
        // It cannot be described, and is an error like any other.
        ("f(Sly)", vec![Told::Error("Sly".into())]),
    ] {
        let ended = run(&mut sandbox, source, &Case::Call { call: call.into() }).await;
        assert_eq!((ended.outcome, &ended.told), (Outcome::Exited(1), &expected), "{call}");
    }
    // What the program raises before the call is no answer to it.
    let ended = run(&mut sandbox, "raise ValueError('early')", &Case::Call { call: "f()".into() }).await;
    assert_eq!(ended.told, [Told::Error("ValueError: early".into())]);
}

#[tokio::test]
async fn ordinary_programs_run() {
    let mut sandbox = sandbox().await;
    let deep = "import sys, threading\nsys.setrecursionlimit(10 ** 6)\nthreading.stack_size(32 << 20)\n\
                def f(n): return 0 if n == 0 else 1 + f(n - 1)\n\
                t = threading.Thread(target=lambda: print(f(50_000))); t.start(); t.join()";
    for (source, input, expected) in [
        ("print(sum(map(int, input().split())))", "1 2 3", "6\n"),
        ("import sys\nfor line in sys.stdin: print(line.strip()[::-1])", "ab\ncd\n", "ba\ndc\n"),
        ("import sys\ndata = sys.stdin.buffer.read().split(); sys.stdout.write(str(len(data)))", "a b c", "3"),
        (deep, "", "50000\n"),
        (
            "import heapq, bisect, collections, functools, itertools, math, re, decimal, fractions\nprint(math.comb(5, 2))",
            "",
            "10\n",
        ),
        ("if __name__ == '__main__': print('main')", "", "main\n"),
        ("import asyncio\nasync def f(): return 7\nprint(asyncio.run(f()))", "", "7\n"),
        ("open('x', 'w').write('hi'); print(open('x').read(), 'ä€')", "", "hi ä€\n"),
        ("import time; time.sleep(0.01); print(time.time() > 0)", "", "True\n"),
        (
            "from concurrent.futures import ThreadPoolExecutor\nprint(list(ThreadPoolExecutor(2).map(abs, [-1])))",
            "",
            "[1]\n",
        ),
        ("import os; print(input()); os._exit(0)", "x\n", ""),
    ] {
        let ended = run(&mut sandbox, source, &Case::Stdin { stdin: input.into() }).await;
        assert_eq!((ended.outcome, ended.stdout.as_str()), (Outcome::Exited(0), expected), "{source}: {ended:?}");
    }
}

#[tokio::test]
async fn cases_of_a_job_are_processes_of_their_own() {
    let mut sandbox = sandbox().await;
    let source = "calls = []\ndef f(x):\n    calls.append(x)\n    return len(calls)\nclass Solution:\n    def g(self, a, b): return (a, b)";
    let mut running = sandbox.begin(&Job::python(source, limits())).await.unwrap();
    for call in ["f(1)", "f(2)"] {
        let ended = running.run(&Case::Call { call: call.into() }).await.unwrap();
        assert_eq!(ended.told, [Told::Value(serde_json::json!(1))]);
    }
    let method =
        Case::Function { function: "g".into(), arguments: vec![serde_json::json!([1]), serde_json::json!(null)] };
    let ended = running.run(&method).await.unwrap();
    assert_eq!(ended.told, [Told::Value(serde_json::json!({"tuple": [[1], null]}))]);
    let missing = Case::Function { function: "h".into(), arguments: vec![] };
    let ended = running.run(&missing).await.unwrap();
    assert_eq!(ended.told, [Told::Error("NameError: name 'h' is not defined".into())]);
    running.end().await.unwrap();
}

#[tokio::test]
async fn other_languages_may_have_processes_and_all_of_them_end_with_the_case() {
    let shell = ["/bin/sh", "/usr/bin/sh", "/bin/dash", "/usr/bin/dash", "/bin/bash", "/usr/bin/bash"];
    let policy = Policy {
        paths: shell.map(Into::into).into_iter().filter(|path: &std::path::PathBuf| path.exists()).collect(),
        ..Policy::default()
    };
    let mut sandbox = Sandbox::probe(&entry(), &policy).await.unwrap();
    let files = [("main.sh".to_owned(), "read x\n(while :; do :; done) &\n(echo $((x * 2)))\n".to_owned())].into();
    let command = vec!["/bin/sh".to_owned(), "/tmp/main.sh".to_owned()];
    let limits = Limits { processes: 8, ..limits() };
    let job = Job { source: String::new(), command, files, limits };
    for _ in 0..2 {
        let mut running = sandbox.begin(&job).await.unwrap();
        for _ in 0..2 {
            let ended = running.run(&Case::Stdin { stdin: "21\n".into() }).await.unwrap();
            assert_eq!((ended.outcome, ended.stdout.as_str()), (Outcome::Exited(0), "42\n"), "{ended:?}");
        }
        running.end().await.unwrap();
    }
    let absent = Job { command: vec!["/bin/absent".into()], ..job };
    let mut running = sandbox.begin(&absent).await.unwrap();
    let ended = running.run(&stdin()).await.unwrap();
    assert!(matches!(&ended.told[..], [Told::Exec(why)] if why.contains("No such file")), "{ended:?}");
}

#[tokio::test]
async fn a_missing_layer_is_refused_by_name() {
    let sandbox = sandbox().await;
    let missing: Vec<Layer> = sandbox.layers().missing().map(|(layer, _)| layer).collect();
    let policy = |allow_missing| Policy { allow_missing, ..Policy::default() };
    Sandbox::start(&entry(), &policy(missing.clone())).await.unwrap();
    for layer in &missing {
        let others = missing.iter().copied().filter(|other| other != layer).collect();
        let refused = Sandbox::start(&entry(), &policy(others)).await.err().unwrap().to_string();
        let expected = format!("list \"{layer}\" in `allow_missing`");
        assert!(refused.contains(&expected), "{refused}");
    }
    if missing.is_empty() {
        eprintln!("skipped: all layers hold on this machine, so none can be refused");
    }
}

#[tokio::test]
async fn start_failures_say_why() {
    for (policy, expected) in [
        (Policy { python: "/no/such/python".into(), ..Policy::default() }, "run `/no/such/python`: No such file"),
        (Policy { python: "/bin/echo".into(), ..Policy::default() }, "`/bin/echo` is not a Python interpreter"),
        (
            Policy { paths: vec!["/no/such/folder".into()], ..Policy::default() },
            "`/no/such/folder`, which programs are to read, is not there",
        ),
    ] {
        let problem = Sandbox::probe(&entry(), &policy).await.err().unwrap().to_string();
        assert!(problem.contains(expected), "{problem}");
    }
}

#[tokio::test]
async fn a_sandbox_that_is_dropped_leaves_no_process() {
    // The folder stands in the arguments of the sandbox's processes, and of no others.
    let folder = tempfile::Builder::new().prefix("pacs-dropped").tempdir().unwrap();
    let marker = folder.path().to_str().unwrap();
    let policy = Policy { libraries: vec![folder.path().into()], ..Policy::default() };
    let mut sandbox = Sandbox::probe(&entry(), &policy).await.unwrap();
    let mut running = sandbox.begin(&Job::python("while True: pass", Limits::default())).await.unwrap();
    assert!(tokio::time::timeout(Duration::from_millis(300), running.run(&stdin())).await.is_err());
    assert!(!processes(marker).is_empty(), "the processes are not found by their arguments");
    drop(sandbox);
    let deadline = std::time::Instant::now() + Duration::from_secs(10);
    loop {
        let alive = processes(marker);
        if alive.is_empty() {
            return;
        }
        assert!(std::time::Instant::now() < deadline, "{alive:?} are alive");
        tokio::time::sleep(Duration::from_millis(20)).await;
    }
}

/// Processes whose arguments hold `marker`.
fn processes(marker: &str) -> Vec<String> {
    let entries = std::fs::read_dir("/proc").unwrap().flatten();
    let arguments = entries.filter_map(|entry| std::fs::read_to_string(entry.path().join("cmdline")).ok());
    arguments.filter(|arguments| arguments.contains(marker)).collect()
}

#[tokio::test]
async fn an_ordinary_user_has_the_same_layers() {
    use std::os::unix::fs::PermissionsExt;

    let setpriv = std::path::Path::new("/usr/bin/setpriv");
    let python = std::path::Path::new("/usr/bin/python3");
    if !nix::unistd::geteuid().is_root() || !setpriv.exists() || !python.exists() {
        eprintln!("skipped: it takes root, {} and {} to become an ordinary user", setpriv.display(), python.display());
        return;
    }
    // Where that user can reach it.
    let folder = tempfile::Builder::new().prefix("pacs-ordinary").tempdir().unwrap();
    let program = folder.path().join("init");
    std::fs::copy(env!("CARGO_BIN_EXE_pacs-sandbox-init"), &program).unwrap();
    for path in [folder.path(), &program] {
        std::fs::set_permissions(path, std::fs::Permissions::from_mode(0o755)).unwrap();
    }
    let arguments = ["--reuid", "4321", "--regid", "4321", "--clear-groups", program.to_str().unwrap()];
    let policy = Policy { python: python.into(), ..Policy::default() };
    let mut sandbox = Sandbox::probe(&Entry::new(setpriv.into(), &arguments), &policy).await.unwrap();
    let missing: Vec<_> = sandbox.layers().missing().map(|(layer, why)| format!("{layer}: {why}")).collect();
    eprintln!("WARNING: layers that do not hold for an ordinary user on this machine: {missing:?}");
    let ended = run(&mut sandbox, "import os; print(os.getuid(), os.path.exists('/etc/passwd'))", &stdin()).await;
    assert_eq!(ended.outcome, Outcome::Exited(0), "{ended:?}");
    if !missing.iter().any(|missing| missing.starts_with("user") || missing.starts_with("mount")) {
        assert_eq!(ended.stdout, "4321 False\n");
    }
}
