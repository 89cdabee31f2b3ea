"""The small images: busybox.py OUTPUT NAME BUSYBOX PROBE

NAME is busybox, layers-N (busybox, then N - 1 layers that each add /layers/NNN and overwrite /layer-top), or pause.
BUSYBOX is a static busybox; it is asked for its applets. PROBE is probe.c, built statically.
"""

import subprocess
import sys

import oci

PASSWD = """\
root:x:0:0:root:/root:/bin/sh
www-data:x:33:33:www-data:/var/www:/bin/false
user:x:1000:1000:user:/home/user:/bin/sh
nobody:x:65534:65534:nobody:/home:/bin/false
"""
GROUP = """\
root:x:0:
www-data:x:33:
user:x:1000:
extra:x:2000:user
more:x:50000:user
nogroup:x:65534:
"""
ENV = ["PATH=/usr/local/sbin:/usr/local/bin:/usr/sbin:/usr/bin:/sbin:/bin"]


def contents(path):
    with open(path, "rb") as file:
        return file.read()


def busybox_layer(busybox, probe):
    layer = oci.Layer()
    for name in ("bin", "dev", "etc", "home", "proc", "sbin", "sys", "usr", "usr/bin", "usr/sbin", "var", "var/www"):
        layer.add(name)
    layer.add("root", mode=0o700)
    layer.add("tmp", mode=0o1777)
    layer.add("home/user", uid=1000, gid=1000)
    layer.add("etc/passwd", PASSWD.encode())
    layer.add("etc/group", GROUP.encode())
    layer.add("bin/busybox", contents(busybox), mode=0o755)
    applets = subprocess.run([busybox, "--list-full"], check=True, capture_output=True, text=True).stdout.split()
    for applet in applets:
        if applet != "bin/busybox":
            layer.add(applet, link="/bin/busybox")
    layer.add("bin/probe", contents(probe), mode=0o755)
    layer.add("bin/probe-setuid", contents(probe), mode=0o4755)
    return layer.finish()


def numbered_layers(first, last):
    for n in range(first, last):
        layer = oci.Layer()
        layer.add("layers")
        layer.add(f"layers/{n:03}", f"{n}\n".encode())
        layer.add("layer-top", f"{n}\n".encode())
        yield layer.finish()


def pause_layer(probe):
    layer = oci.Layer()
    layer.add("pause", contents(probe), mode=0o755)
    return layer.finish()


def main(output, name, busybox, probe):
    reference = f"nacelle.test/{name}:latest"
    if name == "pause":
        oci.archive(output, reference, [pause_layer(probe)], Env=ENV, Entrypoint=["/pause", "pause"])
        return
    layers, command = [busybox_layer(busybox, probe)], ["sh"]
    if name.startswith("layers-"):
        # The busybox layer is number 1: the top of layers-30 says 30.
        layers += numbered_layers(2, int(name.removeprefix("layers-")) + 1)
        command = ["cat", "/layer-top"]
    oci.archive(output, reference, layers, Env=ENV, Cmd=command)


if __name__ == "__main__":
    main(*sys.argv[1:])
