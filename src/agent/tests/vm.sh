#!/usr/bin/env bash
# vm.sh: runs tests/vm.rs, the agent as PID 1 of a microVM, in the testbed.
#
#   vm.sh AGENT VMM [ARGUMENTS OF THE TEST…]      binaries to test
#
# Needs mkfs.erofs, mkfs.ext4 and a static busybox.
set -euo pipefail
repo=$(cd "$(dirname "$0")/../../.." && pwd)
agent=$(realpath "$1") vmm=$(realpath "$2")
shift 2

payload=$(mktemp -d)
trap 'rm -rf "$payload"' EXIT
cd "$repo"
test=$(cargo test -p nacelle-agent --test vm --no-run --message-format=json | sed -n 's/.*"executable":"\([^"]*\/vm-[^"]*\)".*/\1/p')
strip -o "$payload/vm" "$test"
mkdir -p "$payload/tree"/{dev,proc,run,sys,tmp}
cp "$agent" "$payload/tree/agent"
mkfs.erofs "$payload/agent.erofs" "$payload/tree" >/dev/null
rm -rf "$payload/tree"
cp "$vmm" "$payload/nacelle-vmm"

mkdir "$payload/tree"
NACELLE_TEST_TREE=$payload/tree "$payload/vm" --ignored --exact make_a_tree >/dev/null
mkfs.erofs "$payload/base.erofs" "$payload/tree" >/dev/null
rm -rf "$payload/tree"
mkdir "$payload/tree"
echo late >"$payload/tree/late"
mkfs.erofs "$payload/late.erofs" "$payload/tree" >/dev/null
rm -rf "$payload/tree"
truncate -s 256M "$payload/upper.ext4"
mkfs.ext4 -q "$payload/upper.ext4"

echo "${NACELLE_TEST_KERNEL_ARGS:-}" >"$payload/kernel-args"
cat >"$payload/run" <<'RUN'
#!/bin/sh -e
here=/opt/payload
export NACELLE_TEST_VMM="$here/nacelle-vmm" NACELLE_TEST_AGENT="$here/agent.erofs" \
    NACELLE_TEST_KERNEL=/usr/local/share/nacelle/vmlinux \
    NACELLE_TEST_LOWER="$here/base.erofs" NACELLE_TEST_LATE="$here/late.erofs" NACELLE_TEST_UPPER="$here/upper.ext4"
export NACELLE_TEST_KERNEL_ARGS="$(cat "$here/kernel-args")"
exec "$here/vm" --ignored --skip make_a_tree --test-threads 1 --nocapture "$@"
RUN
chmod +x "$payload/run"
hack/testbed run --no-build --timeout 900 --payload "$payload" -- /opt/payload/run "$@"
