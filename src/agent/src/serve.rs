//! One connection to the host carries every request. The guest lives as long as it does.

use std::collections::HashMap;
use std::io;
use std::pin::Pin;
use std::sync::Arc;
use std::sync::atomic::{AtomicBool, Ordering};
use std::task::{Context, Poll};
use std::time::Duration;

use async_trait::async_trait;
use containerd_shim_protos::shim_async::create_task;
use nacelle_protocol::agent::{
    Agent, ConfigureRequest, ConfigureResponse, EventsRequest, EventsResponse, ExportRequest, ExportResponse,
    FilesRequest, FilesResponse, ForwardRequest, ForwardResponse, RefreshRequest, RefreshResponse, SetTimeRequest,
    SetTimeResponse, ShutdownRequest, ShutdownResponse, create_agent,
};
use thiserror::Error;
use tokio::io::{AsyncRead, AsyncWrite, ReadBuf};
use tokio::sync::Notify;
use ttrpc::Code;
use ttrpc::r#async::{Server, TtrpcContext, transport::Listener};

use crate::clock::{self, HostClock};
use crate::console::chain;
use crate::create;
use crate::dial::{self, Connection, DialError};
use crate::features;
use crate::forward;
use crate::guest::Guest;
use crate::mirror;
use crate::mount;
use crate::network;
use crate::service::{Tasks, complete, rpc_status};

/// How long the host may take to close the connection after it has asked the guest to end.
const FAREWELL: Duration = Duration::from_millis(500);

/// Why the guest ends, other than by request.
#[derive(Debug, Error)]
pub enum ServeError {
    /// The host cannot be reached.
    #[error("reach the host")]
    Dial(#[source] DialError),
    /// No server.
    #[error("serve the host")]
    Server(#[source] ttrpc::Error),
    /// The connection ended, and with it the guest.
    #[error("serve the host: it hung up")]
    HungUp,
    /// Processes cannot be waited for.
    #[error("wait for processes")]
    Reap(#[source] io::Error),
}

/// Dials the host and serves it until the connection ends or the host asks for the guest's end.
///
/// # Errors
/// [`ServeError`]
pub async fn run(guest: Arc<Guest>) -> Result<(), ServeError> {
    let reaping = tokio::spawn(guest.reaper.clone().run());
    let connection = dial::rpc(&guest.dial).await.map_err(ServeError::Dial)?;
    let cpus = guest.cpus.clone();
    drop(tokio::task::spawn_blocking(move || cpus.bring_up()));
    let closed = Arc::new(Notify::new());
    let connection = Watched { connection, closed: closed.clone() };
    // The stream of connections has this one and never ends, because its end would end the server.
    let connections = futures::StreamExt::chain(
        futures::stream::once(std::future::ready(Ok(connection))),
        futures::stream::pending(),
    );
    let mut server = Server::new()
        .add_listener(Listener::new(connections))
        .register_service(create_task(Arc::new(Tasks(guest.clone()))))
        .register_service(agent(guest.clone()));
    server.start().await.map_err(ServeError::Server)?;
    let result = tokio::select! {
        () = closed.notified() => Err(ServeError::HungUp),
        () = guest.shutdown.notified() => {
            // The answer is on its way; when the host has it, it hangs up.
            let _ = tokio::time::timeout(FAREWELL, closed.notified()).await;
            Ok(())
        }
        // It only returns when it cannot start.
        reaped = reaping => reaped.unwrap_or(Ok(())).map_err(ServeError::Reap),
    };
    guest.kill_all();
    result
}

fn agent(guest: Arc<Guest>) -> HashMap<String, ttrpc::r#async::Service> {
    create_agent(Arc::new(Service { guest, configured: AtomicBool::new(false) }))
}

struct Service {
    guest: Arc<Guest>,
    configured: AtomicBool,
}

fn internal(error: &dyn std::error::Error) -> ttrpc::Error {
    rpc_status(Code::INTERNAL, chain(error))
}

#[async_trait]
impl Agent for Service {
    async fn configure(&self, _: &TtrpcContext, request: ConfigureRequest) -> ttrpc::Result<ConfigureResponse> {
        if self.configured.swap(true, Ordering::Relaxed) {
            return Err(rpc_status(Code::FAILED_PRECONDITION, "configure guest: it is configured already"));
        }
        let host_clock = HostClock::open();
        let follows_host_clock = host_clock.is_some();
        match host_clock {
            Some(clock) => drop(tokio::spawn(clock.follow())),
            None if request.realtime_ns > 0 => {
                clock::step_to(request.realtime_ns).map_err(|error| internal(&error))?;
            }
            None => {}
        }
        create::set_sysctls(&request.sysctls).map_err(|error| internal(&error))?;
        if !request.hostname.is_empty() {
            rustix::system::sethostname(request.hostname.as_bytes()).map_err(|error| internal(&error))?;
        }
        // Configured once, so set once. A guest that is given no name has the kernel's.
        let _ = self.guest.hostname.set(rustix::system::uname().nodename().to_string_lossy().into_owned());
        // The kernel does what it is asked for at once, so the mounts need not be awaited in between.
        network::configure(&request.network).await.map_err(|error| internal(&error))?;
        let mounting = tokio::task::spawn_blocking(move || {
            for share in &request.shares {
                mount::mount_share(&share.tag, &share.target, share.read_only)?;
            }
            if request.upper_serial.is_empty() { Ok(None) } else { mount::mount_upper(&request.upper_serial) }
        });
        match mounting.await {
            Ok(mounted) => {
                if let Some(device) = mounted.map_err(|error| internal(&error))? {
                    // Configured once, so set once.
                    let _ = self.guest.limited_disk.set(device);
                }
            }
            Err(error) => return Err(internal(&error)),
        }
        let kernel = rustix::system::uname().release().to_string_lossy().into_owned();
        let version = env!("CARGO_PKG_VERSION").to_owned();
        let features = features::found(follows_host_clock);
        Ok(ConfigureResponse { kernel, version, follows_host_clock, features, ..Default::default() })
    }

    async fn events(&self, _: &TtrpcContext, request: EventsRequest) -> ttrpc::Result<EventsResponse> {
        let events = self.guest.events.after(request.after).await;
        Ok(EventsResponse { events, ..Default::default() })
    }

    async fn forward(&self, _: &TtrpcContext, request: ForwardRequest) -> ttrpc::Result<ForwardResponse> {
        let dial = self.guest.dial.clone();
        let ForwardRequest { address, port, input, output, .. } = request;
        let started = tokio::spawn(async move { forward::start(&dial, &address, port, input, output).await });
        match started.await {
            Ok(Ok(())) => Ok(ForwardResponse::default()),
            Ok(Err(error)) => Err(rpc_status(Code::UNAVAILABLE, chain(&error))),
            Err(error) => Err(internal(&error)),
        }
    }

    async fn export(&self, _: &TtrpcContext, request: ExportRequest) -> ttrpc::Result<ExportResponse> {
        let guest = self.guest.clone();
        complete(async move { guest.export(&request.container_id, request.stream).await }).await?;
        Ok(ExportResponse::default())
    }

    async fn files(&self, _: &TtrpcContext, request: FilesRequest) -> ttrpc::Result<FilesResponse> {
        let guest = self.guest.clone();
        let FilesRequest { container_id, input, output, .. } = request;
        complete(async move { guest.files(&container_id, input, output).await }).await?;
        Ok(FilesResponse::default())
    }

    async fn set_time(&self, _: &TtrpcContext, request: SetTimeRequest) -> ttrpc::Result<SetTimeResponse> {
        clock::step_to(request.realtime_ns).map_err(|error| internal(&error))?;
        Ok(SetTimeResponse::default())
    }

    async fn refresh(&self, _: &TtrpcContext, request: RefreshRequest) -> ttrpc::Result<RefreshResponse> {
        let name = format!("refresh volume {}", request.volume);
        let refresh = tokio::task::spawn_blocking(move || mirror::refresh(&request.volume, &request.data)).await;
        match refresh {
            Ok(Ok(())) => Ok(RefreshResponse::default()),
            Ok(Err(error)) if error.kind() == io::ErrorKind::NotFound => {
                Err(rpc_status(Code::NOT_FOUND, format!("{name}: {error}")))
            }
            Ok(Err(error)) => Err(rpc_status(Code::INTERNAL, format!("{name}: {error}"))),
            Err(error) => Err(internal(&error)),
        }
    }

    async fn shutdown(&self, _: &TtrpcContext, _: ShutdownRequest) -> ttrpc::Result<ShutdownResponse> {
        self.guest.kill_all();
        self.guest.shutdown.notify_one();
        Ok(ShutdownResponse::default())
    }
}

/// A connection whose end is noticed also when the server goes on with what it was asked before.
struct Watched {
    connection: Box<dyn Connection>,
    closed: Arc<Notify>,
}

impl Drop for Watched {
    fn drop(&mut self) {
        self.closed.notify_one();
    }
}

impl AsyncRead for Watched {
    fn poll_read(mut self: Pin<&mut Self>, cx: &mut Context<'_>, buffer: &mut ReadBuf<'_>) -> Poll<io::Result<()>> {
        let before = buffer.filled().len();
        let room = buffer.remaining() > 0;
        let read = Pin::new(&mut self.connection).poll_read(cx, buffer);
        match &read {
            Poll::Ready(Ok(())) if !room || buffer.filled().len() > before => {}
            Poll::Ready(ended) => {
                if let Err(error) = ended {
                    crate::say!("read from the host: {error}");
                }
                self.closed.notify_one();
            }
            Poll::Pending => {}
        }
        read
    }
}

impl AsyncWrite for Watched {
    fn poll_write(mut self: Pin<&mut Self>, cx: &mut Context<'_>, bytes: &[u8]) -> Poll<io::Result<usize>> {
        Pin::new(&mut self.connection).poll_write(cx, bytes)
    }

    fn poll_flush(mut self: Pin<&mut Self>, cx: &mut Context<'_>) -> Poll<io::Result<()>> {
        Pin::new(&mut self.connection).poll_flush(cx)
    }

    fn poll_shutdown(mut self: Pin<&mut Self>, cx: &mut Context<'_>) -> Poll<io::Result<()>> {
        Pin::new(&mut self.connection).poll_shutdown(cx)
    }
}
