//! What containerd says to the `start` action on stdin, and what it wants to hear on stdout.
//!
//! ```text
//!                stdin                                       stdout
//!  ≤ 2.2         Any of the runtime options, or nothing      JSON, version 2 (3 where the operator asks for it)
//!  ≥ 2.3         BootstrapParams                             BootstrapResult, version 3
//! ```
//!
//! A BootstrapParams is one whose id and namespace are those of the command line: an `Any` decodes as a BootstrapParams
//! too (containerd `pkg/shim/compat.go`). 1.7 refuses any version above 2, and nothing tells it from 2.0 to 2.2.

use std::path::PathBuf;

use containerd_shim_protos::bootstrap_api::{BootstrapParams, BootstrapResult, LogLevel};
use protobuf::well_known_types::any::Any;
use protobuf::{CodedInputStream, Message};
use sha2::{Digest, Sha256};
use thiserror::Error;

use crate::args::Args;
use crate::config::{Origin, PATH_ENV};

/// Lets an operator ask for version 3 of the JSON reply, by the `env` of containerd's shim manager.
pub const VERSION_ENV: &str = "NACELLE_SHIM_VERSION";
/// Where containerd takes events.
pub const TTRPC_ENV: &str = "TTRPC_ADDRESS";
/// Most that is read from stdin, in bytes; containerd's own limit.
pub const MAX_INPUT: u64 = 10 << 20;
/// Directory of the shims' sockets.
const SOCKET_DIR: &str = "/run/containerd/s";
/// Room in `sockaddr_un.sun_path`, less the final zero.
const MAX_SOCKET_PATH: usize = 107;

/// Why the bootstrap cannot go on.
#[derive(Debug, Error)]
pub enum BootstrapError {
    /// The message is for somebody else.
    #[error("read bootstrap parameters: they are for {theirs}, the command line is for {ours}")]
    Mismatch {
        /// Namespace and id on stdin.
        theirs: String,
        /// Namespace and id of the command line.
        ours: String,
    },
    /// The path is longer than a socket's may be.
    #[error("make socket address {0}: longer than {MAX_SOCKET_PATH} bytes")]
    SocketPath(PathBuf),
    /// A message cannot be encoded or decoded.
    #[error("{what}")]
    Message {
        /// What was being done.
        what: &'static str,
        /// The cause.
        #[source]
        source: protobuf::Error,
    },
}

/// The form of the reply.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum Reply {
    /// JSON with this version.
    Json(u32),
    /// `BootstrapResult`, version 3.
    Protobuf,
}

/// What `start` has to go by, whichever way containerd said it.
#[derive(Debug, PartialEq, Eq)]
pub struct Start {
    /// The form of the reply.
    pub reply: Reply,
    /// Where events go.
    pub ttrpc_address: String,
    /// containerd's gRPC socket; part of the socket's name.
    pub grpc_address: String,
    /// Directory of the shim's socket.
    pub socket_dir: PathBuf,
    /// Log more.
    pub debug: bool,
    /// Configuration named by the runtime options.
    pub origin: Origin,
}

/// Judges what came on stdin. `env` reads an environment variable.
///
/// # Errors
/// [`BootstrapError`].
pub fn parse(stdin: &[u8], args: &Args, env: impl Fn(&str) -> Option<String>) -> Result<Start, BootstrapError> {
    let params = BootstrapParams::parse_from_bytes(stdin).ok();
    let from_env = || Origin { path: env(PATH_ENV).filter(|path| !path.is_empty()).map(PathBuf::from), body: None };
    match params {
        Some(p) if !stdin.is_empty() && p.instance_id == args.id && p.namespace == args.namespace => {
            let options = p.extensions.iter().filter_map(|e| e.value.as_ref()).find_map(|any| origin(any).transpose());
            Ok(Start {
                reply: Reply::Protobuf,
                debug: args.debug || p.log_level.value() <= LogLevel::LOG_LEVEL_DEBUG as i32,
                // Who sends no address here may still have set the older variable.
                ttrpc_address: Some(p.containerd_ttrpc_address)
                    .filter(|address| !address.is_empty())
                    .or_else(|| env(TTRPC_ENV))
                    .unwrap_or_default(),
                grpc_address: p.containerd_grpc_address,
                socket_dir: p.socket_dir.filter(|d| !d.is_empty()).unwrap_or_else(|| SOCKET_DIR.into()).into(),
                origin: options.transpose()?.unwrap_or_else(from_env),
            })
        }
        // More than the two fields that an `Any` fills: a real message, but not ours.
        Some(p) if !p.containerd_ttrpc_address.is_empty() || !p.containerd_version.is_empty() => {
            Err(BootstrapError::Mismatch {
                theirs: format!("{}/{}", p.namespace, p.instance_id),
                ours: format!("{}/{}", args.namespace, args.id),
            })
        }
        _ => {
            let options = Any::parse_from_bytes(stdin)
                .map_err(|source| BootstrapError::Message { what: "read runtime options on stdin", source })?;
            let version = if env(VERSION_ENV).as_deref() == Some("3") { 3 } else { 2 };
            Ok(Start {
                reply: Reply::Json(version),
                ttrpc_address: env(TTRPC_ENV).unwrap_or_default(),
                grpc_address: args.address.clone(),
                socket_dir: SOCKET_DIR.into(),
                debug: args.debug,
                origin: origin(&options)?.unwrap_or_else(from_env),
            })
        }
    }
}

/// Reads runtime options; `None` where `any` is something else.
///
/// # Errors
/// [`BootstrapError::Message`] when the options cannot be decoded.
pub fn origin(any: &Any) -> Result<Option<Origin>, BootstrapError> {
    let name = any.type_url.rsplit('/').next().unwrap_or_default();
    if name != "runtimeoptions.v1.Options" {
        // Some tools send runc's options whatever the runtime; they hold nothing for nacelle.
        return Ok(None);
    }
    let failed = |source| BootstrapError::Message { what: "read runtime options", source };
    let (path, body) = decode_options(&any.value).map_err(failed)?;
    Ok(Some(Origin {
        path: (!path.is_empty()).then(|| path.into()),
        body: (!body.is_empty()).then(|| String::from_utf8_lossy(&body).into_owned()),
    }))
}

/// `runtimeoptions.v1.Options { string type_url = 1; string config_path = 2; bytes config_body = 3; }`, which
/// containerd's protocol crate does not carry.
fn decode_options(bytes: &[u8]) -> protobuf::Result<(String, Vec<u8>)> {
    let mut input = CodedInputStream::from_bytes(bytes);
    let (mut path, mut body) = (String::new(), Vec::new());
    while let Some(tag) = input.read_raw_tag_or_eof()? {
        match tag {
            18 => path = input.read_string()?,
            26 => body = input.read_bytes()?,
            _ => protobuf::rt::skip_field_for_tag(tag, &mut input)?,
        }
    }
    Ok((path, body))
}

/// Encodes the reply to `start`.
///
/// # Errors
/// [`BootstrapError::Message`] when the message cannot be encoded.
pub fn encode(reply: Reply, address: &str) -> Result<Vec<u8>, BootstrapError> {
    match reply {
        Reply::Json(version) => {
            let json = serde_json::json!({ "version": version, "address": address, "protocol": "ttrpc" });
            Ok(json.to_string().into_bytes())
        }
        Reply::Protobuf => {
            let result = BootstrapResult {
                version: 3,
                address: address.to_owned(),
                protocol: "ttrpc".to_owned(),
                ..Default::default()
            };
            let failed = |source| BootstrapError::Message { what: "write bootstrap result", source };
            result.write_to_bytes().map_err(failed)
        }
    }
}

/// Path of the socket of the shim that serves `group` in a namespace: containerd's scheme.
///
/// # Errors
/// [`BootstrapError::SocketPath`] when it would not fit a socket address.
pub fn socket_path(start: &Start, namespace: &str, group: &str) -> Result<PathBuf, BootstrapError> {
    let name = PathBuf::from(&start.grpc_address).join(namespace).join(group);
    let hash = Sha256::digest(name.as_os_str().as_encoded_bytes());
    let path = start.socket_dir.join(hash.iter().map(|b| format!("{b:02x}")).collect::<String>());
    if path.as_os_str().len() > MAX_SOCKET_PATH { Err(BootstrapError::SocketPath(path)) } else { Ok(path) }
}

#[cfg(test)]
mod tests {
    use containerd_shim_protos::bootstrap_api::Extension;

    use super::*;

    fn args() -> Args {
        Args { id: "c1".into(), namespace: "k8s.io".into(), address: "/run/c.sock".into(), ..Args::default() }
    }

    fn no_env(_: &str) -> Option<String> {
        None
    }

    fn options(path: &str, body: &str) -> Any {
        let mut value = Vec::new();
        for (tag, text) in [(10, "x"), (18, path), (26, body)] {
            value.extend([tag, text.len() as u8]);
            value.extend(text.as_bytes());
        }
        Any { type_url: "runtimeoptions.v1.Options".into(), value, ..Any::default() }
    }

    #[test]
    fn nothing_on_stdin_is_legacy() {
        let start = parse(b"", &args(), |key| (key == TTRPC_ENV).then(|| "/t.sock".into())).expect("parse");
        assert_eq!((start.reply, start.ttrpc_address.as_str()), (Reply::Json(2), "/t.sock"));
        assert_eq!(start.grpc_address, "/run/c.sock");
        let opted = parse(b"", &args(), |key| (key == VERSION_ENV).then(|| "3".into())).expect("parse");
        assert_eq!(opted.reply, Reply::Json(3));
    }

    #[test]
    fn options_on_stdin_are_legacy() {
        let input = options("/etc/n.toml", "").write_to_bytes().expect("encode");
        let start = parse(&input, &args(), no_env).expect("parse");
        assert_eq!(start.reply, Reply::Json(2));
        assert_eq!(start.origin, Origin { path: Some("/etc/n.toml".into()), body: None });
        let env = |key: &str| (key == PATH_ENV).then(|| "/env.toml".to_owned());
        let of = |stdin: &[u8]| parse(stdin, &args(), env).expect("parse").origin.path.expect("path");
        assert_eq!((of(&input), of(b"")), ("/etc/n.toml".into(), "/env.toml".into()), "options win");
        let runc = Any { type_url: "containerd.runc.v1.Options".into(), ..Any::default() };
        let start = parse(&runc.write_to_bytes().expect("encode"), &args(), no_env).expect("parse");
        assert_eq!((start.reply, start.origin), (Reply::Json(2), Origin::default()));
    }

    #[test]
    fn params_on_stdin_get_protobuf() {
        let mut params = BootstrapParams {
            instance_id: "c1".into(),
            namespace: "k8s.io".into(),
            containerd_ttrpc_address: "/t.sock".into(),
            containerd_grpc_address: "/g.sock".into(),
            socket_dir: Some("/run/other".into()),
            ..Default::default()
        };
        params.extensions.push(Extension { value: Some(options("", "[vm]\n")).into(), ..Default::default() });
        let start = parse(&params.write_to_bytes().expect("encode"), &args(), no_env).expect("parse");
        assert_eq!((start.reply, start.ttrpc_address.as_str()), (Reply::Protobuf, "/t.sock"));
        assert_eq!(start.origin.body.as_deref(), Some("[vm]\n"));
        let path = socket_path(&start, "k8s.io", "c1").expect("path");
        assert!(path.starts_with("/run/other"));

        params.containerd_ttrpc_address.clear();
        let env = |name: &str| (name == TTRPC_ENV).then(|| "/env.sock".to_owned());
        let start = parse(&params.write_to_bytes().expect("encode"), &args(), env).expect("parse");
        assert_eq!(start.ttrpc_address, "/env.sock", "the older way to say it");
        params.containerd_ttrpc_address = "/t.sock".into();

        params.instance_id = "other".into();
        let err = parse(&params.write_to_bytes().expect("encode"), &args(), no_env).expect_err("refused");
        assert!(matches!(err, BootstrapError::Mismatch { .. }));
        assert!(parse(&[0xff, 0xff], &args(), no_env).is_err());
    }

    #[test]
    fn replies() {
        let json = encode(Reply::Json(2), "unix:///x").expect("encode");
        let json: serde_json::Value = serde_json::from_slice(&json).expect("json");
        assert_eq!(json, serde_json::json!({"version": 2, "address": "unix:///x", "protocol": "ttrpc"}));
        let bytes = encode(Reply::Protobuf, "unix:///x").expect("encode");
        let result = BootstrapResult::parse_from_bytes(&bytes).expect("decode");
        assert_eq!((result.version, result.address.as_str()), (3, "unix:///x"));
    }

    #[test]
    fn socket_name_is_containerds() {
        let mut start = parse(b"", &args(), no_env).expect("parse");
        let path = socket_path(&start, "default", "c1").expect("path");
        // sha256 of /run/c.sock/default/c1
        let hash = Sha256::digest(b"/run/c.sock/default/c1");
        let hex: String = hash.iter().map(|b| format!("{b:02x}")).collect();
        assert_eq!(path, PathBuf::from("/run/containerd/s").join(hex));
        start.socket_dir = PathBuf::from("/").join("x".repeat(60));
        assert!(socket_path(&start, "default", "c1").is_err());
    }
}
