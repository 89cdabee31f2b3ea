# shellcheck shell=bash
# Debian packages: those the machine needs, and those of other suites, which never touch the machine's own package
# database. Mirrors come from the machine's own apt sources, so no host is named here. Source after common.sh.

DEBIAN_KEYRING=/usr/share/keyrings/debian-archive-keyring.gpg

# apt_ensure PACKAGE…: installs those that are missing; silent when there is nothing to do.
apt_ensure() {
    local package missing=()
    for package; do
        [ "$(dpkg-query -W -f '${db:Status-Status}' "$package" 2>/dev/null)" = installed ] || missing+=("$package")
    done
    [ ${#missing[@]} -gt 0 ] || return 0
    need_root
    log "installing ${missing[*]}"
    apt_install "${missing[@]}" 2>/dev/null || {
        # The lists may be absent or too old to find the files.
        apt-get update -qq >&2
        apt_install "${missing[@]}"
    }
}

apt_install() {
    DEBIAN_FRONTEND=noninteractive apt-get install -qq --no-install-recommends -o DPkg::Lock::Timeout=120 "$@" >&2 </dev/null
}

# debian_mirror: the URI from which this machine gets Debian's main component. apt itself reads its sources, so both of
# their formats work; suites such as bookworm-updates and bookworm-security may live elsewhere and do not count.
debian_mirror() {
    local uri
    uri=$(debian_mirrors)
    if [ -z "$uri" ]; then
        apt-get update -qq >&2
        uri=$(debian_mirrors)
    fi
    [ -n "$uri" ] || die "no Debian mirror among this machine's apt sources"
    head -n 1 <<<"$uri"
}

debian_mirrors() {
    apt-get indextargets --format "\$(ORIGIN) \$(RELEASE) \$(COMPONENT) \$(REPO_URI)" 'Created-By: Packages' |
        awk '$1 == "Debian" && $2 !~ /-/ && $3 == "main" { print $4 }'
}

# debian_source SUITE: one line of sources.list(5).
debian_source() {
    local mirror
    mirror=$(debian_mirror)
    printf 'deb [signed-by=%s] %s %s main\n' "$DEBIAN_KEYRING" "$mirror" "$1"
}

# private_apt SUITE: prints the path of an apt configuration (for APT_CONFIG) that sees SUITE alone (SUITE/source: its
# source packages) and keeps its lists, archives and status in the cache. Proxies and the like still come from the machine's apt.conf.d.
private_apt() {
    local suite=$1 source
    apt_ensure debian-archive-keyring
    source=$(debian_source "${suite%/source}")
    [ "$suite" = "${suite%/source}" ] || source=${source/#deb /deb-src }
    cached "apt/$suite" "$(sha256sum <<<"$source" | cut -c1-16)" private_apt_build "$source" | sed 's,$,/apt.conf,'
}

private_apt_build() {
    local dir=$1 source=$2 final=${1%.partial}
    mkdir -p "$dir"/{lists,archives}/partial
    printf '%s\n' "$source" >"$dir/sources.list"
    : >"$dir/status"
    cat >"$dir/apt.conf" <<CONF
Dir::Etc::sourcelist "$final/sources.list";
Dir::Etc::sourceparts "/dev/null";
Dir::Etc::preferences "/dev/null";
Dir::Etc::preferencesparts "/dev/null";
Dir::State::lists "$final/lists";
Dir::State::status "$final/status";
Dir::Cache "$final";
Dir::Cache::archives "archives";
APT::Sandbox::User "root";
Acquire::Languages "none";
CONF
}

# with_lists SUITE COMMAND…: runs an apt command that reads SUITE's package lists and no others. The lists are refreshed
# only when they are of no use: absent, or older than the mirror's pool.
with_lists() {
    local config
    config=$(private_apt "$1")
    shift
    (
        export APT_CONFIG=$config
        "$@" 2>/dev/null || {
            exec 9>"${config%/*}.lock"
            flock 9
            apt-get update -qq >&2 9>&-
            "$@"
        }
    )
}

# suite_dependency SUITE PACKAGE: the name of what a meta package depends on.
suite_dependency() { with_lists "$1" apt-cache depends "$2" | sed -n 's/^ *Depends: *//p'; }

# suite_unpack SUITE DIR PACKAGE…: downloads packages of a suite, without their dependencies, and unpacks them in DIR.
suite_unpack() {
    local suite=$1 dir=$2 debs deb
    shift 2
    mkdir -p "$dir"
    debs=$(mktemp -d "$dir/debs.XXXXXX")
    (cd "$debs" && with_lists "$suite" apt-get download -qq "$@" >&2)
    for deb in "$debs"/*.deb; do dpkg-deb -x "$deb" "$dir"; done
    rm -r "$debs"
}

# suite_source SUITE DIR PACKAGE: downloads the files of a source package into DIR.
suite_source() {
    local suite=$1 dir=$2 package=$3
    mkdir -p "$dir"
    (cd "$dir" && with_lists "$suite/source" apt-get source --download-only -qq "$package" >&2)
}

# suite_tree SUITE VARIANT TARGET PACKAGE…: a Debian tree (directory, or tar where TARGET ends so) by mmdebstrap.
# A mount namespace of its own, so that nothing stays mounted however it ends.
suite_tree() {
    local suite=$1 variant=$2 target=$3 options source
    shift 3
    apt_ensure mmdebstrap debian-archive-keyring
    source=$(debian_source "$suite")
    options=$(mktemp)
    # The tree gets the machine's network settings while it is built, and loses them below.
    apt-config dump Acquire | grep -vE '""|Acquire::(IndexTargets|Changelogs|cdrom)' >"$options" || true
    unshare --mount --propagation private nice mmdebstrap --quiet --mode=root --variant="$variant" \
        --keyring="$DEBIAN_KEYRING" --aptopt="$options" --aptopt='Acquire::Languages "none"' \
        --dpkgopt='path-exclude=/usr/share/doc/*' --dpkgopt='path-exclude=/usr/share/man/*' \
        --dpkgopt='path-exclude=/usr/share/locale/*' --dpkgopt='path-exclude=/usr/share/info/*' \
        --customize-hook="rm -f \"\$1/etc/apt/apt.conf.d/99mmdebstrap\"" \
        --include="$(IFS=,; printf '%s' "$*")" "$suite" "$target" "$source" >&2
    rm "$options"
}
