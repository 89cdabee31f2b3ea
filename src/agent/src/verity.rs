//! Block devices on which an image can be read and nothing else: what differs from what the host's cache was made of is an
//! I/O error.
//!
//! ```text
//!  <name>.erofs on the share ── /dev/loop<n>, read directly ── /dev/dm-<n>, dm-verity ──► EROFS
//!                               goes with its last user         goes with its last user
//!
//!  a block that is wrong ── uevent of the kernel's ── Watch ──► the host
//! ```
//!
//! Layouts: `linux/loop.h`, `linux/dm-ioctl.h`, and the table of `Documentation/admin-guide/device-mapper/verity.rst`.
#![expect(unsafe_code, reason = "loop devices and the device mapper are controlled by ioctl(2)")]

use std::collections::HashSet;
use std::fs::{self, File};
use std::io;
use std::os::fd::AsRawFd;
use std::path::{Path, PathBuf};
use std::sync::atomic::{AtomicU64, Ordering};

use nacelle_protocol::agent::Verity;
use rustix::net::{AddressFamily, SocketFlags, SocketType, bind, netlink, socket_with};
use tokio::io::Interest;

use crate::fd::Fd;

/// `LOOP_CTL_GET_FREE` and `LOOP_CONFIGURE`.
const LOOP_GET_FREE: u32 = 0x4c82;
const LOOP_CONFIGURE: u32 = 0x4c0a;
/// `struct loop_config`: descriptor, block size, `struct loop_info64`, room.
const LOOP_CONFIG: usize = 304;
/// `lo_info.lo_flags` in it.
const LOOP_FLAGS: usize = 8 + 52;
/// `LO_FLAGS_READ_ONLY`, `LO_FLAGS_AUTOCLEAR` and `LO_FLAGS_DIRECT_IO`: what is read is cached once, above.
const LOOP_WANTED: u32 = 1 | 4 | 16;
/// Major number of loop devices.
const LOOP_MAJOR: u32 = 7;
/// How often a free loop device may be taken by somebody else before it is an error.
const LOOP_TRIES: u32 = 16;

const MAPPER: &str = "/dev/mapper/control";
/// `struct dm_ioctl`.
const HEADER: usize = 312;
/// `dev`, `name` and `flags` in it.
const DEVICE: usize = 40;
const NAME: usize = 48;
const FLAGS: usize = 28;
/// `struct dm_target_spec`.
const TARGET: usize = 40;
/// `DM_READONLY_FLAG` and `DM_DEFERRED_REMOVE`.
const READ_ONLY: u32 = 1;
const DEFERRED: u32 = 1 << 17;

const BLOCK: u64 = 4096;
const SECTOR: u64 = 512;
/// More blocks than any image has; the multiplications below cannot overflow.
const MAX_BLOCKS: u64 = 1 << 40;

/// The device mapper's commands that are used (`DM_*_CMD`).
#[derive(Clone, Copy)]
enum Command {
    Create = 3,
    Remove = 4,
    Resume = 6,
    Load = 9,
}

impl Command {
    /// `_IOWR(DM_IOCTL, command, struct dm_ioctl)`
    fn request(self) -> u32 {
        (3 << 30) | ((HEADER as u32) << 16) | (0xfd << 8) | self as u32
    }
}

/// Whether this kernel has dm-verity.
pub fn supported() -> bool {
    Path::new("/sys/module/dm_verity").exists()
}

/// A device that checks. When it is dropped, it is left to whoever has it open or mounted by then, and goes with the last.
#[derive(Debug)]
pub struct Device {
    name: String,
    number: u64,
}

impl Device {
    /// Its node.
    pub fn path(&self) -> PathBuf {
        // Major and minor are interleaved (`huge_encode_dev`).
        let minor = (self.number & 0xff) | ((self.number >> 12) & 0xf_ff00);
        Path::new("/dev").join(format!("dm-{minor}"))
    }
}

impl Drop for Device {
    fn drop(&mut self) {
        if let Err(error) = map(Command::Remove, &self.name, DEFERRED, &[]) {
            crate::say!("remove {}: {error}", self.name);
        }
    }
}

/// A device on which `image` is read and checked by the tree behind it.
///
/// # Errors
/// What the system says; [`io::ErrorKind::InvalidInput`] for a tree that is none.
pub fn open(image: &Path, tree: &Verity) -> io::Result<Device> {
    static SERIAL: AtomicU64 = AtomicU64::new(0);
    let digest = tree.root.len() == 64 && tree.root.bytes().all(|b| b.is_ascii_hexdigit());
    if !digest || !(1..MAX_BLOCKS).contains(&tree.blocks) {
        return Err(io::Error::new(io::ErrorKind::InvalidInput, "its tree of digests makes no sense"));
    }
    let (held, number) = attach(image)?;
    let file = image.file_name().unwrap_or_default().to_string_lossy();
    let name = format!("{}-{file}", SERIAL.fetch_add(1, Ordering::Relaxed));
    let answer = map(Command::Create, &name, 0, &[])?;
    let device = Device { name, number: number_at(&answer, DEVICE) };
    map(Command::Load, &device.name, READ_ONLY, &target(tree, number))?;
    map(Command::Resume, &device.name, 0, &[])?;
    // The mapper has it open now.
    drop(held);
    Ok(device)
}

/// A loop device for `image`, and its number; it goes when nobody has it open any more.
fn attach(image: &Path) -> io::Result<(File, u32)> {
    let image = File::open(image)?;
    let control = File::open("/dev/loop-control")?;
    let mut config = [0; LOOP_CONFIG];
    put(&mut config, 0, image.as_raw_fd().cast_unsigned());
    put(&mut config, 4, BLOCK as u32);
    put(&mut config, LOOP_FLAGS, LOOP_WANTED);
    for _ in 0..LOOP_TRIES {
        // SAFETY: the request takes no argument.
        let number = unsafe { libc::ioctl(control.as_raw_fd(), LOOP_GET_FREE as libc::Ioctl, 0) };
        let number = u32::try_from(number).map_err(|_| io::Error::last_os_error())?;
        let device = File::open(format!("/dev/loop{number}"))?;
        // SAFETY: the request reads one `struct loop_config`, which is as long as `config`, and keeps no pointer.
        let done = unsafe { libc::ioctl(device.as_raw_fd(), LOOP_CONFIGURE as libc::Ioctl, config.as_ptr()) };
        match io::Error::last_os_error() {
            _ if done == 0 => return Ok((device, number)),
            // A container that may do so was faster.
            error if error.kind() == io::ErrorKind::ResourceBusy => {}
            error => return Err(error),
        }
    }
    Err(io::ErrorKind::ResourceBusy.into())
}

/// One target, read-only, over the whole device: the image and its tree on the same loop device.
fn target(tree: &Verity, loop_device: u32) -> Vec<u8> {
    let (blocks, root) = (tree.blocks, &tree.root);
    let mut out = vec![0; TARGET];
    // struct dm_target_spec: first sector, sectors, status, next, type
    out[8..16].copy_from_slice(&(blocks * (BLOCK / SECTOR)).to_ne_bytes());
    out[24..30].copy_from_slice(b"verity");
    let both = format!("{LOOP_MAJOR}:{loop_device}");
    let table = format!("1 {both} {both} {BLOCK} {BLOCK} {blocks} {blocks} sha256 {root} -");
    out.extend(table.bytes());
    // Zero-terminated, and a multiple of eight.
    out.resize(out.len() + 8 - out.len() % 8, 0);
    out
}

/// One command of the device mapper's; returns the header that comes back.
fn map(command: Command, name: &str, flags: u32, target: &[u8]) -> io::Result<Vec<u8>> {
    let mut message = vec![0; HEADER + target.len()];
    let length = u32::try_from(message.len()).map_err(io::Error::other)?;
    // struct dm_ioctl: version 4.0.0, whole length, where the targets begin, how many there are
    for (at, value) in [(0, 4), (12, length), (16, HEADER as u32), (20, u32::from(!target.is_empty())), (FLAGS, flags)]
    {
        put(&mut message, at, value);
    }
    // 128 bytes with the zero.
    let name = name.as_bytes().get(..name.len().min(127)).unwrap_or_default();
    message[NAME..NAME + name.len()].copy_from_slice(name);
    message[HEADER..].copy_from_slice(target);
    let control = File::open(MAPPER)?;
    // SAFETY: the kernel reads and writes as many bytes as the message says that it has, and keeps no pointer.
    let done = unsafe { libc::ioctl(control.as_raw_fd(), command.request() as libc::Ioctl, message.as_mut_ptr()) };
    if done == 0 { Ok(message) } else { Err(io::Error::last_os_error()) }
}

fn put(bytes: &mut [u8], at: usize, value: u32) {
    bytes[at..at + 4].copy_from_slice(&value.to_ne_bytes());
}

fn number_at(bytes: &[u8], at: usize) -> u64 {
    bytes.get(at..at + 8).and_then(|bytes| bytes.try_into().ok()).map_or(0, u64::from_ne_bytes)
}

/// Hears of blocks that are wrong.
pub struct Watch(Fd);

impl Watch {
    /// Listens for the kernel's uevents.
    ///
    /// # Errors
    /// What the system says.
    pub fn new() -> io::Result<Self> {
        let protocol = Some(netlink::KOBJECT_UEVENT);
        let socket = socket_with(AddressFamily::NETLINK, SocketType::RAW, SocketFlags::CLOEXEC, protocol)?;
        // The group of the kernel's own messages.
        bind(&socket, &netlink::SocketAddrNetlink::new(0, 1))?;
        Fd::new(socket, Interest::READABLE).map(Self)
    }

    /// Calls `tell` with the file name of an image and the block, once for each device; returns when there is nothing to hear
    /// any more, which is never.
    pub async fn run(self, tell: impl Fn(String, u64)) {
        let mut told = HashSet::new();
        let mut buffer = vec![0; 8 << 10];
        loop {
            match self.0.read(&mut buffer).await {
                Ok(length) => {
                    let Some((device, block)) = damage(&buffer[..length]) else { continue };
                    // The device's own name begins with a number that no other has, and goes on with the image's.
                    let name = fs::read_to_string(format!("/sys/block/{device}/dm/name")).unwrap_or_default();
                    let image = name.trim_end().split_once('-').map(|(_, image)| image.to_owned());
                    if let Some(image) = image.filter(|_| told.insert(name)) {
                        tell(image, block);
                    }
                }
                // Some were lost; the kernel tells of a block each time it is read.
                Err(error) if error.raw_os_error() == Some(libc::ENOBUFS) => {}
                Err(error) => return crate::say!("listen for damage of layers: {error}"),
            }
        }
    }
}

/// The device and the block of dm-verity's message: words that end in zeros, `DEVNAME=dm-3` and
/// `DM_VERITY_ERR_BLOCK_NR=<kind>,<block>` among them.
fn damage(message: &[u8]) -> Option<(&str, u64)> {
    let word = |name: &str| {
        let mut words = message.split(|byte| *byte == 0).filter_map(|word| std::str::from_utf8(word).ok());
        words.find_map(|word| word.strip_prefix(name)?.strip_prefix('='))
    };
    let block = word("DM_VERITY_ERR_BLOCK_NR")?.split_once(',')?.1.parse().ok()?;
    let device = word("DEVNAME")?;
    let plain = device.strip_prefix("dm-")?.bytes().all(|byte| byte.is_ascii_digit());
    plain.then_some((device, block))
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn commands_have_the_kernels_numbers() {
        // linux/dm-ioctl.h: DM_DEV_CREATE, DM_TABLE_LOAD
        assert_eq!([Command::Create.request(), Command::Load.request()], [0xc138_fd03, 0xc138_fd09]);
    }

    #[test]
    fn tables_are_whole() {
        let tree = Verity { blocks: 3, root: "ab".repeat(32) };
        let target = target(&tree, 5);
        assert_eq!((target.len() % 8, target.last()), (0, Some(&0)));
        assert_eq!(number_at(&target, 8), 24);
        let table = String::from_utf8_lossy(&target[TARGET..]).trim_end_matches('\0').to_owned();
        assert_eq!(table, format!("1 7:5 7:5 4096 4096 3 3 sha256 {} -", tree.root));
    }

    #[test]
    fn trees_are_checked() {
        for (blocks, root) in
            [(0, "ab".repeat(32)), (u64::MAX, "ab".repeat(32)), (1, "ab".repeat(31)), (1, "x ".repeat(32))]
        {
            let error = open(Path::new("/nonexistent"), &Verity { blocks, root }).expect_err("no tree");
            assert_eq!(error.kind(), io::ErrorKind::InvalidInput);
        }
    }

    #[test]
    fn nodes_are_named_by_their_minor_number() {
        let device = std::mem::ManuallyDrop::new(Device { name: String::new(), number: (253 << 8) | 0x0100_0003 });
        assert_eq!(device.path(), Path::new("/dev/dm-4099"));
    }

    #[test]
    fn damage_is_read() {
        let words = |words: &[&str]| words.join("\0").into_bytes();
        let whole = words(&["change@/devices/virtual/block/dm-3", "DEVNAME=dm-3", "DM_VERITY_ERR_BLOCK_NR=0,77", ""]);
        assert_eq!(damage(&whole), Some(("dm-3", 77)));
        for other in [
            &["DEVNAME=dm-3"][..],
            &["DEVNAME=../x", "DM_VERITY_ERR_BLOCK_NR=0,77"],
            &["DEVNAME=dm-3", "DM_VERITY_ERR_BLOCK_NR=0"],
        ] {
            assert_eq!(damage(&words(other)), None, "{other:?}");
        }
    }
}
