//! The guest's side of stdio: connections that the guest dials, and the frames on them.
//!
//! ```text
//!  request ──Hub::expect──► id ──in the request──► guest ──dials, Preamble(id)──► Hub ──► the task that holds the Ticket
//!
//!  stdout, stderr   socket ──► [ at most WINDOW bytes ] ──► sink         ◄── CREDIT as the sink takes them
//!  stdin            source ──► socket, as far as CREDIT goes
//! ```
//!
//! A forwarded connection is two streams, one of each kind.
//!
//! Invariants: the socket is read always, whatever the sink does, because a host end that is not read freezes the VM; at
//! most one window is held per stream, and a guest that sends more than it may is cut off; an id is random, expected
//! before the guest hears of it, and good for one connection. What breaks the protocol is held against the guest:
//! see [`crate::conduct`].

use std::collections::{HashMap, VecDeque};
use std::io;
use std::sync::{Arc, Mutex, MutexGuard, PoisonError};
use std::time::Duration;

use nacelle_protocol::stream::{
    Answer, FrameKind, HEADER_LEN, Header, Kind, MAX_DATA, PREAMBLE_LEN, Preamble, Status, StreamError, WINDOW,
    credit_frame,
};
use thiserror::Error;
use tokio::io::{AsyncRead, AsyncReadExt, AsyncWrite, AsyncWriteExt};
use tokio::net::tcp::OwnedReadHalf;
use tokio::net::unix::pipe;
use tokio::net::{UnixListener, UnixStream};
use tokio::sync::{Notify, Semaphore, oneshot, watch};
use tokio::time::timeout;

use crate::conduct::Conduct;

/// How long a connection may take to say what it is.
pub const PREAMBLE_DEADLINE: Duration = Duration::from_secs(10);
/// Connections that may be undecided at once.
const UNDECIDED: usize = 64;
/// Most bytes that one read or write moves.
const CHUNK: usize = MAX_DATA;

/// Why a stream was cut off.
#[derive(Debug, Error)]
pub enum PumpError {
    /// The connection broke.
    #[error("use stream")]
    Io(#[from] io::Error),
    /// The guest does not follow the protocol.
    #[error("use stream")]
    Protocol(#[from] StreamError),
    /// The guest sent more than it had credit for.
    #[error("use stream: the guest sent {0} bytes more than it may")]
    Overrun(u32),
    /// A frame that this direction has no use for.
    #[error("use stream: unexpected {0:?} frame")]
    Unexpected(FrameKind),
    /// The guest gave credit for bytes that it cannot have taken.
    #[error("use stream: the guest gave credit for {0} bytes that it was not sent")]
    Forged(u32),
}

impl PumpError {
    /// What no honest guest does; a connection that breaks may happen to anybody.
    pub fn is_breach(&self) -> bool {
        !matches!(self, Self::Io(_))
    }
}

fn lock<T>(mutex: &Mutex<T>) -> MutexGuard<'_, T> {
    // No code panics while it holds one of this module's locks, and what they guard is valid after every statement.
    mutex.lock().unwrap_or_else(PoisonError::into_inner)
}

/// Knows which streams the guest may dial.
#[derive(Debug, Default)]
pub struct Hub {
    expected: Mutex<HashMap<u64, oneshot::Sender<UnixStream>>>,
    conduct: Arc<Conduct>,
}

/// The right to one connection.
#[derive(Debug)]
pub struct Ticket {
    id: u64,
    hub: Arc<Hub>,
    socket: oneshot::Receiver<UnixStream>,
}

impl Ticket {
    /// The id that the guest has to name.
    pub fn id(&self) -> u64 {
        self.id
    }

    /// Where misbehaviour on the connection is held against the guest.
    pub fn conduct(&self) -> Arc<Conduct> {
        self.hub.conduct.clone()
    }

    /// The connection that the guest says it has made; `None` when it has not, or the hub has been closed.
    pub async fn dialled(&mut self) -> Option<UnixStream> {
        timeout(PREAMBLE_DEADLINE, self.socket()).await.ok().flatten()
    }

    /// The connection; `None` when the hub has been closed.
    pub async fn socket(&mut self) -> Option<UnixStream> {
        (&mut self.socket).await.ok()
    }
}

impl Drop for Ticket {
    fn drop(&mut self) {
        lock(&self.hub.expected).remove(&self.id);
    }
}

impl Hub {
    /// A hub that holds misbehaviour against `conduct`.
    pub fn new(conduct: Arc<Conduct>) -> Self {
        Self { conduct, ..Self::default() }
    }

    /// Expects one connection.
    ///
    /// # Errors
    /// An I/O error when the kernel gives no random bytes.
    pub fn expect(self: &Arc<Self>) -> io::Result<Ticket> {
        let mut bytes = [0; 8];
        // Random, so that a container cannot guess another's stream and dial it first.
        let got = rustix::rand::getrandom(&mut bytes, rustix::rand::GetRandomFlags::empty())?;
        if got != bytes.len() {
            return Err(io::ErrorKind::UnexpectedEof.into());
        }
        let id = u64::from_le_bytes(bytes);
        let (sender, socket) = oneshot::channel();
        lock(&self.expected).insert(id, sender);
        Ok(Ticket { id, hub: self.clone(), socket })
    }

    /// Gives up all streams that the guest has not dialled yet: it is gone.
    pub fn close(&self) {
        lock(&self.expected).clear();
    }

    /// Accepts connections for ever.
    pub async fn serve(self: Arc<Self>, listener: UnixListener) {
        let permits = Arc::new(Semaphore::new(UNDECIDED));
        loop {
            let Ok(permit) = permits.clone().acquire_owned().await else { return };
            let socket = match listener.accept().await {
                Ok((socket, _)) => socket,
                Err(e) => {
                    tracing::warn!("accept stream: {e}");
                    // Out of descriptors, most likely: let some be closed.
                    tokio::time::sleep(Duration::from_millis(100)).await;
                    continue;
                }
            };
            let hub = self.clone();
            tokio::spawn(async move {
                // Silence, nonsense or a stream that is over: none is proof, and a thousand are.
                if !matches!(timeout(PREAMBLE_DEADLINE, hub.admit(socket)).await, Ok(Ok(()))) {
                    hub.conduct.strike("a stream that the guest dialled was refused");
                }
                drop(permit);
            });
        }
    }

    async fn admit(&self, mut socket: UnixStream) -> Result<(), PumpError> {
        let mut bytes = [0; PREAMBLE_LEN];
        socket.read_exact(&mut bytes).await?;
        let preamble = Preamble::decode(&bytes)?;
        let mut status = preamble.status();
        let sender = lock(&self.expected).remove(&preamble.stream);
        if status == Status::Accepted && (preamble.kind != Kind::Stream || sender.is_none()) {
            status = Status::UnknownStream;
        }
        socket.write_all(&Answer::new(status).encode()).await?;
        match sender {
            Some(sender) if status == Status::Accepted => {
                // The one who expected it may have gone away meanwhile; then the socket closes.
                let _ = sender.send(socket);
                Ok(())
            }
            _ => Err(StreamError::Refused(2).into()),
        }
    }
}

/// Bytes between the socket and the sink.
#[derive(Debug)]
struct Window {
    chunks: VecDeque<Vec<u8>>,
    /// Bytes that the guest may still send.
    room: u32,
    ended: bool,
}

impl Window {
    /// Adds what came. Small pieces share a chunk, so that what is held is never much more than what came.
    fn push(&mut self, piece: Vec<u8>) {
        match self.chunks.back_mut() {
            Some(last) if last.len() + piece.len() <= CHUNK => last.extend(piece),
            _ => self.chunks.push_back(piece),
        }
    }
}

/// Copies the guest's output to `sink` until the guest says that it has ended, or goes away.
///
/// A sink that fails is replaced by nothing: the process must not notice. Returns whether the guest has said that the
/// stream has ended.
///
/// # Errors
/// [`PumpError`]. What came before a connection that broke has been delivered; what came before a breach may not have been.
pub async fn pump_output(socket: UnixStream, sink: impl AsyncWrite + Unpin) -> Result<bool, PumpError> {
    let (reader, writer) = socket.into_split();
    let window = Mutex::new(Window { chunks: VecDeque::new(), room: WINDOW, ended: false });
    let filled = Notify::new();
    let receive = async {
        let mut reader = reader;
        let result = receive(&mut reader, &window, &filled).await;
        // From here on nobody reads, so nobody may send: a socket that fills up would freeze the VM.
        let _ = rustix::net::shutdown(reader.as_ref(), rustix::net::Shutdown::Both);
        lock(&window).ended = true;
        filled.notify_one();
        result
    };
    let deliver = deliver(writer, sink, &window, &filled);
    tokio::pin!(deliver);
    let result = tokio::select! {
        result = receive => result,
        // It goes on for as long as something may be received.
        () = &mut deliver => return Ok(false),
    };
    // The pod ends for a breach: that must not wait for a sink that nobody reads.
    if !matches!(&result, Err(e) if e.is_breach()) {
        deliver.await;
    }
    result
}

async fn receive(
    mut socket: impl AsyncRead + Unpin,
    window: &Mutex<Window>,
    filled: &Notify,
) -> Result<bool, PumpError> {
    loop {
        let Some(header) = read_header(&mut socket).await? else { return Ok(false) };
        match header.kind {
            FrameKind::Eof => return Ok(true),
            FrameKind::Credit => return Err(PumpError::Unexpected(FrameKind::Credit)),
            FrameKind::Data => {}
        }
        {
            let mut window = lock(window);
            window.room =
                window.room.checked_sub(header.len).ok_or_else(|| PumpError::Overrun(header.len - window.room))?;
        }
        let mut left = header.len as usize;
        while left > 0 {
            let mut piece = Vec::with_capacity(left.min(CHUNK));
            let n = (&mut socket).take(left as u64).read_buf(&mut piece).await?;
            if n == 0 {
                return Err(io::Error::from(io::ErrorKind::UnexpectedEof).into());
            }
            lock(window).push(piece);
            filled.notify_one();
            left -= n;
        }
    }
}

/// `None` at the end of the connection.
async fn read_header(socket: &mut (impl AsyncRead + Unpin)) -> Result<Option<Header>, PumpError> {
    let mut bytes = [0; HEADER_LEN];
    let n = socket.read(&mut bytes).await?;
    if n == 0 {
        return Ok(None);
    }
    socket.read_exact(&mut bytes[n..]).await?;
    Ok(Some(Header::decode(&bytes)?))
}

async fn deliver(
    mut socket: impl AsyncWrite + Unpin,
    mut sink: impl AsyncWrite + Unpin,
    window: &Mutex<Window>,
    filled: &Notify,
) {
    let mut failed = false;
    let mut owed = 0;
    loop {
        let (chunk, ended) = {
            let mut window = lock(window);
            (window.chunks.pop_front(), window.ended)
        };
        let Some(chunk) = chunk else {
            if ended {
                break;
            }
            filled.notified().await;
            continue;
        };
        if !failed && let Err(e) = sink.write_all(&chunk).await {
            tracing::warn!("write output: {e}; the rest is discarded");
            failed = true;
        }
        owed += chunk.len() as u32;
        if owed >= WINDOW / 4 {
            lock(window).room += owed;
            // A guest that is gone needs no credit.
            let _ = socket.write_all(&credit_frame(owed)).await;
            owed = 0;
        }
    }
    if !failed && let Err(e) = sink.flush().await {
        tracing::warn!("write output: {e}");
    }
}

/// Copies `source` to the guest's stdin, until `closing` turns true and the source is empty, or the guest goes away.
///
/// # Errors
/// [`PumpError`].
pub async fn pump_input(
    socket: UnixStream,
    source: pipe::Receiver,
    closing: watch::Receiver<bool>,
) -> Result<(), PumpError> {
    let (reader, writer) = socket.into_split();
    let (credit, wallet) = watch::channel(WINDOW);
    let grants = grants(reader, &credit);
    tokio::pin!(grants);
    let _open = tokio::select! {
        result = &mut grants => return result,
        result = send(writer, source, closing, wallet, &credit) => result?,
    };
    // Closed by the guest, so that nothing that is still under way gets lost in a reset.
    grants.await
}

/// Copies what a client sends to the guest, until the client has ended and the guest has taken it all.
///
/// # Errors
/// [`PumpError`], also when the guest goes away before.
pub async fn pump_source(socket: UnixStream, source: &OwnedReadHalf) -> Result<(), PumpError> {
    let (reader, writer) = socket.into_split();
    let (credit, wallet) = watch::channel(WINDOW);
    let grants = grants(reader, &credit);
    tokio::pin!(grants);
    let _open = tokio::select! {
        result = &mut grants => {
            result?;
            return Err(io::Error::from(io::ErrorKind::ConnectionReset).into());
        }
        result = send_source(writer, source, wallet, &credit) => result?,
    };
    grants.await
}

async fn send_source(
    mut socket: tokio::net::unix::OwnedWriteHalf,
    source: &OwnedReadHalf,
    mut wallet: watch::Receiver<u32>,
    credit: &watch::Sender<u32>,
) -> Result<tokio::net::unix::OwnedWriteHalf, PumpError> {
    loop {
        let Some(most) = affordable(&mut wallet).await else { return Ok(socket) };
        // An idle connection holds no buffer.
        source.readable().await?;
        let mut frame = vec![0; HEADER_LEN + most];
        let n = match source.try_read(&mut frame[HEADER_LEN..]) {
            Err(e) if e.kind() == io::ErrorKind::WouldBlock => continue,
            other => other?,
        };
        if !send_frame(&mut socket, frame, n, credit).await? {
            return Ok(socket);
        }
    }
}

/// Sends the first `n` bytes behind the room for a header, and pays for them; none are the end. Whether it goes on.
async fn send_frame(
    socket: &mut (impl AsyncWrite + Unpin),
    mut frame: Vec<u8>,
    n: usize,
    credit: &watch::Sender<u32>,
) -> io::Result<bool> {
    if n == 0 {
        socket.write_all(&Header::EOF.encode()).await?;
        return Ok(false);
    }
    frame.truncate(HEADER_LEN + n);
    frame[..HEADER_LEN].copy_from_slice(&Header::data(n as u32).encode());
    credit.send_modify(|have| *have -= n as u32);
    socket.write_all(&frame).await?;
    Ok(true)
}

/// Waits until there is credit; how many bytes one frame may carry. `None` when there will be none.
async fn affordable(wallet: &mut watch::Receiver<u32>) -> Option<usize> {
    // The sender is on the stack of the caller's caller.
    wallet.wait_for(|have| *have > 0).await.ok().map(|have| (*have as usize).min(CHUNK))
}

async fn grants(mut socket: impl AsyncRead + Unpin, credit: &watch::Sender<u32>) -> Result<(), PumpError> {
    while let Some(header) = read_header(&mut socket).await? {
        if header.kind != FrameKind::Credit {
            return Err(PumpError::Unexpected(header.kind));
        }
        let granted = socket.read_u32_le().await?;
        // Credit is given back, so there is never more of it than there was at the start.
        let sum = credit.borrow().checked_add(granted).filter(|sum| granted > 0 && *sum <= WINDOW);
        let sum = sum.ok_or(PumpError::Forged(granted))?;
        credit.send_replace(sum);
    }
    Ok(())
}

/// Returns the half of the socket, which must stay open until the guest has read it all.
async fn send(
    mut socket: tokio::net::unix::OwnedWriteHalf,
    source: pipe::Receiver,
    mut closing: watch::Receiver<bool>,
    mut wallet: watch::Receiver<u32>,
    credit: &watch::Sender<u32>,
) -> Result<tokio::net::unix::OwnedWriteHalf, PumpError> {
    loop {
        let Some(most) = affordable(&mut wallet).await else { return Ok(socket) };
        tokio::select! {
            ready = source.readable() => ready?,
            // Also when the shim lets go of the stream altogether.
            _ = closing.wait_for(|closing| *closing) => {}
        }
        let closed = *closing.borrow() || closing.has_changed().is_err();
        let mut frame = vec![0; HEADER_LEN + most];
        let read = if closed {
            // Past the runtime's idea of readiness: what was written before the close must not be missed.
            rustix::io::read(&source, &mut frame[HEADER_LEN..]).map_err(io::Error::from)
        } else {
            source.try_read(&mut frame[HEADER_LEN..])
        };
        let n = match read {
            Ok(n) => n,
            Err(e) if e.kind() == io::ErrorKind::WouldBlock && closed => 0,
            Err(e) if e.kind() == io::ErrorKind::WouldBlock => continue,
            Err(e) => return Err(e.into()),
        };
        if !send_frame(&mut socket, frame, n, credit).await? {
            return Ok(socket);
        }
    }
}
