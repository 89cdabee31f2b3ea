"""The image nacelle.test/debian-python: debian_python.py OUTPUT BASE.tar PYTHON.tar PACKAGE.deb

PYTHON.tar is a Debian tree that holds BASE.tar's and Python. Layers:

    1  base      BASE.tar
    2  python    what PYTHON.tar has beyond it
    3  removals  whiteouts of a file and of a directory, and an opaque directory with one new file in it
    4  app       /app/hello.py, which says what it sees, /app/kinds: one of every kind of file, and /app/packages: a package for
                 dpkg and one for pip (gzip)
"""

import hashlib
import io
import os
import sys
import tarfile
import zipfile

import oci

# No use in a container, and different at each build.
SKIPPED = ("dev/", "var/lib/apt/", "var/lib/dpkg/", "var/cache/", "var/log/", "etc/apt/", "proc/", "sys/")
HELLO = os.path.join(os.path.dirname(__file__), "hello.py")


def entries(tar):
    """The entries of a tree's tar by name, in order, each with what makes two entries the same."""
    found = {}
    for entry in tar:
        entry.name = entry.name.removeprefix("./").rstrip("/")
        if entry.name in ("", ".") or (entry.name + "/").startswith(SKIPPED):
            continue
        entry.linkname = entry.linkname.removeprefix("./") if entry.islnk() else entry.linkname
        data = hashlib.sha256(tar.extractfile(entry).read()).digest() if entry.isreg() else None
        found[entry.name] = (entry, (entry.type, entry.mode, entry.uid, entry.gid, entry.linkname, data))
    return found


def tree_layer(tar, wanted, below):
    """A layer of `wanted` without what is the same in `below`, but with the directories on the way to the rest."""
    changed = {name for name, (_, key) in wanted.items() if name not in below or below[name][1] != key}
    parents = set()
    for name in changed:
        while name := os.path.dirname(name):
            parents.add(name)
    layer = oci.Layer()
    for name, (entry, _) in wanted.items():
        if name in changed or name in parents:
            layer.copy(entry, tar.extractfile(entry) if entry.isreg() else None)
    return layer


def base_layer(tar, wanted):
    layer = tree_layer(tar, wanted, {})
    # The tree is unpacked, not configured; these two files are what its configuration would have left.
    for name in ("passwd", "group"):
        master, _ = wanted[f"usr/share/base-passwd/{name}.master"]
        layer.add(f"etc/{name}", tar.extractfile(master).read())
    return layer


def removals_layer():
    layer = oci.Layer(compress=True)
    layer.add("etc/.wh.issue", b"")
    layer.add("usr/share/.wh.lintian", b"")
    layer.add("usr/share/base-files")
    layer.add("usr/share/base-files/.wh..wh..opq", b"")
    layer.add("usr/share/base-files/replacement", b"the only file here\n")
    return layer


def wheel():
    """A package as pip takes it: one module, and what `WHEEL`, `METADATA` and `RECORD` have to say."""
    out = io.BytesIO()
    info = "greeting-1.0.dist-info"
    files = {
        "greeting.py": "WORDS = 'hello from a wheel'\n",
        f"{info}/METADATA": "Metadata-Version: 2.1\nName: greeting\nVersion: 1.0\n",
        f"{info}/WHEEL": "Wheel-Version: 1.0\nGenerator: nacelle\nRoot-Is-Purelib: true\nTag: py3-none-any\n",
        f"{info}/RECORD": f"greeting.py,,\n{info}/METADATA,,\n{info}/WHEEL,,\n{info}/RECORD,,\n",
    }
    with zipfile.ZipFile(out, "w") as archive:
        for name, text in files.items():
            archive.writestr(zipfile.ZipInfo(name), text)
    return out.getvalue()


def app_layer(package):
    layer = oci.Layer(compress=True)
    layer.add("app")
    with open(HELLO, "rb") as hello:
        layer.add("app/hello.py", hello.read(), mode=0o755)
    layer.add("app/packages")
    with open(package, "rb") as deb:
        layer.add("app/packages/hello.deb", deb.read())
    layer.add("app/packages/greeting-1.0-py3-none-any.whl", wheel())
    kinds = "app/kinds"
    layer.add(kinds)
    layer.add(f"{kinds}/sticky", mode=0o1777)
    layer.add(f"{kinds}/empty", b"")
    layer.add(f"{kinds}/private", b"for its owner alone\n", mode=0o600, uid=1000, gid=1000)
    layer.add(f"{kinds}/setuid", b"#!/bin/sh\n", mode=0o4755)
    layer.add(f"{kinds}/big", bytes(range(256)) * 8192)
    layer.add(f"{kinds}/hardlink", kind=tarfile.LNKTYPE, link=f"{kinds}/private", mode=0o600, uid=1000, gid=1000)
    layer.add(f"{kinds}/symlink", link="private")
    layer.add(f"{kinds}/dangling", link="/no/such/file")
    layer.add(f"{kinds}/fifo", kind=tarfile.FIFOTYPE, mode=0o644)
    layer.add(f"{kinds}/attributes", b"", xattrs={"user.nacelle": "kept"})
    layer.add(f"{kinds}/{'long' * 50}", b"")
    layer.add(f"{kinds}/Grüße 你好", b"")
    return layer


def main(output, base, python, package):
    with tarfile.open(base) as lower, tarfile.open(python) as upper:
        base_entries, python_entries = entries(lower), entries(upper)
        layers = [
            base_layer(lower, base_entries),
            tree_layer(upper, python_entries, base_entries),
            removals_layer(),
            app_layer(package),
        ]
    oci.archive(
        output,
        "nacelle.test/debian-python:latest",
        [layer.finish() for layer in layers],
        Env=["PATH=/usr/local/bin:/usr/bin:/usr/sbin", "LANG=C.UTF-8", "GREETING=hello from the app layer"],
        WorkingDir="/app",
        Cmd=["python3", "/app/hello.py"],
    )


if __name__ == "__main__":
    main(*sys.argv[1:])
