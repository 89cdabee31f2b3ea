"""The contest of `bench convert`: wall time, processor time and peak memory of each competitor, and ratios to the first.

Memory below some 15 MiB is this program's own, which a child starts with.
"""

import argparse
import os
import random
import shutil
import statistics
import subprocess
import time

parser = argparse.ArgumentParser()
parser.add_argument("--nacelle", required=True)
parser.add_argument("--microsandbox", required=True)
parser.add_argument("--work", required=True)
parser.add_argument("--repeat", type=int, default=7)
arguments = parser.parse_args()
os.chdir(arguments.work)
NACELLE, PEER = arguments.nacelle, arguments.microsandbox


def make_inputs():
    """12,000 small files, four large ones, 100,000 tiny ones; half of every file compresses, half does not. The same on each run."""
    dice = random.Random(12)
    trees = [("small", 12_000, (0, 16 << 10)), ("large", 4, (96 << 20, 128 << 20)), ("many", 100_000, (0, 4 << 10))]
    for tree, count, sizes in trees:
        for number in range(count):
            folder = f"{tree}/{number % 97}/{number % 7}"
            os.makedirs(folder, exist_ok=True)
            size = dice.randrange(*sizes)
            with open(f"{folder}/file-{number}", "wb") as file:
                file.write(dice.randbytes(size // 2) + b"some text, again and again\n" * (size // 54))
        subprocess.run(["tar", "--sort=name", "-C", tree, "-cf", f"{tree}.tar", "."], check=True)
        if tree == "many":
            continue
        with open(f"{tree}.tar.gz", "wb") as out:
            subprocess.run(["pigz", "-c", f"{tree}.tar"], stdout=out, check=True)
        subprocess.run(["zstd", "-q", "-k", f"{tree}.tar"], check=True)


def check(tree):
    """What fsck.erofs takes out of our images is what was put in."""
    for source in [[tree], ["--tar", f"{tree}.tar"], ["--tar", f"{tree}.tar.gz"]]:
        subprocess.run([NACELLE, "layer", "build", *source, "-o", "checked", "--verify"], check=True, stdout=subprocess.DEVNULL)
        subprocess.run(["fsck.erofs", "--extract=extracted", "checked"], check=True, stdout=subprocess.DEVNULL)
        subprocess.run(["diff", "-r", "--no-dereference", tree, "extracted"], check=True)
        shutil.rmtree("extracted")


def run_once(command, discard):
    """Wall and processor seconds and peak KiB of one run; its output is gone afterwards."""
    start = time.monotonic()
    child = subprocess.Popen(command, shell=True, stdout=subprocess.DEVNULL, stderr=subprocess.DEVNULL)
    _, status, usage = os.wait4(child.pid, 0)
    child.returncode = os.waitstatus_to_exitcode(status)
    if child.returncode != 0:
        raise SystemExit(f"{command}: exit code {child.returncode}")
    wall = time.monotonic() - start
    if discard:
        shutil.rmtree("out") if os.path.isdir("out") else os.path.exists("out") and os.remove("out")
    return wall, usage.ru_utime + usage.ru_stime, usage.ru_maxrss


def contest(title, competitors):
    """Rounds in which each competitor runs once; who makes thousands of files, only in two of them."""
    results = {name: [] for name, _ in competitors}
    for turn in range(arguments.repeat + 1):
        for name, command in competitors:
            if turn > 1 and name in SLOW:
                continue
            result = run_once("exec " + command, True)
            if turn > 0:
                results[name].append(result)
    print(f"\n{title}\n{'':<34}{'wall min':>10}{'median':>10}{'ratio':>8}{'cpu min':>10}{'ratio':>8}{'memory':>10}")
    first = None
    for name, runs in results.items():
        wall, cpu = min(r[0] for r in runs), min(r[1] for r in runs)
        first = first or (wall, max(cpu, 1e-4))
        median, memory = statistics.median(r[0] for r in runs), max(r[2] for r in runs)
        print(
            f"{name:<34}{wall * 1e3:>7.1f} ms{median * 1e3:>7.1f} ms{wall / first[0]:>8.2f}"
            f"{cpu * 1e3:>7.1f} ms{cpu / first[1]:>8.2f}{memory / 1024:>6.1f} MiB"
        )


# In a process of its own: a child starts with its parent's peak of memory.
if os.fork() == 0:
    make_inputs()
    os._exit(0)
if os.wait()[1] != 0:
    raise SystemExit("the inputs could not be made")
check("small")
build = f"{NACELLE} layer build"
SLOW = {"cp -a", "tar -x"}
# What writes one file has it synced within its time and its processor time, as nacelle does.
synced = "sh -c '{} && exec sync out'"
for tree in ["small", "large"]:
    size = os.path.getsize(f"{tree}.tar") >> 20
    contest(f"{tree}: a directory of {size} MiB", [
        ("nacelle layer build", f"{build} {tree} -o out"),
        ("the same, --index", f"{build} {tree} -o out --index"),
        ("mkfs.erofs", synced.format(f"mkfs.erofs --quiet out {tree}")),
        ("cp -a", f"cp -a {tree} out"),
    ])
    contest(f"{tree}: a tar archive of {size} MiB", [
        ("cat", synced.format(f"cat {tree}.tar > out")),
        ("nacelle layer build --tar", f"{build} --tar {tree}.tar -o out"),
        ("the same, --diff-id", f"{build} --tar {tree}.tar -o out --diff-id"),
        ("tar -x", f"sh -c 'mkdir out && exec tar -C out -xf {tree}.tar'"),
        ("sha256sum", f"sha256sum {tree}.tar"),
        ("mkfs.erofs --tar=f", synced.format(f"mkfs.erofs --quiet --tar=f --sort=none -Enoinline_data out {tree}.tar")),
        ("mkfs.erofs --tar=i (names only)", synced.format(f"mkfs.erofs --quiet --tar=i out {tree}.tar")),
        ("microsandbox-image", synced.format(f"{PEER} layer none {tree}.tar out")),
    ])
    contest(f"{tree}: the same, gzip", [
        ("pigz -dc", f"pigz -dc {tree}.tar.gz"),
        ("nacelle layer build --tar", f"{build} --tar {tree}.tar.gz -o out"),
        ("the same, --diff-id", f"{build} --tar {tree}.tar.gz -o out --diff-id"),
        ("microsandbox-image", synced.format(f"{PEER} layer gzip {tree}.tar.gz out")),
    ])
    contest(f"{tree}: the same, zstd", [
        ("zstd -dc", f"zstd -qdc {tree}.tar.zst"),
        ("sha256sum", f"sha256sum {tree}.tar"),
        ("nacelle layer build --tar", f"{build} --tar {tree}.tar.zst -o out"),
        ("the same, --diff-id", f"{build} --tar {tree}.tar.zst -o out --diff-id"),
        ("microsandbox-image", synced.format(f"{PEER} layer zstd {tree}.tar.zst out")),
    ])
contest("100,000 tiny files: what it takes of memory", [
    ("mkfs.erofs", synced.format("mkfs.erofs --quiet out many")),
    ("nacelle layer build", f"{build} many -o out"),
    ("nacelle layer build --tar", f"{build} --tar many.tar -o out"),
])
contest("an upper disk of 10 GiB", [
    ("mkfs.ext4", "sh -c 'truncate -s 10G out && exec mkfs.ext4 -q -F out'"),
    ("microsandbox-image", f"{PEER} upper out {10 << 30}"),
    ("its process alone", f"{PEER} nothing"),
    ("nacelle upper create", f"{NACELLE} upper --data-dir . create --size 10G out"),
    ("its process alone (--version)", f"{NACELLE} --version"),
])
