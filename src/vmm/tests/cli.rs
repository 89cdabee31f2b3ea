//! The program as the shim meets it, up to the point where root is needed: what it says when it is not given what it
//! wants.

use std::fs::{self, File};
use std::io::{self, Read, Write};
use std::os::fd::OwnedFd;
use std::path::Path;
use std::process::{Command, Stdio};

use command_fds::{CommandFdExt, FdMapping};
use nacelle_protocol::GENERATION;
use nacelle_protocol::ids::SandboxId;
use nacelle_protocol::vm::{Jail, Landlock, MAX_JSON, Network, Report, Seccomp, VmConfig};

fn vmm() -> Command {
    Command::new(env!("CARGO_BIN_EXE_nacelle-vmm"))
}

/// Runs it with `config` on descriptor 3; it has to fail. Returns stage, error number and message.
fn failure(config: &[u8]) -> (String, Option<i32>, String) {
    let (config_out, mut config_in) = io::pipe().expect("pipe");
    let (mut reports, report) = io::pipe().expect("pipe");
    let (lifeline, _hold) = io::pipe().expect("pipe");
    let null = File::options().write(true).open("/dev/null").expect("open");
    let given = [(OwnedFd::from(config_out), 3), (report.into(), 4), (lifeline.into(), 5), (null.into(), 6)];
    let mut command = vmm();
    command.stdin(Stdio::null()).stdout(Stdio::null()).stderr(Stdio::null());
    command.fd_mappings(given.map(|(parent_fd, child_fd)| FdMapping { parent_fd, child_fd }).into()).expect("mappings");
    let mut child = command.spawn().expect("spawn");
    drop(command);
    // It may refuse before it has read everything.
    let _ = config_in.write_all(config);
    drop(config_in);
    let mut text = String::new();
    reports.read_to_string(&mut text).expect("read");
    assert_eq!(child.wait().expect("wait").code(), Some(1), "{text}");
    assert_eq!(text.lines().count(), 1, "{text}");
    match serde_json::from_str(&text).expect("report") {
        Report::Failed { stage, errno, message } => (stage, errno, message),
        other => panic!("{other:?}"),
    }
}

fn config(dir: &Path) -> VmConfig {
    VmConfig {
        generation: GENERATION,
        sandbox: SandboxId::new("pod-1").expect("id"),
        vcpus: 1,
        memory_mib: 128,
        kernel: dir.join("vmlinux"),
        agent: dir.join("agent"),
        kernel_args: Vec::new(),
        shares: Vec::new(),
        disks: Vec::new(),
        sockets: Vec::new(),
        awaits_nics: false,
        jail: Jail {
            root: dir.join("jail"),
            uid_base: 700_000,
            uid_count: 65_536,
            pod_root: None,
            network: Network::New,
            cgroups: Vec::new(),
            max_files: 1024,
            landlock: Landlock::default(),
            seccomp: Seccomp::default(),
        },
    }
}

fn json(config: &VmConfig) -> Vec<u8> {
    serde_json::to_vec(config).expect("serialize")
}

#[test]
fn tells_its_version() {
    let output = vmm().arg("--version").output().expect("run");
    assert!(output.status.success());
    let text = String::from_utf8(output.stdout).expect("text");
    assert_eq!(text, format!("nacelle-vmm {} (generation {GENERATION})\n", env!("CARGO_PKG_VERSION")));
}

#[test]
fn a_start_by_hand_is_explained() {
    for arguments in [&[][..], &["run"]] {
        let output = vmm().args(arguments).stdin(Stdio::null()).output().expect("run");
        assert_eq!(output.status.code(), Some(2));
        let text = String::from_utf8(output.stderr).expect("text");
        assert!(text.contains("started by containerd-shim-nacelle-v2") && text.lines().count() == 1, "{text}");
    }
}

#[test]
fn volumes_are_described_in_three_words() {
    for arguments in [&["bind"][..], &["bind", "x"], &["bind", "1", "/a"], &["bind", "1", "/a", "/b", "rx"]] {
        let output = vmm().args(arguments).output().expect("run");
        assert_eq!((output.status.code(), output.stdout.len()), (Some(2), 0), "{arguments:?}");
    }
    assert!(vmm().args(["bind", "1"]).status().expect("run").success(), "no volumes are no work");
}

#[test]
fn a_bad_configuration_is_refused() {
    let dir = tempfile::tempdir().expect("directory");
    let (stage, _, message) = failure(b"{");
    assert_eq!(stage, "configuration");
    assert!(message.starts_with("read configuration: EOF"), "{message}");
    let (_, _, message) = failure(format!("{{\"generation\":{},\"new\":1}}", GENERATION + 1).as_bytes());
    assert_eq!(message, format!("read configuration: generation {}, expected {GENERATION}", GENERATION + 1));
    let (_, _, message) = failure(&vec![b' '; MAX_JSON + 1]);
    assert_eq!(message, format!("read configuration: longer than {MAX_JSON} bytes"));
    let mut odd = config(dir.path());
    odd.vcpus = 0;
    let (stage, _, message) = failure(&json(&odd));
    assert_eq!((stage.as_str(), message.as_str()), ("plan", "plan machine: it has no virtual CPU"));
}

#[test]
fn bad_files_are_named() {
    let dir = tempfile::tempdir().expect("directory");
    let config = config(dir.path());
    let kernel = config.kernel.display().to_string();
    let (stage, errno, message) = failure(&json(&config));
    assert_eq!((stage.as_str(), errno), ("kernel", Some(2)));
    assert!(message.starts_with(&format!("read guest kernel {kernel}: No such file")), "{message}");
    fs::write(&config.kernel, "").expect("write");
    assert_eq!(failure(&json(&config)).2, format!("read guest kernel {kernel}: it is empty"));
    fs::write(&config.kernel, "MZ").expect("write");
    assert!(failure(&json(&config)).2.contains("it is not an ELF file"));
}
