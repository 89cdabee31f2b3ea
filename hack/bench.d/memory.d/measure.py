#!/usr/bin/python3
"""Measures inside the testbed, beside a containerd: measure.py [--pods N]

Numbers are MiB a pod: the proportional set size of all processes that came with the pods, divided by the number of pods.
"""

import argparse
import os
import subprocess
import time

from peers import IMAGE, Bare, Microsandbox, Nacelle
from table import Table

PAYLOAD = os.path.dirname(os.path.abspath(__file__))
IDLE_S = 5
# A mapping so large is a guest's memory; the VMMs' own are all smaller.
GUEST_KIB = 64 << 10


def processes():
    """Ids of all that are no kernel threads."""
    found = set()
    for name in os.listdir("/proc"):
        try:
            if name.isdigit() and os.readlink(f"/proc/{name}/exe"):
                found.add(int(name))
        except OSError:
            continue
    return found


def memory(pid):
    """Pss in KiB: (of the guest's memory, of the rest)."""
    guest = own = size = 0
    with open(f"/proc/{pid}/smaps") as maps:
        for line in maps:
            name, _, value = line.partition(":")
            if name == "Size":
                size = int(value.split()[0])
            elif name == "Pss" and size >= GUEST_KIB:
                guest += int(value.split()[0])
            elif name == "Pss":
                own += int(value.split()[0])
    return guest, own


class Idle:
    """Bare libkrun with a guest that stays."""

    def __init__(self):
        self.bare = Bare(PAYLOAD, image="idle.erofs")
        self.watchers = []

    def start(self, _):
        self.watchers.append(subprocess.Popen(self.bare.argv, stdout=subprocess.DEVNULL, stderr=subprocess.DEVNULL))

    def mine(self, pids):
        """Without the program that watches a machine."""
        return pids - {watcher.pid for watcher in self.watchers}

    def end(self, _):
        watcher = self.watchers.pop()
        subprocess.run(["pkill", "-KILL", "-P", str(watcher.pid)], check=True)
        watcher.wait()


class Pods:
    """A peer whose processes are all the pod's."""

    def __init__(self, start, end):
        self.start, self.end = start, end

    @staticmethod
    def mine(pids):
        return pids


def main():
    parser = argparse.ArgumentParser()
    parser.add_argument("--pods", type=int, default=5)
    options = parser.parse_args()
    subprocess.run(["ctr", "image", "import", f"{PAYLOAD}/busybox.tar"], check=True, stdout=subprocess.DEVNULL)
    nacelle, msb = Nacelle(), Microsandbox(PAYLOAD)
    peers = {
        "libkrun": Idle(),
        "nacelle": Pods(nacelle.pod, nacelle.end),
        "microsandbox": Pods(lambda name: msb.create(name, IMAGE), msb.end),
    }
    whole = Table(f"B7  an idle pod of 1 vCPU and 128 MiB: MiB (Pss, mean of {options.pods})", "libkrun")
    own = Table("    without the guest's memory", "libkrun")
    rows = Table("    nacelle, by program")
    for name, peer in peers.items():
        before = processes()
        pods = [f"{name}{number}" for number in range(options.pods)]
        for pod in pods:
            peer.start(pod)
        time.sleep(IDLE_S)
        total = rest = 0
        programs = {}
        for pid in peer.mine(processes() - before):
            guest_kib, own_kib = memory(pid)
            total += guest_kib + own_kib
            rest += own_kib
            program = os.path.basename(os.readlink(f"/proc/{pid}/exe"))
            programs[program] = programs.get(program, 0) + guest_kib + own_kib
        whole.add(name, total / 1024 / options.pods)
        own.add(name, rest / 1024 / options.pods)
        if name == "nacelle":
            for program, kib in programs.items():
                rows.add(program, kib / 1024 / options.pods)
        for pod in pods:
            peer.end(pod)
    for table in (whole, own, rows):
        table.show()


if __name__ == "__main__":
    main()
