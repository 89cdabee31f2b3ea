"""Runs one machine of the testbed and passes its streams on: machine.py [OPTIONS] -- QEMU ARGUMENT…

Exit code: the command's own; 124 when the time limit was reached; 125 when the machine ended without an answer (the end
of its console is printed then); 130 and 143 when interrupted or terminated.

Each stream is a virtio-serial port on a socket pair, one way only. The machine ends each with TOKEN and the exit code in
three digits; after the last one there is nothing left to wait for and QEMU is killed: its disks are thrown away.
"""

import argparse
import contextlib
import ctypes
import json
import os
import selectors
import shutil
import signal
import socket
import subprocess
import sys
import time

TIMEOUT, NO_ANSWER = 124, 125
CONSOLE_TAIL_LINES = 60
# What the kernel is asked for when time is up (sysrq): a verbose console, the processors' stacks, the blocked tasks.
QUESTIONS, SECONDS_TO_ANSWER = "7lw", 5
PR_SET_PDEATHSIG = 1


class Stream:
    """One port: what goes through is written to `sink`, up to the token."""

    def __init__(self, name, sink, token):
        self.name, self.sink, self.token = name, sink, token
        self.here, self.there = socket.socketpair()
        self.held = b""
        self.code = None

    def arguments(self):
        fd = self.there.fileno()
        return [
            "-chardev", f"socket,id={self.name},fd={fd}",
            "-device", f"virtserialport,chardev={self.name},name={self.name}",
        ]  # fmt: skip

    def read(self):
        """Passes on what has come. False when nothing more will."""
        data = self.held + self.here.recv(1 << 18)
        if len(data) == len(self.held):
            return False
        end = data.find(self.token)
        if end >= 0:
            tail = data[end + len(self.token) :]
            self.write(data[:end])
            self.held = data[end:]
            if len(tail) >= 3:
                self.code = int(tail[:3])
            return self.code is None
        keep = self.begun(data)
        self.write(data[: len(data) - keep])
        self.held = data[len(data) - keep :]
        return True

    def begun(self, data):
        """How many bytes at the end of `data` may be the token's beginning."""
        for n in range(min(len(self.token) - 1, len(data)), 0, -1):
            if data.endswith(self.token[:n]):
                return n
        return 0

    def write(self, data):
        self.sink.write(data)
        self.sink.flush()


class Pulse:
    """A port that gets a byte every few seconds. An emulated machine that is idle has been seen to miss its timer, and then
    sleeps until some device interrupts it; this one does."""

    def __init__(self, seconds):
        self.seconds = seconds
        self.here, self.there = socket.socketpair()
        self.here.setblocking(False)
        self.next = time.monotonic() + seconds

    def arguments(self):
        return [
            "-chardev", f"socket,id=pulse,fd={self.there.fileno()}",
            "-device", "virtserialport,chardev=pulse,name=pulse",
        ]  # fmt: skip

    def beat(self):
        """Sends one if it is time; the time of the next."""
        if time.monotonic() >= self.next:
            self.next = time.monotonic() + self.seconds
            # A machine that takes none is starting, or full of them.
            with contextlib.suppress(OSError):
                self.here.send(b".")
        return self.next


class Monitor:
    """QEMU's control socket (QMP), used for one thing."""

    def __init__(self):
        self.here, self.there = socket.socketpair()

    def arguments(self):
        return ["-chardev", f"socket,id=qmp,fd={self.there.fileno()}", "-mon", "chardev=qmp,mode=control"]

    def question_kernel(self):
        """Types the sysrq keys; the answers come on the console. The commands are few: nothing needs to read replies."""
        commands = [{"execute": "qmp_capabilities"}]
        for key in QUESTIONS:
            keys = [{"type": "qcode", "data": name} for name in ("alt", "sysrq", key)]
            commands.append({"execute": "send-key", "arguments": {"keys": keys}})
        for command in commands:
            self.here.sendall(json.dumps(command).encode() + b"\n")
            time.sleep(SECONDS_TO_ANSWER / len(commands))


def die_with_parent():
    ctypes.CDLL(None).prctl(PR_SET_PDEATHSIG, signal.SIGKILL)


class Silence(TimeoutError):
    """Nothing was heard for too long."""


def follow(streams, deadline, silence, pulse):
    """The exit code, once every stream has ended. None when there is none, TimeoutError when it takes too long, Silence
    when there is nothing to read for `silence` seconds."""
    heard = time.monotonic()
    selector = selectors.DefaultSelector()
    for stream in streams:
        selector.register(stream.here, selectors.EVENT_READ, stream)
    while selector.get_map():
        ends = [(deadline, TimeoutError), (heard + silence if silence else None, Silence)]
        end, error = min(((end, error) for end, error in ends if end is not None), key=lambda pair: pair[0], default=(None, None))
        left = None if end is None else end - time.monotonic()
        if left is not None and left <= 0:
            raise error
        if pulse:
            beat = pulse.beat() - time.monotonic()
            left = beat if left is None else min(left, beat)
        for key, _ in selector.select(left):
            heard = time.monotonic()
            if not key.data.read():
                selector.unregister(key.fileobj)
    codes = {stream.code for stream in streams}
    return None if None in codes else codes.pop()


def run(options, unpack):
    token = options.token.encode()
    streams = [Stream("stdout", sys.stdout.buffer, token), Stream("stderr", sys.stderr.buffer, token)]
    if unpack:
        streams.append(Stream("out", unpack.stdin, token))
    monitor = Monitor()
    pulse = Pulse(options.pulse) if options.pulse else None
    ends = [monitor, *streams, *([pulse] if pulse else [])]
    command = list(options.qemu)
    for end in ends:
        command += end.arguments()
    deadline = time.monotonic() + options.timeout if options.timeout else None
    with open(options.console + ".qemu", "w+b") as errors:
        machine = subprocess.Popen(
            command,
            stdin=None if options.tty else subprocess.DEVNULL,
            stdout=None if options.tty else errors,
            stderr=errors,
            pass_fds=[end.there.fileno() for end in ends],
            preexec_fn=die_with_parent,
        )
        for end in ends:
            end.there.close()
        try:
            code = follow(streams, deadline, options.silence, pulse)
        except Silence:
            monitor.question_kernel()
            complain(f"nothing heard for {options.silence:g} s", options.console)
            code = NO_ANSWER
        except TimeoutError:
            monitor.question_kernel()
            complain(f"no end after {options.timeout:g} s", options.console)
            code = TIMEOUT
        finally:
            machine.kill()
            machine.wait()
    if code is None:
        complain("the machine ended without an answer", options.console)
        code = NO_ANSWER
    if unpack and streams[-1].code is None:
        unpack.kill()
    return code


def complain(what, console):
    """Says what happened, with the end of the console and of what QEMU said."""
    print(f"testbed: {what}; the end of its console:", file=sys.stderr)
    for path in (console, console + ".qemu"):
        if os.path.exists(path):
            with open(path, errors="replace") as text:
                sys.stderr.writelines("  | " + line for line in text.readlines()[-CONSOLE_TAIL_LINES:])


def main():
    parser = argparse.ArgumentParser()
    parser.add_argument("--token", required=True, help="what ends a stream")
    parser.add_argument("--console", required=True, help="file that QEMU writes the kernel's console to")
    parser.add_argument("--timeout", type=float, help="seconds")
    parser.add_argument("--silence", type=float, help="seconds without output after which the machine counts as dead")
    parser.add_argument("--pulse", type=float, help="seconds between two interrupts that an idle machine gets")
    parser.add_argument("--out", help="directory for the files that the machine left in /out")
    parser.add_argument("--tty", action="store_true", help="the machine's terminal is ours")
    parser.add_argument("--remove", help="directory to remove at the end")
    parser.add_argument("qemu", nargs="+")
    options = parser.parse_args()
    signal.signal(signal.SIGTERM, lambda *_: sys.exit(143))
    signal.signal(signal.SIGHUP, lambda *_: sys.exit(129))
    # A reader that went away must not leave the machine running: let the write fail instead.
    signal.signal(signal.SIGPIPE, signal.SIG_IGN)
    terminal = subprocess.run(["stty", "-g"], stdout=subprocess.PIPE).stdout.strip() if options.tty else None
    unpack = None
    try:
        if options.out:
            os.makedirs(options.out, exist_ok=True)
            unpack = subprocess.Popen(["tar", "-x", "-C", options.out], stdin=subprocess.PIPE)
        code = run(options, unpack)
        if unpack:
            unpack.stdin.close()
            if unpack.wait() > 0 and code == 0:
                code = NO_ANSWER
        sys.exit(code)
    except KeyboardInterrupt:
        sys.exit(130)
    except BrokenPipeError:
        sys.exit(141)
    finally:
        if terminal:
            subprocess.run(["stty", terminal])
        if options.remove:
            shutil.rmtree(options.remove, ignore_errors=True)


if __name__ == "__main__":
    main()
