#!/usr/bin/python3
"""Compares histograms of system calls with the VMM's filter: syscalls.py TABLE.RS HISTOGRAM...

TABLE.RS holds the filter's table; a HISTOGRAM is tracefs' hist file with the keys common_pid.execname and id.syscall.
"""

import collections
import re
import sys

LINE = re.compile(r"common_pid: (.*?)\s+\[\s*\d+\], id: (?:sys_)?(\w+)\s*\[\s*(\d+)\s*\] \} hitcount:\s+(\d+)")
ENTRY = re.compile(r"^\s*(?:#\[.*?\] )?(\w+) SYS_\w+: .*, \"(.*)\";$")
# Names of a VMM's threads, beside those that begin with VM: and the sandbox's name. The first is the process before it has
# one: in the jail's steps, most of them before the filter, and then on its way into libkrun.
THREADS = ("nacelle-vmm", "VM:", "fc_vcpu", "fs worker", "block worker", "virtio-net", "vsock", "lifeline", "console", "libkrun")
# The kernel's names where they are not the table's.
ALIASES = {"newfstat": "fstat", "newfstatat": "newfstatat", "sendfile64": "sendfile", "newlstat": "lstat", "newstat": "stat"}


def main(table, *histograms):
    counts, threads = collections.Counter(), collections.defaultdict(set)
    for histogram in histograms:
        with open(histogram, errors="replace") as lines:
            for found in filter(None, map(LINE.search, lines)):
                if found[1].startswith(THREADS):
                    name = ALIASES.get(found[2], found[2])
                    counts[name] += int(found[4])
                    threads[name].add(re.sub(r"(?<=VM:).*|\s*\d+$", "", found[1]))
    with open(table) as lines:
        entries = {found[1]: found[2] for found in map(ENTRY.match, lines) if found}
    print(f"{len(entries)} calls in the table, {sum(name in counts for name in entries)} of them made")
    for name, why in entries.items():
        if name in counts:
            print(f"  {name:20} {counts[name]:10}  {', '.join(sorted(threads[name]))}")
    print("never made")
    for name, why in entries.items():
        if name not in counts:
            print(f"  {name:20} {why}")
    strangers = {name: counts[name] for name in counts if name not in entries and threads[name] != {"nacelle-vmm"}}
    if strangers:
        print("made and not in the table: refused, or made before the filter was there")
        for name, count in sorted(strangers.items()):
            print(f"  {name:20} {count:10}  {', '.join(sorted(threads[name]))}")


if __name__ == "__main__":
    main(*sys.argv[1:])
