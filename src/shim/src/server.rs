//! The `serve` action: the process that stays. It is started by [`crate::start`] with the listening socket as its stdin.
//!
//! Before there is a second thread it leaves its starter's session, becomes the parent of orphans (the VMM is one by
//! design), and gets a mount namespace of its own: a slave of the host's, so that every mount that it makes is gone when
//! it is. Rust ignores SIGPIPE from the start.

use std::fs::File;
use std::io;
use std::os::fd::{AsFd, OwnedFd};
use std::os::unix::fs::OpenOptionsExt;
use std::os::unix::net::UnixListener;
use std::path::PathBuf;
use std::sync::Arc;
use std::time::Duration;

use anyhow::Context;
use futures::stream;
use nix::sched::{CloneFlags, unshare};
use rustix::mount::{MountPropagationFlags, mount_change};
use tokio::signal::unix::{SignalKind, signal};
use ttrpc::r#async::Server;
use ttrpc::r#async::transport::Listener;

use crate::args::Args;
use crate::bootstrap::TTRPC_ENV;
use crate::config::{KVM, Origin};
use crate::driver::Driver;
use crate::pod::Env;
use crate::publisher::Publisher;
use crate::service;
use crate::state::RUN_ROOT;
use crate::task::Reply;

/// How long events may take to reach containerd when the shim leaves.
const DRAIN: Duration = Duration::from_secs(2);
/// How long the last answer may take to its connection.
const ANSWER: Duration = Duration::from_millis(20);
/// How long connections may take to end.
const CLOSE: Duration = Duration::from_millis(500);
/// Threads for blocking work; each costs memory once it has been used.
const WORKERS: usize = 4;

/// Serves until containerd asks to leave.
///
/// # Errors
/// What keeps the server from running; nobody but the log hears of it.
pub fn run(args: &Args) -> anyhow::Result<()> {
    let origin = Origin::from_env();
    let config = origin.load();
    let level = config.as_ref().map_or("info", |config| config.log_level.as_str());
    start_log(if args.debug { "debug" } else { level });
    let result = serve(args, origin);
    if let Err(e) = &result {
        tracing::error!("{e:#}");
    }
    result
}

fn serve(args: &Args, origin: Origin) -> anyhow::Result<()> {
    let (namespace, sandbox) = args.ids()?;
    let listener = take_listener().context("take over the socket")?;
    let address = listener.local_addr().context("name the socket")?;
    let socket = address.as_pathname().map(PathBuf::from).context("name the socket: it has no path")?;
    // Fails only where it has happened: somebody started `serve` by hand.
    let _ = rustix::process::setsid();
    rustix::process::set_child_subreaper(Some(rustix::process::getpid())).context("become a subreaper")?;
    unshare(CloneFlags::CLONE_NEWNS).context("unshare mount namespace")?;
    mount_change("/", MountPropagationFlags::DOWNSTREAM | MountPropagationFlags::REC)
        .context("make mounts slaves of the host's")?;
    protect_from_oom();
    let env = Env {
        namespace,
        sandbox,
        exe: std::env::current_exe().context("find the shim's own program")?,
        kvm: KVM.into(),
        run_root: RUN_ROOT.into(),
        socket: socket.clone(),
        origin,
    };
    let runtime = tokio::runtime::Builder::new_current_thread()
        .enable_all()
        .max_blocking_threads(WORKERS)
        .thread_keep_alive(Duration::from_secs(1))
        .build()
        .context("start the runtime")?;
    let result = runtime.block_on(until_done(env, listener));
    // A thread that still reads a slow disk must not keep the shim.
    runtime.shutdown_background();
    let _ = std::fs::remove_file(socket);
    result
}

async fn until_done(env: Env, listener: UnixListener) -> anyhow::Result<()> {
    let address = std::env::var(TTRPC_ENV).unwrap_or_default();
    let publisher = Publisher::new(env.namespace.as_str(), &address);
    let (driver, handle, terminate) = Driver::new(env, publisher);
    let mut server = Server::new().add_listener(same_user(listener)?).register_service(service::services(&handle));
    server.start().await.context("start the server")?;
    tracing::info!("shim {} is up", std::process::id());

    let mut term = signal(SignalKind::terminate()).context("catch SIGTERM")?;
    let mut int = signal(SignalKind::interrupt()).context("catch SIGINT")?;
    tokio::spawn(async move {
        tokio::select! {
            _ = term.recv() => {}
            _ = int.recv() => {}
        }
        tracing::warn!("asked to terminate");
        // The driver may be gone already.
        let _ = terminate.send(());
        std::future::pending::<()>().await;
    });
    let (publisher, reply) = driver.run().await;
    publisher.close(DRAIN).await;
    if let Some(reply) = reply {
        let _ = reply.send(Ok(Reply::Done));
        // The server drops answers that it has not sent when it is told to end. Whatever is ready runs before this ends.
        tokio::time::sleep(ANSWER).await;
    }
    let _ = tokio::time::timeout(CLOSE, server.shutdown()).await;
    Ok(())
}

/// Accepts root's connections, or those of whoever runs the shim.
fn same_user(listener: UnixListener) -> anyhow::Result<Listener> {
    listener.set_nonblocking(true).context("set up the socket")?;
    let listener = Arc::new(tokio::net::UnixListener::from_std(listener).context("set up the socket")?);
    let own = rustix::process::geteuid().as_raw();
    Ok(Listener::new(stream::unfold(listener, move |listener| async move {
        loop {
            let accepted: io::Result<_> = match listener.accept().await {
                Ok((socket, _)) => match socket.peer_cred() {
                    Ok(peer) if peer.uid() == own => Ok(socket),
                    _ => continue,
                },
                Err(e) => Err(e),
            };
            return Some((accepted, listener));
        }
    })))
}

/// Takes the socket that is this process's stdin, and puts /dev/null there.
fn take_listener() -> io::Result<UnixListener> {
    let listener: OwnedFd = io::stdin().as_fd().try_clone_to_owned()?;
    rustix::stdio::dup2_stdin(File::open("/dev/null")?)?;
    Ok(listener.into())
}

/// The shim is small, and what it looks after is not: the kernel shall rather take that.
fn protect_from_oom() {
    if let Err(e) = std::fs::write("/proc/self/oom_score_adj", "-998") {
        // Not every host lets root lower it.
        tracing::debug!("adjust OOM score: {e}");
    }
}

/// Logs to containerd's FIFO in the bundle. A full FIFO loses lines; it never holds up the shim.
fn start_log(level: &str) {
    // Read-write, so that neither opening nor writing depends on a reader.
    let nonblocking = rustix::fs::OFlags::NONBLOCK.bits().cast_signed();
    let log = File::options().read(true).write(true).custom_flags(nonblocking).open("log");
    let Ok(log) = log else { return };
    // The configuration has checked the word.
    let level = level.parse().unwrap_or(tracing::Level::INFO);
    tracing_subscriber::fmt().with_writer(Arc::new(log)).with_ansi(false).with_max_level(level).init();
}
