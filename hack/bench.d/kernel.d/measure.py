#!/usr/bin/python3
"""Measures two guest kernels inside the testbed, beside a containerd: measure.py [--repeat N] [--only PART…]

All numbers but sizes are million executed instructions of the whole machine (Mi). In each round both kernels have their
turn at every shape; the first round warms caches up and does not count.
"""

import argparse
import glob
import json
import os
import re
import subprocess
import sys
import time

import peers
from peers import Bare, Containerd, Nacelle
from stopwatch import NS_PER_MI, Failed, Run, Trace
from table import Table, told

PAYLOAD = os.path.dirname(os.path.abspath(__file__))
KERNELS = ["libkrunfw", "own"]
THUNKS = "own-thunks"
IMAGES = ["busybox", "layers-30"]
SHAPES = [(1, 128), (2, 128), (4, 128), (1, 512), (1, 1024), (1, 4096)]
POD = "pod"
CHANCES = 3
# Long enough for free pages to be reported to the host (mm/page_reporting.c: two seconds after they came free).
SETTLE_S = 10


def image(kernel):
    """Its file. `own` is the one that the shim takes on this machine (src/protocol/src/processor.rs)."""
    if kernel == "own":
        kernel = "own-plain" if returns_plainly() else THUNKS
    return f"{PAYLOAD}/vmlinux-{kernel}"


def returns_plainly():
    for fault in ("retbleed", "spec_rstack_overflow", "indirect_target_selection"):
        with open(f"/sys/devices/system/cpu/vulnerabilities/{fault}") as file:
            if file.read() != "Not affected\n":
                return False
    return True


class Machine(Nacelle):
    """nacelle with a kernel and a shape."""

    def __init__(self, kernel, vcpus, memory_mib, verity="off"):
        config = f"/run/bench-{kernel}-{vcpus}-{memory_mib}-{verity}.toml"
        with open(config, "w") as file:
            file.write(f'[vm]\nkernel = "{image(kernel)}"\nvcpus = {vcpus}\nmemory_mib = {memory_mib}\n')
            file.write(f'boot_timeout_seconds = 10\n[rootfs]\nverity = "{verity}"\n')
        Containerd.__init__(self, "io.containerd.nacelle.v2", config)

    def ready(self):
        """From the VMM's start to the agent's first word."""
        self.pod(POD)
        phases = self.phases()
        self.end(POD)
        return sum(phases["boot"]) - phases["jail"][0]

    def true(self):
        """From the VMM's start to the return of `ctr run … /bin/true`: the VM is gone then."""
        with Trace() as trace:
            run = self.run(command=["/bin/true"], want="")
        began = next(at for at, program, _ in trace.since(run.started) if program == "nacelle-vmm")
        return run.total - began

    def memory(self):
        """Bytes that an idle pod's VMM has for itself alone."""
        self.pod(POD)
        time.sleep(SETTLE_S)
        (status,) = glob.glob("/run/nacelle/default/*/status.json")
        with open(status) as file:
            pid = json.load(file)["vmm_pid"]
        with open(f"/proc/{pid}/smaps_rollup") as file:
            kib = {key: int(value) for key, value in re.findall(r"^(\w+): +(\d+) kB$", file.read(), re.MULTILINE)}
        self.end(POD)
        return (kib["Private_Clean"] + kib["Private_Dirty"]) / 1024


def rounds(repeat, turn):
    """Calls `turn`, a generator of (table, row, value), once more than it counts, and again when a machine hangs."""
    tables = {}
    for number in range(-1, repeat):
        for chance in range(CHANCES):
            try:
                values = list(told(turn(), f"round {number}: "))
                break
            except Failed as failure:
                print(f"round repeated: {failure}", file=sys.stderr)
                Containerd.clear()
        else:
            sys.exit(f"given up after {CHANCES} failures")
        for table, row, value in values:
            tables[id(table)] = table
            if number >= 0:
                table.add(row, value)
    for table in tables.values():
        table.show()


def boot(repeat, shapes):
    tables = {
        "pid1": "VMM start → PID 1 (bare libkrun)",
        "ready": "VMM start → agent ready (nacelle)",
        "true": "VMM start → end of `ctr run /bin/true` (nacelle)",
    }
    tables = {
        name: {shape: Table(f"{title}, {shape[0]} vCPU, {shape[1]} MiB", "libkrunfw") for shape in shapes}
        for name, title in tables.items()
    }

    def turn():
        for shape in shapes:
            for kernel in KERNELS + [THUNKS] * (shape == shapes[0]):
                main, enter, first, _ = Bare(PAYLOAD, *shape, kernel=image(kernel)).boot()
                yield tables["pid1"][shape], kernel, main + enter + first
                machine = Machine(kernel, *shape)
                yield tables["ready"][shape], kernel, machine.ready()
                yield tables["true"][shape], kernel, machine.true()

    rounds(repeat, turn)
    base = shapes[0]
    print(f"\nour own kernel against itself at {base[0]} vCPU and {base[1]} MiB")
    for name, of in tables.items():
        ratios = (f"{s[0]} × {s[1]} MiB {of[s].median('own') / of[base].median('own'):.2f}" for s in shapes if s != base)
        print(f"  {name:<6} {', '.join(ratios)}")


def memory(repeat):
    size = Table("size of the image, MiB", "libkrunfw")
    sizes = (128, 512)  # the first is B7's
    idle = {of: Table(f"private memory of an idle pod's VMM, 1 vCPU, {of} MiB, MiB", "libkrunfw") for of in sizes}

    def turn():
        for kernel in KERNELS:
            yield size, kernel, os.stat(image(kernel)).st_size / (1 << 20)
            for of in sizes:
                yield idle[of], kernel, Machine(kernel, 1, of).memory()

    rounds(repeat, turn)


def verity(repeat):
    """What a start costs more when the guest checks its layers, which are in the cache: one, and thirty merged ones."""
    title = "a container from cached layers: client → first byte of /bin/echo, rootfs.verity"
    tables = {image: Table(f"{title}, {image}", "off") for image in IMAGES}

    def turn():
        for image, table in tables.items():
            peers.IMAGE = f"nacelle.test/{image}:latest"
            for setting in ("off", "on"):
                yield table, setting, Machine("own", 1, 256, setting).run().first
        peers.IMAGE = f"nacelle.test/{IMAGES[0]}:latest"

    rounds(repeat, turn)


def symbols():
    """Names of the image's functions by address: it has none itself, and prints addresses."""
    with open(f"{PAYLOAD}/System.map") as lines:
        return {int(address, 16): name for address, kind, name in map(str.split, lines) if kind in "tT"}


def waits(_):
    """The kernel's own account of its boot, in Mi since its clock began (what it says costs more than what it does), and what
    the host does for it meanwhile."""
    args = ["initcall_debug", "loglevel=8", "log_buf_len=1M"]
    said = Bare(PAYLOAD, kernel=image("own"), args=args).console()
    calls = re.findall(r"\[ *(\d+\.\d+)\] initcall (0x\w+) returned -?\d+ after (\d+) usecs", said)
    names = symbols()
    print(f"\ninitcalls of our own kernel, {sum(int(call[2]) for call in calls) / 1000:.1f} Mi in all; those that take longest")
    for at, address, took in sorted(calls, key=lambda call: -int(call[2]))[:12]:
        print(f"  {int(took) / 1000:7.1f}  {names.get(int(address, 16), address)} (done at {float(at) * 1000:.1f})")
    exits()


def exits():
    """What the host does for one boot of each kernel, by KVM's trace: how often, and how long in all."""
    events = ["kvm/kvm_entry", "kvm/kvm_exit", "kvm/kvm_page_fault"]
    for kernel in KERNELS:
        with Trace(events) as trace:
            Bare(PAYLOAD, kernel=image(kernel)).boot()
        spent, regions, left = {}, set(), None
        for at, event, rest in trace.raw(r"(kvm_\w+): (.*)"):
            if event == "kvm_page_fault":
                regions.add(int(re.search(r"address (?:0x)?([0-9a-f]+)", rest)[1], 16) >> 21)
            elif event == "kvm_exit":
                left = at, re.search(r"reason (\S+)", rest)[1]
            elif left:
                count, total = spent.get(left[1], (0, 0))
                spent[left[1]] = count + 1, total + (at - left[0]) / NS_PER_MI
                left = None
        print(f"\nwhat the host does for the guest of {kernel}'s kernel: exits, Mi; {len(regions)} regions of 2 MiB are touched")
        for reason, (count, total) in sorted(spent.items(), key=lambda item: -item[1][1])[:6]:
            print(f"  {reason:<12} {count:6} {total:8.1f}")


def main():
    parser = argparse.ArgumentParser()
    parser.add_argument("--repeat", type=int, default=3)
    parts = {"memory": memory, "waits": waits, "verity": verity}
    parser.add_argument("--only", nargs="+", choices=[*parts, "boot"], default=[*parts, "boot"])
    parser.add_argument("--shapes", nargs="+", default=SHAPES, type=lambda text: tuple(map(int, text.split("x"))))
    options = parser.parse_args()
    # What a machine said before it ran out of time counts, too.
    sys.stdout.reconfigure(line_buffering=True)
    for image in IMAGES:
        subprocess.run(["ctr", "image", "import", f"{PAYLOAD}/{image}.tar"], check=True, stdout=subprocess.DEVNULL)
    for part in options.only:
        boot(options.repeat, options.shapes) if part == "boot" else parts[part](options.repeat)


if __name__ == "__main__":
    main()
