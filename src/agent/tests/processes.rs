//! What a process finds: its streams, its user, its limits, its filter.

mod support;

use std::time::Duration;

use containerd_shim_protos::api::{CloseIORequest, ResizePtyRequest, StatsRequest};
use nacelle_protocol::stream::{HEADER_LEN, MAX_DATA, WINDOW};
use serde_json::json;
use support::{Host, Names, Stdin, guest, long, next, process, spec, traces};
use tokio::io::AsyncWriteExt;

async fn running(host: &Host, id: &str, change: impl FnOnce(&mut serde_json::Value)) {
    let mut spec = spec(id, &["sleep", "1000"]);
    change(&mut spec);
    host.create(id, spec, &["base"], Names::default()).await.expect("create");
    host.start(id, "").await.expect("start");
}

#[test]
fn an_exec_gets_what_its_process_says() {
    guest("an_exec_gets_what_its_process_says", |host| async move {
        running(&host, "c1", |_| {}).await;
        let script = "id -u; id -g; id -G; pwd; echo $X; ulimit -n; grep -E 'CapEff|CapBnd|NoNewPrivs|SigIgn' /proc/self/status; cat /proc/self/oom_score_adj";
        let mut wanted = process(&["sh", "-c", script]);
        wanted["user"] = json!({"uid": 1000, "gid": 1001, "additionalGids": [1002, 1003]});
        wanted["cwd"] = json!("/tmp");
        wanted["env"] = json!(["PATH=/bin", "X=y=z"]);
        wanted["rlimits"] = json!([{"type": "RLIMIT_NOFILE", "soft": 77, "hard": 88}]);
        wanted["oomScoreAdj"] = json!(321);
        wanted["capabilities"] = json!({"bounding": ["CAP_KILL"], "permitted": [], "effective": []});
        let (status, text) = host.run("c1", "e1", wanted).await;
        assert_eq!(status, 0);
        let lines: Vec<&str> = text.lines().collect();
        assert_eq!(lines[..6], ["1000", "1001", "1001 1002 1003", "/tmp", "y=z", "77"]);
        let after = |key: &str| lines.iter().find_map(|l| l.strip_prefix(key)).unwrap_or_default().trim().to_owned();
        assert_eq!(after("CapEff:"), "0000000000000000");
        assert_eq!(after("CapBnd:"), "0000000000000020");
        assert_eq!(after("NoNewPrivs:"), "1");
        let ignored = u64::from_str_radix(&after("SigIgn:"), 16).expect("hexadecimal");
        assert_eq!(ignored & (1 << 12), 0, "SIGPIPE is not ignored");
        assert_eq!(lines.last(), Some(&"321"));

        // Nobody but root would be let in by the pipe's first owner.
        let mut writer = process(&["sh", "-c", "echo through > /proc/self/fd/1"]);
        writer["user"] = json!({"uid": 1000, "gid": 1000});
        assert_eq!(host.run("c1", "e2", writer).await, (0, "through\n".to_owned()));

        let mut lost = process(&["true"]);
        lost["cwd"] = json!("/no/such/place");
        host.exec("c1", "e3", lost, Names::default()).await.expect("exec");
        let error = host.start("c1", "e3").await.expect_err("no such directory").to_string();
        assert!(error.contains("/no/such/place"), "{error}");
    });
}

#[test]
fn the_main_process_gets_its_directory_made() {
    guest("the_main_process_gets_its_directory_made", |host| async move {
        let out = host.stream();
        let mut spec = spec("c1", &["sh", "-c", "pwd; stat -c %u:%a ."]);
        spec["process"]["cwd"] = json!("/made/for/me");
        spec["process"]["user"] = json!({"uid": 1000, "gid": 1000});
        let io = Names { stdout: out.name.clone(), ..Names::default() };
        host.create("c1", spec, &["base"], io).await.expect("create");
        host.start("c1", "").await.expect("start");
        assert_eq!(out.text().await, "/made/for/me\n0:755\n");
    });
}

#[test]
fn the_filter_holds_for_execs_too() {
    guest("the_filter_holds_for_execs_too", |host| async move {
        for (id, no_new_privileges) in [("c1", Some(true)), ("c2", Some(false)), ("c3", None)] {
            running(&host, id, |spec| {
                spec["linux"]["seccomp"] = json!({
                    "defaultAction": "SCMP_ACT_ALLOW",
                    "architectures": ["SCMP_ARCH_X86_64"],
                    "syscalls": [{"names": ["mkdir", "mkdirat"], "action": "SCMP_ACT_ERRNO", "errnoRet": 38}]
                });
            })
            .await;
            let mut wanted =
                process(&["sh", "-c", "grep Seccomp: /proc/self/status; mkdir /tmp/x 2>&1; sh -c 'mkdir /tmp/y' 2>&1"]);
            wanted["noNewPrivileges"] = json!(no_new_privileges);
            wanted["user"] = json!({"uid": 1000, "gid": 1000});
            let (_, text) = host.run(id, "e1", wanted).await;
            assert!(text.starts_with("Seccomp:\t2\n"), "{text}");
            assert_eq!(text.matches("Function not implemented").count(), 2, "{text}");
        }
    });
}

#[test]
fn streams_carry_everything() {
    guest("streams_carry_everything", |host| async move {
        running(&host, "c1", |_| {}).await;
        // 20 MiB there and back, through a process.
        let bytes: Vec<u8> = (0..20 << 20).map(|n: u32| (n.wrapping_mul(2_654_435_761) >> 24) as u8).collect();
        let (stdin, out) = (host.stream(), host.stream());
        let io = Names { stdin: stdin.name.clone(), stdout: out.name.clone(), ..Names::default() };
        host.exec("c1", "e1", process(&["cat"]), io).await.expect("exec");
        let (started, mut stdin, back) = tokio::join!(
            host.start("c1", "e1"),
            async {
                let mut stdin = Stdin(stdin.connection().await);
                stdin.send_all(&bytes, true).await;
                stdin
            },
            out.bytes()
        );
        started.expect("start");
        assert!(back == bytes, "{} of {} bytes", back.len(), bytes.len());
        assert_eq!(host.wait("c1", "e1").await, 0);
        let _ = stdin.0.shutdown().await;

        // The last bytes of a process that ends at once.
        for n in 0..20 {
            let exec_id = format!("fast-{n}");
            let script = "seq 1 20000 | tail -n 1; exec true";
            assert_eq!(host.run("c1", &exec_id, process(&["sh", "-c", script])).await, (0, "20000\n".into()));
        }

        // CloseIO instead of an end of file in the stream.
        let (stdin, out) = (host.stream(), host.stream());
        let io = Names { stdin: stdin.name.clone(), stdout: out.name.clone(), ..Names::default() };
        host.exec("c1", "e2", process(&["cat"]), io).await.expect("exec");
        host.start("c1", "e2").await.expect("start");
        let mut stdin = Stdin(stdin.connection().await);
        stdin.send_all(b"kept", false).await;
        let mut out = out.connection().await;
        assert_eq!(next(&mut out).await.as_deref(), Some(&b"kept"[..]));
        let close = CloseIORequest { id: "c1".into(), exec_id: "e2".into(), stdin: true, ..Default::default() };
        host.task.close_io(long(), &close).await.expect("close");
        assert_eq!(next(&mut out).await, None);
        assert_eq!(host.wait("c1", "e2").await, 0);
    });
}

#[test]
fn a_host_that_does_not_read_stalls_the_process_only() {
    guest("a_host_that_does_not_read_stalls_the_process_only", |host| async move {
        running(&host, "c1", |_| {}).await;
        let out = host.stream();
        let io = Names { stdout: out.name.clone(), ..Names::default() };
        host.exec("c1", "e1", process(&["dd", "if=/dev/zero", "bs=64k", "count=64"]), io).await.expect("exec");
        host.start("c1", "e1").await.expect("start");
        let mut out = out.connection().await;
        // No credit is given: the whole frames that fit into one window arrive, and not a byte more.
        let frame = MAX_DATA - HEADER_LEN;
        let (mut window, whole) = (0, WINDOW as usize / frame * frame);
        while window < whole {
            window += next(&mut out).await.expect("a frame").len();
        }
        assert_eq!(window, whole);
        let more = tokio::time::timeout(Duration::from_millis(300), next(&mut out)).await;
        assert!(more.is_err(), "not a byte more");
        assert_eq!(host.run("c1", "e2", process(&["echo", "others go on"])).await.1, "others go on\n");
        drop(out);
        assert_eq!(host.wait("c1", "e1").await, 128 + 13, "SIGPIPE, once the host has gone");
    });
}

#[test]
fn a_process_left_behind_holds_nobody_up() {
    guest("a_process_left_behind_holds_nobody_up", |host| async move {
        running(&host, "c1", |_| {}).await;
        let out = host.stream();
        let io = Names { stdout: out.name.clone(), ..Names::default() };
        let script = "(sleep 1; echo late) & echo early";
        host.exec("c1", "e1", process(&["sh", "-c", script]), io).await.expect("exec");
        host.start("c1", "e1").await.expect("start");
        assert_eq!(host.wait("c1", "e1").await, 0);
        host.delete("c1", "e1").await.expect("deleted while its pipe is held");
        assert_eq!(out.text().await, "early\nlate\n");
    });
}

#[test]
fn a_terminal_is_one() {
    guest("a_terminal_is_one", |host| async move {
        let (stdin, out) = (host.stream(), host.stream());
        let io = Names { stdin: stdin.name.clone(), stdout: out.name.clone(), terminal: true, ..Names::default() };
        let mut spec = spec("c1", &["sh", "-c", "stty size; stat -c %u /dev/console; read x; stty size; echo got $x"]);
        spec["process"]["consoleSize"] = json!({"height": 24, "width": 80});
        spec["process"]["user"] = json!({"uid": 1000, "gid": 1000});
        host.create("c1", spec, &["base"], io).await.expect("create");
        host.start("c1", "").await.expect("start");
        let mut stdin = Stdin(stdin.connection().await);
        let mut out = out.connection().await;
        let mut text = String::new();
        while !text.contains("1000") {
            text += &String::from_utf8(next(&mut out).await.expect("more")).expect("text");
        }
        assert_eq!(text, "24 80\r\n1000\r\n");
        let size = ResizePtyRequest { id: "c1".into(), width: 100, height: 30, ..Default::default() };
        host.task.resize_pty(long(), &size).await.expect("resize");
        stdin.send_all(b"word\n", false).await;
        text.clear();
        while let Some(bytes) = next(&mut out).await {
            text += &String::from_utf8(bytes).expect("text");
        }
        assert_eq!(text, "word\r\n30 100\r\ngot word\r\n");
        assert_eq!(host.wait("c1", "").await, 0);
        host.delete("c1", "").await.expect("delete");

        running(&host, "c2", |_| {}).await;
        let out = host.stream();
        let io = Names { stdout: out.name.clone(), terminal: true, ..Names::default() };
        let mut wanted = process(&["stty", "size"]);
        wanted["consoleSize"] = json!({"height": 11, "width": 22});
        host.exec("c2", "e1", wanted, io).await.expect("exec");
        host.start("c2", "e1").await.expect("start");
        assert_eq!(out.text().await, "11 22\r\n");
    });
}

#[test]
fn many_execs_leave_nothing() {
    guest("many_execs_leave_nothing", |host| async move {
        running(&host, "c1", |_| {}).await;
        assert_eq!(host.run("c1", "warm", process(&["true"])).await.0, 0);
        tokio::time::sleep(Duration::from_millis(200)).await;
        let before = (support::descriptors(), traces(), support::processes().len());
        for round in 0..25 {
            let one = |n: usize| {
                let host = &host;
                async move {
                    let exec_id = format!("e-{round}-{n}");
                    assert_eq!(
                        host.run("c1", &exec_id, process(&["echo", &exec_id])).await,
                        (0, format!("{exec_id}\n"))
                    );
                }
            };
            tokio::join!(one(0), one(1), one(2), one(3));
        }
        tokio::time::sleep(Duration::from_millis(200)).await;
        let files: Vec<_> =
            std::fs::read_dir("/run/nacelle/containers/c1").expect("files").flatten().map(|e| e.file_name()).collect();
        assert_eq!(files.len(), 4, "{files:?}");
        assert_eq!((support::descriptors(), traces(), support::processes().len()), before);
        assert_eq!(host.events().await.len(), 101);
    });
}

#[test]
fn numbers_stay_until_the_end() {
    guest("numbers_stay_until_the_end", |host| async move {
        use protobuf::Message;
        running(&host, "c1", |_| {}).await;
        host.kill("c1", "", 15, true).await.expect("the first process of a namespace need not listen");
        host.kill("c1", "", 9, true).await.expect("kill");
        host.wait("c1", "").await;
        let request = StatsRequest { id: "c1".into(), ..Default::default() };
        let stats = host.task.stats(long(), &request).await.expect("stats").stats;
        assert_eq!(stats.type_url, "io.containerd.cgroups.v2.Metrics");
        let metrics =
            containerd_shim_protos::cgroups_v2::metrics::Metrics::parse_from_bytes(&stats.value).expect("metrics");
        assert!(metrics.cpu.usage_usec > 0, "{metrics:?}");
        host.delete("c1", "").await.expect("delete");
    });
}
