//! Events to containerd, in order, without anybody waiting for them.
//!
//! ```text
//!  publish ──► [ bounded queue ] ──► one task: connect, Forward, next       containerd.services.events.ttrpc.v1.Events
//!                                      ▲           │
//!                                      └─ back off ┘  the same event again, so that the order never breaks
//! ```
//!
//! containerd may restart at any time: the task reconnects for as long as the shim lives. An event that containerd itself
//! refuses is dropped, since it would refuse it again. A queue that is full drops the event and says so: that takes a
//! containerd that has been away for thousands of them, and it asks for the state of every task when it comes back.

use std::path::PathBuf;
use std::time::{Duration, SystemTime, UNIX_EPOCH};

use containerd_shim_protos::events::task as events;
use containerd_shim_protos::shim::event::Envelope;
use containerd_shim_protos::shim::events::ForwardRequest;
use containerd_shim_protos::shim_async::{Client, EventsClient};
use protobuf::well_known_types::any::Any;
use protobuf::well_known_types::timestamp::Timestamp;
use protobuf::{MessageField, MessageFull};
use tokio::net::UnixStream;
use tokio::sync::mpsc;
use tokio::task::JoinHandle;
use tokio::time::{sleep, timeout};
use ttrpc::asynchronous::transport::Socket;

/// Events that wait while containerd is away.
const QUEUE: usize = 8192;
/// How long containerd may take to accept one.
const DEADLINE: Duration = Duration::from_secs(5);
/// Pauses between attempts, doubling from the first to the second.
const BACKOFF: (Duration, Duration) = (Duration::from_millis(50), Duration::from_secs(2));

/// An event with its topic, ready to be sent.
#[derive(Clone, Debug, PartialEq)]
pub struct Event {
    topic: &'static str,
    body: Any,
}

macro_rules! topics {
    ($($message:ident => $topic:literal),* $(,)?) => {
        $(impl From<events::$message> for Event {
            fn from(message: events::$message) -> Self {
                Self { topic: $topic, body: any(&message) }
            }
        })*
    };
}

topics! {
    TaskCreate => "/tasks/create",
    TaskStart => "/tasks/start",
    TaskExecAdded => "/tasks/exec-added",
    TaskExecStarted => "/tasks/exec-started",
    TaskExit => "/tasks/exit",
    TaskOOM => "/tasks/oom",
    TaskDelete => "/tasks/delete",
    TaskPaused => "/tasks/paused",
    TaskResumed => "/tasks/resumed",
}

/// A message with its bare name, as containerd's `typeurl` writes it.
pub fn any<M: MessageFull>(message: &M) -> Any {
    // Encoding fails only where a required field is missing, which proto3 does not have.
    let value = message.write_to_bytes().unwrap_or_default();
    Any { type_url: M::descriptor().full_name().to_owned(), value, ..Any::default() }
}

/// A time as protobuf has it, from nanoseconds since 1970.
pub fn timestamp(ns: i64) -> Timestamp {
    let (seconds, nanos) = (ns.div_euclid(1_000_000_000), ns.rem_euclid(1_000_000_000) as i32);
    Timestamp { seconds, nanos, ..Timestamp::default() }
}

/// Nanoseconds since 1970.
pub fn now_ns() -> i64 {
    SystemTime::now().duration_since(UNIX_EPOCH).map_or(0, |d| d.as_nanos() as i64)
}

/// The queue's near end.
#[derive(Debug)]
pub struct Publisher {
    namespace: String,
    queue: mpsc::Sender<Envelope>,
    task: JoinHandle<()>,
}

impl Publisher {
    /// Publishes to containerd's ttrpc socket at `address`; an empty address drops everything.
    pub fn new(namespace: &str, address: &str) -> Self {
        let (queue, events) = mpsc::channel(QUEUE);
        let path = PathBuf::from(address.strip_prefix("unix://").unwrap_or(address));
        if address.is_empty() {
            tracing::warn!("containerd gave no address for events: there will be none");
        }
        let task = tokio::spawn(forward_all(path, events));
        Self { namespace: namespace.to_owned(), queue, task }
    }

    /// Queues an event. Never waits.
    pub fn publish(&self, event: impl Into<Event>) {
        let Event { topic, body } = event.into();
        tracing::debug!("event {topic}");
        let envelope = Envelope {
            timestamp: MessageField::some(timestamp(now_ns())),
            namespace: self.namespace.clone(),
            topic: topic.to_owned(),
            event: MessageField::some(body),
            ..Envelope::default()
        };
        if self.queue.try_send(envelope).is_err() {
            tracing::error!("event {topic} is dropped: {QUEUE} events wait already");
        }
    }

    /// Waits until everything is sent, for as long as `patience`.
    pub async fn close(self, patience: Duration) {
        drop(self.queue);
        if timeout(patience, self.task).await.is_err() {
            tracing::error!("events are lost: containerd does not take them");
        }
    }
}

async fn forward_all(path: PathBuf, mut events: mpsc::Receiver<Envelope>) {
    let mut client: Option<EventsClient> = None;
    while let Some(envelope) = events.recv().await {
        if path.as_os_str().is_empty() {
            continue;
        }
        let topic = envelope.topic.clone();
        let request = ForwardRequest { envelope: MessageField::some(envelope), ..ForwardRequest::default() };
        let mut pause = BACKOFF.0;
        loop {
            let result = match &client {
                Some(client) => client.forward(ttrpc::context::with_duration(DEADLINE), &request).await.map(drop),
                None => match UnixStream::connect(&path).await {
                    Ok(stream) => {
                        client = Some(EventsClient::new(Client::new(Socket::new(stream))));
                        continue;
                    }
                    Err(e) => Err(ttrpc::Error::Socket(e.to_string())),
                },
            };
            match result {
                Ok(()) => break,
                Err(ttrpc::Error::RpcStatus(status)) if status.code() != ttrpc::Code::DEADLINE_EXCEEDED => {
                    tracing::error!("event {topic} is refused: {}", status.message());
                    break;
                }
                Err(e) => {
                    tracing::warn!("send event {topic}: {e}");
                    client = None;
                    sleep(pause).await;
                    pause = (pause * 2).min(BACKOFF.1);
                }
            }
        }
    }
}

#[cfg(test)]
mod tests {
    use std::sync::{Arc, Mutex};

    use containerd_shim_protos::shim_async::{Events, create_events};
    use containerd_shim_protos::types::empty::Empty;
    use protobuf::Message;
    use ttrpc::r#async::{Server, TtrpcContext};

    use super::*;

    /// Takes events, and fails the first `failures`.
    struct Fake {
        failures: Mutex<u32>,
        seen: Arc<Mutex<Vec<String>>>,
    }

    #[async_trait::async_trait]
    impl Events for Fake {
        async fn forward(&self, _: &TtrpcContext, request: ForwardRequest) -> ttrpc::Result<Empty> {
            let late = {
                let mut failures = self.failures.lock().expect("lock");
                let late = *failures > 0;
                *failures = failures.saturating_sub(1);
                late
            };
            if late {
                return Err(ttrpc::Error::RpcStatus(ttrpc::get_status(ttrpc::Code::DEADLINE_EXCEEDED, "late")));
            }
            let event = events::TaskOOM::parse_from_bytes(&request.envelope.event.value).expect("decode");
            assert_eq!(request.envelope.event.type_url, "containerd.events.TaskOOM");
            assert_eq!((request.envelope.topic.as_str(), request.envelope.namespace.as_str()), ("/tasks/oom", "ns"));
            self.seen.lock().expect("lock").push(event.container_id);
            Ok(Empty::new())
        }
    }

    fn oom(n: u32) -> events::TaskOOM {
        events::TaskOOM { container_id: n.to_string(), ..Default::default() }
    }

    async fn serve(path: &std::path::Path, failures: u32, seen: &Arc<Mutex<Vec<String>>>) -> Server {
        let service = create_events(Arc::new(Fake { failures: Mutex::new(failures), seen: seen.clone() }));
        let mut server =
            Server::new().bind(&format!("unix://{}", path.display())).expect("bind").register_service(service);
        server.start().await.expect("start");
        server
    }

    #[tokio::test]
    async fn order_survives_failures_and_a_restart_of_containerd() {
        let dir = tempfile::tempdir().expect("tempdir");
        let path = dir.path().join("events.sock");
        let seen = Arc::new(Mutex::new(Vec::new()));
        let publisher = Publisher::new("ns", &path.display().to_string());
        // Nobody is there yet.
        (0..10).for_each(|n| publisher.publish(oom(n)));
        sleep(Duration::from_millis(20)).await;
        let mut server = serve(&path, 2, &seen).await;
        while seen.lock().expect("lock").len() < 10 {
            sleep(Duration::from_millis(5)).await;
        }
        server.shutdown().await.expect("shutdown");
        std::fs::remove_file(&path).expect("remove");
        (10..20).for_each(|n| publisher.publish(oom(n)));
        sleep(Duration::from_millis(20)).await;
        let _server = serve(&path, 1, &seen).await;
        publisher.close(Duration::from_secs(5)).await;
        let expected: Vec<String> = (0..20).map(|n| n.to_string()).collect();
        assert_eq!(*seen.lock().expect("lock"), expected);
    }

    #[tokio::test]
    async fn a_containerd_that_is_gone_blocks_nobody() {
        let publisher = Publisher::new("ns", "/nonexistent/events.sock");
        let begin = std::time::Instant::now();
        (0..QUEUE as u32 + 10).for_each(|n| publisher.publish(oom(n)));
        publisher.close(Duration::from_millis(50)).await;
        assert!(begin.elapsed() < Duration::from_secs(5));
    }

    #[test]
    fn timestamps() {
        let t = timestamp(-1);
        assert_eq!((t.seconds, t.nanos), (-1, 999_999_999));
        assert_eq!(timestamp(1_500_000_000).seconds, 1);
    }
}
