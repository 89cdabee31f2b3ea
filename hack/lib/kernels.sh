# shellcheck shell=bash
# The guest kernels that a machine with nacelle on it has. Source after common.sh.

# guest_kernel WHICH: prints the path of a vmlinux. WHICH is own (built if need be) or libkrunfw.
guest_kernel() {
    case $1 in
        own) "$HACK/kernel" | sed 's,$,/vmlinux,' ;;
        libkrunfw) "$HACK/guest-kernel" ;;
        *) die "no guest kernel named $1: own or libkrunfw" ;;
    esac
}

# default_kernel: the name of the one that pods run: what NACELLE_KERNEL says, or our own where it has been built.
default_kernel() {
    if [ -n "${NACELLE_KERNEL:-}" ]; then
        echo "$NACELLE_KERNEL"
    elif "$HACK/kernel" --built >/dev/null; then
        echo own
    else
        echo libkrunfw
    fi
}

# guest_kernels DIR: puts into DIR `vmlinux`, which pods run by default, what there is of it for processors without faults of
# returns, and `vmlinux-libkrunfw`, the one that can lend the host's network.
guest_kernels() {
    local name default libkrunfw
    name=$(default_kernel)
    default=$(guest_kernel "$name")
    libkrunfw=$(guest_kernel libkrunfw)
    mkdir -p "$1"
    install -m 644 "$default" "$1/vmlinux"
    # One that is left from another vmlinux would go before this one.
    rm -f "$1/vmlinux-plain-returns"
    [ ! -f "$default-plain-returns" ] || install -m 644 "$default-plain-returns" "$1/vmlinux-plain-returns"
    install -m 644 "$libkrunfw" "$1/vmlinux-libkrunfw"
}
