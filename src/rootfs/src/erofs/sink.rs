//! The end of the writer: what is to be written gathers in front of the output, which knows its position and sums up what passes.
//!
//! ```text
//!  put, pad, copy ──► buffer ────────┐
//!                                    ├─ pieces, in order ──► one writev
//!  store ──► slices of the source ───┘
//!  copy, splice ──► what the kernel can do by itself: share blocks, or move pages
//! ```

use std::fs::File;
use std::io::{self, IoSlice, Write};
use std::ops::Range;
use std::os::fd::{AsFd, BorrowedFd, OwnedFd};

use bytes::Bytes;
use rustix::fs::copy_file_range;
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

/// From this many bytes on, blocks are shared instead of copied where the file system can: to share a few costs as much as to copy them.
const SHARED: u64 = 128 << 10;

/// Sequential output.
pub struct Sink<W> {
    out: W,
    sharing: Option<Sharing>,
    buffer: Box<[u8]>,
    filled: usize,
    pieces: Vec<Piece>,
    flushed: u64,
    /// Bytes of the pieces.
    waiting: u64,
    checksum: Option<u32>,
    pipe: Option<(OwnedFd, OwnedFd)>,
}

/// Output whose file system can have one block in two files.
struct Sharing {
    out: OwnedFd,
    device: u64,
    bytes: u64,
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
            sharing: None,
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

    /// From now on blocks of files that are copied are shared with them, where the file system of the output can do that:
    /// `file`, which is the output. It decides by itself how much of a range it shares.
    pub fn share_with(mut self, file: &File) -> Sink<W> {
        self.sharing = Sharing::new(file).ok().flatten();
        self
    }

    /// Bytes that were shared, which nobody has read.
    pub fn shared(&self) -> u64 {
        self.sharing.as_ref().map_or(0, |sharing| sharing.bytes)
    }

    /// Appends a range of a file.
    pub fn copy(&mut self, file: impl AsFd, range: Range<u64>) -> Result<(), CopyError> {
        let mut at = range.start;
        let aligned = at.is_multiple_of(BLOCK) && self.position().is_multiple_of(BLOCK);
        if aligned && range.end - at >= SHARED && self.sharing.is_some() {
            self.flush().map_err(CopyError::Write)?;
            let shared = self.sharing.as_mut().map_or(Ok(0), |sharing| sharing.share(file.as_fd(), range.clone()))?;
            at += shared;
            self.flushed += shared;
            if shared > 0 {
                self.checksum = None;
            }
        }
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

/// Whether the file system of a file can have one block in two files, as far as that can be told without trying.
pub fn can_share(file: &File) -> rustix::io::Result<bool> {
    // Others of the few that can would only take the longer way.
    const ABLE: [u32; 2] = [0x5846_5342, 0x9123_683e]; // XFS_SUPER_MAGIC, BTRFS_SUPER_MAGIC (linux/magic.h)
    Ok(u32::try_from(rustix::fs::fstatfs(file)?.f_type).is_ok_and(|kind| ABLE.contains(&kind)))
}

impl Sharing {
    fn new(file: &File) -> rustix::io::Result<Option<Sharing>> {
        if !can_share(file)? {
            return Ok(None);
        }
        let device = rustix::fs::fstat(file)?.st_dev;
        let out = rustix::io::fcntl_dupfd_cloexec(file, 0)?;
        Ok(Some(Sharing { out, device, bytes: 0 }))
    }

    /// Puts whole blocks from the start of the range at the position of the output; returns how many bytes.
    fn share(&mut self, file: BorrowedFd, range: Range<u64>) -> Result<u64, CopyError> {
        let stat = rustix::fs::fstat(file).map_err(|e| CopyError::Read(e.into()))?;
        if stat.st_dev != self.device {
            return Ok(0);
        }
        let wanted = (range.end - range.start) / BLOCK * BLOCK;
        let (mut at, mut left) = (range.start, wanted);
        while left > 0 {
            let most = usize::try_from(left).unwrap_or(usize::MAX).min(1 << 30);
            match copy_file_range(file, Some(&mut at), &self.out, None, most) {
                Ok(0) => return Err(CopyError::TooShort),
                Ok(n) => left -= n as u64,
                Err(Errno::INTR) => {}
                // Not these two files: the ordinary way goes on from here.
                Err(Errno::INVAL | Errno::OPNOTSUPP | Errno::XDEV | Errno::TXTBSY) => break,
                Err(e @ (Errno::NOSPC | Errno::DQUOT | Errno::FBIG)) => return Err(CopyError::Write(e.into())),
                Err(e) => return Err(CopyError::Read(e.into())),
            }
        }
        self.bytes += wanted - left;
        Ok(wanted - left)
    }
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
