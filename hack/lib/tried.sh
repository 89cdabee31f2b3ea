# shellcheck shell=bash
# Tries things and says how each went, a line a thing. `failed` is 1 once one of them has.
# shellcheck disable=SC2034 # for whoever sources this

failed=0
here() { date +%s%N; }

# ok NAME COMMAND…: tries something, and says how it went.
ok() {
    local name=$1 begin out
    shift
    begin=$(here)
    if out=$("$@" 2>&1); then
        printf 'ok    %-58s %6d ms\n' "$name" "$((($(here) - begin) / 1000000))"
    else
        failed=1
        printf 'FAIL  %-58s\n%s\n' "$name" "$(tail -n 20 <<<"$out")"
    fi
}

# says WORD COMMAND…: the command succeeds, and what it prints has the word.
says() {
    local word=$1 out
    shift
    out=$("$@" 2>&1) || { echo "$out"; return 1; }
    grep -qF -- "$word" <<<"$out" || { echo "no $word in: $out"; return 1; }
}

# refuses WORD COMMAND…: the command fails, and what it prints has the word.
refuses() {
    local word=$1 out
    shift
    if out=$("$@" 2>&1); then echo "did not fail: $out"; return 1; fi
    grep -qF -- "$word" <<<"$out" || { echo "no $word in: $out"; return 1; }
}

# soon SECONDS COMMAND…: the command succeeds within that time.
soon() {
    local end=$(($(here) + $1 * 1000000000)) out
    shift
    until out=$("$@" 2>&1); do
        [ "$(here)" -lt "$end" ] || { echo "$out"; return 1; }
        sleep 0.05
    done
}

# nothing_in DIR…: no shim or VMM runs, nothing of nacelle is mounted, and the directories are empty.
nothing_in() {
    local left
    left=$(
        pgrep -a 'nacelle-vmm|containerd-shim' || true
        find "$@" -mindepth 1 2>/dev/null
        grep nacelle /proc/mounts | grep -v '/usr/local\|/etc/nacelle\|/opt/payload' || true
    )
    [ -z "$left" ] || { echo "$left"; return 1; }
}
