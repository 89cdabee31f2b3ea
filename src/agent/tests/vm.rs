//! The agent as PID 1 of a real microVM, with this test as its host.
//!
//! Needs root, KVM and `nacelle-vmm`, so `src/agent/tests/vm.sh` runs it in the testbed. What it needs comes by the
//! environment:
//!
//! ```text
//!  NACELLE_TEST_VMM      nacelle-vmm          NACELLE_TEST_KERNEL   vmlinux
//!  NACELLE_TEST_AGENT    the image of a root with nacelle-agent
//!  NACELLE_TEST_LOWER    an EROFS image of `base_tree`
//!  NACELLE_TEST_UPPER    an ext4 image        NACELLE_TEST_LATE     an EROFS image with the file `late`
//! ```

mod support;

use std::fs::{self, File};
use std::os::fd::OwnedFd;
use std::os::unix::fs::PermissionsExt;
use std::path::PathBuf;
use std::process::{Child, Command, Stdio};
use std::time::{Duration, Instant, SystemTime, UNIX_EPOCH};

use command_fds::{CommandFdExt, FdMapping};
use containerd_shim_protos::api::{StatsRequest, UpdateTaskRequest};
use nacelle_protocol::GENERATION;
use nacelle_protocol::agent::{
    ConfigureRequest, EventsRequest, LAYERS_DIR, LAYERS_TAG, SetTimeRequest, Share as GuestShare, ShutdownRequest,
    UPPER_SERIAL,
};
use nacelle_protocol::ids::SandboxId;
use nacelle_protocol::stream::{RPC_PORT, STREAM_PORT};
use nacelle_protocol::vm::{
    CONFIG_FD, CONSOLE_FD, Disk, Jail, LIFELINE_FD, Landlock, Network, REPORT_FD, Seccomp, Share, Socket, VmConfig,
};
use protobuf::well_known_types::any::Any;
use protobuf::{Message, MessageField};
use serde_json::json;
use support::{Host, Names, Stdin, base_tree, long, next, process, spec};
use tokio::net::UnixListener;
use tokio::sync::mpsc;

fn setting(name: &str) -> PathBuf {
    std::env::var_os(name).unwrap_or_else(|| panic!("{name} is not set")).into()
}

struct Machine {
    vmm: Child,
    directory: tempfile::TempDir,
    _lifeline: OwnedFd,
}

fn pipe() -> (OwnedFd, OwnedFd) {
    nacelle_agent::fd::pipe().expect("pipe")
}

/// Boots a machine. Returns once the agent has dialled.
async fn boot(memory_mib: u32) -> (Machine, Host) {
    let directory = tempfile::Builder::new().prefix("nacelle-vm-").tempdir_in("/var/tmp").expect("directory");
    let at = |name: &str| directory.path().join(name);
    fs::set_permissions(directory.path(), fs::Permissions::from_mode(0o755)).expect("mode");
    fs::create_dir(at("layers")).expect("layers");
    fs::create_dir(at("root")).expect("root");
    fs::copy(setting("NACELLE_TEST_LOWER"), at("layers/base")).expect("lower");
    fs::copy(setting("NACELLE_TEST_UPPER"), at("upper.ext4")).expect("upper");
    std::os::unix::fs::chown(at("upper.ext4"), Some(231_072), Some(231_072)).expect("own");

    let (sender, dialled) = mpsc::unbounded_channel();
    let sockets = [RPC_PORT, STREAM_PORT].map(|port| {
        let source = at(&format!("{port}.sock"));
        let listener = UnixListener::bind(&source).expect("listen");
        fs::set_permissions(&source, fs::Permissions::from_mode(0o777)).expect("mode");
        let sender = sender.clone();
        tokio::spawn(async move {
            while let Ok((connection, _)) = listener.accept().await {
                if sender.send(connection).is_err() {
                    break;
                }
            }
        });
        Socket { port, source }
    });
    let config = VmConfig {
        generation: GENERATION,
        sandbox: SandboxId::new("test").expect("id"),
        vcpus: 1,
        memory_mib,
        kernel: setting("NACELLE_TEST_KERNEL"),
        agent: setting("NACELLE_TEST_AGENT"),
        kernel_args: std::env::var("NACELLE_TEST_KERNEL_ARGS")
            .iter()
            .flat_map(|a| a.split_whitespace())
            .map(Into::into)
            .collect(),
        shares: vec![Share { tag: LAYERS_TAG.into(), source: at("layers"), read_only: true, idmap: false }],
        disks: vec![Disk::raw(UPPER_SERIAL, at("upper.ext4"), false)],
        sockets: sockets.into(),
        awaits_nics: false,
        jail: Jail {
            root: at("root"),
            uid_base: 231_072,
            uid_count: 65_536,
            pod_root: None,
            network: Network::New,
            cgroups: vec![],
            max_files: 1 << 16,
            landlock: Landlock::default(),
            seccomp: Seccomp::default(),
        },
    };
    let (config_read, config_write) = pipe();
    let (lifeline_read, lifeline) = pipe();
    let (report_read, report_write) = pipe();
    let (console_read, console_write) = pipe();
    for (name, pipe) in [("report", report_read), ("console", console_read)] {
        std::thread::spawn(move || {
            for line in std::io::BufRead::lines(std::io::BufReader::new(File::from(pipe))).map_while(Result::ok) {
                eprintln!("{name}: {line}");
            }
        });
    }
    let mut command = Command::new(setting("NACELLE_TEST_VMM"));
    command.stdin(Stdio::null()).stdout(Stdio::null());
    let map = |parent_fd, child_fd| FdMapping { parent_fd, child_fd };
    command
        .fd_mappings(vec![
            map(config_read, CONFIG_FD),
            map(report_write, REPORT_FD),
            map(lifeline_read, LIFELINE_FD),
            map(console_write, CONSOLE_FD),
        ])
        .expect("mappings");
    let started = Instant::now();
    let vmm = command.spawn().expect("nacelle-vmm");
    drop(command);
    serde_json::to_writer(File::from(config_write), &config).expect("config");
    let host = tokio::time::timeout(Duration::from_secs(180), Host::answer(dialled)).await.expect("the guest dials");
    eprintln!("the guest dialled after {:?}", started.elapsed());
    (Machine { vmm, directory, _lifeline: lifeline }, host)
}

fn now_ns() -> i64 {
    SystemTime::now().duration_since(UNIX_EPOCH).expect("after 1970").as_nanos() as i64
}

async fn configure(host: &Host) {
    let share = GuestShare { tag: LAYERS_TAG.into(), target: LAYERS_DIR.into(), read_only: true, ..Default::default() };
    let request = ConfigureRequest {
        shares: vec![share],
        upper_serial: UPPER_SERIAL.into(),
        hostname: "pod".into(),
        realtime_ns: now_ns(),
        ..Default::default()
    };
    let response = host.agent.configure(long(), &request).await.expect("configure");
    eprintln!("kernel {}, follows the host's clock: {}", response.kernel, response.follows_host_clock);
    assert!(!response.kernel.is_empty());
    let twice = host.agent.configure(long(), &request).await;
    assert!(matches!(twice, Err(ttrpc::Error::RpcStatus(_))), "it comes once: {twice:?}");
}

fn vm<F: Future<Output = ()>>(memory_mib: u32, body: impl FnOnce(Machine, Host) -> F) {
    let runtime = tokio::runtime::Builder::new_current_thread().enable_all().build().expect("runtime");
    runtime.block_on(async {
        let (machine, host) = boot(memory_mib).await;
        configure(&host).await;
        tokio::time::timeout(Duration::from_secs(600), body(machine, host)).await.expect("in time");
    });
}

async fn shut_down(mut machine: Machine, host: &Host) {
    // The answer may be lost.
    let _ = host.agent.shutdown(long(), &ShutdownRequest::default()).await;
    let deadline = Instant::now() + Duration::from_secs(30);
    while Instant::now() < deadline {
        if let Some(status) = machine.vmm.try_wait().expect("wait") {
            eprintln!("the machine ended: {status}");
            return;
        }
        tokio::time::sleep(Duration::from_millis(50)).await;
    }
    machine.vmm.kill().expect("kill");
    panic!("the machine did not end");
}

#[test]
#[ignore = "needs KVM: src/agent/tests/vm.sh"]
fn containers_live_in_a_machine() {
    vm(512, |machine, host| async move {
        let (out, err) = (host.stream(), host.stream());
        let io = Names { stdout: out.name.clone(), stderr: err.name.clone(), ..Names::default() };
        let script = "echo out; echo err >&2; hostname; touch /new && cat /proc/1/comm; exit 3";
        let created = Instant::now();
        host.create("c1", spec("c1", &["sh", "-c", script]), &["base"], io).await.expect("create");
        eprintln!("created after {:?}", created.elapsed());
        host.start("c1", "").await.expect("start");
        let (out, err) = tokio::join!(out.text(), err.text());
        assert_eq!((out.as_str(), err.as_str()), ("out\nbox\nsh\n", "err\n"));
        assert_eq!(host.wait("c1", "").await, 3);
        host.delete("c1", "").await.expect("delete");

        // A lower that appears while the machine runs.
        fs::copy(setting("NACELLE_TEST_LATE"), machine.directory.path().join("layers/late")).expect("lower");
        let mut pod = spec("c2", &["sleep", "1000"]);
        pod["hostname"] = json!(null);
        pod["linux"]["namespaces"] = json!([{"type": "mount"}, {"type": "pid"}]);
        pod["linux"]["sysctl"] = json!({"net.ipv4.ip_unprivileged_port_start": "80"});
        host.create("c2", pod, &["base", "late"], Names::default()).await.expect("create");
        host.start("c2", "").await.expect("start");
        let script = "cat /late; hostname; cat /proc/sys/net/ipv4/ip_unprivileged_port_start; \
                      grep -c . /proc/net/if_inet6 >/dev/null; cat /sys/class/net/lo/operstate; ulimit -n; \
                      cat /proc/mounts | grep ' / ' | cut -d' ' -f1,3";
        let (status, text) = host.run("c2", "e1", process(&["sh", "-c", script])).await;
        assert_eq!(status, 0);
        assert_eq!(text, "late\npod\n80\nunknown\n1048576\noverlay overlay\n", "{text}");

        let (stdin, out) = (host.stream(), host.stream());
        let io = Names { stdin: stdin.name.clone(), stdout: out.name.clone(), terminal: true, ..Names::default() };
        host.exec("c2", "tty", process(&["sh"]), io).await.expect("exec");
        host.start("c2", "tty").await.expect("start");
        let mut stdin = Stdin(stdin.connection().await);
        stdin.send_all(b"stty size; exit 5\n", false).await;
        let mut out = out.connection().await;
        while next(&mut out).await.is_some() {}
        assert_eq!(host.wait("c2", "tty").await, 5);

        let bytes: Vec<u8> = (0..20 << 20).map(|n: u32| (n.wrapping_mul(2_654_435_761) >> 24) as u8).collect();
        let (stdin, out) = (host.stream(), host.stream());
        let io = Names { stdin: stdin.name.clone(), stdout: out.name.clone(), ..Names::default() };
        host.exec("c2", "cat", process(&["cat"]), io).await.expect("exec");
        let began = Instant::now();
        let (started, _stdin, back) = tokio::join!(
            host.start("c2", "cat"),
            async {
                let mut stdin = Stdin(stdin.connection().await);
                stdin.send_all(&bytes, true).await;
                stdin
            },
            out.bytes()
        );
        started.expect("start");
        eprintln!("20 MiB there and back in {:?}", began.elapsed());
        assert!(back == bytes, "{} of {} bytes", back.len(), bytes.len());

        let skew = host.run("c2", "date", process(&["busybox", "date", "+%s"])).await.1;
        let skew = skew.trim().parse::<i64>().expect("seconds") - now_ns() / 1_000_000_000;
        assert!(skew.abs() <= 2, "{skew}");
        let step = SetTimeRequest { realtime_ns: now_ns(), ..Default::default() };
        host.agent.set_time(long(), &step).await.expect("set time");
        shut_down(machine, &host).await;
    });
}

#[test]
#[ignore = "needs KVM: src/agent/tests/vm.sh"]
fn limits_hold_in_a_machine() {
    vm(512, |machine, host| async move {
        let mut limited = spec("c1", &["sleep", "1000"]);
        limited["linux"]["resources"] = json!({
            "memory": {"limit": 33_554_432, "swap": 33_554_432},
            "cpu": {"shares": 512, "quota": 50_000, "period": 100_000},
            "pids": {"limit": 20},
            "hugepageLimits": [{"pageSize": "2MB", "limit": 0}, {"pageSize": "1GB", "limit": 0}]
        });
        host.create("c1", limited, &["base"], Names::default()).await.expect("create");
        host.start("c1", "").await.expect("start");
        // More than the limit, in an exec: the exec is killed, the container lives.
        let hog = ["dd", "if=/dev/zero", "of=/dev/null", "bs=100M", "count=1"];
        host.exec("c1", "hog", process(&hog), Names::default()).await.expect("exec");
        host.start("c1", "hog").await.expect("start");
        assert_eq!(host.wait("c1", "hog").await, 137);
        let events = host.agent.events(long(), &EventsRequest::default()).await.expect("events");
        assert_eq!(events.events.iter().map(|e| e.number).collect::<Vec<_>>(), [1, 2]);
        assert_eq!(host.events().await, ["oom c1", "exit c1 hog 137"]);

        let stats = StatsRequest { id: "c1".into(), ..Default::default() };
        let read = || async {
            let stats = host.task.stats(long(), &stats).await.expect("stats").stats;
            containerd_shim_protos::cgroups_v2::metrics::Metrics::parse_from_bytes(&stats.value).expect("metrics")
        };
        let metrics = read().await;
        assert_eq!((metrics.memory.usage_limit, metrics.pids.limit), (33_554_432, 20));
        assert!(metrics.memory.usage > 0 && metrics.memory_events.oom_kill == 1 && metrics.memory.max_usage > 0);
        assert!(metrics.cpu.usage_usec > 0 && metrics.cpu.nr_periods > 0, "{metrics:?}");
        let resources =
            serde_json::to_vec(&json!({"memory": {"limit": 67_108_864}, "pids": {"limit": -1}})).expect("json");
        let resources = Any { value: resources, ..Default::default() };
        let update =
            UpdateTaskRequest { id: "c1".into(), resources: MessageField::some(resources), ..Default::default() };
        host.task.update(long(), &update).await.expect("update");
        assert_eq!(read().await.memory.usage_limit, 67_108_864);

        // The main process itself.
        let mut limited = spec("c2", &hog);
        limited["linux"]["resources"] = json!({"memory": {"limit": 16_777_216}});
        host.create("c2", limited, &["base"], Names::default()).await.expect("create");
        host.start("c2", "").await.expect("start");
        assert_eq!(host.wait("c2", "").await, 137);
        let events = host.events().await;
        assert_eq!(events[2..], ["oom c2", "exit c2  137"]);
        shut_down(machine, &host).await;
    });
}

#[test]
#[ignore = "needs KVM: src/agent/tests/vm.sh"]
fn execs_cost_nothing_in_a_machine() {
    // A thousand take their time where the machine is emulated.
    let execs = std::env::var("NACELLE_TEST_EXECS").map_or(100, |number| number.parse().expect("number"));
    vm(256, |machine, host| async move {
        let mut pod = spec("c1", &["sleep", "1000"]);
        // The guest's own processes and mounts, to see what is left behind.
        pod["linux"]["namespaces"] = json!([{"type": "mount"}]);
        host.create("c1", pod, &["base"], Names::default()).await.expect("create");
        host.start("c1", "").await.expect("start");
        let script = "ls /proc/1/fd | wc -l; ls -d /proc/[0-9]* | wc -l; grep -c . /proc/1/mounts; \
                      grep MemAvailable /proc/meminfo | tr -dc 0-9";
        let look = |name: &'static str| {
            let host = &host;
            async move {
                let (_, text) = host.run("c1", name, process(&["sh", "-c", script])).await;
                text.lines().map(|line| line.trim().parse::<u64>().expect("number")).collect::<Vec<_>>()
            }
        };
        let mut number = 0;
        for _ in 0..20 {
            number += 1;
            host.run("c1", &format!("warm-{number}"), process(&["true"])).await;
        }
        let before = look("before").await;
        let began = Instant::now();
        for _ in 0..execs {
            number += 1;
            let (status, text) = host.run("c1", &format!("e-{number}"), process(&["echo", "x"])).await;
            assert_eq!((status, text.as_str()), (0, "x\n"));
            let after = EventsRequest { after: number - 1, ..Default::default() };
            host.agent.events(long(), &after).await.expect("events");
        }
        eprintln!("{:?} an exec", began.elapsed() / execs);
        let after = look("after").await;
        eprintln!("before {before:?}, after {after:?}: descriptors, processes, mounts, KiB available");
        assert_eq!(before[..3], after[..3]);
        assert!(after[3] + 4096 > before[3], "memory");
        shut_down(machine, &host).await;
    });
}

#[test]
#[ignore = "needs KVM: src/agent/tests/vm.sh"]
fn a_machine_ends_with_its_connection() {
    vm(256, |machine, host| async move {
        // Whole: a block takes no more of it than it names, and the rest would be gone.
        let mut machine = machine;
        host.create("c1", spec("c1", &["sleep", "1000"]), &["base"], Names::default()).await.expect("create");
        host.start("c1", "").await.expect("start");
        drop(host);
        let deadline = Instant::now() + Duration::from_secs(30);
        while machine.vmm.try_wait().expect("wait").is_none() {
            assert!(Instant::now() < deadline, "the machine did not end");
            tokio::time::sleep(Duration::from_millis(50)).await;
        }
    });
}

/// Not a test: vm.sh makes its lower of it.
#[test]
#[ignore = "makes what vm.sh needs"]
fn make_a_tree() {
    base_tree(&setting("NACELLE_TEST_TREE"));
}
