//! Paths inside an image, as people, annotations and archives write them. Nothing is looked up: only the text is judged.

use std::fmt;

/// Longest name in a directory, in bytes.
const NAME_MAX: usize = 255;
/// Longest path, in bytes: the kernel's limit without its terminating NUL.
const PATH_MAX: usize = 4095;

/// Why a text is no path inside an image.
#[derive(Clone, Copy, Debug, PartialEq, Eq, thiserror::Error)]
pub enum PathError {
    /// It does not start with `/`.
    #[error("it must be absolute")]
    Relative,
    /// It starts with `/` where a path relative to the root is wanted.
    #[error("it must not be absolute")]
    Absolute,
    /// It names the root itself.
    #[error("it names the root directory")]
    Root,
    /// It has a `..`, whether or not that would leave the root.
    #[error("it has a \"..\", which could lead out of the root")]
    Escape,
    /// It has a NUL byte.
    #[error("it has a NUL byte")]
    Nul,
    /// One of its names is longer than 255 bytes.
    #[error("one of its names is longer than {NAME_MAX} bytes")]
    LongName,
    /// It is longer than 4,095 bytes.
    #[error("it is longer than {PATH_MAX} bytes")]
    Long,
}

/// The names in `path`, without `.` and empty ones. Absolute and relative paths are taken alike.
pub fn components(path: &[u8]) -> Result<Vec<&[u8]>, PathError> {
    if path.contains(&0) {
        return Err(PathError::Nul);
    }
    if path.len() > PATH_MAX {
        return Err(PathError::Long);
    }
    let names: Vec<&[u8]> = path.split(|&b| b == b'/').filter(|name| !matches!(*name, b"" | b".")).collect();
    match names.iter().find(|name| **name == b".." || name.len() > NAME_MAX) {
        None => Ok(names),
        Some(name) if *name == b".." => Err(PathError::Escape),
        Some(_) => Err(PathError::LongName),
    }
}

/// An absolute path below the root, taken apart: at least one name, none of them `.` or `..`.
#[derive(Clone, PartialEq, Eq, Hash, PartialOrd, Ord)]
pub struct GuestPath {
    names: Vec<Box<[u8]>>,
}

impl GuestPath {
    /// Reads a path.
    pub fn parse(path: &[u8]) -> Result<GuestPath, PathError> {
        if !path.starts_with(b"/") {
            return Err(PathError::Relative);
        }
        let names: Vec<Box<[u8]>> = components(path)?.into_iter().map(Box::from).collect();
        if names.is_empty() { Err(PathError::Root) } else { Ok(GuestPath { names }) }
    }

    /// The names on the way and the last one.
    pub fn split(&self) -> (&[Box<[u8]>], &[u8]) {
        match self.names.split_last() {
            Some((last, parents)) => (parents, last),
            None => (&[], b""), // parse lets none through
        }
    }

    /// All names.
    pub fn names(&self) -> &[Box<[u8]>] {
        &self.names
    }
}

/// A path of names, for messages.
pub fn show<N: AsRef<[u8]>>(names: &[N]) -> String {
    names.iter().map(|name| format!("/{}", String::from_utf8_lossy(name.as_ref()))).collect()
}

impl fmt::Display for GuestPath {
    fn fmt(&self, f: &mut fmt::Formatter) -> fmt::Result {
        f.write_str(&show(&self.names))
    }
}

impl fmt::Debug for GuestPath {
    fn fmt(&self, f: &mut fmt::Formatter) -> fmt::Result {
        write!(f, "{:?}", show(&self.names))
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn paths_are_taken_apart() {
        let read = |path: &str| GuestPath::parse(path.as_bytes()).map(|path| path.to_string());
        for (text, path) in
            [("/a", "/a"), ("//a//b/", "/a/b"), ("/./a/./b/.", "/a/b"), ("/...", "/..."), ("/a b/ü", "/a b/ü")]
        {
            assert_eq!(read(text), Ok(path.to_owned()));
        }
        let (long, longer) = ("n".repeat(256), "/n".repeat(2048));
        let table = [
            ("", PathError::Relative),
            ("a", PathError::Relative),
            ("./a", PathError::Relative),
            ("/", PathError::Root),
            ("//", PathError::Root),
            ("/./.", PathError::Root),
            ("/a/..", PathError::Escape),
            ("/../a", PathError::Escape),
            ("/a\0b", PathError::Nul),
            (&format!("/{long}"), PathError::LongName),
            (&longer, PathError::Long),
        ];
        for (text, error) in table {
            assert_eq!(read(text), Err(error), "{text:?}");
        }
    }
}
