//! The agent's side of a runner: start it, hear what it says.

use std::io;
use std::os::fd::OwnedFd;
use std::os::unix::process::CommandExt;
use std::path::Path;
use std::process::Command;

use command_fds::{CommandFdExt, FdMapping};
use thiserror::Error;
use tokio::io::Interest;

use crate::fd::{self, Fd};
use crate::reap::Start;
use crate::runner::{self, Line};

/// Longest line that is taken from a runner.
const MAX_LINE: usize = 8 * 1024;

/// What went wrong with a runner.
#[derive(Debug, Error)]
pub enum SpawnError {
    /// No process.
    #[error("start runner")]
    Start(#[source] io::Error),
    /// libcontainer says no. The second text is its last complaint, which may say why.
    #[error("{0}{sep}{1}", sep = if .1.is_empty() { "" } else { ": " })]
    Failed(String, String),
    /// The program could not be executed.
    #[error("{text}")]
    NotExecuted {
        /// Exit code of its process.
        code: i32,
        /// Why not.
        text: String,
    },
    /// The runner ended without a word.
    #[error("wait for runner: it ended without a report: {0}")]
    Silent(String),
}

/// The lines of a runner and of the process it made.
pub struct Report {
    pipe: Fd,
    buffer: Vec<u8>,
}

impl Report {
    /// The next line; `None` at the end, or after something that is no line.
    async fn next(&mut self) -> Option<Line> {
        let mut chunk = [0; 1024];
        loop {
            if let Some(line) = self.buffered() {
                return line;
            }
            match self.pipe.read(&mut chunk).await {
                Ok(read @ 1..) => self.buffer.extend_from_slice(&chunk[..read]),
                Ok(0) | Err(_) => return None,
            }
        }
    }

    /// The next line that has been written already.
    fn next_now(&mut self) -> Option<Line> {
        let mut chunk = [0; 1024];
        loop {
            if let Some(line) = self.buffered() {
                return line;
            }
            match self.pipe.read_now(&mut chunk) {
                Some(read @ 1..) => self.buffer.extend_from_slice(&chunk[..read]),
                Some(0) | None => return None,
            }
        }
    }

    /// A line that has been read; `Some(None)` for something that is no line.
    fn buffered(&mut self) -> Option<Option<Line>> {
        match self.buffer.iter().position(|byte| *byte == b'\n') {
            Some(end) => {
                let line: Vec<u8> = self.buffer.drain(..=end).collect();
                Some(serde_json::from_slice(&line).ok())
            }
            None if self.buffer.len() > MAX_LINE => Some(None),
            None => None,
        }
    }

    /// Waits until a container's main process, which has been told to start, executes its program.
    ///
    /// # Errors
    /// [`SpawnError::NotExecuted`]
    pub async fn executed(mut self) -> Result<(), SpawnError> {
        while let Some(line) = self.next().await {
            if let Line::NotExecuted { code, text } = line {
                return Err(SpawnError::NotExecuted { code, text });
            }
        }
        Ok(())
    }
}

/// Runs the job in file `job` with the program `program`, which is this agent, and returns the id of the process that it
/// made. `start` has been begun before, so that the end of that process is not missed.
///
/// # Errors
/// [`SpawnError`]
pub async fn run(program: &Path, job: &Path, stdio: [OwnedFd; 3], start: &Start) -> Result<(u32, Report), SpawnError> {
    let (read, write) = fd::pipe().map_err(SpawnError::Start)?;
    let mut report = Report { pipe: Fd::new(read, Interest::READABLE).map_err(SpawnError::Start)?, buffer: Vec::new() };
    let [stdin, stdout, stderr] = stdio;
    let mut command = Command::new(program);
    command.arg0(runner::NAME).arg(job).env_clear().current_dir("/").stdin(stdin).stdout(stdout).stderr(stderr);
    command
        .fd_mappings(vec![FdMapping { parent_fd: write, child_fd: runner::REPORT_FD }])
        .map_err(|collision| SpawnError::Start(io::Error::other(collision)))?;
    let runner = command.spawn().map_err(SpawnError::Start)?;
    // Closes our copies of its descriptors: the ends of the pipes are its own now.
    drop(command);
    let ended = start.watch(runner.id());
    tokio::pin!(ended);

    let (mut complaint, mut not_executed, mut running) = (String::new(), None, true);
    loop {
        let line = if running {
            tokio::select! {
                biased;
                line = report.next() => line,
                _ = &mut ended => { running = false; continue }
            }
        } else {
            // Its last words; a process that it has left behind may hold the pipe for ever.
            report.next_now()
        };
        match line {
            Some(Line::Created(pid)) => match (not_executed, u32::try_from(pid)) {
                (Some(error), _) => return Err(error),
                (None, Ok(pid)) => return Ok((pid, report)),
                (None, Err(_)) => return Err(SpawnError::Silent(complaint)),
            },
            Some(Line::NotExecuted { code, text }) => not_executed = Some(SpawnError::NotExecuted { code, text }),
            Some(Line::Failed(text)) => return Err(not_executed.unwrap_or(SpawnError::Failed(text, complaint))),
            Some(Line::Log(text)) => {
                // The first complaint is the innermost; what follows repeats it.
                if complaint.is_empty() {
                    complaint = text.trim().to_owned();
                }
            }
            None => return Err(not_executed.unwrap_or(SpawnError::Silent(complaint))),
        }
    }
}
