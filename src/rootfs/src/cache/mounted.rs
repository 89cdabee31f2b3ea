//! Layers that are mounted images: containerd's erofs snapshotter (2.1) mounts each layer's image on the host and hands over the
//! mount points. The image behind such a directory is what the guest wants; copying the files out of it would be a waste.
//!
//! ```text
//!  /proc/thread-self/mountinfo    36 35 7:3 / /s/1/fs ro - erofs /dev/loop3 ro           → /sys/block/loop3/loop/backing_file
//!                          37 35 0:9 / /s/2/fs ro - erofs /s/2/layer.erofs ro     → /s/2/layer.erofs
//! ```

use std::fs;
use std::os::unix::ffi::OsStringExt;
use std::path::{Path, PathBuf};

/// `f_type` of EROFS (`EROFS_SUPER_MAGIC_V1` in the kernel's `magic.h`).
const EROFS_MAGIC: u64 = 0xe0f5_e1e2;

/// The image that is mounted at `dir`, if it is a mount point of EROFS and the image is a file.
pub fn image(dir: &Path) -> Option<PathBuf> {
    // Almost never: one cheap call decides.
    if rustix::fs::statfs(dir).ok()?.f_type as u64 != EROFS_MAGIC {
        return None;
    }
    let dir = fs::canonicalize(dir).ok()?;
    let source = source_of(&fs::read("/proc/thread-self/mountinfo").ok()?, &dir)?;
    match source.strip_prefix("/dev").ok().and_then(Path::to_str) {
        None => source.is_absolute().then_some(source),
        Some(device) => {
            let attribute = |name: &str| fs::read(Path::new("/sys/block").join(device).join("loop").join(name)).ok();
            let whole = attribute("offset")?.trim_ascii() == b"0" && attribute("sizelimit")?.trim_ascii() == b"0";
            let file = attribute("backing_file")?;
            whole.then(|| PathBuf::from(std::ffi::OsString::from_vec(file.trim_ascii_end().to_vec())))
        }
    }
}

/// The source of the topmost EROFS whose root is mounted at `dir`.
fn source_of(mountinfo: &[u8], dir: &Path) -> Option<PathBuf> {
    let mut found = None;
    for line in mountinfo.split(|&b| b == b'\n') {
        let mut fields = line.split(|&b| b == b' ');
        let (root, target) = (fields.nth(3), fields.next());
        let mut rest = fields.skip_while(|field| *field != b"-").skip(1);
        let (kind, source) = (rest.next(), rest.next());
        if target.map(unescape).as_deref() == Some(dir) {
            let erofs = root == Some(b"/") && kind == Some(b"erofs");
            found = source.filter(|_| erofs).map(unescape); // a later mount hides an earlier one
        }
    }
    found
}

/// Takes mountinfo's `\040` and its like back.
fn unescape(field: &[u8]) -> PathBuf {
    let mut out = Vec::with_capacity(field.len());
    let mut rest = field;
    while let [first, more @ ..] = rest {
        match (*first, more) {
            (b'\\', [a @ b'0'..=b'3', b @ b'0'..=b'7', c @ b'0'..=b'7', after @ ..]) => {
                out.push(((a - b'0') << 6) | ((b - b'0') << 3) | (c - b'0'));
                rest = after;
            }
            _ => {
                out.push(*first);
                rest = more;
            }
        }
    }
    PathBuf::from(std::ffi::OsString::from_vec(out))
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn mountinfo_names_the_source() {
        let table = b"1 0 8:1 / / rw - ext4 /dev/sda1 rw\n\
            36 1 7:3 / /s/1/fs ro,relatime shared:5 master:1 - erofs /dev/loop3 ro\n\
            37 1 0:9 / /s/a\\040b/fs ro - erofs /s/a\\040b/layer.erofs ro\n\
            38 1 0:9 /below /s/3/fs ro - erofs /s/3/layer.erofs ro\n\
            39 1 0:9 / /s/4/fs ro - erofs /s/4/layer.erofs ro\n\
            40 1 0:9 / /s/4/fs ro - tmpfs tmpfs ro\n\
            41 1 garbage\n";
        let source = |dir: &str| source_of(table, Path::new(dir));
        assert_eq!(source("/s/1/fs"), Some("/dev/loop3".into()));
        assert_eq!(source("/s/a b/fs"), Some("/s/a b/layer.erofs".into()));
        for none in ["/", "/s/3/fs", "/s/4/fs", "/s/5/fs"] {
            assert_eq!(source(none), None, "{none}");
        }
        assert_eq!(unescape(b"a\\134\\0b\\999"), Path::new("a\\\\0b\\999"));
    }
}
