//! What a container has written → a tar archive on a stream to the host.
//!
//! ```text
//!  /run/nacelle/upper/<id>/upper ── pack (a thread) ──► pipe ── copy_out ──► stream
//! ```
//!
//! The archive is the overlay's upper as it lies on its disk: whiteouts are character devices 0:0, and opaque directories have
//! `trusted.overlay.opaque`. Directories come before what is in them. POSIX headers carry times and extended attributes, GNU ones
//! long names and holes. The container's processes are frozen or gone, so nothing changes meanwhile.
//!
//! A walk that fails ends the stream before the archive's end mark.

use std::collections::HashMap;
use std::fs::{self, File, Metadata};
use std::io::{self, BufWriter, Write};
use std::os::fd::OwnedFd;
use std::os::unix::fs::{FileTypeExt, MetadataExt};
use std::path::{Path, PathBuf};

use rustix::fs::{llistxattr, major, minor};
use rustix::io::Errno;
use tar::{Builder, EntryType, Header, HeaderMode};
use tokio::io::Interest;

use crate::dial;
use crate::fd::Fd;
use crate::guest::{Guest, GuestError, label};
use crate::mount::upper_path;
use crate::stdio::{StdioError, copy_out};

/// Bytes that travel together through the pipe.
const CHUNK: usize = 64 << 10;
/// Largest list and value of extended attributes that the kernel knows (XATTR_SIZE_MAX of linux/limits.h).
const XATTR_MAX: usize = 64 << 10;

impl Guest {
    /// Begins to send what a container has written; returns when the stream is dialled.
    ///
    /// # Errors
    /// [`GuestError::State`] for a container that could write meanwhile.
    pub async fn export(&self, id: &str, stream: u64) -> Result<(), GuestError> {
        self.with(id, |container| {
            let still = container.paused || container.init.ended().is_some();
            let busy =
                || GuestError::State(format!("export {}", label(id, "")), "it is neither paused nor has it ended");
            if still { Ok(()) } else { Err(busy()) }
        })?;
        let wire = dial::stream(&self.dial, stream)
            .await
            .map_err(|source| GuestError::Stdio(label(id, ""), StdioError::Open { id: stream, source }))?;
        let failed = |error| GuestError::System(format!("export {}", label(id, "")), error);
        let (reader, writer) = io::pipe().map_err(failed)?;
        let source = Fd::new(OwnedFd::from(reader), Interest::READABLE).map_err(failed)?;
        let (upper, name) = (upper_path(id), label(id, ""));
        tokio::task::spawn_blocking(move || {
            if let Err(error) = pack(&upper, writer) {
                crate::say!("export {name}: {error}");
            }
        });
        tokio::spawn(copy_out(source, wire));
        Ok(())
    }
}

/// Writes the archive of `upper`.
///
/// # Errors
/// What the system says, with the path.
pub fn pack(upper: &Path, to: impl Write) -> io::Result<()> {
    let mut archive = Builder::new(BufWriter::with_capacity(CHUNK, to));
    archive.mode(HeaderMode::Complete);
    let mut names = HashMap::new();
    let mut waiting = vec![PathBuf::from(".")];
    while let Some(path) = waiting.pop() {
        let full = upper.join(&path);
        let named = |error: io::Error| io::Error::new(error.kind(), format!("{}: {error}", path.display()));
        let metadata = fs::symlink_metadata(&full).map_err(named)?;
        append(&mut archive, &mut names, &path, &full, &metadata).map_err(named)?;
        if metadata.is_dir() {
            for entry in fs::read_dir(&full).map_err(named)? {
                let name = entry.map_err(named)?.file_name();
                waiting.push(if path == Path::new(".") { name.into() } else { path.join(name) });
            }
        }
    }
    archive.into_inner()?.flush()
}

/// Appends one entry; `names` has the first name of each inode that has several.
fn append(
    archive: &mut Builder<impl Write>,
    names: &mut HashMap<u64, PathBuf>,
    path: &Path,
    full: &Path,
    metadata: &Metadata,
) -> io::Result<()> {
    let kind = metadata.file_type();
    let mut header = Header::new_gnu();
    header.set_metadata_in_mode(metadata, HeaderMode::Complete);
    header.set_size(0);
    header.set_mtime(metadata.mtime().try_into().unwrap_or(0));
    if !kind.is_dir() && metadata.nlink() > 1 {
        if let Some(first) = names.get(&metadata.ino()) {
            header.set_entry_type(EntryType::Link);
            return archive.append_link(&mut header, path, first);
        }
        names.insert(metadata.ino(), path.to_owned());
    }
    if kind.is_socket() {
        // Nothing without its process, but whatever it hides stays hidden.
        return device(archive, path, &mut header, EntryType::Char, 0);
    }
    let mut records = vec![("mtime".to_owned(), decimal(metadata.mtime(), metadata.mtime_nsec()).into_bytes())];
    records.extend(xattrs(full)?.into_iter().map(|(name, value)| (format!("SCHILY.xattr.{name}"), value)));
    archive.append_pax_extensions(records.iter().map(|(key, value)| (key.as_str(), value.as_slice())))?;
    if kind.is_file() && metadata.mtime() < 0 {
        // A header's own field has no place for such a time, which would spoil the archive.
        header.set_size(metadata.len());
        return archive.append_data(&mut header, path, File::open(full)?);
    }
    if kind.is_file() {
        let mut file = File::open(full)?;
        // A file that the kernel is just writing back may for a moment have no blocks, neither expected nor there
        // (ext4_da_update_reserve_space), and the archive's builder takes that for one hole. So holes are looked for in files that
        // seem to have some, and when nothing is left to be written back.
        let holes = metadata.blocks() * 512 < metadata.len();
        if holes {
            file.sync_data()?;
        }
        archive.sparse(holes);
        return archive.append_file(path, &mut file);
    }
    if kind.is_symlink() {
        return archive.append_link(&mut header, path, fs::read_link(full)?);
    }
    if kind.is_dir() {
        return archive.append_data(&mut header, path, io::empty());
    }
    let entry = match () {
        () if kind.is_char_device() => EntryType::Char,
        () if kind.is_block_device() => EntryType::Block,
        () => EntryType::Fifo,
    };
    device(archive, path, &mut header, entry, metadata.rdev())
}

/// A time as POSIX headers have it.
fn decimal(seconds: i64, nanoseconds: i64) -> String {
    match (seconds, nanoseconds) {
        (..0, 1..) if seconds == -1 => format!("-0.{:09}", 1_000_000_000 - nanoseconds),
        (..0, 1..) => format!("{}.{:09}", seconds + 1, 1_000_000_000 - nanoseconds),
        _ => format!("{seconds}.{nanoseconds:09}"),
    }
}

fn device(
    archive: &mut Builder<impl Write>,
    path: &Path,
    header: &mut Header,
    entry: EntryType,
    device: u64,
) -> io::Result<()> {
    header.set_entry_type(entry);
    header.set_device_major(major(device))?;
    header.set_device_minor(minor(device))?;
    archive.append_data(header, path, io::empty())
}

/// Attributes, without the overlay's books about its layers.
fn xattrs(path: &Path) -> io::Result<Vec<(String, Vec<u8>)>> {
    let mut list = vec![0; XATTR_MAX];
    let len = match llistxattr(path, &mut list) {
        Err(Errno::NOTSUP) => 0,
        other => other?,
    };
    let mut found = Vec::new();
    for name in list[..len].split(|&byte| byte == 0).filter(|name| !name.is_empty()) {
        let overlay = name.strip_prefix(b"trusted.overlay.");
        if overlay.is_some_and(|own| own != b"opaque" && !own.starts_with(b"overlay.")) {
            continue;
        }
        let Some(text) = str::from_utf8(name).ok().filter(|text| !text.contains('=')) else {
            let name = String::from_utf8_lossy(name);
            crate::say!("export {}: attribute {name:?} has a name that no archive can hold", path.display());
            continue;
        };
        let mut value = vec![0; XATTR_MAX];
        let len = rustix::fs::lgetxattr(path, text, &mut value)?;
        value.truncate(len);
        found.push((text.to_owned(), value));
    }
    Ok(found)
}

#[cfg(test)]
mod tests {
    use super::*;
    use std::io::Read;
    use std::os::unix::fs::FileExt;

    #[test]
    fn times_before_1970() {
        assert_eq!(decimal(-2, 750_000_000), "-1.250000000");
        assert_eq!(decimal(-1, 500_000_000), "-0.500000000");
        assert_eq!((decimal(-2, 0), decimal(3, 4)), ("-2.000000000".to_owned(), "3.000000004".to_owned()));
    }

    #[test]
    fn a_tree_comes_out_of_its_archive() {
        let tree = tempfile::tempdir().expect("directory");
        let at = |name: &str| tree.path().join(name);
        fs::create_dir(at("dir")).expect("directory");
        fs::write(at("dir/file"), "text").expect("file");
        fs::hard_link(at("dir/file"), at("dir/second")).expect("link");
        std::os::unix::fs::symlink("../outside", at("link")).expect("symlink");
        let long = "n".repeat(200);
        fs::write(at(&long), "long").expect("file");
        let hole = File::create(at("hole")).expect("file");
        hole.set_len(8 << 20).expect("hole");
        // Not yet on the disk.
        hole.write_all_at(b"data", 4 << 20).expect("data");
        let mut bytes = Vec::new();
        pack(tree.path(), &mut bytes).expect("packed");
        assert!(bytes.len() < 1 << 20, "holes are not sent");
        let mut archive = tar::Archive::new(bytes.as_slice());
        let mut seen = Vec::new();
        for entry in archive.entries().expect("archive") {
            let mut entry = entry.expect("entry");
            let mut text = String::new();
            if entry.path().expect("path") == Path::new("hole") {
                let mut bytes = Vec::new();
                entry.read_to_end(&mut bytes).expect("bytes");
                assert_eq!((bytes.len(), &bytes[4 << 20..][..4]), (8 << 20, b"data".as_slice()));
            }
            if entry.size() < 100 {
                entry.read_to_string(&mut text).expect("text");
            }
            seen.push((entry.path().expect("path").display().to_string(), entry.header().entry_type(), text));
        }
        let kinds = |kind| seen.iter().filter(|(_, found, _)| *found == kind).count();
        assert_eq!(
            (kinds(EntryType::Directory), kinds(EntryType::Link), kinds(EntryType::Symlink)),
            (2, 1, 1),
            "{seen:?}"
        );
        assert!(seen.iter().any(|(path, _, text)| *path == long && text == "long"), "{seen:?}");
        assert_eq!(seen.first().map(|(path, ..)| path.trim_end_matches('/')), Some("."), "the root comes first");
    }
}
