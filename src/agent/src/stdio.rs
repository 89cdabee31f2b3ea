//! A process's stdin, stdout and stderr ⇄ frames on connections to the host.
//!
//! ```text
//!             pipe or terminal                    connection (see nacelle_protocol::stream)
//!  process ──────────────────► pump_out ── DATA … EOF ──► host      reads the pipe only while it has credit
//!  process ◄────────────────── pump_in ◄── DATA … EOF ─── host      gives credit for what the process has taken
//! ```
//!
//! An output pump lives until the last writer of its pipe is gone and everything has been sent, or until the host
//! closes the connection; so the last bytes of a process that ends at once are never lost, and a process left in the
//! background holds nothing but its own pipe. An input pump lives at most as long as its [`Io`].

use std::borrow::Borrow;
use std::io;
use std::os::fd::OwnedFd;
use std::sync::{Arc, Mutex};
use std::time::Duration;

use futures::FutureExt as _;
use nacelle_protocol::stream::{HEADER_LEN, Header, MAX_DATA, StreamError, WINDOW, credit_frame, parse_stream_uri};
use thiserror::Error;
use tokio::io::{AsyncRead, AsyncWrite, AsyncWriteExt, Interest};
use tokio::sync::Notify;
use tokio::task::AbortHandle;

use crate::dial::{self, Connection, Dial, DialError};
use crate::fd::{self, Fd};
use crate::frame::{Frame, Frames};

/// How long the host may take to close a stream whose end it has been sent.
const LINGER: Duration = Duration::from_secs(30);

/// Credit that is given back at once; less waits for more.
pub const CREDIT_STEP: u32 = WINDOW / 4;

/// Why a process's stdio could not be set up.
#[derive(Debug, Error)]
pub enum StdioError {
    /// A stream's name is malformed.
    #[error("read names of streams")]
    Name(#[source] StreamError),
    /// The host does not take the stream.
    #[error("open stream {id}")]
    Open {
        /// The stream.
        id: u64,
        /// Why not.
        #[source]
        source: DialError,
    },
    /// No pipe, or it cannot be given to the process's user.
    #[error("make pipe")]
    Pipe(#[source] io::Error),
    /// The device that stands for a stream without a name.
    #[error("open /dev/null")]
    Null(#[source] io::Error),
}

/// Names of a process's streams, as the host gave them.
#[derive(Clone, Debug, Default, PartialEq, Eq)]
pub struct Names {
    /// `stream:<id>` or empty.
    pub stdin: String,
    /// `stream:<id>` or empty.
    pub stdout: String,
    /// `stream:<id>` or empty; not used with a terminal.
    pub stderr: String,
    /// The three are one pseudo terminal.
    pub terminal: bool,
}

/// The three connections to the host, those that have a name.
struct Wires {
    stdin: Option<Box<dyn Connection>>,
    stdout: Option<Box<dyn Connection>>,
    stderr: Option<Box<dyn Connection>>,
}

/// What a process keeps of its stdio while it is known. Dropping it closes its stdin.
#[derive(Default)]
pub struct Io {
    stdin: Option<Stdin>,
    terminal: Option<Arc<Fd>>,
}

struct Stdin {
    close: Arc<Notify>,
    pump: AbortHandle,
}

impl Drop for Stdin {
    fn drop(&mut self) {
        self.pump.abort();
    }
}

impl Io {
    /// Closes stdin once what has been received so far is written.
    pub fn close_stdin(&self) {
        if let Some(stdin) = &self.stdin {
            stdin.close.notify_one();
        }
    }

    /// The master of the process's terminal, if it has one.
    pub fn terminal(&self) -> Option<&Arc<Fd>> {
        self.terminal.as_ref()
    }
}

/// A terminal's connections, before there is a terminal.
pub struct Unplugged(Wires);

/// Checks the names of streams.
///
/// # Errors
/// [`StdioError::Name`]
pub fn check(names: &Names) -> Result<(), StdioError> {
    for name in [&names.stdin, &names.stdout, &names.stderr] {
        parse_stream_uri(name).map_err(StdioError::Name)?;
    }
    Ok(())
}

/// Opens the connections of a process with a terminal, which [`plug`] completes.
///
/// # Errors
/// [`StdioError`]
pub async fn open_terminal(dial: &Dial, names: &Names) -> Result<Unplugged, StdioError> {
    Ok(Unplugged(wires(dial, names).await?))
}

/// Starts to carry bytes between a terminal and the host.
///
/// # Errors
/// [`StdioError::Pipe`]
pub fn plug(unplugged: Unplugged, master: OwnedFd) -> Result<Io, StdioError> {
    let Wires { stdin, stdout, stderr: _ } = unplugged.0;
    let master = Arc::new(Fd::new(master, Interest::READABLE | Interest::WRITABLE).map_err(StdioError::Pipe)?);
    match stdout {
        Some(wire) => drop(tokio::spawn(pump_out(master.clone(), wire))),
        None => drop(tokio::spawn(discard(master.clone()))),
    }
    Ok(Io { stdin: stdin.map(|wire| start_stdin(wire, master.clone())), terminal: Some(master) })
}

/// Opens the connections of a process without a terminal and starts to carry bytes. Returns its descriptors 0, 1 and
/// 2; the pipes belong to `owner` (uid, gid), so that it may open them again through /proc.
///
/// # Errors
/// [`StdioError`]
pub async fn open(dial: &Dial, names: &Names, owner: (u32, u32)) -> Result<(Io, [OwnedFd; 3]), StdioError> {
    let wires = wires(dial, names).await?;
    let mut io = Io::default();
    let stdin = match wires.stdin {
        Some(wire) => {
            let (theirs, ours) = pipe(owner)?;
            let ours = Fd::new(ours, Interest::WRITABLE).map_err(StdioError::Pipe)?;
            io.stdin = Some(start_stdin(wire, Arc::new(ours)));
            theirs
        }
        None => null()?,
    };
    let output = |wire: Option<Box<dyn Connection>>| match wire {
        Some(wire) => {
            let (ours, theirs) = pipe(owner)?;
            let ours = Fd::new(ours, Interest::READABLE).map_err(StdioError::Pipe)?;
            tokio::spawn(pump_out(Arc::new(ours), wire));
            Ok(theirs)
        }
        None => null(),
    };
    Ok((io, [stdin, output(wires.stdout)?, output(wires.stderr)?]))
}

/// Three times /dev/null, for a process whose terminal comes later.
///
/// # Errors
/// [`StdioError::Null`]
pub fn nulls() -> Result<[OwnedFd; 3], StdioError> {
    Ok([null()?, null()?, null()?])
}

fn null() -> Result<OwnedFd, StdioError> {
    let file = std::fs::OpenOptions::new().read(true).write(true).open("/dev/null");
    Ok(file.map_err(StdioError::Null)?.into())
}

fn pipe((uid, gid): (u32, u32)) -> Result<(OwnedFd, OwnedFd), StdioError> {
    let ends = fd::pipe().map_err(StdioError::Pipe)?;
    // Both ends are one inode.
    std::os::unix::fs::fchown(&ends.0, Some(uid), Some(gid)).map_err(StdioError::Pipe)?;
    Ok(ends)
}

async fn wires(dial: &Dial, names: &Names) -> Result<Wires, StdioError> {
    let stderr = if names.terminal { "" } else { &names.stderr };
    let (stdin, stdout, stderr) =
        tokio::try_join!(wire(dial, &names.stdin), wire(dial, &names.stdout), wire(dial, stderr))?;
    Ok(Wires { stdin, stdout, stderr })
}

async fn wire(dial: &Dial, name: &str) -> Result<Option<Box<dyn Connection>>, StdioError> {
    match parse_stream_uri(name).map_err(StdioError::Name)? {
        Some(id) => dial::stream(dial, id).await.map(Some).map_err(|source| StdioError::Open { id, source }),
        None => Ok(None),
    }
}

fn start_stdin(wire: Box<dyn Connection>, sink: Arc<Fd>) -> Stdin {
    let close = Arc::new(Notify::new());
    let pump = tokio::spawn(pump_in(wire, sink, close.clone())).abort_handle();
    Stdin { close, pump }
}

/// Reads a terminal that nobody listens to, because a process would stall once it is full.
async fn discard(source: Arc<Fd>) {
    let mut buffer = vec![0; 4096];
    while matches!(source.read(&mut buffer).await, Ok(1..)) {}
}

/// What the host has room for.
struct Credit {
    bytes: Mutex<u64>,
    more: Notify,
}

impl Credit {
    fn add(&self, bytes: u32) {
        let mut have = self.bytes.lock().expect("nothing panics while it counts credit");
        *have = have.saturating_add(u64::from(bytes));
        drop(have);
        self.more.notify_one();
    }

    /// Waits for any credit, and says how much there is. There is one waiter, so it stays true until it is spent.
    async fn some(&self) -> u64 {
        loop {
            let have = *self.bytes.lock().expect("nothing panics while it counts credit");
            if have > 0 {
                return have;
            }
            self.more.notified().await;
        }
    }

    fn spend(&self, bytes: usize) {
        let mut have = self.bytes.lock().expect("nothing panics while it counts credit");
        *have = have.saturating_sub(bytes as u64);
    }
}

async fn pump_out(source: Arc<Fd>, wire: Box<dyn Connection>) {
    copy_out(source, wire).await;
}

/// Most bytes in a frame that is sent: with its header it fills one packet of vsock (VIRTIO_VSOCK_MAX_PKT_BUF_SIZE in the
/// kernel's linux/virtio_vsock.h, 64 KiB) and not two.
const MOST: usize = MAX_DATA - HEADER_LEN;

/// Copies to the host until the source has ended, and drops it; then waits for the host to close the stream. Returns
/// whether all went well.
pub async fn copy_out(source: impl Borrow<Fd>, wire: Box<dyn Connection>) -> bool {
    // Whole frames of it: a remainder would go to and fro as a small frame for ever.
    let bytes = Mutex::new((WINDOW as usize / MOST * MOST) as u64);
    let credit = Credit { bytes, more: Notify::new() };
    let (receive, mut send) = tokio::io::split(wire);
    let receiving = receive_credit(receive, &credit);
    tokio::pin!(receiving);
    tokio::select! {
        // The host is gone: nobody will ever read this.
        () = &mut receiving => return false,
        sent = send_all(source.borrow(), &mut send, &credit) => if sent.is_err() { return false },
    }
    drop(source);
    // The host closes first, so that its last credit never meets a closed connection.
    let _ = tokio::time::timeout(LINGER, receiving).await;
    true
}

async fn receive_credit(receive: impl AsyncRead + Unpin, credit: &Credit) {
    let mut frames = Frames::new(receive);
    while let Ok(Some(Frame::Credit(bytes))) = frames.next().await {
        credit.add(bytes);
    }
}

async fn send_all(source: &Fd, send: &mut (impl AsyncWrite + Unpin), credit: &Credit) -> io::Result<()> {
    let mut frame = Vec::new();
    loop {
        let room = usize::try_from(credit.some().await).unwrap_or(MOST).min(MOST);
        tokio::select! {
            biased;
            ready = source.readable() => ready?,
            // An idle stream holds no buffer.
            () = std::future::ready(()) => {
                frame = Vec::new();
                source.readable().await?;
            }
        }
        frame.resize(HEADER_LEN + room, 0);
        let read = source.read(&mut frame[HEADER_LEN..]).await?;
        if read == 0 {
            send.write_all(&Header::EOF.encode()).await?;
            return send.flush().await;
        }
        credit.spend(read);
        frame[..HEADER_LEN].copy_from_slice(&Header::data(read as u32).encode());
        send.write_all(&frame[..HEADER_LEN + read]).await?;
        send.flush().await?;
    }
}

async fn pump_in(wire: Box<dyn Connection>, sink: Arc<Fd>, close: Arc<Notify>) {
    let (receive, mut send) = tokio::io::split(wire);
    let mut frames = Frames::new(receive);
    let mut taken = 0;
    let mut closing = false;
    loop {
        let frame = if closing {
            // Only what is here already, once the runtime has looked.
            tokio::task::yield_now().await;
            match tokio::task::unconstrained(frames.next()).now_or_never() {
                Some(frame) => frame,
                None => return,
            }
        } else {
            tokio::select! {
                frame = frames.next() => frame,
                () = close.notified() => { closing = true; continue }
            }
        };
        let Ok(Some(Frame::Data(bytes))) = frame else { return };
        if sink.write_all(&bytes).await.is_err() {
            return;
        }
        taken += bytes.len() as u32;
        if taken >= CREDIT_STEP {
            if send.write_all(&credit_frame(taken)).await.is_err() || send.flush().await.is_err() {
                return;
            }
            taken = 0;
        }
    }
}
