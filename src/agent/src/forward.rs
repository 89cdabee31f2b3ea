//! A connection of the host's, carried to a port of the guest's own: two streams that the guest dials, and a socket.
//!
//! ```text
//!  host ── DATA … EOF ──► Io "in"  ── write, then shut down for writing ──► ┐
//!                                                                           ├ a container's server
//!  host ◄── DATA … EOF ── Io "out" ◄── read to the end ──────────────────── ┘
//! ```
//!
//! An end without EOF, on either side, breaks the connection on the other: it is reset.

use std::io;
use std::net::{IpAddr, Ipv4Addr, Ipv6Addr, SocketAddr};
use std::os::fd::OwnedFd;
use std::time::Duration;

use nacelle_protocol::stream::credit_frame;
use thiserror::Error;
use tokio::io::{AsyncWriteExt, Interest};
use tokio::net::TcpStream;

use crate::dial::{self, Connection, Dial, DialError};
use crate::fd::Fd;
use crate::frame::{Frame, Frames};
use crate::stdio::{CREDIT_STEP, copy_out};

/// How long a server of the guest's own may take to accept.
const DEADLINE: Duration = Duration::from_secs(10);

/// Why a connection is not carried.
#[derive(Debug, Error)]
pub enum ForwardError {
    /// The address has neither 4 nor 16 bytes, or the port no 16 bits.
    #[error("forward connection: no such address")]
    Address,
    /// Nobody listens, or does not accept.
    #[error("connect to {address}")]
    Connect {
        /// Where.
        address: SocketAddr,
        /// What the system says.
        #[source]
        source: io::Error,
    },
    /// The host does not take the streams.
    #[error("open streams of a connection")]
    Dial(#[from] DialError),
    /// The socket cannot be used.
    #[error("use connection")]
    Socket(#[from] io::Error),
}

/// Connects, dials both streams, and carries on in the background.
///
/// # Errors
/// [`ForwardError`]; nothing is left.
pub async fn start(dial: &Dial, address: &[u8], port: u32, input: u64, output: u64) -> Result<(), ForwardError> {
    let ip =
        <[u8; 4]>::try_from(address).map(IpAddr::from).or_else(|_| <[u8; 16]>::try_from(address).map(IpAddr::from));
    let (Ok(ip), Ok(port)) = (ip, u16::try_from(port)) else { return Err(ForwardError::Address) };
    let socket = match connect((ip, port).into()).await {
        Err(_) if ip == Ipv4Addr::LOCALHOST => connect((Ipv6Addr::LOCALHOST, port).into()).await,
        other => other,
    }?;
    let (input, output) = tokio::try_join!(dial::stream(dial, input), dial::stream(dial, output))?;
    let socket = OwnedFd::from(socket.into_std()?);
    // Until both directions have ended well, its end is a reset.
    rustix::net::sockopt::set_socket_linger(&socket, Some(Duration::ZERO)).map_err(io::Error::from)?;
    let source = Fd::new(socket.try_clone()?, Interest::READABLE)?;
    let sink = Fd::new(socket, Interest::WRITABLE)?;
    tokio::spawn(async move {
        let out = async { if copy_out(&source, output).await { Ok(()) } else { Err(()) } };
        if tokio::try_join!(copy_in(input, &sink), out).is_ok() {
            // Best effort: a socket that is closed is closed.
            let _ = rustix::net::sockopt::set_socket_linger(&sink, None);
        }
    });
    Ok(())
}

async fn connect(address: SocketAddr) -> Result<TcpStream, ForwardError> {
    let connected = tokio::time::timeout(DEADLINE, TcpStream::connect(address)).await;
    let connected = connected.unwrap_or_else(|_| Err(io::ErrorKind::TimedOut.into()));
    connected.map_err(|source| ForwardError::Connect { address, source })
}

/// What the client sends. `Err` where it broke off, or the server did.
async fn copy_in(wire: Box<dyn Connection>, sink: &Fd) -> Result<(), ()> {
    let (receive, mut send) = tokio::io::split(wire);
    let mut frames = Frames::new(receive);
    let mut taken = 0;
    loop {
        match frames.next().await {
            Ok(Some(Frame::Data(bytes))) => {
                sink.write_all(&bytes).await.map_err(drop)?;
                taken += bytes.len() as u32;
                if taken >= CREDIT_STEP {
                    send.write_all(&credit_frame(taken)).await.map_err(drop)?;
                    send.flush().await.map_err(drop)?;
                    taken = 0;
                }
            }
            Ok(Some(Frame::Eof)) => {
                return rustix::net::shutdown(sink, rustix::net::Shutdown::Write).map_err(drop);
            }
            _ => return Err(()),
        }
    }
}
