//! Connections to the host. The guest always dials.
//!
//! A connection counts only once the host has answered the preamble: libkrun completes a guest's connect even where
//! nobody listens.

use std::future::Future;
use std::io;
use std::pin::Pin;
use std::sync::Arc;
use std::time::Duration;

use nacelle_protocol::stream::{ANSWER_LEN, Answer, Kind, Preamble, RPC_PORT, STREAM_PORT, StreamError};
use thiserror::Error;
use tokio::io::{AsyncRead, AsyncReadExt, AsyncWrite, AsyncWriteExt};
use tokio_vsock::{VsockAddr, VsockStream};

/// How long the host may take to accept a connection and to answer its preamble.
const DEADLINE: Duration = Duration::from_secs(10);

/// vsock address of the host.
const HOST_CID: u32 = 2;

/// A byte stream to the host.
pub trait Connection: AsyncRead + AsyncWrite + Send + Sync + Unpin {}
impl<T: AsyncRead + AsyncWrite + Send + Sync + Unpin> Connection for T {}

type Dialled = Pin<Box<dyn Future<Output = io::Result<Box<dyn Connection>>> + Send>>;

/// Opens a byte stream to a port of the host.
pub type Dial = Arc<dyn Fn(u32) -> Dialled + Send + Sync>;

/// Why the host could not be reached.
#[derive(Debug, Error)]
pub enum DialError {
    /// No connection.
    #[error("connect to port {port} of the host")]
    Connect {
        /// vsock port.
        port: u32,
        /// What the system says.
        #[source]
        source: io::Error,
    },
    /// The connection ended within the handshake.
    #[error("shake hands on port {port} of the host")]
    Handshake {
        /// vsock port.
        port: u32,
        /// What the system says.
        #[source]
        source: io::Error,
    },
    /// The host said no.
    #[error("shake hands on port {port} of the host")]
    Refused {
        /// vsock port.
        port: u32,
        /// What it said.
        #[source]
        source: StreamError,
    },
    /// Nobody answered in time.
    #[error("reach port {0} of the host: no answer")]
    Silent(u32),
}

/// Dials over vsock.
pub fn vsock() -> Dial {
    Arc::new(|port| {
        Box::pin(async move {
            let stream = VsockStream::connect(VsockAddr::new(HOST_CID, port)).await?;
            Ok(Box::new(stream) as Box<dyn Connection>)
        })
    })
}

/// Opens the RPC connection.
///
/// # Errors
/// [`DialError`]
pub async fn rpc(dial: &Dial) -> Result<Box<dyn Connection>, DialError> {
    handshake(dial, RPC_PORT, Preamble::new(Kind::Rpc, 0)).await
}

/// Opens the connection of a stdio stream.
///
/// # Errors
/// [`DialError`]
pub async fn stream(dial: &Dial, id: u64) -> Result<Box<dyn Connection>, DialError> {
    handshake(dial, STREAM_PORT, Preamble::new(Kind::Stream, id)).await
}

async fn handshake(dial: &Dial, port: u32, preamble: Preamble) -> Result<Box<dyn Connection>, DialError> {
    let shaken = async {
        let mut connection = dial(port).await.map_err(|source| DialError::Connect { port, source })?;
        let mut answer = [0; ANSWER_LEN];
        let exchange = async {
            connection.write_all(&preamble.encode()).await?;
            connection.flush().await?;
            connection.read_exact(&mut answer).await
        };
        exchange.await.map_err(|source| DialError::Handshake { port, source })?;
        Answer::check(&answer).map_err(|source| DialError::Refused { port, source })?;
        Ok(connection)
    };
    tokio::time::timeout(DEADLINE, shaken).await.unwrap_or(Err(DialError::Silent(port)))
}
