//! containerd's events as `ctr events` prints them: what users and their tools see.

use std::{sync::Mutex, time::Duration};

use serde_json::Value;

use crate::{
    command::{Running, eventually, patience, within},
    node::{NAMESPACE, Node},
};

/// One event.
#[derive(Clone, Debug)]
pub struct Event {
    /// Such as `/tasks/exit`.
    pub topic: String,
    /// Its fields.
    pub fields: Value,
}

impl Event {
    /// A line is `DATE TIME ZONE ZONE NAMESPACE TOPIC JSON`.
    fn parse(line: &str) -> Option<Self> {
        let (before, rest) = line.split_once(" /")?;
        let (topic, fields) = rest.split_once(' ')?;
        let fields = serde_json::from_str(fields).ok()?;
        (!before.is_empty()).then(|| Self { topic: format!("/{topic}"), fields })
    }

    /// The event is about this container: its own `container_id`, or in older events `id`.
    fn concerns(&self, id: &str) -> bool {
        self.fields["container_id"] == id
    }
}

/// A subscription to everything, from its start on.
pub struct Events {
    running: Running,
    tick: Mutex<u32>,
}

impl Events {
    /// Subscribes; on return, events do arrive.
    pub fn subscribe(node: &Node) -> Self {
        let events = Self { running: node.ctr(["events"]).spawn(), tick: Mutex::new(0) };
        within(patience(), "events arrive", || {
            let mut tick = events.tick.lock().expect("no test panics here");
            *tick += 1;
            node.ctr(["namespaces", "label", NAMESPACE, &format!("tick={tick}")]).ok();
            events.running.printed().contains("/namespaces/update").then_some(())
        });
        events
    }

    /// All events about a container so far, in their order.
    pub fn of(&self, id: &str) -> Vec<Event> {
        self.running.printed().lines().filter_map(Event::parse).filter(|e| e.concerns(id)).collect()
    }

    /// Waits for the first event about a container for which `wanted` holds.
    pub fn wait(&self, id: &str, limit: Duration, wanted: impl Fn(&Event) -> bool) -> Event {
        eventually(limit, || self.of(id).into_iter().find(&wanted)).unwrap_or_else(|| {
            panic!("no such event about {id} within {limit:?}; there were:\n{}", self.running.printed())
        })
    }

    /// Waits for the exit of a container's main process and returns its status.
    pub fn exit_of(&self, id: &str, limit: Duration) -> u64 {
        let event = self.wait(id, limit, |e| e.topic == "/tasks/exit" && e.fields["id"] == id);
        event.fields["exit_status"].as_u64().unwrap_or_default()
    }
}
