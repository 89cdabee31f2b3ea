#!/usr/bin/python3
"""Measures inside the testbed, beside a containerd: measure.py [--repeat N] [--unit NAME]

Numbers are thousand executed instructions of the whole machine (Ki), or microseconds where its clock is the host's: for each
MiB that iperf3 has moved, and for each round trip of ping.
"""

import argparse
import json
import os
import re
import subprocess
import sys
import time

from stopwatch import Failed
from table import Table

PAYLOAD = os.path.dirname(os.path.abspath(__file__))
PLUGINS = "/usr/lib/cni"
IMAGE = "nacelle.test/busybox:latest"
PEERS = {"runc (veth)": "io.containerd.runc.v2", "nacelle (tap)": "io.containerd.nacelle.v2"}
SECONDS, PINGS = 1, 50
CHANCES = 3
# The node's own iperf3, for both, and the loader that it names, which is a link into /lib.
MOUNTS = [f"type=bind,src=/usr{lib},dst={lib or '/usr'},options=rbind:ro" for lib in ("", "/lib", "/lib64")]


def run(*argv, stdin=None, env=None, deadline_s=300):
    try:
        done = subprocess.run(argv, input=stdin, env=env, capture_output=True, text=True, timeout=deadline_s)
    except subprocess.TimeoutExpired:
        raise Failed(f"{' '.join(argv)}: no end after {deadline_s} s") from None
    if done.returncode:
        raise Failed(f"{' '.join(argv)}: exit code {done.returncode}, {done.stdout!r}, {done.stderr!r}")
    return done.stdout


class Pod:
    """A container in a namespace on a bridge, with an iperf3 that serves in it."""

    CONFIGURATION = {
        "cniVersion": "1.0.0", "name": "bench", "type": "bridge", "bridge": "bench0", "isGateway": True,
        "ipam": {
            "type": "host-local", "dataDir": "/run/bench-cni", "ranges": [[{"subnet": "10.97.0.0/24"}]],
            "routes": [{"dst": "0.0.0.0/0"}],
        },
    }

    def __init__(self, runtime):
        run("ip", "netns", "add", "bench")
        run("ip", "-n", "bench", "link", "set", "lo", "up")
        ips = json.loads(self.plugin("ADD"))["ips"]
        self.ip, self.gateway = ips[0]["address"].split("/")[0], ips[0]["gateway"]
        mounts = [word for mount in MOUNTS for word in ("--mount", mount)]
        options = ["--runtime", runtime, "--with-ns", "network:/run/netns/bench", *mounts]
        run("ctr", "run", "--detach", *options, IMAGE, "bench", "/usr/bin/iperf3", "-s")
        self.execs = 0

    def plugin(self, command):
        words = {"COMMAND": command, "CONTAINERID": "bench", "NETNS": "/run/netns/bench", "IFNAME": "eth0", "PATH": PLUGINS}
        env = {**os.environ, **{f"CNI_{name}": word for name, word in words.items()}}
        return run(f"{PLUGINS}/bridge", stdin=json.dumps(self.CONFIGURATION), env=env)

    def exec(self, *argv):
        self.execs += 1
        return run("ctr", "task", "exec", "--exec-id", f"e{self.execs}", "bench", *argv)

    def iperf(self, *options):
        """Ki for each MiB: under icount a second is a million of them. For a time, and not for a number of bytes, which iperf3
        looks at once a second."""
        for chance in range(20):
            try:
                said = json.loads(run("iperf3", "-c", self.ip, "-t", str(SECONDS), "-J", *options))
                break
            except Failed:
                # It does not listen yet.
                if chance == 19:
                    raise
                time.sleep(1)
        return said["end"]["sum_received"]["seconds"] * 1e6 / (said["end"]["sum_received"]["bytes"] / (1 << 20))

    @staticmethod
    def average(said):
        """Ki for each round trip: they are printed in milliseconds."""
        return float(re.search(r"= [\d.]+/([\d.]+)/", said).group(1)) * 1000

    def clear(self):
        for argv in (
            ["ctr", "task", "delete", "--force", "bench"], ["ctr", "container", "delete", "bench"],
            ["ip", "netns", "del", "bench"], ["ip", "link", "del", "bench0"], ["rm", "-rf", "/run/bench-cni"],
        ):
            subprocess.run(argv, capture_output=True)


def measure(runtime):
    """(what, value) of one pod."""
    Pod.clear(None)
    pod = Pod(runtime)
    yield "in", pod.iperf()
    yield "out", pod.iperf("-R")
    yield "ping in", Pod.average(run("ping", "-q", "-c", str(PINGS), "-i", "0.01", pod.ip))
    yield "ping out", Pod.average(pod.exec("ping", "-q", "-c", str(PINGS), "-i", "0.01", pod.gateway))
    pod.clear()


def main():
    parser = argparse.ArgumentParser()
    parser.add_argument("--repeat", type=int, default=3)
    parser.add_argument("--unit", default="Ki")
    options = parser.parse_args()
    run("ctr", "image", "import", f"{PAYLOAD}/busybox.tar")
    base = next(iter(PEERS))
    tables = {
        "in": Table(f"B14 iperf3, node → container: {options.unit} a MiB", base),
        "out": Table(f"    iperf3, container → node: {options.unit} a MiB", base),
        "ping in": Table(f"    ping, node → container and back: {options.unit}", base),
        "ping out": Table(f"    ping, container → node and back: {options.unit}", base),
    }
    for number in range(-1, options.repeat):
        for name, runtime in PEERS.items():
            for chance in range(CHANCES):
                try:
                    values = list(measure(runtime))
                    break
                except Failed as failure:
                    print(f"round repeated: {failure}", file=sys.stderr)
            else:
                sys.exit(f"given up after {CHANCES} failures")
            print(f"round {number + 1} of {options.repeat}, {name}: done", file=sys.stderr)
            if number >= 0:
                for what, value in values:
                    tables[what].add(name, value)
    for table in tables.values():
        table.show()


if __name__ == "__main__":
    main()
