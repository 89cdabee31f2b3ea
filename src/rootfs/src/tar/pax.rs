//! Extension headers of POSIX archives: `LENGTH KEY=VALUE\n`, one after the other. Pure.

use crate::tree::Time;

/// What the records before an entry say about it; whatever they leave out is in its header.
#[derive(Debug, Default)]
pub struct Pax {
    /// Instead of the header's name.
    pub path: Option<Vec<u8>>,
    /// Instead of the header's link name.
    pub link: Option<Vec<u8>>,
    /// Bytes of data that follow.
    pub size: Option<u64>,
    /// Owner.
    pub uid: Option<u64>,
    /// Group.
    pub gid: Option<u64>,
    /// Modification time.
    pub mtime: Option<Time>,
    /// Extended attributes by full name, unjudged.
    pub xattrs: Vec<(Vec<u8>, Vec<u8>)>,
    /// GNU's description of a sparse file.
    pub sparse: Sparse,
}

/// GNU's records of a sparse file, in its three versions.
#[derive(Debug, Default)]
pub struct Sparse {
    /// Version 1.0: the map is at the start of the data.
    pub map_in_data: bool,
    /// Versions 0.0 and 0.1: offset, length, offset, length, ..
    pub map: Option<Vec<u64>>,
    /// Size with holes.
    pub size: Option<u64>,
    /// Name of the file; the entry's own is made up.
    pub name: Option<Vec<u8>>,
}

/// Reads the records; `pieces` bounds the numbers of a sparse map. The error says what is wrong.
pub fn parse(mut rest: &[u8], pieces: usize) -> Result<Pax, &'static str> {
    const CUT: &str = "extension record is cut off";
    let mut pax = Pax::default();
    while !rest.is_empty() {
        let space = rest.iter().position(|&b| b == b' ').ok_or(CUT)?;
        let len = usize::try_from(decimal(&rest[..space])?).map_err(|_| CUT)?;
        let (record, others) = rest.split_at_checked(len).ok_or(CUT)?;
        let record = record.get(space + 1..).and_then(|r| r.strip_suffix(b"\n")).ok_or(CUT)?;
        let equals = record.iter().position(|&b| b == b'=').ok_or("extension record without a value")?;
        pax.take(&record[..equals], &record[equals + 1..], pieces)?;
        rest = others;
    }
    Ok(pax)
}

impl Pax {
    fn take(&mut self, key: &[u8], value: &[u8], pieces: usize) -> Result<(), &'static str> {
        if let Some(name) = key.strip_prefix(b"SCHILY.xattr.") {
            self.xattrs.push((name.to_vec(), value.to_vec()));
            return Ok(());
        }
        if value.is_empty() {
            return Ok(()); // "as in the header"
        }
        match key {
            b"path" => self.path = Some(value.to_vec()),
            b"linkpath" => self.link = Some(value.to_vec()),
            b"size" => self.size = Some(decimal(value)?),
            b"uid" => self.uid = Some(decimal(value)?),
            b"gid" => self.gid = Some(decimal(value)?),
            b"mtime" => self.mtime = Some(time(value)?),
            b"GNU.sparse.name" => self.sparse.name = Some(value.to_vec()),
            b"GNU.sparse.size" | b"GNU.sparse.realsize" => self.sparse.size = Some(decimal(value)?),
            b"GNU.sparse.major" => self.sparse.map_in_data = decimal(value)? == 1,
            b"GNU.sparse.offset" | b"GNU.sparse.numbytes" => self.sparse.push(decimal(value)?, pieces)?,
            b"GNU.sparse.map" => {
                for number in value.split(|&b| b == b',') {
                    self.sparse.push(decimal(number)?, pieces)?;
                }
            }
            _ => {} // times of access, names of users, comments
        }
        Ok(())
    }
}

impl Sparse {
    fn push(&mut self, number: u64, pieces: usize) -> Result<(), &'static str> {
        let map = self.map.get_or_insert_default();
        map.push(number);
        if map.len() > 2 * pieces { Err("sparse file has too many pieces") } else { Ok(()) }
    }
}

/// Decimal digits and nothing else.
pub fn decimal(digits: &[u8]) -> Result<u64, &'static str> {
    let text = str::from_utf8(digits).ok().filter(|t| t.bytes().all(|b| b.is_ascii_digit()));
    text.and_then(|t| t.parse().ok()).ok_or("bad number in extension record")
}

/// `-12.345`: seconds, and a fraction of which nine digits count.
fn time(value: &[u8]) -> Result<Time, &'static str> {
    let (negative, value) = value.strip_prefix(b"-").map_or((false, value), |rest| (true, rest));
    let mut parts = value.splitn(2, |&b| b == b'.');
    let sec =
        i64::try_from(decimal(parts.next().unwrap_or_default())?).map_err(|_| "bad number in extension record")?;
    let fraction = parts.next().unwrap_or_default();
    if !fraction.iter().all(u8::is_ascii_digit) {
        return Err("bad number in extension record");
    }
    let nsec = fraction.iter().chain(std::iter::repeat(&b'0')).take(9).fold(0, |n, b| n * 10 + u32::from(b - b'0'));
    Ok(match (negative, nsec) {
        (false, _) => Time { sec, nsec },
        (true, 0) => Time { sec: -sec, nsec },
        (true, _) => Time { sec: -sec - 1, nsec: 1_000_000_000 - nsec },
    })
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn records_are_read() {
        let records = b"12 path=a/b\n30 SCHILY.xattr.user.x=a=b\n\0c\n15 mtime=-1.25\n8 uid=7\n7 gid=\n13 comment=x\n";
        let pax = parse(records, 8).expect("good records");
        assert_eq!(pax.path.as_deref(), Some(b"a/b".as_slice()));
        assert_eq!(pax.xattrs, [(b"user.x".to_vec(), b"a=b\n\0c".to_vec())]);
        assert_eq!(pax.mtime, Some(Time { sec: -2, nsec: 750_000_000 }));
        assert_eq!((pax.uid, pax.gid), (Some(7), None));
    }

    #[test]
    fn bad_records_are_refused() {
        let table: [&[u8]; 9] = [
            b"x",
            b"99 path=a\n",
            b"9 path=a",
            b"0 path=a\n",
            b"2 path=a\n",
            b"10 path a\n",
            b"12 size=-12\n",
            b"99999999999999999999999 path=a\n",
            b"27 GNU.sparse.map=1,2,3,4\n",
        ];
        for records in table {
            assert!(parse(records, 1).is_err(), "{:?}", String::from_utf8_lossy(records));
        }
    }
}
