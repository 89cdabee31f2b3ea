//! The events that containerd passes on: each once, and in their order.

use nacelle_tests::{
    command::patience,
    events::Events,
    node::{BUSYBOX, Node},
};

use crate::Case;

pub const CASES: &[Case] = &[
    Case::new("of_a_life_in_their_order", of_a_life_in_their_order),
    Case::new("of_tasks_that_end_at_once", of_tasks_that_end_at_once),
];

/// The container's life is complete in the events, and these were its topics.
fn lived(node: &Node, events: &Events, id: &str, topics: &[&str]) {
    // runc's shim of containerd 2 may end before it has said that it deleted the task.
    let last = if node.is_nacelle() { "/tasks/delete" } else { "/tasks/exit" };
    events.wait(id, patience(), |e| e.topic == last && (last == "/tasks/delete" || e.fields["id"] == id));
    let mut seen: Vec<_> = events.of(id).into_iter().map(|e| e.topic.replace("/tasks/", "")).collect();
    if !node.is_nacelle() && seen.last().is_some_and(|topic| topic == "exit") {
        seen.push("delete".into());
    }
    assert_eq!(seen, topics);
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
    let order = ["create", "start", "exec-added", "exec-started", "exit", "paused", "resumed", "exit", "delete"];
    lived(node, &events, &id, &order);
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
    if node.is_nacelle() {
        assert_eq!(find("/tasks/delete", "")["exit_status"], 137);
    }
}

fn of_tasks_that_end_at_once(node: &Node) {
    let events = Events::subscribe(node);
    let id = node.fresh_id();
    node.run_as(&id, &["--rm"], BUSYBOX, &["true"]).ok();
    lived(node, &events, &id, &["create", "start", "exit", "delete"]);

    let c = node.detached(&[], BUSYBOX, &["sleep", "1000"]);
    for n in 0..10 {
        c.exec_as(&format!("x{n}"), &[], &["true"]).ok();
    }
    let id = c.id().to_owned();
    c.remove();
    let mut topics = vec!["create", "start"];
    topics.extend(["exec-added", "exec-started", "exit"].repeat(10));
    topics.extend(["exit", "delete"]);
    lived(node, &events, &id, &topics);
    for n in 0..10 {
        let of_exec = |e: &nacelle_tests::events::Event| {
            [&e.fields["exec_id"], &e.fields["id"]].iter().any(|id| **id == format!("x{n}"))
        };
        let order: Vec<_> = events.of(&id).into_iter().filter(of_exec).map(|e| e.topic).collect();
        assert_eq!(order, ["/tasks/exec-added", "/tasks/exec-started", "/tasks/exit"], "of exec x{n}");
    }
}
