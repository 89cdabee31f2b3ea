//! The mounts at and below a directory, out of `/proc/self/mountinfo` (proc_pid_mountinfo(5)).

use std::ffi::OsString;
use std::os::unix::ffi::OsStringExt;
use std::path::{Path, PathBuf};

/// One mount.
#[derive(Debug, PartialEq, Eq)]
pub struct Mount {
    /// Where it is, relative to the directory that was asked for; empty for that directory itself.
    pub below: PathBuf,
    /// Somebody has mapped its ids already.
    pub mapped: bool,
}

/// Mounts at or below `dir`, each place once, parents before children. `dir` itself comes first, a mount or not.
pub fn below(mountinfo: &[u8], dir: &Path) -> Vec<Mount> {
    let mut mounts = vec![Mount { below: PathBuf::new(), mapped: false }];
    for line in mountinfo.split(|&b| b == b'\n') {
        // 36 35 98:0 /root /mount\040point rw,relatime shared:1 - ext4 /dev/root rw
        let mut fields = line.split(|&b| b == b' ');
        let (Some(point), Some(options)) = (fields.nth(4), fields.next()) else { continue };
        let point = unescape(point);
        let Ok(below) = point.strip_prefix(dir) else { continue };
        let mapped = options.split(|&b| b == b',').any(|option| option == b"idmapped");
        // Mounts are listed in the order of mounting: a later one at the same place hides the earlier one.
        match mounts.iter_mut().find(|mount| mount.below == below) {
            Some(mount) => mount.mapped = mapped,
            None => mounts.push(Mount { below: below.to_owned(), mapped }),
        }
    }
    mounts[1..].sort_by(|a, b| a.below.cmp(&b.below));
    mounts
}

/// Space, tab, newline and backslash are written as three octal digits.
fn unescape(field: &[u8]) -> PathBuf {
    let mut out = Vec::with_capacity(field.len());
    let mut rest = field;
    while let Some((&first, tail)) = rest.split_first() {
        let octal = tail.get(..3).filter(|_| first == b'\\');
        let code = octal.and_then(|digits| u8::from_str_radix(std::str::from_utf8(digits).ok()?, 8).ok());
        match code {
            Some(byte) => {
                out.push(byte);
                rest = &tail[3..];
            }
            None => {
                out.push(first);
                rest = tail;
            }
        }
    }
    PathBuf::from(OsString::from_vec(out))
}

#[cfg(test)]
mod tests {
    use super::*;

    const TEXT: &[u8] = b"21 1 8:1 / / rw,relatime shared:1 - ext4 /dev/sda1 rw\n\
        40 21 0:30 / /run/v/b\\040c rw,nosuid shared:9 - tmpfs tmpfs rw\n\
        41 21 0:31 / /run/v/a rw,nodev,idmapped - ext4 /dev/sdb rw\n\
        42 41 0:32 / /run/v/a/deep rw - ext4 /dev/sdc rw\n\
        43 21 0:33 / /run/volumes rw - tmpfs tmpfs rw\n";

    #[test]
    fn finds_what_is_below() {
        let found = below(TEXT, Path::new("/run/v"));
        let names: Vec<_> = found.iter().map(|m| (m.below.to_str().expect("text"), m.mapped)).collect();
        assert_eq!(names, [("", false), ("a", true), ("a/deep", false), ("b c", false)]);
    }

    #[test]
    fn the_directory_may_be_a_mount() {
        assert_eq!(below(TEXT, Path::new("/run/v/a"))[0], Mount { below: PathBuf::new(), mapped: true });
        assert_eq!(below(b"", Path::new("/x")).len(), 1);
    }

    #[test]
    fn odd_escapes_stay() {
        assert_eq!(unescape(b"a\\09\\134\\"), PathBuf::from("a\\09\\\\"));
    }
}
