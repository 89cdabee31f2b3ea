# shellcheck shell=bash
# What the end-to-end tests take into the testbed. Source after common.sh and apt.sh.

e2e_images=(busybox layers-30 layers-100 debian-python debian-tools)

# e2e_prepare: makes the testbed and the images, unless they are there.
e2e_prepare() { "$HACK/images" "${e2e_images[@]}" && "$HACK/testbed" build; }

# e2e_payload DIR: the tests' program, the program of guests that misbehave, and the images that the tests import.
e2e_payload() {
    local dir=$1 program image
    # --workspace: with the features that all dependencies have been built with already.
    program=$(cargo test --workspace --test e2e --no-run --message-format=json |
        python3 -c 'import json, sys; print([e for e in map(json.loads, sys.stdin) if e.get("executable")][-1]["executable"])') || return
    strip -o "$dir/e2e" "$program" || return
    cargo build --quiet --workspace --bin hostile-guest || return
    strip -o "$dir/hostile-guest" "$(dirname "$(dirname "$program")")/hostile-guest" || return
    mkdir "$dir/images" || return
    for image in "${e2e_images[@]}"; do
        cp --reflink=auto "$("$HACK/images" "$image")" "$dir/images/" || return
    done
}
