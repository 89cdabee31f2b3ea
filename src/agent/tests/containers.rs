//! A container's life, seen from the host.

mod support;

use std::time::Duration;

use containerd_shim_protos::api::{PauseRequest, PidsRequest, ResumeRequest, Status};
use serde_json::json;
use support::{Host, Names, guest, image, long, process, spec, traces};
use ttrpc::{Code, Error};

fn code(error: &Error) -> Code {
    match error {
        Error::RpcStatus(status) => status.code(),
        other => panic!("{other}"),
    }
}

fn text(error: &Error) -> &str {
    match error {
        Error::RpcStatus(status) => status.message(),
        other => panic!("{other}"),
    }
}

async fn running(host: &Host, id: &str) {
    host.create(id, spec(id, &["sleep", "1000"]), &["base"], Names::default()).await.expect("create");
    host.start(id, "").await.expect("start");
}

#[test]
fn lives_and_leaves_nothing() {
    guest("lives_and_leaves_nothing", |host| async move {
        let before = support::descriptors();
        let (out, err) = (host.stream(), host.stream());
        let io = Names { stdout: out.name.clone(), stderr: err.name.clone(), ..Names::default() };
        let script = "echo out; echo err >&2; hostname; exit 3";
        let pid = host.create("c1", spec("c1", &["sh", "-c", script]), &["base"], io).await.expect("create");
        assert!(pid > 0);
        assert_eq!(host.status("c1", "").await, Status::CREATED);
        assert_eq!(host.start("c1", "").await.expect("start"), pid);
        let (out, err) = tokio::join!(out.text(), err.text());
        assert_eq!((out.as_str(), err.as_str()), ("out\nbox\n", "err\n"));
        assert_eq!(host.wait("c1", "").await, 3);
        assert_eq!(host.wait("c1", "").await, 3, "also afterwards");
        assert_eq!(host.status("c1", "").await, Status::STOPPED);
        assert_eq!(host.events().await, ["exit c1  3"]);
        let again = host.start("c1", "").await.expect_err("it has ended");
        assert_eq!(code(&again), Code::FAILED_PRECONDITION);
        let killed = host.kill("c1", "", 15, false).await.expect_err("it has ended");
        assert_eq!(code(&killed), Code::NOT_FOUND);
        assert!(text(&killed).contains("process already finished"));
        let deleted = host.delete("c1", "").await.expect("delete");
        assert_eq!((deleted.pid, deleted.exit_status), (pid, 3));
        assert_eq!(code(&host.delete("c1", "").await.expect_err("it is gone")), Code::NOT_FOUND);
        assert_eq!(traces(), [""; 0]);
        tokio::time::sleep(Duration::from_millis(100)).await;
        assert_eq!(support::processes(), [""; 0]);
        assert_eq!(support::descriptors(), before, "descriptors");
    });
}

#[test]
fn a_missing_program_is_named_at_create() {
    guest("a_missing_program_is_named_at_create", |host| async move {
        for (id, program, words) in [
            ("c1", "/no/such", "no such file or directory"),
            ("c2", "nosuch", "no such file or directory"),
            ("c3", "/bin/plain", "permission denied"),
        ] {
            let created = host.create(id, spec(id, &[program]), &["base"], Names::default()).await;
            let error = created.expect_err("no program");
            assert!(text(&error).contains(program) && text(&error).contains(words), "{}", text(&error));
            assert_eq!(code(&error), Code::UNKNOWN);
            assert_eq!(code(&host.start(id, "").await.expect_err("nothing of it is left")), Code::NOT_FOUND);
        }
        running(&host, "c4").await;
        host.exec("c4", "e1", process(&["nosuch"]), Names::default()).await.expect("exec");
        let error = host.start("c4", "e1").await.expect_err("no program");
        assert!(text(&error).contains("nosuch") && text(&error).contains("no such file"), "{}", text(&error));
        assert_eq!(host.wait("c4", "e1").await, 127);
        host.delete("c4", "e1").await.expect("delete exec");
        host.kill("c4", "", 9, true).await.expect("kill");
        host.wait("c4", "").await;
        host.delete("c4", "").await.expect("delete");
        assert_eq!(traces(), [""; 0]);
    });
}

#[test]
fn states_are_respected() {
    guest("states_are_respected", |host| async move {
        assert_eq!(code(&host.start("no", "").await.expect_err("unknown")), Code::NOT_FOUND);
        running(&host, "c1").await;
        let names = Names::default();
        let twice = host.create("c1", spec("c1", &["true"]), &["base"], names.clone()).await.expect_err("exists");
        assert_eq!(code(&twice), Code::ALREADY_EXISTS);
        assert_eq!(code(&host.delete("c1", "").await.expect_err("runs")), Code::FAILED_PRECONDITION);
        assert_eq!(code(&host.start("c1", "").await.expect_err("runs")), Code::FAILED_PRECONDITION);
        assert_eq!(code(&host.start("c1", "no").await.expect_err("unknown")), Code::NOT_FOUND);

        host.exec("c1", "e1", process(&["true"]), names.clone()).await.expect("exec");
        let twice = host.exec("c1", "e1", process(&["true"]), names.clone()).await.expect_err("exists");
        assert_eq!(code(&twice), Code::ALREADY_EXISTS);
        assert_eq!(code(&host.kill("c1", "e1", 9, false).await.expect_err("not started")), Code::FAILED_PRECONDITION);

        host.task.pause(long(), &PauseRequest { id: "c1".into(), ..Default::default() }).await.expect("pause");
        assert_eq!(host.status("c1", "").await, Status::PAUSED);
        assert_eq!(code(&host.start("c1", "e1").await.expect_err("paused")), Code::FAILED_PRECONDITION);
        host.task.resume(long(), &ResumeRequest { id: "c1".into(), ..Default::default() }).await.expect("resume");
        assert_eq!(host.status("c1", "").await, Status::RUNNING);
        host.start("c1", "e1").await.expect("start");
        assert_eq!(host.wait("c1", "e1").await, 0);

        let pids = PidsRequest { id: "c1".into(), ..Default::default() };
        assert_eq!(host.task.pids(long(), &pids).await.expect("pids").processes.len(), 1);
        host.exec("c1", "e2", process(&["true"]), names.clone()).await.expect("exec");
        host.kill("c1", "", 9, false).await.expect("kill");
        assert_eq!(host.wait("c1", "").await, 137);
        assert_eq!(code(&host.start("c1", "e2").await.expect_err("ended")), Code::FAILED_PRECONDITION);
        assert!(host.task.pids(long(), &pids).await.expect("pids").processes.is_empty());
        host.delete("c1", "").await.expect("delete");
        assert_eq!(host.events().await, ["exit c1 e1 0", "exit c1  137"]);

        host.create("c2", spec("c2", &["true"]), &["base"], names).await.expect("create");
        host.delete("c2", "").await.expect("a container that was never started");
        assert_eq!(traces(), [""; 0]);
    });
}

#[test]
fn bad_requests_are_refused_whole() {
    guest("bad_requests_are_refused_whole", |host| async move {
        let names = Names::default();
        let good = || spec("c1", &["true"]);
        for bad in ["", "../x", "a b"] {
            let error = host.create(bad, good(), &["base"], names.clone()).await.expect_err("id");
            assert_eq!(code(&error), Code::INVALID_ARGUMENT);
        }
        let error = host.create("c1", json!({"ociVersion": 7}), &["base"], names.clone()).await.expect_err("spec");
        assert_eq!(code(&error), Code::INVALID_ARGUMENT);
        for lowers in [&[][..], &["../base"], &["missing"], &["base", "missing"]] {
            assert!(host.create("c1", good(), lowers, names.clone()).await.is_err(), "{lowers:?}");
            assert_eq!(traces(), [""; 0]);
        }
        let stream = Names { stdout: "stream:99".into(), ..names.clone() };
        assert!(host.create("c1", good(), &["base"], stream).await.is_err(), "the host does not know it");
        let fifo = Names { stdout: "/run/fifo".into(), ..names.clone() };
        let error = host.create("c1", good(), &["base"], fifo).await.expect_err("no stream's name");
        assert_eq!(code(&error), Code::INVALID_ARGUMENT);
        let mut spec = good();
        spec["mounts"] = json!([{"destination": "/x", "type": "bind", "source": "/no/such", "options": ["bind"]}]);
        let error = host.create("c1", spec, &["base"], names.clone()).await.expect_err("mount");
        assert!(text(&error).contains("/no/such"), "{}", text(&error));
        assert_eq!(traces(), [""; 0]);
        // And nothing of it is in the way.
        host.create("c1", good(), &["base"], names).await.expect("create");
        host.start("c1", "").await.expect("start");
        assert_eq!(host.wait("c1", "").await, 0);
    });
}

#[test]
fn a_hundred_lowers_and_one_that_is_shared() {
    guest("a_hundred_lowers_and_one_that_is_shared", |host| async move {
        let mut lowers = vec!["base".to_owned()];
        for n in 0..120 {
            let directory = std::path::Path::new("/run/layer");
            let _ = std::fs::remove_dir_all(directory);
            std::fs::create_dir_all(directory.join("var")).expect("directory");
            std::fs::write(directory.join(format!("var/{n}")), n.to_string()).expect("file");
            std::fs::write(directory.join("var/top"), n.to_string()).expect("file");
            let name = format!("layer-{n}");
            image(&name, directory);
            lowers.push(name);
        }
        let lowers: Vec<&str> = lowers.iter().map(String::as_str).collect();
        let out = host.stream();
        let io = Names { stdout: out.name.clone(), ..Names::default() };
        let script = "ls /var | wc -l; cat /var/top; echo; touch /var/new && mkdir /a && ls -d /a";
        host.create("c1", spec("c1", &["sh", "-c", script]), &lowers, io).await.expect("create");
        running(&host, "c2").await;
        host.start("c1", "").await.expect("start");
        assert_eq!(out.text().await, "121\n119\n/a\n", "the last lower is the topmost");
        assert_eq!(host.wait("c1", "").await, 0);
        host.delete("c1", "").await.expect("delete");
        let (status, text) = host.run("c2", "e1", process(&["cat", "/etc/passwd"])).await;
        assert!(status == 0 && text.starts_with("root:"), "the lower is still there for the other: {text}");
        host.kill("c2", "", 9, false).await.expect("kill");
        host.wait("c2", "").await;
        host.delete("c2", "").await.expect("delete");
        assert_eq!(traces(), [""; 0]);
    });
}

#[test]
fn the_main_process_ends_last() {
    guest("the_main_process_ends_last", |host| async move {
        running(&host, "c1").await;
        for n in 0..5 {
            let exec_id = format!("e{n}");
            host.exec("c1", &exec_id, process(&["sleep", "1000"]), Names::default()).await.expect("exec");
            host.start("c1", &exec_id).await.expect("start");
        }
        host.kill("c1", "", 9, false).await.expect("kill");
        assert_eq!(host.wait("c1", "").await, 137);
        let events = host.events().await;
        assert_eq!(events.len(), 6, "{events:?}");
        assert_eq!(events[5], "exit c1  137");
        assert!(events[..5].iter().all(|event| event.ends_with("137")), "{events:?}");
        host.delete("c1", "").await.expect("delete");
        assert_eq!(traces(), [""; 0]);
    });
}

#[test]
fn volumes_are_what_the_configuration_says() {
    guest("volumes_are_what_the_configuration_says", |host| async move {
        let volumes = std::path::Path::new("/run/nacelle/volumes");
        std::fs::create_dir_all(volumes.join("data/sub")).expect("directory");
        std::fs::write(volumes.join("hosts"), "127.0.0.1 pod\n").expect("file");
        std::fs::write(volumes.join("data/kept"), "kept\n").expect("file");
        // As the guest has it: what is mounted below later reaches the containers.
        rustix::mount::mount_bind(volumes, volumes).expect("bind");
        rustix::mount::mount_change(volumes, rustix::mount::MountPropagationFlags::SHARED).expect("shared");

        let script = "cat /etc/hosts; echo x >> /etc/hosts; echo $?; cat /data/kept; touch /data/new; echo $?; \
                      touch /ro/new; echo $?; touch /readonly; echo $?; cat /sys/fs/cgroup/cgroup.controllers >/dev/null && echo c; \
                      read word; cat /data/sub/late";
        let mut wanted = spec("c1", &["sh", "-c", script]);
        wanted["root"]["readonly"] = json!(true);
        let mounts = wanted["mounts"].as_array_mut().expect("mounts");
        mounts.push(json!({"destination": "/etc/hosts", "type": "bind", "source": "/run/nacelle/volumes/hosts",
                           "options": ["rbind", "rprivate", "ro"]}));
        mounts.push(json!({"destination": "/data", "type": "bind", "source": "/run/nacelle/volumes/data",
                           "options": ["rbind", "rslave", "rw"]}));
        mounts.push(json!({"destination": "/ro", "type": "bind", "source": "/run/nacelle/volumes/data",
                           "options": ["rbind", "rprivate", "ro"]}));
        let (stdin, out) = (host.stream(), host.stream());
        let io = Names { stdin: stdin.name.clone(), stdout: out.name.clone(), ..Names::default() };
        host.create("c1", wanted, &["base"], io).await.expect("create");
        host.start("c1", "").await.expect("start");
        let mut stdin = support::Stdin(stdin.connection().await);
        rustix::mount::mount("tmpfs", volumes.join("data/sub"), "tmpfs", rustix::mount::MountFlags::empty(), None)
            .expect("a mount that comes later");
        std::fs::write(volumes.join("data/sub/late"), "late\n").expect("file");
        stdin.send_all(b"go\n", true).await;
        assert_eq!(out.text().await, "127.0.0.1 pod\n1\nkept\n0\n1\n1\nc\nlate\n");
        host.wait("c1", "").await;
        host.delete("c1", "").await.expect("delete");
        assert!(volumes.join("data/new").exists() && volumes.join("data/kept").exists(), "volumes outlive containers");
        assert_eq!(std::fs::read_dir("/run/nacelle/containers").expect("list").count(), 0);
    });
}
