//! The formats of disk images, and the types of the file systems on them, as texts.

use std::fmt;
use std::path::Path;
use std::str::FromStr;

use serde::de::{Deserialize, Deserializer, Error};
use serde::ser::{Serialize, Serializer};

/// How a disk image is laid out.
#[derive(Clone, Copy, Debug, PartialEq, Eq, Hash)]
pub enum Format {
    /// The bytes of the disk and nothing else.
    Raw,
    /// QEMU's copy-on-write format.
    Qcow2,
    /// VMware's format: a text that names flat pieces. Sparse pieces and parents are refused.
    Vmdk,
}

impl Format {
    /// All of them.
    pub const ALL: [Format; 3] = [Format::Raw, Format::Qcow2, Format::Vmdk];

    /// Its name in texts, which is its extension as well.
    pub fn name(self) -> &'static str {
        match self {
            Format::Raw => "raw",
            Format::Qcow2 => "qcow2",
            Format::Vmdk => "vmdk",
        }
    }

    /// The format that a file's extension stands for, which must be exactly `raw`, `qcow2` or `vmdk`.
    pub fn of_extension(path: &Path) -> Option<Format> {
        let extension = path.extension()?.to_str()?;
        Format::ALL.into_iter().find(|format| format.name() == extension)
    }

    /// As JSON has it.
    fn pascal(self) -> &'static str {
        match self {
            Format::Raw => "Raw",
            Format::Qcow2 => "Qcow2",
            Format::Vmdk => "Vmdk",
        }
    }
}

/// The formats, for messages.
pub(crate) const FORMATS: &str = "raw, qcow2 and vmdk";

impl fmt::Display for Format {
    fn fmt(&self, f: &mut fmt::Formatter) -> fmt::Result {
        f.write_str(self.name())
    }
}

/// A text that is no format.
#[derive(Clone, Debug, PartialEq, Eq, thiserror::Error)]
#[error("disk format {0:?} is unknown: there are {FORMATS}")]
pub struct UnknownFormat(pub String);

impl FromStr for Format {
    type Err = UnknownFormat;

    fn from_str(text: &str) -> Result<Format, UnknownFormat> {
        let found = Format::ALL.into_iter().find(|format| format.name() == text);
        found.ok_or_else(|| UnknownFormat(text.to_owned()))
    }
}

impl Serialize for Format {
    fn serialize<S: Serializer>(&self, to: S) -> Result<S::Ok, S::Error> {
        to.serialize_str(self.pascal())
    }
}

impl<'de> Deserialize<'de> for Format {
    /// Takes `"Qcow2"` and `"qcow2"`.
    fn deserialize<D: Deserializer<'de>>(from: D) -> Result<Format, D::Error> {
        let text = String::deserialize(from)?;
        let pascal = Format::ALL.into_iter().find(|format| format.pascal() == text);
        pascal.map_or_else(|| text.parse().map_err(D::Error::custom), Ok)
    }
}

/// Why a text is no type of a file system.
#[derive(Clone, Debug, PartialEq, Eq, thiserror::Error)]
pub enum FstypeError {
    /// Nothing is there.
    #[error("file system type is empty")]
    Empty,
    /// It has a character that would end it where options are written down.
    #[error("file system type {0:?} has one of \", ; : =\"")]
    Character(String),
}

/// Looks at the text alone; whether the guest has such a file system is for the guest to say.
pub fn check_fstype(text: &str) -> Result<(), FstypeError> {
    match text {
        "" => Err(FstypeError::Empty),
        text if text.contains([',', ';', ':', '=']) => Err(FstypeError::Character(text.to_owned())),
        _ => Ok(()),
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    // B1
    #[test]
    fn formats_are_lower_case_texts() {
        for format in Format::ALL {
            assert_eq!(format.to_string().parse(), Ok(format));
        }
        for text in ["RAW", "Qcow2", "", "ext4", "raw "] {
            let error = text.parse::<Format>().unwrap_err();
            assert_eq!(error.to_string(), format!("disk format {text:?} is unknown: there are raw, qcow2 and vmdk"));
        }
    }

    // B1
    #[test]
    fn extensions_are_exact() {
        let table = [
            ("a.raw", Some(Format::Raw)),
            ("/x/a.b.qcow2", Some(Format::Qcow2)),
            ("./a.vmdk", Some(Format::Vmdk)),
            ("a.ext4", None),
            ("a.img", None),
            ("a.RAW", None),
            ("a.Qcow2", None),
            ("a", None),
            ("a.", None),
            (".raw", None),
            ("raw", None),
            ("", None),
        ];
        for (path, format) in table {
            assert_eq!(Format::of_extension(Path::new(path)), format, "{path:?}");
        }
    }

    // B1
    #[test]
    fn json_is_in_pascal_case_and_both_are_read() {
        assert_eq!(serde_json::to_string(&Format::ALL).unwrap(), r#"["Raw","Qcow2","Vmdk"]"#);
        for text in [r#"["Raw","Qcow2","Vmdk"]"#, r#"["raw","qcow2","vmdk"]"#] {
            assert_eq!(serde_json::from_str::<[Format; 3]>(text).unwrap(), Format::ALL);
        }
        let error = serde_json::from_str::<Format>(r#""QCOW2""#).unwrap_err();
        assert!(error.to_string().contains(r#""QCOW2""#), "{error}");
    }

    // B6
    #[test]
    fn types_of_file_systems_have_no_separators() {
        assert_eq!(check_fstype("ext4"), Ok(()));
        assert_eq!(check_fstype("").unwrap_err().to_string(), "file system type is empty");
        for text in ["ext4,ro", "a;b", "a:b", "a=b"] {
            let error = check_fstype(text).unwrap_err().to_string();
            assert_eq!(error, format!("file system type {text:?} has one of \", ; : =\""));
        }
    }
}
