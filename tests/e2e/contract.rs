//! The shim's side of containerd's contract, where no containerd of the other tests looks: the bootstrap of newer ones,
//! the codes of refusals, streams that are left and taken up again, and bundles that containerd would not write.

use std::{
    fs::{self, File},
    io::{Read, Write},
};

use containerd_shim_protos::{
    api::{
        CloseIORequest, ConnectRequest, CreateTaskRequest, DeleteRequest, DeleteResponse, KillRequest, Mount,
        PidsRequest, ShutdownRequest, StartRequest, StateRequest, Status, WaitRequest,
    },
    protobuf::Message,
    ttrpc::Code,
};
use nacelle_tests::{
    command::{Cmd, patience, seconds, within},
    node::{BUSYBOX, Container, Node},
    shim::Shim,
};
use rustix::process::{Pid, Signal, kill_process};

use crate::Case;

const BOOTSTRAP: &str = "its bootstrap is that of its containerd";

pub const CASES: &[Case] = &[
    Case::only_nacelle("it_says_who_it_is", it_says_who_it_is, BOOTSTRAP),
    Case::only_nacelle("replies_suit_the_containerd", replies_suit_the_containerd, BOOTSTRAP),
    Case::only_nacelle("a_life_with_refusals", a_life_with_refusals, BOOTSTRAP),
    Case::only_nacelle("stdin_is_left_and_taken_up_again", stdin_is_left_and_taken_up_again, BOOTSTRAP),
    Case::only_nacelle("a_spec_that_is_not_json", a_spec_that_is_not_json, BOOTSTRAP),
    Case::only_nacelle("delete_after_a_crash", delete_after_a_crash, BOOTSTRAP),
];

fn it_says_who_it_is(node: &Node) {
    let version = Cmd::new(node.shim_program()).args(["-v"]).ok().text();
    assert!(version.contains("nacelle") && version.contains("0.1"), "{version}");
    let info = Cmd::new(node.shim_program()).args(["-info"]).ok();
    assert!(String::from_utf8_lossy(&info.out).contains("io.containerd.nacelle"), "{info}");
}

fn shutdown(shim: &Shim) {
    let request = ShutdownRequest { id: shim.id().into(), ..ShutdownRequest::default() };
    // The answer may be cut off by the end.
    shim.call(|task, ctx| task.shutdown(ctx, &request)).ok();
}

fn replies_suit_the_containerd(node: &Node) {
    let c = node.created(&[], BUSYBOX, &["true"]);
    let shim = Shim::bundle(node, &c.spec().to_string());
    let reply = shim.start(node);
    assert_eq!((reply.version, reply.protocol.as_str()), (3, "ttrpc"));
    let address = fs::read_to_string(shim.dir().join("address")).expect("read the address");
    assert_eq!(address, reply.address);
    // For the same id, there is no second shim; a containerd before 2.3 writes nothing and reads JSON.
    let again = shim.action(node, "start", Vec::new()).expect(0).text();
    let again: serde_json::Value = serde_json::from_str(&again).unwrap_or_else(|e| panic!("{e}: {again}"));
    assert_eq!((&again["version"], &again["protocol"]), (&2.into(), &"ttrpc".into()));
    assert_eq!(again["address"], reply.address);
    shutdown(&shim);
    c.delete();
}

/// A request that gives the task the root file system of a container of containerd's.
fn create(shim: &Shim, container: &Container) -> CreateTaskRequest {
    let mounts = container.mounts().into_iter().map(|mount| Mount {
        type_: mount.kind,
        source: mount.source,
        options: mount.options,
        ..Mount::default()
    });
    CreateTaskRequest {
        id: shim.id().into(),
        bundle: shim.dir().display().to_string(),
        rootfs: mounts.collect(),
        ..CreateTaskRequest::default()
    }
}

fn start(shim: &Shim) -> StartRequest {
    StartRequest { id: shim.id().into(), ..StartRequest::default() }
}

fn kill(shim: &Shim) -> KillRequest {
    KillRequest { id: shim.id().into(), signal: 9, ..KillRequest::default() }
}

fn delete(shim: &Shim) -> DeleteRequest {
    DeleteRequest { id: shim.id().into(), ..DeleteRequest::default() }
}

fn wait(shim: &Shim) -> u32 {
    let request = WaitRequest { id: shim.id().into(), ..WaitRequest::default() };
    shim.call(|task, ctx| task.wait(ctx, &request)).expect("wait").exit_status
}

fn refusal<T: std::fmt::Debug>(result: Result<T, (Code, String)>) -> Code {
    result.expect_err("should have been refused").0
}

fn a_life_with_refusals(node: &Node) {
    let c = node.created(&[], BUSYBOX, &["sleep", "1000"]);
    let shim = Shim::bundle(node, &c.spec().to_string());
    shim.start(node);
    let state = StateRequest { id: shim.id().into(), ..StateRequest::default() };
    let pids = PidsRequest { id: shim.id().into(), ..PidsRequest::default() };
    let connect = ConnectRequest { id: shim.id().into(), ..ConnectRequest::default() };

    assert_eq!(refusal(shim.call(|task, ctx| task.state(ctx, &state))), Code::NOT_FOUND);
    assert_eq!(refusal(shim.call(|task, ctx| task.start(ctx, &start(&shim)))), Code::NOT_FOUND);
    assert_ne!(shim.call(|task, ctx| task.connect(ctx, &connect)).expect("connect").shim_pid, 0);
    let created = shim.call(|task, ctx| task.create(ctx, &create(&shim, &c))).expect("create");
    assert_ne!(created.pid, 0);
    assert_eq!(refusal(shim.call(|task, ctx| task.create(ctx, &create(&shim, &c)))), Code::ALREADY_EXISTS);
    shim.call(|task, ctx| task.start(ctx, &start(&shim))).expect("start");
    let running = shim.call(|task, ctx| task.state(ctx, &state)).expect("state");
    assert_eq!((running.status.enum_value(), running.pid), (Ok(Status::RUNNING), created.pid));
    let processes = shim.call(|task, ctx| task.pids(ctx, &pids)).expect("pids").processes;
    assert!(!processes.is_empty(), "a live task has processes");
    assert_eq!(refusal(shim.call(|task, ctx| task.delete(ctx, &delete(&shim)))), Code::FAILED_PRECONDITION);

    // With a container, Shutdown does nothing.
    shutdown(&shim);
    shim.call(|task, ctx| task.kill(ctx, &kill(&shim))).expect("kill");
    assert_eq!(wait(&shim), 137);
    assert_eq!(refusal(shim.call(|task, ctx| task.kill(ctx, &kill(&shim)))), Code::NOT_FOUND);
    let deleted = shim.call(|task, ctx| task.delete(ctx, &delete(&shim))).expect("delete");
    assert_eq!((deleted.exit_status, deleted.pid), (137, created.pid));
    assert_eq!(refusal(shim.call(|task, ctx| task.delete(ctx, &delete(&shim)))), Code::NOT_FOUND);
    let life = ["/tasks/create", "/tasks/start", "/tasks/exit", "/tasks/delete"];
    within(patience(), "all events arrive", || (shim.topics().len() >= life.len()).then_some(()));
    assert_eq!(shim.topics(), life);
    shutdown(&shim);
    c.delete();
}

fn stdin_is_left_and_taken_up_again(node: &Node) {
    let c = node.created(&[], BUSYBOX, &["cat"]);
    let shim = Shim::bundle(node, &c.spec().to_string());
    shim.start(node);
    let (stdin, stdout) = (shim.fifo("stdin"), shim.fifo("stdout"));
    // Both ways, so that no open waits for another.
    let mut out = File::options().read(true).write(true).open(&stdout).expect("open a FIFO");
    let mut request = create(&shim, &c);
    request.stdin = stdin.display().to_string();
    request.stdout = stdout.display().to_string();
    shim.call(|task, ctx| task.create(ctx, &request)).expect("create");
    shim.call(|task, ctx| task.start(ctx, &start(&shim))).expect("start");
    for word in ["first", "second"] {
        let mut writer = File::options().write(true).open(&stdin).expect("open a FIFO");
        writer.write_all(word.as_bytes()).expect("write to a FIFO");
        drop(writer);
        let mut read = vec![0; word.len()];
        out.read_exact(&mut read).expect("read from a FIFO");
        assert_eq!(String::from_utf8_lossy(&read), word);
    }
    // A writer that leaves is no end of file; this is.
    let close = CloseIORequest { id: shim.id().into(), stdin: true, ..CloseIORequest::default() };
    shim.call(|task, ctx| task.close_io(ctx, &close)).expect("close stdin");
    assert_eq!(wait(&shim), 0);
    shim.call(|task, ctx| task.delete(ctx, &delete(&shim))).expect("delete");
    shutdown(&shim);
    c.delete();
}

fn a_spec_that_is_not_json(node: &Node) {
    let c = node.created(&[], BUSYBOX, &["true"]);
    for spec in ["", "not json", "[]", "{", "{\"ociVersion\": 1}", "\u{0}\u{1}"] {
        let shim = Shim::bundle(node, spec);
        let started = shim.action(node, "start", shim.bootstrap_params());
        if started.code == 0 {
            // It may find out later, when it is told to create the task.
            shim.connect(&fs::read_to_string(shim.dir().join("address")).expect("read the address"));
            let (_, message) = shim.call(|task, ctx| task.create(ctx, &create(&shim, &c))).expect_err("a task");
            assert!(message.contains("config.json"), "for {spec:?}: {message}");
            shutdown(&shim);
        } else {
            let message = String::from_utf8_lossy(&started.out).into_owned() + &started.err;
            assert!(message.contains("config.json"), "for {spec:?}: {started}");
        }
    }
    c.delete();
}

fn delete_after_a_crash(node: &Node) {
    let c = node.created(&[], BUSYBOX, &["sleep", "1000"]);
    let shim = Shim::bundle(node, &c.spec().to_string());
    shim.start(node);
    shim.call(|task, ctx| task.create(ctx, &create(&shim, &c))).expect("create");
    shim.call(|task, ctx| task.start(ctx, &start(&shim))).expect("start");
    let connect = ConnectRequest { id: shim.id().into(), ..ConnectRequest::default() };
    let pid = shim.call(|task, ctx| task.connect(ctx, &connect)).expect("connect").shim_pid;
    kill_process(Pid::from_raw(pid.cast_signed()).expect("a process id"), Signal::KILL).expect("kill the shim");
    // containerd gives the action 5 s, and may call it again.
    for _ in 0..2 {
        let deleted = shim.action(node, "delete", Vec::new()).expect(0);
        assert!(deleted.took < seconds(5), "{deleted}");
        let response = DeleteResponse::parse_from_bytes(&deleted.out).unwrap_or_else(|e| panic!("{e}: {deleted}"));
        assert_eq!(response.exit_status, 137);
    }
    c.delete();
}
