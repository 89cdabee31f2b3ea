# shellcheck shell=bash
# Builds critest and crictl, and puts together what suites for pods need in the testbed. Source after lib/common.sh.

CRI_TOOLS=sigs.k8s.io/cri-tools CRI_TOOLS_VERSION=v1.37.0
CRI_TOOLS_SUM='h1:BmTImEoTX3KPXCLwmIU9mfCC8umUqF4R8WibY9eVU9Y='

# cri_tools: prints the directory with critest and crictl.
cri_tools() {
    cached critest "$(sha256sum <<<"$CRI_TOOLS_VERSION $CRI_TOOLS_SUM" | cut -c1-16)" build_cri_tools
}

build_cri_tools() {
    local out=$1 have dir
    command -v go >/dev/null || die "needs go"
    export GOFLAGS=-mod=mod CGO_ENABLED=0
    log "building $CRI_TOOLS $CRI_TOOLS_VERSION"
    have=$(cd / && go mod download -json "$CRI_TOOLS@$CRI_TOOLS_VERSION")
    dir=$(sed -n 's/^\t"Dir": "\(.*\)",$/\1/p' <<<"$have")
    grep -qF "\"Sum\": \"$CRI_TOOLS_SUM\"" <<<"$have" || die "$CRI_TOOLS $CRI_TOOLS_VERSION is not the pinned one: $have"
    mkdir "$out"
    cp -r "$dir" "$out/source"
    chmod -R u+w "$out/source"
    cd "$out/source" || return
    nice go test -c -trimpath -ldflags='-s -w' -o ../critest ./cmd/critest
    nice go build -trimpath -ldflags='-s -w' -o ../crictl ./cmd/crictl
    rm -r "$out/source"
}

# pod_payload DIR VERSION [features]: what `node` needs there, and the tools; with nacelle's part of the configuration that
# has containerd ask for features.
pod_payload() {
    local dir=$1 version=$2 deploy tools
    case $version:${3:-} in
        1.7:) deploy=1.7 ;;
        2.1:) deploy=2 ;;
        2.1:features) deploy=2-features ;;
        1.7:features) die "containerd 1.7 knows no features" ;;
        *) die "no containerd $version: 1.7 or 2.1" ;;
    esac
    tools=$(cri_tools)
    cp "$tools"/{critest,crictl} "$HACK/critest.d"/{inside,node,"containerd-$version.toml"} "$dir/"
    cp "$REPO/deploy/containerd-$deploy.toml" "$dir/deploy-$version.toml"
}
