"""Says how virtual machines can run here, as `WORD: reason`, WORD being

nested-kvm  /dev/kvm works and its guests can have /dev/kvm too: the testbed runs on it
kvm         /dev/kvm works, but its guests get no virtualisation: the testbed is emulated
tcg         no usable /dev/kvm

That /dev/kvm exists, or even opens, says nothing: the processor may lack the extension all the same.
"""

import fcntl
import os
import re

KVM_CREATE_VM = 0xAE01


def flag():
    with open("/proc/cpuinfo") as info:
        found = re.search(r"^flags\s*:.*\b(svm|vmx)\b", info.read(), re.MULTILINE)
    return found and found[1]


def verdict():
    extension = flag()
    if not extension:
        return "tcg: the processor has neither svm nor vmx"
    try:
        kvm = os.open("/dev/kvm", os.O_RDWR | os.O_CLOEXEC)
        os.close(fcntl.ioctl(kvm, KVM_CREATE_VM, 0))
    except OSError as error:
        return f"tcg: no virtual machine from /dev/kvm: {error.strerror}"
    module = {"svm": "kvm_amd", "vmx": "kvm_intel"}[extension]
    try:
        with open(f"/sys/module/{module}/parameters/nested") as parameter:
            nested = parameter.read().strip() in ("1", "Y")
    except OSError:
        nested = False
    if not nested:
        return f"kvm: {extension}, but {module} does not nest"
    return f"nested-kvm: {extension}, and {module} nests"


if __name__ == "__main__":
    print(verdict())
