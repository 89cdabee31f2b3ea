//! The standard streams of one process: containerd's end.
//!
//! | URI                      | what becomes of it                                                                    |
//! |--------------------------|---------------------------------------------------------------------------------------|
//! | empty                    | no stream: the guest discards                                                           |
//! | path, `fifo://`          | a FIFO, opened read-write: no writer or reader that leaves is an end of file or an EPIPE |
//! | `file:///path`           | appended to, stdout and stderr alike                                                    |
//! | `binary:///path?k=v`     | a program that takes stdout on descriptor 3 and stderr on 4, and says on 5 that it is ready |
//!
//! Stdin is opened when the process starts: clients may only close it once they know that the process has been created,
//! and must not see it read to its end before. Only `CloseIO` ends it. A sink that nobody reads blocks its process as a full pipe would, and nothing else: see
//! [`crate::stream`]. The logging program is asked to leave, and killed when it does not, without anybody waiting for it.

use std::io;
use std::path::{Path, PathBuf};
use std::process::Stdio as Redirect;
use std::sync::Arc;
use std::sync::atomic::{AtomicBool, Ordering};
use std::time::Duration;

use command_fds::{CommandFdExt, FdMapping};
use nacelle_protocol::stream::stream_uri;
use rustix::pipe::{PipeFlags, pipe_with};
use rustix::process::{Pid, Signal, kill_process};
use thiserror::Error;
use tokio::io::{AsyncReadExt, AsyncWrite};
use tokio::net::unix::pipe;
use tokio::process::Child;
use tokio::sync::watch;
use tokio::task::JoinHandle;
use tokio::time::timeout;

use crate::stream::{Hub, Ticket, pump_input, pump_output};

#[cfg(test)]
mod tests;

/// How long a logging program may take to get ready.
const READY_DEADLINE: Duration = Duration::from_secs(10);
/// How long it may take to read what is left before it is asked to leave.
const LINGER: Duration = Duration::from_secs(2);
/// How long it may take to leave, as containerd has it.
const LEAVE_DEADLINE: Duration = Duration::from_secs(12);

/// Why a process has no streams.
#[derive(Debug, Error)]
pub enum StdioError {
    /// The URI is of a kind that nacelle does not know.
    #[error("open stream {0:?}: unknown scheme")]
    Scheme(String),
    /// The URI is malformed.
    #[error("open stream {0:?}: malformed")]
    Malformed(String),
    /// A file or a FIFO cannot be opened.
    #[error("open stream {path}")]
    Open {
        /// The file.
        path: PathBuf,
        /// The cause.
        #[source]
        source: io::Error,
    },
    /// The logging program cannot be started.
    #[error("run logging program {path}")]
    Logger {
        /// The program.
        path: PathBuf,
        /// The cause.
        #[source]
        source: io::Error,
    },
    /// No stream id could be made.
    #[error("name stream")]
    Random(#[source] io::Error),
}

/// The streams that containerd wants, as it names them.
#[derive(Clone, Debug, Default, PartialEq, Eq)]
pub struct Wanted {
    /// URI of stdin.
    pub stdin: String,
    /// URI of stdout.
    pub stdout: String,
    /// URI of stderr.
    pub stderr: String,
    /// One terminal instead of three streams; stderr is not used.
    pub terminal: bool,
}

/// Whose streams they are: a logging program wants to know.
#[derive(Clone, Debug)]
pub struct Owner {
    /// containerd's namespace.
    pub namespace: String,
    /// The container.
    pub container: String,
}

/// Names of the streams in a request to the guest.
#[derive(Clone, Debug, Default, PartialEq, Eq)]
pub struct Names {
    /// stdin.
    pub stdin: String,
    /// stdout.
    pub stdout: String,
    /// stderr.
    pub stderr: String,
}

#[derive(Debug, PartialEq, Eq)]
enum Target {
    Discard,
    Path(PathBuf),
    File(PathBuf),
    Binary { path: PathBuf, args: Vec<String> },
}

fn parse(uri: &str) -> Result<Target, StdioError> {
    let malformed = || StdioError::Malformed(uri.to_owned());
    if uri.is_empty() {
        return Ok(Target::Discard);
    }
    let Some((scheme, rest)) = uri.split_once("://") else {
        return Ok(Target::Path(uri.into()));
    };
    let (path, query) = rest.split_once('?').unwrap_or((rest, ""));
    let path = PathBuf::from(decode(path, false).ok_or_else(malformed)?);
    if !path.is_absolute() {
        return Err(malformed());
    }
    match scheme {
        "fifo" => Ok(Target::Path(path)),
        "file" => Ok(Target::File(path)),
        "binary" => {
            let mut args = Vec::new();
            for pair in query.split('&').filter(|pair| !pair.is_empty()) {
                let (key, value) = pair.split_once('=').unwrap_or((pair, ""));
                for part in [key, value] {
                    args.push(decode(part, true).ok_or_else(malformed)?);
                }
            }
            Ok(Target::Binary { path, args })
        }
        _ => Err(StdioError::Scheme(uri.to_owned())),
    }
}

/// Undoes the percent encoding of a URL, RFC 3986 section 2.1; in a query `+` is a space.
fn decode(text: &str, query: bool) -> Option<String> {
    let mut out = Vec::with_capacity(text.len());
    let mut bytes = text.bytes();
    while let Some(byte) = bytes.next() {
        out.push(match byte {
            b'%' => {
                let digits = [bytes.next()?, bytes.next()?];
                u8::from_str_radix(std::str::from_utf8(&digits).ok()?, 16).ok()?
            }
            b'+' if query => b' ',
            other => other,
        });
    }
    String::from_utf8(out).ok().filter(|text| !text.contains('\0'))
}

type Sink = Box<dyn AsyncWrite + Send + Unpin>;

fn open_fifo(path: &Path) -> io::Result<pipe::OpenOptions> {
    use std::os::unix::fs::FileTypeExt;
    if !std::fs::metadata(path)?.file_type().is_fifo() {
        return Err(io::Error::new(io::ErrorKind::InvalidInput, "not a FIFO"));
    }
    let mut options = pipe::OpenOptions::new();
    options.read_write(true);
    Ok(options)
}

fn open_sink(path: &Path) -> io::Result<Sink> {
    match open_fifo(path) {
        Ok(options) => Ok(Box::new(options.open_sender(path)?)),
        Err(e) if e.kind() == io::ErrorKind::InvalidInput => append(path, false),
        Err(e) => Err(e),
    }
}

fn append(path: &Path, create: bool) -> io::Result<Sink> {
    let file = std::fs::File::options().append(true).create(create).open(path)?;
    Ok(Box::new(tokio::fs::File::from_std(file)))
}

#[derive(Debug)]
struct Stream {
    task: JoinHandle<()>,
    dialled: Arc<AtomicBool>,
}

/// The open streams of one process. Dropping it lets go of everything at once.
#[derive(Debug)]
pub struct Io {
    names: Names,
    closing: watch::Sender<bool>,
    waiting: Option<(PathBuf, Ticket)>,
    input: Option<Stream>,
    outputs: Vec<Stream>,
    logger: Option<Child>,
}

impl Io {
    /// Opens what containerd wants, and expects the guest to dial for it.
    ///
    /// # Errors
    /// [`StdioError`]; nothing stays open.
    pub async fn open(hub: &Arc<Hub>, owner: &Owner, wanted: &Wanted) -> Result<Self, StdioError> {
        let mut io = Self {
            names: Names::default(),
            closing: watch::Sender::new(false),
            waiting: None,
            input: None,
            outputs: Vec::new(),
            logger: None,
        };
        match parse(&wanted.stdin)? {
            Target::Discard => {}
            Target::Path(path) => {
                if let Err(source) = open_fifo(&path) {
                    return Err(StdioError::Open { path, source });
                }
                let ticket = hub.expect().map_err(StdioError::Random)?;
                io.names.stdin = stream_uri(ticket.id());
                io.waiting = Some((path, ticket));
            }
            _ => return Err(StdioError::Scheme(wanted.stdin.clone())),
        }
        let stderr = if wanted.terminal { "" } else { wanted.stderr.as_str() };
        let (out, err) = match parse(&wanted.stdout)? {
            Target::Binary { path, args } => {
                let failed = |source| StdioError::Logger { path: path.clone(), source };
                let (child, out, err) = run_logger(owner, &path, &args).await.map_err(failed)?;
                io.logger = Some(child);
                (Some(out), (!wanted.terminal).then_some(err))
            }
            Target::File(path) => {
                let open = || -> Result<Sink, StdioError> {
                    let dir = path.parent().map_or(Ok(()), std::fs::create_dir_all);
                    let failed = |source| StdioError::Open { path: path.clone(), source };
                    dir.and_then(|()| append(&path, true)).map_err(failed)
                };
                (Some(open()?), (!wanted.terminal).then(open).transpose()?)
            }
            stdout => (sink(stdout, &wanted.stdout)?, sink(parse(stderr)?, stderr)?),
        };
        for (sink, name) in [(out, &mut io.names.stdout), (err, &mut io.names.stderr)] {
            let Some(sink) = sink else { continue };
            let ticket = hub.expect().map_err(StdioError::Random)?;
            *name = stream_uri(ticket.id());
            io.outputs.push(spawn(ticket, async move |socket| pump_output(socket, sink).await.map(drop)));
        }
        Ok(io)
    }

    /// What to call the streams in the request to the guest.
    pub fn names(&self) -> &Names {
        &self.names
    }

    /// Opens stdin: the process is about to start.
    ///
    /// # Errors
    /// [`StdioError::Open`].
    pub fn open_stdin(&mut self) -> Result<(), StdioError> {
        let Some((path, ticket)) = self.waiting.take() else { return Ok(()) };
        let source = match open_fifo(&path).and_then(|options| options.open_receiver(&path)) {
            Ok(source) => source,
            Err(source) => return Err(StdioError::Open { path, source }),
        };
        let closing = self.closing.subscribe();
        self.input = Some(spawn(ticket, move |socket| pump_input(socket, source, closing)));
        Ok(())
    }

    /// Ends stdin, after what has been written to it so far.
    pub fn close_stdin(&self) {
        self.closing.send_replace(true);
    }

    /// Waits until the output that the guest has sent is where it belongs, for as long as `patience`, and lets go.
    ///
    /// A stream that the guest never dialled has no output.
    pub async fn drain(mut self, patience: Duration) {
        let drained = async {
            for stream in &mut self.outputs {
                if stream.dialled.load(Ordering::Relaxed) {
                    // A task that was aborted has nothing left to say.
                    let _ = (&mut stream.task).await;
                }
            }
        };
        if timeout(patience, drained).await.is_err() {
            tracing::warn!("output was not read within {patience:?}; the rest is lost");
        }
        // The rest happens in `drop`.
    }
}

impl Drop for Io {
    fn drop(&mut self) {
        for stream in self.input.iter().chain(&self.outputs) {
            stream.task.abort();
        }
        if let Some(child) = self.logger.take() {
            tokio::spawn(dismiss(child));
        }
    }
}

fn sink(target: Target, uri: &str) -> Result<Option<Sink>, StdioError> {
    match target {
        Target::Discard => Ok(None),
        Target::Path(path) => match open_sink(&path) {
            Ok(sink) => Ok(Some(sink)),
            Err(source) => Err(StdioError::Open { path, source }),
        },
        _ => Err(StdioError::Scheme(uri.to_owned())),
    }
}

fn spawn<F>(mut ticket: Ticket, pump: impl FnOnce(tokio::net::UnixStream) -> F + Send + 'static) -> Stream
where
    F: Future<Output = Result<(), crate::stream::PumpError>> + Send,
{
    let dialled = Arc::new(AtomicBool::new(false));
    let flag = dialled.clone();
    let conduct = ticket.conduct();
    let task = tokio::spawn(async move {
        let Some(socket) = ticket.socket().await else { return };
        flag.store(true, Ordering::Relaxed);
        match pump(socket).await {
            Err(e) if e.is_breach() => conduct.breach(crate::chain(&e)),
            Err(e) => tracing::warn!("{}", crate::chain(&e)),
            Ok(()) => {}
        }
    });
    Stream { task, dialled }
}

async fn run_logger(owner: &Owner, path: &Path, args: &[String]) -> io::Result<(Child, Sink, Sink)> {
    let (out_read, out) = pipe_with(PipeFlags::CLOEXEC)?;
    let (err_read, err) = pipe_with(PipeFlags::CLOEXEC)?;
    let (ready, ready_write) = pipe_with(PipeFlags::CLOEXEC)?;
    let mapping = |parent_fd, child_fd| FdMapping { parent_fd, child_fd };
    let mut command = std::process::Command::new(path);
    command
        .args(args)
        .env_clear()
        .env("CONTAINER_ID", &owner.container)
        .env("CONTAINER_NAMESPACE", &owner.namespace)
        .stdin(Redirect::null())
        .stdout(Redirect::null())
        .stderr(Redirect::null())
        .fd_mappings(vec![mapping(out_read, 3), mapping(err_read, 4), mapping(ready_write, 5)])
        .map_err(io::Error::other)?;
    let mut command = tokio::process::Command::from(command);
    command.kill_on_drop(true);
    let child = command.spawn()?;
    // Closes this process's copies of the ends that the program has now, without which `ready` would never end.
    drop(command);
    let mut ready = pipe::Receiver::from_owned_fd(ready)?;
    let late = |_| io::Error::new(io::ErrorKind::TimedOut, "it does not get ready");
    // A byte or the end of file, both mean ready.
    timeout(READY_DEADLINE, ready.read(&mut [0])).await.map_err(late)??;
    Ok((child, Box::new(pipe::Sender::from_owned_fd(out)?), Box::new(pipe::Sender::from_owned_fd(err)?)))
}

/// The end of its input makes a good program leave by itself; others are asked, and then killed.
async fn dismiss(mut child: Child) {
    if timeout(LINGER, child.wait()).await.is_ok() {
        return;
    }
    if let Some(pid) = child.id().and_then(|id| Pid::from_raw(id.cast_signed())) {
        // It has not been waited for, so the id is still its own.
        let _ = kill_process(pid, Signal::TERM);
    }
    if timeout(LEAVE_DEADLINE, child.wait()).await.is_err() {
        // Fails only where it has just left.
        let _ = child.kill().await;
    }
}
