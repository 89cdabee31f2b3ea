//! JSON → patches. Two forms are read: `{"kind": "text", ..}`, and `{"Text": {..}}` as other tools write them.

use std::path::PathBuf;

use base64::Engine;
use base64::engine::general_purpose::STANDARD;
use serde::de::{Deserialize, Deserializer, Error};
use serde_json::Value;

use super::{Change, Given, Patch, PatchError, Preserve};
use crate::Limits;
use crate::path::GuestPath;

/// Longest target of a symbolic link.
const TARGET_MAX: usize = 4095;

/// Reads a list.
pub fn decode(json: &[u8], limits: &Limits) -> Result<Vec<Patch>, PatchError> {
    let list: Vec<Value> = serde_json::from_slice(json).map_err(PatchError::Decode)?;
    if list.len() > limits.patches {
        return Err(PatchError::TooMany(limits.patches));
    }
    let read = |(index, value)| one(value).map_err(|source| PatchError::Entry { index, source });
    list.into_iter().enumerate().map(read).collect()
}

fn one(value: Value) -> Result<Patch, serde_json::Error> {
    let mut value = tagged(value);
    let follow = value.as_object_mut().and_then(|fields| fields.remove("follow_symlinks"));
    let follow_symlinks = follow.map_or(Ok(None), serde_json::from_value::<Option<bool>>);
    let follow_symlinks = follow_symlinks.map_err(|e| Error::custom(format!("follow_symlinks: {e}")))?.unwrap_or(false);
    let change = serde_json::from_value::<Raw>(value).and_then(Change::try_from)?;
    if follow_symlinks && change.path().names().len() == 1 && !matches!(change, Change::Append { .. }) {
        let path = change.path();
        return Err(Error::custom(format!(
            "follow_symlinks means nothing for {path}: no link can be on the way to it"
        )));
    }
    Ok(Patch { change, follow_symlinks })
}

/// `{"CopyFile": {..}}` → `{"kind": "copy-file", ..}`; anything else stays.
fn tagged(value: Value) -> Value {
    const OUTER: [(&str, &str); 8] = [
        ("Text", "text"),
        ("File", "file"),
        ("CopyFile", "copy-file"),
        ("CopyDir", "copy-dir"),
        ("Symlink", "symlink"),
        ("Mkdir", "mkdir"),
        ("Remove", "remove"),
        ("Append", "append"),
    ];
    let Value::Object(object) = &value else { return value };
    let outer = OUTER.iter().find_map(|(name, kind)| Some((object.get(*name)?.as_object()?, *kind)));
    match outer {
        Some((fields, kind)) if object.len() == 1 => {
            let mut fields = fields.clone();
            fields.insert("kind".into(), kind.into());
            Value::Object(fields)
        }
        _ => value,
    }
}

/// A patch as it is written. `null` is as good as leaving a field out.
#[derive(serde::Deserialize)]
#[serde(tag = "kind", rename_all = "kebab-case", deny_unknown_fields)]
enum Raw {
    Text {
        path: GuestPath,
        content: String,
        mode: Option<Mode>,
        uid: Option<u32>,
        gid: Option<u32>,
        #[serde(default)]
        replace: bool,
    },
    File {
        path: GuestPath,
        #[serde(alias = "content")]
        bytes: Bytes,
        mode: Option<Mode>,
        uid: Option<u32>,
        gid: Option<u32>,
        #[serde(default)]
        replace: bool,
    },
    CopyFile {
        src: HostPath,
        dst: GuestPath,
        mode: Option<Mode>,
        uid: Option<u32>,
        gid: Option<u32>,
        #[serde(default)]
        replace: bool,
    },
    CopyDir {
        src: HostPath,
        dst: GuestPath,
        #[serde(default)]
        preserve: Vec<Kept>,
        #[serde(default)]
        replace: bool,
    },
    Symlink {
        target: String,
        link: GuestPath,
        #[serde(default)]
        replace: bool,
    },
    Mkdir {
        path: GuestPath,
        mode: Option<Mode>,
        uid: Option<u32>,
        gid: Option<u32>,
    },
    Remove {
        path: GuestPath,
    },
    Append {
        path: GuestPath,
        content: String,
    },
}

impl TryFrom<Raw> for Change {
    type Error = serde_json::Error;

    fn try_from(raw: Raw) -> Result<Change, serde_json::Error> {
        let given = |mode: Option<Mode>, uid, gid| Given { mode: mode.map(|m| m.0), uid, gid };
        Ok(match raw {
            Raw::Text { path, content, mode, uid, gid, replace } => {
                Change::Write { path, content: content.into_bytes(), given: given(mode, uid, gid), replace }
            }
            Raw::File { path, bytes, mode, uid, gid, replace } => {
                Change::Write { path, content: bytes.0, given: given(mode, uid, gid), replace }
            }
            Raw::CopyFile { src, dst, mode, uid, gid, replace } => {
                Change::CopyFile { source: src.0, path: dst, given: given(mode, uid, gid), replace }
            }
            Raw::CopyDir { src, dst, preserve, replace } => {
                let preserve = Preserve {
                    owner: preserve.contains(&Kept::Owner),
                    mtime: preserve.contains(&Kept::Mtime),
                    xattrs: preserve.contains(&Kept::Xattrs),
                };
                Change::CopyDir { source: src.0, path: dst, preserve, replace }
            }
            Raw::Symlink { target, .. } if target.is_empty() || target.contains('\0') || target.len() > TARGET_MAX => {
                return Err(Error::custom(format!("target of a link must be 1 to {TARGET_MAX} bytes without NUL")));
            }
            Raw::Symlink { target, link, replace } => {
                Change::Symlink { target: target.into_bytes(), path: link, replace }
            }
            Raw::Mkdir { path, mode, uid, gid } => Change::Mkdir { path, given: given(mode, uid, gid) },
            Raw::Remove { path } => Change::Remove { path },
            Raw::Append { path, content } => Change::Append { path, content: content.into_bytes() },
        })
    }
}

#[derive(serde::Deserialize, PartialEq)]
#[serde(rename_all = "lowercase")]
enum Kept {
    Owner,
    Mtime,
    Xattrs,
}

impl<'de> Deserialize<'de> for GuestPath {
    fn deserialize<D: Deserializer<'de>>(from: D) -> Result<GuestPath, D::Error> {
        let text = String::deserialize(from)?;
        GuestPath::parse(text.as_bytes()).map_err(|e| D::Error::custom(format!("path {text:?}: {e}")))
    }
}

struct HostPath(PathBuf);

impl<'de> Deserialize<'de> for HostPath {
    fn deserialize<D: Deserializer<'de>>(from: D) -> Result<HostPath, D::Error> {
        let text = String::deserialize(from)?;
        if text.starts_with('/') && !text.contains('\0') {
            Ok(HostPath(text.into()))
        } else {
            Err(D::Error::custom(format!("source {text:?} is not an absolute path")))
        }
    }
}

/// `"0644"`, `"644"`, `"0o644"`, or the number itself.
struct Mode(u16);

impl<'de> Deserialize<'de> for Mode {
    fn deserialize<D: Deserializer<'de>>(from: D) -> Result<Mode, D::Error> {
        #[derive(serde::Deserialize)]
        #[serde(untagged)]
        enum Form {
            Octal(String),
            Number(u64),
        }
        let mode = match Form::deserialize(from)? {
            Form::Number(number) => number,
            Form::Octal(text) => {
                let digits = text.strip_prefix("0o").unwrap_or(&text);
                let octal = !digits.is_empty() && digits.bytes().all(|b| (b'0'..=b'7').contains(&b));
                let mode = if octal { u64::from_str_radix(digits, 8).ok() } else { None };
                mode.ok_or_else(|| D::Error::custom(format!("mode {text:?} is no octal number")))?
            }
        };
        match u16::try_from(mode) {
            Ok(mode @ ..=0o7777) => Ok(Mode(mode)),
            _ => Err(D::Error::custom(format!("mode {mode:o} is larger than 7777"))),
        }
    }
}

/// Base64, or an array of numbers.
struct Bytes(Vec<u8>);

impl<'de> Deserialize<'de> for Bytes {
    fn deserialize<D: Deserializer<'de>>(from: D) -> Result<Bytes, D::Error> {
        #[derive(serde::Deserialize)]
        #[serde(untagged)]
        enum Form {
            Base64(String),
            Numbers(Vec<u8>),
        }
        Ok(Bytes(match Form::deserialize(from)? {
            Form::Numbers(bytes) => bytes,
            Form::Base64(text) => {
                STANDARD.decode(text).map_err(|e| D::Error::custom(format!("bytes are not base64: {e}")))?
            }
        }))
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    fn one(json: &str) -> Result<Patch, String> {
        let list = decode(format!("[{json}]").as_bytes(), &Limits::default());
        list.map(|mut list| list.remove(0)).map_err(|e| {
            let source = std::error::Error::source(&e).map_or(String::new(), |source| source.to_string());
            format!("{e}: {source}")
        })
    }

    fn path(text: &str) -> GuestPath {
        GuestPath::parse(text.as_bytes()).expect("a good path")
    }

    /// A7, A8: both forms, all eight kinds.
    #[test]
    fn both_forms_mean_the_same() {
        let given = Given { mode: Some(0o600), ..Given::default() };
        let text = Change::Write { path: path("/a"), content: b"x\n".into(), given, replace: true };
        let file = Change::Write { path: path("/a"), content: vec![0, 255], given: Given::default(), replace: false };
        let preserve = Preserve { owner: true, ..Preserve::default() };
        let copy = Change::CopyDir { source: "/s".into(), path: path("/d"), preserve, replace: false };
        let (none, source) = (Given::default(), PathBuf::from("/s"));
        let table = [
            (r#"{"kind":"text","path":"/a","content":"x\n","mode":"0600","replace":true}"#, text.clone()),
            (r#"{"Text":{"path":"//a/.","content":"x\n","mode":384,"replace":true}}"#, text),
            (r#"{"kind":"file","path":"/a","bytes":"AP8="}"#, file.clone()),
            (r#"{"File":{"path":"/a","bytes":[0,255],"mode":null,"replace":false}}"#, file),
            (
                r#"{"kind":"copy-file","src":"/s","dst":"/d"}"#,
                Change::CopyFile { source, path: path("/d"), given: none, replace: false },
            ),
            (r#"{"kind":"copy-dir","src":"/s","dst":"/d","preserve":["owner"]}"#, copy),
            (
                r#"{"Symlink":{"target":"../x","link":"/l","replace":false}}"#,
                Change::Symlink { target: b"../x".into(), path: path("/l"), replace: false },
            ),
            (
                r#"{"kind":"mkdir","path":"/d","mode":0}"#,
                Change::Mkdir { path: path("/d"), given: Given { mode: Some(0), ..none } },
            ),
            (r#"{"Remove":{"path":"/d"}}"#, Change::Remove { path: path("/d") }),
            (
                r#"{"kind":"append","path":"/f","content":"x"}"#,
                Change::Append { path: path("/f"), content: b"x".into() },
            ),
        ];
        for (json, change) in table {
            assert_eq!(one(json), Ok(change.into()), "{json}");
        }
        assert!(decode(b"[]", &Limits::default()).is_ok_and(|list| list.is_empty()), "A1");
    }

    /// A15
    #[test]
    fn links_are_followed_on_request() {
        for (json, follow) in [
            (r#"{"kind":"remove","path":"/a/b","follow_symlinks":true}"#, true),
            (r#"{"Remove":{"path":"/a/b","follow_symlinks":true}}"#, true),
            (r#"{"Append":{"path":"/a","content":"","follow_symlinks":true}}"#, true),
            (r#"{"kind":"remove","path":"/a/b","follow_symlinks":false}"#, false),
            (r#"{"kind":"remove","path":"/a","follow_symlinks":null}"#, false),
            (r#"{"kind":"remove","path":"/a/b"}"#, false),
        ] {
            assert_eq!(one(json).map(|patch| patch.follow_symlinks), Ok(follow), "{json}");
        }
        let nothing = one(r#"{"kind":"mkdir","path":"/a","follow_symlinks":true}"#).expect_err("no parents");
        assert!(nothing.contains("follow_symlinks means nothing for /a"), "{nothing}");
        let wrong = one(r#"{"kind":"mkdir","path":"/a/b","follow_symlinks":"yes"}"#).expect_err("no boolean");
        assert!(wrong.contains("decode patch 0: follow_symlinks: invalid type"), "{wrong}");
    }

    #[test]
    fn refusals_name_the_entry_and_the_reason() {
        let table = [
            (r#"{"kind":"remove","path":"etc"}"#, r#"decode patch 0: path "etc": it must be absolute"#),
            (r#"{"kind":"remove","path":"//"}"#, "it names the root directory"),
            (r#"{"kind":"remove","path":"/a/../b"}"#, "it has a \"..\""),
            (r#"{"kind":"remove","path":"/a","replace":true}"#, "unknown field `replace`"),
            (r#"{"kind":"mkdir","path":"/a","mode":"10000"}"#, "mode 10000 is larger than 7777"),
            (r#"{"kind":"mkdir","path":"/a","mode":"rwx"}"#, "is no octal number"),
            (r#"{"kind":"file","path":"/a","bytes":"?"}"#, "bytes are not base64"),
            (r#"{"kind":"file","path":"/a","bytes":[256]}"#, "did not match"),
            (r#"{"kind":"copy-file","src":"s","dst":"/d"}"#, r#"source "s" is not an absolute path"#),
            (r#"{"kind":"symlink","target":"","link":"/l"}"#, "target of a link must be 1 to 4095 bytes"),
            (r#"{"kind":"chmod","path":"/a"}"#, "unknown variant `chmod`"),
            (r#""text""#, "decode patch 0"),
        ];
        for (json, part) in table {
            let message = one(json).expect_err(json);
            assert!(message.contains(part), "{message} lacks {part}");
        }
        assert!(matches!(decode(b"{}", &Limits::default()), Err(PatchError::Decode(_))));
        let limits = Limits { patches: 1, ..Limits::default() };
        let two = br#"[{"Remove":{"path":"/a"}},{"Remove":{"path":"/b"}}]"#;
        assert!(matches!(decode(two, &limits), Err(PatchError::TooMany(1))));
    }
}
