//! An image whose file data arrives before its metadata is known, as from a tar archive: data first, metadata behind it, the
//! superblock last.
//!
//! ```text
//!  | superblock | file | file | ..        | inodes             | directory blocks |
//!   written last  store, store, ..          finish: one Plan
//! ```
//!
//! Invariants: file data passes through one bounded buffer and is written once; an image that was not finished has no superblock,
//! so nobody can take it for one.
//!
//! The disk gets to work while the image is being written: the sync before it is published would else wait for all of it.

use std::fs::File;
use std::io::{self, Seek, SeekFrom};
use std::ops::Range;
use std::os::unix::fs::FileExt;
use std::sync::mpsc::{SyncSender, sync_channel};
use std::thread::{Builder, JoinHandle};

use super::chunks;
use super::format::{BLOCK, NULL_ADDR};
use super::sink::Sink;
pub use super::sink::{CopyError, Source};
use super::writer::{FIRST_BLOCK, Plan, WriteError, Written};
use crate::tree::{Data, Tree};

/// Bytes after which the disk is given what there is. Fewer, and a file system's journal is committed too often.
const STEP: u64 = 32 << 20;

/// An image under construction.
pub struct Stream<'f> {
    file: &'f File,
    sink: Sink<&'f File>,
    started: u64,
    writeback: Option<Writeback>,
}

/// A thread that syncs while others write.
struct Writeback {
    start: SyncSender<()>,
    thread: JoinHandle<io::Result<()>>,
}

impl Writeback {
    fn new(file: &File) -> io::Result<Writeback> {
        let file = file.try_clone()?;
        let (start, wanted) = sync_channel(1);
        let work = move || wanted.into_iter().try_for_each(|()| file.sync_data());
        let thread = Builder::new().name("writeback".into()).spawn(work)?;
        Ok(Writeback { start, thread })
    }

    /// Waits for what is under way. Its error is nobody else's to see: the kernel tells each open file once.
    fn finish(self) -> io::Result<()> {
        drop(self.start);
        self.thread.join().unwrap_or_else(|_| Err(io::Error::other("the writeback thread failed")))
    }
}

impl<'f> Stream<'f> {
    /// Starts an image in an empty file, with or without a checksum of all of it.
    pub fn new(mut file: &'f File, checksum: bool) -> io::Result<Stream<'f>> {
        let start = u64::from(FIRST_BLOCK) * BLOCK;
        file.seek(SeekFrom::Start(start))?;
        let sink = Sink::new(file, start);
        let sink = if checksum { sink } else { sink.without_checksum() };
        Ok(Stream { file, sink, started: start, writeback: None })
    }

    /// Starts to sync when there is enough to do.
    fn start_writeback(&mut self) -> io::Result<()> {
        if self.sink.position() - self.started < STEP {
            return Ok(());
        }
        self.started = self.sink.position();
        if self.writeback.is_none() {
            self.writeback = Some(Writeback::new(self.file)?);
        }
        // Still busy with the last step: the next one will do. Gone after an error: `finish` tells.
        let _ = self.writeback.as_ref().map(|writeback| writeback.start.try_send(()));
        Ok(())
    }

    /// Bytes so far.
    pub fn position(&self) -> u64 {
        self.sink.position()
    }

    /// Stores a file of `size` bytes. `source` has the bytes of its `extents` (sorted, not touching, inside the file) one after the
    /// other, or all of its bytes.
    pub fn store(
        &mut self,
        size: u64,
        extents: Option<Vec<Range<u64>>>,
        source: &mut impl Source,
    ) -> Result<Data, CopyError> {
        let block = self.next_block()?;
        match (&extents, chunks::bits_for(extents.as_deref(), size)) {
            (None, _) => {
                let mut left = size;
                while left > 0 {
                    let now = left.min(STEP);
                    self.sink.store(source, now)?;
                    self.start_writeback().map_err(CopyError::Write)?;
                    left -= now;
                }
            }
            (Some(extents), 0) => self.store_range(0..size, extents, source)?,
            (Some(extents), bits) => {
                for chunk in chunks::map(extents, size, bits).flatten() {
                    self.sink.pad_to_block().map_err(CopyError::Write)?;
                    self.store_range(chunk, extents, source)?;
                }
            }
        }
        self.start_writeback().map_err(CopyError::Write)?; // small files, and sparse ones
        Ok(Data::Stored { block, extents })
    }

    /// Stores a file whose `size` bytes lie in `file` from the offset `at` on, by the kernel's hand where it can.
    pub fn store_from(&mut self, size: u64, file: &File, at: u64) -> Result<Data, CopyError> {
        let block = self.next_block()?;
        let mut done = 0;
        while done < size {
            let now = STEP.min(size - done);
            if !self.sink.splice(file, at + done, now)? {
                self.sink.copy(file, at + done..at + done + now)?;
            }
            self.start_writeback().map_err(CopyError::Write)?;
            done += now;
        }
        Ok(Data::Stored { block, extents: None })
    }

    fn next_block(&mut self) -> Result<u32, CopyError> {
        self.sink.pad_to_block().map_err(CopyError::Write)?;
        let block = u32::try_from(self.sink.position() / BLOCK).ok().filter(|&block| block < NULL_ADDR);
        block.ok_or_else(|| CopyError::Write(io::ErrorKind::FileTooLarge.into()))
    }

    /// Stores the part `range` of a sparse file; what lies in `extents` comes from `source`, the rest is zeros.
    fn store_range(
        &mut self,
        range: Range<u64>,
        extents: &[Range<u64>],
        source: &mut impl Source,
    ) -> Result<(), CopyError> {
        let start = self.sink.position();
        let first = extents.partition_point(|extent| extent.end <= range.start);
        for extent in extents[first..].iter().take_while(|extent| extent.start < range.end) {
            let (from, to) = (extent.start.max(range.start), extent.end.min(range.end));
            self.sink.pad_to(start + (from - range.start)).map_err(CopyError::Write)?;
            self.sink.store(source, to - from)?;
        }
        self.sink.pad_to(start + (range.end - range.start)).map_err(CopyError::Write)
    }

    /// Writes the metadata of `tree`, whose stored files are this image's, and the superblock.
    pub fn finish(mut self, tree: &Tree) -> Result<Written, WriteError> {
        self.sink.pad_to_block().map_err(WriteError::Write)?;
        let block = u32::try_from(self.sink.position() / BLOCK).map_err(|_| WriteError::TooLarge)?;
        let plan = Plan::after(tree, block, &[])?;
        plan.write_from_metadata(&mut self.sink)?;
        let rest = self.sink.finish().map_err(WriteError::Write)?;
        let head = plan.super_block();
        self.file.write_all_at(&head, 0).map_err(WriteError::Write)?;
        self.writeback.map_or(Ok(()), Writeback::finish).map_err(WriteError::Write)?;
        let rest_len = usize::try_from(plan.size() - head.len() as u64).map_err(|_| WriteError::TooLarge)?;
        let checksum = rest.map(|rest| crc32c::crc32c_combine(crc32c::crc32c(&head), rest, rest_len));
        Ok(Written { size: plan.size(), inodes: plan.inodes(), checksum, shared: 0 })
    }
}
