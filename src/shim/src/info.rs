//! The `-info` action: what this runtime can do, for containerd's CRI and for people. It touches nothing.

use std::collections::HashMap;

use containerd_shim_protos::types::introspection::{RuntimeInfo, RuntimeVersion};
use protobuf::well_known_types::any::Any;
use protobuf::{Message, MessageField};
use serde_json::json;

/// Type of the features, as containerd's typeurl has it.
const FEATURES_TYPE: &str = "types.containerd.io/opencontainers/runtime-spec/1/features/Features";

/// Kinds of mounts that containerd's mount manager leaves to the shim (`core/runtime/v2/task_manager.go`): images go into the
/// VM as they are, and what is made for them on the host is not needed there.
const ALLOW_MOUNTS: &str = "containerd.io/runtime-allow-mounts";

/// Describes the runtime; `options` are the runtime options that came on stdin.
///
/// # Errors
/// When the message cannot be encoded or the options not be read.
pub fn runtime_info(options: &[u8]) -> protobuf::Result<Vec<u8>> {
    let options = if options.is_empty() { None } else { Some(Any::parse_from_bytes(options)?) };
    let features =
        Any { type_url: FEATURES_TYPE.to_owned(), value: features().to_string().into_bytes(), ..Any::default() };
    let version = RuntimeVersion { version: env!("CARGO_PKG_VERSION").to_owned(), ..Default::default() };
    RuntimeInfo {
        name: "io.containerd.nacelle.v2".to_owned(),
        version: MessageField::some(version),
        options: options.into(),
        features: MessageField::some(features),
        annotations: HashMap::from([(ALLOW_MOUNTS.to_owned(), "erofs,format/*,mkdir/*,mkfs/*".to_owned())]),
        ..Default::default()
    }
    .write_to_bytes()
}

/// OCI runtime specification, `features.md`: what reaches a container through [`crate::spec`], and nothing more.
fn features() -> serde_json::Value {
    json!({
        "ociVersionMin": "1.0.0",
        "ociVersionMax": "1.2.1",
        "hooks": ["prestart", "createRuntime", "poststart", "poststop"],
        "mountOptions": [
            "async", "atime", "bind", "dev", "diratime", "exec", "noatime", "nodev", "nodiratime", "noexec",
            "norelatime", "nostrictatime", "nosuid", "private", "rbind", "relatime", "ro", "rprivate", "rro", "rslave", "rw",
            "slave", "strictatime", "suid", "sync"
        ],
        "linux": {
            "namespaces": ["cgroup", "ipc", "mount", "network", "pid", "user", "uts"],
            "cgroup": { "v1": false, "v2": true, "systemd": false, "systemdUser": false, "rdma": false },
            "seccomp": { "enabled": true },
            "apparmor": { "enabled": false },
            "selinux": { "enabled": false },
            "intelRdt": { "enabled": false },
            "mountExtensions": { "idmap": { "enabled": true } }
        }
    })
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn describes_itself_and_keeps_the_options() {
        let info = RuntimeInfo::parse_from_bytes(&runtime_info(b"").expect("info")).expect("decode");
        assert_eq!(info.name, "io.containerd.nacelle.v2");
        assert!(info.annotations[ALLOW_MOUNTS].split(',').any(|kind| kind == "erofs"));
        let features: serde_json::Value = serde_json::from_slice(&info.features.value).expect("json");
        assert_eq!(features["linux"]["mountExtensions"]["idmap"]["enabled"], true);
        let options = Any { type_url: "x".into(), ..Any::default() };
        let bytes = runtime_info(&options.write_to_bytes().expect("encode")).expect("info");
        let info = RuntimeInfo::parse_from_bytes(&bytes).expect("decode");
        assert_eq!(info.options.type_url, "x");
        assert!(runtime_info(&[0xff]).is_err());
    }
}
