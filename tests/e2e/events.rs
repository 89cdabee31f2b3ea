//! The events that containerd passes on: each once, and in their order.

use nacelle_tests::{
    command::PATIENCE,
    events::Events,
    node::{BUSYBOX, Node},
};

use crate::Case;

pub const CASES: &[Case] = &[
    Case::new("of_a_life_in_their_order", of_a_life_in_their_order),
    Case::new("of_tasks_that_end_at_once", of_tasks_that_end_at_once),
];

fn topics(events: &Events, id: &str) -> Vec<String> {
    let tasks = events.of(id).into_iter().filter_map(|e| e.topic.strip_prefix("/tasks/").map(str::to_owned));
    tasks.collect()
}

fn of_a_life_in_their_order(node: &Node) {
    let events = Events::subscribe(node);
    let c = node.detached(&[], BUSYBOX, &["sleep", "1000"]);
    let pid = u64::from(c.pid());
    c.exec_as("exec", &[], &["sh", "-c", "exit 4"]).run().expect(4);
    node.ctr(["tasks", "pause", c.id()]).ok();
    node.ctr(["tasks", "resume", c.id()]).ok();
    let id = c.id().to_owned();
    c.remove();
    events.wait(&id, PATIENCE, |e| e.topic == "/tasks/delete");

    let order = ["create", "start", "exec-added", "exec-started", "exit", "paused", "resumed", "exit", "delete"];
    assert_eq!(topics(&events, &id), order);
    let all = events.of(&id);
    let find = |topic: &str, of: &str| {
        let found = all.iter().find(|e| e.topic == topic && (of.is_empty() || e.fields["id"] == of));
        found.unwrap_or_else(|| panic!("no {topic} of {of}")).fields.clone()
    };
    assert_eq!(find("/tasks/create", "")["pid"], pid);
    assert_eq!(find("/tasks/start", "")["pid"], pid);
    assert_eq!(find("/tasks/exec-added", "")["exec_id"], "exec");
    assert_eq!(find("/tasks/exec-started", "")["exec_id"], "exec");
    assert_eq!(find("/tasks/exit", "exec")["exit_status"], 4);
    let exit = find("/tasks/exit", &id);
    assert_eq!((&exit["exit_status"], &exit["pid"]), (&137.into(), &pid.into()));
    assert!(exit["exited_at"]["seconds"].as_u64().is_some_and(|s| s > 1_600_000_000), "{exit}");
    assert_eq!(find("/tasks/delete", "")["exit_status"], 137);
}

fn of_tasks_that_end_at_once(node: &Node) {
    let events = Events::subscribe(node);
    let id = node.fresh_id();
    node.run_as(&id, &["--rm"], BUSYBOX, &["true"]).ok();
    events.wait(&id, PATIENCE, |e| e.topic == "/tasks/delete");
    assert_eq!(topics(&events, &id), ["create", "start", "exit", "delete"]);

    let c = node.detached(&[], BUSYBOX, &["sleep", "1000"]);
    for n in 0..10 {
        c.exec_as(&format!("x{n}"), &[], &["true"]).ok();
    }
    let id = c.id().to_owned();
    c.remove();
    events.wait(&id, PATIENCE, |e| e.topic == "/tasks/delete");
    for n in 0..10 {
        let of_exec = |e: &nacelle_tests::events::Event| {
            [&e.fields["exec_id"], &e.fields["id"]].iter().any(|id| **id == format!("x{n}"))
        };
        let order: Vec<_> = events.of(&id).into_iter().filter(of_exec).map(|e| e.topic).collect();
        assert_eq!(order, ["/tasks/exec-added", "/tasks/exec-started", "/tasks/exit"], "of exec x{n}");
    }
    assert_eq!(topics(&events, &id).last().map(String::as_str), Some("delete"));
}
