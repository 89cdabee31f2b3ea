//! What happened in the guest, numbered, until the host has taken note of it.
//!
//! ```text
//!  push ─► [ n+1 n+2 … ] ─► after(n) answers, or waits while there is nothing
//!             ▲ forgotten once the host asks for what comes after it
//! ```
//!
//! Nothing is ever dropped: instead a caller checks [`EventLog::is_full`] before it starts what will cause an event.

use std::collections::VecDeque;
use std::sync::Mutex;

use nacelle_protocol::agent::{Event, event::What};
use tokio::sync::Notify;

/// Events that may wait for the host before nothing new is started.
const FULL: usize = 16 * 1024;

/// Events in one answer.
const BATCH: usize = 512;

/// The events that the host has not yet acknowledged.
#[derive(Default)]
pub struct EventLog {
    inner: Mutex<Inner>,
    arrived: Notify,
}

#[derive(Default)]
struct Inner {
    /// Number of the newest event.
    newest: u64,
    waiting: VecDeque<Event>,
}

impl EventLog {
    /// Appends an event.
    pub fn push(&self, what: What) {
        let mut inner = self.lock();
        inner.newest += 1;
        let number = inner.newest;
        inner.waiting.push_back(Event { number, what: Some(what), ..Default::default() });
        drop(inner);
        self.arrived.notify_waiters();
    }

    /// Whether the host has fallen so far behind that nothing new may be started.
    pub fn is_full(&self) -> bool {
        self.lock().waiting.len() >= FULL
    }

    /// Forgets the events up to `number`, and returns those above it as soon as there is one.
    pub async fn after(&self, number: u64) -> Vec<Event> {
        loop {
            let arrived = self.arrived.notified();
            tokio::pin!(arrived);
            // Registered before the look, so that nothing slips in between.
            arrived.as_mut().enable();
            let batch = self.take(number);
            if !batch.is_empty() {
                return batch;
            }
            arrived.await;
        }
    }

    fn take(&self, number: u64) -> Vec<Event> {
        let mut inner = self.lock();
        while inner.waiting.front().is_some_and(|event| event.number <= number) {
            inner.waiting.pop_front();
        }
        inner.waiting.iter().take(BATCH).cloned().collect()
    }

    fn lock(&self) -> std::sync::MutexGuard<'_, Inner> {
        self.inner.lock().expect("nothing panics while it holds the event log")
    }
}

#[cfg(test)]
mod tests {
    use super::*;
    use nacelle_protocol::agent::Oom;

    fn oom(id: &str) -> What {
        What::Oom(Oom { container_id: id.into(), ..Default::default() })
    }

    #[tokio::test]
    async fn numbers_have_no_gaps_and_acknowledged_events_are_forgotten() {
        let log = EventLog::default();
        for id in ["a", "b", "c"] {
            log.push(oom(id));
        }
        let numbers = |events: Vec<Event>| events.iter().map(|e| e.number).collect::<Vec<_>>();
        assert_eq!(numbers(log.after(0).await), [1, 2, 3]);
        assert_eq!(numbers(log.after(0).await), [1, 2, 3], "not acknowledged, so still there");
        assert_eq!(numbers(log.after(2).await), [3]);
        assert_eq!(numbers(log.after(0).await), [3]);
    }

    #[tokio::test]
    async fn waits_for_the_next_event() {
        let log = std::sync::Arc::new(EventLog::default());
        let waiter = tokio::spawn({
            let log = log.clone();
            async move { log.after(0).await }
        });
        tokio::task::yield_now().await;
        assert!(!waiter.is_finished());
        log.push(oom("a"));
        assert_eq!(waiter.await.expect("joined").len(), 1);
    }

    #[test]
    fn fills_up() {
        let log = EventLog::default();
        for _ in 0..FULL {
            assert!(!log.is_full());
            log.push(oom("a"));
        }
        assert!(log.is_full());
    }
}
