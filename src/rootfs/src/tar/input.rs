//! From compressed bytes to plain ones and, where it is wanted, their digest: inflating, hashing and writing take turns on no
//! processor.
//!
//! ```text
//!  compressed ──► decompress (a thread) ──┐
//!                                         ├──► Input (the reader's thread) ──► hash (a thread) ──► diffID
//!  plain ─────────────────────────────────┘      └──► image                      │
//!                       ▲                                                        │
//!                       └────────────────── chunks to be filled again ◄──────────┘
//! ```
//!
//! Plain bytes are read by whoever writes them, so that they are still in that processor's cache.

use std::fs::File;
use std::io::{self, BufRead, BufReader, Read};
use std::os::unix::fs::FileExt;
use std::sync::mpsc::{Receiver, SyncSender, sync_channel};
use std::thread::{Builder, Scope, ScopedJoinHandle};

use flate2::bufread::MultiGzDecoder;
use sha2::{Digest, Sha256};

/// Bytes that travel together: few system calls, and still inside a processor's own cache.
const CHUNK: usize = 256 << 10;
/// Chunks that wait at most between two threads.
const WAITING: usize = 8;

type Chunk = Vec<u8>;

/// The plain bytes of an archive.
pub struct Input<'s> {
    source: Source<'s>,
    hash: Option<Hash<'s>>,
    /// Where chunks that nobody hashes go.
    used: SyncSender<Chunk>,
    current: Chunk,
    at: usize,
}

enum Source<'s> {
    /// Plain bytes, and chunks for them.
    Plain(Box<dyn Read + 's>, Receiver<Chunk>),
    /// A plain file that nobody hashes, where the next chunk starts, and chunks.
    File(&'s File, u64, Receiver<Chunk>),
    /// What the decompressing thread sends.
    Compressed(Receiver<io::Result<Chunk>>),
}

struct Hash<'s> {
    chunks: SyncSender<Chunk>,
    thread: ScopedJoinHandle<'s, [u8; 32]>,
}

impl<'s> Input<'s> {
    /// Starts the threads. They end when the archive or the input does.
    pub fn start<'e>(scope: &'s Scope<'s, 'e>, archive: impl Read + Send + 's, hash: bool) -> io::Result<Input<'s>> {
        let (used, empty) = sync_channel(3 * WAITING);
        let hash = hash.then(|| Hash::start(scope, used.clone())).transpose()?;
        let source = match open(archive)? {
            (archive, false) => Source::Plain(archive, empty),
            (mut archive, true) => {
                let (to_reader, chunks) = sync_channel(WAITING);
                Builder::new().name("decompress".into()).spawn_scoped(scope, move || {
                    loop {
                        match fill(&mut archive, &empty) {
                            Ok(chunk) if chunk.is_empty() => break,
                            chunk => {
                                let failed = chunk.is_err();
                                // Nobody there: it has ended for another reason.
                                if to_reader.send(chunk).is_err() || failed {
                                    break;
                                }
                            }
                        }
                    }
                })?;
                Source::Compressed(chunks)
            }
        };
        Ok(Input { source, hash, used, current: Chunk::default(), at: 0 })
    }

    /// The same for a file. A plain one that is not hashed is copied from by the kernel where the entries are large.
    pub fn of_file<'e>(scope: &'s Scope<'s, 'e>, file: &'s File, hash: bool) -> io::Result<Input<'s>> {
        let mut start = [0; 4];
        let regular = file.metadata()?.is_file();
        let plain = regular && !matches!(file.read_at(&mut start, 0), Ok(4) if is_compressed(start));
        if hash || !plain {
            return Input::start(scope, file, hash);
        }
        let (used, empty) = sync_channel(1);
        Ok(Input { source: Source::File(file, 0, empty), hash: None, used, current: Chunk::default(), at: 0 })
    }

    /// True where [`Input::skip_to_copy`] skips.
    pub fn is_copied(&self) -> bool {
        matches!(self.source, Source::File(..))
    }

    /// Skips the next `len` bytes if somebody else can copy them: from this file, at this offset.
    pub fn skip_to_copy(&mut self, len: u64) -> Option<(&'s File, u64)> {
        let Source::File(file, next, _) = &mut self.source else { return None };
        let waiting = (self.current.len() - self.at) as u64;
        let start = *next - waiting;
        if len < waiting {
            self.at += len as usize;
        } else {
            self.at = self.current.len();
            *next = start.checked_add(len)?;
        }
        Some((file, start))
    }

    /// Reads what is left, at most `limit` bytes; returns the SHA-256 of all where it was wanted.
    pub fn finish(mut self, limit: u64) -> io::Result<Option<[u8; 32]>> {
        let mut left = 0u64;
        // Compressed bytes have a checksum of their own at their end. Else nobody asks what follows the end mark.
        while self.hash.is_some() || matches!(self.source, Source::Compressed(_)) {
            let n = self.fill_buf()?.len();
            left = left.saturating_add(n as u64);
            match n {
                0 => break,
                _ if left > limit => return Err(io::ErrorKind::FileTooLarge.into()),
                n => self.consume(n),
            }
        }
        let Some(hash) = self.hash.take() else { return Ok(None) };
        drop(hash.chunks);
        hash.thread.join().map(Some).map_err(|_| died())
    }

    /// Replaces the chunk that has been read; an empty one is the end.
    fn next_chunk(&mut self) -> io::Result<()> {
        self.at = 0;
        let chunk = std::mem::take(&mut self.current);
        match &self.hash {
            Some(hash) => hash.chunks.send(chunk).map_err(|_| died())?,
            None => drop(self.used.try_send(chunk)), // there are enough
        }
        self.current = match &mut self.source {
            Source::Plain(archive, empty) => fill(archive, empty)?,
            Source::File(file, next, empty) => {
                let chunk = fill(&mut At { file, at: *next }, empty)?;
                *next += chunk.len() as u64;
                chunk
            }
            Source::Compressed(chunks) => chunks.recv().unwrap_or_else(|_| Ok(Chunk::default()))?,
        };
        Ok(())
    }
}

impl Read for Input<'_> {
    fn read(&mut self, buffer: &mut [u8]) -> io::Result<usize> {
        let n = self.fill_buf()?.read(buffer)?;
        self.consume(n);
        Ok(n)
    }
}

impl BufRead for Input<'_> {
    fn fill_buf(&mut self) -> io::Result<&[u8]> {
        if self.at == self.current.len() {
            self.next_chunk()?;
        }
        Ok(&self.current[self.at..])
    }

    fn consume(&mut self, n: usize) {
        self.at += n;
    }
}

impl<'s> Hash<'s> {
    fn start<'e>(scope: &'s Scope<'s, 'e>, done: SyncSender<Chunk>) -> io::Result<Hash<'s>> {
        let (chunks, wanted) = sync_channel::<Chunk>(WAITING);
        let thread = Builder::new().name("hash".into()).spawn_scoped(scope, move || {
            let mut hash = Sha256::new();
            for chunk in wanted {
                hash.update(&chunk);
                let _ = done.try_send(chunk); // there are enough, or everything is read
            }
            hash.finalize().into()
        })?;
        Ok(Hash { chunks, thread })
    }
}

fn died() -> io::Error {
    io::Error::other("the hashing thread failed")
}

/// The next plain bytes, a whole chunk of them unless the archive ends.
fn fill(archive: &mut (impl Read + ?Sized), empty: &Receiver<Chunk>) -> io::Result<Chunk> {
    let mut chunk = empty.try_recv().unwrap_or_default();
    // Zeroed once, and never again while the chunk goes round.
    chunk.resize(CHUNK, 0);
    let mut filled = 0;
    while filled < CHUNK {
        match archive.read(&mut chunk[filled..]) {
            Ok(0) => break,
            Ok(n) => filled += n,
            Err(e) if e.kind() == io::ErrorKind::Interrupted => {}
            Err(e) => return Err(e),
        }
    }
    chunk.truncate(filled);
    Ok(chunk)
}

/// Reads a file from an offset on, whatever its cursor says.
struct At<'f> {
    file: &'f File,
    at: u64,
}

impl Read for At<'_> {
    fn read(&mut self, buffer: &mut [u8]) -> io::Result<usize> {
        let n = self.file.read_at(buffer, self.at)?;
        self.at += n as u64;
        Ok(n)
    }
}

const GZIP: [u8; 2] = [0x1f, 0x8b];
const ZSTD: [u8; 4] = [0x28, 0xb5, 0x2f, 0xfd];

fn is_compressed(start: [u8; 4]) -> bool {
    start.starts_with(&GZIP) || start == ZSTD
}

/// Decompresses what starts like gzip or zstd; anything else is taken as it is. Says whether it was compressed.
fn open<'a>(mut archive: impl Read + Send + 'a) -> io::Result<(Box<dyn Read + Send + 'a>, bool)> {
    let mut start = Vec::with_capacity(4);
    (&mut archive).take(4).read_to_end(&mut start)?;
    let magic = start.clone();
    let archive = io::Cursor::new(start).chain(archive);
    Ok(if magic.starts_with(&GZIP) {
        (Box::new(MultiGzDecoder::new(BufReader::with_capacity(CHUNK, archive))), true)
    } else if magic == ZSTD {
        (Box::new(zstd::Decoder::new(archive)?), true)
    } else {
        (Box::new(archive), false)
    })
}
