//! Identifiers, parsed once and valid for ever.
//!
//! An id becomes a file name on the host and in the guest, so it is checked where it enters nacelle: the rules are
//! those of containerd's `identifiers` package, which is what containerd lets through.

use std::fmt;

use serde::{Deserialize, Serialize};
use thiserror::Error;

/// Longest identifier, in bytes (containerd's own limit).
pub const MAX_LEN: usize = 76;

/// Why a string is not an identifier.
#[derive(Debug, Error, PartialEq, Eq)]
pub enum IdError {
    /// The string is empty.
    #[error("read identifier: it is empty")]
    Empty,
    /// The string is longer than [`MAX_LEN`] bytes.
    #[error("read identifier {0:?}: longer than {MAX_LEN} bytes")]
    TooLong(String),
    /// A character or the arrangement of separators is not allowed.
    #[error("read identifier {0:?}: only letters and digits, joined by single `.`, `_` or `-`, are allowed")]
    BadCharacter(String),
}

fn check(text: &str) -> Result<(), IdError> {
    if text.is_empty() {
        return Err(IdError::Empty);
    }
    if text.len() > MAX_LEN {
        // Never echo more than a line of somebody else's bytes.
        return Err(IdError::TooLong(text.chars().take(MAX_LEN).collect()));
    }
    let bytes = text.as_bytes();
    let alphanumeric = |b: &u8| b.is_ascii_alphanumeric();
    let separator = |b: &u8| matches!(b, b'.' | b'_' | b'-');
    let edges_ok = alphanumeric(&bytes[0]) && alphanumeric(&bytes[bytes.len() - 1]);
    let inner_ok = bytes.iter().all(|b| alphanumeric(b) || separator(b))
        && !bytes.windows(2).any(|w| separator(&w[0]) && separator(&w[1]));
    if edges_ok && inner_ok { Ok(()) } else { Err(IdError::BadCharacter(text.to_owned())) }
}

macro_rules! id {
    ($(#[$doc:meta])* $name:ident) => {
        $(#[$doc])*
        #[derive(Clone, Debug, PartialEq, Eq, Hash, PartialOrd, Ord, Serialize, Deserialize)]
        #[serde(try_from = "String", into = "String")]
        pub struct $name(String);

        impl $name {
            /// Checks `text` and keeps it.
            ///
            /// # Errors
            /// [`IdError`] says which rule it breaks.
            pub fn new(text: impl Into<String>) -> Result<Self, IdError> {
                let text = text.into();
                check(&text)?;
                Ok(Self(text))
            }

            /// The identifier as text: a valid file name.
            pub fn as_str(&self) -> &str {
                &self.0
            }
        }

        impl TryFrom<String> for $name {
            type Error = IdError;
            fn try_from(text: String) -> Result<Self, IdError> {
                Self::new(text)
            }
        }

        impl From<$name> for String {
            fn from(id: $name) -> String {
                id.0
            }
        }

        impl fmt::Display for $name {
            fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
                f.write_str(&self.0)
            }
        }

        impl AsRef<std::path::Path> for $name {
            fn as_ref(&self) -> &std::path::Path {
                self.0.as_ref()
            }
        }
    };
}

id! {
    /// One pod, one microVM.
    SandboxId
}
id! {
    /// One container in a sandbox.
    ContainerId
}
id! {
    /// One extra process in a container.
    ExecId
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn accepts_what_containerd_accepts() {
        for ok in ["a", "abc-1", "A.b_c-d", "0123456789", &"x".repeat(MAX_LEN)] {
            assert!(ContainerId::new(ok).is_ok(), "{ok}");
        }
    }

    #[test]
    fn refuses_paths_and_oddities() {
        assert_eq!(ContainerId::new(""), Err(IdError::Empty));
        assert!(matches!(ContainerId::new("x".repeat(MAX_LEN + 1)), Err(IdError::TooLong(_))));
        for bad in ["..", "a/b", "a b", ".a", "a-", "a--b", "ä", "a\0b"] {
            assert!(matches!(ContainerId::new(bad), Err(IdError::BadCharacter(_))), "{bad}");
        }
    }

    #[test]
    fn deserializing_checks() {
        assert!(serde_json::from_str::<SandboxId>("\"../x\"").is_err());
    }
}
