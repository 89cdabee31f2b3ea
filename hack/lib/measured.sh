# shellcheck shell=bash
# Sourced: a measurement in the testbed under icount. An emulated machine may stop for good, so its program says each figure on standard error as it comes, and one that falls silent is started anew.

# measured PAYLOAD WORD…: runs the payload's start with these words. Its standard output comes when it has come to its end.
measured() {
    local payload=$1 try
    shift
    for try in 1 2 3 4 5 6; do
        log "machine $try: ${*:-all}"
        if nice "$HACK/testbed" run --icount --timeout "${NACELLE_BENCH_TIMEOUT:-3000}" --silence 120 --payload "$payload" -- \
            /opt/payload/start "$@" >"$payload.out"; then
            cat "$payload.out"
            rm "$payload.out"
            return
        fi
    done
    rm "$payload.out"
    die "no machine came to its end: ${*:-all}"
}
