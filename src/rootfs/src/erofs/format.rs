//! On-disk structures and constants of EROFS, and nothing else.
//!
//! Everything is little-endian and described by the kernel's `fs/erofs/erofs_fs.h`; names follow that header. Only what nacelle
//! writes is here: no compression, no shared xattrs.
//!
//! ```text
//!  byte 0        1024          1152     4096                                        end, a whole number of blocks
//!  | boot area   | superblock  | zeros  | inodes, each followed by its xattrs   | directory | file   |
//!  | (zeros)     |             |        | and its inline data or chunk map      | blocks    | blocks |
//!  |---------------- block 0 -----------|------------ metadata area ------------|------- data -------|
//!
//!  A table of devices, 128 bytes each, takes whole blocks between superblock and metadata area.
//!
//!  nid n is the inode at byte meta_block * 4096 + n * 32. An image made from a stream has the file blocks first, from block 1, and
//!  the metadata area and the directory blocks behind them.
//!
//!  one inode:   | core 32 or 64 | xattrs: header 12, entries aligned to 4 | inline tail  or  chunk map: 4 bytes a chunk |
//!
//!  one directory block:   | dirent 0 | dirent 1 | .. | name 0 | name 1 | ..   (names end where the next begins)
//! ```

/// Size of a file system block in bytes; the only size written here.
pub const BLOCK: u64 = 4096;
/// `log2(BLOCK)`, `blkszbits` in the superblock.
pub const BLOCK_BITS: u8 = 12;
/// Where the superblock starts (`EROFS_SUPER_OFFSET`).
pub const SUPER_OFFSET: u64 = 1024;
/// Size of the superblock in bytes.
pub const SUPER_SIZE: usize = 128;
/// `EROFS_SUPER_MAGIC_V1`.
pub const MAGIC: u32 = 0xE0F5_E1E2;
/// The superblock has a checksum: CRC-32C, not inverted at the end, from the superblock's start to the end of its block.
pub const COMPAT_SB_CHKSUM: u32 = 0x1;
/// Extended inodes carry modification times, not change times.
pub const COMPAT_MTIME: u32 = 0x2;
/// Chunk-based files are in use.
pub const INCOMPAT_CHUNKED_FILE: u32 = 0x4;
/// Data lies in further devices, which a table names.
pub const INCOMPAT_DEVICE_TABLE: u32 = 0x8;
/// Size of an entry of the device table (`struct erofs_deviceslot`): a tag of 64 bytes, blocks, first block, and room.
pub const DEVICE_SIZE: usize = 128;
/// A nid counts slots of this many bytes.
pub const SLOT: u64 = 32;
/// Size of a compact inode core.
pub const COMPACT_SIZE: u64 = 32;
/// Size of an extended inode core.
pub const EXTENDED_SIZE: u64 = 64;
/// Longest name in a directory (`EROFS_NAME_LEN`).
pub const NAME_MAX: usize = 255;
/// Size of a directory entry without its name.
pub const DIRENT_SIZE: usize = 12;
/// Size of the header before an inode's xattr entries.
pub const XATTR_HEADER_SIZE: usize = 12;
/// Size of one xattr entry without name and value.
pub const XATTR_ENTRY_SIZE: usize = 4;
/// "No block": a hole in a chunk map (`EROFS_NULL_ADDR`).
pub const NULL_ADDR: u32 = u32::MAX;
/// Low bits of a chunk format word: `log2(chunk size / BLOCK)`.
pub const CHUNK_BITS_MASK: u16 = 0x1f;
/// Chunk format flag: 8-byte indexes instead of a 4-byte block map. Never written, refused on reading.
pub const CHUNK_INDEXES: u16 = 0x20;

/// File type bits of a mode.
pub const S_IFMT: u16 = 0o170_000;
/// FIFO.
pub const S_IFIFO: u16 = 0o010_000;
/// Character device.
pub const S_IFCHR: u16 = 0o020_000;
/// Directory.
pub const S_IFDIR: u16 = 0o040_000;
/// Block device.
pub const S_IFBLK: u16 = 0o060_000;
/// Regular file.
pub const S_IFREG: u16 = 0o100_000;
/// Symbolic link.
pub const S_IFLNK: u16 = 0o120_000;
/// Socket.
pub const S_IFSOCK: u16 = 0o140_000;

/// Prefixes of xattr names by index (`EROFS_XATTR_INDEX_*`). The two ACL entries are whole names.
pub const XATTR_PREFIXES: [(u8, &[u8]); 5] = [
    (1, b"user."),
    (2, b"system.posix_acl_access"),
    (3, b"system.posix_acl_default"),
    (4, b"trusted."),
    (6, b"security."),
];

/// Splits a full xattr name into EROFS's prefix index and the rest; `None` when EROFS has no place for the name.
pub fn split_xattr_name(name: &[u8]) -> Option<(u8, &[u8])> {
    XATTR_PREFIXES.iter().find_map(|&(index, prefix)| {
        let rest = name.strip_prefix(prefix)?;
        let whole = !prefix.ends_with(b".");
        (whole == rest.is_empty() && rest.len() <= NAME_MAX).then_some((index, rest))
    })
}

/// How an inode's data is laid out (`EROFS_INODE_*`), the uncompressed ones.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum Layout {
    /// Consecutive blocks.
    FlatPlain = 0,
    /// Consecutive blocks, and the last partial block behind the inode.
    FlatInline = 2,
    /// A map of equal chunks, each somewhere or a hole.
    Chunked = 4,
}

/// The superblock (`struct erofs_super_block`), the fields that are used.
#[derive(Clone, Debug, PartialEq, Eq)]
pub struct SuperBlock {
    /// CRC-32C; see [`COMPAT_SB_CHKSUM`].
    pub checksum: u32,
    /// Features that a reader may ignore.
    pub compat: u32,
    /// `log2` of the block size.
    pub block_bits: u8,
    /// Extra 16-byte slots of superblock.
    pub extra_slots: u8,
    /// nid of the root directory.
    pub root_nid: u16,
    /// Number of inodes.
    pub inodes: u64,
    /// Modification time of every compact inode, seconds since 1970.
    pub time: i64,
    /// Nanoseconds of `time`.
    pub time_nsec: u32,
    /// Blocks in the image.
    pub blocks: u32,
    /// First block of the metadata area.
    pub meta_block: u32,
    /// Volume identity.
    pub uuid: [u8; 16],
    /// Features that a reader must know.
    pub incompat: u32,
    /// Number of further devices.
    pub extra_devices: u16,
    /// Where their table starts, in units of [`DEVICE_SIZE`].
    pub device_slot: u16,
    /// `log2(directory block size / BLOCK)`.
    pub dir_block_bits: u8,
    /// Long xattr prefixes in use.
    pub xattr_prefixes: u8,
}

impl SuperBlock {
    /// The 128 bytes on disk.
    pub fn encode(&self) -> [u8; SUPER_SIZE] {
        let mut out = [0; SUPER_SIZE];
        let mut at = 0;
        let mut put = |bytes: &[u8]| {
            out[at..at + bytes.len()].copy_from_slice(bytes);
            at += bytes.len();
        };
        put(&MAGIC.to_le_bytes());
        put(&self.checksum.to_le_bytes());
        put(&self.compat.to_le_bytes());
        put(&[self.block_bits, self.extra_slots]);
        put(&self.root_nid.to_le_bytes());
        put(&self.inodes.to_le_bytes());
        put(&self.time.to_le_bytes());
        put(&self.time_nsec.to_le_bytes());
        put(&self.blocks.to_le_bytes());
        put(&self.meta_block.to_le_bytes());
        put(&0u32.to_le_bytes()); // xattr_blkaddr: no shared xattrs
        put(&self.uuid);
        put(&[0; 16]); // volume_name
        put(&self.incompat.to_le_bytes());
        put(&0u16.to_le_bytes()); // compression
        put(&self.extra_devices.to_le_bytes());
        put(&self.device_slot.to_le_bytes());
        put(&[self.dir_block_bits, self.xattr_prefixes]);
        out
    }

    /// Reads the 128 bytes; `None` when the magic number is another.
    pub fn decode(raw: &[u8; SUPER_SIZE]) -> Option<SuperBlock> {
        let mut uuid = [0; 16];
        uuid.copy_from_slice(&raw[48..64]);
        (le32(raw, 0) == MAGIC).then(|| SuperBlock {
            checksum: le32(raw, 4),
            compat: le32(raw, 8),
            block_bits: raw[12],
            extra_slots: raw[13],
            root_nid: le16(raw, 14),
            inodes: le64(raw, 16),
            time: le64(raw, 24).cast_signed(),
            time_nsec: le32(raw, 32),
            blocks: le32(raw, 36),
            meta_block: le32(raw, 40),
            uuid,
            incompat: le32(raw, 80),
            extra_devices: le16(raw, 86),
            device_slot: le16(raw, 88),
            dir_block_bits: raw[90],
            xattr_prefixes: raw[91],
        })
    }
}

/// An inode core (`struct erofs_inode_compact` or `_extended`), whichever the values need.
#[derive(Clone, Debug, PartialEq, Eq)]
pub struct InodeCore {
    /// 64 bytes instead of 32: wide ids, sizes and link counts, and a time of its own.
    pub extended: bool,
    /// Where the data is.
    pub layout: Layout,
    /// Size of the xattr area in units: 0 = none, else `1 + entry bytes / 4`.
    pub xattr_count: u16,
    /// Type and permissions.
    pub mode: u16,
    /// Hard links.
    pub nlink: u32,
    /// Size in bytes.
    pub size: u64,
    /// First block (flat), device number (devices) or chunk format (chunked).
    pub u: u32,
    /// Serial number, for 32-bit `stat`.
    pub ino: u32,
    /// Owner.
    pub uid: u32,
    /// Group.
    pub gid: u32,
    /// Modification time in seconds since 1970; meaningless in a compact inode.
    pub mtime: i64,
    /// Nanoseconds of `mtime`.
    pub mtime_nsec: u32,
}

impl InodeCore {
    /// Bytes the core takes on disk.
    pub fn core_size(&self) -> usize {
        if self.extended { EXTENDED_SIZE as usize } else { COMPACT_SIZE as usize }
    }

    /// Appends the core. Values that a compact core cannot hold are cut: the writer chose `extended` by them.
    pub fn encode(&self, out: &mut Vec<u8>) {
        let format = u16::from(self.extended) | (self.layout as u16) << 1;
        out.extend(format.to_le_bytes());
        out.extend(self.xattr_count.to_le_bytes());
        out.extend(self.mode.to_le_bytes());
        if self.extended {
            out.extend([0; 2]);
            out.extend(self.size.to_le_bytes());
            out.extend(self.u.to_le_bytes());
            out.extend(self.ino.to_le_bytes());
            out.extend(self.uid.to_le_bytes());
            out.extend(self.gid.to_le_bytes());
            out.extend(self.mtime.to_le_bytes());
            out.extend(self.mtime_nsec.to_le_bytes());
            out.extend(self.nlink.to_le_bytes());
            out.extend([0; 16]);
        } else {
            out.extend((self.nlink as u16).to_le_bytes());
            out.extend((self.size as u32).to_le_bytes());
            out.extend([0; 4]);
            out.extend(self.u.to_le_bytes());
            out.extend(self.ino.to_le_bytes());
            out.extend((self.uid as u16).to_le_bytes());
            out.extend((self.gid as u16).to_le_bytes());
            out.extend([0; 4]);
        }
    }

    /// Reads a core from at least 32 bytes, 64 for an extended one; `None` when it is too short or has an unknown format.
    pub fn decode(raw: &[u8]) -> Option<InodeCore> {
        let format = le16(raw.get(..COMPACT_SIZE as usize)?, 0);
        let layout = match format >> 1 {
            0 => Layout::FlatPlain,
            2 => Layout::FlatInline,
            4 => Layout::Chunked,
            _ => return None,
        };
        let (xattr_count, mode) = (le16(raw, 2), le16(raw, 4));
        if format & 1 == 0 {
            return Some(InodeCore {
                extended: false,
                layout,
                xattr_count,
                mode,
                nlink: le16(raw, 6).into(),
                size: le32(raw, 8).into(),
                u: le32(raw, 16),
                ino: le32(raw, 20),
                uid: le16(raw, 24).into(),
                gid: le16(raw, 26).into(),
                mtime: 0,
                mtime_nsec: 0,
            });
        }
        let raw = raw.get(..EXTENDED_SIZE as usize)?;
        Some(InodeCore {
            extended: true,
            layout,
            xattr_count,
            mode,
            nlink: le32(raw, 44),
            size: le64(raw, 8),
            u: le32(raw, 16),
            ino: le32(raw, 20),
            uid: le32(raw, 24),
            gid: le32(raw, 28),
            mtime: le64(raw, 32).cast_signed(),
            mtime_nsec: le32(raw, 40),
        })
    }
}

/// A directory entry (`struct erofs_dirent`).
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub struct Dirent {
    /// Inode it leads to.
    pub nid: u64,
    /// Where its name starts in the block.
    pub name_offset: u16,
    /// Type of the inode; see [`file_type`].
    pub file_type: u8,
}

impl Dirent {
    /// The 12 bytes on disk.
    pub fn encode(&self) -> [u8; DIRENT_SIZE] {
        let mut out = [0; DIRENT_SIZE];
        out[..8].copy_from_slice(&self.nid.to_le_bytes());
        out[8..10].copy_from_slice(&self.name_offset.to_le_bytes());
        out[10] = self.file_type;
        out
    }

    /// Reads one from at least 12 bytes; `None` when there are fewer.
    pub fn decode(raw: &[u8]) -> Option<Dirent> {
        let raw = raw.get(..DIRENT_SIZE)?;
        Some(Dirent { nid: le64(raw, 0), name_offset: le16(raw, 8), file_type: raw[10] })
    }
}

/// `EROFS_FT_*` of a mode; 0 for none of them.
pub fn file_type(mode: u16) -> u8 {
    match mode & S_IFMT {
        S_IFREG => 1,
        S_IFDIR => 2,
        S_IFCHR => 3,
        S_IFBLK => 4,
        S_IFIFO => 5,
        S_IFSOCK => 6,
        S_IFLNK => 7,
        _ => 0,
    }
}

/// A device number as the kernel stores it on disk (`new_encode_dev`): minor bits 0-7, major, minor bits 8-19.
pub fn encode_dev(major: u32, minor: u32) -> u32 {
    (minor & 0xff) | (major << 8) | ((minor & !0xff) << 12)
}

/// Major and minor of an encoded device number.
pub fn decode_dev(dev: u32) -> (u32, u32) {
    ((dev & 0xf_ff00) >> 8, (dev & 0xff) | ((dev >> 12) & 0xf_ff00))
}

/// The checksum of a superblock's block, whose checksum field must be zero in `rest`: bytes 1024 to 4095 of the image.
pub fn super_checksum(rest: &[u8]) -> u32 {
    !crc32c::crc32c(rest)
}

/// Two little-endian bytes at `at`; the caller has checked the length.
pub(crate) fn le16(raw: &[u8], at: usize) -> u16 {
    u16::from_le_bytes([raw[at], raw[at + 1]])
}

/// Four little-endian bytes at `at`; the caller has checked the length.
pub(crate) fn le32(raw: &[u8], at: usize) -> u32 {
    u32::from(le16(raw, at)) | u32::from(le16(raw, at + 2)) << 16
}

fn le64(raw: &[u8], at: usize) -> u64 {
    u64::from(le32(raw, at)) | u64::from(le32(raw, at + 4)) << 32
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn device_numbers_survive() {
        for (major, minor) in [(0, 0), (1, 3), (8, 255), (259, 256), (4095, 0xf_ffff)] {
            assert_eq!(decode_dev(encode_dev(major, minor)), (major, minor));
        }
    }

    #[test]
    fn xattr_names_find_their_prefix() {
        assert_eq!(split_xattr_name(b"user.a"), Some((1, b"a".as_slice())));
        assert_eq!(split_xattr_name(b"system.posix_acl_access"), Some((2, b"".as_slice())));
        assert_eq!(split_xattr_name(b"security.capability"), Some((6, b"capability".as_slice())));
        assert_eq!(split_xattr_name(b"system.posix_acl_accessx"), None);
        assert_eq!(split_xattr_name(b"user."), None);
        assert_eq!(split_xattr_name(b"btrfs.compression"), None);
    }

    #[test]
    fn structures_round_trip() {
        let core = InodeCore {
            extended: true,
            layout: Layout::Chunked,
            xattr_count: 7,
            mode: S_IFREG | 0o644,
            nlink: 70_000,
            size: 1 << 40,
            u: 3,
            ino: 9,
            uid: 4_000_000_000,
            gid: 65_536,
            mtime: -5,
            mtime_nsec: 999_999_999,
        };
        let mut raw = Vec::new();
        core.encode(&mut raw);
        assert_eq!(raw.len(), core.core_size());
        assert_eq!(InodeCore::decode(&raw), Some(core));
        let dirent = Dirent { nid: 1 << 40, name_offset: 24, file_type: 2 };
        assert_eq!(Dirent::decode(&dirent.encode()), Some(dirent));
    }
}
