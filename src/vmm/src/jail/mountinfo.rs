//! The mount points below a directory, out of `/proc/self/mountinfo` (proc_pid_mountinfo(5)).

use std::collections::BTreeSet;
use std::ffi::OsString;
use std::os::unix::ffi::OsStringExt;
use std::path::{Path, PathBuf};

/// Mount points below `dir`, relative to it, each once and parents before children. `dir` itself is not among them.
pub fn below(mountinfo: &[u8], dir: &Path) -> BTreeSet<PathBuf> {
    mountinfo
        .split(|&b| b == b'\n')
        // 36 35 98:0 /root /mount\040point rw,relatime shared:1 - ext4 /dev/root rw
        .filter_map(|line| line.split(|&b| b == b' ').nth(4))
        .filter_map(|point| Some(unescape(point).strip_prefix(dir).ok()?.to_owned()))
        .filter(|below| !below.as_os_str().is_empty())
        .collect()
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
        39 21 0:29 / /run/v rw - tmpfs tmpfs rw\n\
        40 21 0:30 / /run/v/b\\040c rw,nosuid shared:9 - tmpfs tmpfs rw\n\
        42 41 0:32 / /run/v/a/deep rw - ext4 /dev/sdc rw\n\
        41 21 0:31 / /run/v/a rw,nodev,idmapped - ext4 /dev/sdb rw\n\
        44 41 0:34 / /run/v/a rw - ext4 /dev/sdd rw\n\
        43 21 0:33 / /run/volumes rw - tmpfs tmpfs rw\n";

    #[test]
    fn finds_what_is_below() {
        let found = below(TEXT, Path::new("/run/v"));
        let names: Vec<_> = found.iter().map(|path| path.to_str().expect("text")).collect();
        assert_eq!(names, ["a", "a/deep", "b c"]);
        assert!(below(TEXT, Path::new("/run/v/a/deep")).is_empty());
        assert!(below(b"", Path::new("/x")).is_empty());
    }

    #[test]
    fn odd_escapes_stay() {
        assert_eq!(unescape(b"a\\09\\134\\"), PathBuf::from("a\\09\\\\"));
    }
}
