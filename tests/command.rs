//! Runs a program with a deadline and keeps everything it printed, so that a failure can be read without running it
//! again. Knows nothing of containerd.

use std::{
    collections::VecDeque,
    ffi::OsStr,
    fs::File,
    io::{self, Read, Write},
    os::{fd::OwnedFd, unix::fs::OpenOptionsExt, unix::process::ExitStatusExt},
    process::{Child, Command, Stdio},
    sync::{Arc, Condvar, Mutex},
    thread::{self, JoinHandle},
    time::{Duration, Instant},
};

use rustix::{
    event::{PollFd, PollFlags, Timespec, poll},
    fs::OFlags,
    process::{Pid, PidfdFlags, Signal, kill_process, pidfd_open},
    pty::{OpenptFlags, grantpt, openpt, ptsname, unlockpt},
    termios::{Winsize, tcsetwinsize},
};

/// This many seconds of a machine that has nothing else to do; `NACELLE_SLOWNESS` says how much longer they are here.
pub fn seconds(count: u64) -> Duration {
    let slowness = std::env::var("NACELLE_SLOWNESS").map_or(1, |n| n.parse().expect("NACELLE_SLOWNESS is a number"));
    Duration::from_secs(count * slowness)
}

/// How long a command may take when the test does not say. Virtual machines may be emulated, so this is generous;
/// deadlines that are promises of the product stand in the tests.
pub fn patience() -> Duration {
    seconds(60)
}

/// A program about to be run.
pub struct Cmd {
    command: Command,
    stdin: Option<Vec<u8>>,
    patience: Duration,
}

impl Cmd {
    /// `program`, to be found in PATH.
    pub fn new(program: impl AsRef<OsStr>) -> Self {
        Self { command: Command::new(program), stdin: None, patience: patience() }
    }

    /// Adds arguments.
    pub fn args<S: AsRef<OsStr>>(mut self, args: impl IntoIterator<Item = S>) -> Self {
        self.command.args(args);
        self
    }

    /// Sets a variable of the environment.
    pub fn env(mut self, name: &str, value: impl AsRef<OsStr>) -> Self {
        self.command.env(name, value);
        self
    }

    /// Sets the working directory.
    pub fn cwd(mut self, dir: impl AsRef<std::path::Path>) -> Self {
        self.command.current_dir(dir);
        self
    }

    /// What the program reads, followed by end of file. Without it, [`Cmd::run`] gives it an empty stdin and
    /// [`Cmd::spawn`] one that stays open.
    pub fn stdin(mut self, bytes: impl Into<Vec<u8>>) -> Self {
        self.stdin = Some(bytes.into());
        self
    }

    /// How long the program may take.
    pub fn within(mut self, patience: Duration) -> Self {
        self.patience = patience;
        self
    }

    /// Runs it to its end.
    pub fn run(mut self) -> Finished {
        let patience = self.patience;
        self.stdin.get_or_insert_default();
        self.spawn().wait(patience)
    }

    /// Runs it to its end, which must be a success.
    pub fn ok(self) -> Finished {
        self.run().expect(0)
    }

    /// Starts it, its streams being pipes.
    pub fn spawn(mut self) -> Running {
        let line = self.line();
        self.command.stdin(Stdio::piped()).stdout(Stdio::piped()).stderr(Stdio::piped());
        let started = Instant::now();
        let mut child = self.command.spawn().unwrap_or_else(|e| panic!("run {line}: {e}"));
        let out = Stream::reading(child.stdout.take().expect("stdout is a pipe"));
        let err = Stream::reading(child.stderr.take().expect("stderr is a pipe"));
        let mut stdin = Some(Stdin::Pipe(child.stdin.take().expect("stdin is a pipe")));
        if let Some(bytes) = self.stdin {
            let mut pipe = stdin.take().expect("stdin was just put there");
            // The program may end without reading all of it; whether it should have is for the test to say.
            thread::spawn(move || pipe.write_all(&bytes).ok());
        }
        Running { line, child, stdin, out, err, started }
    }

    /// Starts it on a terminal of its own, of `columns` × `rows`; what it prints on it counts as stdout.
    pub fn spawn_on_terminal(mut self, columns: u16, rows: u16) -> Running {
        let line = self.line();
        let terminal = openpt(OpenptFlags::RDWR | OpenptFlags::NOCTTY | OpenptFlags::CLOEXEC).expect("open a terminal");
        grantpt(&terminal).and_then(|()| unlockpt(&terminal)).expect("unlock the terminal");
        let name = ptsname(&terminal, Vec::new()).expect("name the terminal");
        let path = std::path::Path::new(OsStr::new(name.to_str().expect("terminals have plain names")));
        // Not as the controlling terminal: its end would hang up the tests where they lead a session.
        let no_control = OFlags::NOCTTY.bits().cast_signed();
        let end = File::options().read(true).write(true).custom_flags(no_control).open(path);
        let end = end.expect("open the terminal's other end");
        tcsetwinsize(&terminal, winsize(columns, rows)).expect("set the size of the terminal");
        let copy = || Stdio::from(end.try_clone().expect("copy a descriptor"));
        self.command.stdin(copy()).stdout(copy()).stderr(copy());
        let started = Instant::now();
        let child = self.command.spawn().unwrap_or_else(|e| panic!("run {line}: {e}"));
        // The command still holds the descriptors that the child was given; with them, no end of file.
        drop(self.command);
        drop(end);
        let master = File::from(terminal);
        let out = Stream::reading(master.try_clone().expect("copy a descriptor"));
        Running { line, child, stdin: Some(Stdin::Terminal(master)), out, err: Stream::default(), started }
    }

    fn line(&self) -> String {
        let words = std::iter::once(self.command.get_program()).chain(self.command.get_args());
        words.map(OsStr::to_string_lossy).collect::<Vec<_>>().join(" ")
    }
}

fn winsize(columns: u16, rows: u16) -> Winsize {
    Winsize { ws_col: columns, ws_row: rows, ws_xpixel: 0, ws_ypixel: 0 }
}

enum Stdin {
    Pipe(std::process::ChildStdin),
    Terminal(File),
}

impl Stdin {
    fn write_all(&mut self, bytes: &[u8]) -> io::Result<()> {
        match self {
            Self::Pipe(pipe) => pipe.write_all(bytes),
            Self::Terminal(master) => master.write_all(bytes),
        }
    }
}

/// What a program has printed so far, filled by a thread.
#[derive(Default)]
struct Stream {
    text: Arc<(Mutex<Vec<u8>>, Condvar)>,
    reader: Option<JoinHandle<()>>,
}

impl Stream {
    fn reading(mut from: impl Read + Send + 'static) -> Self {
        let text = Arc::new((Mutex::new(Vec::new()), Condvar::new()));
        let shared = Arc::clone(&text);
        let reader = thread::spawn(move || {
            let mut buffer = vec![0; 64 << 10];
            // A terminal whose other end is closed reads as EIO, not as end of file.
            while let Ok(n @ 1..) = from.read(&mut buffer) {
                shared.0.lock().expect("no reader panics").extend_from_slice(&buffer[..n]);
                shared.1.notify_all();
            }
            shared.1.notify_all();
        });
        Self { text, reader: Some(reader) }
    }

    fn copy(&self) -> Vec<u8> {
        self.text.0.lock().expect("no reader panics").clone()
    }

    /// Whether `done` became true of what was printed before the deadline.
    fn wait(&self, within: Duration, mut done: impl FnMut(&[u8]) -> bool) -> bool {
        let text = self.text.0.lock().expect("no reader panics");
        let (text, _) = self.text.1.wait_timeout_while(text, within, |text| !done(text)).expect("no reader panics");
        done(&text)
    }

    /// Everything, when the other end is closed within the time; else what there is.
    fn drain(self, within: Duration) -> Vec<u8> {
        if let Some(reader) = self.reader {
            let end = Instant::now() + within;
            while !reader.is_finished() && Instant::now() < end {
                thread::sleep(Duration::from_millis(2));
            }
        }
        let text = self.text.0.lock().expect("no reader panics");
        text.clone()
    }
}

/// A program that runs. Killed when dropped.
pub struct Running {
    line: String,
    child: Child,
    stdin: Option<Stdin>,
    out: Stream,
    err: Stream,
    started: Instant,
}

impl Running {
    /// Its process id.
    pub fn pid(&self) -> u32 {
        self.child.id()
    }

    /// Writes to its stdin or terminal.
    pub fn write(&mut self, bytes: &[u8]) {
        let stdin = self.stdin.as_mut().expect("stdin was closed");
        stdin.write_all(bytes).unwrap_or_else(|e| panic!("write to {}: {e}", self.line));
    }

    /// Closes its stdin.
    pub fn close_stdin(&mut self) {
        self.stdin = None;
    }

    /// Changes the size of its terminal and tells it, as the kernel does for the foreground process.
    pub fn resize(&self, columns: u16, rows: u16) {
        let Some(Stdin::Terminal(master)) = &self.stdin else { panic!("{} has no terminal", self.line) };
        tcsetwinsize(master, winsize(columns, rows)).expect("set the size of the terminal");
        self.signal(Signal::WINCH);
    }

    /// Sends it a signal.
    pub fn signal(&self, signal: Signal) {
        kill_process(pid(self.pid()), signal).unwrap_or_else(|e| panic!("signal {}: {e}", self.line));
    }

    /// Waits until `text` stands in what it printed on stdout, and returns all of that.
    pub fn sees(&self, text: &str, within: Duration) -> String {
        let found = self.out.wait(within, |out| contains(out, text.as_bytes()));
        let out = String::from_utf8_lossy(&self.out.copy()).into_owned();
        assert!(
            found,
            "{}: no {text:?} within {within:?}\n--- stdout\n{}\n--- stderr\n{}",
            self.line,
            head(&out),
            String::from_utf8_lossy(&self.err.copy())
        );
        out
    }

    /// What it has printed on stdout so far.
    pub fn printed(&self) -> String {
        String::from_utf8_lossy(&self.out.copy()).into_owned()
    }

    /// Waits for its end. What keeps its output open longer than it lives, for 5 s more, is a failure of the test.
    pub fn wait(mut self, within: Duration) -> Finished {
        let left = within.saturating_sub(self.started.elapsed());
        if !ends(&self.child, left) {
            let out = String::from_utf8_lossy(&self.out.copy()).into_owned();
            let err = String::from_utf8_lossy(&self.err.copy()).into_owned();
            panic!("{}: still running after {within:?}\n--- stdout\n{}\n--- stderr\n{err}", self.line, head(&out));
        }
        let status = self.child.wait().unwrap_or_else(|e| panic!("wait for {}: {e}", self.line));
        let code = status.code().unwrap_or_else(|| 128 + status.signal().unwrap_or_default());
        Finished {
            line: std::mem::take(&mut self.line),
            code,
            out: std::mem::take(&mut self.out).drain(seconds(5)),
            err: String::from_utf8_lossy(&std::mem::take(&mut self.err).drain(seconds(5))).into_owned(),
            took: self.started.elapsed(),
        }
    }
}

impl Drop for Running {
    fn drop(&mut self) {
        // Both are no-ops when it has ended and was waited for.
        self.child.kill().ok();
        self.child.wait().ok();
    }
}

/// A program that has ended.
pub struct Finished {
    /// The command line, words joined by blanks.
    pub line: String,
    /// Exit code; 128 plus the signal's number when a signal ended it.
    pub code: i32,
    /// What it printed on stdout.
    pub out: Vec<u8>,
    /// What it printed on stderr.
    pub err: String,
    /// From its start to its end.
    pub took: Duration,
}

impl Finished {
    /// Fails the test unless the exit code is `code`.
    pub fn expect(self, code: i32) -> Self {
        assert!(self.code == code, "exit code {}, not {code}: {self}", self.code);
        self
    }

    /// Fails the test unless the exit code says failure and stderr contains every one of `words`.
    pub fn expect_failure(self, words: &[&str]) -> Self {
        assert!(self.code != 0, "should have failed: {self}");
        for word in words {
            assert!(self.err.contains(word), "the message does not say {word:?}: {self}");
        }
        self
    }

    /// What it printed on stdout, as text without the line end.
    pub fn text(&self) -> String {
        String::from_utf8_lossy(&self.out).trim_end().to_owned()
    }
}

impl std::fmt::Display for Finished {
    fn fmt(&self, f: &mut std::fmt::Formatter<'_>) -> std::fmt::Result {
        let out = String::from_utf8_lossy(&self.out);
        write!(
            f,
            "{} ({:.1?})\n--- stdout ({} bytes)\n{}\n--- stderr\n{}",
            self.line,
            self.took,
            self.out.len(),
            head(&out),
            self.err
        )
    }
}

/// The process `child`, not yet waited for, ends within the time.
fn ends(child: &Child, within: Duration) -> bool {
    let handle: OwnedFd = pidfd_open(pid(child.id()), PidfdFlags::empty()).expect("a child that was not waited for");
    let end = Instant::now() + within;
    loop {
        let left = end.saturating_duration_since(Instant::now());
        let timeout = Timespec { tv_sec: left.as_secs().cast_signed(), tv_nsec: left.subsec_nanos().into() };
        match poll(&mut [PollFd::new(&handle, PollFlags::IN)], Some(&timeout)) {
            Ok(ready) => return ready > 0,
            Err(rustix::io::Errno::INTR) => {}
            Err(error) => panic!("wait for a process: {error}"),
        }
    }
}

fn pid(number: u32) -> Pid {
    Pid::from_raw(number.cast_signed()).expect("process ids are positive")
}

fn head(text: &str) -> &str {
    const MOST: usize = 4000;
    match text.char_indices().nth(MOST) {
        Some((end, _)) => &text[..end],
        None => text,
    }
}

fn contains(text: &[u8], part: &[u8]) -> bool {
    text.windows(part.len()).any(|window| window == part)
}

/// Asks `done` again and again until it gives a value; none when it does not within the time.
pub fn eventually<T>(patience: Duration, mut done: impl FnMut() -> Option<T>) -> Option<T> {
    let end = Instant::now() + patience;
    loop {
        let value = done();
        if value.is_some() || Instant::now() >= end {
            return value;
        }
        thread::sleep(Duration::from_millis(20));
    }
}

/// The same; fails the test when there is no value in time.
pub fn within<T>(patience: Duration, what: &str, done: impl FnMut() -> Option<T>) -> T {
    eventually(patience, done).unwrap_or_else(|| panic!("not within {patience:?}: {what}"))
}

/// The last lines of a text.
pub fn tail(text: &str, lines: usize) -> String {
    let mut last = VecDeque::with_capacity(lines);
    for line in text.lines() {
        if last.len() == lines {
            last.pop_front();
        }
        last.push_back(line);
    }
    last.into_iter().collect::<Vec<_>>().join("\n")
}
