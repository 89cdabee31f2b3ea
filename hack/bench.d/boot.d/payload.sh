# shellcheck shell=bash
# What benchmarks beside bare libkrun and microsandbox take into the testbed. Source after common.sh and apt.sh.

microsandbox=0.7.2
microsandbox_integrity=sha512-5gmMDYjyGXtx+13rWKeI0/f6x7ecDg6aMFVCupgr23IQODQLuGsbvn70LyXUrT0bOlYhle6i4uum2+AwVKTU8Q==

# unpack_microsandbox OUT: the program and its libkrunfw, from the npm package; npm itself checks nothing here.
unpack_microsandbox() {
    local out=$1 archive have
    apt_ensure openssl
    command -v npm >/dev/null || apt_ensure npm
    mkdir "$out"
    archive=$(npm pack --silent --pack-destination "$out" "@superradcompany/microsandbox-linux-x64-gnu@$microsandbox")
    have=sha512-$(openssl dgst -sha512 -binary "$out/$archive" | base64 -w0)
    [ "$have" = "$microsandbox_integrity" ] || die "microsandbox $microsandbox is not the pinned one: $have"
    tar -C "$out" --strip-components=1 -xf "$out/$archive" package/bin package/lib
    rm "$out/$archive"
}

# boot_payload DIR: the peers, the image that all of them run, and `start`, which runs DIR/measure.py beside a containerd.
boot_payload() {
    local dir=$1 examples peer
    # Into out/bin, and the two programs that only benchmarks need.
    [ -n "${NACELLE_BIN:-}" ] || "$HACK/build" >&2
    (cd "$REPO" && nice cargo build --quiet --release --workspace --example bare_libkrun --example hello)
    examples=$(cd "$REPO" && cargo metadata --format-version 1 --no-deps | python3 -c 'import json,sys; print(json.load(sys.stdin)["target_directory"])')
    examples=$examples/$(rustc -vV | sed -n 's/^host: //p')/release/examples
    cp "$examples/bare_libkrun" "$HACK"/bench.d/boot.d/*.py "$dir/"
    # The smallest guest in an image like that of nacelle's agent.
    mkdir -p "$dir/root"/{dev,proc,run,sys,tmp}
    cp "$examples/hello" "$dir/root/agent"
    PATH=${NACELLE_BIN:-$REPO/out/bin}:$PATH nacelle layer build "$dir/root" -o "$dir/hello.erofs" >&2
    rm -r "$dir/root"
    peer=$(cached "bench/microsandbox-$microsandbox" "$(sha256sum <<<"$microsandbox_integrity" | cut -c1-16)" unpack_microsandbox)
    cp -r "$peer" "$dir/microsandbox"
    cp "$("$HACK/images" busybox)" "$dir/busybox.tar"
    # In memory: while a disk is slow, and the machine idle, the virtual clock runs ahead to the next timer.
    cat >"$dir/start" <<'START'
#!/bin/sh
mount -t tmpfs -o mode=755,size=3G tmpfs /var/lib
exec with-containerd 1.7 -- /opt/payload/measure.py "$@"
START
    chmod +x "$dir/start"
}
