//! The guest's side of ttrpc, frame by frame, with made-up answers.

use std::io;
use std::sync::{Arc, Mutex, PoisonError};
use std::time::Duration;

use containerd_shim_protos::api;
use containerd_shim_protos::types::empty::Empty;
use nacelle_protocol::agent::{
    ConfigureResponse, Event, EventsRequest, EventsResponse, Exit, ExportRequest, Oom, event::What,
};
use protobuf::well_known_types::any::Any;
use protobuf::{Message, MessageField};
use tokio::io::{AsyncReadExt, AsyncWriteExt, WriteHalf};
use tokio::sync::Notify;
use ttrpc::proto::{Code, Request, Response, Status};

use crate::{Connection, Dial, streams};

/// Type of an answer's frame.
pub const ANSWER: u8 = 2;
/// Type of a frame of a stream, which no call of the host's has.
const DATA: u8 = 3;
/// Process ids that are made up.
const INIT: u32 = 5;
const EXEC: u32 = 6;

/// A frame of ttrpc.
pub fn frame(stream: u32, kind: u8, payload: &[u8]) -> Vec<u8> {
    let length = u32::try_from(payload.len()).unwrap_or(u32::MAX);
    [&length.to_be_bytes()[..], &stream.to_be_bytes(), &[kind, 0], payload].concat()
}

struct Guest {
    name: &'static str,
    dial: Dial,
    writer: tokio::sync::Mutex<WriteHalf<Box<dyn Connection>>>,
    events: Mutex<Vec<Event>>,
    news: Notify,
}

/// Answers calls until the host closes the connection.
pub async fn serve(name: &'static str, connection: Box<dyn Connection>, dial: Dial) -> io::Result<()> {
    let (mut reader, writer) = tokio::io::split(connection);
    let (writer, events, news) = (tokio::sync::Mutex::new(writer), Mutex::default(), Notify::new());
    let guest = Arc::new(Guest { name, dial, writer, events, news });
    loop {
        let mut header = [0; 10];
        reader.read_exact(&mut header).await?;
        let [a, b, c, d, e, f, g, h, _, _] = header;
        let mut payload = vec![0; u32::from_be_bytes([a, b, c, d]) as usize];
        reader.read_exact(&mut payload).await?;
        let request = Request::parse_from_bytes(&payload)?;
        let guest = guest.clone();
        // An answer that cannot be sent has no reader.
        tokio::spawn(async move { guest.answer(u32::from_be_bytes([e, f, g, h]), request).await });
    }
}

fn encode(message: &impl Message) -> Vec<u8> {
    // A message of these types has no required fields.
    message.write_to_bytes().unwrap_or_default()
}

/// Field 1 of a message, `count` times and empty: two bytes that become a struct.
fn empties(count: usize) -> Vec<u8> {
    [0x0a, 0x00].repeat(count)
}

impl Guest {
    fn push(&self, number: Option<u64>, what: Option<What>) {
        let mut events = self.events.lock().unwrap_or_else(PoisonError::into_inner);
        let number = number.unwrap_or(events.len() as u64 + 1);
        events.push(Event { number, what, ..Event::default() });
        drop(events);
        self.news.notify_one();
    }

    fn exit(&self, container: &str, exec: &str, status: u32) {
        let exit = Exit { container_id: container.into(), exec_id: exec.into(), status, pid: INIT, ..Exit::default() };
        self.push(None, Some(What::Exit(exit)));
    }

    async fn send(&self, bytes: &[u8]) -> io::Result<()> {
        let mut writer = self.writer.lock().await;
        writer.write_all(bytes).await?;
        writer.flush().await
    }

    async fn answer(self: Arc<Self>, stream: u32, request: Request) -> io::Result<()> {
        let response = match self.payload(&request).await {
            Ok(payload) => Response { payload, ..Response::default() },
            Err(message) => {
                let status = Status { code: Code::UNKNOWN.into(), message, ..Status::default() };
                Response { status: MessageField::some(status), ..Response::default() }
            }
        };
        let payload = encode(&response);
        match (self.name, request.method.as_str()) {
            ("answers-garbage", _) => self.send(&frame(stream, ANSWER, &[0xff; 1000])).await,
            ("answers-as-data", _) => self.send(&frame(stream, DATA, &payload)).await,
            ("answers-twice", _) => {
                let once = frame(stream, ANSWER, &payload);
                self.send(&[once.clone(), once].concat()).await
            }
            ("hangs-up-in-an-answer", "Create") => {
                self.send(&frame(stream, ANSWER, &payload)[..7]).await?;
                self.writer.lock().await.shutdown().await
            }
            _ => self.send(&frame(stream, ANSWER, &payload)).await,
        }
    }

    async fn payload(self: &Arc<Self>, request: &Request) -> Result<Vec<u8>, String> {
        let bytes = &request.payload[..];
        let odd = |e: protobuf::Error| e.to_string();
        match (request.method.as_str(), self.name) {
            ("Configure", _) => {
                let (kernel, version) = ("6.6.6".into(), "0".into());
                Ok(encode(&ConfigureResponse { kernel, version, follows_host_clock: true, ..Default::default() }))
            }
            ("Events", _) => self.events(EventsRequest::parse_from_bytes(bytes).map_err(odd)?.after).await,
            ("Create", _) => {
                let create = api::CreateTaskRequest::parse_from_bytes(bytes).map_err(odd)?;
                let pid = match self.name {
                    "pid-zero" => 0,
                    "pid-too-large" => u32::MAX,
                    "error-without-end" => return Err("no\n\x1b[2J".repeat(20_000)),
                    _ => INIT,
                };
                tokio::spawn(streams::play(self.name, self.dial.clone(), create.stdin.clone(), create.stdout.clone()));
                if self.name == "exits-before-the-start-and-again" {
                    for _ in 0..2000 {
                        self.exit(&create.id, "", 3);
                    }
                }
                Ok(encode(&api::CreateTaskResponse { pid, ..Default::default() }))
            }
            ("Start", _) => {
                let start = api::StartRequest::parse_from_bytes(bytes).map_err(odd)?;
                let pid = if start.exec_id.is_empty() { INIT } else { EXEC };
                self.started(&start.id);
                Ok(encode(&api::StartResponse { pid, ..Default::default() }))
            }
            ("Kill", "does-not-kill") => Ok(encode(&Empty::new())),
            ("Kill", _) => {
                let kill = api::KillRequest::parse_from_bytes(bytes).map_err(odd)?;
                self.exit(&kill.id, &kill.exec_id, 128 + kill.signal);
                Ok(encode(&Empty::new()))
            }
            ("Pids", "answers-with-a-million-processes") => Ok(empties(1_000_000)),
            ("Pids", "answers-too-late") => {
                tokio::time::sleep(Duration::from_secs(5)).await;
                Ok(Vec::new())
            }
            ("Pids" | "Delete", _) => Ok(Vec::new()),
            ("Stats", _) => {
                let value = match self.name {
                    "metrics-garbage" => vec![0xff; 100],
                    // Fields of a number that is none.
                    "unknown-fields" => [0x04, 0x00].repeat(10_000),
                    "metrics-too-large" => vec![0x22; 100_000],
                    _ => Vec::new(),
                };
                let stats = Any { type_url: "io.containerd.cgroups.v2.Metrics".into(), value, ..Any::default() };
                Ok(encode(&api::StatsResponse { stats: MessageField::some(stats), ..Default::default() }))
            }
            ("Export", _) => {
                let stream = ExportRequest::parse_from_bytes(bytes).map_err(odd)?.stream;
                tokio::spawn(streams::export(self.name, self.dial.clone(), stream));
                Ok(Vec::new())
            }
            ("Shutdown", _) => Ok(Vec::new()),
            _ => Ok(encode(&Empty::new())),
        }
    }

    /// What is said of a container as soon as it runs.
    fn started(&self, container: &str) {
        let oom = || Some(What::Oom(Oom { container_id: container.into(), ..Oom::default() }));
        match self.name {
            "events-with-a-gap" => self.push(Some(7), oom()),
            "events-backwards" => [1, 2, 1].into_iter().for_each(|number| self.push(Some(number), oom())),
            "events-of-no-kind" => self.push(None, None),
            "events-with-paths-for-names" => self.exit("../../etc/passwd", "", 0),
            "events-of-others" => (0..2000).for_each(|n| self.exit(&format!("other-{n}"), "", 0)),
            "out-of-memory-for-ever" => (0..2000).for_each(|_| self.push(None, oom())),
            _ => {}
        }
    }

    async fn events(&self, after: u64) -> Result<Vec<u8>, String> {
        loop {
            let events = self.events.lock().unwrap_or_else(PoisonError::into_inner).clone();
            let told = usize::try_from(after).unwrap_or(usize::MAX).min(events.len());
            match (self.name, &events[told..]) {
                ("no-events-at-once", _) => return Ok(Vec::new()),
                ("too-many-events-at-once", _) => return Ok(empties(120_000)),
                ("out-of-memory-for-ever", [.., last]) if after >= 2000 => {
                    // The same over and over, each with its number.
                    let numbered = (after + 1..after + 1000).map(|number| Event { number, ..last.clone() });
                    return Ok(encode(&EventsResponse { events: numbered.collect(), ..Default::default() }));
                }
                (_, []) => self.news.notified().await,
                (_, new) => {
                    let events = new.iter().take(512).cloned().collect();
                    return Ok(encode(&EventsResponse { events, ..Default::default() }));
                }
            }
        }
    }
}
