//! One 512-byte header of a tar archive. Pure: bytes in, values out.
//!
//! ```text
//!  0    name 100 | mode 8 | uid 8 | gid 8 | size 12 | mtime 12 | checksum 8 | type 1 | link name 100 | magic 8 |
//!  265  user 32 | group 32 | major 8 | minor 8 | ustar: prefix 155; star: prefix 131, times; GNU: times, sparse map at 386
//! ```

use crate::tree::Time;

/// Size of a header, and the unit in which data is padded.
pub const BLOCK: usize = 512;

/// The fields of a header; names and numbers as written, not judged.
#[derive(Clone, Debug)]
pub struct Header {
    /// Prefix and name.
    pub path: Vec<u8>,
    /// Target of a link.
    pub link: Vec<u8>,
    /// Type flag.
    pub kind: u8,
    /// Permissions, and perhaps more bits.
    pub mode: u64,
    /// Owner.
    pub uid: u64,
    /// Group.
    pub gid: u64,
    /// Bytes of data that follow.
    pub size: u64,
    /// Modification time.
    pub mtime: Time,
    /// Major and minor number.
    pub device: (u64, u64),
}

/// Reads a header; the error says what is wrong. A block of zeros is no header: see [`is_zero`].
pub fn parse(block: &[u8; BLOCK]) -> Result<Header, &'static str> {
    // The checksum's own bytes count as spaces.
    let unsigned = |bytes: &[u8]| bytes.iter().map(|&b| i32::from(b)).sum::<i32>();
    let signed_bytes = |bytes: &[u8]| bytes.iter().map(|&b| i32::from(b.cast_signed())).sum::<i32>();
    let around = |sum: fn(&[u8]) -> i32| i64::from(sum(&block[..148]) + sum(&block[156..]) + 8 * i32::from(b' '));
    let promised = i64::try_from(number(&block[148..156])?).map_err(|_| "header checksum mismatch")?;
    // Some old programs summed signed bytes.
    if promised != around(unsigned) && promised != around(signed_bytes) {
        return Err("header checksum mismatch");
    }
    let ustar = &block[257..263] == b"ustar\0";
    let star = ustar && &block[508..512] == b"tar\0";
    let name = text(&block[..100]);
    let prefix = match (ustar, star) {
        (false, _) => b"".as_slice(),
        (true, false) => text(&block[345..500]),
        (true, true) => text(&block[345..476]),
    };
    let path = if prefix.is_empty() { name.to_vec() } else { [prefix, b"/", name].concat() };
    let signed = signed(&block[136..148])?;
    Ok(Header {
        path,
        link: text(&block[157..257]).to_vec(),
        kind: block[156],
        mode: number(&block[100..108])?,
        uid: number(&block[108..116])?,
        gid: number(&block[116..124])?,
        size: number(&block[124..136])?,
        mtime: Time { sec: signed, nsec: 0 },
        // Garbage in the headers of other kinds.
        device: match block[156] {
            b'3' | b'4' => (number(&block[329..337])?, number(&block[337..345])?),
            _ => (0, 0),
        },
    })
}

/// True for a block of zeros, two of which end an archive.
pub fn is_zero(block: &[u8; BLOCK]) -> bool {
    block.iter().all(|&b| b == 0)
}

/// A field up to its first NUL.
pub fn text(field: &[u8]) -> &[u8] {
    field.split(|&b| b == 0).next().unwrap_or_default()
}

/// A number: octal digits, or big-endian bytes after a first byte of 0x80.
pub fn number(field: &[u8]) -> Result<u64, &'static str> {
    u64::try_from(signed(field)?).map_err(|_| "negative number in header")
}

fn signed(field: &[u8]) -> Result<i64, &'static str> {
    const TOO_LARGE: &str = "number in header is too large";
    if let [first, rest @ ..] = field
        && first & 0x80 != 0
    {
        // Seven bits and a sign, then whole bytes.
        let start = i64::from(first & 0x3f) - i64::from(first & 0x40);
        return rest.iter().try_fold(start, |value, &b| {
            value.checked_mul(256).and_then(|value| value.checked_add(b.into())).ok_or(TOO_LARGE)
        });
    }
    let digits = text(field).trim_ascii();
    digits.iter().try_fold(0i64, |value, b| match b {
        b'0'..=b'7' => value.checked_mul(8).map(|value| value + i64::from(b - b'0')).ok_or(TOO_LARGE),
        _ => Err("bad digit in header"),
    })
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn numbers_in_all_forms() {
        let table: [(&[u8], Result<i64, &str>); 9] = [
            (b"0000644\0", Ok(0o644)),
            (b"    755 ", Ok(0o755)),
            (b"\0\0\0\0\0\0\0\0", Ok(0)),
            (b"77777777777\0", Ok(0o77_777_777_777)),
            (b"\x80\0\0\0\0\0\0\0\xee\x6b\x28\0", Ok(4_000_000_000)),
            (b"\xff\xff\xff\xff\xff\xff\xff\xfe", Ok(-2)),
            (b"\x80\xff\xff\xff\xff\xff\xff\xff\xff\xff\xff\xff", Err("number in header is too large")),
            (b"0000648\0", Err("bad digit in header")),
            (b"-1\0", Err("bad digit in header")),
        ];
        for (field, value) in table {
            assert_eq!(signed(field), value, "{field:?}");
        }
        assert_eq!(number(b"\xff\xff\xff\xff"), Err("negative number in header"));
    }
}
