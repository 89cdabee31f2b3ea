//! The log of the process: lines on descriptor 2, which the shim reads.
//!
//! libkrun tells the reason of a failure only here, so the last error is kept for the [`crate::report`]. Some lines are
//! provoked by the guest: each is one write of bounded length, and control characters do not get through.

use std::fmt::Write as _;
use std::io::Write as _;
use std::sync::{Mutex, PoisonError};

use log::{Level, LevelFilter, Log, Metadata, Record};

/// Longest line, in bytes: a write to a pipe is atomic up to `PIPE_BUF`, 4096.
const MAX_LINE: usize = 1024;

static LOGGER: Logger = Logger { last_error: Mutex::new(None) };

struct Logger {
    last_error: Mutex<Option<String>>,
}

/// Starts logging. A second call changes nothing.
pub fn init() {
    if log::set_logger(&LOGGER).is_ok() {
        log::set_max_level(LevelFilter::Info);
    }
}

/// The last error that was logged.
pub fn last_error() -> Option<String> {
    LOGGER.last_error.lock().unwrap_or_else(PoisonError::into_inner).clone()
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
        let mut line = String::with_capacity(text.len() + 64);
        // Writing to a String cannot fail.
        let _ = writeln!(line, "{} {}: {text}", record.level().as_str().to_ascii_lowercase(), record.target());
        if record.level() == Level::Error {
            *self.last_error.lock().unwrap_or_else(PoisonError::into_inner) = Some(text);
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
    fn a_line_is_one_line() {
        assert_eq!(one_line("a\nb\x1b[2J\r\n"), "a b [2J");
        let long = one_line(&"ä".repeat(MAX_LINE));
        assert!(long.len() <= MAX_LINE && long.len() > MAX_LINE - 2);
    }
}
