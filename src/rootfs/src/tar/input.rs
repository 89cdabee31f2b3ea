//! From compressed bytes to plain ones and their digest, on threads of their own: inflating, hashing and writing take turns on no
//! processor.
//!
//! ```text
//!  file ──decompress──► Input (the reader's thread) ──► hash ──► diffID
//!            ▲            └──► image                      │
//!            └──────────── chunks to be filled again ◄────┘
//! ```

use std::io::{self, BufReader, Read};
use std::sync::mpsc::{Receiver, SyncSender, sync_channel};
use std::thread::{Builder, Scope, ScopedJoinHandle};

use flate2::read::MultiGzDecoder;
use sha2::{Digest, Sha256};

/// Bytes that travel together.
const CHUNK: usize = 256 << 10;
/// Chunks that wait at most between two threads.
const WAITING: usize = 8;

type Chunk = Vec<u8>;

/// The plain bytes of an archive.
pub struct Input<'s> {
    chunks: Receiver<io::Result<Chunk>>,
    to_hash: SyncSender<Chunk>,
    hash: ScopedJoinHandle<'s, [u8; 32]>,
    current: Chunk,
    at: usize,
}

impl<'s> Input<'s> {
    /// Starts the threads. They end when the archive or the input does.
    pub fn start<'e>(scope: &'s Scope<'s, 'e>, archive: impl Read + Send + 's) -> io::Result<Input<'s>> {
        let (to_reader, chunks) = sync_channel(WAITING);
        let (to_hash, wanted) = sync_channel::<Chunk>(WAITING);
        let (done, empty) = sync_channel(3 * WAITING);
        Builder::new().name("decompress".into()).spawn_scoped(scope, move || {
            if let Err(e) = decompress(archive, &empty, &to_reader) {
                let _ = to_reader.send(Err(e)); // nobody there: it has ended for another reason
            }
        })?;
        let hash = Builder::new().name("hash".into()).spawn_scoped(scope, move || {
            let mut hash = Sha256::new();
            for chunk in wanted {
                hash.update(&chunk);
                let _ = done.try_send(chunk); // there are enough, or everything is read
            }
            hash.finalize().into()
        })?;
        Ok(Input { chunks, to_hash, hash, current: Chunk::default(), at: 0 })
    }

    /// Reads what is left, at most `limit` bytes; returns the SHA-256 of all.
    pub fn finish(mut self, limit: u64) -> io::Result<[u8; 32]> {
        let left = io::copy(&mut (&mut self).take(limit.saturating_add(1)), &mut io::sink())?;
        if left > limit {
            return Err(io::ErrorKind::FileTooLarge.into());
        }
        self.hash_current()?;
        drop(self.to_hash);
        self.hash.join().map_err(|_| io::Error::other("the hashing thread failed"))
    }

    /// Hands on the chunk that has been read.
    fn hash_current(&mut self) -> io::Result<()> {
        self.at = 0;
        let chunk = std::mem::take(&mut self.current);
        self.to_hash.send(chunk).map_err(|_| io::Error::other("the hashing thread failed"))
    }
}

impl Read for Input<'_> {
    fn read(&mut self, buffer: &mut [u8]) -> io::Result<usize> {
        if buffer.is_empty() {
            return Ok(0);
        }
        if self.at == self.current.len() {
            self.hash_current()?;
            let Ok(chunk) = self.chunks.recv() else { return Ok(0) };
            self.current = chunk?;
        }
        let rest = &self.current[self.at..];
        let n = rest.len().min(buffer.len());
        buffer[..n].copy_from_slice(&rest[..n]);
        self.at += n;
        Ok(n)
    }
}

/// Sends the plain bytes in chunks; ends early when nobody wants them any more.
fn decompress(archive: impl Read, empty: &Receiver<Chunk>, out: &SyncSender<io::Result<Chunk>>) -> io::Result<()> {
    let mut plain = plain(archive)?;
    loop {
        let mut chunk = empty.try_recv().unwrap_or_default();
        chunk.clear();
        chunk.reserve_exact(CHUNK);
        if (&mut plain).take(CHUNK as u64).read_to_end(&mut chunk)? == 0 || out.send(Ok(chunk)).is_err() {
            return Ok(());
        }
    }
}

/// Decompresses what starts like gzip or zstd; anything else is taken as it is.
fn plain<'a>(mut archive: impl Read + 'a) -> io::Result<Box<dyn Read + 'a>> {
    let mut start = Vec::with_capacity(4);
    (&mut archive).take(4).read_to_end(&mut start)?;
    let magic = start.clone();
    let archive = io::Cursor::new(start).chain(archive);
    Ok(match magic.as_slice() {
        [0x1f, 0x8b, ..] => Box::new(MultiGzDecoder::new(BufReader::with_capacity(CHUNK, archive))),
        [0x28, 0xb5, 0x2f, 0xfd] => Box::new(zstd::Decoder::new(archive)?),
        _ => Box::new(archive),
    })
}
