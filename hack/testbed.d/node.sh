# shellcheck shell=bash
# Builds what the testbed's machine has at /var/lib: containerd's root with images in it. Source after build.sh.

# testbed_node TOOLS [IMAGE.tar]…: prints an ext4 image for the machine's /var/lib, 16 GiB and sparse. The OCI images in it
# are unpacked already, as an emulated processor needs minutes for what this one does in seconds.
testbed_node() {
    # The paths are the images' digests.
    cached testbed/node "$({ cat "$HACK"/testbed.d/import; printf '%s\n' "$@"; } | sha256sum | cut -c1-16)" build_node "$@"
}

build_node() {
    local out=$1 tools=$2 tree=$1.d
    shift 2
    mkdir -p "$tree/containerd"
    if [ $# -gt 0 ]; then
        log "unpacking ${*##*/}"
        unshare --mount --pid --fork --kill-child --mount-proc --propagation private "$HACK/testbed.d/import" "$tools" "$tree" "$@"
    fi
    truncate -s 16G "$out"
    run_tool "$tools" mke2fs -q -t ext4 -O ^has_journal -E lazy_itable_init=1 -m 0 -d "$tree" "$out"
    rm -rf "$tree"
}
