//! The one ttrpc connection to the guest, as the shim is willing to hear it: a socket that looks at every frame's header.
//!
//! ```text
//!  frame    ┌────────────┬───────────────┬─────────┬──────────┬───────────┐   ttrpc, PROTOCOL.md: big endian
//!           │ length u32 │ stream id u32 │ type u8 │ flags u8 │ length …  │
//!           └────────────┴───────────────┴─────────┴──────────┴───────────┘
//!  out      type 1, a request:  its stream id is open from here on
//!  in       type 2, an answer:  its stream id must be open, and closes; length ≤ MAX_ANSWER
//! ```
//!
//! ttrpc itself takes 4 MiB a frame, decodes it into some fifty times as much memory, and overlooks answers that nobody
//! asked for. Here all of that is a breach, which ends the connection and the pod. An answer that comes late is none: its
//! id stays open, and `MAX_OPEN` of them are.

use std::collections::HashSet;
use std::io;
use std::pin::Pin;
use std::sync::Arc;
use std::task::{Context, Poll, ready};

use tokio::io::{AsyncRead, AsyncWrite, ReadBuf};

use crate::conduct::Conduct;

/// Longest answer, in bytes; the agent's are bounded by `nacelle_protocol::agent::MAX_PIDS` and its batches of events.
const MAX_ANSWER: u32 = 256 << 10;
/// Requests that may wait for an answer, those included that nobody waits for any more.
const MAX_OPEN: usize = 4096;

const HEADER: usize = 10;
const REQUEST: u8 = 1;
const ANSWER: u8 = 2;

/// What a frame's header says.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
struct Head {
    length: u32,
    stream: u32,
    kind: u8,
}

/// Finds the headers in a stream of bytes that comes in pieces.
#[derive(Debug, Default)]
struct Frames {
    header: [u8; HEADER],
    have: usize,
    /// Bytes of the current frame that are still to come behind its header.
    rest: u32,
}

impl Frames {
    /// Takes a piece, and shows every header that is complete by then, as long as `look` agrees.
    fn take<E>(&mut self, mut piece: &[u8], mut look: impl FnMut(Head) -> Result<(), E>) -> Result<(), E> {
        while !piece.is_empty() {
            let skip = piece.len().min(self.rest as usize);
            piece = &piece[skip..];
            self.rest -= skip as u32;
            let n = piece.len().min(HEADER - self.have);
            self.header[self.have..self.have + n].copy_from_slice(&piece[..n]);
            self.have += n;
            piece = &piece[n..];
            if self.have == HEADER {
                self.have = 0;
                let [a, b, c, d, e, f, g, h, kind, _] = self.header;
                let head =
                    Head { length: u32::from_be_bytes([a, b, c, d]), stream: u32::from_be_bytes([e, f, g, h]), kind };
                self.rest = head.length;
                look(head)?;
            }
        }
        Ok(())
    }
}

/// A socket to a guest.
#[derive(Debug)]
pub struct Wire<S> {
    socket: S,
    conduct: Arc<Conduct>,
    inward: Frames,
    outward: Frames,
    open: HashSet<u32>,
}

impl<S> Wire<S> {
    /// Watches `socket`, at the beginning of a frame in both directions.
    pub fn new(socket: S, conduct: Arc<Conduct>) -> Self {
        Self { socket, conduct, inward: Frames::default(), outward: Frames::default(), open: HashSet::new() }
    }

    fn heard(&mut self, bytes: &[u8]) -> Result<(), String> {
        let open = &mut self.open;
        self.inward.take(bytes, |head| match head {
            Head { kind, .. } if kind != ANSWER => Err(format!("answer call: a frame of type {kind} is no answer")),
            Head { length, .. } if length > MAX_ANSWER => {
                Err(format!("answer call: an answer of {length} bytes, and {MAX_ANSWER} are the most"))
            }
            Head { stream, .. } if !open.remove(&stream) => Err(format!("answer call {stream}: nobody asked")),
            _ => Ok(()),
        })
    }

    fn said(&mut self, bytes: &[u8]) -> Result<(), String> {
        let open = &mut self.open;
        self.outward.take(bytes, |head| {
            if head.kind == REQUEST {
                open.insert(head.stream);
            }
            if open.len() <= MAX_OPEN {
                Ok(())
            } else {
                Err(format!("answer calls: {MAX_OPEN} of them are unanswered"))
            }
        })
    }

    fn judge(&self, result: Result<(), String>) -> io::Result<()> {
        result.map_err(|what| {
            self.conduct.breach(what.clone());
            io::Error::new(io::ErrorKind::InvalidData, what)
        })
    }
}

impl<S: AsyncRead + Unpin> AsyncRead for Wire<S> {
    fn poll_read(self: Pin<&mut Self>, cx: &mut Context<'_>, buf: &mut ReadBuf<'_>) -> Poll<io::Result<()>> {
        let wire = self.get_mut();
        let before = buf.filled().len();
        ready!(Pin::new(&mut wire.socket).poll_read(cx, buf))?;
        let result = wire.heard(&buf.filled()[before..]);
        if result.is_err() {
            // A read that fails has read nothing.
            buf.set_filled(before);
        }
        Poll::Ready(wire.judge(result))
    }
}

impl<S: AsyncWrite + Unpin> AsyncWrite for Wire<S> {
    fn poll_write(self: Pin<&mut Self>, cx: &mut Context<'_>, bytes: &[u8]) -> Poll<io::Result<usize>> {
        let wire = self.get_mut();
        let n = ready!(Pin::new(&mut wire.socket).poll_write(cx, bytes))?;
        let result = wire.said(&bytes[..n]);
        Poll::Ready(wire.judge(result).map(|()| n))
    }

    fn poll_flush(self: Pin<&mut Self>, cx: &mut Context<'_>) -> Poll<io::Result<()>> {
        Pin::new(&mut self.get_mut().socket).poll_flush(cx)
    }

    fn poll_shutdown(self: Pin<&mut Self>, cx: &mut Context<'_>) -> Poll<io::Result<()>> {
        Pin::new(&mut self.get_mut().socket).poll_shutdown(cx)
    }
}

#[cfg(test)]
mod tests {
    use tokio::io::{AsyncReadExt, AsyncWriteExt};

    use super::*;

    fn frame(stream: u32, kind: u8, length: u32) -> Vec<u8> {
        let mut bytes = [length.to_be_bytes(), stream.to_be_bytes()].concat();
        bytes.extend([kind, 0]);
        bytes.extend(std::iter::repeat_n(7, length as usize));
        bytes
    }

    #[test]
    fn headers_are_found_whatever_the_pieces() {
        let bytes = [frame(1, 2, 0), frame(3, 2, 5), frame(5, 1, 300)].concat();
        for size in [1, 3, 7, 10, 11, 1000] {
            let (mut frames, mut seen) = (Frames::default(), Vec::new());
            for piece in bytes.chunks(size) {
                let look = |head: Head| {
                    seen.push((head.stream, head.length));
                    Ok::<_, ()>(())
                };
                frames.take(piece, look).expect("all are welcome");
            }
            assert_eq!(seen, [(1, 0), (3, 5), (5, 300)], "pieces of {size}");
        }
    }

    /// What the guest says to a request with the id 1, and what is held against it.
    async fn told(bytes: Vec<u8>) -> Option<String> {
        let (ours, mut theirs) = tokio::io::duplex(1 << 20);
        let conduct = Arc::new(Conduct::default());
        let mut wire = Wire::new(ours, conduct.clone());
        wire.write_all(&frame(1, REQUEST, 4)).await.expect("ask");
        theirs.write_all(&bytes).await.expect("answer");
        drop(theirs);
        let result = wire.read_to_end(&mut Vec::new()).await;
        assert_eq!(result.is_err(), conduct.verdict().is_some());
        conduct.verdict()
    }

    #[tokio::test]
    async fn only_what_was_asked_for_is_answered_and_once() {
        assert_eq!(told(frame(1, ANSWER, MAX_ANSWER)).await, None);
        let says = async |bytes: Vec<u8>| told(bytes).await.unwrap_or_default();
        assert!(says(frame(3, ANSWER, 0)).await.contains("nobody asked"));
        assert!(says([frame(1, ANSWER, 0), frame(1, ANSWER, 0)].concat()).await.contains("nobody asked"));
        assert!(says(frame(1, 3, 0)).await.contains("type 3"), "data of a stream");
        assert!(says(frame(1, REQUEST, 0)).await.contains("type 1"));
        assert!(says(frame(1, ANSWER, MAX_ANSWER + 1)).await.contains("262145 bytes"));
        assert!(says(vec![0xff; 10]).await.contains("type 255"));
    }

    #[tokio::test]
    async fn a_guest_that_answers_nothing_is_found_out() {
        let conduct = Arc::new(Conduct::default());
        let mut wire = Wire::new(tokio::io::sink(), conduct.clone());
        for n in 0..MAX_OPEN as u32 {
            wire.write_all(&frame(2 * n + 1, REQUEST, 1)).await.expect("still patient");
        }
        wire.write_all(&frame(u32::MAX, REQUEST, 1)).await.expect_err("enough");
        assert!(conduct.verdict().expect("a verdict").contains("unanswered"));
    }
}
