//! A guest that lies, floods and stalls.
//!
//! It speaks the protocol well enough to be taken for the agent, and then does one thing that no agent does. It runs no
//! containers: what it says of them is made up. The shim's own tests play it over UNIX sockets; `hostile-guest` is PID 1
//! of a real virtual machine.
//!
//! ```text
//!  BEHAVIOURS ── a name ──► behave ──┬ doors    before and at the handshake
//!                                    ├ answers  to calls, and events
//!                                    └ streams  of processes
//! ```

use std::io;
use std::pin::Pin;
use std::sync::Arc;

use tokio::io::{AsyncRead, AsyncWrite};

mod answers;
mod doors;
mod list;
mod streams;

pub use list::{BEHAVIOURS, Behaviour, Fate};

/// A byte stream to the host.
pub trait Connection: AsyncRead + AsyncWrite + Send + Unpin {}
impl<T: AsyncRead + AsyncWrite + Send + Unpin> Connection for T {}

type Dialled = Pin<Box<dyn Future<Output = io::Result<Box<dyn Connection>>> + Send>>;

/// Opens a byte stream to a vsock port of the host.
pub type Dial = Arc<dyn Fn(u32) -> Dialled + Send + Sync>;

/// Plays the behaviour called `name` until the host has had enough of it.
///
/// # Errors
/// The host is gone, or there is no such behaviour.
pub async fn behave(name: &str, dial: Dial) -> io::Result<()> {
    let known = BEHAVIOURS.iter().find(|behaviour| behaviour.name == name);
    let Some(behaviour) = known else { return Err(io::Error::other(format!("no behaviour {name:?}"))) };
    doors::open(behaviour.name, dial).await
}
