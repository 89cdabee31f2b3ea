//! The files of a container that runs, at `/proc/PID/root`, where PID is the process that containerd knows: the VMM.
//!
//! Clients of containerd look there for what a container sees (`nerdctl cp`, tools of a node). What they find is a FUSE file
//! system, whose every question goes to the guest. Only for containers that are no pod's: a pod's VMM stands for several.
//!
//! ```text
//!  whoever looks ─► kernel ─► /dev/fuse ── ask ──► pipe ── pump_input ──► guest: nacelle-files
//!                                  ▲ ▲  pending: unique → deadline              │
//!                                  │ └──── expire: EIO ─┘ │                     │
//!                                  └────── answer ◄───────┴── pump_output ◄─────┘
//! ```
//!
//! The guest is asked nothing, and starts nothing, before somebody looks. The kernel gets answers only to what it has asked,
//! of a length and an error that it knows, one for each question; a question that the guest does not answer in time fails with
//! EIO, and whoever asked goes on. With the container, the VM or the shim the file system ends: ENOTCONN.

use std::collections::HashMap;
use std::io;
use std::os::fd::OwnedFd;
use std::sync::{Arc, Mutex, MutexGuard, PoisonError};
use std::time::Duration;

use nacelle_protocol::agent::FILES_MESSAGE;
use nacelle_protocol::ids::ContainerId;
use rustix::fs::{Mode, OFlags, open};
use rustix::io::Errno;
use thiserror::Error;
use tokio::io::unix::AsyncFd;
use tokio::io::{AsyncReadExt, AsyncWriteExt, DuplexStream, Interest};
use tokio::net::UnixStream;
use tokio::net::unix::pipe;
use tokio::sync::{Notify, watch};
use tokio::time::{Instant, sleep_until, timeout};

use crate::guest::GuestError;
use crate::pod::{Pod, PodError, blocking};
use crate::stream::{PumpError, pump_input, pump_output};

mod message;
mod root;
#[cfg(test)]
mod tests;

use message::{ANSWER_HEADER, Kind, Message};

const DEVICE: &str = "/dev/fuse";
/// How long the guest may take to answer.
const DEADLINE: Duration = Duration::from_secs(if cfg!(test) { 1 } else { 30 });

/// Why a container's files cannot be seen, or no more.
#[derive(Debug, Error)]
pub enum FilesError {
    /// The host has no FUSE.
    #[error("open {DEVICE}")]
    Device(#[source] io::Error),
    /// They cannot become the VMM's root.
    #[error("show files: {what}")]
    Root {
        /// What failed.
        what: &'static str,
        /// The cause.
        #[source]
        source: io::Error,
    },
    /// The device cannot be used.
    #[error("serve files")]
    Io(#[source] io::Error),
    /// The kernel says something else than expected.
    #[error("serve files: the kernel speaks no FUSE that is known here")]
    Kernel,
    /// The guest does not serve them.
    #[error("serve files")]
    Guest(#[from] GuestError),
    /// The guest does not dial.
    #[error("serve files: the guest does not dial")]
    Silent,
    /// The guest takes no more messages.
    #[error("serve files: the guest takes no message for {} s", DEADLINE.as_secs())]
    Stuck,
    /// A stream broke, or the guest does not follow the protocol.
    #[error("serve files")]
    Pump(#[from] PumpError),
    /// The guest ended a stream.
    #[error("serve files: the guest has ended the stream")]
    Ended,
    /// An answer that no FUSE server gives.
    #[error("serve files: the guest gave an answer that is none")]
    Answer,
}

impl FilesError {
    /// What no honest guest does.
    fn is_breach(&self) -> bool {
        match self {
            Self::Answer => true,
            Self::Pump(error) => error.is_breach(),
            _ => false,
        }
    }
}

/// Makes a container's files the root of its VMM.
///
/// # Errors
/// [`FilesError`]; the VMM's root is what it was, and nothing else suffers.
pub async fn show(pod: &Arc<Pod>, id: &ContainerId) -> Result<(), PodError> {
    let vmm = pod.vm.pid();
    let opened = blocking("show files", move || {
        let flags = OFlags::RDWR | OFlags::CLOEXEC | OFlags::NONBLOCK;
        let device = open(DEVICE, flags, Mode::empty()).map_err(|e| FilesError::Device(e.into()))?;
        let mount = root::mount(&device)?;
        Ok::<_, FilesError>((device, mount))
    });
    // Mounted first: until then the device tells nobody who waits for it.
    let (device, mount) = opened.await?;
    let files = Files::new(device)?;
    let (pod, id) = (pod.clone(), id.clone());
    let serving = tokio::spawn(async move {
        let end = tokio::select! {
            end = files.serve(&pod, &id) => end,
            // With the device goes the file system.
            () = pod.vm.gone() => return,
        };
        if let Err(e) = end {
            match &e {
                // So it is when the container ends.
                FilesError::Ended => tracing::debug!("container {id}: {}", crate::chain(&e)),
                _ => tracing::warn!("container {id}: {}", crate::chain(&e)),
            }
            if e.is_breach() {
                pod.conduct.breach(crate::chain(&e));
            }
        }
    });
    let shown = blocking("show files", move || root::show(mount, vmm)).await;
    if shown.is_err() {
        serving.abort();
    }
    shown
}

/// Questions that wait for an answer.
#[derive(Debug, Default)]
struct Pending {
    until: Mutex<HashMap<u64, Instant>>,
    more: Notify,
}

impl Pending {
    fn lock(&self) -> MutexGuard<'_, HashMap<u64, Instant>> {
        // No code panics while it holds the lock.
        self.until.lock().unwrap_or_else(PoisonError::into_inner)
    }

    fn add(&self, unique: u64) {
        self.lock().insert(unique, Instant::now() + DEADLINE);
        self.more.notify_one();
    }

    /// Whether there was such a question. Now there is none.
    fn take(&self, unique: u64) -> bool {
        self.lock().remove(&unique).is_some()
    }

    /// Takes those whose time is up, once there are some.
    async fn late(&self) -> Vec<u64> {
        loop {
            let first = self.lock().values().min().copied();
            let Some(first) = first else {
                self.more.notified().await;
                continue;
            };
            sleep_until(first).await;
            let now = Instant::now();
            let late: Vec<u64> = self.lock().extract_if(|_, until| *until <= now).map(|(unique, _)| unique).collect();
            if !late.is_empty() {
                return late;
            }
        }
    }
}

/// The host's end of the file system.
#[derive(Debug)]
struct Files {
    device: AsyncFd<OwnedFd>,
    pending: Pending,
}

impl Files {
    fn new(device: OwnedFd) -> Result<Self, FilesError> {
        #[expect(
            deprecated,
            reason = "the replacement is unsafe for types that may lend a wrong descriptor; OwnedFd cannot"
        )]
        let device = AsyncFd::with_interest(device, Interest::READABLE).map_err(FilesError::Io)?;
        Ok(Self { device, pending: Pending::default() })
    }

    /// Serves until the file system is unmounted, which is `Ok`, or the guest fails.
    async fn serve(&self, pod: &Pod, id: &ContainerId) -> Result<(), FilesError> {
        let Some(init) = self.read().await? else { return Ok(()) };
        self.write(&init.init_answer().ok_or(FilesError::Kernel)?);
        loop {
            let Some(first) = self.next().await? else { return Ok(()) };
            if first.kind() != Kind::Question {
                continue;
            }
            match dial(pod, id).await {
                Ok(streams) => return self.exchange(streams, init, first).await,
                // It has not been started, or has ended. The next question may find it running.
                Err(e) => {
                    tracing::debug!("container {id}: {}", crate::chain(&e));
                    self.write(&message::refusal(first.unique(), Errno::IO));
                }
            }
        }
    }

    /// Carries messages to the guest and answers back. The guest's server has not seen the first two yet.
    async fn exchange(&self, streams: Streams, mut init: Message, first: Message) -> Result<(), FilesError> {
        let (sender, source) = pipe::pipe().map_err(FilesError::Io)?;
        let (sink, answers) = tokio::io::duplex(FILES_MESSAGE);
        // Held: its end would be the end of the input.
        let (_open, closing) = watch::channel(false);
        init.bound();
        tokio::select! {
            end = self.ask(sender, [init, first]) => end,
            end = self.answer(answers) => end,
            end = self.expire() => end,
            end = pump_input(streams.input, source, closing) => end.map_err(Into::into).and(Err(FilesError::Ended)),
            end = pump_output(streams.output, sink) => end.map_err(Into::into).and(Err(FilesError::Ended)),
        }
    }

    /// The kernel's questions, to the guest.
    async fn ask(&self, mut guest: pipe::Sender, before: [Message; 2]) -> Result<(), FilesError> {
        for message in before {
            self.send(&mut guest, &message).await?;
        }
        while let Some(message) = self.next().await? {
            self.send(&mut guest, &message).await?;
        }
        Ok(())
    }

    async fn send(&self, guest: &mut pipe::Sender, message: &Message) -> Result<(), FilesError> {
        match message.kind() {
            Kind::Question => self.pending.add(message.unique()),
            // The answer to the first message finds nobody who has asked, as it should.
            Kind::Init | Kind::Note => {}
            Kind::Interrupt => return Ok(()),
        }
        let sent = timeout(DEADLINE, guest.write_all(message.bytes())).await;
        sent.map_err(|_| FilesError::Stuck)?.map_err(FilesError::Io)
    }

    /// The guest's answers, to the kernel.
    async fn answer(&self, mut guest: DuplexStream) -> Result<(), FilesError> {
        loop {
            let mut header = [0; ANSWER_HEADER];
            guest.read_exact(&mut header).await.map_err(|_| FilesError::Ended)?;
            let (length, unique) = message::answer(&header).ok_or(FilesError::Answer)?;
            let mut bytes = header.to_vec();
            bytes.resize(length, 0);
            guest.read_exact(&mut bytes[ANSWER_HEADER..]).await.map_err(|_| FilesError::Ended)?;
            // What comes too late has been answered already.
            if self.pending.take(unique) && !self.write(&bytes) {
                self.write(&message::refusal(unique, Errno::IO));
            }
        }
    }

    /// Answers for the guest what it does not answer.
    async fn expire(&self) -> Result<(), FilesError> {
        loop {
            for unique in self.pending.late().await {
                self.write(&message::refusal(unique, Errno::IO));
            }
        }
    }

    /// The next message that the shim does not answer itself; `None` when the file system is unmounted.
    async fn next(&self) -> Result<Option<Message>, FilesError> {
        loop {
            match self.read().await? {
                Some(message) => match message.proc_answer() {
                    Some(answer) => drop(self.write(&answer)),
                    None => return Ok(Some(message)),
                },
                None => return Ok(None),
            }
        }
    }

    async fn read(&self) -> Result<Option<Message>, FilesError> {
        loop {
            let mut guard = self.device.readable().await.map_err(FilesError::Io)?;
            let mut bytes = vec![0; FILES_MESSAGE];
            match guard.try_io(|device| Ok(rustix::io::read(device, &mut bytes)?)) {
                Ok(Ok(length)) => {
                    bytes.truncate(length);
                    return Message::new(bytes).map(Some).ok_or(FilesError::Kernel);
                }
                Ok(Err(error)) => match Errno::from_io_error(&error) {
                    Some(Errno::NODEV) => return Ok(None),
                    // Whoever asked has gone before it was read.
                    Some(Errno::NOENT | Errno::INTR) => {}
                    _ => return Err(FilesError::Io(error)),
                },
                Err(_would_block) => {}
            }
        }
    }

    /// Whether the kernel takes the answer. It never makes anybody wait; one whose question is gone is not missed.
    fn write(&self, answer: &[u8]) -> bool {
        rustix::io::write(&self.device, answer).is_ok()
    }
}

struct Streams {
    input: UnixStream,
    output: UnixStream,
}

/// Has the guest serve.
async fn dial(pod: &Pod, id: &ContainerId) -> Result<Streams, FilesError> {
    let (mut input, mut output) =
        (pod.hub.expect().map_err(FilesError::Io)?, pod.hub.expect().map_err(FilesError::Io)?);
    pod.guest.files(id, input.id(), output.id()).await?;
    // They were dialled before the guest answered.
    match tokio::join!(input.dialled(), output.dialled()) {
        (Some(input), Some(output)) => Ok(Streams { input, output }),
        _ => Err(FilesError::Silent),
    }
}
