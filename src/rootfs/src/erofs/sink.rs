//! The end of the writer: one buffer in front of the output, which knows its position and sums up what passes.

use std::fs::File;
use std::io::{self, BufRead, Write};
use std::ops::Range;
use std::os::fd::AsFd;

use rustix::io::Errno;

use super::format::BLOCK;

/// Bytes that wait for one `write`: few system calls, and still inside the processor's own cache. Small files are read straight
/// into it.
const BUFFER: usize = 256 << 10;

/// From this many bytes on a `write` of their own costs less than a copy.
const THROUGH: usize = 64 << 10;

/// Sequential output.
pub struct Sink<W> {
    out: W,
    buffer: Box<[u8]>,
    filled: usize,
    flushed: u64,
    checksum: Option<u32>,
}

/// Why a copy stopped.
#[derive(Debug)]
pub enum CopyError {
    /// The file has fewer bytes than wanted.
    TooShort,
    /// The file cannot be read.
    Read(io::Error),
    /// The output cannot be written.
    Write(io::Error),
}

impl<W: Write> Sink<W> {
    /// A sink whose first byte will be at `position` of the image.
    pub fn new(out: W, position: u64) -> Sink<W> {
        Sink { out, buffer: vec![0; BUFFER].into(), filled: 0, flushed: position, checksum: Some(0) }
    }

    /// Where the next byte goes.
    pub fn position(&self) -> u64 {
        self.flushed + self.filled as u64
    }

    /// Appends bytes.
    pub fn put(&mut self, mut bytes: &[u8]) -> io::Result<()> {
        while !bytes.is_empty() {
            let free = &mut self.buffer[self.filled..];
            let now = bytes.len().min(free.len());
            free[..now].copy_from_slice(&bytes[..now]);
            self.advance(now)?;
            bytes = &bytes[now..];
        }
        Ok(())
    }

    /// Appends zeros until the output is `position` bytes long.
    pub fn pad_to(&mut self, position: u64) -> io::Result<()> {
        let mut missing =
            position.checked_sub(self.position()).ok_or_else(|| io::Error::other("image layout overlaps itself"))?;
        while missing > 0 {
            let free = &mut self.buffer[self.filled..];
            let now = free.len().min(usize::try_from(missing).unwrap_or(usize::MAX));
            free[..now].fill(0);
            self.advance(now)?;
            missing -= now as u64;
        }
        Ok(())
    }

    /// Appends zeros up to the next block.
    pub fn pad_to_block(&mut self) -> io::Result<()> {
        self.pad_to(self.position().next_multiple_of(BLOCK))
    }

    /// Appends a range of a file.
    pub fn copy(&mut self, file: impl AsFd, range: Range<u64>) -> Result<(), CopyError> {
        let mut at = range.start;
        while at < range.end {
            let free = &mut self.buffer[self.filled..];
            let wanted = free.len().min(usize::try_from(range.end - at).unwrap_or(usize::MAX));
            match rustix::io::pread(&file, &mut free[..wanted], at) {
                Ok(0) => return Err(CopyError::TooShort),
                Ok(n) => {
                    self.advance(n).map_err(CopyError::Write)?;
                    at += n as u64;
                }
                Err(rustix::io::Errno::INTR) => {}
                Err(e) => return Err(CopyError::Read(e.into())),
            }
        }
        Ok(())
    }

    /// Appends the next `len` bytes of a stream.
    pub fn copy_stream(&mut self, source: &mut impl BufRead, mut len: u64) -> Result<(), CopyError> {
        while len > 0 {
            let bytes = match source.fill_buf() {
                Ok([]) => return Err(CopyError::TooShort),
                Ok(bytes) => bytes,
                Err(e) if e.kind() == io::ErrorKind::Interrupted => continue,
                Err(e) => return Err(CopyError::Read(e)),
            };
            let now = bytes.len().min(usize::try_from(len).unwrap_or(usize::MAX));
            self.put_through(&bytes[..now]).map_err(CopyError::Write)?;
            source.consume(now);
            len -= now as u64;
        }
        Ok(())
    }

    /// Appends bytes, many of them without a stop in the buffer.
    fn put_through(&mut self, bytes: &[u8]) -> io::Result<()> {
        if bytes.len() < THROUGH {
            return self.put(bytes);
        }
        self.flush()?;
        self.write(bytes)
    }

    /// Nobody wants the checksum: it is worth a tenth of what a small file costs.
    pub fn without_checksum(mut self) -> Sink<W> {
        self.checksum = None;
        self
    }

    /// Writes what is left; returns the CRC-32C of everything, if it was wanted and everything passed.
    pub fn finish(mut self) -> io::Result<Option<u32>> {
        self.flush()?;
        self.out.flush()?;
        Ok(self.checksum)
    }

    fn advance(&mut self, by: usize) -> io::Result<()> {
        self.filled += by;
        if self.filled == self.buffer.len() { self.flush() } else { Ok(()) }
    }

    fn flush(&mut self) -> io::Result<()> {
        let buffer = std::mem::take(&mut self.buffer);
        let result = self.write(&buffer[..self.filled]);
        self.buffer = buffer;
        self.filled = 0;
        result
    }

    fn write(&mut self, bytes: &[u8]) -> io::Result<()> {
        self.checksum = self.checksum.map(|checksum| crc32c::crc32c_append(checksum, bytes));
        self.out.write_all(bytes)?;
        self.flushed += bytes.len() as u64;
        Ok(())
    }
}

impl Sink<&File> {
    /// Appends a range of a file, copied by the kernel. `false`, with nothing done, when it cannot do that with these two files.
    pub fn splice(&mut self, file: &File, mut at: u64, len: u64) -> Result<bool, CopyError> {
        self.flush().map_err(CopyError::Write)?;
        let end = at.checked_add(len).ok_or(CopyError::TooShort)?;
        let start = at;
        while at < end {
            let wanted = usize::try_from(end - at).unwrap_or(usize::MAX).min(1 << 30);
            match rustix::fs::copy_file_range(file, Some(&mut at), self.out, None, wanted) {
                Ok(0) => return Err(CopyError::TooShort),
                Ok(n) => {
                    self.flushed += n as u64;
                    self.checksum = None;
                }
                Err(Errno::INTR) => {}
                Err(Errno::XDEV | Errno::OPNOTSUPP | Errno::INVAL | Errno::NOSYS) if at == start => return Ok(false),
                // Which of the two files it was, the kernel does not say; a full disk is the likeliest.
                Err(e) => return Err(CopyError::Write(e.into())),
            }
        }
        Ok(true)
    }
}
