//! The entries of a tar archive, one after the other: ustar, POSIX (pax), GNU, star and the form from before them.

use std::fs::File;
use std::io;
use std::ops::Range;

use bytes::Bytes;

use super::TarError;
use super::header::{self, BLOCK, Header};
use super::input::Input;
use super::pax::{self, Pax};
use crate::Limits;
use crate::erofs::stream::Source;
use crate::tree::Time;

/// What an entry is.
#[derive(Clone, Debug, PartialEq, Eq)]
pub enum Kind {
    /// A regular file.
    File,
    /// A directory.
    Directory,
    /// One more name for an earlier entry, by its path.
    HardLink(Vec<u8>),
    /// A symbolic link and its target.
    Symlink(Vec<u8>),
    /// A character device.
    CharDevice(u64, u64),
    /// A block device.
    BlockDevice(u64, u64),
    /// A named pipe.
    Fifo,
}

/// An entry as the archive has it: its numbers fit, its names are not judged.
#[derive(Debug)]
pub struct Entry {
    /// Path.
    pub path: Vec<u8>,
    /// Kind.
    pub kind: Kind,
    /// Permission bits.
    pub permissions: u16,
    /// Owner.
    pub uid: u32,
    /// Group.
    pub gid: u32,
    /// Modification time.
    pub mtime: Time,
    /// Extended attributes, unjudged.
    pub xattrs: Vec<(Vec<u8>, Vec<u8>)>,
    /// Bytes of a regular file, holes included.
    pub size: u64,
    /// The parts of a sparse file that are in the archive: in order, not touching, inside the file.
    pub extents: Option<Vec<Range<u64>>>,
}

/// From this size on a file's data is not worth passing through this process.
const COPIED: u64 = 1 << 20;

/// An archive that is being read. Reading from it gives the data of the entry that came last.
pub struct Archive<'l, 's> {
    input: Input<'s>,
    limits: &'l Limits,
    position: u64,
    data: u64,
    padding: u64,
}

impl<'l, 's> Archive<'l, 's> {
    /// Starts at the first header.
    pub fn new(input: Input<'s>, limits: &'l Limits) -> Archive<'l, 's> {
        Archive { input, limits, position: 0, data: 0, padding: 0 }
    }

    /// The next entry; `None` at the end mark.
    pub fn next(&mut self) -> Result<Option<Entry>, TarError> {
        self.skip_data()?;
        let (mut path, mut link, mut pax) = (None, None, Pax::default());
        loop {
            let block = self.block()?;
            if header::is_zero(&block) {
                return Ok(None);
            }
            let header = header::parse(&block).map_err(|what| self.malformed(what))?;
            self.begin_data(header.size)?;
            match header.kind {
                b'x' | b'X' => {
                    let records = self.extension()?;
                    pax = pax::parse(&records, self.limits.pieces).map_err(|what| self.malformed(what))?;
                }
                b'L' => path = Some(header::text(&self.extension()?).to_vec()),
                b'K' => link = Some(header::text(&self.extension()?).to_vec()),
                b'g' | b'V' => self.skip_data()?, // said of the archive as a whole
                _ => return self.entry(&block, header, path, link, pax).map(Some),
            }
        }
    }

    /// What the archive may hold.
    pub fn limits(&self) -> &'l Limits {
        self.limits
    }

    /// Gives back the input, behind the end mark's first block.
    pub fn into_inner(self) -> Input<'s> {
        self.input
    }

    /// Where the data of the entry lies, all of it, when it is best copied by the kernel; it counts as read then.
    pub fn skip_to_copy(&mut self) -> Option<(&'s File, u64)> {
        let (size, whole) = (self.data, self.data > COPIED);
        let found = if whole { self.input.skip_to_copy(size) } else { None };
        if found.is_some() {
            self.data = 0;
            self.position += size;
        }
        found
    }

    fn entry(
        &mut self,
        block: &[u8; BLOCK],
        header: Header,
        path: Option<Vec<u8>>,
        link: Option<Vec<u8>>,
        mut pax: Pax,
    ) -> Result<Entry, TarError> {
        let path = pax.sparse.name.take().or(pax.path.take()).or(path).unwrap_or(header.path);
        let link = pax.link.take().or(link).unwrap_or(header.link);
        let kind = match header.kind {
            b'0' | 0 if path.ends_with(b"/") => Kind::Directory, // before ustar
            b'0' | 0 | b'7' | b'S' => Kind::File,
            b'1' => Kind::HardLink(link),
            b'2' => Kind::Symlink(link),
            b'3' => Kind::CharDevice(header.device.0, header.device.1),
            b'4' => Kind::BlockDevice(header.device.0, header.device.1),
            b'5' | b'D' => Kind::Directory,
            b'6' => Kind::Fifo,
            _ => return Err(TarError::entry(&path, "is of a kind that a layer cannot hold")),
        };
        // What these kinds say about their size is meaningless: no data follows.
        let no_data = matches!(header.kind, b'1'..=b'6');
        self.begin_data(if no_data { 0 } else { pax.size.unwrap_or(header.size) })?;
        let narrow = |id: u64| u32::try_from(id).map_err(|_| TarError::entry(&path, "has an owner beyond 32 bits"));
        let mut entry = Entry {
            uid: narrow(pax.uid.unwrap_or(header.uid))?,
            gid: narrow(pax.gid.unwrap_or(header.gid))?,
            permissions: (header.mode & 0o7777) as u16,
            mtime: pax.mtime.unwrap_or(header.mtime),
            xattrs: pax.xattrs,
            size: 0,
            extents: None,
            path,
            kind,
        };
        if entry.kind == Kind::File {
            let map = match header.kind {
                b'S' => Some(self.gnu_map(block)?),
                _ if pax.sparse.map_in_data => Some(self.map_in_data()?),
                _ => pax.sparse.map,
            };
            entry.size = match (&map, header.kind) {
                (None, _) => self.data,
                (_, b'S') => header::number(&block[483..495]).map_err(|what| self.malformed(what))?,
                _ => pax.sparse.size.ok_or_else(|| self.malformed("sparse file without a size"))?,
            };
            if entry.size > self.limits.file {
                return Err(TarError::Limit { what: "bytes in one file", limit: self.limits.file });
            }
            let check =
                |map| extents(map, entry.size, self.data).ok_or_else(|| self.malformed("impossible sparse map"));
            entry.extents = map.map(check).transpose()?;
        }
        Ok(entry)
    }

    /// The map of an old GNU sparse file: four pairs in the header, then blocks of 21 pairs.
    fn gnu_map(&mut self, block: &[u8; BLOCK]) -> Result<Vec<u64>, TarError> {
        let mut map = Vec::new();
        let mut read = |pairs: &[u8]| -> Result<(), &'static str> {
            for number in pairs.chunks_exact(12).take_while(|field| field[0] != 0) {
                map.push(header::number(number)?);
            }
            Ok(())
        };
        read(&block[386..482]).map_err(|what| self.malformed(what))?;
        let mut more = block[482] != 0;
        for _ in 0..=self.limits.pieces / 21 {
            if !more {
                return Ok(map);
            }
            // These blocks stand between header and data and are not counted in its size.
            let block = self.block()?;
            read(&block[..504]).map_err(|what| self.malformed(what))?;
            more = block[504] != 0;
        }
        Err(TarError::Limit { what: "pieces in a sparse file", limit: self.limits.pieces as u64 })
    }

    /// The map at the start of a sparse file's data, lines of decimal numbers: how many pairs, and the pairs.
    fn map_in_data(&mut self) -> Result<Vec<u64>, TarError> {
        let bad = "impossible sparse map";
        let mut numbers = Vec::new();
        let mut digits = Vec::new();
        let mut wanted = 1;
        while numbers.len() < wanted {
            if self.data < BLOCK as u64 {
                return Err(self.malformed(bad));
            }
            let block = self.block()?;
            self.data -= BLOCK as u64;
            for &byte in &block {
                match byte {
                    b'\n' if numbers.len() < wanted => {
                        let number = pax::decimal(&digits).map_err(|what| self.malformed(what))?;
                        digits.clear();
                        if numbers.is_empty() {
                            let pieces = usize::try_from(number).ok().filter(|&n| n <= self.limits.pieces);
                            let limit = self.limits.pieces as u64;
                            let pieces = pieces.ok_or(TarError::Limit { what: "pieces in a sparse file", limit })?;
                            wanted += 2 * pieces;
                        }
                        numbers.push(number);
                    }
                    _ if numbers.len() < wanted && digits.len() < 20 => digits.push(byte),
                    _ if numbers.len() < wanted => return Err(self.malformed(bad)),
                    _ => {} // up to the end of the block
                }
            }
        }
        numbers.remove(0);
        Ok(numbers)
    }

    /// Says how much data follows the header that was just read.
    fn begin_data(&mut self, size: u64) -> Result<(), TarError> {
        // So that reading it needs no check of its own.
        if self.position.checked_add(size).is_none_or(|end| end > self.limits.bytes) {
            return Err(TarError::Limit { what: "bytes", limit: self.limits.bytes });
        }
        self.data = size;
        self.padding = size.next_multiple_of(BLOCK as u64) - size;
        Ok(())
    }

    /// All data of an extension header.
    fn extension(&mut self) -> Result<Vec<u8>, TarError> {
        if self.data > self.limits.header as u64 {
            return Err(TarError::Limit { what: "bytes in one extension header", limit: self.limits.header as u64 });
        }
        let mut data = vec![0; self.data as usize];
        self.read_exact(&mut data)?;
        self.skip_data()?;
        Ok(data)
    }

    fn skip_data(&mut self) -> Result<(), TarError> {
        self.data += std::mem::take(&mut self.padding);
        while self.data > 0 {
            if self.take(self.data).map_err(|e| self.failed(e))?.is_empty() {
                return Err(self.malformed("archive is cut off"));
            }
        }
        Ok(())
    }

    fn block(&mut self) -> Result<[u8; BLOCK], TarError> {
        let mut block = [0; BLOCK];
        self.input.read_exact(&mut block).map_err(|e| self.failed(e))?;
        self.position += BLOCK as u64;
        match self.position > self.limits.bytes {
            true => Err(self.failed(io::ErrorKind::FileTooLarge.into())),
            false => Ok(block),
        }
    }

    /// The next bytes of the entry's data, which must have as many.
    pub fn read_exact(&mut self, buffer: &mut [u8]) -> Result<(), TarError> {
        let len = buffer.len() as u64;
        self.data = self.data.checked_sub(len).ok_or_else(|| self.failed(io::ErrorKind::UnexpectedEof.into()))?;
        self.input.read_exact(buffer).map_err(|e| self.failed(e))?;
        self.position += len;
        Ok(())
    }

    fn malformed(&self, what: &'static str) -> TarError {
        TarError::Malformed { at: self.position, what }
    }

    /// Names the cause of a failed read.
    pub fn failed(&self, source: io::Error) -> TarError {
        match source.kind() {
            io::ErrorKind::UnexpectedEof if self.position == 0 => self.malformed("no tar archive"),
            io::ErrorKind::UnexpectedEof => self.malformed("archive is cut off"),
            io::ErrorKind::FileTooLarge => TarError::Limit { what: "bytes", limit: self.limits.bytes },
            _ => TarError::Read(source),
        }
    }
}

impl Source for Archive<'_, '_> {
    fn take(&mut self, most: u64) -> io::Result<Bytes> {
        let most = usize::try_from(most.min(self.data)).unwrap_or(usize::MAX);
        let bytes = if most == 0 { Bytes::new() } else { self.input.take(most)? };
        self.data -= bytes.len() as u64;
        self.position += bytes.len() as u64;
        Ok(bytes)
    }
}

/// Pairs of offset and length as ranges; `None` unless they are in order, inside the file, and together `data` bytes.
fn extents(map: Vec<u64>, size: u64, data: u64) -> Option<Vec<Range<u64>>> {
    let mut extents: Vec<Range<u64>> = Vec::new();
    let mut sum = 0u64;
    for pair in map.chunks(2) {
        let &[start, len] = pair else { return None };
        let end = start.checked_add(len).filter(|&end| end <= size)?;
        sum += len; // at most size for each, and no more of them than fit in memory
        match extents.last_mut() {
            Some(last) if start < last.end => return None,
            Some(last) if start == last.end => last.end = end,
            _ if len == 0 => {}
            _ => extents.push(start..end),
        }
    }
    (sum == data).then_some(extents)
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn sparse_maps_are_judged() {
        assert_eq!(extents(vec![0, 10, 10, 5, 100, 1, 200, 0], 200, 16), Some(vec![0..15, 100..101]));
        assert_eq!(extents(vec![], 200, 0), Some(vec![]));
        for (map, data) in [
            (vec![0, 10, 5, 10], 20),  // overlap
            (vec![50, 10, 0, 10], 20), // order
            (vec![195, 10], 10),       // outside
            (vec![u64::MAX, 10], 10),  // overflow
            (vec![0, 10], 9),          // other data
            (vec![0, 10, 20], 10),     // half a pair
        ] {
            assert_eq!(extents(map.clone(), 200, data), None, "{map:?}");
        }
    }
}
