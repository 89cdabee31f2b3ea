//! The writable side of a container's root: a sparse ext4 disk, copied from a template that is made once per node and size.
//!
//! ```text
//!  <root>/upper/ext4-v2-<bytes>.img     read-only template, published by rename
//!  <root>/upper/ext4-v2-<bytes>.lock    held while the template is made
//! ```
//!
//! Copying costs the data extents only (a few hundred KiB whatever the size), or nothing where the file system shares extents.
//! The disk counts what each project on it has, so that the guest can limit its containers one by one; a guest whose kernel
//! has no quotas takes that out. The disk has no journal: it lives as long as its pod, and a pod that crashed is not repaired but replaced.

use std::fs::{self, File, OpenOptions};
use std::io;
use std::os::unix::fs::{FileExt, OpenOptionsExt, PermissionsExt};
use std::path::{Path, PathBuf};
use std::process::{Command, Stdio};

use rustix::fs::SeekFrom;
use rustix::io::Errno;

use crate::lock::Lock;
use crate::trace::Step;

/// Smallest disk in bytes: below this ext4 has no room for its own tables and a few files.
pub const MIN_SIZE: u64 = 8 << 20;
/// Largest disk in bytes: what a file on ext4 can hold.
pub const MAX_SIZE: u64 = 16 << 40;

/// All features by name, so that the distribution's mke2fs.conf has no say. No journal, nothing to resize, no backups of the
/// superblock: what is not written need not be copied.
const FEATURES: &str = "none,64bit,dir_index,dir_nlink,ext_attr,extent,extra_isize,filetype,flex_bg,huge_file,large_file,\
                        metadata_csum,project,quota,sparse_super,sparse_super2";

/// Where ext4 has its superblock, in bytes, and what of it is looked at (`struct ext4_super_block`, Documentation/filesystems/ext4).
///
/// ```text
///  0 u32 inodes │ 16 u32 free inodes │ 56 u16 magic │ 58 u16 state │ 84 u32 first inode that is not reserved │ 96 u32 incompat
/// ```
const SUPERBLOCK: u64 = 1024;
const MAGIC: u16 = 0xef53;
/// `EXT4_VALID_FS`: it was unmounted, if it ever was mounted.
const CLEAN: u16 = 1;
/// `EXT4_FEATURE_INCOMPAT_RECOVER`: the journal holds what the superblock does not say.
const RECOVER: u32 = 4;

/// Whether a disk is an ext4 file system in which nobody has made a file: but for `lost+found`, which takes the first inode that
/// is not reserved. One whose superblock may be behind is not said to be blank.
///
/// # Errors
/// What the system says.
pub fn is_blank(disk: &Path) -> io::Result<bool> {
    let mut block = [0; 100];
    if let Err(e) = File::open(disk)?.read_exact_at(&mut block, SUPERBLOCK) {
        return if e.kind() == io::ErrorKind::UnexpectedEof { Ok(false) } else { Err(e) };
    }
    let u32_at = |at: usize| u32::from_le_bytes([block[at], block[at + 1], block[at + 2], block[at + 3]]);
    let u16_at = |at: usize| u16::from_le_bytes([block[at], block[at + 1]]);
    let used = u32_at(0).saturating_sub(u32_at(16));
    Ok(u16_at(56) == MAGIC && u16_at(58) == CLEAN && u32_at(96) & RECOVER == 0 && used <= u32_at(84))
}

/// Why there is no disk.
#[derive(Debug, thiserror::Error)]
pub enum UpperError {
    /// Too small, too large or no whole number of blocks.
    #[error("create upper disk of {0} bytes: size must be a multiple of 4096 between {MIN_SIZE} and below {MAX_SIZE}")]
    Size(u64),
    /// The program is missing.
    #[error("run mkfs.ext4 (package e2fsprogs)")]
    Run(#[source] io::Error),
    /// The program failed.
    #[error("run mkfs.ext4 on {path}: {message}")]
    Mkfs {
        /// The template.
        path: PathBuf,
        /// What it said.
        message: String,
    },
    /// A file cannot be made or read.
    #[error("{what} {path}")]
    Io {
        /// What was tried.
        what: &'static str,
        /// The file.
        path: PathBuf,
        /// Cause.
        #[source]
        source: io::Error,
    },
}

fn failed<'a>(what: &'static str, path: &'a Path) -> impl FnOnce(io::Error) -> UpperError + use<'a> {
    move |source| UpperError::Io { what, path: path.into(), source }
}

/// Creates the disk `dest`, which must not exist, with `size` bytes; its template lies below `cache_root`. The file belongs to the
/// caller, mode 0600. Nothing is left behind on failure.
pub fn create(cache_root: &Path, dest: &Path, size: u64) -> Result<(), UpperError> {
    if !(MIN_SIZE..MAX_SIZE).contains(&size) || !size.is_multiple_of(4096) {
        return Err(UpperError::Size(size));
    }
    let step = Step::upper(dest, size);
    let (template, made) = template(cache_root, size)?;
    step.template(made);
    let disk = OpenOptions::new().write(true).create_new(true).mode(0o600).open(dest);
    let disk = disk.map_err(failed("create upper disk", dest))?;
    copy(&template, &disk, size).map_err(|e| {
        let _ = fs::remove_file(dest); // the first error is the one to tell
        failed("copy the template to upper disk", dest)(e)
    })
}

/// Opens the template, making it when it is missing; says whether it was.
fn template(cache_root: &Path, size: u64) -> Result<(File, bool), UpperError> {
    let dir = cache_root.join("upper");
    let path = dir.join(format!("ext4-v2-{size}.img"));
    match File::open(&path) {
        Err(e) if e.kind() == io::ErrorKind::NotFound => {}
        other => return Ok((other.map_err(failed("open template", &path))?, false)),
    }
    fs::create_dir_all(&dir).map_err(failed("create directory", &dir))?;
    let lock_path = path.with_extension("lock");
    let _lock = Lock::wait(&lock_path).map_err(failed("lock", &lock_path))?;
    let missing = !path.exists();
    if missing {
        // Whoever died over these files left them; the lock is ours now.
        let (raw, temp) = (path.with_extension("raw"), path.with_extension("tmp"));
        let made = make(&raw, &temp, size);
        let _ = fs::remove_file(&raw); // it has done its duty, whatever came of it
        made.inspect_err(|_| drop(fs::remove_file(&temp)))?;
        fs::rename(&temp, &path).map_err(failed("publish template", &path))?;
    }
    Ok((File::open(&path).map_err(failed("open template", &path))?, missing))
}

/// Makes a file system in `raw`, and its sparse copy `template`: mkfs reserves space for inode tables that hold nothing yet.
fn make(raw: &Path, template: &Path, size: u64) -> Result<(), UpperError> {
    let file = File::create(raw).map_err(failed("create template", raw))?;
    file.set_len(size).map_err(failed("create template", raw))?;
    let output = Command::new("mkfs.ext4")
        .args(["-q", "-F", "-b", "4096", "-I", "256", "-i", "16384", "-m", "0", "-O", FEATURES])
        // The file is all zeros, so inode tables are clean already: the guest has nothing to initialise later.
        .args(["-E", "num_backup_sb=0,lazy_itable_init=0,nodiscard,root_owner=0:0,quotatype=prjquota"])
        .arg(raw)
        .env("PATH", search_path())
        .stdin(Stdio::null())
        .output()
        .map_err(UpperError::Run)?;
    if !output.status.success() {
        let message = String::from_utf8_lossy(&output.stderr).trim().to_owned();
        return Err(UpperError::Mkfs { path: raw.into(), message });
    }
    // Read what mkfs wrote, not what is still on its way to the disk.
    let written = File::open(raw).and_then(|raw| raw.sync_all().map(|()| raw)).map_err(failed("sync template", raw))?;
    let copied = File::create(template).map_err(failed("create template", template))?;
    copy_data(&written, &copied, size).map_err(failed("copy template", template))?;
    copied.set_permissions(fs::Permissions::from_mode(0o444)).map_err(failed("protect template", template))?;
    copied.sync_all().map_err(failed("sync template", template))
}

/// mkfs lives in sbin, which a service's PATH may lack.
fn search_path() -> String {
    let path = std::env::var("PATH").unwrap_or_default();
    format!("{path}:/usr/sbin:/sbin:/usr/bin:/bin").trim_start_matches(':').to_owned()
}

/// Copies a sparse file: by sharing its extents, or else its data extents one by one.
fn copy(from: &File, to: &File, size: u64) -> io::Result<()> {
    match rustix::fs::ioctl_ficlone(to, from) {
        Ok(()) => Ok(()),
        Err(Errno::OPNOTSUPP | Errno::XDEV | Errno::INVAL | Errno::NOTTY) => copy_data(from, to, size),
        Err(e) => Err(e.into()),
    }
}

fn copy_data(from: &File, to: &File, size: u64) -> io::Result<()> {
    to.set_len(size)?;
    let mut at = 0;
    while at < size {
        let start = match rustix::fs::seek(from, SeekFrom::Data(at)) {
            Ok(start) => start,
            Err(Errno::NXIO) => break,
            Err(e) => return Err(e.into()),
        };
        at = rustix::fs::seek(from, SeekFrom::Hole(start))?;
        copy_range(from, to, start, at)?;
    }
    Ok(())
}

fn copy_range(from: &File, to: &File, start: u64, end: u64) -> io::Result<()> {
    use std::os::unix::fs::FileExt;
    let (mut read_at, mut write_at) = (start, start);
    while read_at < end {
        let left = usize::try_from(end - read_at).unwrap_or(usize::MAX);
        match rustix::fs::copy_file_range(from, Some(&mut read_at), to, Some(&mut write_at), left) {
            Ok(0) => return Err(io::ErrorKind::UnexpectedEof.into()),
            Ok(_) | Err(Errno::INTR) => {}
            // Two file systems that cannot do it between them.
            Err(Errno::XDEV | Errno::OPNOTSUPP | Errno::INVAL | Errno::NOSYS) => {
                let mut buffer = vec![0; left.min(1 << 20)];
                from.read_exact_at(&mut buffer, read_at)?;
                to.write_all_at(&buffer, read_at)?;
                read_at += buffer.len() as u64;
                write_at = read_at;
            }
            Err(e) => return Err(e.into()),
        }
    }
    Ok(())
}
