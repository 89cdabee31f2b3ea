//! The agent's second role: one libcontainer operation in a process of its own.
//!
//! ```text
//!  agent ── argv[0] = nacelle-runner, argv[1] = a Job as JSON in a file ──► runner
//!           descriptors 0 to 2: those of the container's process
//!           descriptor 3: pipe to the agent, one Line as JSON a line
//!
//!  create:  Log* NotExecuted? (Created | Failed), then from the container's own process, at Start:  NotExecuted | end of file
//!  exec:    Log* NotExecuted? (Created | Failed)
//! ```
//!
//! The runner exits as soon as it has reported, which makes the container's process a child of PID 1. A runner that is
//! killed reports nothing: the agent sees it end.

use std::fmt::Write as _;
use std::fs::File;
use std::io::{self, Write as _};
use std::path::{Path, PathBuf};
use std::process::ExitCode;
use std::sync::Arc;

use libcontainer::container::builder::ContainerBuilder;
use libcontainer::error::LibcontainerError;
use libcontainer::syscall::syscall::SyscallType;
use serde::{Deserialize, Serialize};
use thiserror::Error;
use tracing::field::{Field, Visit};
use tracing::span;
use tracing::{Event, Level, Metadata, Subscriber};

use crate::console::chain;
use crate::executor::LastSteps;
use crate::spec::Execute;

/// `argv[0]` of a runner.
pub const NAME: &str = "nacelle-runner";

/// Descriptor of the pipe to the agent.
pub const REPORT_FD: i32 = 3;

/// Longest text in a [`Line`], in bytes, so that a line is one atomic write to the pipe.
const MAX_TEXT: usize = 1024;

/// What a runner is to do.
#[derive(Debug, Serialize, Deserialize)]
pub struct Job {
    /// The container.
    pub id: String,
    /// libcontainer's directory of containers; it holds a directory of the container's name.
    pub state: PathBuf,
    /// UNIX socket that takes the master of a terminal.
    pub console: Option<PathBuf>,
    /// The operation.
    pub operation: Operation,
    /// The last steps towards the program.
    pub execute: Execute,
}

/// One libcontainer operation.
#[derive(Debug, Serialize, Deserialize)]
#[serde(rename_all = "kebab-case")]
pub enum Operation {
    /// Create the container whose config.json is in this directory.
    Create {
        /// The directory.
        bundle: PathBuf,
    },
    /// Start the OCI process in this file in a container that runs.
    Exec {
        /// The file.
        process: PathBuf,
    },
}

/// What a runner, or the process it made, tells the agent.
#[derive(Debug, PartialEq, Eq, Serialize, Deserialize)]
#[serde(rename_all = "kebab-case")]
pub enum Line {
    /// The operation is done; the process has this id.
    Created(i32),
    /// The operation failed.
    Failed(String),
    /// libcontainer complained: the detail behind a failure that may follow.
    Log(String),
    /// The program could not be executed, and its process exits with `code`.
    NotExecuted {
        /// Exit code: 127 no such program, 126 it cannot be executed, 1 otherwise.
        code: i32,
        /// Why not.
        text: String,
    },
}

#[derive(Debug, Error)]
enum RunnerError {
    #[error("read job {path}")]
    Job {
        path: PathBuf,
        #[source]
        source: io::Error,
    },
    #[error("open user namespace of the pod")]
    Users(#[source] io::Error),
    #[error("run container")]
    Container(#[from] LibcontainerError),
}

/// Writes lines to the agent.
#[derive(Clone)]
pub struct Reporter {
    pipe: Arc<File>,
}

impl Reporter {
    fn inherited() -> io::Result<Self> {
        // Opened anew, because taking over a bare number is nothing that can be checked.
        let pipe = File::options().write(true).open(format!("/proc/self/fd/{REPORT_FD}"))?;
        Ok(Self { pipe: Arc::new(pipe) })
    }

    /// Sends a line. If the agent is gone, so is the guest.
    pub fn send(&self, line: &Line) {
        let cut = |text: &String| text.chars().take(MAX_TEXT / 4).collect::<String>();
        let short = match line {
            Line::Failed(text) if text.len() > MAX_TEXT => &Line::Failed(cut(text)),
            Line::Log(text) if text.len() > MAX_TEXT => &Line::Log(cut(text)),
            Line::NotExecuted { code, text } if text.len() > MAX_TEXT => {
                &Line::NotExecuted { code: *code, text: cut(text) }
            }
            short => short,
        };
        if let Ok(mut bytes) = serde_json::to_vec(short) {
            bytes.push(b'\n');
            let _ = (&*self.pipe).write_all(&bytes);
        }
    }
}

/// The runner's `main`.
pub fn main(job: Option<&Path>) -> ExitCode {
    // Rust ignores SIGPIPE, and an ignored signal stays ignored in the container's program.
    sigpipe::reset();
    let Ok(reporter) = Reporter::inherited() else { return ExitCode::FAILURE };
    // There is one subscriber, and it is this one.
    let _ = tracing::subscriber::set_global_default(Complaints(reporter.clone()));
    match run(job.unwrap_or(Path::new("")), &reporter) {
        Ok(pid) => {
            reporter.send(&Line::Created(pid));
            ExitCode::SUCCESS
        }
        Err(error) => {
            reporter.send(&Line::Failed(chain(&error)));
            ExitCode::FAILURE
        }
    }
}

fn run(path: &Path, reporter: &Reporter) -> Result<i32, RunnerError> {
    let job_error = |source| RunnerError::Job { path: path.to_owned(), source };
    let bytes = std::fs::read(path).map_err(job_error)?;
    let job: Job = serde_json::from_slice(&bytes).map_err(|error| job_error(error.into()))?;
    let builder = ContainerBuilder::new(job.id, SyscallType::default())
        .with_root_path(job.state)?
        .with_console_socket(job.console)
        .with_executor(LastSteps::new(job.execute, reporter.clone()).map_err(RunnerError::Users)?);
    let pid = match job.operation {
        Operation::Create { bundle } => {
            let container = builder.as_init(bundle).with_systemd(false).with_detach(true).build()?;
            container.pid().ok_or(LibcontainerError::Other("no process".into()))?
        }
        Operation::Exec { process } => builder.as_tenant().with_detach(true).with_process(Some(process)).build()?,
    };
    Ok(pid.as_raw())
}

/// Passes libcontainer's complaints on: its errors cross processes as text that has lost its causes.
struct Complaints(Reporter);

impl Subscriber for Complaints {
    fn enabled(&self, metadata: &Metadata<'_>) -> bool {
        metadata.is_event() && *metadata.level() == Level::ERROR
    }

    fn event(&self, event: &Event<'_>) {
        let mut text = Text(String::new());
        event.record(&mut text);
        self.0.send(&Line::Log(text.0));
    }

    fn new_span(&self, _: &span::Attributes<'_>) -> span::Id {
        span::Id::from_u64(1)
    }

    fn record(&self, _: &span::Id, _: &span::Record<'_>) {}
    fn record_follows_from(&self, _: &span::Id, _: &span::Id) {}
    fn enter(&self, _: &span::Id) {}
    fn exit(&self, _: &span::Id) {}
}

struct Text(String);

impl Visit for Text {
    fn record_debug(&mut self, field: &Field, value: &dyn std::fmt::Debug) {
        // Writing to a string cannot fail.
        let _ = match field.name() {
            "message" => write!(self.0, "{value:?} "),
            name => write!(self.0, "{name}={value:?} "),
        };
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn a_line_is_one_atomic_write() {
        let (read, write) = crate::fd::pipe().expect("pipe");
        let reporter = Reporter { pipe: Arc::new(write.into()) };
        reporter.send(&Line::Failed("\u{1}".repeat(100_000)));
        drop(reporter);
        let line = io::read_to_string(File::from(read)).expect("read");
        assert!(line.len() < 4096, "{}", line.len());
        assert!(matches!(serde_json::from_str(&line), Ok(Line::Failed(_))));
    }
}
