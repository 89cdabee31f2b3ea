//! Copies of small volumes whose changes a watcher in a container must hear of.
//!
//! virtiofs tells the guest of no change that the host makes, so inotify(7) is silent on a share. The kubelet changes
//! ConfigMaps, Secrets and projected volumes in one way only: it writes a new directory and swaps a link to it. The shim
//! hears of that, and the agent does the same once more in a tmpfs, which is what the container has mounted.
//!
//! ```text
//!  <volume>/..2026_11_27_03_00_00.1/   key, directory/key      written first, never changed
//!  <volume>/..data ─► ..2026_11_27_03_00_00.1                  swapped by rename: the one event that watchers wait for
//!  <volume>/key    ─► ..data/key                               one link for each name in the directory
//! ```

use std::collections::BTreeSet;
use std::ffi::OsString;
use std::fs;
use std::io;
use std::os::unix::fs::{MetadataExt, PermissionsExt, chown, symlink};
use std::path::{Path, PathBuf};

use nacelle_protocol::agent::{DATA_LINK, MIRRORS_DIR, VOLUMES_DIR};
use rustix::mount::{MountFlags, UnmountFlags, mount, unmount};

/// Deepest directory of a volume.
const MAX_DEPTH: usize = 16;

/// A file name and nothing else.
fn file_name(name: &str) -> io::Result<&str> {
    let plain = !name.is_empty() && !name.contains(['/', '\0']) && !matches!(name, "." | "..");
    if plain { Ok(name) } else { Err(io::Error::new(io::ErrorKind::InvalidInput, "expected a file name")) }
}

fn places(volume: &str) -> io::Result<(PathBuf, PathBuf)> {
    let name = file_name(volume)?;
    Ok((Path::new(VOLUMES_DIR).join(name), Path::new(MIRRORS_DIR).join(name)))
}

/// Makes the copy of a volume whose link leads to `data`. Blocks.
///
/// # Errors
/// What the system says; nothing is left.
pub fn create(volume: &str, data: &str) -> io::Result<()> {
    let (from, to) = places(volume)?;
    fs::create_dir_all(&to)?;
    // Both the old and the new directory have to fit while the link is swapped, and pages are whole.
    let mounted =
        mount("nacelle-mirror", &to, "tmpfs", MountFlags::NOSUID | MountFlags::NODEV, Some(c"size=64m,mode=0755"));
    let made = mounted.map_err(io::Error::from).and_then(|()| like(&from, &to)).and_then(|()| swap(&from, &to, data));
    if made.is_err() {
        remove(volume);
    }
    made
}

/// Brings the copy of a volume up to date: its link leads to `data` now. Blocks.
///
/// # Errors
/// What the system says; the copy stays what it was.
pub fn refresh(volume: &str, data: &str) -> io::Result<()> {
    let (from, to) = places(volume)?;
    if !to.exists() {
        return Err(io::ErrorKind::NotFound.into());
    }
    swap(&from, &to, data)
}

/// Removes the copy of a volume. What cannot be removed is said on the console.
pub fn remove(volume: &str) {
    let Ok((_, to)) = places(volume) else { return };
    match unmount(&to, UnmountFlags::DETACH) {
        Ok(()) | Err(rustix::io::Errno::INVAL | rustix::io::Errno::NOENT) => {}
        Err(error) => crate::say!("unmount {}: {error}", to.display()),
    }
    if let Err(error) = fs::remove_dir(&to) {
        crate::say!("remove {}: {error}", to.display());
    }
}

/// The kubelet's own sequence, from one directory to another.
fn swap(from: &Path, to: &Path, data: &str) -> io::Result<()> {
    let data = file_name(data)?;
    let new = to.join(data);
    if !new.exists() {
        // Under a name of its own until it is whole.
        let partial = to.join("..partial");
        if partial.exists() {
            fs::remove_dir_all(&partial)?;
        }
        copy(&from.join(data), &partial, 0)?;
        fs::rename(&partial, &new)?;
    }
    relink(to, DATA_LINK, Path::new(data))?;
    let mut names = BTreeSet::new();
    for entry in fs::read_dir(&new)? {
        names.insert(entry?.file_name());
    }
    for name in &names {
        let target = Path::new(DATA_LINK).join(name);
        if fs::read_link(to.join(name)).ok().as_ref() != Some(&target) {
            relink(to, name, &target)?;
        }
    }
    tidy(to, data, &names)
}

/// Takes away what the new directory has no more, and the old directory.
fn tidy(to: &Path, data: &str, names: &BTreeSet<OsString>) -> io::Result<()> {
    for entry in fs::read_dir(to)? {
        let (entry, name) = entry.map(|entry| (entry.path(), entry.file_name()))?;
        if names.contains(&name) || name == data || name == DATA_LINK {
            continue;
        }
        if entry.symlink_metadata()?.is_dir() { fs::remove_dir_all(&entry)? } else { fs::remove_file(&entry)? }
    }
    Ok(())
}

/// Puts a link in the place of whatever was there, so that there is always one of the two.
fn relink(dir: &Path, name: impl AsRef<Path>, target: &Path) -> io::Result<()> {
    let new = dir.join("..data_tmp");
    match fs::remove_file(&new) {
        Err(error) if error.kind() != io::ErrorKind::NotFound => return Err(error),
        _ => {}
    }
    symlink(target, &new)?;
    fs::rename(&new, dir.join(name))
}

fn copy(from: &Path, to: &Path, depth: usize) -> io::Result<()> {
    if depth > MAX_DEPTH {
        return Err(io::Error::other("directories too deep"));
    }
    fs::create_dir(to)?;
    for entry in fs::read_dir(from)? {
        let entry = entry?;
        let (source, target) = (entry.path(), to.join(entry.file_name()));
        let kind = entry.file_type()?;
        if kind.is_dir() {
            copy(&source, &target, depth + 1)?;
        } else if kind.is_symlink() {
            symlink(fs::read_link(&source)?, &target)?;
        } else if kind.is_file() {
            fs::copy(&source, &target)?;
            like(&source, &target)?;
        }
    }
    like(from, to)
}

/// Owner and mode of one file are those of another.
fn like(from: &Path, to: &Path) -> io::Result<()> {
    let metadata = fs::metadata(from)?;
    chown(to, Some(metadata.uid()), Some(metadata.gid()))?;
    fs::set_permissions(to, fs::Permissions::from_mode(metadata.mode() & 0o7777))
}

#[cfg(test)]
mod tests {
    use super::*;

    /// What the kubelet leaves after it has written `files` for the `n`th time.
    fn write(dir: &Path, n: u32, files: &[(&str, &str)]) -> String {
        let data = format!("..2026_{n}");
        for (name, text) in files {
            let path = dir.join(&data).join(name);
            fs::create_dir_all(path.parent().expect("parent")).expect("mkdir");
            fs::write(path, text).expect("write");
        }
        relink(dir, DATA_LINK, Path::new(&data)).expect("link");
        data
    }

    #[test]
    fn a_copy_follows() {
        let (from, to) = (tempfile::tempdir().expect("dir"), tempfile::tempdir().expect("dir"));
        let (from, to) = (from.path(), to.path());
        let data = write(from, 1, &[("a", "1"), ("b", "1"), ("d/e", "1")]);
        fs::set_permissions(from.join(&data).join("a"), fs::Permissions::from_mode(0o640)).expect("chmod");
        swap(from, to, &data).expect("first");
        let read = |name: &str| fs::read_to_string(to.join(name)).ok();
        assert_eq!((read("a"), read("d/e")), (Some("1".into()), Some("1".into())));
        assert_eq!(fs::metadata(to.join("a")).expect("stat").mode() & 0o777, 0o640);
        assert_eq!(fs::read_link(to.join("a")).expect("link"), Path::new("..data/a"));

        let data = write(from, 2, &[("a", "2"), ("c", "2")]);
        swap(from, to, &data).expect("second");
        assert_eq!((read("a"), read("b"), read("c")), (Some("2".into()), None, Some("2".into())));
        let mut left: Vec<_> = fs::read_dir(to).expect("list").map(|e| e.expect("entry").file_name()).collect();
        left.sort();
        assert_eq!(left, ["..2026_2", "..data", "a", "c"]);
        swap(from, to, &data).expect("once more, to no effect");
    }

    #[test]
    fn names_are_names() {
        for bad in ["", "..", "a/b", "/", "../x"] {
            assert!(places(bad).is_err(), "{bad}");
        }
        let dir = tempfile::tempdir().expect("dir");
        assert!(swap(dir.path(), dir.path(), "../../etc").is_err());
    }
}
