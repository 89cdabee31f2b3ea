#!/usr/bin/python3
"""Measures inside the testbed, beside a containerd: measure.py [--repeat N] [--only PART…]

BENCHMARKS.md says what the parts are. All numbers are million executed instructions of the whole machine (Mi). In each
round every peer has its turn; the first round warms caches up and does not count.
"""

import argparse
import os
import subprocess
import sys

from peers import IMAGE, Bare, Containerd, Microsandbox, Nacelle
from stopwatch import Failed, Trace
from table import Table, told

PAYLOAD = os.path.dirname(os.path.abspath(__file__))
POD = "pod"
SHAPES = [(1, 128), (1, 512), (1, 1024)]
CHANCES = 3


class Bench:
    def __init__(self, repeat):
        self.repeat = repeat
        self.bare, self.nacelle, self.runc = Bare(PAYLOAD), Nacelle(), Containerd("io.containerd.runc.v2")
        self.msb = Microsandbox(PAYLOAD)

    def rounds(self, turn):
        """Calls `turn`, a generator of (table, row, value), once more than it counts."""
        tables = {}
        for number in range(-1, self.repeat):
            for table, row, value in self.persist(turn):
                tables[id(table)] = table
                if number >= 0:
                    table.add(row, value)
        for table in tables.values():
            table.show()

    def persist(self, turn):
        """One complete turn. An emulated machine within the emulated one hangs at times; it gets a second chance."""
        for chance in range(CHANCES):
            try:
                return list(told(turn()))
            except Failed as failure:
                print(f"round repeated: {failure}", file=sys.stderr)
                self.runc.clear()
                self.msb.clear()
        sys.exit(f"given up after {CHANCES} failures")

    def boot(self):
        """A pod comes, gets a second container and an exec, and goes."""
        base = "libkrun: process start → first write of PID 1"
        b1 = Table("B1  a machine of 1 vCPU and 128 MiB, until its guest speaks", base)
        split = Table("    nacelle, from containerd's Create on: phase, begin + duration")
        second = Table("    one more container in the pod: ctr → first byte", "runc")
        command = Table("    a command in the container: client → first byte", "runc")
        end = Table("    kill → all is gone", "runc")

        def turn():
            main, enter, first, last = self.bare.boot()
            yield b1, base, main + enter + first
            yield b1, "libkrun: krun_start_enter → first write of PID 1", first
            yield end, "libkrun: PID 1 ends → process ends", last
            self.runc.pod(POD)
            yield second, "runc", self.runc.second(POD).first
            yield command, "runc", self.runc.exec(POD).first
            yield end, "runc", self.runc.end(POD).total
            self.nacelle.pod(POD)
            phases = self.nacelle.phases()
            ready = sum(phases["boot"])
            yield b1, "nacelle: Create → agent ready", ready
            yield b1, "nacelle: VMM process start → agent ready", ready - phases["jail"][0]
            for name, (at, took) in phases.items():
                yield split, f"{name}: begin", at
                yield split, f"{name}: duration", took
            yield second, "nacelle", self.nacelle.second(POD).first
            yield command, "nacelle", self.nacelle.exec(POD).first
            yield end, "nacelle", self.nacelle.end(POD).total
            yield b1, "microsandbox: msb create", self.msb.create(POD, IMAGE).total
            yield command, "microsandbox", self.msb.exec(POD).first
            yield end, "microsandbox", self.msb.end(POD).total

        self.rounds(turn)

    def shapes(self):
        table = Table("B2  process start → first write of PID 1 (libkrun), → agent ready (nacelle)", "libkrun 1 × 128 MiB")

        def turn():
            for vcpus, mib in SHAPES:
                shape = f"{vcpus} × {mib} MiB"
                main, enter, first, _ = Bare(PAYLOAD, vcpus, mib).boot()
                yield table, f"libkrun {shape}", main + enter + first
                nacelle = Nacelle(vcpus, mib)
                nacelle.pod(POD)
                phases = nacelle.phases()
                yield table, f"nacelle {shape}", sum(phases["boot"]) - phases["jail"][0]
                nacelle.end(POD)

        self.rounds(turn)

    def start(self):
        """A container from nothing to its output."""
        first = Table("B3  a container from a cached image: client → first byte of /bin/echo", "runc (ctr run)")
        shim = Table("    of that: shim's start → first byte", "runc (ctr run)")
        total = Table("    client → client's end (container and pod are gone)", "runc (ctr run)")
        timelines = {}

        def turn():
            for name, peer in (("runc", self.runc), ("nacelle", self.nacelle)):
                with Trace() as trace:
                    run = peer.run()
                steps = timelines[name] = trace.since(run.started)
                began = next(at for at, program, _ in steps if program.startswith("containerd-shim"))
                row = f"{name} (ctr run)"
                yield first, row, run.first
                yield shim, row, run.first - began
                yield total, row, run.total
            for row, image in (("microsandbox (its image)", IMAGE), ("microsandbox (a directory)", self.msb.rootfs)):
                with Trace() as trace:
                    run = self.msb.run(image)
                timelines[row] = trace.since(run.started)
                yield first, row, run.first
                yield total, row, run.total

        self.rounds(turn)
        print("\n    programs started in the last round, Mi after the client")
        for name, steps in timelines.items():
            print(f"  {name}: " + ", ".join(f"{at:.0f} {program}" for at, program, _ in steps))


def main():
    parser = argparse.ArgumentParser()
    parser.add_argument("--repeat", type=int, default=5)
    parser.add_argument("--only", nargs="+", choices=["boot", "shapes", "start"], default=["boot", "shapes", "start"])
    options = parser.parse_args()
    subprocess.run(["ctr", "image", "import", f"{PAYLOAD}/busybox.tar"], check=True, stdout=subprocess.DEVNULL)
    bench = Bench(options.repeat)
    for part in options.only:
        getattr(bench, part)()


if __name__ == "__main__":
    main()
