//! PID 1 waits for every process of the guest, and tells those who asked.
//!
//! ```text
//!  SIGCHLD ─► waitpid … ─┬─ watched ─────────────► its receiver
//!                        ├─ unknown, a start is in flight ─► kept: its pid may be reported in a moment
//!                        └─ unknown ─────────────► an orphan of some container, forgotten
//! ```
//!
//! A pid is signalled through the reaper only, and only while it is watched: under the same lock that guards the
//! waiting, so a signal never meets a pid that the kernel has given away again.

use std::collections::HashMap;
use std::sync::{Arc, Mutex};
use std::time::{SystemTime, UNIX_EPOCH};

use rustix::io::Errno;
use rustix::process::{Pid, Signal, WaitOptions, WaitStatus};
use tokio::signal::unix::{SignalKind, signal};
use tokio::sync::oneshot;

/// How and when a process ended.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub struct Ended {
    /// As a shell says it: the exit code, or 128 plus the number of the signal.
    pub status: u32,
    /// Guest's clock, nanoseconds since 1970.
    pub at_ns: i64,
}

impl Ended {
    /// An end at this moment.
    pub fn now(status: u32) -> Self {
        Self { status, at_ns: now_ns() }
    }
}

/// The guest's clock, nanoseconds since 1970.
pub fn now_ns() -> i64 {
    let since = SystemTime::now().duration_since(UNIX_EPOCH).unwrap_or_default();
    i64::try_from(since.as_nanos()).unwrap_or(i64::MAX)
}

/// The table of processes that somebody waits for.
#[derive(Default)]
pub struct Reaper {
    inner: Mutex<Inner>,
}

#[derive(Default)]
struct Inner {
    watched: HashMap<u32, oneshot::Sender<Ended>>,
    /// Starts whose pid is not known yet.
    starts: usize,
    /// Ends of unknown processes, kept while `starts` is not zero.
    early: HashMap<u32, Ended>,
}

/// While it lives, no end of a process is forgotten.
pub struct Start {
    reaper: Arc<Reaper>,
}

impl Start {
    /// Waits for a process that this start made, also if it has ended already.
    pub fn watch(&self, pid: u32) -> oneshot::Receiver<Ended> {
        let (sender, receiver) = oneshot::channel();
        let mut inner = self.reaper.lock();
        match inner.early.remove(&pid) {
            // The receiver is in our hands, so this cannot fail.
            Some(ended) => drop(sender.send(ended)),
            None => drop(inner.watched.insert(pid, sender)),
        }
        receiver
    }
}

impl Drop for Start {
    fn drop(&mut self) {
        let mut inner = self.reaper.lock();
        inner.starts -= 1;
        if inner.starts == 0 {
            inner.early = HashMap::new();
        }
    }
}

impl Reaper {
    /// Announces that processes will appear whose pids are reported later.
    pub fn start(self: &Arc<Self>) -> Start {
        self.lock().starts += 1;
        Start { reaper: self.clone() }
    }

    /// Sends a signal to a process that is watched; false when it has ended.
    ///
    /// # Errors
    /// What kill(2) says, ESRCH aside.
    pub fn signal(&self, pid: u32, signal: Signal) -> Result<bool, Errno> {
        let inner = self.lock();
        if !inner.watched.contains_key(&pid) {
            return Ok(false);
        }
        let Some(pid) = i32::try_from(pid).ok().and_then(Pid::from_raw) else { return Ok(false) };
        match rustix::process::kill_process(pid, signal) {
            Ok(()) => Ok(true),
            Err(Errno::SRCH) => Ok(false),
            Err(error) => Err(error),
        }
    }

    /// Waits for every child, for ever.
    ///
    /// # Errors
    /// When no handler for SIGCHLD can be installed.
    pub async fn run(self: Arc<Self>) -> std::io::Result<()> {
        let mut children = signal(SignalKind::child())?;
        loop {
            // First, because children may have ended before the handler was there.
            self.reap();
            if children.recv().await.is_none() {
                return Ok(());
            }
        }
    }

    fn reap(&self) {
        let mut inner = self.lock();
        while let Ok(Some((pid, status))) = rustix::process::wait(WaitOptions::NOHANG) {
            let Some(status) = shell_status(status) else { continue };
            let ended = Ended::now(status);
            let pid = pid.as_raw_nonzero().get().unsigned_abs();
            match inner.watched.remove(&pid) {
                // Whoever watched may have lost interest.
                Some(watcher) => drop(watcher.send(ended)),
                None if inner.starts > 0 => drop(inner.early.insert(pid, ended)),
                None => {}
            }
        }
    }

    fn lock(&self) -> std::sync::MutexGuard<'_, Inner> {
        self.inner.lock().expect("nothing panics while it holds the process table")
    }
}

fn shell_status(status: WaitStatus) -> Option<u32> {
    let code = status.exit_status().or_else(|| status.terminating_signal().map(|signal| 128 + signal))?;
    u32::try_from(code).ok()
}
