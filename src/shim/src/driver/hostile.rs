//! The shim under guests that lie, flood and stall: every behaviour of the crate `hostile-guest`, over UNIX sockets and
//! without a VM. Whatever the guest does, each call is answered in time, the container exits once, the pod ends for a reason
//! that is told, nothing is left, and the shim's memory does not follow the guest's appetite.

use std::panic::AssertUnwindSafe;

use futures::{FutureExt, StreamExt};
use hostile_guest::{BEHAVIOURS, Behaviour, Connection, Dial, Fate};
use rustix::fs::{CWD, FileType, Mode, mknodat};

use super::tests::{World, dead_end};
use super::*;
use crate::sandbox::KILLED;
use crate::task::Exec;

/// What the test may hold at its worst, the guests' own memory included: some twenty answers of their greatest size.
const MEMORY: u64 = 160 << 20;

/// A guest in a thread of its own, which ends with the process.
fn play(name: &'static str, run: std::path::PathBuf) {
    let dial: Dial = Arc::new(move |port| {
        let name = if port == nacelle_protocol::stream::RPC_PORT { "rpc.sock" } else { "stream.sock" };
        let path = run.join("sock").join(name);
        Box::pin(async move {
            // The shim makes its sockets when a container is created, and listens a little later.
            let mut patience = 500;
            let stream = loop {
                match tokio::net::UnixStream::connect(&path).await {
                    Ok(stream) => break stream,
                    Err(e) if patience == 0 => return Err(e),
                    Err(_) => tokio::time::sleep(Duration::from_millis(10)).await,
                }
                patience -= 1;
            };
            Ok(Box::new(stream) as Box<dyn Connection>)
        })
    });
    std::thread::spawn(move || {
        let runtime = tokio::runtime::Builder::new_current_thread().enable_all().build().expect("runtime");
        // It ends with an error when the host has had enough.
        let _ = runtime.block_on(hostile_guest::behave(name, dial));
    });
}

/// Peak of the resident memory, bytes: VmHWM of proc_pid_status(5).
fn peak() -> u64 {
    let status = std::fs::read_to_string("/proc/self/status").expect("read");
    let line = status.lines().find_map(|line| line.strip_prefix("VmHWM:")).expect("VmHWM");
    line.trim_end_matches("kB").trim().parse::<u64>().expect("number") << 10
}

/// A container that may write, as it is only then that the guest is asked for its files, if `writes`.
async fn create(world: &World, writes: bool) -> Result<Reply, TaskError> {
    let Call::Create(mut create) = world.create("sh", &world.log()) else { unreachable!() };
    let stdin = world.log().with_file_name("stdin");
    mknodat(CWD, &stdin, FileType::Fifo, Mode::from_raw_mode(0o600), 0).expect("mkfifo");
    create.io.stdin = stdin.display().to_string();
    if writes {
        create.rootfs[0].options = vec!["rbind".into(), "rw".into()];
    }
    world.call("c1", None, Call::Create(create)).await
}

/// Asks the guest for all that can be asked, and returns what went wrong.
async fn bother(world: &World) -> String {
    let exec =
        Exec { process: br#"{"user":{"uid":0,"gid":0},"cwd":"/","args":["x"]}"#.to_vec(), io: Wanted::default() };
    let mut said = String::new();
    for (id, call) in [
        (None, Call::Start),
        (None, Call::Pids),
        (None, Call::Stats),
        (Some("e1"), Call::Exec(exec)),
        (Some("e1"), Call::Start),
        (None, Call::Update(b"{}".to_vec())),
        (None, Call::Pause),
        (None, Call::Resume),
        (Some("e1"), Call::Resize { width: 80, height: 24 }),
        (None, Call::CloseIo),
    ] {
        if let Err(e) = world.call("c1", id, call).await {
            said += &format!("{}\n", crate::chain(&e));
        }
    }
    said
}

/// Lives through one behaviour.
async fn suffer(behaviour: &Behaviour) {
    let Behaviour { name, fate } = *behaviour;
    // Short where nothing comes, long where this machine may have more to do than this test.
    let seconds = if fate == Fate::Unborn("nothing heard from the guest") { 2 } else { 15 };
    let world = World::with(&format!("boot_timeout_seconds = {seconds}\n"), |run| play(name, run)).await;
    let created = create(&world, name.starts_with("export-")).await;
    let unborn = match fate {
        Fate::Unborn(words) => Some(words),
        // It may be found out before its container is there.
        Fate::Ended(words) | Fate::EndedWhenAsked(words) if created.is_err() => Some(words),
        _ => None,
    };
    if let Some(words) = unborn {
        let text = crate::chain(&created.expect_err(name));
        assert!(text.contains(words), "{name}: {text}");
        assert!(text.len() < 4096, "{name}: an error of {} bytes", text.len());
        world.gone().await;
        assert!(world.leave().await.is_empty(), "{name}: nothing happened");
        return;
    }
    created.expect(name);
    let exit = tokio::spawn(world.wait("c1", None));
    let mut said = bother(&world).await;
    // It may have gone meanwhile.
    let killed = world.call("c1", None, Call::Kill { signal: SIGKILL, all: true }).await;
    said += &killed.map_or_else(|e| crate::chain(&e), |_| String::new());
    let exit = exit.await.expect("join");
    let Ok(Reply::Exit(_, Some(Exit { status, .. }))) = exit else { panic!("{name}: {exit:?}") };
    assert!(status == KILLED || name == "exits-before-the-start-and-again", "{name}: status {status}");
    match fate {
        Fate::Ended(words) | Fate::EndedWhenAsked(words) => {
            let why = dead_end(&world).await;
            assert!(why.contains(words), "{name}: {why}");
            assert!(why.len() < 4096, "{name}: a reason of {} bytes", why.len());
        }
        Fate::Fails(words) => assert!(said.contains(words), "{name}: {said}"),
        Fate::Endures | Fate::Unborn(_) => assert_eq!(said, "", "{name}"),
    }
    let _ = world.call("c1", Some("e1"), Call::Delete).await;
    world.call("c1", None, Call::Delete).await.expect(name);
    world.gone().await;
    let heard = world.leave().await;
    let of_c1 = |line: &&String| line.starts_with("/tasks/exit c1");
    assert_eq!(heard.iter().filter(of_c1).count(), 1, "{name}: {heard:?}");
    assert_eq!(heard.last().map(String::as_str), Some("/tasks/delete"), "{name}: {heard:?}");
}

#[tokio::test]
async fn hostile_guests_cost_their_own_pod_and_nothing_else() {
    let before = peak();
    // Every one is told, not the first alone.
    let lived = futures::stream::iter(BEHAVIOURS).map(|behaviour| AssertUnwindSafe(suffer(behaviour)).catch_unwind());
    let failed = lived.buffer_unordered(6).filter(|result| std::future::ready(result.is_err())).count().await;
    assert_eq!(failed, 0, "behaviours that were not survived, see above");
    let grown = peak().saturating_sub(before);
    assert!(grown < MEMORY, "{} MiB more at the worst", grown >> 20);
}
