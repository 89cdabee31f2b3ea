//! Where a container's root comes from, when it is not left to the snapshotter: the text that people write, and what it means.
//!
//! ```text
//!  .  ..  /x  ./x  ../x      a path of the host:   .raw .qcow2 .vmdk → a disk       anything else → a directory
//!  anything else             an image's reference
//! ```
//!
//! Nothing is looked up: a path that is written like a directory's is one even if a file is there. A text with another extension
//! stands for a directory; one that is said to be a disk ([`Source::disk`]) must have one of the three, or a format beside it; a
//! volume's disk (see [`crate::volume`]) with another extension is raw.

use std::path::{Path, PathBuf};

use serde::{Deserialize, Serialize};

use crate::disk::{FORMATS, Format, FstypeError, UnknownFormat, check_fstype};

/// Where a root comes from. The default is the image that the container has anyway.
#[derive(Clone, Debug, PartialEq, Eq, Serialize, Deserialize)]
pub enum Source {
    /// A directory of the host.
    Dir(PathBuf),
    /// An image, by its layers.
    Image {
        /// Its name; empty for whatever image the container has.
        #[serde(default)]
        reference: String,
        /// Size of the writable side, unless the configuration's.
        #[serde(default, skip_serializing_if = "Option::is_none")]
        upper_mib: Option<u32>,
    },
    /// A disk image of the host.
    Disk {
        /// The file.
        path: PathBuf,
        /// How it is laid out.
        format: Format,
        /// The file system on it; the guest finds out what is not said.
        #[serde(default, skip_serializing_if = "Option::is_none")]
        fstype: Option<String>,
    },
}

impl Default for Source {
    fn default() -> Source {
        Source::Image { reference: String::new(), upper_mib: None }
    }
}

/// Why there is no source. Keys are those of [`Request`], without what its surroundings put before them.
#[derive(Clone, Debug, PartialEq, Eq, thiserror::Error)]
pub enum SourceError {
    /// The path has a NUL byte.
    #[error("rootfs {0:?} has a NUL byte")]
    Nul(String),
    /// A disk without a format.
    #[error("rootfs {path:?} is to be a disk, and its extension {extension:?} is none of {FORMATS}")]
    Extension {
        /// The file.
        path: PathBuf,
        /// Its extension.
        extension: String,
    },
    /// A format that there is not.
    #[error("rootfs.format: {0}")]
    Format(UnknownFormat),
    /// A type of a file system that cannot be one.
    #[error("rootfs.fstype: {0}")]
    Fstype(FstypeError),
    /// A size that is none.
    #[error("rootfs.upper-size: {0}")]
    Size(SizeError),
    /// A key that does not go with this root.
    #[error("{key} goes with {wanted} alone, and rootfs is {found}")]
    Misplaced {
        /// The key.
        key: &'static str,
        /// What it goes with.
        wanted: &'static str,
        /// What the root is.
        found: String,
    },
}

/// A text that is no size.
#[derive(Clone, Debug, PartialEq, Eq, thiserror::Error)]
pub enum SizeError {
    /// Not a number, or one with a unit that is not known.
    #[error("size {0:?} is not a whole number of MiB, such as 8192, 8192Mi or 8Gi")]
    Text(String),
    /// Nothing fits.
    #[error("size {0:?} is zero")]
    Zero(String),
    /// More MiB than 32 bits hold.
    #[error("size {0:?} is too large")]
    Large(String),
}

/// Reads a size: MiB, unless it ends in `Mi` or `Gi`.
pub fn parse_mib(text: &str) -> Result<u32, SizeError> {
    let owned = || text.to_owned();
    let (digits, factor) = match text.strip_suffix("Gi") {
        Some(digits) => (digits, 1024),
        None => (text.strip_suffix("Mi").unwrap_or(text), 1),
    };
    if digits.is_empty() || !digits.bytes().all(|b| b.is_ascii_digit()) {
        return Err(SizeError::Text(owned()));
    }
    let count = digits.parse::<u32>().ok().and_then(|count| count.checked_mul(factor));
    match count.ok_or_else(|| SizeError::Large(owned()))? {
        0 => Err(SizeError::Zero(owned())),
        count => Ok(count),
    }
}

impl Source {
    /// What a text stands for.
    pub fn of_text(text: &str) -> Source {
        let local = matches!(text, "." | "..") || ["/", "./", "../"].iter().any(|prefix| text.starts_with(prefix));
        if local { Source::of_path(Path::new(text)) } else { Source::Image { reference: text.into(), upper_mib: None } }
    }

    /// What a path stands for: a disk by its extension, else a directory.
    pub fn of_path(path: &Path) -> Source {
        match Format::of_extension(path) {
            Some(format) => Source::Disk { path: path.into(), format, fstype: None },
            None => Source::Dir(path.into()),
        }
    }

    /// A disk, whose extension must tell the format when nothing else does.
    ///
    /// # Errors
    /// [`SourceError::Extension`], which lists the formats.
    pub fn disk(path: &Path, format: Option<Format>, fstype: Option<String>) -> Result<Source, SourceError> {
        let format = format.or_else(|| Format::of_extension(path));
        let format = format.ok_or_else(|| SourceError::Extension {
            path: path.into(),
            extension: path.extension().unwrap_or_default().to_string_lossy().into_owned(),
        })?;
        Ok(Source::Disk { path: path.into(), format, fstype })
    }

    /// The image's reference, when it is one.
    pub fn reference(&self) -> Option<&str> {
        match self {
            Source::Image { reference, .. } => Some(reference),
            Source::Dir(_) | Source::Disk { .. } => None,
        }
    }

    /// The size of the writable side, when it is an image and a size was given.
    pub fn upper_mib(&self) -> Option<u32> {
        match self {
            Source::Image { upper_mib, .. } => *upper_mib,
            Source::Dir(_) | Source::Disk { .. } => None,
        }
    }

    /// The host's path, when it is no image.
    pub fn path(&self) -> Option<&Path> {
        match self {
            Source::Dir(path) | Source::Disk { path, .. } => Some(path),
            Source::Image { .. } => None,
        }
    }

    /// The same with a relative path taken from `directory`.
    pub fn below(mut self, directory: &Path) -> Source {
        if let Source::Dir(path) | Source::Disk { path, .. } = &mut self {
            *path = directory.join(&*path);
        }
        self
    }

    /// Looks at a source that came from elsewhere than a [`Request`], such as a file.
    ///
    /// # Errors
    /// Everything that is wrong with it.
    pub fn validate(&self) -> Result<(), Vec<SourceError>> {
        let mut errors = Vec::new();
        errors.extend(self.path().and_then(nul));
        if let Source::Disk { fstype: Some(fstype), .. } = self {
            errors.extend(check_fstype(fstype).err().map(SourceError::Fstype));
        }
        if self.upper_mib() == Some(0) {
            errors.push(SourceError::Size(SizeError::Zero("0".into())));
        }
        if errors.is_empty() { Ok(()) } else { Err(errors) }
    }

    fn describe(&self) -> String {
        match self {
            Source::Dir(path) => format!("the directory {path:?}"),
            Source::Image { reference, .. } if reference.is_empty() => "the container's image".into(),
            Source::Image { reference, .. } => format!("the image {reference:?}"),
            Source::Disk { path, .. } => format!("the disk {path:?}"),
        }
    }
}

fn nul(path: &Path) -> Option<SourceError> {
    let text = path.to_string_lossy();
    text.contains('\0').then(|| SourceError::Nul(text.into_owned()))
}

/// What somebody asks for, as texts.
#[derive(Clone, Debug, Default, PartialEq, Eq)]
pub struct Request {
    /// `rootfs`: a path or a reference.
    pub rootfs: Option<String>,
    /// `rootfs.format`: makes a local path a disk of this format.
    pub format: Option<String>,
    /// `rootfs.upper-size`, for images.
    pub upper_size: Option<String>,
    /// `rootfs.fstype`, for disks.
    pub fstype: Option<String>,
}

impl Request {
    /// The source that is asked for.
    ///
    /// # Errors
    /// Everything that is wrong, at once.
    pub fn source(&self) -> Result<Source, Vec<SourceError>> {
        let mut errors = Vec::new();
        let mut source = self.rootfs.as_deref().map_or_else(Source::default, Source::of_text);
        errors.extend(source.path().and_then(nul));
        let misplaced = |key, wanted, source: &Source| SourceError::Misplaced { key, wanted, found: source.describe() };
        if let Some(text) = &self.format {
            let format = text.parse::<Format>().map_err(|e| errors.push(SourceError::Format(e))).ok();
            match source.path() {
                None => errors.push(misplaced("rootfs.format", "a disk", &source)),
                // A format that there is not says as well that a disk is meant.
                Some(path) => {
                    source = Source::Disk { path: path.into(), format: format.unwrap_or(Format::Raw), fstype: None };
                }
            }
        }
        if let Some(text) = &self.upper_size {
            let size = parse_mib(text).map_err(|e| errors.push(SourceError::Size(e))).ok();
            match &mut source {
                Source::Image { upper_mib, .. } => *upper_mib = size,
                other => errors.push(misplaced("rootfs.upper-size", "an image", other)),
            }
        }
        if let Some(text) = &self.fstype {
            errors.extend(check_fstype(text).err().map(SourceError::Fstype));
            match &mut source {
                Source::Disk { fstype, .. } => *fstype = Some(text.clone()),
                other => errors.push(misplaced("rootfs.fstype", "a disk", other)),
            }
        }
        if errors.is_empty() { Ok(source) } else { Err(errors) }
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    fn image(reference: &str) -> Source {
        Source::Image { reference: reference.into(), upper_mib: None }
    }

    fn disk(path: &str, format: Format) -> Source {
        Source::Disk { path: path.into(), format, fstype: None }
    }

    fn asked(rootfs: &str, format: &str, upper_size: &str, fstype: &str) -> Result<Source, Vec<String>> {
        let given = |text: &str| (text != "-").then(|| text.to_owned());
        let (rootfs, format) = (given(rootfs), given(format));
        let request = Request { rootfs, format, upper_size: given(upper_size), fstype: given(fstype) };
        request.source().map_err(|errors| errors.iter().map(ToString::to_string).collect())
    }

    // B3
    #[test]
    fn texts_are_paths_or_references() {
        let dir = |path: &str| Source::Dir(path.into());
        let table = [
            (".", dir(".")),
            ("..", dir("..")),
            ("/", dir("/")),
            ("/srv/root", dir("/srv/root")),
            ("./root", dir("./root")),
            ("../root.img", dir("../root.img")),
            ("/srv/a.RAW", dir("/srv/a.RAW")),
            ("/srv/a.raw", disk("/srv/a.raw", Format::Raw)),
            ("./a.qcow2", disk("./a.qcow2", Format::Qcow2)),
            ("../a.vmdk", disk("../a.vmdk", Format::Vmdk)),
            ("disk.raw", image("disk.raw")),
            ("docker.io/library/python:3.12", image("docker.io/library/python:3.12")),
            (".hidden", image(".hidden")),
            ("...", image("...")),
            ("~/root", image("~/root")),
            ("", image("")),
        ];
        for (text, source) in table {
            assert_eq!(Source::of_text(text), source, "{text:?}");
            assert_eq!(asked(text, "-", "-", "-"), Ok(source), "{text:?}");
        }
        assert_eq!(Source::of_path(Path::new("disk.raw")), disk("disk.raw", Format::Raw));
        assert_eq!(Source::of_path(Path::new("alpine")), dir("alpine"));
        assert_eq!(dir("root").below(Path::new("/bundle")), dir("/bundle/root"));
        assert_eq!(dir("/root").below(Path::new("/bundle")), dir("/root"));
        assert_eq!(image("root").below(Path::new("/bundle")), image("root"));
    }

    // B4
    #[test]
    fn a_disk_needs_a_known_extension_or_a_format() {
        let path = Path::new("/srv/root.txt");
        let error = Source::disk(path, None, None).unwrap_err().to_string();
        assert_eq!(
            error,
            "rootfs \"/srv/root.txt\" is to be a disk, and its extension \"txt\" is none of raw, qcow2 and vmdk"
        );
        assert_eq!(Source::disk(path, Some(Format::Qcow2), None), Ok(disk("/srv/root.txt", Format::Qcow2)));
        assert_eq!(Source::disk(Path::new("a.vmdk"), None, None), Ok(disk("a.vmdk", Format::Vmdk)));
        assert_eq!(asked("/srv/root.txt", "raw", "-", "-"), Ok(disk("/srv/root.txt", Format::Raw)));
        assert_eq!(asked("/srv/root.raw", "qcow2", "-", "-"), Ok(disk("/srv/root.raw", Format::Qcow2)));
    }

    // B5, B7
    #[test]
    fn options_of_other_roots_are_named_all_at_once() {
        let sized = Source::Image { reference: "a".into(), upper_mib: Some(8192) };
        assert_eq!(asked("a", "-", "8Gi", "-"), Ok(sized));
        assert_eq!(asked("-", "-", "1", "-").unwrap().upper_mib(), Some(1));
        let typed = Source::Disk { path: "/a.raw".into(), format: Format::Raw, fstype: Some("ext4".into()) };
        assert_eq!(asked("/a.raw", "-", "-", "ext4"), Ok(typed));
        let table: [(&str, &str, &str, &str, &[&str]); 9] = [
            ("/a", "-", "1", "-", &["rootfs.upper-size goes with an image alone, and rootfs is the directory \"/a\""]),
            (
                "/a.raw",
                "-",
                "1",
                "-",
                &["rootfs.upper-size goes with an image alone, and rootfs is the disk \"/a.raw\""],
            ),
            ("/a", "-", "-", "ext4", &["rootfs.fstype goes with a disk alone, and rootfs is the directory \"/a\""]),
            ("-", "-", "-", "ext4", &["rootfs.fstype goes with a disk alone, and rootfs is the container's image"]),
            ("a", "raw", "-", "-", &["rootfs.format goes with a disk alone, and rootfs is the image \"a\""]),
            ("/a", "iso", "-", "-", &["rootfs.format: disk format \"iso\" is unknown: there are raw, qcow2 and vmdk"]),
            ("/a.raw", "-", "-", "a=b", &["rootfs.fstype: file system type \"a=b\" has one of \", ; : =\""]),
            ("/a\0", "-", "-", "-", &["rootfs \"/a\\0\" has a NUL byte"]),
            (
                "/a",
                "-",
                "0",
                "",
                &[
                    "rootfs.upper-size: size \"0\" is zero",
                    "rootfs.upper-size goes with an image alone, and rootfs is the directory \"/a\"",
                    "rootfs.fstype: file system type is empty",
                    "rootfs.fstype goes with a disk alone, and rootfs is the directory \"/a\"",
                ],
            ),
        ];
        for (rootfs, format, size, fstype, errors) in table {
            assert_eq!(asked(rootfs, format, size, fstype).unwrap_err(), errors, "{rootfs} {format} {size} {fstype}");
        }
    }

    // B7
    #[test]
    fn sizes_are_whole_mib() {
        for (text, size) in [("1", 1), ("8192", 8192), ("8192Mi", 8192), ("8Gi", 8192), ("4294967295", u32::MAX)] {
            assert_eq!(parse_mib(text), Ok(size));
        }
        for text in ["", "Gi", "8G", "8gi", "8GiB", "+8", "-8", "8 Gi", "1.5Gi", "0x8", "8Ki", "8GiMi"] {
            assert_eq!(parse_mib(text), Err(SizeError::Text(text.into())));
        }
        assert_eq!(parse_mib("0Gi"), Err(SizeError::Zero("0Gi".into())));
        for text in ["4294967296", "4194304Gi", "99999999999999999999"] {
            assert_eq!(parse_mib(text), Err(SizeError::Large(text.into())));
        }
    }

    // B2
    #[test]
    fn accessors_and_json() {
        assert_eq!(Source::default(), image(""));
        let sized = Source::Image { reference: "a".into(), upper_mib: Some(7) };
        assert_eq!((sized.reference(), sized.upper_mib(), sized.path()), (Some("a"), Some(7), None));
        let root = disk("/a", Format::Qcow2);
        assert_eq!((root.reference(), root.upper_mib(), root.path()), (None, None, Some(Path::new("/a"))));
        let typed = Source::Disk { path: "/a".into(), format: Format::Raw, fstype: Some("ext4".into()) };
        let table = [
            (Source::Dir("/a".into()), r#"{"Dir":"/a"}"#),
            (image("a"), r#"{"Image":{"reference":"a"}}"#),
            (sized, r#"{"Image":{"reference":"a","upper_mib":7}}"#),
            (root, r#"{"Disk":{"path":"/a","format":"Qcow2"}}"#),
            (typed, r#"{"Disk":{"path":"/a","format":"Raw","fstype":"ext4"}}"#),
        ];
        for (source, json) in table {
            assert_eq!(serde_json::to_string(&source).unwrap(), json);
            assert_eq!(serde_json::from_str::<Source>(json).unwrap(), source);
            assert_eq!(source.validate(), Ok(()));
        }
    }

    // B25
    #[test]
    fn sources_from_elsewhere_are_validated() {
        let bad = Source::Disk { path: "/a\0".into(), format: Format::Raw, fstype: Some("a,b".into()) };
        assert_eq!(bad.validate().unwrap_err().len(), 2);
        let empty = Source::Image { reference: "a".into(), upper_mib: Some(0) };
        assert_eq!(empty.validate().unwrap_err().len(), 1);
    }
}
