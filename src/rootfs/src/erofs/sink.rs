//! The end of the writer: what is to be written gathers in front of the output, which knows its position and sums up what passes.
//!
//! ```text
//!  put, pad, copy ──► buffer ────────┐
//!                                    ├─ pieces, in order ──► one writev
//!  store ──► slices of the source ───┘
//! ```

use std::fs::File;
use std::io::{self, IoSlice, Write};
use std::ops::Range;
use std::os::fd::{AsFd, OwnedFd};

use bytes::Bytes;
use rustix::io::Errno;
use rustix::pipe::{PipeFlags, SpliceFlags, fcntl_setpipe_size, pipe_with, splice};

use super::format::BLOCK;

/// Bytes of the buffer, into which files are read.
const BUFFER: usize = 1 << 20;

/// Bytes that wait for one system call: a file system takes large writes in large pieces.
const GATHERED: u64 = 1 << 20;

/// Pieces that wait for one system call (`UIO_MAXIOV`).
const PIECES: usize = 1024;

/// A piece of its own costs as much as a copy of this many bytes.
const WORTH: usize = 512;

/// Bytes that the kernel moves at once from file to file: what a pipe may hold without anybody's leave.
const PIPE: usize = 1 << 20;

/// Sequential output.
pub struct Sink<W> {
    out: W,
    buffer: Box<[u8]>,
    filled: usize,
    pieces: Vec<Piece>,
    flushed: u64,
    /// Bytes of the pieces.
    waiting: u64,
    checksum: Option<u32>,
    pipe: Option<(OwnedFd, OwnedFd)>,
}

/// Something that waits to be written.
enum Piece {
    /// A part of the buffer.
    Buffer(Range<usize>),
    /// A part of the source.
    Source(Bytes),
}

/// Bytes of an archive, in slices of the buffers that it was read into.
pub trait Source {
    /// The next bytes, at most `most` of them; none at the end.
    fn take(&mut self, most: u64) -> io::Result<Bytes>;
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
        Sink {
            out,
            buffer: vec![0; BUFFER].into(),
            filled: 0,
            pieces: Vec::new(),
            flushed: position,
            waiting: 0,
            checksum: Some(0),
            pipe: None,
        }
    }

    /// Where the next byte goes.
    pub fn position(&self) -> u64 {
        self.flushed + self.waiting
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

    /// Appends the next `len` bytes of a source.
    pub fn store(&mut self, source: &mut impl Source, mut len: u64) -> Result<(), CopyError> {
        while len > 0 {
            let bytes = source.take(len).map_err(CopyError::Read)?;
            len -= bytes.len() as u64;
            match bytes.len() {
                0 => return Err(CopyError::TooShort),
                1..WORTH => self.put(&bytes).map_err(CopyError::Write)?,
                more => {
                    self.pieces.push(Piece::Source(bytes));
                    self.waiting += more as u64;
                    self.flush_many().map_err(CopyError::Write)?;
                }
            }
        }
        Ok(())
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

    /// Takes the next `by` bytes of the buffer for good.
    fn advance(&mut self, by: usize) -> io::Result<()> {
        let start = self.filled;
        self.filled += by;
        self.waiting += by as u64;
        match self.pieces.last_mut() {
            Some(Piece::Buffer(last)) => last.end = self.filled,
            _ => self.pieces.push(Piece::Buffer(start..self.filled)),
        }
        if self.filled == self.buffer.len() { self.flush() } else { self.flush_many() }
    }

    fn flush_many(&mut self) -> io::Result<()> {
        if self.waiting >= GATHERED || self.pieces.len() >= PIECES { self.flush() } else { Ok(()) }
    }

    fn flush(&mut self) -> io::Result<()> {
        let bytes = |piece| match piece {
            &Piece::Buffer(Range { start, end }) => &self.buffer[start..end],
            Piece::Source(bytes) => &bytes[..],
        };
        let mut slices: Vec<_> = self.pieces.iter().map(|piece| IoSlice::new(bytes(piece))).collect();
        let sum = |checksum| slices.iter().fold(checksum, |sum, slice| crc32c::crc32c_append(sum, slice));
        self.checksum = self.checksum.map(sum);
        write_all(&mut self.out, &mut slices)?;
        self.flushed += self.waiting;
        self.pieces.clear();
        (self.filled, self.waiting) = (0, 0);
        Ok(())
    }
}

fn write_all(out: &mut impl Write, mut slices: &mut [IoSlice]) -> io::Result<()> {
    while !slices.is_empty() {
        match out.write_vectored(slices) {
            Ok(0) => return Err(io::ErrorKind::WriteZero.into()),
            Ok(n) => IoSlice::advance_slices(&mut slices, n),
            Err(e) if e.kind() == io::ErrorKind::Interrupted => {}
            Err(e) => return Err(e),
        }
    }
    Ok(())
}

impl Sink<&File> {
    /// Appends a range of a file without a byte of it passing through this process. `false`, with nothing done, when the kernel
    /// cannot do that with these two files.
    ///
    /// By a pipe and not by copy_file_range(2), which goes through one of 64 KiB: large writes are worth a third of the time. Nor
    /// could extents be shared, as archives align nothing to blocks.
    pub fn splice(&mut self, file: &File, mut at: u64, len: u64) -> Result<bool, CopyError> {
        self.flush().map_err(CopyError::Write)?;
        let end = at.checked_add(len).ok_or(CopyError::TooShort)?;
        let start = at;
        let (read, write) = match &self.pipe {
            Some(pipe) => pipe,
            None => self.pipe.insert(pipe().map_err(|e| CopyError::Read(e.into()))?),
        };
        while at < end {
            let wanted = usize::try_from(end - at).unwrap_or(usize::MAX).min(PIPE);
            let mut held = match splice(file, Some(&mut at), write, None, wanted, SpliceFlags::empty()) {
                Ok(0) => return Err(CopyError::TooShort),
                Ok(n) => n,
                Err(Errno::INTR) => continue,
                Err(Errno::INVAL | Errno::NOSYS) if at == start => return Ok(false),
                Err(e) => return Err(CopyError::Read(e.into())),
            };
            while held > 0 {
                match splice(read, None, self.out, None, held, SpliceFlags::empty()) {
                    Ok(0) => return Err(CopyError::Write(io::ErrorKind::WriteZero.into())),
                    Ok(n) => {
                        held -= n;
                        self.flushed += n as u64;
                        self.checksum = None;
                    }
                    Err(Errno::INTR) => {}
                    Err(e) => return Err(CopyError::Write(e.into())),
                }
            }
        }
        Ok(true)
    }
}

/// A pipe as large as it may be.
fn pipe() -> rustix::io::Result<(OwnedFd, OwnedFd)> {
    let (read, write) = pipe_with(PipeFlags::CLOEXEC)?;
    // A user with many pipes may not enlarge one more: it works as it is.
    let _ = fcntl_setpipe_size(&write, PIPE);
    Ok((read, write))
}
