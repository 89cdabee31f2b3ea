//! The command line, as containerd writes it: Go flags, then an action.
//!
//! ```text
//!  containerd-shim-nacelle-v2 -namespace NS -address GRPC -publish-binary BIN -id ID [-debug] start
//!  containerd-shim-nacelle-v2 … -bundle DIR delete
//!  containerd-shim-nacelle-v2 -info | -v
//!  containerd-shim-nacelle-v2 -namespace NS -address GRPC -id ID [-debug] serve      by the shim itself
//! ```

use std::path::PathBuf;

use nacelle_protocol::ids::{IdError, SandboxId};
use thiserror::Error;

/// What the command line says.
#[derive(Debug, Default, PartialEq, Eq)]
pub struct Args {
    /// containerd's namespace.
    pub namespace: String,
    /// The container, or the sandbox.
    pub id: String,
    /// containerd's gRPC socket.
    pub address: String,
    /// containerd's own binary.
    pub publish_binary: String,
    /// Bundle of a `delete`, which does not run in it.
    pub bundle: Option<PathBuf>,
    /// Log more.
    pub debug: bool,
    /// `-v` or `-version`.
    pub version: bool,
    /// `-info`.
    pub info: bool,
    /// `start`, `delete` or `serve`.
    pub action: String,
}

/// Why a command line is refused.
#[derive(Debug, Error, PartialEq, Eq)]
pub enum ArgsError {
    /// There is no such flag.
    #[error("parse arguments: unknown flag {0:?}")]
    Unknown(String),
    /// A flag stands without its value.
    #[error("parse arguments: flag {0:?} needs a value")]
    NoValue(String),
    /// The namespace or the id could not be a file name.
    #[error("parse arguments: -{flag}")]
    Id {
        /// The flag.
        flag: &'static str,
        /// The cause.
        #[source]
        source: IdError,
    },
}

impl Args {
    /// Reads the arguments that follow the program's name.
    ///
    /// # Errors
    /// [`ArgsError`].
    pub fn parse(args: impl IntoIterator<Item = String>) -> Result<Self, ArgsError> {
        let mut out = Self::default();
        let mut args = args.into_iter();
        while let Some(arg) = args.next() {
            let Some(flag) = arg.strip_prefix("--").or_else(|| arg.strip_prefix('-')) else {
                // Go stops at the first word that is not a flag.
                out.action = arg;
                break;
            };
            let (name, inline) = match flag.split_once('=') {
                Some((name, value)) => (name, Some(value.to_owned())),
                None => (flag, None),
            };
            let switch = match name {
                "debug" => Some(&mut out.debug),
                "v" | "version" => Some(&mut out.version),
                "info" => Some(&mut out.info),
                _ => None,
            };
            if let Some(switch) = switch {
                *switch = inline.is_none_or(|value| value == "true");
                continue;
            }
            let mut value = || inline.clone().or_else(|| args.next()).ok_or_else(|| ArgsError::NoValue(arg.clone()));
            match name {
                "namespace" => out.namespace = value()?,
                "id" => out.id = value()?,
                "address" => out.address = value()?,
                "publish-binary" => out.publish_binary = value()?,
                "bundle" => out.bundle = Some(value()?.into()),
                // Flags of other shims' servers that nacelle has no use for.
                "socket" => drop(value()?),
                _ => return Err(ArgsError::Unknown(arg)),
            }
        }
        Ok(out)
    }

    /// The namespace and the id, fit to be file names.
    ///
    /// # Errors
    /// [`ArgsError::Id`]: namespaces follow the same rules as ids.
    pub fn ids(&self) -> Result<(SandboxId, SandboxId), ArgsError> {
        let check = |flag, text: &str| SandboxId::new(text).map_err(|source| ArgsError::Id { flag, source });
        Ok((check("namespace", &self.namespace)?, check("id", &self.id)?))
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    fn parse(line: &str) -> Result<Args, ArgsError> {
        Args::parse(line.split_whitespace().map(str::to_owned))
    }

    #[test]
    fn containerd_command_lines() {
        let start = parse("-namespace k8s.io -address /c.sock -publish-binary /usr/bin/containerd -id c1 -debug start");
        let start = start.expect("parse");
        assert_eq!((start.namespace.as_str(), start.id.as_str(), start.action.as_str()), ("k8s.io", "c1", "start"));
        assert!(start.debug && start.address == "/c.sock" && start.bundle.is_none());
        let delete = parse("-namespace=default --id=c1 -bundle /b delete").expect("parse");
        assert_eq!((delete.bundle, delete.action.as_str()), (Some("/b".into()), "delete"));
        assert!(parse("-v").expect("parse").version);
        assert!(parse("-info").expect("parse").info);
    }

    #[test]
    fn refusals() {
        assert_eq!(parse("-nope start"), Err(ArgsError::Unknown("-nope".into())));
        assert_eq!(parse("-id"), Err(ArgsError::NoValue("-id".into())));
        let args = parse("-namespace ../x -id c1 start").expect("parse");
        assert!(matches!(args.ids(), Err(ArgsError::Id { flag: "namespace", .. })));
    }
}
