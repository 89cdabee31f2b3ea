//! OCI hooks run on the node: networking of nerdctl and others rests on them.

use std::{fs, os::unix::fs::PermissionsExt, path::PathBuf};

use nacelle_tests::{
    command::{patience, within},
    node::{BUSYBOX, Node},
};
use serde_json::{Value, json};

use crate::Case;

pub const CASES: &[Case] = &[
    Case::new("get_the_state_of_the_container", get_the_state_of_the_container),
    Case::new("that_fail_stop_the_start", that_fail_stop_the_start),
];

/// A hook that notes arguments, environment, state, and whether the process of the state exists and has a network
/// namespace.
fn recorder(node: &Node, name: &str) -> (PathBuf, PathBuf) {
    let (program, record) = (node.path(name), node.path(format!("{name}.record")));
    let script = format!(
        "#!/bin/sh\nstate=$(cat)\npid=$(echo \"$state\" | sed 's/.*\"pid\": *\\([0-9]*\\).*/\\1/')\n\
         netns=$(readlink /proc/$pid/ns/net)\nprintf '%s\\n' \"$*\" \"$WORD\" \"$netns\" \"$state\" >{0}.part\nmv {0}.part {0}\n",
        record.display()
    );
    fs::write(&program, script).expect("write a hook");
    fs::set_permissions(&program, fs::Permissions::from_mode(0o755)).expect("make the hook executable");
    (program, record)
}

fn get_the_state_of_the_container(node: &Node) {
    let (create, created) = recorder(node, "create-hook");
    let (stop, stopped) = recorder(node, "stop-hook");
    let c = node.created(&[], BUSYBOX, &["sleep", "1000"]);
    let hook = |path: &PathBuf| json!([{"path": path, "args": ["hook", "argument"], "env": ["WORD=hello", "PATH=/usr/bin:/bin"]}]);
    c.edit(|spec| {
        spec["hooks"] = json!({"createRuntime": hook(&create), "poststop": hook(&stop)});
        spec["annotations"] = json!({"color": "blue"});
    });
    c.start(&["--detach"]).ok();
    let record = fs::read_to_string(&created).expect("the hook ran before the start returned");
    let [arguments, word, netns, state]: [&str; 4] =
        record.splitn(4, '\n').collect::<Vec<_>>().try_into().expect("four lines");
    assert_eq!((arguments, word), ("argument", "hello"));
    assert!(netns.starts_with("net:["), "the process of the state had no network namespace: {record}");
    let state: Value = serde_json::from_str(state).expect("the state is JSON");
    assert_eq!(state["id"], c.id());
    assert_eq!(state["bundle"], node.bundle(c.id()).to_str().expect("a plain path"));
    assert_eq!(state["annotations"]["color"], "blue");
    assert!(state["status"] == "creating" || state["status"] == "created", "{state}");
    assert_eq!(state["pid"], c.pid(), "the pid of the state is that of the task");
    assert!(!stopped.exists());
    c.remove();
    let record = within(patience(), "the poststop hook ran", || fs::read_to_string(&stopped).ok());
    assert!(record.contains("stopped"), "{record}");
}

fn that_fail_stop_the_start(node: &Node) {
    let program = node.path("failing-hook");
    fs::write(&program, "#!/bin/sh\necho the hook says no >&2\nexit 3\n").expect("write a hook");
    fs::set_permissions(&program, fs::Permissions::from_mode(0o755)).expect("make the hook executable");
    let c = node.created(&[], BUSYBOX, &["sleep", "1000"]);
    c.edit(|spec| spec["hooks"] = json!({"createRuntime": [{"path": program}]}));
    c.start(&["--detach"]).run().expect_failure(&["the hook says no"]);
    c.delete();
}
