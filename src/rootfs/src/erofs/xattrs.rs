//! Inline xattrs behind an inode.
//!
//! ```text
//!  | header: filter 4, shared count 1, reserved 7 | name length 1, prefix 1, value length 2, name, value | .. each padded to 4
//! ```

use super::format;
use crate::tree::Inode;

/// The inode's 16-bit measure of its xattrs; `None` when they are too many.
pub fn count(inode: &Inode) -> Option<u16> {
    if inode.xattrs.is_empty() {
        return Some(0);
    }
    let entry = |name: &[u8], value: &[u8]| {
        let (_, rest) = format::split_xattr_name(name)?;
        u16::try_from(value.len()).ok()?;
        Some((format::XATTR_ENTRY_SIZE + rest.len() + value.len()).div_ceil(4))
    };
    let words = inode.xattrs.iter().map(|x| entry(&x.name, &x.value)).sum::<Option<usize>>()?;
    u16::try_from(1 + words).ok()
}

/// Bytes of an xattr area by that measure.
pub fn area(count: u16) -> usize {
    match count {
        0 => 0,
        n => format::XATTR_HEADER_SIZE + 4 * (usize::from(n) - 1),
    }
}

/// Appends the xattr area.
pub fn encode(inode: &Inode, out: &mut Vec<u8>) {
    if inode.xattrs.is_empty() {
        return;
    }
    out.extend([0; format::XATTR_HEADER_SIZE]); // no filter, no shared xattrs
    for xattr in &inode.xattrs {
        let Some((index, rest)) = format::split_xattr_name(&xattr.name) else { continue };
        out.extend([rest.len() as u8, index]);
        out.extend((xattr.value.len() as u16).to_le_bytes());
        out.extend(rest);
        out.extend(&*xattr.value);
        out.resize(out.len().next_multiple_of(4), 0);
    }
}
