//! Port-forward: what somebody in the pod's namespace on the host sends to its loopback reaches the guest's loopback.
//!
//! ```text
//!  containerd                 shim                                     agent            container
//!  127.0.0.1:P ─► redirect ─► listener ── Forward(127.0.0.1, P) ─────► connect ───────► listens on P
//!     (nftables, see nft.rs)     │ ◄──── dials two streams ─────────────┤
//!                client → guest  ├────── DATA … EOF ──────────────────► │
//!                guest → client  │ ◄──── DATA … EOF ─────────────────── ┤
//! ```
//!
//! The kubelet's port-forward is containerd itself, dialling a port that is not known beforehand in the namespace on the
//! host, where the container's processes are not. Each direction is a stream of its own, with credit, and ends with a
//! frame: so one end can be closed while the other goes on, as TCP can. A connection that breaks on one side is reset on
//! the other. Only sockets inside the namespace can reach its loopback; the guest cannot, as its frames never enter the
//! namespace's network stack.

use std::io;
use std::net::{IpAddr, Ipv4Addr, Ipv6Addr, SocketAddr};
use std::sync::Arc;
use std::time::Duration;

use nix::sys::socket::{getsockopt, sockopt};
use thiserror::Error;
use tokio::net::{TcpListener, TcpStream};
use tokio::sync::Semaphore;

use super::nft::Redirection;
use super::{Netns, NetworkError};
use crate::guest::{Guest, GuestError};
use crate::stream::{Hub, PumpError, pump_output, pump_source};

/// Connections at once; more wait.
const MAX_CONNECTIONS: usize = 4096;
/// Connections that the kernel holds until they are accepted.
const BACKLOG: i32 = 4096;

/// Why a connection is not forwarded.
#[derive(Debug, Error)]
pub enum ForwardError {
    /// The kernel does not say where it was meant to go.
    #[error("find destination of a connection")]
    Destination(#[source] nix::Error),
    /// The shim has no randomness for the names of streams.
    #[error("make streams")]
    Streams(#[source] io::Error),
    /// The guest does not take it.
    #[error(transparent)]
    Guest(#[from] GuestError),
    /// The guest went away.
    #[error("the guest is gone")]
    Gone,
    /// Its streams broke.
    #[error(transparent)]
    Pump(#[from] PumpError),
    /// The connection itself broke.
    #[error("use connection")]
    Socket(#[from] io::Error),
}

/// Listeners in the pod's namespace, and what leads to them.
#[derive(Debug)]
pub struct Doors {
    listeners: Vec<std::net::TcpListener>,
    _redirection: Redirection,
}

#[cfg(test)]
impl Doors {
    /// The one on 127.0.0.1, or the one on ::1.
    pub fn listener(&self, number: usize) -> &std::net::TcpListener {
        &self.listeners[number]
    }
}

/// Listens in the namespace.
///
/// # Errors
/// [`NetworkError`], such as on a node whose kernel has no nf_tables.
pub async fn open(netns: &Netns) -> Result<Doors, NetworkError> {
    netns
        .run(async |_| {
            let failed = |source| NetworkError::Request { what: "redirect the loopback".into(), source };
            let listen = |ip: IpAddr| {
                let listener = std::net::TcpListener::bind((ip, 0))?;
                rustix::net::listen(&listener, BACKLOG)?;
                listener.set_nonblocking(true)?;
                Ok((listener.local_addr()?.port(), listener))
            };
            let v4 = listen(Ipv4Addr::LOCALHOST.into()).map_err(failed)?;
            // A namespace without IPv6 has no such address.
            let v6: io::Result<_> = listen(Ipv6Addr::LOCALHOST.into());
            let v6 = v6.ok();
            let redirection = Redirection::new([Some(v4.0), v6.as_ref().map(|v6| v6.0)]).map_err(failed)?;
            let listeners = std::iter::once(v4).chain(v6).map(|(_, listener)| listener).collect();
            Ok(Doors { listeners, _redirection: redirection })
        })
        .await
}

/// Forwards every connection, until it is aborted.
///
/// # Errors
/// An I/O error when the runtime cannot watch the listeners.
pub async fn serve(doors: Doors, guest: Guest, hub: Arc<Hub>) -> io::Result<()> {
    let permits = Arc::new(Semaphore::new(MAX_CONNECTIONS));
    let listen = async |listener: TcpListener| loop {
        let Ok(permit) = permits.clone().acquire_owned().await else { return };
        let connection = match listener.accept().await {
            Ok((connection, _)) => connection,
            Err(e) => {
                tracing::warn!("accept forwarded connection: {e}");
                // Out of descriptors, most likely: let some be closed.
                tokio::time::sleep(Duration::from_millis(100)).await;
                continue;
            }
        };
        let (guest, hub) = (guest.clone(), hub.clone());
        tokio::spawn(async move {
            if let Err(e) = forward(connection, &guest, &hub).await {
                tracing::debug!("forward connection: {}", crate::chain(&e));
            }
            drop(permit);
        });
    };
    let listeners: Vec<_> = doors.listeners.into_iter().map(TcpListener::from_std).collect::<io::Result<_>>()?;
    futures::future::join_all(listeners.into_iter().map(listen)).await;
    Ok(())
}

async fn forward(connection: TcpStream, guest: &Guest, hub: &Arc<Hub>) -> Result<(), ForwardError> {
    // Until both ends have ended well, its end is a reset.
    connection.set_zero_linger()?;
    let destination = destination(&connection)?;
    let stream = || hub.expect().map_err(ForwardError::Streams);
    let (mut input, mut output) = (stream()?, stream()?);
    guest.forward(destination, input.id(), output.id()).await?;
    let (Some(input), Some(output)) = tokio::join!(input.socket(), output.socket()) else {
        return Err(ForwardError::Gone);
    };
    let (reader, mut writer) = connection.into_split();
    let down = async {
        if !pump_output(output, &mut writer).await? {
            return Err(ForwardError::Gone);
        }
        rustix::net::shutdown(writer.as_ref(), rustix::net::Shutdown::Write).map_err(io::Error::from)?;
        Ok(())
    };
    let up = async { Ok(pump_source(input, &reader).await?) };
    tokio::try_join!(down, up)?;
    // Nothing is under way any more, so this is an ordinary close.
    rustix::net::sockopt::set_socket_linger(reader.as_ref(), None).map_err(io::Error::from)?;
    Ok(())
}

/// Where the connection was made to before it was redirected.
pub fn destination(connection: &TcpStream) -> Result<SocketAddr, ForwardError> {
    if connection.local_addr()?.is_ipv4() {
        let found = getsockopt(connection, sockopt::OriginalDst).map_err(ForwardError::Destination)?;
        let ip = Ipv4Addr::from(u32::from_be(found.sin_addr.s_addr));
        return Ok((ip, u16::from_be(found.sin_port)).into());
    }
    let found = getsockopt(connection, sockopt::Ip6tOriginalDst).map_err(ForwardError::Destination)?;
    Ok((Ipv6Addr::from(found.sin6_addr.s6_addr), u16::from_be(found.sin6_port)).into())
}
