//! Streams over real FIFOs, with a guest's end played by the test.

use std::os::unix::fs::PermissionsExt;

use nacelle_protocol::stream::{
    Answer, HEADER_LEN, Header, Kind, MAX_DATA, Preamble, WINDOW, credit_frame, parse_stream_uri,
};
use rustix::fs::{CWD, FileType, Mode, mknodat};
use tokio::io::AsyncWriteExt;
use tokio::net::{UnixListener, UnixStream};

use super::*;
use crate::conduct::Conduct;

/// A hub, and the socket on which a guest reaches it.
struct World {
    dir: tempfile::TempDir,
    conduct: Arc<Conduct>,
    hub: Arc<Hub>,
}

impl World {
    fn new() -> Self {
        let dir = tempfile::tempdir().expect("tempdir");
        let conduct = Arc::<Conduct>::default();
        let hub = Arc::new(Hub::new(conduct.clone()));
        let listener = UnixListener::bind(dir.path().join("s")).expect("bind");
        tokio::spawn(hub.clone().serve(listener));
        Self { dir, conduct, hub }
    }

    fn fifo(&self, name: &str) -> String {
        let path = self.dir.path().join(name);
        mknodat(CWD, &path, FileType::Fifo, Mode::from_raw_mode(0o600), 0).expect("mkfifo");
        path.display().to_string()
    }

    async fn open(&self, stdin: &str, stdout: &str, stderr: &str) -> Io {
        let wanted = Wanted { stdin: stdin.into(), stdout: stdout.into(), stderr: stderr.into(), terminal: false };
        let mut io = Io::open(&self.hub, &owner(), &wanted).await.expect("open");
        io.open_stdin().expect("open stdin");
        io
    }

    async fn dial(&self, name: &str) -> UnixStream {
        let id = parse_stream_uri(name).expect("uri").expect("a stream");
        self.dial_as(Preamble::new(Kind::Stream, id)).await.expect("accepted")
    }

    async fn dial_as(&self, preamble: Preamble) -> Option<UnixStream> {
        let mut socket = UnixStream::connect(self.dir.path().join("s")).await.expect("connect");
        socket.write_all(&preamble.encode()).await.expect("preamble");
        let mut answer = [0; 8];
        socket.read_exact(&mut answer).await.expect("answer");
        Answer::check(&answer).ok().map(|()| socket)
    }
}

fn owner() -> Owner {
    Owner { namespace: "default".into(), container: "c1".into() }
}

/// The guest's end of an output stream, which keeps to its credit.
async fn say(socket: UnixStream, bytes: &[u8]) {
    let (mut reader, mut writer) = socket.into_split();
    let mut credit = WINDOW as usize;
    for chunk in bytes.chunks(MAX_DATA) {
        while credit < chunk.len() {
            let mut frame = [0; HEADER_LEN + 4];
            reader.read_exact(&mut frame).await.expect("credit");
            credit += u32::from_le_bytes(frame[HEADER_LEN..].try_into().expect("4 bytes")) as usize;
        }
        credit -= chunk.len();
        writer.write_all(&Header::data(chunk.len() as u32).encode()).await.expect("header");
        writer.write_all(chunk).await.expect("data");
    }
    writer.write_all(&Header::EOF.encode()).await.expect("eof");
    // The guest keeps its end until the host has closed.
    let mut rest = Vec::new();
    let _ = reader.read_to_end(&mut rest).await;
}

fn pattern(len: usize) -> Vec<u8> {
    (0..len).map(|i| (i * 31 % 251) as u8).collect()
}

async fn read_fifo(path: String) -> Vec<u8> {
    tokio::task::spawn_blocking(move || std::fs::read(path).expect("read fifo")).await.expect("join")
}

#[test]
fn uris() {
    assert_eq!(parse("").expect("parse"), Target::Discard);
    assert_eq!(parse("/run/f").expect("parse"), Target::Path("/run/f".into()));
    assert_eq!(parse("fifo:///run/f").expect("parse"), Target::Path("/run/f".into()));
    assert_eq!(parse("file:///var/log/x%20y").expect("parse"), Target::File("/var/log/x y".into()));
    let binary = parse("binary:///bin/log?_DIR=%2Fvar%2Flib&flag&a=b+c").expect("parse");
    let args = ["_DIR", "/var/lib", "flag", "", "a", "b c"].map(str::to_owned).to_vec();
    assert_eq!(binary, Target::Binary { path: "/bin/log".into(), args });
    assert!(matches!(parse("ttrpc:///x"), Err(StdioError::Scheme(_))));
    for bad in ["binary://relative", "file:///%zz", "file:///%", "file:///a%00b"] {
        assert!(matches!(parse(bad), Err(StdioError::Malformed(_))), "{bad}");
    }
}

#[tokio::test]
async fn twenty_mebibytes_each_way() {
    let world = World::new();
    let (stdin, stdout) = (world.fifo("in"), world.fifo("out"));
    let io = world.open(&stdin, &stdout, "").await;
    assert_eq!(io.names().stderr, "", "nothing wanted, nothing made");
    let data = pattern(20 << 20);

    let reader = tokio::spawn(read_fifo(stdout));
    let socket = world.dial(&io.names().stdout).await;
    say(socket, &data).await;
    assert!(reader.await.expect("join") == data, "stdout arrives whole, and ends");

    let mut guest = world.dial(&io.names().stdin).await;
    let (input, expected) = (stdin.clone(), data.clone());
    let writer = tokio::task::spawn_blocking(move || std::fs::write(input, data).expect("write fifo"));
    let mut got = Vec::new();
    let mut owed = 0;
    let mut closed = false;
    loop {
        if got.len() == expected.len() && !closed {
            io.close_stdin();
            closed = true;
        }
        let mut header = [0; HEADER_LEN];
        guest.read_exact(&mut header).await.expect("header");
        let header = Header::decode(&header).expect("valid");
        if header == Header::EOF {
            break;
        }
        let at = got.len();
        got.resize(at + header.len as usize, 0);
        guest.read_exact(&mut got[at..]).await.expect("data");
        owed += header.len;
        assert!(owed <= WINDOW, "the host keeps to its credit");
        if owed > WINDOW / 2 {
            guest.write_all(&credit_frame(owed)).await.expect("credit");
            owed = 0;
        }
    }
    writer.await.expect("join");
    assert!(got == expected, "stdin arrives whole");
    drop(guest);
    io.drain(Duration::from_secs(5)).await;
}

#[tokio::test]
async fn what_was_written_before_the_close_is_not_lost() {
    for _ in 0..20 {
        let world = World::new();
        let stdin = world.fifo("in");
        let io = world.open(&stdin, "", "").await;
        let mut guest = world.dial(&io.names().stdin).await;
        let mut writer = std::fs::File::options().write(true).open(&stdin).expect("open");
        std::io::Write::write_all(&mut writer, b"last words").expect("write");
        drop(writer);
        io.close_stdin();
        let mut bytes = vec![0; 2 * HEADER_LEN + 10];
        guest.read_exact(&mut bytes).await.expect("read");
        assert_eq!(&bytes[HEADER_LEN..HEADER_LEN + 10], b"last words");
        assert_eq!(&bytes[HEADER_LEN + 10..], Header::EOF.encode());
    }
}

#[tokio::test]
async fn a_writer_that_leaves_is_no_end_of_stdin() {
    let world = World::new();
    let stdin = world.fifo("in");
    let io = world.open(&stdin, "", "").await;
    let mut guest = world.dial(&io.names().stdin).await;
    for word in [b"one", b"two"] {
        std::fs::write(&stdin, word).expect("write and leave");
        let mut frame = [0; HEADER_LEN + 3];
        guest.read_exact(&mut frame).await.expect("data");
        assert_eq!(&frame[HEADER_LEN..], word);
    }
    let quiet = timeout(Duration::from_millis(100), guest.read(&mut [0])).await;
    assert!(quiet.is_err(), "no end of file");
    drop(io);
}

#[tokio::test]
async fn output_survives_a_reader_that_restarts_and_stalls_without_one() {
    let world = World::new();
    let stdout = world.fifo("out");
    let io = world.open("", &stdout, "").await;
    let socket = world.dial(&io.names().stdout).await;
    let data = pattern(1 << 20);
    let copy = data.clone();
    let mut guest = tokio::spawn(async move { say(socket, &copy).await });
    // Nobody reads: the FIFO and the window fill up, and then the guest has to wait.
    assert!(timeout(Duration::from_millis(200), &mut guest).await.is_err(), "back pressure");
    let mut first = vec![0; 1000];
    let path = stdout.clone();
    let first_half = tokio::task::spawn_blocking(move || {
        std::io::Read::read_exact(&mut std::fs::File::open(path).expect("open"), &mut first).expect("read");
        first
    });
    let mut got = first_half.await.expect("join");
    got.extend(read_fifo(stdout).await);
    assert!(got == data, "the second reader goes on where the first one left");
    guest.await.expect("join");
}

#[tokio::test]
async fn a_fifo_that_nobody_reads_does_not_hold_up_the_end() {
    let world = World::new();
    let stdout = world.fifo("out");
    let io = world.open("", &stdout, "").await;
    let mut socket = world.dial(&io.names().stdout).await;
    for _ in 0..3 {
        socket.write_all(&Header::data(MAX_DATA as u32).encode()).await.expect("header");
        socket.write_all(&vec![7; MAX_DATA]).await.expect("data");
    }
    timeout(Duration::from_secs(2), io.drain(Duration::from_millis(100))).await.expect("drain gives up");
}

#[tokio::test]
async fn a_guest_that_sends_too_much_is_found_out_though_nobody_reads() {
    let world = World::new();
    let stdout = world.fifo("out");
    let io = world.open("", &stdout, "").await;
    // A reader that is there and does not read.
    let mut reader = std::fs::File::open(stdout).expect("open fifo");
    let mut socket = world.dial(&io.names().stdout).await;
    let mut sent = 0;
    let frame = [&Header::data(MAX_DATA as u32).encode()[..], &vec![7; MAX_DATA]].concat();
    // The FIFO takes 64 KiB, so this is one window too many in any case.
    while sent < 3 * WINDOW as usize && socket.write_all(&frame).await.is_ok() {
        sent += MAX_DATA;
    }
    let verdict = timeout(Duration::from_secs(5), world.conduct.condemned()).await.expect("a verdict");
    assert!(verdict.contains("bytes more than it may"), "{verdict}");
    // The reader hears the end, not a stall: the stream is over.
    let rest = tokio::task::spawn_blocking(move || {
        let mut rest = Vec::new();
        std::io::Read::read_to_end(&mut reader, &mut rest).map(|_| rest)
    });
    let got = timeout(Duration::from_secs(5), rest).await.expect("ends").expect("join").expect("read fifo");
    assert!(got.len() <= 2 * WINDOW as usize && got.iter().all(|b| *b == 7));
    drop(io);
}

#[tokio::test]
async fn only_expected_streams_are_accepted_and_only_once() {
    let world = World::new();
    let stdout = world.fifo("out");
    let io = world.open("", &stdout, "").await;
    let id = parse_stream_uri(&io.names().stdout).expect("uri").expect("id");
    assert!(world.dial_as(Preamble::new(Kind::Stream, id ^ 1)).await.is_none(), "unknown id");
    let _first = world.dial_as(Preamble::new(Kind::Stream, id)).await.expect("accepted");
    assert!(world.dial_as(Preamble::new(Kind::Stream, id)).await.is_none(), "second time");
    let other = Preamble { generation: 99, ..Preamble::new(Kind::Stream, id) };
    assert!(world.dial_as(other).await.is_none(), "other generation");
    drop(io);
}

#[tokio::test]
async fn files_take_both_streams() {
    let world = World::new();
    let log = world.dir.path().join("logs/c1.log");
    let uri = format!("file://{}", log.display());
    let io = world.open("", &uri, &uri).await;
    let (out, err) = (world.dial(&io.names().stdout).await, world.dial(&io.names().stderr).await);
    tokio::join!(say(out, b"out\n"), say(err, b"err\n"));
    io.drain(Duration::from_secs(5)).await;
    let text = std::fs::read_to_string(log).expect("read");
    assert!(text == "out\nerr\n" || text == "err\nout\n", "{text:?}");
}

#[tokio::test]
async fn logging_programs_get_their_descriptors_and_leave() {
    let world = World::new();
    let (script, log) = (world.dir.path().join("log.sh"), world.dir.path().join("log"));
    let text = "#!/bin/sh\nexec 5>&-\n{ echo \"$CONTAINER_NAMESPACE/$CONTAINER_ID $1=$2\"; cat <&3; cat <&4; } >\"$2.tmp\"\n\
                mv \"$2.tmp\" \"$2\"\n";
    std::fs::write(&script, text).expect("write");
    std::fs::set_permissions(&script, std::fs::Permissions::from_mode(0o755)).expect("chmod");
    let uri = format!("binary://{}?file={}", script.display(), log.display());
    let io = world.open("", &uri, &uri).await;
    let (out, err) = (world.dial(&io.names().stdout).await, world.dial(&io.names().stderr).await);
    tokio::join!(say(out, b"out\n"), say(err, b"err\n"));
    io.drain(Duration::from_secs(5)).await;
    let deadline = tokio::time::Instant::now() + Duration::from_secs(5);
    while !log.exists() && tokio::time::Instant::now() < deadline {
        tokio::time::sleep(Duration::from_millis(10)).await;
    }
    let expected = format!("default/c1 file={}\nout\nerr\n", log.display());
    assert_eq!(std::fs::read_to_string(&log).expect("written"), expected);

    let missing = Wanted { stdout: "binary:///nonexistent/logger".into(), ..Wanted::default() };
    assert!(matches!(Io::open(&world.hub, &owner(), &missing).await, Err(StdioError::Logger { .. })));
}

#[tokio::test]
async fn a_stream_that_was_never_dialled_is_not_waited_for() {
    let world = World::new();
    let stdout = world.fifo("out");
    let io = world.open("", &stdout, "").await;
    timeout(Duration::from_secs(1), io.drain(Duration::from_secs(60))).await.expect("at once");
}
