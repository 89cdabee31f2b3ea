//! What is held against a guest, and when it is enough.
//!
//! ```text
//!  breach   what no honest agent does: a frame that is none, bytes beyond the credit, an answer nobody asked for
//!           ─────────────────────────────────────────────────────────────────────────────► verdict
//!  strike   what a race may excuse now and then: a connection that is refused, an exit that cannot be
//!           ──► level, one less each second ── more than TOLERATED at once ──────────────► verdict
//! ```
//!
//! The verdict is one sentence and is given once; [`crate::driver`] ends the pod for it. So a guest that misbehaves
//! costs the host at most a burst of [`TOLERATED`] lines in a log, and its own pod.

use std::sync::{Mutex, PoisonError};
use std::time::{Duration, Instant};

use tokio::sync::watch;

/// Strikes that may come at once, and one more each `PARDON`.
pub const TOLERATED: u32 = 256;
const PARDON: Duration = Duration::from_secs(1);

/// A guest's record.
#[derive(Debug)]
pub struct Conduct {
    strikes: Mutex<Strikes>,
    verdict: watch::Sender<Option<String>>,
}

#[derive(Debug)]
struct Strikes {
    level: u32,
    since: Instant,
}

impl Default for Conduct {
    fn default() -> Self {
        let strikes = Mutex::new(Strikes { level: 0, since: Instant::now() });
        Self { strikes, verdict: watch::Sender::new(None) }
    }
}

impl Strikes {
    /// Takes one strike at `now`; false when it was one too many.
    fn take(&mut self, now: Instant) -> bool {
        let pardoned = now.duration_since(self.since).as_secs() / PARDON.as_secs();
        if pardoned > 0 {
            self.level = self.level.saturating_sub(u32::try_from(pardoned).unwrap_or(u32::MAX));
            self.since = now;
        }
        self.level = self.level.saturating_add(1);
        self.level <= TOLERATED
    }
}

impl Conduct {
    /// The guest did what cannot be innocent. The first one counts.
    pub fn breach(&self, what: impl Into<String>) {
        self.verdict.send_if_modified(|verdict| {
            let first = verdict.is_none();
            if first {
                let what = what.into();
                tracing::error!("the guest breaks the rules: {what}");
                *verdict = Some(what);
            }
            first
        });
    }

    /// The guest did what may happen once.
    pub fn strike(&self, what: &str) {
        // Nothing panics while it holds the lock.
        let tolerated = self.strikes.lock().unwrap_or_else(PoisonError::into_inner).take(Instant::now());
        if tolerated {
            tracing::warn!("{what}");
        } else {
            self.breach(format!("{what}, and that too often"));
        }
    }

    /// What the guest has done, once it is enough.
    pub fn verdict(&self) -> Option<String> {
        self.verdict.borrow().clone()
    }

    /// Waits until it is enough, perhaps for ever.
    pub async fn condemned(&self) -> String {
        let mut verdict = self.verdict.subscribe();
        let why = verdict.wait_for(Option::is_some).await.ok().and_then(|why| why.clone());
        match why {
            Some(why) => why,
            // The sender is `self`.
            None => std::future::pending().await,
        }
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[tokio::test]
    async fn the_first_breach_is_the_verdict() {
        let conduct = Conduct::default();
        assert_eq!(conduct.verdict(), None);
        conduct.breach("it lied");
        conduct.breach("it lied again");
        assert_eq!(conduct.condemned().await, "it lied");
    }

    #[test]
    fn strikes_are_pardoned_one_a_second() {
        let start = Instant::now();
        let mut strikes = Strikes { level: 0, since: start };
        for _ in 0..TOLERATED {
            assert!(strikes.take(start));
        }
        assert!(!strikes.take(start), "one too many");
        let later = start + Duration::from_secs(2 + u64::from(TOLERATED));
        assert!(strikes.take(later), "long ago");
        // One a second can go on for ever.
        assert!((1..100_000).all(|second| strikes.take(later + Duration::from_secs(second))));
    }
}
