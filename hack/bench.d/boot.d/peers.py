"""Who is measured: what each needs to start a machine, a container, a second one, and to end them."""

import glob
import json
import os
import subprocess

from stopwatch import DEADLINE_S, NS_PER_MI, Failed, Run

IMAGE = "nacelle.test/busybox:latest"
ECHO, SAID = ["/bin/echo", "hello"], "hello"


class Bare:
    """libkrun alone."""

    def __init__(self, payload, vcpus=1, memory_mib=128, kernel="/usr/local/share/nacelle/vmlinux", args=(), image="hello.erofs"):
        self.argv = [f"{payload}/bare_libkrun", kernel, f"{payload}/{image}", str(vcpus), str(memory_mib), *args]

    def boot(self):
        """Mi from spawn to main, to krun_start_enter, to the first byte, to the end; each from the one before."""
        return [int(ns) / NS_PER_MI for ns in Run(self.argv).output.split()]

    def console(self):
        """What the guest says."""
        return Run(self.argv).errors


class Containerd:
    """A runtime through containerd and ctr."""

    def __init__(self, runtime, config=None):
        self.options = ["--runtime", runtime]
        if config:
            self.options += ["--runtime-config-path", config]
        self.count = 0

    def name(self):
        self.count += 1
        return f"c{self.count}"

    def run(self, command=ECHO, want=SAID, options=(), name=None):
        return Run(["ctr", "run", "--rm", *self.options, *options, IMAGE, name or self.name(), *command], want=want)

    def pod(self, name):
        """Starts a pod, and one container in it that waits."""
        for kind, container in (("sandbox", name), ("container", f"{name}-main")):
            labels = self.labels(kind, name)
            Run(["ctr", "run", "--detach", *self.options, *labels, IMAGE, container, "/bin/sleep", "10000"], want="")

    @staticmethod
    def labels(kind, pod):
        """What says that a container is the pod's first, or another."""
        pairs = {"container-type": kind, "sandbox-id": pod}
        return [word for name, value in pairs.items() for word in ("--annotation", f"io.kubernetes.cri.{name}={value}")]

    def second(self, pod):
        """One more container in the pod, to its first byte and its end."""
        return self.run(options=self.labels("container", pod))

    def exec(self, pod):
        return Run(["ctr", "task", "exec", "--exec-id", self.name(), f"{pod}-main", *ECHO], want=SAID)

    def end(self, pod):
        """Kill of a pod that has nothing in it any more, and everything is gone."""
        Run(["ctr", "task", "delete", "--force", f"{pod}-main"])
        Run(["ctr", "container", "delete", f"{pod}-main"])
        ended = Run(["ctr", "task", "delete", "--force", pod])
        Run(["ctr", "container", "delete", pod])
        return ended

    @staticmethod
    def clear():
        """Whatever is there goes."""
        for container in Run(["ctr", "container", "list", "--quiet"]).output.split():
            subprocess.run(["ctr", "task", "delete", "--force", container], capture_output=True)
            subprocess.run(["ctr", "container", "delete", container], capture_output=True)


class Nacelle(Containerd):
    def __init__(self, vcpus=1, memory_mib=128):
        config = f"/run/bench-{vcpus}-{memory_mib}.toml"
        with open(config, "w") as file:
            file.write(f"[vm]\nvcpus = {vcpus}\nmemory_mib = {memory_mib}\nboot_timeout_seconds = {DEADLINE_S}\n")
        super().__init__("io.containerd.nacelle.v2", config)

    @staticmethod
    def phases():
        """Phase → (begin after the create request, duration) in Mi, of the one sandbox that runs."""
        (path,) = glob.glob("/run/nacelle/default/*/status.json")
        with open(path) as file:
            phases = json.load(file)["phases"]
        return {phase["name"]: (phase["at_us"] / 1000, phase["took_us"] / 1000) for phase in phases}


class Microsandbox:
    """msb with the least it can be asked for: one CPU, 128 MiB, no network."""

    SIZE = ["--quiet", "--pull", "never", "--cpus", "1", "--memory", "128M", "--no-net"]

    def __init__(self, payload):
        home = "/var/lib/microsandbox"
        os.makedirs(home)
        self.msb = f"{payload}/microsandbox/bin/msb"
        self.env = {**os.environ, "HOME": home}
        load = ["load", "--input", f"{payload}/busybox.tar", "--tag", IMAGE]
        Run([self.msb, *load], env=self.env, deadline_s=6 * DEADLINE_S)
        # The same files as a plain directory, which it serves by virtiofs.
        self.rootfs = "/var/lib/bench-rootfs"
        os.makedirs(self.rootfs)
        mount = subprocess.run(["ctr", "image", "mount", IMAGE, "/mnt"], capture_output=True, text=True)
        if mount.returncode:
            raise Failed(mount.stderr)
        subprocess.run(["cp", "-a", "/mnt/.", self.rootfs], check=True)
        subprocess.run(["ctr", "image", "unmount", "/mnt"], check=True, capture_output=True)

    def call(self, *words, want=None):
        return Run([self.msb, *words], env=self.env, want=want)

    def run(self, image):
        return self.call("run", *self.SIZE, image, "--", *ECHO, want=SAID)

    def create(self, name, image):
        return self.call("create", "--name", name, *self.SIZE, image)

    def exec(self, name):
        return self.call("exec", name, "--", *ECHO, want=SAID)

    def end(self, name):
        stopped = self.call("stop", "--force", name)
        self.call("remove", name)
        return stopped

    def clear(self):
        for name in self.call("list", "--quiet").output.split():
            subprocess.run([self.msb, "remove", "--force", name], env=self.env, capture_output=True)
