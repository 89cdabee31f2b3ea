//! Project quotas on the disk with the uppers: what one container may write there.
//!
//! ```text
//!  superblock: features quota and project ── kernel without them ──► taken out before the mount
//!  upper/<id>  project n, inherited by all below ── limit of n ──► EDQUOT at the limit
//! ```
//!
//! The disk comes with quotas switched on, whatever kernel the guest has; one that does not know them refuses to mount
//! it. So the agent, which can ask the kernel, takes the features out again where they would be in the way: the disk is
//! new, and nothing on it has been counted yet.
//!
//! Layouts: ext4's superblock as in fs/ext4/ext4.h, `struct fsxattr` in linux/fs.h, `struct if_dqblk` in linux/quota.h.
#![expect(unsafe_code, reason = "neither the project of a file nor a project's limit can be set by safe calls")]

use std::ffi::CString;
use std::fs::{File, OpenOptions};
use std::io;
use std::os::unix::ffi::OsStrExt;
use std::os::unix::fs::FileExt;
use std::path::{Path, PathBuf};

use rustix::ioctl;

/// Where the superblock is on the disk, and how long it is, in bytes.
const SUPERBLOCK: (u64, usize) = (1024, 1024);
/// `s_feature_ro_compat`.
const RO_COMPAT: usize = 0x64;
/// `s_prj_quota_inum`: the hidden file of project quotas.
const PRJ_QUOTA_INUM: usize = 0x26c;
/// `s_checksum`: crc32c of what stands before it.
const CHECKSUM: usize = 0x3fc;
/// `EXT4_FEATURE_RO_COMPAT_QUOTA` and `EXT4_FEATURE_RO_COMPAT_PROJECT`.
const QUOTA_FEATURES: u32 = 0x100 | 0x2000;
/// `EXT4_FEATURE_RO_COMPAT_METADATA_CSUM`.
const METADATA_CSUM: u32 = 0x400;

/// `FS_XFLAG_PROJINHERIT`: what is made below has the same project.
const INHERIT: u32 = 0x200;

/// `struct fsxattr`.
#[repr(C)]
#[derive(Clone, Copy, Default)]
struct Attributes {
    flags: u32,
    extent_size: u32,
    extents: u32,
    project: u32,
    cow_extent_size: u32,
    pad: [u8; 8],
}

/// Whether this kernel has quotas.
pub fn supported() -> bool {
    Path::new("/proc/sys/fs/quota").exists()
}

/// Takes the quota features out of an ext4 that is not mounted, if it has them.
///
/// # Errors
/// What reading or writing the device gives.
pub fn take_out(device: &Path) -> io::Result<()> {
    let disk = OpenOptions::new().read(true).write(true).open(device)?;
    let mut block = vec![0; SUPERBLOCK.1];
    disk.read_exact_at(&mut block, SUPERBLOCK.0)?;
    if without_quota(&mut block) { disk.write_all_at(&block, SUPERBLOCK.0) } else { Ok(()) }
}

/// Changes the superblock, and says whether there was anything to change.
fn without_quota(block: &mut [u8]) -> bool {
    let features = number(block, RO_COMPAT);
    if features & QUOTA_FEATURES == 0 {
        return false;
    }
    put(block, RO_COMPAT, features & !QUOTA_FEATURES);
    put(block, PRJ_QUOTA_INUM, 0);
    if features & METADATA_CSUM != 0 {
        // ext4's crc32c starts with all ones and is not inverted at its end.
        let sum = !crc32c::crc32c(block.get(..CHECKSUM).unwrap_or_default());
        put(block, CHECKSUM, sum);
    }
    true
}

fn number(block: &[u8], at: usize) -> u32 {
    block.get(at..at + 4).and_then(|bytes| bytes.try_into().ok()).map_or(0, u32::from_le_bytes)
}

fn put(block: &mut [u8], at: usize, value: u32) {
    if let Some(bytes) = block.get_mut(at..at + 4) {
        bytes.copy_from_slice(&value.to_le_bytes());
    }
}

/// Makes the directory, and all that will be made below it, part of `project`.
fn join(directory: &Path, project: u32) -> io::Result<()> {
    let directory = File::open(directory)?;
    let attributes = Attributes { flags: INHERIT, project, ..Attributes::default() };
    // FS_IOC_FSSETXATTR
    type Set = ioctl::Setter<{ ioctl::opcode::write::<Attributes>(b'X', 32) }, Attributes>;
    // SAFETY: the request takes a pointer to one `struct fsxattr`, which `Attributes` is.
    unsafe { ioctl::ioctl(&directory, Set::new(attributes)) }?;
    Ok(())
}

/// What one container may have on the disk with the uppers.
#[derive(Clone, Debug)]
pub struct Limit {
    /// The disk.
    pub device: PathBuf,
    /// The container's project.
    pub project: u32,
    /// Most bytes.
    pub bytes: u64,
}

impl Limit {
    /// Puts the directory, which is empty, under the limit.
    ///
    /// # Errors
    /// What the system says.
    pub fn set(&self, directory: &Path) -> io::Result<()> {
        limit(&self.device, self.project, self.bytes)?;
        join(directory, self.project)
    }
}

/// Limits what `project` may have on the file system of `device`, in bytes.
fn limit(device: &Path, project: u32, bytes: u64) -> io::Result<()> {
    const PROJECT_QUOTA: i32 = 2;
    const BLOCK: u64 = 1024;
    let device = CString::new(device.as_os_str().as_bytes())?;
    // SAFETY: zeros are a valid `struct dqblk`, which holds numbers only.
    let mut limits: libc::dqblk = unsafe { std::mem::zeroed() };
    limits.dqb_bhardlimit = bytes.div_ceil(BLOCK);
    limits.dqb_bsoftlimit = limits.dqb_bhardlimit;
    limits.dqb_valid = libc::QIF_BLIMITS;
    let command = libc::QCMD(libc::Q_SETQUOTA, PROJECT_QUOTA);
    // SAFETY: the name is a C string and the last argument points to a `struct dqblk`; both outlive the call.
    let done = unsafe {
        libc::quotactl(command, device.as_ptr(), project.cast_signed(), std::ptr::from_mut(&mut limits).cast())
    };
    if done == 0 { Ok(()) } else { Err(io::Error::last_os_error()) }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn quotas_are_taken_out_once() {
        let mut block = vec![7; SUPERBLOCK.1];
        put(&mut block, RO_COMPAT, QUOTA_FEATURES | METADATA_CSUM | 1);
        put(&mut block, PRJ_QUOTA_INUM, 12);
        assert!(without_quota(&mut block));
        assert_eq!((number(&block, RO_COMPAT), number(&block, PRJ_QUOTA_INUM)), (METADATA_CSUM | 1, 0));
        assert_eq!(number(&block, CHECKSUM), !crc32c::crc32c(&block[..CHECKSUM]));
        assert!(!without_quota(&mut block));
        assert!(!without_quota(&mut []));
    }
}
