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
//! Plain bytes are read by whoever writes them, so that they are still in that processor's cache. Nobody copies them: reader,
//! writer and hash have slices of the same chunk, which is filled again when none of them has any more.

use std::fs::File;
use std::io::{self, BufReader, Read};
use std::os::unix::fs::FileExt;
use std::sync::mpsc::{Receiver, SyncSender, sync_channel};
use std::thread::{Builder, Scope, ScopedJoinHandle};

use bytes::Bytes;
use flate2::bufread::MultiGzDecoder;
use sha2::{Digest, Sha256};

/// Bytes that travel together: few system calls, and still inside a processor's own cache.
const CHUNK: usize = 256 << 10;
/// Bytes that are read at once where reading and writing are all there is to do.
const FROM_FILE: usize = 1 << 20;
/// Chunks that wait at most between two threads.
const WAITING: usize = 8;

/// The plain bytes of an archive.
pub struct Input<'s> {
    source: Source<'s>,
    hash: Option<Hash<'s>>,
    pool: Pool,
    current: Bytes,
}

enum Source<'s> {
    /// Plain bytes.
    Plain(Box<dyn Read + 's>),
    /// A plain file that nobody hashes, and where the next chunk starts.
    File(&'s File, u64),
    /// What the decompressing thread sends.
    Compressed(Receiver<io::Result<Bytes>>),
}

struct Hash<'s> {
    chunks: SyncSender<Bytes>,
    thread: ScopedJoinHandle<'s, [u8; 32]>,
}

/// All chunks; those that nobody else has any more are filled again. How many there are is bound by what waits.
#[derive(Default)]
struct Pool(Vec<Bytes>);

impl<'s> Input<'s> {
    /// Starts the threads. They end when the archive or the input does.
    pub fn start<'e>(scope: &'s Scope<'s, 'e>, archive: impl Read + Send + 's, hash: bool) -> io::Result<Input<'s>> {
        let hash = hash.then(|| Hash::start(scope)).transpose()?;
        let source = match open(archive)? {
            (archive, false) => Source::Plain(archive),
            (mut archive, true) => {
                let (to_reader, chunks) = sync_channel(WAITING);
                Builder::new().name("decompress".into()).spawn_scoped(scope, move || {
                    let mut pool = Pool::default();
                    loop {
                        match pool.fill(&mut archive, CHUNK) {
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
        Ok(Input { source, hash, pool: Pool::default(), current: Bytes::new() })
    }

    /// The same for a file. A plain one that is not hashed is copied from by the kernel where the entries are large.
    pub fn of_file<'e>(scope: &'s Scope<'s, 'e>, file: &'s File, hash: bool) -> io::Result<Input<'s>> {
        let mut start = [0; 4];
        let regular = file.metadata()?.is_file();
        let plain = regular && !matches!(file.read_at(&mut start, 0), Ok(4) if is_compressed(start));
        if hash || !plain {
            return Input::start(scope, file, hash);
        }
        Ok(Input { source: Source::File(file, 0), hash: None, pool: Pool::default(), current: Bytes::new() })
    }

    /// True where [`Input::skip_to_copy`] skips.
    pub fn is_copied(&self) -> bool {
        matches!(self.source, Source::File(..))
    }

    /// Skips the next `len` bytes if somebody else can copy them: from this file, at this offset.
    pub fn skip_to_copy(&mut self, len: u64) -> Option<(&'s File, u64)> {
        let Source::File(file, next) = &mut self.source else { return None };
        let waiting = self.current.len() as u64;
        let start = *next - waiting;
        if len < waiting {
            drop(self.current.split_to(len as usize));
        } else {
            self.current.clear();
            *next = start.checked_add(len)?;
        }
        Some((file, start))
    }

    /// Reads what is left, at most `limit` bytes; returns the SHA-256 of all where it was wanted.
    pub fn finish(mut self, limit: u64) -> io::Result<Option<[u8; 32]>> {
        let mut left = 0u64;
        // Compressed bytes have a checksum of their own at their end. Else nobody asks what follows the end mark.
        while self.hash.is_some() || matches!(self.source, Source::Compressed(_)) {
            match self.take(CHUNK)?.len() {
                0 => break,
                n => left = left.saturating_add(n as u64),
            }
            if left > limit {
                return Err(io::ErrorKind::FileTooLarge.into());
            }
        }
        let Some(hash) = self.hash.take() else { return Ok(None) };
        drop(hash.chunks);
        hash.thread.join().map(Some).map_err(|_| died())
    }

    /// The next bytes; an error when there are not as many.
    pub fn read_exact(&mut self, buffer: &mut [u8]) -> io::Result<()> {
        let mut filled = 0;
        while filled < buffer.len() {
            let bytes = self.take(buffer.len() - filled)?;
            if bytes.is_empty() {
                return Err(io::ErrorKind::UnexpectedEof.into());
            }
            buffer[filled..filled + bytes.len()].copy_from_slice(&bytes);
            filled += bytes.len();
        }
        Ok(())
    }

    /// The next bytes, at most `most` of them; none at the end.
    pub fn take(&mut self, most: usize) -> io::Result<Bytes> {
        if self.current.is_empty() {
            self.current = match &mut self.source {
                Source::Plain(archive) => self.pool.fill(archive, CHUNK)?,
                Source::File(file, next) => {
                    let chunk = self.pool.fill(&mut At { file, at: *next }, FROM_FILE)?;
                    *next += chunk.len() as u64;
                    chunk
                }
                Source::Compressed(chunks) => chunks.recv().unwrap_or_else(|_| Ok(Bytes::new()))?,
            };
            if let Some(hash) = &self.hash {
                hash.chunks.send(self.current.clone()).map_err(|_| died())?;
            }
        }
        Ok(self.current.split_to(most.min(self.current.len())))
    }
}

impl<'s> Hash<'s> {
    fn start<'e>(scope: &'s Scope<'s, 'e>) -> io::Result<Hash<'s>> {
        let (chunks, wanted) = sync_channel::<Bytes>(WAITING);
        let thread = Builder::new().name("hash".into()).spawn_scoped(scope, move || {
            let mut hash = Sha256::new();
            wanted.into_iter().for_each(|chunk| hash.update(&chunk));
            hash.finalize().into()
        })?;
        Ok(Hash { chunks, thread })
    }
}

fn died() -> io::Error {
    io::Error::other("the hashing thread failed")
}

impl Pool {
    /// The next plain bytes, a whole chunk of them unless the archive ends.
    fn fill(&mut self, archive: &mut (impl Read + ?Sized), size: usize) -> io::Result<Bytes> {
        let free = self.0.iter().position(Bytes::is_unique).map(|free| self.0.swap_remove(free));
        let mut chunk = free.and_then(|chunk| chunk.try_into_mut().ok()).unwrap_or_default();
        // Zeroed once, and never again while the chunk goes round.
        chunk.resize(size, 0);
        let mut filled = 0;
        while filled < size {
            match archive.read(&mut chunk[filled..]) {
                Ok(0) => break,
                Ok(n) => filled += n,
                Err(e) if e.kind() == io::ErrorKind::Interrupted => {}
                Err(e) => return Err(e),
            }
        }
        let chunk = chunk.freeze();
        self.0.push(chunk.clone());
        Ok(chunk.slice(..filled))
    }
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
