"""Times programs, in million instructions: under icount a millisecond of CLOCK_MONOTONIC is a million instructions."""

import os
import re
import select
import signal
import subprocess
import time

NS_PER_MI = 1_000_000
# For one program; more where a second is no number of instructions but a slow machine's.
DEADLINE_S = int(os.environ.get("BENCH_DEADLINE_S", "20"))
TRACING = "/sys/kernel/debug/tracing/"


class Failed(Exception):
    """A program did not do what it was started for; there is nothing to measure then."""


class Run:
    """A program from its start (`started`, ns) to the first byte of its output (`first`) and to its end (`total`)."""

    def __init__(self, argv, env=None, want=None, deadline_s=DEADLINE_S):
        errors = os.memfd_create("stderr")
        self.started = time.monotonic_ns()
        process = subprocess.Popen(
            argv, stdin=subprocess.DEVNULL, stdout=subprocess.PIPE, stderr=errors, env=env, process_group=0
        )
        try:
            select.select([process.stdout], [], [], deadline_s)
            first = time.monotonic_ns()
            output, _ = process.communicate(timeout=deadline_s)
        except subprocess.TimeoutExpired:
            os.killpg(process.pid, signal.SIGKILL)
            raise Failed(f"{' '.join(argv)}: no end after {deadline_s} s") from None
        end = time.monotonic_ns()
        self.first = (first - self.started) / NS_PER_MI
        self.total = (end - self.started) / NS_PER_MI
        self.output = output.decode(errors="replace")
        os.lseek(errors, 0, os.SEEK_SET)
        said = self.errors = os.read(errors, 1 << 20).decode(errors="replace")
        os.close(errors)
        if process.returncode != 0 or (want is not None and self.output.strip() != want):
            raise Failed(f"{' '.join(argv)}: exit code {process.returncode}, {self.output!r}, {said!r}")


class Trace:
    """What happened meanwhile, by the kernel's trace events; by default what was executed. An event costs a few thousand
    instructions."""

    EVENT = re.compile(r"-(\d+) .* (\d+)\.(\d{6}): sched_process_exec: filename=(\S+) ")

    def __init__(self, events=("sched/sched_process_exec",)):
        self.events = events

    def __enter__(self):
        self.write("trace_clock", "mono")
        self.write("trace", "")
        for event in self.events:
            self.write(f"events/{event}/enable", "1")
        return self

    def __exit__(self, *_):
        for event in self.events:
            self.write(f"events/{event}/enable", "0")
        with open(TRACING + "trace") as trace:
            self.text = trace.read()
        found = self.EVENT.findall(self.text)
        self.steps = [(int(s) * 10**9 + int(us) * 1000, os.path.basename(path), int(pid)) for pid, s, us, path in found]

    def since(self, origin_ns):
        """(Mi after `origin_ns`, program, process id) of each."""
        return [((at - origin_ns) / NS_PER_MI, program, pid) for at, program, pid in self.steps]

    def raw(self, pattern):
        """(ns, group, group) of each event that matches."""
        found = re.findall(r"-\d+ .* (\d+)\.(\d{6}): " + pattern, self.text)
        return [(int(s) * 10**9 + int(us) * 1000, *groups) for s, us, *groups in found]

    def spent(self, run):
        """Program → Mi until the first byte of `run`, by who had the processor (sched/sched_switch)."""
        spent, last = {}, run.started
        for at, program in self.raw(r"sched_switch: prev_comm=(.*?) prev_pid="):
            if run.started <= at <= run.started + run.first * NS_PER_MI:
                spent[program] = spent.get(program, 0) + (at - last) / NS_PER_MI
                last = at
        return spent

    @staticmethod
    def write(name, text):
        with open(TRACING + name, "w") as file:
            file.write(text)
