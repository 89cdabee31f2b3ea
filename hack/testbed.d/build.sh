# shellcheck shell=bash
# Builds what the testbed boots: a tree of tools that run on the host, and the machine's kernel, initramfs and root
# file system. Everything lands in the cache and nothing is installed. Source after lib/common.sh and lib/apt.sh.

TOOL_PACKAGES=(qemu-system-x86 containerd e2fsprogs erofs-utils busybox-static)
ROOT_PACKAGES=(
    attr busybox ca-certificates conntrack containerd containernetworking-plugins crun docker-registry e2fsprogs
    erofs-utils iperf3 iproute2 iptables iputils-ping jq kmod mount nftables procps psmisc python3 qemu-utils runc socat
    strace tcpdump util-linux-extra
)
# The cloud flavour: it boots fast, and has ext4, virtio-pci and virtio-console built in.
KERNEL_META=linux-image-cloud-amd64
INITRAMFS_MODULES=(virtio_blk erofs)

# testbed_tools: prints the tree with QEMU and the file system tools.
testbed_tools() {
    cached testbed/tools "$(digest_of "$HACK/testbed.d/mend-qemu.py" - <<<"${TOOL_PACKAGES[*]}")" build_tools
}

build_tools() {
    log "unpacking the tools: ${TOOL_PACKAGES[*]}"
    # Unpacked, not configured: nothing in this tree is ever run inside it.
    suite_tree trixie extract "$1" "${TOOL_PACKAGES[@]}"
    # What is emulated runs without it, too, and stops more often.
    python3 "$HACK/testbed.d/mend-qemu.py" "$1/usr/bin/qemu-system-x86_64" || true
}

# tool TREE NAME ARG…: the command line that runs a program of the tools tree with that tree's own libraries, in TOOL.
tool() {
    local tree=$1 name=$2 program
    shift 2
    program=$(find "$tree"/usr/{bin,sbin} -name "$name" | head -n 1)
    TOOL=("$tree/usr/lib64/ld-linux-x86-64.so.2" --library-path "$tree/usr/lib/x86_64-linux-gnu" "$program" "$@")
}

run_tool() { tool "$@"; "${TOOL[@]}"; }

# testbed_image: prints the directory with vmlinuz, initramfs and root.ext4.
testbed_image() {
    local tools
    tools=$(testbed_tools)
    cached testbed/image "$(digest_of "$HACK"/testbed.d/{build.sh,initramfs})" build_image "$tools"
}

build_image() {
    local out=$1 tools=$2 tree=$1/tree version
    log "building the machine (a few minutes)"
    mkdir -p "$out"
    apt_ensure binutils xz-utils
    suite_tree trixie essential "$tree" "${ROOT_PACKAGES[@]}"
    # The newer containerd beside the one of the suite; both packages are Go programs that need no more than libc.
    suite_unpack sid "$out/sid" containerd runc
    mkdir -p "$tree/opt/containerd-2.1/bin"
    # runc is /usr/sbin/runc, and a link to it in /usr/bin.
    find "$out/sid/usr/bin" "$out/sid/usr/sbin" -type f -exec mv -t "$tree/opt/containerd-2.1/bin" {} +
    build_kernel "$out" "$tree"
    version=$(basename "$tree"/lib/modules/*)
    build_initramfs "$out" "$tools" "$version"
    mkdir -p "$tree"/{payload,out}
    rm -rf "$tree"/var/{cache,lib}/apt/* "$tree"/var/lib/dpkg/info
    log "writing the root file system"
    truncate -s 4G "$out/root.ext4"
    run_tool "$tools" mke2fs -q -t ext4 -O ^has_journal -m 0 -d "$tree" "$out/root.ext4"
    rm -rf "$tree" "$out/sid"
}

# build_kernel OUT TREE: the kernel in OUT, its modules in TREE; unpacked by hand, as nothing else of the package is
# wanted. The modules lose their compression, type information and signatures, all of which cost an emulated processor
# more to look at than the module is worth.
build_kernel() {
    local out=$1 tree=$2 package
    package=$(suite_dependency trixie "$KERNEL_META")
    suite_unpack trixie "$out/kernel" "$package"
    mv "$out"/kernel/boot/vmlinuz-* "$out/vmlinuz"
    mkdir -p "$tree/usr/lib/modules"
    mv "$out"/kernel/usr/lib/modules/* "$tree/usr/lib/modules/"
    rm -r "$out/kernel"
    find "$tree/usr/lib/modules" -name '*.ko.xz' -exec xz -d {} +
    find "$tree/usr/lib/modules" -name '*.ko' -exec objcopy --strip-debug -R .BTF {} \;
    chroot "$tree" depmod "$(basename "$tree"/usr/lib/modules/*)"
}

# build_initramfs OUT TOOLS VERSION: busybox, the modules that the root file system needs, in order, and a script.
build_initramfs() {
    local out=$1 tools=$2 version=$3 dir=$1/initramfs.d module
    mkdir -p "$dir"/{bin,dev,lib,root}
    cp "$tools/usr/bin/busybox" "$dir/bin/busybox"
    for module in "${INITRAMFS_MODULES[@]}"; do
        chroot "$out/tree" modprobe -a --set-version "$version" --show-depends "$module"
    done | awk '$1 == "insmod" { print $2 }' | while read -r module; do
        cp "$out/tree$module" "$dir/lib/"
        basename "$module"
    done >"$dir/lib/modules"
    install -m 755 "$HACK/testbed.d/initramfs" "$dir/init"
    (cd "$dir" && find . | "$dir/bin/busybox" cpio -o -H newc) >"$out/initramfs" 2>/dev/null
    rm -r "$dir"
}
