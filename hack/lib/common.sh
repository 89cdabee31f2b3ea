# shellcheck shell=bash
# What every script in this folder shares: messages, and a cache whose entries are named after what went into them.
# Sourced, never run. Knows nothing of apt, kernels, images or virtual machines.

NACELLE_CACHE=${NACELLE_CACHE:-${XDG_CACHE_HOME:-${HOME:-/root}/.cache}/nacelle}
HACK=$(cd "$(dirname "${BASH_SOURCE[0]}")/.." && pwd)
REPO=$(dirname "$HACK")
export NACELLE_CACHE REPO
# A command substitution that fails must fail its caller.
shopt -s inherit_errexit

log() { printf '%s: %s\n' "${0##*/}" "$*" >&2; }
die() { log "$*"; exit 1; }
need_root() { [ "$(id -u)" = 0 ] || die "needs root"; }

# usage: prints the comment block at the top of the calling script.
usage() { sed -n '2,/^[^#]/{s/^# \{0,1\}//p}' "$0"; }

# digest_of FILE…: a short digest of the files' contents, in the order given.
digest_of() { cat "$@" | sha256sum | cut -c1-16; }

# cached NAME DIGEST BUILDER [ARG…]: prints the path of cache entry NAME-DIGEST. When there is none, BUILDER is called
# with a temporary path that it must create (file or directory), then its ARGs; the entry appears by rename, so an
# interrupted build never looks finished, and a lock makes two callers build it once.
cached() {
    local name=$1 digest=$2 builder=$3 entry
    shift 3
    entry=$NACELLE_CACHE/$name-$digest
    if [ ! -e "$entry" ]; then
        mkdir -p "$(dirname "$entry")"
        (
            exec 9>"$NACELLE_CACHE/$name.lock"
            flock 9
            if [ ! -e "$entry" ]; then
                rm -rf "$NACELLE_CACHE/$name"-*.partial
                # Not part of a condition: there `set -e` would be off inside the builder.
                "$builder" "$entry.partial" "$@" 9>&- >&2
                mv -T "$entry.partial" "$entry"
            fi
        )
    fi
    printf '%s\n' "$entry"
}
