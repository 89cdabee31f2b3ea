//! The log of the process: lines on descriptor 2, which the shim reads.
//!
//! libkrun tells the reason of a failure only here, so the last error is kept for the [`crate::report`]. Some lines are
//! provoked by the guest, as many as it likes: each is one write of bounded length without control characters, and only
//! so many are written in a while.

use std::fmt::Write as _;
use std::io::Write as _;
use std::sync::{Mutex, MutexGuard, PoisonError};
use std::time::{Duration, Instant};

use log::{Level, LevelFilter, Log, Metadata, Record};

/// Longest line, in bytes: a write to a pipe is atomic up to `PIPE_BUF`, 4096.
const MAX_LINE: usize = 1024;

/// Lines that are written in one [`WINDOW`].
const MAX_LINES: u32 = 100;

/// How long the limit of lines holds before it starts anew.
const WINDOW: Duration = Duration::from_secs(10);

static LOGGER: Logger = Logger { state: Mutex::new(State { last_error: None, window: None, lines: 0, dropped: 0 }) };

struct Logger {
    state: Mutex<State>,
}

struct State {
    last_error: Option<String>,
    /// Start of the window, from the first line on.
    window: Option<Instant>,
    lines: u32,
    dropped: u64,
}

impl State {
    /// Counts a line. `None`: it must not be written; else how many were dropped before it.
    fn admit(&mut self, now: Instant) -> Option<u64> {
        if self.window.is_none_or(|start| now.duration_since(start) >= WINDOW) {
            (self.window, self.lines) = (Some(now), 0);
        }
        if self.lines >= MAX_LINES {
            self.dropped = self.dropped.saturating_add(1);
            return None;
        }
        self.lines += 1;
        Some(std::mem::take(&mut self.dropped))
    }
}

/// Starts logging. A second call changes nothing.
pub fn init() {
    if log::set_logger(&LOGGER).is_ok() {
        log::set_max_level(LevelFilter::Info);
    }
}

/// The last error that was logged.
pub fn last_error() -> Option<String> {
    LOGGER.state().last_error.clone()
}

impl Logger {
    fn state(&self) -> MutexGuard<'_, State> {
        // A line that panicked has left nothing half-changed.
        self.state.lock().unwrap_or_else(PoisonError::into_inner)
    }
}

impl Log for Logger {
    fn enabled(&self, metadata: &Metadata<'_>) -> bool {
        // The devices tell of every connection that the guest closes.
        let devices = metadata.target().starts_with("devices") || metadata.target().starts_with("krun_devices");
        metadata.level() <= if devices { Level::Warn } else { Level::Info }
    }

    fn log(&self, record: &Record<'_>) {
        if !self.enabled(record.metadata()) {
            return;
        }
        let text = one_line(&record.args().to_string());
        let mut state = self.state();
        let dropped = state.admit(Instant::now());
        let mut line = String::with_capacity(text.len() + 128);
        // Writing to a String cannot fail.
        let _ = writeln!(line, "{} {}: {text}", record.level().as_str().to_ascii_lowercase(), record.target());
        if record.level() == Level::Error {
            state.last_error = Some(text);
        }
        drop(state);
        match dropped {
            None => return,
            Some(0) => {}
            Some(count) => line.insert_str(0, &format!("warn {}: {count} lines were dropped\n", module_path!())),
        }
        // There is nowhere to complain about a log that is gone.
        let _ = std::io::stderr().write_all(line.as_bytes());
    }

    fn flush(&self) {}
}

/// `text` without control characters, and no longer than a line may be.
pub fn one_line(text: &str) -> String {
    let mut out = String::with_capacity(text.len().min(MAX_LINE));
    for c in text.trim_end().chars() {
        let c = if c.is_control() { ' ' } else { c };
        if out.len() + c.len_utf8() > MAX_LINE {
            break;
        }
        out.push(c);
    }
    out
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn a_flood_is_dropped_and_counted() {
        let mut state = State { last_error: None, window: None, lines: 0, dropped: 0 };
        let start = Instant::now();
        assert!((0..MAX_LINES).all(|_| state.admit(start) == Some(0)));
        assert_eq!(state.admit(start), None);
        assert_eq!(state.admit(start + WINDOW / 2), None);
        assert_eq!(state.admit(start + WINDOW), Some(2));
        assert_eq!(state.admit(start + WINDOW), Some(0));
    }

    #[test]
    fn a_line_is_one_line() {
        assert_eq!(one_line("a\nb\x1b[2J\r\n"), "a b [2J");
        let long = one_line(&"ä".repeat(MAX_LINE));
        assert!(long.len() <= MAX_LINE && long.len() > MAX_LINE - 2);
    }
}
