//! The last words of a pipe that is always read: what the VMM logs, and what the guest's console says.
//!
//! What it keeps is bounded, and so is how much it reads a second, because the guest decides how much there is and the
//! shim's time is not the pod's. A guest that floods its console waits for it; nobody else does.

use std::collections::VecDeque;
use std::sync::{Arc, Mutex, PoisonError};
use std::time::Duration;

use tokio::io::AsyncReadExt;
use tokio::net::unix::pipe;
use tokio::time::Instant;

/// Bytes that are kept.
const KEPT: usize = 64 << 10;
/// Bytes that are read in each [`PERIOD`] before the rest has to wait: far more than a kernel says while it boots.
const QUOTA: usize = 1 << 20;
const PERIOD: Duration = Duration::from_secs(1);

/// The end of what came through a pipe so far.
#[derive(Clone, Debug, Default)]
pub struct Tail(Arc<Mutex<VecDeque<u8>>>);

impl Tail {
    /// Reads the pipe to its end, in the background. `what` names it in the log, where its lines go at debug level.
    pub fn of(mut pipe: pipe::Receiver, what: &'static str) -> Self {
        let tail = Self::default();
        let copy = tail.clone();
        tokio::spawn(async move {
            let mut chunk = vec![0; 4096];
            let (mut begin, mut taken) = (Instant::now(), 0);
            loop {
                if taken >= QUOTA {
                    tokio::time::sleep_until(begin + PERIOD).await;
                }
                if begin.elapsed() >= PERIOD {
                    (begin, taken) = (Instant::now(), 0);
                }
                match pipe.read(&mut chunk).await {
                    Ok(0) => return,
                    Err(e) => return tracing::warn!("read {what}: {e}"),
                    Ok(n) => {
                        taken += n;
                        copy.push(&chunk[..n]);
                        tracing::debug!("{what}: {}", printable(&chunk[..n]));
                    }
                }
            }
        });
        tail
    }

    fn push(&self, bytes: &[u8]) {
        let mut kept = self.0.lock().unwrap_or_else(PoisonError::into_inner);
        kept.extend(bytes);
        let excess = kept.len().saturating_sub(KEPT);
        kept.drain(..excess);
    }

    /// The last lines, at most `bytes` long, fit for one line of a log.
    pub fn last(&self, bytes: usize) -> String {
        let kept = self.0.lock().unwrap_or_else(PoisonError::into_inner);
        let skip = kept.len().saturating_sub(bytes);
        let bytes: Vec<u8> = kept.iter().skip(skip).copied().collect();
        printable(&bytes)
    }
}

/// A guest's bytes must not draw on somebody's terminal.
fn printable(bytes: &[u8]) -> String {
    let text = String::from_utf8_lossy(bytes);
    let lines = text.lines().map(str::trim).filter(|line| !line.is_empty());
    let joined = lines.collect::<Vec<_>>().join(" | ");
    joined.chars().filter(|c| !c.is_control()).collect()
}

#[cfg(test)]
mod tests {
    use super::*;

    #[tokio::test]
    async fn a_flood_waits() {
        let (writer, reader) = pipe::pipe().expect("pipe");
        let tail = Tail::of(reader, "test");
        let flood = async {
            let mut written = 0;
            loop {
                writer.writable().await.expect("open");
                written += writer.try_write(&[b'x'; 65536]).unwrap_or(0);
                if written > 4 * QUOTA {
                    return;
                }
            }
        };
        let most = Duration::from_millis(1500);
        assert!(tokio::time::timeout(most, flood).await.is_err(), "four seconds' worth takes longer");
        assert_eq!(tail.last(3), "xxx");
    }

    #[test]
    fn keeps_the_end_and_nothing_that_draws() {
        let tail = Tail::default();
        for n in 0..20_000u32 {
            tail.push(format!("line {n}\n").as_bytes());
        }
        assert_eq!(tail.0.lock().expect("lock").len(), KEPT);
        tail.push(b"\x1b[31mred\r\n\xff\n");
        let last = tail.last(32);
        assert!(last.ends_with("line 19999 | [31mred | \u{fffd}"), "{last:?}");
    }
}
