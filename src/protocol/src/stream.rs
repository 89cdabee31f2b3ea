//! Bytes on the vsock connections that the guest dials: the preamble of every connection, and the frames of stdio.
//!
//! ```text
//!  Preamble, guest → host, 24 bytes, little endian
//!  ┌──────────────┬────────────────┬──────────┬───────────────┐
//!  │ magic 8      │ generation u32 │ kind u32 │ stream id u64 │
//!  └──────────────┴────────────────┴──────────┴───────────────┘
//!  Answer, host → guest, 8 bytes
//!  ┌────────────────┬────────────┐
//!  │ generation u32 │ status u32 │   0 accepted · 1 other generation · 2 unknown stream
//!  └────────────────┴────────────┘
//! ```
//!
//! The answer is what makes a connection real: libkrun completes a guest's connect even where nobody listens on the
//! host, so the guest waits for it with a deadline.
//!
//! After the answer an RPC connection speaks ttrpc (the guest is the server), and a stream connection carries frames:
//!
//! ```text
//!  ┌─────────┬──────────────┬─────────┬─────────────┐
//!  │ type u8 │ zero 3 bytes │ len u32 │ len bytes   │      len ≤ MAX_DATA
//!  └─────────┴──────────────┴─────────┴─────────────┘
//!   1 DATA    bytes of the stream
//!   2 EOF     len 0: the sender will send no more bytes; the other direction goes on
//!   3 CREDIT  len 4: u32, the receiver has room for that many more bytes
//! ```
//!
//! One connection carries one stream in one direction, so a stream that stalls stalls nothing else:
//!
//! ```text
//!  stdin             host ── DATA… EOF ──► guest        host ◄── CREDIT ── guest
//!  stdout, stderr    guest ── DATA… EOF ──► host        guest ◄── CREDIT ── host
//! ```
//!
//! A connection that is forwarded into the guest is two streams, one for each direction. Its end without EOF is a reset.
//!
//! The sender starts with [`WINDOW`] bytes of credit and never sends more than it has. That is needed because a host
//! end that stops reading blocks libkrun's event loop, and with it the whole VM: the shim always reads, and holds at
//! most one window per stream. End of file is a frame because libkrun turns a host's half-close into a reset.

use thiserror::Error;

use crate::GENERATION;

/// vsock port of the RPC connection.
pub const RPC_PORT: u32 = 1024;
/// vsock port of the stdio streams.
pub const STREAM_PORT: u32 = 1025;

/// First bytes of every connection.
pub const MAGIC: [u8; 8] = *b"nacelle\n";
/// Length of a [`Preamble`] on the wire.
pub const PREAMBLE_LEN: usize = 24;
/// Length of an [`Answer`] on the wire.
pub const ANSWER_LEN: usize = 8;
/// Length of a frame's header on the wire.
pub const HEADER_LEN: usize = 8;
/// Longest payload of a DATA frame, in bytes.
pub const MAX_DATA: usize = 64 * 1024;
/// Credit of a stream at its start, in bytes; also the most that a receiver ever has to hold.
pub const WINDOW: u32 = 256 * 1024;

/// Prefix of `stdin`, `stdout` and `stderr` in a request to the agent: `stream:` and the decimal stream id.
pub const URI_SCHEME: &str = "stream:";

/// Writes the name of a stream for a request to the agent.
pub fn stream_uri(id: u64) -> String {
    format!("{URI_SCHEME}{id}")
}

/// Reads the name of a stream; `None` where there is none, which means that the bytes are discarded.
///
/// # Errors
/// [`StreamError::Uri`] when the text is neither empty nor a stream's name.
pub fn parse_stream_uri(text: &str) -> Result<Option<u64>, StreamError> {
    if text.is_empty() {
        return Ok(None);
    }
    text.strip_prefix(URI_SCHEME)
        .and_then(|id| id.parse().ok())
        .map(Some)
        .ok_or_else(|| StreamError::Uri(text.chars().take(80).collect()))
}

/// What does not follow this module's layout.
#[derive(Debug, Error, PartialEq, Eq)]
pub enum StreamError {
    /// The connection does not start with [`MAGIC`].
    #[error("read preamble: wrong magic")]
    Magic,
    /// The connection is of an unknown kind.
    #[error("read preamble: unknown kind {0}")]
    Kind(u32),
    /// The other side speaks another generation of the protocol.
    #[error("read preamble: generation {0}, expected {GENERATION}")]
    Generation(u32),
    /// The host refused the connection.
    #[error("read answer: status {0}")]
    Refused(u32),
    /// A frame is of an unknown type or has reserved bits set.
    #[error("read frame: unknown type {0:#010x}")]
    FrameType(u32),
    /// A frame's length does not fit its type.
    #[error("read frame: length {len} of a {kind:?} frame")]
    FrameLength {
        /// The frame's type.
        kind: FrameKind,
        /// The length it claims.
        len: u32,
    },
    /// A stream's name is malformed.
    #[error("read stream name {0:?}: expected `stream:` and a number")]
    Uri(String),
    /// The sender sent more than it had credit for.
    #[error("receive data: {excess} bytes over the credit")]
    Overrun {
        /// Bytes too many.
        excess: u64,
    },
}

/// What a connection is for.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum Kind {
    /// ttrpc, served by the guest.
    Rpc,
    /// One stdio stream.
    Stream,
}

/// First bytes of a connection, sent by the guest.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub struct Preamble {
    /// Generation of the guest's protocol.
    pub generation: u32,
    /// What the connection is for.
    pub kind: Kind,
    /// The stream; 0 for RPC.
    pub stream: u64,
}

impl Preamble {
    /// A preamble of this build's generation.
    pub fn new(kind: Kind, stream: u64) -> Self {
        Self { generation: GENERATION, kind, stream }
    }

    /// The bytes on the wire.
    pub fn encode(&self) -> [u8; PREAMBLE_LEN] {
        let mut out = [0; PREAMBLE_LEN];
        out[..8].copy_from_slice(&MAGIC);
        out[8..12].copy_from_slice(&self.generation.to_le_bytes());
        let kind: u32 = match self.kind {
            Kind::Rpc => 1,
            Kind::Stream => 2,
        };
        out[12..16].copy_from_slice(&kind.to_le_bytes());
        out[16..24].copy_from_slice(&self.stream.to_le_bytes());
        out
    }

    /// Reads the bytes on the wire. The generation is not judged here: see [`Preamble::status`].
    ///
    /// # Errors
    /// [`StreamError::Magic`] and [`StreamError::Kind`].
    pub fn decode(bytes: &[u8; PREAMBLE_LEN]) -> Result<Self, StreamError> {
        let (magic, rest) = bytes.split_at(8);
        if magic != MAGIC {
            return Err(StreamError::Magic);
        }
        let kind = match le_u32(rest, 4) {
            1 => Kind::Rpc,
            2 => Kind::Stream,
            other => return Err(StreamError::Kind(other)),
        };
        let low = u64::from(le_u32(rest, 8));
        let high = u64::from(le_u32(rest, 12));
        Ok(Self { generation: le_u32(rest, 0), kind, stream: high << 32 | low })
    }

    /// The status that a host of this build answers with, stream ids aside.
    pub fn status(&self) -> Status {
        if self.generation == GENERATION { Status::Accepted } else { Status::OtherGeneration }
    }
}

/// How the host answers a preamble.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum Status {
    /// Go on.
    Accepted,
    /// The generations differ.
    OtherGeneration,
    /// No stream of that id is expected.
    UnknownStream,
}

/// The host's answer to a preamble.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub struct Answer {
    /// Generation of the host's protocol.
    pub generation: u32,
    /// 0 accepted, 1 other generation, 2 unknown stream.
    pub status: u32,
}

impl Answer {
    /// An answer of this build's generation.
    pub fn new(status: Status) -> Self {
        let status = match status {
            Status::Accepted => 0,
            Status::OtherGeneration => 1,
            Status::UnknownStream => 2,
        };
        Self { generation: GENERATION, status }
    }

    /// The bytes on the wire.
    pub fn encode(&self) -> [u8; ANSWER_LEN] {
        let mut out = [0; ANSWER_LEN];
        out[..4].copy_from_slice(&self.generation.to_le_bytes());
        out[4..].copy_from_slice(&self.status.to_le_bytes());
        out
    }

    /// Reads and judges the bytes on the wire.
    ///
    /// # Errors
    /// [`StreamError::Generation`] and [`StreamError::Refused`].
    pub fn check(bytes: &[u8; ANSWER_LEN]) -> Result<(), StreamError> {
        let (generation, status) = (le_u32(bytes, 0), le_u32(bytes, 4));
        if generation != GENERATION {
            return Err(StreamError::Generation(generation));
        }
        if status == 0 { Ok(()) } else { Err(StreamError::Refused(status)) }
    }
}

/// Type of a frame.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum FrameKind {
    /// Bytes of the stream.
    Data,
    /// No more bytes will come.
    Eof,
    /// Room for more bytes.
    Credit,
}

/// Header of a frame.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub struct Header {
    /// The frame's type.
    pub kind: FrameKind,
    /// Bytes that follow: 0 for EOF, 4 for CREDIT, 1 to [`MAX_DATA`] for DATA.
    pub len: u32,
}

impl Header {
    /// A header for `len` bytes of data.
    pub fn data(len: u32) -> Self {
        Self { kind: FrameKind::Data, len }
    }

    /// The header of an EOF frame.
    pub const EOF: Self = Self { kind: FrameKind::Eof, len: 0 };

    /// The bytes on the wire.
    pub fn encode(&self) -> [u8; HEADER_LEN] {
        let mut out = [0; HEADER_LEN];
        out[0] = match self.kind {
            FrameKind::Data => 1,
            FrameKind::Eof => 2,
            FrameKind::Credit => 3,
        };
        out[4..].copy_from_slice(&self.len.to_le_bytes());
        out
    }

    /// Reads the bytes on the wire; what it returns has a length that fits its type.
    ///
    /// # Errors
    /// [`StreamError::FrameType`] and [`StreamError::FrameLength`].
    pub fn decode(bytes: &[u8; HEADER_LEN]) -> Result<Self, StreamError> {
        let len = le_u32(bytes, 4);
        let kind = match le_u32(bytes, 0) {
            1 => FrameKind::Data,
            2 => FrameKind::Eof,
            3 => FrameKind::Credit,
            other => return Err(StreamError::FrameType(other)),
        };
        let fits = match kind {
            FrameKind::Data => (1..=MAX_DATA as u32).contains(&len),
            FrameKind::Eof => len == 0,
            FrameKind::Credit => len == 4,
        };
        if fits { Ok(Self { kind, len }) } else { Err(StreamError::FrameLength { kind, len }) }
    }
}

/// A whole CREDIT frame.
pub fn credit_frame(bytes: u32) -> [u8; HEADER_LEN + 4] {
    let mut out = [0; HEADER_LEN + 4];
    out[..HEADER_LEN].copy_from_slice(&Header { kind: FrameKind::Credit, len: 4 }.encode());
    out[HEADER_LEN..].copy_from_slice(&bytes.to_le_bytes());
    out
}

fn le_u32(bytes: &[u8], at: usize) -> u32 {
    // The callers' arrays have fixed lengths, so the four bytes are there.
    u32::from_le_bytes([bytes[at], bytes[at + 1], bytes[at + 2], bytes[at + 3]])
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn preamble_round_trip() {
        let p = Preamble::new(Kind::Stream, 0x0123_4567_89ab_cdef);
        assert_eq!(Preamble::decode(&p.encode()), Ok(p));
        let mut bad = p.encode();
        bad[0] = b'N';
        assert_eq!(Preamble::decode(&bad), Err(StreamError::Magic));
        let mut odd = p.encode();
        odd[12] = 9;
        assert_eq!(Preamble::decode(&odd), Err(StreamError::Kind(9)));
    }

    #[test]
    fn answers_are_judged() {
        assert_eq!(Answer::check(&Answer::new(Status::Accepted).encode()), Ok(()));
        assert_eq!(Answer::check(&Answer::new(Status::UnknownStream).encode()), Err(StreamError::Refused(2)));
        let other = Answer { generation: GENERATION + 1, status: 0 };
        assert_eq!(Answer::check(&other.encode()), Err(StreamError::Generation(GENERATION + 1)));
    }

    #[test]
    fn headers_fit_their_types() {
        for good in [Header::data(1), Header::data(MAX_DATA as u32), Header::EOF] {
            assert_eq!(Header::decode(&good.encode()), Ok(good));
        }
        assert!(Header::decode(&Header::data(0).encode()).is_err());
        assert!(Header::decode(&Header::data(MAX_DATA as u32 + 1).encode()).is_err());
        assert!(Header::decode(&[1, 0, 1, 0, 1, 0, 0, 0]).is_err(), "reserved bytes are zero");
        let credit = credit_frame(7);
        let (head, body) = credit.split_at(HEADER_LEN);
        assert_eq!(Header::decode(head.try_into().expect("8 bytes")).map(|h| h.kind), Ok(FrameKind::Credit));
        assert_eq!(body, 7u32.to_le_bytes());
    }

    #[test]
    fn stream_names() {
        assert_eq!(parse_stream_uri(""), Ok(None));
        assert_eq!(parse_stream_uri(&stream_uri(12)), Ok(Some(12)));
        assert!(parse_stream_uri("/run/fifo").is_err());
        assert!(parse_stream_uri("stream:-1").is_err());
    }
}
