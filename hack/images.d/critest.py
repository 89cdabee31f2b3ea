"""The images that critest asks for: critest.py OUTPUT BUSYBOX NGINX NNP PAUSE

OUTPUT is a directory: critest.tar has what containers run, for `ctr image import`, and registry/ has all of them as a
registry serves them. BUSYBOX is a static busybox whose shell runs applets as programs, not as functions: tests take
files away, or capabilities, and look at what the shell says. NGINX is a tree with Debian's nginx and its libraries. NNP
is nnp.c, PAUSE a program that waits, both built statically.
"""

import glob
import os
import subprocess
import sys
import tarfile

import oci

SUITE, STAGING = "registry.k8s.io/", "gcr.io/k8s-staging-cri-tools/"
ENV = ["PATH=/usr/local/sbin:/usr/local/bin:/usr/sbin:/usr/bin:/sbin:/bin"]
# The tags that containerd 1.7 and 2.1 have as their defaults, and those that the suite pulls.
PAUSES = [f"{SUITE}pause:{tag}" for tag in ("3.8", "3.10", "3.10.1")]
SUITE_PAUSES = [f"{SUITE}pause:3.9", "k8s.gcr.io/pause:3.9"]

PASSWD = """\
root:x:0:0:root:/root:/bin/sh
www-data:x:33:33:www-data:/var/www:/bin/false
nobody:x:65534:65534:nobody:/home:/bin/false
"""
GROUP = """\
root:x:0:
www-data:x:33:
nobody:x:65534:
"""
NGINX = """\
user www-data;
worker_processes 1;
pid /var/run/nginx.pid;
events {{ worker_connections 256; }}
http {{
    server {{
        listen {port};
        root /usr/share/nginx/html;
    }}
}}
"""


def contents(path):
    with open(path, "rb") as file:
        return file.read()


def busybox_layer(busybox):
    layer = oci.Layer()
    for name in ("bin", "dev", "etc", "home", "proc", "sbin", "sys", "usr", "usr/bin", "usr/sbin", "var", "var/www"):
        layer.add(name)
    layer.add("root", mode=0o700)
    layer.add("tmp", mode=0o1777)
    layer.add("etc/passwd", PASSWD.encode())
    layer.add("etc/group", GROUP.encode())
    layer.add("bin/busybox", contents(busybox), mode=0o755)
    applets = subprocess.run([busybox, "--list-full"], check=True, capture_output=True, text=True).stdout.split()
    for applet in applets:
        if applet != "bin/busybox":
            # Hard links have a mode of their own in a tar.
            layer.add(applet, kind=tarfile.LNKTYPE, link="bin/busybox", mode=0o755)
    return layer.finish()


def nginx_layer(tree):
    layer = oci.Layer()
    for link in ("lib", "lib64"):
        layer.add(link, link=f"usr/{link}")
    for name in ("usr/lib", "usr/lib/x86_64-linux-gnu", "usr/lib64"):
        layer.add(name)
    libraries = glob.glob("usr/lib/x86_64-linux-gnu/*.so*", root_dir=tree) + glob.glob("usr/lib64/*", root_dir=tree)
    for name in ["usr/sbin/nginx", *sorted(libraries)]:
        path = os.path.join(tree, name)
        if os.path.islink(path):
            layer.add(name, link=os.readlink(path))
        elif os.path.isfile(path):
            layer.add(name, contents(path), mode=0o755)
    for name in ("etc/nginx", "usr/share", "usr/share/nginx", "var/log", "var/log/nginx", "var/lib", "var/lib/nginx", "var/run", "usr/share/nginx/html"):
        layer.add(name)
    layer.add("usr/share/nginx/html/index.html", b"nginx\n")
    return layer.finish()


def file_layer(name, text):
    layer = oci.Layer()
    layer.add(name, text.encode())
    return layer.finish()


def program_layer(name, program, mode=0o755):
    layer = oci.Layer()
    layer.add(name, contents(program), mode=mode)
    return layer.finish()


def group_layer():
    layer = oci.Layer()
    layer.add("etc/passwd", (PASSWD + "default-user:x:1000:1000::/home:/bin/sh\n").encode())
    group = "default-user:x:1000:\ngroup-defined-in-image:x:50000:default-user\n"
    layer.add("etc/group", (GROUP + group).encode())
    return layer.finish()


def main(output, busybox, nginx, nnp, pause):
    base, server = busybox_layer(busybox), nginx_layer(nginx)
    run_nginx = {"Env": ENV, "Cmd": ["nginx", "-g", "daemon off;"]}

    def plain(**config):
        return [base], {"Env": ENV, "Cmd": ["sh"], **config}

    run = {
        f"{SUITE}e2e-test-images/busybox:1.29-2": plain(),
        f"{SUITE}e2e-test-images/nginx:1.14-2": (
            [base, server, file_layer("etc/nginx/nginx.conf", NGINX.format(port=80))],
            run_nginx,
        ),
        f"{STAGING}hostnet-nginx-amd64:latest": (
            [base, server, file_layer("etc/nginx/nginx.conf", NGINX.format(port=12003))],
            run_nginx,
        ),
        f"{SUITE}e2e-test-images/httpd:2.4.39-4": (
            [base, file_layer("var/www/index.html", "It works!\n")],
            {"Env": ENV, "Cmd": ["sh", "-c", "echo httpd; exec httpd -f -vv -h /var/www"]},
        ),
        f"{SUITE}e2e-test-images/nonewprivs:1.3": (
            [base, program_layer("nnp", nnp, mode=0o4755)],
            {"Env": ENV, "Entrypoint": ["/nnp"]},
        ),
        f"{STAGING}test-image-predefined-group:latest": (
            [base, group_layer()],
            {"Env": ENV, "Cmd": ["sh"], "User": "1000"},
        ),
    }
    waits = ([program_layer("pause", pause)], {"Env": ENV, "Entrypoint": ["/pause", "pause"]})
    run |= {name: waits for name in PAUSES}
    # One image under two names, and no other name for it.
    run |= {name: (waits[0], {**waits[1], "Labels": {"suite": name.partition("/")[2]}}) for name in SUITE_PAUSES}
    # The suite pulls these and takes them away again.
    pulled = {f"{STAGING}{name}": plain(Labels={"name": name}) for name in ("test-image-latest:latest",)}
    for name in ("tag:test", "tag:all", "1:latest", "2:latest", "3:latest"):
        pulled[f"{STAGING}test-image-{name}"] = ([base, file_layer("name", name)], {"Env": ENV, "Cmd": ["sh"]})
    pulled |= {f"{STAGING}test-image-tags:{tag}": plain(Labels={"tags": "same"}) for tag in (1, 2, 3)}
    users = {"uid": "1002", "username": "www-data", "uid-group": "1003:users", "username-group": "www-data:www-data"}
    for name, user in users.items():
        pulled[f"{STAGING}test-image-user-{name}:latest"] = plain(User=user)

    oci.archives(os.path.join(output, "critest.tar"), run)
    oci.registry(os.path.join(output, "registry"), run | pulled)


if __name__ == "__main__":
    main(*sys.argv[1:])
