#!/usr/bin/python3
"""Measures inside the testbed, beside a containerd: layers.py [--repeat N] [--layers N…]. All numbers are Mi, as in `bench boot`.

Each round is told on standard error as it ends: a machine that runs out of time has not run for nothing.
"""

import argparse
import os
import subprocess
import sys

import peers
from peers import Containerd, Nacelle
from stopwatch import Failed, Trace
from table import Table

PAYLOAD = os.path.dirname(os.path.abspath(__file__))
IMAGES = {1: "busybox", 30: "layers-30", 100: "layers-100"}


def main():
    parser = argparse.ArgumentParser()
    parser.add_argument("--repeat", type=int, default=3)
    parser.add_argument("--layers", type=int, nargs="+", choices=IMAGES, default=list(IMAGES))
    arguments = parser.parse_args()
    images = {layers: IMAGES[layers] for layers in arguments.layers}
    for image in images.values():
        subprocess.run(["ctr", "image", "import", f"{PAYLOAD}/{image}.tar"], check=True, stdout=subprocess.DEVNULL)
    runc, nacelle = Containerd("io.containerd.runc.v2"), Nacelle(memory_mib=256)
    first = Table("B12  a container from cached layers: client → first byte of /bin/echo", "nacelle: 1 layers")
    more = Table("     one more container of the image in a pod that runs: ctr → first byte", "nacelle: 1 layers")
    phases = Table("     nacelle, the pod's start: duration of a phase")
    for number in range(-1, arguments.repeat):
        for layers, image in images.items():
            peers.IMAGE = f"nacelle.test/{image}:latest"
            for chance in range(3):
                try:
                    values = [(first, f"runc: {layers} layers", runc.run().first)]
                    values.append((first, f"nacelle: {layers} layers", nacelle.run().first))
                    nacelle.pod("pod")
                    found = nacelle.phases()
                    values += [(phases, f"{layers} layers: {name}", found[name][1]) for name in ("layers", "create pod-main")]
                    values.append((more, f"nacelle: {layers} layers", nacelle.second("pod").first))
                    nacelle.end("pod")
                    break
                except Failed as failure:
                    print(f"round repeated: {failure}", file=sys.stderr)
                    nacelle.clear()
            else:
                sys.exit("given up after 3 failures")
            told = ", ".join(f"{row} {value:.1f}" for _, row, value in values)
            print(f"round {number}: {told}", file=sys.stderr, flush=True)
            if number >= 0:
                for table, row, value in values:
                    table.add(row, value)
    for table in (first, more, phases):
        table.show()
    print("\n     one more container, by who had the processor (more than 0.5; swapper is idle)")
    for layers, image in images.items():
        peers.IMAGE = f"nacelle.test/{image}:latest"
        nacelle.pod("pod")
        with Trace(["sched/sched_switch"]) as trace:
            run = nacelle.second("pod")
        nacelle.end("pod")
        programs = sorted(trace.spent(run).items(), key=lambda item: -item[1])
        print(f"  {layers} layers: " + ", ".join(f"{program} {mi:.1f}" for program, mi in programs if mi > 0.5))


if __name__ == "__main__":
    main()
