//! What the process tells the shim: one [`Report`] a line, each a single write, so that a line is never torn.

use std::error::Error;
use std::fs::File;
use std::io::{self, Write};
use std::sync::OnceLock;

use nacelle_protocol::vm::Report;

use crate::log::one_line;

/// The report pipe, for the panic hook too: a panic can come from any of libkrun's threads.
static PIPE: OnceLock<File> = OnceLock::new();

/// Exit status after a failure that was reported.
pub const EXIT_FAILED: i32 = 1;

/// Gives the report pipe to this module, and makes every panic a [`Report::Failed`] that ends the process.
///
/// A panic in a process that is PID 1 of its namespace must not be left to `abort`, whose signal the kernel ignores
/// there: the process leaves by `exit`.
pub fn init(pipe: File, exit: fn(i32) -> !) {
    // The first pipe stays: there is one per process.
    let _ = PIPE.set(pipe);
    std::panic::set_hook(Box::new(move |info| {
        let place = info.location().map(|l| format!("{}:{}", l.file(), l.line())).unwrap_or_default();
        let what = info.payload_as_str().unwrap_or("panic");
        log::error!("panic at {place}: {what}");
        send(&Report::Failed {
            stage: "panic".into(),
            errno: None,
            message: one_line(&format!("{what} (at {place})")),
        });
        exit(EXIT_FAILED);
    }));
}

/// Sends a report. A shim that is gone is no error here: the lifeline takes care of it.
pub fn send(report: &Report) {
    let Some(mut pipe) = PIPE.get() else { return };
    // A Report is plain data, so it always has a JSON form.
    if let Ok(mut line) = serde_json::to_vec(report) {
        line.push(b'\n');
        let _ = pipe.write_all(&line);
    }
}

/// Sends the report that a layer of the jail is less than it could be.
pub fn degraded(stage: &str, message: &str) {
    send(&Report::Degraded { stage: stage.into(), message: message.into() });
}

/// Sends the report of a system call that the filter refused, with the call's first arguments. It is called in a signal
/// handler, so it neither allocates nor locks.
pub fn refused(call: i32, [first, second, third]: [u64; 3]) {
    let Some(mut pipe) = PIPE.get() else { return };
    let mut line = [0; 256];
    let mut rest = line.as_mut_slice();
    let _ = writeln!(
        rest,
        "{{\"report\":\"failed\",\"stage\":\"seccomp\",\"errno\":null,\
         \"message\":\"make system call {call} with {first:#x}, {second:#x}, {third:#x}: the filter refuses it\"}}"
    );
    let free = rest.len();
    let _ = pipe.write_all(&line[..256 - free]);
}

/// The report of a failure: the error with its causes, and the system's error number where one is among them.
pub fn failed(stage: &str, error: &(dyn Error + 'static)) -> Report {
    let mut message = String::new();
    let mut errno = None;
    let mut next = Some(error);
    while let Some(cause) = next {
        if !message.is_empty() {
            message.push_str(": ");
        }
        message.push_str(&cause.to_string());
        errno = errno.or_else(|| cause.downcast_ref::<io::Error>().and_then(io::Error::raw_os_error));
        next = cause.source();
    }
    Report::Failed { stage: stage.into(), errno, message: one_line(&message) }
}

#[cfg(test)]
mod tests {
    use thiserror::Error;

    use super::*;

    #[test]
    fn a_refused_call_is_a_report() {
        let (mut reader, writer) = io::pipe().expect("pipe");
        // The one pipe of this process; no other test sends.
        let _ = PIPE.set(File::from(std::os::fd::OwnedFd::from(writer)));
        refused(i32::MAX, [u64::MAX; 3]);
        let mut line = [0; 512];
        let len = io::Read::read(&mut reader, &mut line).expect("read");
        let Report::Failed { stage, message, .. } = serde_json::from_slice(&line[..len]).expect("a whole line") else {
            panic!("failed")
        };
        assert_eq!(stage, "seccomp");
        let all = "0xffffffffffffffff";
        assert_eq!(message, format!("make system call 2147483647 with {all}, {all}, {all}: the filter refuses it"));
    }

    #[derive(Debug, Error)]
    #[error("open {0}")]
    struct Open(&'static str, #[source] io::Error);

    #[test]
    fn a_failure_carries_its_causes() {
        let error = Open("/x", io::Error::from_raw_os_error(2));
        let Report::Failed { stage, errno, message } = failed("kernel", &error) else { panic!("failed") };
        assert_eq!((stage.as_str(), errno), ("kernel", Some(2)));
        assert!(message.starts_with("open /x: No such file or directory"), "{message}");
    }
}
